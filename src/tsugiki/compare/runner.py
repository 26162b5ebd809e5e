"""A study from its first run to its report: a worker process is given one cell after another; whatever stops, it goes on."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tsugiki.compare.output import write_all
from tsugiki.compare.planning import Planned, planned
from tsugiki.compare.rows import Parts, read_parts
from tsugiki.compare.schedule import choice, done, expected, finals, pending
from tsugiki.compare.sizes import in_budget
from tsugiki.compare.store import BUSY, DONE, STOPPED, Store
from tsugiki.compare.study import Cell, Study
from tsugiki.compare.table import Table, tabled
from tsugiki.errors import RunError, UserError
from tsugiki.load import base_path
from tsugiki.train.log import clock, console

WAIT = 1.0                                            # seconds between two looks at a run that another process has
AGAIN = 1                                             # times that a run is tried again when a signal killed it


class Stopped(RunError):
    """Ctrl-C or SIGTERM; what is finished is kept."""

    code = 130


@dataclass(frozen=True)
class Outcome:
    """A finished study: its table, and the files."""
    table: Table
    out: Path

    def plain(self) -> dict:
        return self.table.plain() | {"out": str(self.out), "report": str(self.out / "report.html"),
                                     "csv": str(self.out / "results.csv"), "markdown": str(self.out / "results.md")}


def prepare(study: Study, say: Callable[[str], None], save: bool = True,
            rehearse: bool = True) -> tuple[Study, dict[str, Parts], Planned]:
    """Read and check everything, and plan: (the study with its sizes, the rows, the plan). Raises UserError."""
    if not study.out:
        raise UserError("out: missing; give --out DIR, the folder of the study")
    if not hasattr(os, "fork"):
        raise UserError("compare: forks a process for every run, which this system cannot (Linux and macOS can)")
    base_path(study.run.get("base", "embedded"))
    for path in study.general:
        if not Path(path).is_file():
            raise UserError(f"general: no file {path}")
    study = in_budget(study)
    parts = {}
    for name in study.names():
        parts[name] = read_parts(study, name, lambda line, name=name: say(f"{name}: {line}"))
        for what, rows in (("to train on", parts[name].train), ("of validation", parts[name].validation),
                           ("of test", parts[name].test)):
            if not rows:
                raise UserError(f"data: {name} has no rows {what}; give more rows, or files (data.eval, validation)")
    store = Store(study.out)
    if save:
        store.claim(study, {name: p.fingerprint for name, p in parts.items()})
    return study, parts, planned(study, parts, store.results(), rehearse)


def compare(study: Study, *, quiet: bool = False, retry: bool = False, say: Callable[[str], None] | None = None,
            show: Callable[[Planned, dict], None] | None = None) -> Outcome:
    """Run what is missing of a study in study.out, then write its table and report.

    Several processes may be given the same folder: they share the runs. retry: runs that failed are made again.
    show: called with the plan before the first run. Raises UserError for what cannot be started, Stopped after Ctrl-C.
    """
    say = say or (lambda line: None if quiet else console().print(line, markup=False))
    study, parts, plan = prepare(study, say, rehearse=not quiet)
    store = Store(study.out)
    if retry and (count := store.forget_failures()):
        say(f"{count} failed runs are made again")
    if show:
        show(plan, store.results())
    work = Work(study, store, plan, say)
    try:
        work.all()
    except KeyboardInterrupt:
        left = len(expected(study, store.results(), plan.lengths))
        write_all(store, tabled(study, store.results(), plan.lengths), study, parts)
        raise Stopped(f"{len(store.results())} runs are kept in {store.out}, about {left} are left; the same command goes on "
                      "from here") from None
    finally:
        work.close()
    tidy(study, store, plan)
    table = tabled(study, store.results(), plan.lengths)
    write_all(store, table, study, parts)
    return Outcome(table, store.out)


def worker() -> subprocess.Popen:
    """A new worker process: tsugiki.compare.worker. Ctrl-C is not for it: the run in its child saves itself, and it waits."""
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if ours else None       # inherited, also while it imports
    try:
        return subprocess.Popen([sys.executable, "-m", "tsugiki.compare.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


class Work:
    """The worker process and the cells that are left."""

    def __init__(self, study: Study, store: Store, plan: Planned, say: Callable[[str], None]):
        self.study, self.store, self.plan, self.say = study, store, plan, say
        self.server: subprocess.Popen | None = None
        self.killed: dict[str, int] = {}

    def all(self) -> None:
        """Until nothing is pending. A cell that another process has is passed over, and waited for at the end."""
        waiting = False
        while cells := pending(self.study, self.store.results(), self.plan.lengths):
            for cell in cells:
                if (code := self.one(cell)) != BUSY:
                    waiting = False
                    self.told(cell, code)
                    break
            else:
                if not waiting:
                    self.say(f"waiting for {len(cells)} runs that another process has")
                waiting = True
                time.sleep(WAIT)

    def one(self, cell: Cell) -> int:
        """Have the worker run a cell; its exit code. A run that a signal killed is tried again, then it is a failure."""
        with self.store.lock(cell.key) as free:
            if not free:
                return BUSY
        began = time.monotonic()
        code = self.asked(cell)
        if code == BUSY:
            return code
        if code == STOPPED:
            raise KeyboardInterrupt
        if code == DONE:
            self._note_wall(cell, time.monotonic() - began)
            return code
        self.killed[cell.key] = self.killed.get(cell.key, 0) + 1
        why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"the worker ended with code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else f"; see logs/{cell.key}.log"
        if self.killed[cell.key] <= AGAIN:
            self.say(f"{named(cell)}: {why}{hint}; once more")
        else:
            self.store.put(cell, {"failed": f"{why}{hint}"})
        return code

    def _note_wall(self, cell: Cell, took: float) -> None:
        """How long all of a run took, for the estimates; a run that was resumed says too little and is not noted."""
        path = self.store.out / "walls" / f"{cell.key}.json"
        if not path.exists():
            self.store.write(path, json.dumps(round(took, 2)))

    def asked(self, cell: Cell) -> int:
        """The worker's answer; that of a dead worker is its own exit code."""
        if self.server is None or self.server.poll() is not None:
            self.server = worker()
            self._tell(json.dumps(self.study.plain()))
        self._tell(json.dumps(cell.plain()))
        try:
            answer = self.server.stdout.readline()
        except KeyboardInterrupt:
            self.server.stdout.readline()             # the run saves itself; a second Ctrl-C does not wait for that
            raise
        if not answer:
            return self.server.wait() or 1
        return json.loads(answer)["code"]

    def _tell(self, line: str) -> None:
        try:
            self.server.stdin.write(line + "\n")
            self.server.stdin.flush()
        except BrokenPipeError:                       # it is dead: reading its answer says so
            pass

    def told(self, cell: Cell, code: int) -> None:
        """A line for a finished run: its place, its score, the time left."""
        results = walled(self.store)
        result, left = results.get(cell.key), expected(self.study, results, self.plan.lengths)
        if result is None or code != DONE and "failed" not in result:
            return
        time_left = f"about {clock(self.plan.left(left, results))} left" if left else "the last one"
        self.say(f"[{len(results)}/{len(results) + len(left)}] {named(cell)}: {summary(result)}; {time_left}")

    def close(self) -> None:
        """End the worker; a run in progress saves itself."""
        if self.server is None:
            return
        try:
            self.server.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.server.wait(60)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self.server.terminate()
        self.server.stdout.close()


def walled(store: Store) -> dict[str, dict]:
    """The results with the seconds their processes took, where known."""
    found = store.results()
    for key, result in found.items():
        try:
            result["wall"] = float(json.loads((store.out / "walls" / f"{key}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            pass
    return found


def named(cell: Cell) -> str:
    if not cell.steps:
        return f"{cell.data}, the base alone"
    return f"{cell.data}, {cell.variant.label}, rate {cell.lr:g}, seed {cell.seed}, {cell.steps} steps"


def summary(result: Mapping) -> str:
    """`validation loss 0.412, accuracy 0.81, 14 s`."""
    if "failed" in result:
        return f"failed: {result['failed']}"
    parts = []
    if "validation" in result:
        parts.append(f"validation loss {result['validation']['loss']:.4f}")
    if "test" in result:
        test = result["test"]
        parts.append(f"test {test['metric']} {test[test['metric']]:.4g}")
    return ", ".join([*parts, *([f"{result['seconds']:.0f} s"] if "seconds" in result else [])])


def tidy(study: Study, store: Store, plan: Planned) -> None:
    """Of finished methods, take away checkpoints, and the weights of rates that were not chosen: no run needs them again."""
    results = store.results()
    for data in study.names():
        for variant in study.variants():
            chosen = choice(study, data, variant, results, plan.lengths)
            if chosen.missing:
                continue
            last = finals(study, data, variant, chosen.lr, plan.lengths) if chosen.lr is not None else []
            if not all(done(c, results) for c in last):
                continue
            for cell in {c.key: c for c in (*chosen.tried, *last)}.values():
                names = ["checkpoints"] if cell.key in {c.key for c in last} else ["checkpoints", "adapter", "model"]
                with store.lock(cell.key) as mine:
                    for name in names if mine else []:
                        shutil.rmtree(store.out / "runs" / cell.key / name, ignore_errors=True)
