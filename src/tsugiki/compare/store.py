"""A study's folder: results by cell, locks that a dead process cannot hold, and what the study is."""
from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from tsugiki.compare.study import Cell, Study
from tsugiki.errors import UserError

try:
    import fcntl
except ImportError:                                   # no POSIX: a study there is one process's
    fcntl = None

DONE, BUSY, STOPPED = 0, 3, 4                         # how a run's process ends; BUSY: another process has this run
FIXED = ("run", "datasets", "validation", "validation_rows", "data_seed", "general", "general_tokens", "curve_points", "select")


class Store:
    """The folder. Only whole files are ever seen: each is written under a temporary name and renamed."""

    def __init__(self, out: str | Path):
        self.out = Path(out)
        self.read: dict[Path, tuple[int, dict]] = {}      # by path: when it was written, what it says

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def result_path(self, key: str) -> Path:
        return self.out / "results" / f"{key}.json"

    def result(self, key: str) -> dict | None:
        path = self.result_path(key)
        try:
            written = path.stat().st_mtime_ns
            if self.read.get(path, (0, {}))[0] != written:
                self.read[path] = written, json.loads(path.read_text(encoding="utf-8"))
            return dict(self.read[path][1])
        except (OSError, ValueError):
            return None

    def put(self, cell: Cell, result: Mapping) -> None:
        self.write(self.result_path(cell.key), json.dumps(result | {"cell": cell.plain()}, indent=1) + "\n")

    def results(self) -> dict[str, dict]:
        """Every result, by key."""
        root = self.out / "results"
        found = {}
        for path in sorted(root.rglob("*.json")):
            key = path.relative_to(root).as_posix().removesuffix(".json")
            if not path.name.startswith(".") and (result := self.result(key)) is not None:
                found[key] = result
        return found

    def forget_failures(self) -> int:
        """Delete the results of failed runs, so that they are tried again; how many."""
        failed = [key for key, result in self.results().items() if "failed" in result]
        for key in failed:
            self.result_path(key).unlink(missing_ok=True)
        return len(failed)

    @contextmanager
    def lock(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Whether it is ours."""
        with locked(self.out / "locks" / f"{name.replace('/', '--')}.lock", wait) as ours:
            yield ours

    def claim(self, study: Study, prints: Mapping[str, str]) -> None:
        """Write study.yaml. A study found there may have other methods, rates and seeds, but the same base, rows and training."""
        path = self.out / "study.yaml"
        now = study.plain() | {"rows_sha256": dict(prints)}
        if path.exists():
            try:
                old = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, ValueError):
                old = None
            if not isinstance(old, dict):
                raise UserError(f"{path}: is damaged, so what this study was is not known; choose another --out or "
                                "delete the folder")
            for key in FIXED:
                if difference := _difference(old.get(key), now[key], key):
                    raise UserError(f"{self.out}: holds another study ({difference}); choose another --out or delete it")
            for name, sha in prints.items():
                if old.get("rows_sha256", {}).get(name, sha) != sha:
                    raise UserError(f"{self.out}: holds another study (the rows of {name} are others than there); "
                                    "choose another --out or delete it")
        elif self.out.exists() and any(p.name != "locks" and not p.name.startswith(".") for p in self.out.iterdir()):
            raise UserError(f"{self.out}: is not empty and holds no study; choose another --out")
        self.write(path, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[bool]:
    """Holds a lock file; yields False at once when another process holds it and `wait` is off. A process that dies gives its
    locks back. Where the system has no such locks, everything is ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        if fcntl is not None:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
        yield True


def _difference(old, new, where: str) -> str:
    """The first key in which two nested values differ, with both; data sets may be added."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in new if k in old or where != "datasets"] + [k for k in old if k not in new and where != "datasets"]
        return next((d for k in keys if (d := _difference(old.get(k), new.get(k), f"{where}.{k}"))), "")
    return "" if old == new else f"{where.removeprefix('run.')} is {old!r} there, {new!r} here"
