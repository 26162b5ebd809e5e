"""The committed demo data is what its script makes, is well-formed, and no test row is given away by train."""
from __future__ import annotations

import importlib.util
import json
import shutil
import string
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "make_demo_data.py"
DEMO = ROOT / "src" / "tsugiki" / "assets" / "demo"
TASKS = ("record", "intent", "arithmetic", "past")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_demo_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def rows(task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_committed_files_equal_a_fresh_build(script):
    assert script.stale(DEMO) == []
    assert script.main(["--check"]) == 0


def test_check_sees_a_changed_a_missing_and_an_extra_file(script, tmp_path, capsys):
    shutil.copytree(DEMO, tmp_path / "demo")
    changed = tmp_path / "demo" / "past" / "test.jsonl"
    changed.write_bytes(changed.read_bytes().replace(b"The", b"the", 1))
    (tmp_path / "demo" / "intent" / "train.jsonl").unlink()
    (tmp_path / "demo" / "extra.jsonl").write_text("{}\n")
    assert script.main(["--check", "--out", str(tmp_path / "demo")]) == 1
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "extra.jsonl: not made by this script", "intent/train.jsonl: missing", "past/test.jsonl: differs"]


def test_tasks_and_size(script):
    assert set(script.TASKS) == set(TASKS) == {path.name for path in DEMO.iterdir() if path.is_dir()}
    assert sum(path.stat().st_size for path in DEMO.rglob("*.jsonl")) < 1.5e6


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_prompt_completion_without_stray_spaces(task):
    train, test = rows(task, "train"), rows(task, "test")
    assert 800 <= len(train) <= 2000 and 100 <= len(test) <= 200
    for row in train + test:
        assert set(row) == {"prompt", "completion"}
        prompt, completion = row["prompt"], row["completion"]
        assert prompt and prompt == prompt.strip() and "  " not in prompt
        assert completion[0] == " " and completion[1:] == completion.strip() and len(completion) > 1
        assert (prompt + completion).isascii()


@pytest.mark.parametrize("task", TASKS)
def test_no_test_prompt_is_in_train_and_none_twice(task):
    train = [" ".join(row["prompt"].lower().split()) for row in rows(task, "train")]
    test = [" ".join(row["prompt"].lower().split()) for row in rows(task, "test")]
    assert not set(train) & set(test)
    assert len(set(train)) == len(train) and len(set(test)) == len(test)


def test_sentence_names_every_value_of_its_record():
    for row in rows("record", "train") + rows("record", "test"):
        record, _ = row["prompt"].split("\n")
        values = dict(field.split(": ") for field in record.split(" | "))
        for field in ("name", "place", "time"):
            assert values[field] in row["completion"]


def test_intent_labels_are_balanced_and_test_has_words_never_trained_on():
    train, test = rows("intent", "train"), rows("intent", "test")
    for split in (train, test):
        counts = [sum(row["completion"] == label for row in split) for label in {row["completion"] for row in split}]
        assert len(counts) == 6 and min(counts) == max(counts)
    vocabulary = {word for row in train for word in row["prompt"].split()}
    unseen = [row for row in test if set(row["prompt"].split()) - vocabulary]
    assert 0.25 * len(test) <= len(unseen) <= 0.75 * len(test)
    assert len(vocabulary) > 250


def test_every_slot_of_the_grammar_exists_and_every_list_is_used(script):
    used = {name.removesuffix("2") for patterns in script.PATTERNS.values() for pattern in patterns
            for _, name, _, _ in string.Formatter().parse(pattern) if name}
    assert used == set(script.SLOTS) and set(script.FRESH) < used
    for name, fresh in script.FRESH.items():
        assert not set(fresh) & set(script.SLOTS[name])


def fact(prompt: str) -> tuple[int, int]:
    """(smaller, larger) addend of the fact family that a prompt asks about."""
    units = "zero one two three four five six seven eight nine"
    tens = "ten twenty thirty forty fifty sixty seventy eighty ninety"
    value = dict(zip(units.split(), range(10), strict=True)) | dict(zip(tens.split(), range(10, 100, 10), strict=True))
    operator = "plus" if " plus " in prompt else "minus"
    left, right = (sum(value[part] for part in side.split())
                   for side in prompt.removesuffix(" equals").split(f" {operator} "))
    addends = (left, right) if operator == "plus" else (left - right, right)
    return tuple(sorted(addends))


def test_sums_are_right_and_no_held_out_fact_is_in_train_in_any_order_or_inverse(script):
    for row in rows("arithmetic", "train") + rows("arithmetic", "test"):
        a, b = fact(row["prompt"])
        answers = {a + b} if " plus " in row["prompt"] else {a, b}
        assert row["completion"][1:] in {script.spelt(n) for n in answers}
        if " minus " in row["prompt"]:
            right = row["prompt"].removesuffix(" equals").split(" minus ")[1]
            assert {right, row["completion"][1:]} == {script.spelt(a), script.spelt(b)}
    train, test = ({fact(row["prompt"]) for row in rows("arithmetic", split)} for split in ("train", "test"))
    assert len(test) >= 30 and not train & test
