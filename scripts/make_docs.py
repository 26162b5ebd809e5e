"""Write docs/configuration.md and docs/methods.md, and the README's table of methods, from the code.

The configuration page is the run's dataclasses, the methods' configs and the command line's flags. What the methods can do is
probed (see src/tsugiki/capabilities.py), which takes about a minute.

    python scripts/make_docs.py            writes them
    python scripts/make_docs.py --check    says which of them is not as the code (exit code 1 if one is not)
    python scripts/make_docs.py --sst2     writes the scores on SST-2 alone, from benchmarks/results/methods_sst2.json
"""
from __future__ import annotations

import collections
import dataclasses
import importlib.util
import inspect
import json
import math
import re
import sys
import types
import typing
from pathlib import Path

import transformers

from tsugiki.capabilities import PROPERTIES, Answer, about, capabilities
from tsugiki.cli.train import KEYS
from tsugiki.config import DataConfig, EvalConfig, RunConfig, TrainConfig
from tsugiki.edit import NARROW, WIDE
from tsugiki.methods import METHODS

ROOT = Path(__file__).parents[1]
SST2 = ROOT / "benchmarks" / "results" / "methods_sst2.json"
SST2_MARK = "<!-- sst2 -->"
START, END = "<!-- The table is written by `make docs`. -->", "<!-- The end of what `make docs` writes. -->"
COLUMNS = ("merge", "unmerge", "mixed", "packed", "checkpointing", "compile", "few", "peft")     # of the README's table
METHODS_HEAD = """# Methods

<!-- Written by `make docs` from the code and from probes; a test keeps it equal. Change the code, not this page. -->

What each method is, its source, its settings, and what it can do. Each yes and no was found by doing it on a tiny Llama, at the
method's default settings (`tsugiki methods --why` does it again on your machine):

"""
SST2_TEXT = """## On SST-2

Methods at their defaults, each at the learning rate that is recommended for a base of this width, on the embedded base (8.0M
parameters, {width} wide) and the same {rows:,} phrases of {words} words from SST-2's training file: {epochs:g} pass, {steps:,}
steps of {batch_size} rows. The score is the share of the 872 sentences of dev.tsv whose own word (good, bad) is the likelier
one; the base alone gives {base:.3f}. `make methods DATA=DIR` goes on with the runs that are missing, seeds 0, 1 and 2 of every
method, and makes the table.

The rates for a base 256 wide are, of those tried, the ones with the least loss on 300 sentences of the training file, no piece of
which was trained on, after {search_rows:,} phrases with seed 0 and without a look at dev.tsv; what was tried is in
`benchmarks/results/methods_sst2_search.json`, for {once} methods a single rate. Large models want the rates of the papers.

The training loss is the mean of the last {last} steps, in nats a token. A row trains two tokens, the word and the end of the
answer, so one that knows the two words and guesses between them has {guess:.3f} (ln 2 / 2).

One base, one task and one short run: 872 rows leave each score uncertain by three points either way, so small differences say
nothing, and a method that is behind here may not be after more steps. The seconds were taken beside other work: they are no
comparison of speed.

Made with {env}.
"""
HEAD = """# Configuration

<!-- Written by `make docs` from the code; a test keeps it equal. Change the code, not this page. -->

A run is one nested configuration. A key can be set in three places; later ones win:

1. a YAML file: `tsugiki train --config run.yaml`,
2. flags, for the common keys: `--lr 1e-3`,
3. `--set`, for any key: `--set train.warmup=0.1 --set method.rank=16`. The value is read as YAML.

```yaml
base: ./my-model
out: runs/first
data:
  files: [rows.jsonl]
  holdout: 0.05
method:
  name: lora
  rank: 16
train:
  epochs: 3
  lr: 0.001
```

All three are checked by one schema before the model is loaded. An unknown key, a wrong type or a value out of range ends
the command with exit code 2 and a line that names the key. The run's folder keeps everything resolved in `run.yaml`.

In the library the same keys are the dataclasses `tsugiki.RunConfig`, `DataConfig`, `TrainConfig` and `EvalConfig`, and a
method's config is a class of `tsugiki.methods`, as `LoRA(rank=16)`. `tsugiki.train(...)` takes the keys of `train` as
keyword arguments.
"""


def table(head: typing.Sequence[str], rows: typing.Iterable[typing.Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def kind(hint: object) -> str:
    """A type in words: `int | None` is "whole number, or none"."""
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", dict: "keys and values", type(None): "none"}
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(kind(h) for h in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        return "list of texts"
    return names[typing.get_origin(hint) or hint]


def value(field: dataclasses.Field) -> str:
    """A default as YAML has it."""
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def allowed(metadata: typing.Mapping) -> str:
    """The values a field may have, as its schema says."""
    choices, low, high, below = (metadata.get(k) for k in ("choices", "low", "high", "below"))
    if choices:
        return ", ".join(f"`{c}`" for c in choices)
    bounds = [f"at least {low:g}"] if low is not None else []
    bounds += [f"at most {high:g}"] if high is not None else []
    return ", ".join(bounds + ([f"below {below:g}"] if below is not None else []))


def fields_table(cls: type, prefix: str) -> str:
    hints = typing.get_type_hints(cls)
    rows = [(f"`{prefix}{f.name}`", kind(hints[f.name]), value(f), allowed(f.metadata), f.metadata["help"])
            for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(hints[f.name]) and "help" in f.metadata]
    return table(("key", "type", "default", "allowed", "meaning"), rows)


def first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def rate(cls: type) -> str:
    """A method's learning rates: of wide bases and, where it has one, of narrow ones."""
    return f"{cls.lr:g}" if cls.small_lr is None else f"{cls.small_lr:g} for a base {NARROW} wide, {cls.lr:g} from {WIDE} on"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, cls, prefix in (("The run", RunConfig, ""), ("data", DataConfig, "data."), ("train", TrainConfig, "train."),
                               ("eval", EvalConfig, "eval.")):
        parts.append(f"## {title}\n\n{first_line(cls)}\n\n{fields_table(cls, prefix)}\n")
    parts.append("## method\n\n`method.name` chooses the method (default `lora`); its other keys are the method's own. "
                 "`train.lr`, when not set, is the method's for a base of this hidden width: between the two widths given, a power "
                 "of the width.\n")
    for name, cls in METHODS.items():
        settings = fields_table(cls, "method.") if dataclasses.fields(cls) else "No settings."
        parts.append(f"### {name}\n\n{first_line(cls)} Learning rate to start from: {rate(cls)}. In the library: "
                     f"`tsugiki.methods.{cls.__name__}`.\n\n{settings}\n")
    flags = [(f"`--{flag.replace('_', '-')}`", f"`{key}`") for flag, key in KEYS.items()]
    parts.append("## Flags of `tsugiki train`\n\n" + table(("flag", "key"), [*flags, ("`--labels`", "`data.labels`")]) +
                 "\n\n`tsugiki COMMAND --help` describes the flags of every command.\n")
    return "\n".join(parts)


Found = dict[str, dict[str, Answer]]


def linked(text: str) -> str:
    """With every arXiv number a link."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def paragraph(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


def readme_table(found: Found) -> str:
    """Every method on a line."""
    rows = []
    for name, cls in METHODS.items():
        title, trains = about(cls)
        short = re.split(r"; (?![^(]*\))", trains)[0].removeprefix("Trains ")
        rows.append((title, f"`{name}`", short, *(found[name][k].says for k in COLUMNS)))
    return table(("method", "`method.name`", "trains", *(PROPERTIES[k].head for k in COLUMNS)), rows)


def readme(text: str, found: Found) -> str:
    """The README with its table between the two marks, and the number of methods in its comparison, as they are now."""
    before, _, rest = text.partition(START)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"README.md: the marks {START} and {END} are not there")
    return re.sub(r"^\| methods \| \d+ \|", f"| methods | {len(METHODS)} |",
                  f"{before}{START}\n\n{readme_table(found)}\n\n{END}{after}", flags=re.M)


def study() -> types.ModuleType:
    """The benchmark that made the results, which is no package."""
    spec = importlib.util.spec_from_file_location("methods_sst2", ROOT / "benchmarks" / "methods_sst2.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def sst2_section() -> str:
    """How well each method does on SST-2, between two marks; made from the results file alone."""
    if not SST2.is_file():
        return f"{SST2_MARK}\n\n{SST2_MARK}\n"
    found, made_by = json.loads(SST2.read_text(encoding="utf-8")), study()
    rates = {name: cls.rate(found["width"]) for name, cls in METHODS.items()}
    runs = {name: made_by.of_method(found, name, lr) for name, lr in rates.items()}
    search = json.loads(made_by.SEARCH.read_text(encoding="utf-8"))
    tried = collections.Counter(key.partition("/")[0] for key in search["search"])
    text = SST2_TEXT.format(**found["setup"], words=found["words"], base=found["base"]["accuracy"], width=found["width"],
                            steps=max((r.get("steps", 0) for of in runs.values() for r in of), default=0),
                            search_rows=search["setup"]["rows"], once=sum(n == 1 for n in tried.values()),
                            last=made_by.LAST, guess=math.log(2) / 2,
                            env=", ".join(f"{k} {v}" for k, v in found["environment"].items() if v != ""))
    head = ("method", "accuracy", "least", "most", "seeds", "rate", "train loss", "trained", "seconds")
    below = [row for name, of in runs.items() if (row := sst2_exception(made_by, name, of))]
    exceptions = f"Below {made_by.PASS:.2f}, and why:\n\n" + table(("method", "accuracy", "train loss", "trained", "why"), below)
    missing = " ".join(f"`{n}`" for n, of in runs.items() if not of)
    return "\n\n".join((SST2_MARK, text + "\n" + table(head, [sst2_row(n, of, rates[n]) for n, of in runs.items() if of]),
                        exceptions if below else f"None is below {made_by.PASS:.2f}.",
                        *([f"Not run yet: {missing}."] if missing else []), SST2_MARK)) + "\n"


def mean(runs: list[dict], key: str) -> float:
    return sum(r[key] for r in runs) / len(runs)


def sst2_exception(made_by: types.ModuleType, name: str, runs: list[dict]) -> tuple[str, ...] | None:
    """The line of a method whose mean is too low: its numbers and the reason."""
    good = [r for r in runs if "accuracy" in r]
    if not runs or not (why := made_by.reason(name, mean(good, "accuracy") if good else 0.0)):
        return None
    if not good:
        return f"`{name}`", "failed", "-", "-", linked(why)
    return f"`{name}`", f"{mean(good, 'accuracy'):.3f}", f"{mean(good, 'train_loss'):.3f}", f"{good[0]['trained']:,}", linked(why)


def sst2_row(name: str, runs: list[dict], rate: float) -> tuple[str, ...]:
    """A method's line: over the seeds that came to an end."""
    good = [r for r in runs if "accuracy" in r]
    failed = f" ({len(runs) - len(good)} failed)" if len(good) < len(runs) else ""
    if not good:
        return f"`{name}`", "failed", "-", "-", f"0{failed}", f"{rate:g}", "-", "-", "-"
    scores = [r["accuracy"] for r in good]
    return (f"`{name}`", f"{mean(good, 'accuracy'):.3f}", f"{min(scores):.3f}", f"{max(scores):.3f}", f"{len(good)}{failed}",
            f"{rate:g}", f"{mean(good, 'train_loss'):.3f}", f"{good[0]['trained']:,}", f"{mean(good, 'seconds'):.0f}")


def with_sst2(text: str) -> str:
    """The page with that section as it is now."""
    before, mark, rest = text.partition(SST2_MARK)
    _, again, after = rest.partition(SST2_MARK + "\n")
    if not again:
        raise SystemExit(f"docs/methods.md: the two marks {SST2_MARK} are not there; run make docs")
    return before + sst2_section() + after


def methods_page(found: Found) -> str:
    """docs/methods.md."""
    parts = [METHODS_HEAD + table(("column", "yes means"), [(p.head, p.means) for p in PROPERTIES.values()]) + "\n",
             table(("method", *(p.head for p in PROPERTIES.values())),
                   [(f"[`{n}`](#{n})", *(found[n][k].says for k in PROPERTIES)) for n in METHODS]) + "\n", sst2_section()]
    for name, cls in METHODS.items():
        source = linked(paragraph(sys.modules[cls.__module__].__doc__))
        edit = linked(paragraph(cls.edit.__doc__)) if cls.edit is not None else ""
        settings = fields_table(cls, "method.") if dataclasses.fields(cls) else "No settings."
        reasons = "\n".join(f"- {PROPERTIES[k].head}: {a.says}: {a.why}" for k, a in found[name].items() if a.says != "yes")
        start = f"Learning rate to start from: {rate(cls)}. In the library: `tsugiki.methods.{cls.__name__}`."
        parts.append("\n\n".join(filter(None, (f"## {name}", linked(paragraph(cls.__doc__)), f"Source: {source}",
                                               edit and f"What it computes: {edit}", start, settings, reasons))) + "\n")
    return "\n".join(parts)


def documents(found: Found) -> dict[Path, str]:
    """Every file that this script writes, with what it should hold."""
    path = ROOT / "README.md"
    return {ROOT / "docs" / "configuration.md": page(), ROOT / "docs" / "methods.md": methods_page(found),
            path: readme(path.read_text(encoding="utf-8"), found)}


def main() -> int:
    if sys.argv[1:] == ["--sst2"]:
        path = ROOT / "docs" / "methods.md"
        path.write_text(with_sst2(path.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    transformers.logging.disable_progress_bar()
    wanted = documents(capabilities())
    old = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in old:
        if sys.argv[1:] == ["--check"]:
            print(f"{path.relative_to(ROOT)} is not as the code; run make docs")
        else:
            path.write_text(wanted[path], encoding="utf-8")
    return 1 if old and sys.argv[1:] == ["--check"] else 0


if __name__ == "__main__":
    sys.exit(main())
