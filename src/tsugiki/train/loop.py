"""The training loop: steps, evaluation, checkpoints, signals. Everything random is a function of (seed, step, row)."""
from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tsugiki.adapters import Adapter
from tsugiki.config import TrainConfig
from tsugiki.data.batch import FORWARD_OVERHEAD, Batch, collate, micro_batches
from tsugiki.data.mixture import Mixture
from tsugiki.data.render import Example
from tsugiki.errors import RunError, UserError
from tsugiki.evaluate.score import Score
from tsugiki.memory import out_of_memory
from tsugiki.train import checkpoint as checkpoints
from tsugiki.train.compiled import Layers
from tsugiki.train.guard import Guard
from tsugiki.train.log import Bar, MetricsFile
from tsugiki.train.optim import adamw, schedule
from tsugiki.train.step import StepResult, train_step

# Packed rows are filled up to a multiple of this on a GPU, where every new shape is tuned for or compiled anew.
MULTIPLE = {"cuda": 128}


class Interrupted(RunError):
    """SIGINT or SIGTERM came; the run was saved. `code` is the shell's 128 + signal."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.code = 128 + signum


@dataclass(frozen=True)
class Job:
    """What is trained on what. `route` gives the forward its adapter and its dropout keys, from (batch, step).
    `untrained` routes the model as it was before any training, for the scores and samples of before."""
    model: nn.Module
    params: dict[str, nn.Parameter]
    examples: Sequence[Example]
    cfg: TrainConfig
    lr: float
    pad_id: int
    layout: str
    mixture: Mixture
    route: Callable[[Batch, int], dict] = lambda batch, step: {}
    evaluate: Callable[[], Score] | None = None
    watched: dict[str, Callable[[], Score]] = field(default_factory=dict)    # losses on held-out text of each source
    untrained: Callable[[], AbstractContextManager] = nullcontext
    autocast: Callable[[], AbstractContextManager] = nullcontext
    adapter: Adapter | None = None                    # its method may scale rates, add a penalty, and act after each step
    overhead: int = FORWARD_OVERHEAD                  # tokens that cost as much as beginning another forward
    layers: Layers | None = None                      # the decoder layers, where they may be compiled

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What training changes: parameters and, of an adapter, buffers."""
        return self.params | (self.adapter.buffers() if self.adapter else {})

    @property
    def steps(self) -> int:
        return self.cfg.steps or max(1, math.ceil(self.cfg.epochs * self.mixture.pace))


@dataclass
class Progress:
    """The part of a run that a checkpoint must remember besides tensors."""
    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    tokens: int = 0
    seconds: float = 0.0
    offset: int = 0
    stopped: str = ""
    max_tokens: int = 0                               # of one forward; less than at the start once memory ran out
    before: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)
    sources_before: dict = field(default_factory=dict)
    sources_after: dict = field(default_factory=dict)
    warned: bool = False                              # that the source loss is beyond its limit
    samples: list = field(default_factory=list)


def fit(job: Job, out: Path, *, quiet: bool = False, say: Callable[[str], None] = print,
        samples: Callable[[], list[dict]] | None = None) -> Progress:
    """Train to the end, from the newest good checkpoint in `out/checkpoints` if there is one.

    Leaves the trained weights in `job.params` (the best evaluated ones with cfg.keep = "best").
    Raises RunError on a non-finite step, Interrupted after SIGINT or SIGTERM (saved, to be resumed).
    """
    run = Steps(job, out, say)
    progress = run.progress
    if not run.resumed:
        run.begin(samples)
    saved_at = time.monotonic()
    with signals() as caught, Bar("train", job.steps, progress.step, quiet) as bar:
        while not run.done:
            run.step(bar)
            run.score_if_due()
            if run.due(saved_at) or caught or run.done:
                run.save()
                saved_at = time.monotonic()
            if caught and progress.step < job.steps:
                raise Interrupted(f"stopped by {signal.Signals(caught[0]).name} at step {progress.step} of {job.steps}, "
                                  "saved; the same command goes on from here", caught[0])
    run.take_best()
    return progress


class Steps:
    """The state of one run between two steps, all of it in memory or in the last checkpoint."""

    def __init__(self, job: Job, out: Path, say: Callable[[str], None], found: tuple[dict, checkpoints.Held] | None = None):
        """found: state and tensors to go on from, instead of the newest checkpoint in `out/checkpoints`."""
        self.job, self.root = job, out / "checkpoints"
        scale = job.adapter.cfg.lr_scale if job.adapter else (lambda name: 1.0)
        self.optimizer = adamw(job.params, job.lr, job.cfg.weight_decay, job.cfg.beta2, scale)
        self.buffers = {n: t for n, t in job.tensors.items() if n not in job.params}
        if found is None:
            checkpoints.clean(self.root)
            newest = checkpoints.newest(self.root, say)
            found = (newest.state, checkpoints.read(newest)) if newest else None
        self.resumed = found is not None
        self.progress = Progress(**found[0]) if found else Progress()
        self.progress.max_tokens = self.progress.max_tokens or job.cfg.max_tokens or job.cfg.forward_tokens
        self.say = say
        self.best = checkpoints.restore(found[1], job.params, self.optimizer, self.buffers) if found else {}
        if found:
            checkpoints.prune(self.root, job.cfg.save_keep)       # a kill may have come between a save and that
            say(f"this run is finished ({self.progress.step} steps); nothing is trained again" if self.done
                else f"going on from step {self.progress.step} of {job.steps}")
        self.stepped = False
        self.guard = Guard(job.cfg, self.progress)
        self.metrics = MetricsFile(out / "metrics.jsonl", self.progress.offset)

    @property
    def done(self) -> bool:
        return self.progress.step >= self.job.steps or bool(self.progress.stopped)

    def begin(self, samples: Callable[[], list[dict]] | None = None) -> None:
        """What is asked of the model as it was before any training."""
        with self.job.untrained():
            if samples:
                self.progress.samples = samples()
            self.score_before()

    def due(self, saved_at: float) -> bool:
        """Whether a checkpoint is: every save_steps, else every minute."""
        every = self.job.cfg.save_steps
        return self.progress.step % every == 0 if every else time.monotonic() - saved_at > 60

    def save(self) -> None:
        self.progress.offset = self.metrics.sync()
        checkpoints.save(self.root, self.progress.step, self.job.params, self.optimizer, vars(self.progress),
                         self.job.cfg.save_keep, self.best, self.buffers)

    def _look(self) -> Score | None:
        """Every score there is, as the model is now."""
        progress, result = self.progress, self.job.evaluate() if self.job.evaluate else None
        progress.after = result.plain() if result else {}
        progress.sources_after = {name: score().plain() for name, score in self.job.watched.items()}
        return result

    def _write(self) -> None:
        progress = self.progress
        found = {"eval": progress.after, "eval_sources": progress.sources_after}
        if any(found.values()):
            self.metrics.write(step=progress.step, **{k: v for k, v in found.items() if v})

    def score_before(self) -> None:
        """Evaluate the model as it was before any training, whose score is not that of the parameters at hand."""
        self._look()
        self._write()
        progress = self.progress
        progress.before, progress.after = progress.after, {}
        progress.sources_before, progress.sources_after = progress.sources_after, {}
        if self.guard.stops:                          # these are within the limit, whatever comes
            self._remember()

    def _remember(self) -> None:
        self.best = {n: p.detach().clone() for n, p in self.job.tensors.items()}

    def score_if_due(self) -> None:
        every, progress = self.job.cfg.eval_steps, self.progress
        if progress.step == self.job.steps or every and progress.step % every == 0:
            self.score()

    def score(self) -> None:
        """Evaluate; remember the best parameters if they are asked for, stop when patience is out or too much is forgotten."""
        cfg, progress, result = self.job.cfg, self.progress, self._look()
        self._write()
        self.guard.look(self.say)
        if progress.stopped:                          # what was remembered is within the limit
            return
        best = cfg.keep == "best" or bool(cfg.patience)
        if self.guard.stops and not best:
            progress.best_step = progress.step
            self._remember()
        if result is None:
            return
        if progress.best is None or result.better_than(progress.best):
            progress.best, progress.stale = result.value, 0
            if best or not self.guard.stops:
                progress.best_step = progress.step
            if best:
                self._remember()
            return
        progress.stale += 1
        if cfg.patience and progress.stale >= cfg.patience:
            progress.stopped = f"no better {result.metric} in {cfg.patience} evaluations"

    @torch.no_grad()
    def take_best(self) -> None:
        """Put the best evaluated parameters in place, if the run keeps those."""
        if not self.best or not (self.job.cfg.keep == "best" or self.progress.stopped):
            return
        for name, p in self.job.tensors.items():
            p.copy_(self.best[name])
        if self.progress.best_step != self.progress.step:
            self._look()

    def step(self, bar: Bar) -> None:
        """Rows -> micro-batches -> update -> log. Nothing here depends on what happened before but the parameters."""
        progress, began, lr, result = self.progress, time.monotonic(), self.set_rate(), None
        while result is None:
            try:
                result = self._update(progress.step)
            except (RunError, UserError):
                raise
            except Exception as e:
                way = self._way_out(e)
                if way is None:
                    raise
            if result is None:                        # out here nothing of the failed forward is held by its traceback
                self.optimizer.zero_grad(set_to_none=True)
                way()
        self.note(result, lr, time.monotonic() - began)
        bar.update(progress.step, f"loss {result.loss:.3f}  {progress.tokens / max(progress.seconds, 1e-9):,.0f} tok/s")

    def set_rate(self) -> float:
        """The learning rate of the next step, given to the optimizer."""
        job = self.job
        lr = job.lr * schedule(job.cfg.schedule, self.progress.step, job.steps, job.cfg.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        return lr

    def note(self, result: StepResult, lr: float, took: float) -> None:
        """A step is taken: the counters, and a line in metrics.jsonl."""
        job, progress = self.job, self.progress
        progress.step, progress.tokens = progress.step + 1, progress.tokens + result.tokens
        progress.seconds += took
        if progress.step % job.cfg.log_steps == 0 or progress.step in (1, job.steps):
            self.metrics.write(step=progress.step, loss=result.loss, lr=lr, norm=result.norm, supervised=result.supervised,
                               tokens=progress.tokens, tokens_per_second=round(result.tokens / took, 1),
                               seconds=round(progress.seconds, 3), **self._by_source(result))
        if not self.stepped:
            self.stepped = True
            self.say(f"first step after {took:.1f} s")

    def _by_source(self, result: StepResult) -> dict:
        """Of each of several sources: its loss in this step, and its tokens so far."""
        mixture = self.job.mixture
        if not mixture.mixed:
            return {}
        tokens = mixture.tokens(self.progress.step)
        return {"sources": {s.name: {"loss": total / count if count else None, "supervised": count, "tokens": n}
                            for s, (total, count), n in zip(mixture.sources, result.sources, tokens, strict=True)}}

    def _update(self, step: int) -> StepResult:
        """One optimizer step, of the rows that (seed, step) give."""
        job = self.job
        rows = job.mixture.rows(step)
        virtual = job.adapter.virtual if job.adapter is not None and job.layout == "pack" else 0
        cuts = micro_batches({i: len(job.examples[i].ids) + virtual for i in rows}, rows, job.layout, self.progress.max_tokens,
                             job.overhead)
        device = next(iter(job.params.values())).device
        batches = [collate(job.examples, cut, job.pad_id, MULTIPLE.get(device.type, 1), virtual).to(device) for cut in cuts]
        return train_step(job.model, batches, job.params, self.optimizer, route=lambda b: job.route(b, step),
                          autocast=job.autocast, **self.how())

    def how(self) -> dict:
        """What a Part of the next step is told beside its parameters and optimizer."""
        job, cfg, adapter, step = self.job, self.job.cfg, self.job.adapter, self.progress.step
        of = {"source_of": job.mixture.source_of, "sources": len(job.mixture.sources)} if job.mixture.mixed else {}
        if adapter is not None:
            of |= {"penalty": lambda: adapter.cfg.penalty(adapter),
                   "after": lambda: adapter.cfg.after_step(adapter, step + 1, job.steps)}
        return {"clip": cfg.clip, "step": step + 1, "where": lambda i: job.examples[i].where} | of

    @property
    def longest(self) -> int:
        """Tokens of the longest row of the next step."""
        return max(len(self.job.examples[i].ids) for i in self.job.mixture.rows(self.progress.step))

    def no_room(self) -> RunError:
        """What is said where the longest row of the next step does not fit alone."""
        hint = "" if self.job.cfg.checkpointing in ("on", "offload") else " or set train.checkpointing to on"
        return RunError(f"step {self.progress.step + 1}: there is no memory for a row of {self.longest} tokens alone; shorten "
                        f"train.max_length{hint}; nothing was updated, the last checkpoint is good")

    def _way_out(self, error: Exception) -> Callable[[], None] | None:
        """What to do before the step is taken again, or None. Nothing was updated: its gradients are thrown away."""
        job = self.job
        if out_of_memory(error):
            if self.progress.max_tokens <= self.longest:
                raise self.no_room() from None
            return self._halve
        if job.layers is not None and job.layers.on:
            line = next(iter(str(error).splitlines()), "") or type(error).__name__
            return partial(self._go_on_eagerly, line[:200])
        return None

    def _halve(self) -> None:
        self.progress.max_tokens //= 2
        self.say(f"out of memory: forwards of {self.progress.max_tokens:,} tokens from here on, the step is taken again")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _go_on_eagerly(self, why: str) -> None:
        self.job.layers.undo()
        self.say(f"the layers cannot be compiled ({why}); going on without")


@contextmanager
def signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM fill the list, read after each step; a second one acts as usual."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(signum, frame):
        caught.append(signum)
        signal.signal(signum, before[signum])

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for s in before:
        signal.signal(s, note)
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
