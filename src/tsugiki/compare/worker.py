"""A process that forks a child for every run: its peak of memory is its own, and when it crashes the study goes on.

    python -m tsugiki.compare.worker          reads the study, then a cell a line; answers each with a line. Not for people.
"""
from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import signal
import sys
import time
import traceback
from functools import cache
from pathlib import Path

import torch
from torch import nn

from tsugiki.compare.rows import Parts, read_parts
from tsugiki.compare.schedule import done
from tsugiki.compare.store import BUSY, DONE, STOPPED, Store
from tsugiki.compare.study import ALONE, Cell, Study
from tsugiki.config import EvalConfig, RunConfig, build
from tsugiki.data import Renderer, load_conversations
from tsugiki.errors import RunError, UserError
from tsugiki.evaluate import tasks
from tsugiki.evaluate.answers import room
from tsugiki.evaluate.score import Score, evaluate, row_losses
from tsugiki.load import compute_dtype, device_of, load, pad_id
from tsugiki.memory import out_of_memory
from tsugiki.methods import METHODS, Full
from tsugiki.train.loop import Interrupted
from tsugiki.train.run import Result, run

LOST_WITH_PARENT = 1                                  # prctl's PR_SET_PDEATHSIG


def main() -> None:
    """The study from the first line of stdin, then cells, until stdin ends."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)      # Ctrl-C reaches the child too, which saves first
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)                                     # whatever a library prints is not an answer
    study = build(Study, json.loads(sys.stdin.readline()))
    parts = cache(lambda data: read_parts(study, data))
    for line in iter(sys.stdin.readline, ""):
        cell, began = Cell.of(json.loads(line)), time.monotonic()
        parts(cell.data)                              # read once, here: children inherit it
        code = forked(study, cell, parts)
        print(json.dumps({"key": cell.key, "code": code, "seconds": time.monotonic() - began}), file=answers, flush=True)


def forked(study: Study, cell: Cell, parts) -> int:
    """Run the cell in a child; its exit code, minus the signal if one killed it."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = Path(study.out) / "logs" / f"{cell.key}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
        code = one(study, cell, parts(cell.data))
    except (KeyboardInterrupt, Interrupted):
        code = STOPPED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def die_with_parent() -> None:
    """On Linux, ask for a SIGTERM when the parent dies: a run then saves itself and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(LOST_WITH_PARENT, signal.SIGTERM)


def one(study: Study, cell: Cell, parts: Parts) -> int:
    """A cell to its result. What goes wrong in it is its result, but for a stop."""
    store = Store(study.out)
    with store.lock(cell.key) as mine:
        if not mine:
            return BUSY
        found = store.result(cell.key)
        if found is not None and done(cell, {cell.key: found}):
            return DONE
        try:
            result = base_alone(study, cell, parts) if cell.variant.method == ALONE else trained(study, cell, parts)
            if found:                                 # trained before, by a process that held more than scoring needs
                result["memory"] = max(result["memory"], found["memory"])
        except Interrupted:
            raise
        except (RunError, UserError) as e:
            result = {"failed": str(e).partition("; nothing was updated")[0][:300]}
        except Exception as e:
            traceback.print_exc()
            line = next(iter(str(e).splitlines()), "")
            result = {"failed": "out of memory" if out_of_memory(e) else f"{type(e).__name__}: {line}"[:300]}
        store.put(cell, result)
        return DONE


def trained(study: Study, cell: Cell, parts: Parts) -> dict:
    """Train (or take up the trained run), then score: on the validation rows, and if it is a final run on the test rows."""
    cfg = study.config(cell)
    full = issubclass(METHODS[cell.variant.method], Full)
    model, tokenizer = _load(cfg, full)
    done = run(model, tokenizer, cfg, parts.rows(), quiet=True, say=lambda line: print(line, file=sys.stderr, flush=True))
    memory = peak_memory(model)
    gc.collect()
    result = {"trainable": done.trainable, "total": done.total, "steps": done.progress.step, "tokens": done.progress.tokens,
              "seconds": round(done.progress.seconds, 2), "memory": memory, "curve": curve(done), "losses": losses(done),
              "validation": done.progress.after}
    return result | scores(study, cell, cfg, model, tokenizer, parts)


def base_alone(study: Study, cell: Cell, parts: Parts) -> dict:
    cfg = build(RunConfig, study.values(cell.data))
    model, tokenizer = _load(cfg, full=False)
    return scores(study, cell, cfg, model, tokenizer, parts)


def _load(cfg: RunConfig, full: bool) -> tuple[nn.Module, object]:
    dtype = torch.float32 if full else compute_dtype(cfg.train.dtype, device_of(cfg.device))
    return load(cfg.base, bits=cfg.bits or None, dtype=dtype, device=cfg.device, trust_remote_code=cfg.trust_remote_code)


def scores(study: Study, cell: Cell, cfg: RunConfig, model: nn.Module, tokenizer, parts: Parts) -> dict:
    """The model as it is now on the rows that this cell is scored on."""
    renderer = Renderer(tokenizer, template=parts.template, train_on=cfg.data.train_on, stop=cfg.data.stop)
    limit, scoring = min(cfg.train.max_length, room(model) or cfg.train.max_length), study.scoring(cell.data)
    found: dict = {}
    if study.select == "metric" and cell.variant.method != ALONE:
        found["validation"] = evaluate(model, renderer, parts.validation, scoring, pad_id(tokenizer), limit).plain()
    if cell.test:
        score = tested(model, renderer, parts, scoring, pad_id(tokenizer), limit)
        found["test"] = score.plain() | {"rows": [round(r, 6) for r in score.rows]} | shown_of(score, parts, study.samples)
        if study.general:
            found["general"] = general_loss(study, model, tokenizer, limit)
    return found


def tested(model: nn.Module, renderer: Renderer, parts: Parts, scoring: EvalConfig, pad: int, limit: int) -> Score:
    """The test rows' score, or the task's, which is given the room that the model has, as in a run."""
    if parts.task:
        return tasks.score(model, renderer, parts.task, scoring, pad, room(model) or limit)
    return evaluate(model, renderer, parts.test, scoring, pad, limit)


def shown_of(score: Score, parts: Parts, count: int) -> dict:
    """The answers to `parts.shown`, and which are right by a metric that says so; where rows with one prompt are one answer, they
    come in the order of prompts."""
    if not score.answers:
        return {"answers": []}
    numbers = [n for n, _ in parts.shown(count)] if len(score.results) == len(parts.test) else range(min(count, len(score.results)))
    some = [score.results[n] for n in numbers]
    right = {"right": [r.stats[0] == 1.0 for r in some]} if score.metric == "accuracy" else {}
    return {"answers": [r.answer for r in some]} | right


def general_loss(study: Study, model: nn.Module, tokenizer, limit: int) -> float:
    """Loss, in nats a token, on the first tokens of the general texts."""
    examples, _ = Renderer(tokenizer).examples(load_conversations(study.general, "text"), limit)
    kept, tokens = [], 0
    for example in examples:
        if tokens >= study.general_tokens:
            break
        kept, tokens = [*kept, example], tokens + len(example.ids)
    sums, counts = row_losses(model, kept, pad_id(tokenizer))
    loss = float(sums.sum() / counts.sum())
    if not math.isfinite(loss):
        raise RunError("the loss on the general texts is not finite")
    return loss


def curve(done: Result) -> list[dict]:
    """The validation loss by step, tokens and seconds of training."""
    lines, found = metrics(done), []
    at = {line["step"]: line for line in lines if "tokens" in line} | {0: {"tokens": 0, "seconds": 0.0}}
    for line in lines:
        if "eval" in line and line["step"] in at:
            there = at[line["step"]]
            found.append({"step": line["step"], "tokens": there["tokens"], "seconds": there["seconds"],
                          "loss": line["eval"]["loss"]})
    return found


def losses(done: Result) -> list[list[float]]:
    """(step, training loss) of the lines of metrics.jsonl."""
    return [[line["step"], line["loss"]] for line in metrics(done) if "loss" in line]


def metrics(done: Result) -> list[dict]:
    text = (done.out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def peak_memory(model: nn.Module) -> int:
    """Bytes: the most that this process held, on a GPU the most that its tensors held."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


if __name__ == "__main__":
    main()
