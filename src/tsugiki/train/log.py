"""What a run says while it works: metrics.jsonl, and a progress bar on stderr."""
from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class MetricsFile:
    """One JSON object a line. `offset` goes into checkpoints, so a resumed run cuts what came after and writes on."""

    def __init__(self, path: Path, offset: int = 0):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as f:
            f.truncate(min(offset, f.tell()))

    def write(self, **values) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(values) + "\n")

    def sync(self) -> int:
        """Force what is written to disk; the file's length in bytes."""
        with open(self.path, "ab") as f:
            os.fsync(f.fileno())
            return f.tell()

    def read(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def console() -> Console:
    """Everything for people goes to stderr; stdout is for results."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


class Bar:
    """A progress bar on a terminal; elsewhere a line every `every` seconds, so a log file stays readable."""

    def __init__(self, what: str, total: int, done: int = 0, quiet: bool = False, every: float = 20.0):
        self.what, self.total, self.quiet, self.every = what, total, quiet, every
        self.live = sys.stderr.isatty() and not quiet
        self.start = self.last = time.monotonic()
        self.first = done
        if self.live:
            self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                     TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TimeRemainingColumn(),
                                     console=console())
            self.task = self.progress.add_task(what, total=total, completed=done, note="")

    def __enter__(self) -> Bar:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *exc) -> None:
        if self.live:
            self.progress.stop()

    def update(self, done: int, note: str = "") -> None:
        if self.live:
            self.progress.update(self.task, completed=done, note=note)
            return
        now = time.monotonic()
        if not self.quiet and (now - self.last >= self.every or done == self.total):
            left = (now - self.start) / max(1, done - self.first) * (self.total - done)
            print(f"{self.what} {done}/{self.total} {note} {clock(left)} left", file=sys.stderr, flush=True)
            self.last = now


class Bars:
    """The progress of several jobs: a bar each on a terminal; elsewhere a line every `every` seconds."""

    def __init__(self, quiet: bool = False, every: float = 20.0):
        self.quiet, self.every, self.last = quiet, every, time.monotonic()
        self.tasks: dict[str, TaskID] = {}
        live = sys.stderr.isatty() and not quiet
        self.progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                                 console=console()) if live else None

    def __enter__(self) -> Bars:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *exc) -> None:
        if self.progress:
            self.progress.stop()

    def update(self, running: Mapping[str, tuple[int, int]]) -> None:
        """running: (steps done, all steps) by name; the bars of others go."""
        if self.progress:
            for name, (done, steps) in running.items():
                if name not in self.tasks:
                    self.tasks[name] = self.progress.add_task(name, total=steps)
                self.progress.update(self.tasks[name], completed=done)
            for name in [n for n in self.tasks if n not in running]:
                self.progress.remove_task(self.tasks.pop(name))
        elif not self.quiet and time.monotonic() - self.last >= self.every:
            print(", ".join(f"{name} {done}/{steps}" for name, (done, steps) in running.items()), file=sys.stderr, flush=True)
            self.last = time.monotonic()


def clock(seconds: float) -> str:
    """`4:05`, or `1:04:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
