"""`tsugiki eval` on tasks: one line a task, every row in a file, a comparison on the same rows, contamination before the score."""
import json

import pytest
import torch
from kit import ADAPTERS, TOKENIZER, WORDS, llama, write
from tiny import fill

from tsugiki import formats
from tsugiki.adapters import attach
from tsugiki.cli.main import main
from tsugiki.evaluate.intervals import mcnemar
from tsugiki.formats.export import export_model


def asked():
    """Rows that ask different things, whose answers are one token each."""
    return [{"instruction": f"{WORDS[i % 12]} {WORDS[i * 5 % 11]} {'so ' * (i % 5)}is what?\n\nAnswer format: 1/2/3/4",
             "output": "", "answer": "1234"[i % 4]} for i in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, an adapter `a` that changes it, and two tasks."""
    root = tmp_path_factory.mktemp("eval")
    model = llama(max_position_embeddings=512)
    export_model(model, TOKENIZER, root / "base", dtype=torch.float32)
    adapter = fill(attach(model).add("a", ADAPTERS["lora"]), seed=2, scale=0.8)
    formats.save(adapter, root / "a", stop_ids=(2,), base=str(root / "base"), extra={"kind": "plain"})
    for name in ("one", "two"):
        (root / "tasks" / name).mkdir(parents=True)
        (root / "tasks" / name / "test.json").write_text(json.dumps(asked()))
    return root


@pytest.fixture
def call(folder, capsys):
    """`tsugiki eval` on the base with fp32: (exit code, stdout, stderr)."""
    def run(*words, base=True):
        capsys.readouterr()
        code = main(["eval", *(["--base", str(folder / "base"), "--dtype", "fp32"] if base else []), *map(str, words)])
        return code, *capsys.readouterr()
    return run


def test_a_task_is_scored_and_every_row_written(folder, call, tmp_path):
    one = folder / "tasks" / "one"
    code, out, _ = call("--task", one, "--choice-by", "likelihood", "--out", tmp_path / "r.jsonl", "--json", "--quiet")
    values = json.loads(out)
    assert code == 0 and values["task"] == "one" and values["n"] == 24 and values["interval"]
    assert values["accuracy"] == values["value"]
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert lines[0]["score"]["accuracy"] == values["accuracy"] and len(lines) == 25
    assert sum(line["value"] for line in lines[1:]) / 24 == values["accuracy"]
    assert {"row", "prompt", "expected", "answer"} <= lines[1].keys()
    code, out, _ = call("--task", one, folder / "tasks" / "two", "--max-rows", 6, "--choice-by", "likelihood", "--quiet")
    assert [line.partition(":")[0] for line in out.splitlines()] == ["one", "two"] and "n 6" in out


def test_two_models_are_compared_on_the_same_rows_by_any_of_three_ways(folder, call, tmp_path):
    task = ("--task", folder / "tasks" / "one", "--choice-by", "likelihood", "--quiet", "--json")
    base = json.loads(call(*task, "--out", tmp_path / "base.jsonl")[1])
    with_a = (*task, "--adapter", folder / "a")
    found = json.loads(call(*with_a, "--against", "base", "--out", tmp_path / "a.jsonl")[1])
    pair = found["against"]
    values = [[json.loads(line)["value"] for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()[1:]] for n in ("a", "base")]
    better, worse = (sum(x > y for x, y in zip(p, q, strict=True)) for p, q in (values, values[::-1]))
    assert (pair["better"], pair["worse"], pair["p"]) == (better, worse, mcnemar(better, worse)) and better + worse > 0
    assert pair["difference"] == pytest.approx(found["accuracy"] - base["accuracy"]) and pair["test"] == "exact McNemar"
    assert json.loads(call(*with_a, "--against", tmp_path / "base.jsonl")[1])["against"] | {"name": "base"} == pair
    turned = json.loads(call(*task, "--against", folder / "a")[1])["against"]
    assert (turned["better"], turned["worse"]) == (worse, better)
    text = call("--task", folder / "tasks" / "one", "--quiet", "--adapter", folder / "a", "--against", "base",
                "--metric", "loss")[1]
    assert "against base: loss " in text and "paired bootstrap" in text


def test_contamination_is_told_before_the_score_and_in_the_json(folder, call, tmp_path):
    train = write(tmp_path / "train.jsonl", [r | {"output": "x"} for r in asked()])
    words = ("--task", folder / "tasks" / "one", "--choice-by", "likelihood", "--train", train)
    code, out, err = call(*words, "--json")
    assert code == 0 and json.loads(out)["overlap"]["exact"] == 24 and json.loads(out)["overlap"]["pairs"]
    assert "one: 24 of 24 test questions are in the training data word for word" in err
    data = write(tmp_path / "rows.jsonl", [{"prompt": "Say the magic word now please:", "completion": " so"}] * 2)
    assert json.loads(call("--data", data, "--train", data, "--metric", "loss", "--json")[1])["overlap"]["exact"] == 2


def test_a_users_own_rows_take_every_metric(folder, call, tmp_path):
    pytest.importorskip("rouge_score")
    data = write(tmp_path / "rows.jsonl", [{"prompt": f"{i} and {i} is", "completion": f" {2 * i}"} for i in range(6)])
    for metric in ("exact", "number", "choice", "contains", "regex", "bleu", "rouge_l", "perplexity", "loss"):
        code, out, _ = call("--data", data, "--metric", metric, "--max-new-tokens", 4, "--quiet", "--json")
        values = json.loads(out)
        assert code == 0 and values["n"] == 6 and values["metric"] in (metric, "accuracy") and "interval" in values
    assert json.loads(call("--data", data, "--metric", "choice", "--choice-by", "generation", "--quiet", "--json")[1])["n"] == 6


WRONG = {
    "no task is called 'bolq'; did you mean 'boolq'": ("--task", "bolq"),
    "--task-data: goes with --task": ("--data", "x.jsonl", "--task-data", "y"),
    "--include-path: goes with --harness": ("--data", "x.jsonl", "--include-path", "y"),
    "--against base: give --adapter": ("--task", "boolq", "--against", "base"),
    "one of the arguments --data --task --harness is required": (),
    "eval.choice_by: 'luck' is not one of": ("--task", "boolq", "--choice-by", "luck"),
    "its rows are not part of this package": ("--task", "boolq"),
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_input_is_told_in_one_line(reason, call):
    code, out, err = call(*WRONG[reason])
    assert code == 2 and out == "" and reason in err and len(err.splitlines()) == 1


def test_results_of_other_rows_are_no_comparison(folder, call, tmp_path):
    task = ("--task", folder / "tasks" / "one", "--choice-by", "likelihood", "--quiet")
    call(*task, "--max-rows", "5", "--out", tmp_path / "five.jsonl")
    code, _, err = call(*task, "--against", tmp_path / "five.jsonl")
    assert code == 2 and "5 rows there, 24 here" in err
    (tmp_path / "bad.jsonl").write_text("{}\n")
    code, _, err = call(*task, "--against", tmp_path / "bad.jsonl")
    assert code == 2 and "bad.jsonl:1: is not a line of results" in err
    code, _, err = call("--task", folder / "tasks" / "two", "--quiet", "--against", tmp_path / "five.jsonl")
    assert code == 2 and "has no results of two; it has one" in err


def test_the_list_of_tasks_names_them(call):
    code, out, _ = call("--task", "list", base=False)
    assert code == 0 and all(name in out for name in ("boolq", "gsm8k", "sst2", "e2e", "perplexity"))
