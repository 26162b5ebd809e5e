"""Many jobs trained on one frozen base: a tick is one optimizer step of each job whose turn it is, in forwards they share."""
from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from tsugiki.adapters import attach
from tsugiki.errors import RunError, UserError
from tsugiki.evaluate.answers import room_beside
from tsugiki.memory import out_of_memory
from tsugiki.train import checkpoint as checkpoints
from tsugiki.train.failure import Failure, bare, reason_of
from tsugiki.train.jobs import TAKEN, JobConfig, job_of
from tsugiki.train.log import Bars, console
from tsugiki.train.loop import Interrupted, Progress, Steps, signals
from tsugiki.train.rows import Rows, read_rows
from tsugiki.train.run import Result, before, check_folder, claim, ready
from tsugiki.train.step import Part, gradients
from tsugiki.train.together import Running, arranged, forwards, route
from tsugiki.train.turns import Turns


class Joint:
    """Jobs on one base, each trained as it would be alone. `with Joint(model, tokenizer, out) as joint: ... joint.run()`.

    Add and remove jobs at any time between ticks. What is found in `out` goes on. Whatever goes wrong in one job stops that job
    alone, and changes no bit of the others: before anything is updated the job at fault is found, and the tick is taken again
    without it.
    """

    def __init__(self, model: nn.Module, tokenizer, out: str | Path, *, tokens: int | None = None, quiet: bool = False,
                 say: Callable[[str], None] | None = None):
        """tokens: of all steps of a tick together, where not all fit (default: what one forward holds)."""
        self.model, self.tokenizer, self.out, self.tokens, self.quiet = model, tokenizer, Path(out), tokens, quiet
        self.say = say or (lambda line: None if quiet else console().print(line, markup=False))
        self.root = self.out / TAKEN[0]
        _check(self.out)
        self.adapters = attach(model)
        checkpoints.clean(self.root)
        newest = checkpoints.newest(self.root, self.say)
        self.state = newest.state if newest else {"tick": 0, "accounts": {}, "forward": 0, "jobs": {}}
        self.saves = newest.step if newest else 0     # each has a number of its own: none takes another's place
        self.held = checkpoints.read(newest) if newest else None
        if newest:
            checkpoints.prune(self.root, self.state["keep"])      # a kill may have come between a save and that
        self.now: int = self.state["tick"]
        self.forward: int = self.state["forward"]     # tokens of a forward; less once memory ran out
        self.turns = Turns(self.state["accounts"])
        self.jobs: dict[str, Running] = {}
        self.results: dict[str, Result | Failure] = {}
        self._order: dict[str, None] = {}             # every job's name, as they were added
        self._stack, self._arranged, self._changed, self._saved_at = ExitStack(), False, False, time.monotonic()

    def __enter__(self) -> Joint:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Put back what was changed about the model; unfinished jobs' adapters go too (they are in the checkpoint)."""
        self._stack.close()
        self._arranged = False
        for name in list(self.jobs):
            self._drop(name)

    # Jobs

    def add(self, job: JobConfig | Mapping, rows: Rows | None = None) -> None:
        """A job joins from the next tick on (or from its `start`); one that was in `out` before goes on, or is done.

        Raises UserError for bad settings or data, with nothing changed.
        """
        job = job_of(job, self.out)
        name, cfg = job.name, job.run
        if name in self.jobs or name in self.results:
            raise UserError(f"{name}: a job of this name is there")
        say = self._say(name)
        rows = rows or read_rows(cfg, say)
        there = check_folder(Path(cfg.out), cfg, rows.fingerprint)
        entry = self.state["jobs"].get(name) if there else None
        self._order[name] = None
        if entry is not None and self._over(name, entry, cfg):
            return
        if name in self.adapters.names():
            raise UserError(f"{name}: an adapter of this name is attached; remove it, or give the job another name")
        try:
            with self._alone(name):
                it = ready(self.model, self.tokenizer, cfg, rows, say)
        except BaseException:
            if name in self.adapters.names():
                self.adapters.remove(name)
            raise
        self.root.mkdir(parents=True, exist_ok=True)  # before the job's own: a kill leaves what `_check` knows
        claim(Path(cfg.out), cfg, rows.fingerprint)
        begun = entry is not None and entry["status"] == "live" and entry["begun"]
        self.jobs[name] = Running(job, it, (entry["progress"], self.held.take(f"{name}/")) if begun else None, begun)
        self._arranged = False

    def admit(self, job: JobConfig | Mapping, rows: Rows | None = None) -> None:
        """As `add`, but what is wrong with the job is its result."""
        name, out = (job.name, job.run.out) if isinstance(job, JobConfig) else (str(job["name"]), job.get("out"))
        try:
            self.add(job, rows)
        except Exception as e:
            self.refuse(name, reason_of(e), out and Path(out))

    def refuse(self, name: str, reason: str, out: Path | None = None) -> None:
        """Note a job that cannot begin."""
        self.results[name] = Failure(out or self.out / name, reason)
        self._order[name] = None
        self.say(f"{name}: failed: {reason}" if not reason.startswith(f"{name}:") else f"failed: {reason}")

    def remove(self, name: str) -> None:
        """Take an unfinished job out. Its folder keeps where it stood; added again, it goes on from there."""
        if name not in self.jobs:
            raise UserError(f"{name}: no unfinished job has this name (there are: {', '.join(self.jobs) or 'none'})")
        self._arrange()
        self.state["jobs"].pop(name, None)
        if name in self.jobs:
            if self.jobs[name].begun:
                self.jobs[name].steps.save()
            self._drop(name)
        self.save()

    def _over(self, name: str, entry: dict, cfg) -> bool:
        """Whether a job that the checkpoint knows is at its end. One that failed is tried again when no other is unfinished."""
        out, unfinished = Path(cfg.out), any(e["status"] == "live" for e in self.state["jobs"].values())
        if entry["status"] == "done" and (out / "adapter").is_dir():
            self.results[name] = Result(out, out / "adapter", Progress(**entry["progress"]), entry["steps"], entry["trainable"],
                                        entry["total"])
            self.say(f"{name}: finished ({entry['steps']} steps)")
        elif entry["status"] == "failed" and unfinished:
            self.results[name] = Failure(out, entry["reason"], entry["steps"], begun=True)
            self.say(f"{name}: failed before: {entry['reason']}")
        return name in self.results

    def _drop(self, name: str) -> None:
        """Out of memory."""
        del self.jobs[name]
        self.adapters.remove(name)
        self.turns.forget(name)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Inside, forwards that name no adapter are this job's, as if no other were attached."""
        active = self.adapters.active
        try:
            with room_beside(name):
                if name in self.adapters.names():
                    self.adapters.active = name
                yield
        finally:
            self.adapters.active = [n for n in active if n in self.adapters.names()]

    def _say(self, name: str) -> Callable[[str], None]:
        return lambda line: self.say(f"{name}: {line}")

    # Ticks

    def run(self) -> dict[str, Result | Failure]:
        """Ticks until every job has ended; the results by name, in the order of the jobs.

        Raises Interrupted after SIGINT or SIGTERM (saved, to be resumed).
        """
        try:
            with signals() as caught, Bars(self.quiet) as bars:
                while self.jobs:
                    self.tick()
                    bars.update({name: (job.steps.progress.step, job.steps.job.steps) for name, job in self.jobs.items()
                                 if job.steps})
                    if caught and self.jobs:
                        self.save()
                        raise Interrupted(f"stopped by {signal.Signals(caught[0]).name} at tick {self.now}, {len(self.jobs)} jobs "
                                          "unfinished, saved; the same command goes on from here", caught[0])
        finally:
            self.close()
        return {name: self.results[name] for name in self._order if name in self.results}

    def tick(self) -> list[str]:
        """One optimizer step of the jobs whose turn it is; their names."""
        self._arrange()
        waiting = self._waiting()
        if not waiting and self.jobs:                 # nobody is there yet: on to the tick at which the next one begins
            self.now = min(job.cfg.turn.start for job in self.jobs.values())
            waiting = self._waiting()
        began, taken = time.monotonic(), self._take()
        tokens = sum(part.tokens for _, part in taken)
        self.now += bool(taken)
        for job, part in taken:
            self._update(job, part, began, tokens)
        if self._changed or any(job.steps.due(self._saved_at) for job, _ in taken if job.name in self.jobs):
            self.save()
        return [job.name for job, _ in taken]

    def _waiting(self) -> list[Running]:
        """The jobs that have begun, and begin with those whose time has come."""
        for job in [j for j in self.jobs.values() if not j.begun and j.cfg.turn.start <= self.now]:
            self._guarded(job, self._begin)
        return [job for job in self.jobs.values() if job.begun]

    def _begin(self, job: Running) -> None:
        if not job.steps.resumed:
            picked, answers = job.it.asked()
            job.steps.begin(before(answers) if picked else None)
        job.begun = True
        if job.steps.done:                            # its folder held it, finished
            self._finish(job)

    def _take(self) -> list[tuple[Running, Part]]:
        """The gradients of the next tick, nothing updated: with jobs that turn out to be at fault gone."""
        apart = False
        while waiting := {job.name: job for job in self.jobs.values() if job.begun}:
            costs = {name: job.cost for name, job in waiting.items()}
            chosen = self.turns.choose(costs, self.tokens or self.forward)
            jobs = sorted((waiting[name] for name in chosen), key=lambda job: job.it.method.name)
            try:
                parts = self._gradients(jobs, apart)
            except Exception as e:
                error = bare(e)
            else:
                self.turns.charge(costs, chosen, {name: job.cfg.turn.weight for name, job in waiting.items()})
                return list(zip(jobs, parts, strict=True))
            apart = self._settle(error, jobs, apart)  # out here nothing of the failed forward is held by its traceback
        return []

    def _gradients(self, jobs: list[Running], apart: bool = False, rows: list[list[int]] | None = None) -> list[Part]:
        """The gradient of each job's next step, or of some of its rows; thrown away where anything is wrong."""
        parts = [Part(params=job.it.params, optimizer=job.steps.optimizer, **job.steps.how()) for job in jobs]
        made, steps = [job.steps.job for job in jobs], [job.steps.progress.step for job in jobs]
        try:
            batches = forwards(made, rows or [job.rows for job in jobs], self.forward, apart)
            gradients(self.model, batches, parts, route=lambda batch: route(made, steps, batch))
        except BaseException:
            for part in parts:
                part.clear()
            raise
        return parts

    def _settle(self, error: Exception, jobs: list[Running], apart: bool) -> bool:
        """Something went wrong in a tick of these jobs. Those at fault are stopped; whether to take the tick apart, each job in
        forwards of its own. Raises the error if that is how it was taken."""
        none_fits = out_of_memory(error)
        guilty = {job: wrong for job in jobs if (wrong := self._alone_wrong(job, none_fits))}
        for job, wrong in guilty.items():
            self._fail(job, wrong)
        if guilty:
            return False
        if none_fits and self.forward > (longest := max(job.steps.longest for job in jobs)):
            self.forward = max(self.forward // 2, longest)
            self.say(f"out of memory: forwards of {self.forward:,} tokens from here on, the tick is taken again")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return apart
        if apart or none_fits:
            raise RunError(f"tick {self.now + 1}: {reason_of(error)}, with {len(jobs)} jobs of which none is at fault alone; "
                           "nothing was updated, the last checkpoint is good") from error
        return True

    def _alone_wrong(self, job: Running, memory: bool) -> Exception | None:
        """What goes wrong in its next step when it is taken alone; of memory: in its longest row alone."""
        rows = [[max(job.rows, key=lambda i: len(job.it.examples[i].ids))]] if memory else None
        try:
            self._gradients([job], rows=rows)
        except Exception as e:
            if not memory:
                return bare(e)
            return job.steps.no_room() if out_of_memory(e) else None
        else:
            job.steps.optimizer.zero_grad(set_to_none=True)
            return None

    def _update(self, job: Running, part: Part, began: float, tokens: int) -> None:
        lr = job.steps.set_rate()
        try:
            result = part.update()
        except Exception as e:
            self._fail(job, bare(e), broken=True)
            return
        job.steps.note(result, lr, (time.monotonic() - began) * result.tokens / tokens)
        self._guarded(job, self._after)

    def _after(self, job: Running) -> None:
        """A step is taken: score, and end."""
        job.steps.score_if_due()
        if job.steps.done:
            self._finish(job)

    def _finish(self, job: Running) -> None:
        steps = job.steps
        steps.save()                                  # in its own folder, as a run alone leaves it
        steps.take_best()
        self.results[job.name] = job.it.finish(steps.progress, steps.job.steps)
        self._say(job.name)(f"finished after {steps.progress.step} steps")
        self._drop(job.name)
        self._changed = True

    def _guarded(self, job: Running, act: Callable[[Running], None]) -> None:
        """Do something that is this job's alone; what goes wrong there is its failure."""
        try:
            with self._alone(job.name):
                act(job)
        except Exception as e:
            self._fail(job, bare(e))

    def _fail(self, job: Running, error: Exception, broken: bool = False) -> None:
        """Stop one job; its last good state stays in its folder: that in memory, or if it is `broken` that of the checkpoint."""
        reason, step = reason_of(error), job.steps.progress.step if job.steps else 0
        try:
            broken = broken or not job.finite
            if step and (not broken or self._restore(job)):
                job.steps.save()
                job.it.save()
        except Exception as e:
            reason += f"; what it had could not be saved in its folder ({reason_of(e)})"
        self.results[job.name] = Failure(Path(job.cfg.run.out), reason, step, begun=True)
        self._drop(job.name)
        self._say(job.name)(f"failed: {reason}")
        self._changed = True

    def _restore(self, job: Running) -> bool:
        """Its state in the last checkpoint back in place; whether there is one."""
        newest = checkpoints.newest(self.root)
        entry = newest.state["jobs"].get(job.name) if newest else None
        if not entry or not entry.get("begun"):
            return False
        job.steps = Steps(job.steps.job, Path(job.cfg.run.out), lambda line: None,
                          (entry["progress"], checkpoints.read(newest).take(f"{job.name}/")))
        return True

    # What all share

    def _arrange(self) -> None:
        """How the forwards are made, for the jobs that are there."""
        if self._arranged or not self.jobs:
            return
        self._stack.close()
        way = arranged(self._stack, self.model, {name: job.it for name, job in self.jobs.items()}, self.forward)
        for name, wrong in way.refused.items():
            self._fail(self.jobs[name], wrong)
        self.forward = way.tokens
        for name, job in self.jobs.items():
            made = job.it.job(way.layouts[name], way.tokens, way.overhead)
            if job.steps is None:
                say = self._say(name)
                say(job.it.described(made))
                job.steps, job.found = Steps(made, Path(job.cfg.run.out), say, job.found), None
            else:
                job.steps.job = made
        self._arranged = True

    def save(self) -> None:
        """One checkpoint of everything that is unfinished, exact to the bit, and what is known of the rest."""
        for job in [j for j in self.jobs.values() if j.begun and not j.finite]:      # the last good state is not written over
            self._fail(job, RunError(f"step {job.steps.progress.step + 1}: its weights are not finite"), broken=True)
        params, best, buffers, moments = {}, {}, {}, {}
        entries: dict[str, dict] = {}
        for name, job in self.jobs.items():
            steps = job.steps
            entries[name] = {"status": "live", "begun": job.begun}
            if not job.begun:                         # it is as it will be made again
                continue
            steps.progress.offset = steps.metrics.sync()
            for into, some in ((params, job.it.params), (best, steps.best), (buffers, steps.buffers)):
                into |= {f"{name}/{n}": t for n, t in some.items()}
            moments |= steps.optimizer.state
            entries[name]["progress"] = vars(steps.progress)
        for name, result in self.results.items():
            if isinstance(result, Result):
                entries[name] = {"status": "done", "progress": vars(result.progress), "steps": result.steps,
                                 "trainable": result.trainable, "total": result.total}
            elif result.begun:                        # what was wrong at the start may be right the next time
                entries[name] = {"status": "failed", "reason": result.reason, "steps": result.step}
        keep = max((job.cfg.run.train.save_keep for job in self.jobs.values()), default=1)
        state = {"tick": self.now, "accounts": self.turns.accounts, "forward": self.forward, "keep": keep, "jobs": entries}
        self.saves += 1
        checkpoints.save(self.root, self.saves, params, SimpleNamespace(state=moments), state, keep, best, buffers)
        self._changed, self._saved_at = False, time.monotonic()


def _check(out: Path) -> None:
    """UserError for a folder of other things."""
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not any((out / name).exists() for name in TAKEN)):
        raise UserError(f"{out}: is not empty and holds no jobs; choose another --out")
