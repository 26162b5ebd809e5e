"""The shape of the code: dependencies point one way, files and functions stay short, dangerous calls stay out."""
from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tsugiki"
MAX_FILE, MAX_FUNCTION = 400, 60                      # lines
MAX_DEPENDENCIES = 8
MAX_MEDIAN_METHOD = 80

# A unit is a module or a whole package; the longest name that fits a module is its unit.
UNITS = {
    "core": ("route", "edit", "pool", "group", "tap", "virtual", "merge", "adapters"),
    "capabilities": ("capabilities", "bench"),
    "plan": ("plan", "rehearsal", "rates"),
    "top": ("",),                                     # tsugiki/__init__.py, the public names
}
# What each unit imports, bottom first: a unit may import only what stands above it in this table, and all of it is used.
GRAPH: dict[str, set[str]] = {
    "errors": set(),
    "memory": set(),
    "patterns": {"errors"},
    "weights": {"errors"},
    "load": {"errors", "weights"},
    "sites": {"errors", "patterns", "weights"},
    "kernels": set(),                                 # faster equals of slow things
    "core": {"errors", "kernels", "sites", "weights"},
    "formats.spec": set(),                            # what a method declares about its form on disk: data only
    "methods": {"core", "errors", "formats.spec", "patterns", "sites", "weights"},
    "combine": {"core", "errors", "methods", "sites", "weights"},
    "formats": {"core", "errors", "formats.spec", "load", "methods", "patterns", "sites", "weights"},
    "data": {"errors"},
    "config": {"data", "errors"},
    "train.loss": {"core", "data", "kernels"},                # the trainer's and the evaluator's
    "evaluate": {"config", "core", "data", "errors", "kernels", "load", "memory", "train.loss"},
    "train": {"config", "core", "data", "errors", "evaluate", "formats", "kernels", "load", "memory", "methods", "sites",
              "train.loss", "weights"},
    "capabilities": {"combine", "core", "errors", "formats", "load", "methods", "sites", "weights"},
    "plan": {"config", "core", "data", "errors", "evaluate", "formats", "kernels", "load", "methods", "sites",
             "train"},
    "api": {"config", "core", "data", "errors", "evaluate", "load", "methods", "train", "weights"},
    "compare": {"config", "data", "errors", "evaluate", "load", "memory", "methods", "plan", "train"},
    "serve": {"core", "data", "errors", "evaluate", "formats", "load", "memory", "weights"},
    "top": {"api", "config", "core", "errors", "load", "methods", "sites", "train"},
    "cli": {"api", "capabilities", "combine", "compare", "config", "core", "data", "errors", "evaluate", "formats", "load",
            "methods", "plan", "serve", "train"},
}
# Imports against the stream, made inside a function when it is called. Each has its reason.
UPWARD = {
    ("core", "formats"): "Adapters.save and .load are a user's words for what formats does; the core itself never needs it",
    ("core", "combine"): "Adapters.combine and .convert likewise; what they make is a LoRA, and the core knows no method",
}
# Calls that run what they read, as (module or "", name).
FORBIDDEN_CALLS = {("", "eval"), ("", "exec"), ("", "__import__"), ("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"),
                   ("yaml", "full_load"), ("os", "system"), ("os", "popen"), ("np", "load"), ("numpy", "load")}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


@cache
def trees() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the package: dotted name without the package's own -> (file, syntax tree)."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path, ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def imports(name: str) -> list[tuple[str, str]]:
    """(imported module of the package, "top", "lazy" or "typing") of one module: where in the file the import stands."""
    path, tree = trees()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []

    def resolve(node: ast.Import | ast.ImportFrom) -> list[str]:
        if isinstance(node, ast.Import):
            return [a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "tsugiki"]
        if node.level:
            parents = package.split(".") if package else []
            base = ".".join([*parents[:len(parents) - node.level + 1], *([node.module] if node.module else [])])
        elif (node.module or "").split(".")[0] == "tsugiki":
            base = node.module.partition(".")[2]
        else:
            return []
        inner = [f"{base}.{a.name}".lstrip(".") for a in node.names]
        return sorted({i if i in trees() else base for i in inner})

    def walk(node: ast.AST, where: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                found.extend((target, where) for target in resolve(child))
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                walk(child, "typing")
            else:
                walk(child, "lazy" if isinstance(child, (ast.FunctionDef, ast.Lambda)) and where == "top" else where)
    walk(tree, "top")
    return found


@cache
def unit(module: str) -> str:
    named = {m: u for u, members in UNITS.items() for m in members} | {u: u for u in GRAPH if u not in UNITS}
    fits = [n for n in named if module == n or n and module.startswith(f"{n}.")]
    assert fits, f"{module}: a module of no unit; give it a place in GRAPH"
    return named[max(fits, key=len)]


@cache
def edges() -> dict[tuple[str, str], set[str]]:
    """(unit, imported unit) -> "module (where)" of each import, without what only a type checker reads."""
    found: dict[tuple[str, str], set[str]] = {}
    for name in trees():
        for target, where in imports(name):
            if unit(name) != unit(target) and where != "typing":
                found.setdefault((unit(name), unit(target)), set()).add(f"{name or '__init__'} imports {target} ({where})")
    return found


def test_the_graph_itself_points_one_way():
    order = list(GRAPH)
    for name, below in GRAPH.items():
        assert all(order.index(b) < order.index(name) for b in below), f"{name} names a unit that stands after it"


def test_every_import_points_down_the_graph_and_every_edge_of_the_graph_is_used():
    wrong = [f"{a} -> {b}: {', '.join(sorted(why))}" for (a, b), why in sorted(edges().items())
             if b not in GRAPH[a] and (a, b) not in UPWARD]
    assert not wrong, "imports against the layers:\n" + "\n".join(wrong)
    unused = [f"{a} -> {b}" for a, below in GRAPH.items() for b in sorted(below) if (a, b) not in edges()]
    assert not unused, "the graph allows what nothing needs:\n" + "\n".join(unused)


@pytest.mark.parametrize("pair", UPWARD)
def test_an_import_against_the_stream_waits_for_its_call(pair):
    assert pair in edges(), "no longer there: take it out of UPWARD"
    assert all("(lazy)" in why for why in edges()[pair])


def test_no_module_needs_itself():
    """Import cycles between modules, at the top of files."""
    below = {name: {t for t, where in imports(name) if where == "top"} for name in trees()}

    def reach(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for target in below[name]:
                reach(target, (*path, name))
            done.add(name)
    done: set[str] = set()
    for name in trees():
        reach(name, ())


def test_files_and_functions_stay_short():
    wrong = []
    for path in [p for d in ("src", "scripts", "benchmarks", "examples") for p in sorted((ROOT / d).rglob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MAX_FILE:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {MAX_FILE}")
        for node in ast.walk(ast.parse(text)):
            lines = node.end_lineno - node.lineno + 1 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else 0
            if lines > MAX_FUNCTION:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION}")
    assert not wrong, "\n".join(wrong)


def test_a_method_takes_few_lines():
    """The median file of methods/, those that several methods share among them."""
    files = [path for name, (path, _) in trees().items() if name.startswith("methods.")]
    lines = sorted(path.read_text(encoding="utf-8").count("\n") for path in files)
    assert lines[len(lines) // 2] < MAX_MEDIAN_METHOD and len(lines) > 20


def test_every_module_says_its_idea_in_its_docstrings_first_line():
    for path, tree in trees().values():
        first = (ast.get_docstring(tree) or "").partition("\n")[0]
        assert len(first) > 10, f"{path.relative_to(ROOT)}: no docstring"


def test_only_sites_knows_model_families():
    found = [p.name for name, (p, _) in trees().items() if name != "sites" and "model_type" in p.read_text(encoding="utf-8")]
    assert not found, f"model_type is read in {found}; a family is data in sites.py"


def dangers(tree: ast.AST) -> list[str]:
    """What in a syntax tree runs code that it reads, with its line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"line {node.lineno}: imports {n}" for n in names if n.split(".")[0] in FORBIDDEN_IMPORTS]
        if not isinstance(node, ast.Call):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        if (owner, name) in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno}: calls {ast.unparse(node.func)}")
        for k in node.keywords:
            if isinstance(k.value, ast.Constant) and k.value.value is FORBIDDEN_KEYWORDS.get(k.arg, ...):
                found.append(f"line {node.lineno}: passes {k.arg}={k.value.value}")
    return found


def test_nothing_runs_what_it_reads():
    wrong = [f"{path.relative_to(ROOT)}: {d}" for path, tree in trees().values() for d in dangers(tree)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("code", [
    "import pickle", "from dill import loads", "torch.load(f)", "yaml.load(t)", "eval('1')", "exec(s)", "run(c, shell=True)",
    "f(trust_remote_code=True)", "np.load(f, allow_pickle=True)"])
def test_the_search_for_dangerous_calls_finds_them(code):
    assert dangers(ast.parse(code)) and not dangers(ast.parse("model.eval(); yaml.safe_load(t); f(trust_remote_code=flag)"))


def test_core_dependencies_stay_few():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(project["dependencies"]) <= MAX_DEPENDENCIES
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.split(r"[=<>]", line)[0] for line in lines if line[:1].isalpha()}
    wanted = {re.split(r"[=<>]", d)[0] for d in [*project["dependencies"], *project["optional-dependencies"]["dev"]]}
    assert wanted <= pinned, f"constraints.txt pins no {sorted(wanted - pinned)}"
