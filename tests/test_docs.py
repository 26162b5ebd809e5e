"""The documents are true: the configuration page is the code's, tables are complete, commands parse, links lead somewhere."""
from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import tsugiki
from tsugiki.cli.main import parser
from tsugiki.cli.train import config_of
from tsugiki.config import DataConfig, EvalConfig, TrainConfig, build
from tsugiki.data.conversation import SHAPES
from tsugiki.methods import METHODS
from tsugiki.sites import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/configuration.md", "docs/methods.md",
         "docs/tasks.md")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(page), re.S)


def commands() -> list[list[str]]:
    """Every `tsugiki ...` line of the README, as words without the program's name."""
    lines = "\n".join(blocks("README.md", "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("tsugiki ")]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_configuration_page_is_the_codes(script):
    assert text("docs/configuration.md") == script.page(), "run `make docs`"


def test_the_configuration_page_has_every_key():
    page = text("docs/configuration.md")
    keys = [f"{part}.{f.name}" for part, cls in (("data", DataConfig), ("train", TrainConfig), ("eval", EvalConfig))
            for f in dataclasses.fields(cls)]
    keys += [f"method.{f.name}" for cls in METHODS.values() for f in dataclasses.fields(cls)]
    assert not [k for k in keys if f"`{k}`" not in page]


def test_the_pages_yaml_is_a_configuration():
    import yaml
    assert build(tsugiki.RunConfig, yaml.safe_load(blocks("docs/configuration.md", "yaml")[0])).method["rank"] == 16


def results(path: Path, **accuracy: float) -> Path:
    """A results file of one seed of some methods."""
    runs = {f"{name}/0/{METHODS[name].rate(256):g}": {"accuracy": a, "loss": 0.3, "train_loss": 0.25, "trained": 1234, "steps": 9,
                                                       "seconds": 1.0} for name, a in accuracy.items()}
    path.write_text(json.dumps({
        "setup": {"rows": 9, "epochs": 1.0, "batch_size": 16, "dtype": "bf16"}, "words": "3 to 8", "base": {"accuracy": 0.5},
        "width": 256, "environment": {}, "runs": runs}), encoding="utf-8")
    return path


def test_a_method_that_is_behind_on_sst2_needs_a_reason_and_the_page_prints_it(script, tmp_path, monkeypatch):
    made_by = script.study()
    monkeypatch.setattr(script, "study", lambda: made_by)
    monkeypatch.setattr(script, "SST2", results(tmp_path / "results.json", lora=0.75, bitfit=0.69, prompt=0.5))
    monkeypatch.setattr(made_by, "WHY", {"prompt": "too few numbers (arXiv:2104.08691)"})
    page = script.sst2_section()
    assert "| `lora` | 0.750 | 0.750 | 0.750 | 1 | 0.002 | 0.250 | 1,234 | 1 |" in page
    assert "| `bitfit` | 0.690 | 0.250 | 1,234 | 0.70 is within the score's 95 % interval, 0.659 to 0.720 |" in page
    assert "| `prompt` | 0.500 | 0.250 | 1,234 | too few numbers ([arXiv:2104.08691](" in page and page.count("| `lora` ") == 1
    monkeypatch.setattr(made_by, "WHY", {})
    with pytest.raises(SystemExit, match=r"^prompt: 0.500 is below 0.70 and WHY in benchmarks/methods_sst2.py gives no reason$"):
        script.sst2_section()
    monkeypatch.setattr(script, "SST2", results(tmp_path / "results.json", lora=0.70))
    assert "None is below 0.70." in script.sst2_section()


def test_the_readme_names_every_method_family_and_format():
    page = text("README.md")
    methods = set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", page, re.M))
    assert methods == set(METHODS), "the table of methods"
    families = set(re.findall(r"`(\w+)`", page.partition("Families, by their `model_type`:")[2].partition(".")[0]))
    assert families == set(FAMILIES), "the list of families"
    formats = set(re.findall(r"^\| `([\w-]+)` \|", page.partition("## Data")[2].partition("## What")[0], re.M))
    assert formats == set(SHAPES), "the table of row shapes"


def test_the_number_of_methods_in_the_comparison_is_the_codes():
    assert re.search(r"^\| methods \| (\d+) \|", text("README.md"), re.M)[1] == str(len(METHODS))


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_parses(words):
    args, unknown = parser().parse_known_args(words)
    assert not unknown
    if words[0] == "train":
        assert config_of(args).out


def test_the_readme_shows_every_command():
    assert {words[0] for words in commands()} | {"demo"} == set(parser()._subparsers._group_actions[0].choices)


def test_the_readmes_python_names_what_exists():
    names = {n for block in blocks("README.md", "python") for n in re.findall(r"\btg\.(\w+)", block)}
    assert names and not [n for n in names if not hasattr(tsugiki, n)]


@pytest.mark.parametrize("page", PAGES)
def test_links_files_and_make_targets_are_there(page):
    folder, body = (ROOT / page).parent, text(page)
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", body)
    assert not [link for link in links if not link.startswith("http") and not (folder / link).exists()]
    named = re.findall(r"`((?:tests|docs|examples|scripts|benchmarks)/[\w./]+)`", body)
    assert not [n for n in named if not (ROOT / n).exists()]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert not set(re.findall(r"`make ([a-z]+)", body)) - targets
