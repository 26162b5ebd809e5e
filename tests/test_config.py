"""One schema: a wrong key, value or combination is refused in one line that says what is allowed, whatever it came from."""
import dataclasses
import typing

import pytest
from kit import CASES

from tsugiki.cli.main import parser
from tsugiki.cli.train import config_of
from tsugiki.config import DataConfig, EvalConfig, RunConfig, TrainConfig, assignments, build, merge, put, read_yaml
from tsugiki.errors import UserError

SECTIONS = {"data": DataConfig, "train": TrainConfig, "eval": EvalConfig}
FIELDS = [(section, f.name) for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)]


def of(*argv: str) -> RunConfig:
    args, unknown = parser().parse_known_args(["train", *argv])
    assert not unknown
    return config_of(args)


def refused(values: dict) -> str:
    with pytest.raises(UserError) as e:
        build(RunConfig, values)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
    return str(e.value)


def hint(section: str, name: str):
    return typing.get_type_hints(SECTIONS[section])[name]


@pytest.mark.parametrize("section, name", FIELDS)
def test_every_field_refuses_a_value_of_another_kind_and_names_itself(section, name):
    kind = hint(section, name)
    wrong = {"not a field": [[]], "mapping": [{"a": {}}]} if kind is bool else {"mapping": [{"a": {}}]}
    if typing.get_origin(kind) is dict:
        wrong = {"text": ["a"], "list": [["a"]], "nested": [{"a": {}}], "yes": [{"0": True}], "key": [{True: "a"}]}
    elif kind in (int, float) or int in typing.get_args(kind) or float in typing.get_args(kind):
        wrong |= {"text": ["fast", "", "1e", "nan", "inf"], "bool": [True, False], "list": [[1]], "nan": [float("nan")],
                  "huge": [10**400 if kind is float else 1e300 * 1e10]}
    elif kind is bool:
        wrong |= {"text": ["yes", "true"], "number": [1, 0]}
    for value in (v for values in wrong.values() for v in values):
        assert refused({section: {name: value}}).startswith(f"{section}.{name}: expected "), value


@pytest.mark.parametrize("section, name", FIELDS)
def test_every_limit_and_choice_is_kept_and_told(section, name):
    limits = next(f.metadata for f in dataclasses.fields(SECTIONS[section]) if f.name == name)
    if limits["choices"]:
        said = refused({section: {name: limits["choices"][0] + "x"}})
        assert said.startswith(f"{section}.{name}: ") and all(c in said for c in limits["choices"]) and "did you mean" in said
    for side, step in (("low", -1), ("high", 1)):
        if limits[side] is not None:
            said = refused({section: {name: limits[side] + step}})
            assert said.startswith(f"{section}.{name}: ") and "allowed: " in said and f"{limits[side]:g}" in said


@pytest.mark.parametrize("section", [*SECTIONS, None])
def test_a_misspelt_key_gives_the_nearest(section):
    names = [f.name for f in dataclasses.fields(SECTIONS[section] if section else RunConfig)]
    for name in names:
        wrong = name + "_"
        said = refused({section: {wrong: 1}} if section else {wrong: 1})
        assert said.startswith(f"{section}.{wrong}: unknown key" if section else f"{wrong}: unknown key")
        assert f"did you mean {name!r}?" in said and all(n in said for n in names)


def test_numbers_come_in_every_honest_spelling():
    def train(**values):
        return build(TrainConfig, values)
    assert train(lr="1e-4").lr == 1e-4 and train(lr=1).lr == 1.0 and train(steps="12").steps == 12 and train(steps=12.0).steps == 12
    assert train(steps="2e3").steps == 2000 and train(steps=None).steps is None and train(seed=2**60 + 1).seed == 2**60 + 1
    assert train(seed=str(2**60 + 1)).seed == 2**60 + 1, "a seed may not lose its last digits"
    assert build(DataConfig, {"files": "one.jsonl"}).files == ["one.jsonl"] and build(DataConfig, {"stop": 5}).stop == "5"
    assert build(DataConfig, {"labels": {0: "negative", 1: 2}}).labels == {"0": "negative", "1": "2"}


COMBINATIONS = {
    "train.keep: best needs held-out rows": {"train": {"keep": "best"}},
    "train.patience needs held-out rows": {"train": {"patience": 2}},
    "train.eval_steps needs held-out rows": {"train": {"eval_steps": 5}},
    "train.patience: counts evaluations": {"train": {"patience": 2}, "data": {"holdout": 0.1}},
    "data.labels: they are words for a table's columns": {"data": {"labels": {"0": "no"}}},
    "method.name: expected the name of a method, found None": {"method": {"rank": 2}},
    "method.name: expected the name of a method, found ['lora']": {"method": {"name": ["lora"]}},
    "method: expected keys and values": {"method": 5},
    "train: expected keys and values": {"train": [1]},
}


@pytest.mark.parametrize("reason", COMBINATIONS)
def test_keys_that_would_do_nothing_are_refused(reason):
    assert refused(COMBINATIONS[reason]).startswith(reason)


@pytest.mark.parametrize("name", CASES)
def test_every_methods_settings_pass_through(name):
    from tsugiki.formats.native import settings
    from tsugiki.methods import make
    cfg = build(RunConfig, {"method": {"name": CASES[name].name} | settings(CASES[name])})
    assert make(**cfg.method) == CASES[name]


YAMLS = {
    "train:\n  lr: 1\n  lr: 2\n": "3: not YAML: the key 'lr' is there twice",
    "train:\n  lr: [1\n": "not YAML",
    "a: &a [*a]\nb: !!python/object:os.system {}\n": "2: not YAML: could not determine a constructor",
    "- train\n": "1: expected keys and values, found list",
    "base: 2024-13-45\n": "not YAML: month must be in 1..12",
    "base: \x00\n": "not YAML",
    "[" * 3000: "not YAML",
}


@pytest.mark.parametrize("text", YAMLS, ids=lambda t: t[:12].strip())
def test_a_broken_yaml_file_is_refused_by_file_and_line(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as e:
        read_yaml(str(path))
    assert str(e.value).startswith(f"{path}:") and YAMLS[text] in str(e.value) and "\n" not in str(e.value)


def test_a_yaml_file_that_is_not_there_or_not_text(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("none.yaml", "No such file"), ("bytes.yaml", "is not UTF-8"), (".", "directory")):
        with pytest.raises(UserError, match=reason):
            read_yaml(str(tmp_path / name))
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_yaml(str(tmp_path / "empty.yaml")) == {}


def test_flags_a_yaml_file_and_set_are_the_same_keys_the_later_winning(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {lr: 1e-4, epochs: 3, seed: 5}\nmethod: {name: lora, rank: 2}\n"
                    "data: {files: [a.jsonl], holdout: 0.2}\n")
    cfg = of("--config", str(path), "--lr", "2e-4", "--set", "train.seed=7", "--set", "method.rank=16", "--eval-steps", "5")
    assert (cfg.train.lr, cfg.train.epochs, cfg.train.seed, cfg.train.eval_steps) == (2e-4, 3.0, 7, 5)
    assert cfg.method == {"name": "lora", "rank": 16} and cfg.data.files == ["a.jsonl"]
    assert of("--set", "train.lr=3e-4", "--lr", "1").train.lr == 3e-4
    assert of().method == {"name": "lora"} and of("--set", "method=bitfit").method == {"name": "bitfit"}
    cfg = of("--prompt", "Review: {s}\\nIs:", "--completion", " {label}", "--labels", "0=bad,1=good", "--data", "a", "b")
    assert cfg.data.prompt == "Review: {s}\nIs:" and cfg.data.labels == {"0": "bad", "1": "good"} and cfg.data.files == ["a", "b"]


def test_assignments_read_values_as_yaml_and_say_what_they_expect():
    assert assignments(["a.b=1e-3", "a.c=[x, y]", "d=", "e=true", "f=: :"]) == {
        "a": {"b": 1e-3, "c": ["x", "y"]}, "d": "", "e": True, "f": ": :"}
    assert assignments(["x=2024-13-45", "y=" + "[" * 3000])["x"] == "2024-13-45"
    for wrong in ("novalue", "=1", " =1"):
        with pytest.raises(UserError, match="expected KEY=VALUE"):
            assignments([wrong])
    with pytest.raises(UserError, match="a.b.c: b holds a value"):
        assignments(["a.b=1", "a.b.c=2"])


def test_layers_lie_over_one_another_without_touching_each_other():
    below = {"a": {"b": 1, "c": 2}}
    above = merge(below, {"a": {"b": 5}})
    put(above, "a.c", 9)
    assert above == {"a": {"b": 5, "c": 9}} and below == {"a": {"b": 1, "c": 2}}


def test_a_table_template_needs_both_sides():
    from tsugiki.train.rows import columns_of
    for data, key in (({"prompt": "{a}"}, "completion"), ({"completion": "{a}"}, "prompt")):
        with pytest.raises(UserError, match=f"data.{key}: missing"):
            columns_of(RunConfig(data=DataConfig(**data)))
