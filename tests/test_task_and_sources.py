"""A task as metric, replayed text and the forgetting guard in one run: what each decides, resumed to the bit, and its page."""
from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from kit import TOKENIZER, config, cut, go, left, lines, llama, metrics, result_bits, same, write
from safetensors.torch import load_file

from tsugiki.config import RunConfig, build
from tsugiki.data import Renderer
from tsugiki.errors import UserError
from tsugiki.evaluate import tasks
from tsugiki.train import scoring
from tsugiki.train.report import score
from tsugiki.train.rows import read_rows
from tsugiki.train.run import run

STRANGE = [{"text": t} for t in ("日本語の文章です。", "猫が好きです。", "Ünïcödé çà et là", "12345 67890 日本", "好きな文章 là")]


def run_config(out: Path, data: dict | None = None, held: bool = False, **train) -> RunConfig:
    """Counting at a rate that ruins the loss on text of other characters, scored by a task of counting."""
    folder = out.parent / "counting"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"q": r["prompt"], "a": r["completion"].strip()} for r in lines(8, 40)]
    (folder / "test.json").write_text(json.dumps(rows))
    (folder / "task.yaml").write_text('prompt: "{q}"\ngold: "{a}"\ncompletion: " {gold}"\nmetric: exact\nmax_new_tokens: 3\n')
    strange = str(write(out.parent / "strange.jsonl", STRANGE))
    values = dataclasses.asdict(config(out, "full", held=held))
    values["data"] |= {"replay": [strange], "replay_ratio": 0.01, "source_eval": [strange]} | (data or {})
    values["train"] |= {"lr": 2e-2, "steps": 12, "eval_steps": 2, "schedule": "constant", "keep": "best", "patience": 9} | train
    values["eval"] |= {"task": str(folder), "max_new_tokens": None}
    return build(RunConfig, values)


def weights(out: Path, step: int) -> dict:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "params.safetensors")


@pytest.fixture
def task_says(monkeypatch):
    """The task's score is a function of the model, as it is, but of these values: the higher the further it is from the start."""
    real, start = tasks.score, {n: p.detach() for n, p in llama().named_parameters()}

    def told(model, *args, **more):
        far = sum(float((p.detach() - start[n]).abs().sum()) for n, p in model.named_parameters() if n in start)
        return dataclasses.replace(real(model, *args, **more), value=far)
    monkeypatch.setattr(scoring.tasks, "score", told)


@pytest.mark.parametrize("keep,patience", [("best", 9), ("last", 0), ("last", 9)])
def test_the_guard_stops_what_the_task_would_have_gone_on_with(keep, patience, task_says, tmp_path):
    """The task's score rises all along, so its best is the last evaluation within the guard's limit; so is what stop keeps."""
    free = go(run_config(tmp_path / "free", forgetting="off"))
    assert free.progress.step == free.progress.best_step == 12 and not free.progress.stopped
    loss = {m["step"]: m["eval_sources"]["source"]["loss"] for m in metrics(free.out) if "eval_sources" in m}
    assert list(loss) == [0, 2, 4, 6, 8, 10, 12]
    step = next(s for s in (2, 4, 6, 8) if loss[s + 2] > max(loss[k] for k in loss if k <= s) and loss[s + 2] > loss[0])
    limit = (max(loss[k] for k in loss if k <= step) + loss[step + 2]) / 2 / loss[0] - 1
    more = {"forgetting": "stop", "forgetting_limit": limit, "keep": keep, "patience": patience}
    whole = go(run_config(tmp_path / "whole", **more))
    assert whole.progress.step == step + 2 and "source loss" in whole.progress.stopped and whole.progress.best_step == step
    want = weights(free.out, step)
    got = result_bits(whole)
    assert all(torch.equal(got[n], want[n]) for n in want) and not all(
        torch.equal(got[n], p) for n, p in weights(free.out, step + 2).items())
    assert whole.plain()["sources"]["source"]["after"]["loss"] == pytest.approx(loss[step], rel=1e-6)
    at = next(m["eval"] for m in metrics(free.out) if m["step"] == step and "eval" in m)
    assert whole.progress.after["loss"] == pytest.approx(at["loss"], rel=1e-6), "both scores are of the weights that are kept"
    found = left(whole.out)
    for k in (1, step + 1, step + 2):
        cut(whole.out, out := tmp_path / f"stopped-{k}", k)
        again = go(run_config(out, **more))
        assert left(out) == found and again.plain()["after"] == whole.plain()["after"], f"stopped after step {k}"


def test_patience_on_the_task_ends_a_run_within_the_guards_limit(tmp_path, monkeypatch):
    real, start = tasks.score, {n: p.detach() for n, p in llama().named_parameters()}

    def told(model, *args, **more):
        near = -sum(float((p.detach() - start[n]).abs().sum()) for n, p in model.named_parameters() if n in start)
        return dataclasses.replace(real(model, *args, **more), value=near)
    monkeypatch.setattr(scoring.tasks, "score", told)
    found = go(run_config(tmp_path / "run", forgetting="stop", forgetting_limit=99.0, patience=2))
    assert found.progress.stopped.startswith("no better accuracy in 2")
    assert (found.progress.step, found.progress.best_step) == (6, 2)
    want = weights(found.out, 2)
    assert all(torch.equal(p, want[n]) for n, p in result_bits(found).items() if n in want)


def test_tokens_on_disk_and_a_task_give_the_same_run(tmp_path):
    some = {"forgetting": "off", "steps": 4}
    want = go(run_config(tmp_path / "memory", {"streaming": "off"}, **some))
    said = []
    got = go(run_config(tmp_path / "disk", {"streaming": "on"}, **some), say=said.append)
    assert same(result_bits(got), result_bits(want)) and metrics(got.out) == metrics(want.out)
    assert any("task counting: 8 rows, metric exact" in line for line in said)
    assert [line for line in said if "may be too good" in line], "training rows are looked through as they stream"


def test_the_page_shows_the_task_the_held_out_rows_and_each_source(tmp_path):
    result = go(run_config(tmp_path / "run", held=True, forgetting="warn", steps=4))
    page = (result.out / "report.html").read_text()
    for said in ("Accuracy", "Task loss", "Loss on source", "perplexity on source", "held_out_loss", "counting"):
        assert said in page, said
    rows = {name: re.findall(r'<td class="number">(?:<strong>)?([^<]*)', rest) for name, rest in
            re.findall(r'<tr><th scope="row">([^<]+)</th>(.*)', page)}
    assert rows["accuracy"][-1] == "8" and rows["held_out_loss"][-1] != "8", "n of a row is of that row"
    assert rows["loss on source"][-1] == str(len(STRANGE))


def test_a_bleu_below_one_is_no_share_and_a_prompt_is_shown_once(tmp_path):
    entry = {"before": 0.1, "after": 0.4, "n": 9, "interval": [0.3, 0.6]}
    assert score("accuracy", entry)["bar"]["after"] == 40 and score("bleu", entry)["bar"] is None is score("loss", entry)["bar"]
    cfg = run_config(tmp_path / "run")
    rows = [{"q": q, "a": a} for q in ("one is", "two is", "six is") for a in ("five", "six")]
    (tmp_path / "counting" / "test.json").write_text(json.dumps(rows))
    picked, _ = scoring.samples(llama(), Renderer(TOKENIZER), [], tasks.load(cfg.eval.task), cfg.eval)
    assert [(c.prompt_text, c.reference) for c in picked] == [("one is", " five"), ("two is", " five"), ("six is", " five")]


def test_a_folder_that_holds_other_things_keeps_them(tmp_path):
    """Tokens are written beside the run, so the folder is looked at first; what a user called "tokens" is not theirs to delete."""
    for name in ("notes", "tokens"):
        out = tmp_path / name / "run"
        (out / "tokens").mkdir(parents=True)
        (out / ("tokens/mine.txt" if name == "tokens" else "mine.txt")).write_text("keep")
        cfg = run_config(out, {"streaming": "on"}, forgetting="off", steps=2)
        with pytest.raises(UserError, match="is not empty and holds no run|is not a run's tokens"):
            run(llama(), TOKENIZER, cfg, read_rows(cfg, lambda line: None), quiet=True)
        assert [p.read_text() for p in out.rglob("mine.txt")] == ["keep"]
