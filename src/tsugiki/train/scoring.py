"""What a run is scored by as it trains: a task, held-out rows, or both; the same for before, after and every train.eval_steps."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from tsugiki.config import EvalConfig, RunConfig
from tsugiki.data import Conversation, Renderer
from tsugiki.evaluate import tasks
from tsugiki.evaluate.answers import room
from tsugiki.evaluate.overlap import overlap
from tsugiki.evaluate.score import Score, evaluate

SCORES = ("accuracy", "bleu", "rouge_l", "loss", "held_out_loss", "perplexity")      # of a score, what the report shows


def task_of(cfg: RunConfig, train: Sequence[Conversation], say: Callable[[str], None]) -> tasks.Task | None:
    """The task of eval.task, asked in the shape of the training rows; says what training holds of it."""
    if cfg.eval.task is None:
        return None
    task = tasks.load(cfg.eval.task, cfg.eval.task_data, cfg.eval.max_rows, chat=next(iter(train)).kind == "chat")
    say(f"task {task.name}: {len(task.items):,} rows, metric {tasks.scoring(task, cfg.eval).metric}")
    if both := overlap(train, task.items):
        say(f"task {task.name}: its score may be too good: {both}")
    return task


def scored_by(model: nn.Module, renderer: Renderer, held_out: Sequence[Conversation], task: tasks.Task | None, cfg: EvalConfig,
              pad: int, limit: int) -> Callable[[], Score] | None:
    """The task, with the loss of held-out rows beside it, or the held-out rows; None where there is neither."""
    def held(how: EvalConfig) -> Score:
        return evaluate(model, renderer, held_out, how, pad, limit)

    if task is None:
        return partial(held, cfg) if held_out else None

    def score() -> Score:
        found = tasks.score(model, renderer, task, cfg, pad, room(model) or limit)
        if not held_out:
            return found
        return replace(found, also=found.also | {"held_out_loss": held(replace(cfg, metric="loss")).loss})
    return score


def losses(model: nn.Module, renderer: Renderer, held: Mapping[str, Sequence[Conversation]], cfg: EvalConfig, pad: int,
           limit: int) -> dict[str, Callable[[], Score]]:
    """The loss on held-out text of each source, by its name."""
    how = replace(cfg, metric="loss")
    return {name: partial(evaluate, model, renderer, rows, how, pad, limit) for name, rows in held.items()}


def samples(model: nn.Module, renderer: Renderer, held_out: list[Conversation], task: tasks.Task | None,
            cfg: EvalConfig) -> tuple[list[Conversation], int]:
    """Three rows whose answers the report shows, and how long these may be."""
    if task is None:
        return held_out[:3] if any(c.kind != "text" for c in held_out[:3]) else [], cfg.new_tokens
    asked = {c.prompt_text: c for c in reversed(task.conversations[:50]) if c.kind != "text"}       # of one prompt, its first row
    some = list(reversed(asked.values()))
    fits = [c for c, ids in zip(some, renderer.prompts(some), strict=True) if len(ids) < (room(model) or 1 << 60)]
    return fits[:3], tasks.scoring(task, cfg).max_new_tokens


def curve_names(cfg: EvalConfig) -> dict[str, str]:
    """Key of an evaluation in metrics.jsonl -> its curve in the report."""
    names = {key: key for key in SCORES if key != "perplexity"}
    return names | {"loss": "task loss" if cfg.task else "held-out loss", "held_out_loss": "held-out loss"}
