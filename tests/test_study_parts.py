"""Where studies, tasks and mixed sources meet: what a run alone would do, a study does."""
from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from kit import PAD, TOKENIZER, lines, llama, write

from tsugiki.compare import study_of, worker
from tsugiki.compare.page import side_by_side
from tsugiki.compare.planning import planned
from tsugiki.compare.rows import read_parts
from tsugiki.compare.schedule import Lengths, choice, ranked
from tsugiki.compare.study import Cell, Variant
from tsugiki.compare.table import DataTable, tabled
from tsugiki.data import Renderer
from tsugiki.errors import UserError
from tsugiki.evaluate import tasks
from tsugiki.evaluate.answers import room
from tsugiki.formats.export import export_model

WORDS = ("red", "green", "blue")
SOURCE = [{"text": f"Once upon a time {a} and {b} sat on the mat."} for a in WORDS for b in "one two three four five".split()]
BITFIT = Variant("bitfit")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = llama(max_position_embeddings=512)
    return str(export_model(model, TOKENIZER, tmp_path_factory.mktemp("base") / "base", dtype=torch.float32))


def colours(n, start=0):
    return [{"instruction": f"Colour {i % 7} {'very ' * (i % 4)}bright?\n\nAnswer format: red/green/blue",
             "output": f"the correct answer is {WORDS[i % 3]}", "answer": WORDS[i % 3]} for i in range(start, start + n)]


def colours_task(tmp_path: Path) -> Path:
    folder = tmp_path / "colours"
    folder.mkdir()
    (folder / "test.json").write_text(json.dumps(colours(9, 3)))
    (folder / "task.yaml").write_text('like: boolq\nprompt: "Say it: {instruction}\\n"\nmessage: "{instruction}"\n'
                                      "choice_by: likelihood\n")
    return folder


def study(tmp_path: Path, base: str, **more):
    train = {"steps": 4, "batch_size": 4, "dtype": "fp32"} | more.pop("train", {})
    return study_of({"out": str(tmp_path / "study"), "base": base, "methods": ["bitfit"], "rates": [1e-2], "seeds": [0],
                     "curve_points": 2, "validation_rows": 5, "train": train} | more)


@pytest.mark.parametrize("chat", [True, False])
def test_a_task_is_asked_in_a_study_as_the_runs_are_trained(chat, base, tmp_path):
    plain = [{"prompt": f"Say it: {r['instruction']}\n", "completion": r["output"]} for r in colours(24)]
    file = write(tmp_path / "train.jsonl", colours(24) if chat else plain)
    made = study(tmp_path, base, data={"files": [str(file)]}, eval={"task": str(colours_task(tmp_path))}, train={"max_length": 60})
    parts = read_parts(made, "data")
    assert {c.kind for c in (*parts.train, *parts.test)} == {"chat" if chat else "plain"} and len(parts.test) == 9
    model, renderer = llama(max_position_embeddings=512), Renderer(TOKENIZER)
    scoring = made.scoring("data")
    found = worker.tested(model, renderer, parts, scoring, PAD, 60)
    want = tasks.score(model, renderer, tasks.load(scoring.task, chat=chat), scoring, PAD, room(model))
    assert found == want and found.unanswered == 0, "rows longer than train.max_length are scored, as in a run"
    other = tasks.score(model, renderer, tasks.load(scoring.task, chat=not chat), scoring, PAD, room(model))
    assert other.loss != found.loss, "the shape matters"
    shown = worker.shown_of(found, parts, 3)
    assert parts.samples(3) == [(c.prompt_text, i.gold) for i, c in zip(parts.task.items, parts.test[:3], strict=False)]
    assert shown["right"] == [a == gold for a, (_, gold) in zip(shown["answers"], parts.samples(3), strict=True)]
    assert {True, False} == set(worker.shown_of(found, parts, 9)["right"]), "by the metric, not by the text of the answer"


def test_a_bleu_task_in_a_study_is_ranked_by_seeds_though_one_method_answers_nothing(base, tmp_path):
    folder = tmp_path / "say"
    folder.mkdir()
    (folder / "test.json").write_text(json.dumps(
        [{"mr": f"name[{w}]", "ref": f"{w} is a {x} place to eat today"} for w in WORDS for x in ("good", "fine")]))
    (folder / "task.yaml").write_text('prompt: "{mr}\\n"\ngold: "{ref}"\nmetric: bleu\nmax_new_tokens: 4\n')
    made = study(tmp_path, base, data={"files": [str(write(tmp_path / "train.jsonl", lines(24)))]}, eval={"task": str(folder)},
                 methods=["bitfit", "ia3"], seeds=[0, 1])
    parts = read_parts(made, "data")
    alone = worker.base_alone(made, Cell("data", Variant("base"), test=True), parts)["test"]
    assert alone["metric"] == "bleu" and alone["n"] == 3 == len(alone["rows"]) == len(alone["answers"])
    lengths, results = Lengths(64, {"data": 4}), {}
    for variant in made.variants():
        for seed in made.seeds:
            empty = variant.method == "bitfit"
            test = {"metric": "bleu", "bleu": 0.0 if empty else 20.0 + seed, "loss": 1.0, "n": 3, "answers": [],
                    "rows": [0.0] * 3 if empty else [9.0, 11.0, 14.0]}
            cell = Cell("data", variant, 1e-2, seed, 4, test=True)
            results[cell.key] = {"test": test, "validation": {"metric": "loss", "loss": 1.0}, "trainable": 1, "total": 2,
                                 "seconds": 1.0, "memory": 1, "curve": [], "tokens": 1}
    first, second = tabled(made, results, lengths).data[0].rows
    assert (first.label, first.score.value, second.score.value) == ("ia3", 20.5, 0.0)
    assert first.score.rows == second.score.rows == 1, "corpus BLEU is not the mean of the rows' BLEU"


def test_what_is_replayed_in_a_run_is_replayed_in_a_study(base, tmp_path):
    source = str(write(tmp_path / "source.jsonl", SOURCE))
    data = {"files": [str(write(tmp_path / "train.jsonl", lines(30)))], "replay": [source], "replay_ratio": 0.3,
            "source_eval": [source]}
    made = study(tmp_path, base, data=data)
    parts = read_parts(made, "data")
    cell = Cell("data", BITFIT, 1e-2, 0, 4)
    result = worker.trained(made, cell, parts)
    told = [json.loads(line) for line in (tmp_path / "study" / "runs" / cell.key / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in told if "loss" in line][-1]
    assert last["sources"]["source"]["tokens"] / last["tokens"] == pytest.approx(0.3, abs=0.1)
    assert [line["step"] for line in told if "eval_sources" in line] == [0, 2, 4] and result["curve"][-1]["step"] == 4
    without = study(tmp_path, base, data={"files": data["files"]})
    bare = read_parts(without, "data")
    assert bare.fingerprint != parts.fingerprint
    more, less = (planned(s, {"data": p}, {}, rehearse=False).loads["data"] for s, p in ((made, parts), (without, bare)))
    assert more.step_tokens == pytest.approx(less.step_tokens / 0.7) and more.along > less.along


def test_a_study_may_have_the_guard_and_patience_and_streams_nothing(base, tmp_path, monkeypatch):
    source = str(write(tmp_path / "source.jsonl", SOURCE))
    data = {"files": [str(write(tmp_path / "train.jsonl", lines(30)))], "source_eval": [source]}
    made = study(tmp_path, base, data=data, train={"forgetting": "stop", "forgetting_limit": 0.0, "patience": 3})
    cfg = made.config(Cell("data", BITFIT, 1e-2, 0, 4))
    assert (cfg.train.forgetting, cfg.train.eval_steps, cfg.train.patience) == ("stop", 2, 3)
    with pytest.raises(UserError, match="data.streaming: on does not go with a study"):
        study(tmp_path, base, data=data | {"streaming": "on"})
    monkeypatch.setattr(sys.modules["tsugiki.train.sources"], "LARGE", 10)
    parts = read_parts(study(tmp_path, base, data=data | {"eval": [source], "replay": [source], "replay_ratio": 0.2}), "data")
    assert isinstance(parts.train, list) and isinstance(parts.sources.added[0].rows, list)


@pytest.mark.parametrize("metric,values,best", [("perplexity", (9.0, 3.0, 5.0), 1), ("accuracy", (0.1, 0.3, 0.2), 1)])
def test_a_rate_chosen_by_its_metric_is_the_best_by_it(metric, values, best):
    made = study_of({"select": "metric", "methods": ["bitfit"], "rates": [1e-3, 1e-2, 1e-1], "data": {"files": ["x"]}})
    cells = [Cell("data", BITFIT, r, 0, 4) for r in made.rates]
    results = {c.key: {"validation": {"metric": metric, metric: v, "loss": 1.0}} for c, v in zip(cells, values, strict=True)}
    assert ranked(made, cells, results)[0] == cells[best]
    assert choice(made, "data", BITFIT, results, Lengths(64, {"data": 4})).lr == made.rates[best]


def test_a_page_marks_an_answer_as_its_metric_does():
    answers = {"a": (("So it is 18.", True), ("17", False)), "b": (("18", None),)}
    table = DataTable("data", "accuracy", 2, None, (), {}, {}, {}, answers, {}, 0.0, (), None)
    first, second = side_by_side(table, [("9 + 9?", "18"), ("8 + 9?", "18")])
    assert first["answers"] == [("a", "So it is 18.", True), ("b", "18", True)] and second["answers"] == [("a", "17", False)]
    text = dataclasses.replace(table, metric="bleu", answers={"a": (("18 it is", None),)})
    assert side_by_side(text, [("9 + 9?", "18")])[0]["answers"] == [("a", "18 it is", None)], "a text is not right or wrong"
