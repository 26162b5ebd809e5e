"""A task as the metric of a run: scored every n steps, the best weights kept, patience on it, with held-out rows or without."""
import dataclasses
import json
from pathlib import Path

import pytest
from kit import TOKENIZER, config, go, llama, metrics, write

from tsugiki.config import EvalConfig, RunConfig, build
from tsugiki.data import Renderer
from tsugiki.errors import UserError
from tsugiki.evaluate import tasks
from tsugiki.evaluate.answers import room
from tsugiki.train.rows import read_rows

WORDS = ("red", "green", "blue")


def rows(n, start=0):
    return [{"instruction": f"Colour {i % 3}?\n\nAnswer format: red/green/blue", "output": f"the correct answer is {WORDS[i % 3]}",
             "answer": WORDS[i % 3]} for i in range(start, start + n)]


def run_config(tmp_path, held=False, chat=False, eval=None, **train) -> RunConfig:
    """Training rows in the task's own plain prompt, or as chats, and the task beside them."""
    folder = tmp_path / "dataset" / "colours"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.json").write_text(json.dumps(rows(9, 3)))
    (folder / "task.yaml").write_text('like: boolq\nprompt: "{instruction}\\n"\nmessage: "{instruction}"\nchoice_by: likelihood\n')
    values = dataclasses.asdict(config(tmp_path / "run", held=True, **{"steps": 12, "eval_steps": 3} | train))
    values["data"]["eval"] = values["data"]["eval"] if held else []
    if chat:
        values["data"]["files"] = [str(write(tmp_path / "train.jsonl", rows(12)))]
    else:
        plain = [{"prompt": r["instruction"] + "\n", "completion": r["output"]} for r in rows(12)]
        values["data"]["files"] = [str(write(tmp_path / "train.jsonl", plain))]
    values["eval"] |= {"task": str(folder), "max_new_tokens": 8} | (eval or {})
    return build(RunConfig, values)


def evaluations(cfg):
    return [(line["step"], line["eval"]) for line in metrics(Path(cfg.out)) if "eval" in line]


@pytest.mark.parametrize("chat", [False, True])
def test_the_task_is_scored_every_so_many_steps_and_its_score_is_that_of_the_model(chat, tmp_path):
    cfg, model, said = run_config(tmp_path, chat=chat), llama(max_position_embeddings=512), []
    result = go(cfg, model, say=said.append)
    found = evaluations(cfg)
    assert [step for step, _ in found] == [0, 3, 6, 9, 12]
    assert all({"accuracy", "interval", "n", "loss"} <= e.keys() for _, e in found)
    task = tasks.load(cfg.eval.task, chat=chat)
    after = tasks.score(model, Renderer(TOKENIZER), task, EvalConfig(max_new_tokens=8), 3, room(model))
    want = {k: v for k, v in after.plain().items() if k != "metric"}
    assert {k: result.progress.after[k] for k in want} == {k: pytest.approx(v, rel=1e-6) for k, v in want.items()} and after.n == 9
    assert result.progress.after["loss"] < result.progress.before["loss"] == found[0][1]["loss"]
    assert "task colours: 9 rows, metric choice" in said
    assert any("may be too good: 9 of 9 test questions are in the training data" in line for line in said), "they were made to be"
    report = (result.out / "report.html").read_text()
    assert "Accuracy" in report and "Task loss" in report and "best at step" not in report


def test_the_best_weights_by_the_task_are_kept_and_patience_counts_on_it(tmp_path, monkeypatch):
    from tsugiki.train import scoring
    values, seen = [0.1, 0.3, 0.9, 0.5, 0.4, 0.2], []
    real = tasks.score

    def told(*args, **more):
        score = real(*args, **more)
        value = values[len(seen)] if len(seen) < len(values) else 0.9
        seen.append(value)
        return dataclasses.replace(score, value=value)
    monkeypatch.setattr(scoring.tasks, "score", told)
    cfg = run_config(tmp_path, steps=30, keep="best", patience=2)
    result = go(cfg, llama(max_position_embeddings=512))
    assert result.progress.step == 12 and result.progress.best_step == 6 and result.progress.best == 0.9
    assert result.progress.stopped == "no better accuracy in 2 evaluations" and seen == values, "0.2 is that of the best, again"
    assert "best at step" in (result.out / "report.html").read_text()


def test_with_held_out_rows_both_are_told_and_the_task_decides(tmp_path):
    cfg = run_config(tmp_path, held=True)
    result = go(cfg, llama(max_position_embeddings=512))
    found = evaluations(cfg)
    assert all(e["metric"] == "accuracy" and e["held_out_loss"] != e["loss"] for _, e in found)
    assert result.progress.after["held_out_loss"] > 0 and result.progress.best == max(e["accuracy"] for _, e in found[1:])


def test_other_rows_of_the_task_are_another_run_and_another_place_is_not(tmp_path):
    cfg = run_config(tmp_path, steps=2)
    go(cfg, llama(max_position_embeddings=512))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    text = (tmp_path / "dataset" / "colours" / "test.json").read_text()
    (moved / "test.json").write_text(text)
    go(dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, task_data=str(moved))), llama(max_position_embeddings=512))
    (tmp_path / "dataset" / "colours" / "test.json").write_text(text.replace("Colour", "What colour"))
    with pytest.raises(UserError, match="the rows are others"):
        go(cfg, llama(max_position_embeddings=512))


def test_a_task_that_is_not_there_is_told_before_anything_is_trained(tmp_path):
    with pytest.raises(UserError, match="no task is called"):
        read_rows(run_config(tmp_path, eval={"task": "colour"}), print)
    with pytest.raises(UserError, match="eval.task_data: the rows of which task"):
        build(RunConfig, {"eval": {"task_data": "x"}})
