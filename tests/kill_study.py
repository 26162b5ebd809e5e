"""Studies that are killed with SIGKILL at random moments and started again, from a process that has imported everything once.

Usage: kill_study.py FOLDER BASE ROWS STUDIES KILLS. Prints one JSON line: studies, kills, landed (kills that came in time),
identical (studies whose table is that of one that was never killed, and whose last runs two processes shared).
"""
from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)]

from tsugiki.compare import runner, study_of  # noqa: E402
from tsugiki.compare import worker as worker_module  # noqa: E402


class Forked:
    """What `runner` needs of a worker process, by a fork instead of a new interpreter."""

    def __init__(self):
        (child_in, ours_in), (ours_out, child_out) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(child_in, 0)
            os.dup2(child_out, 1)
            for fd in (child_in, ours_in, ours_out, child_out):
                os.close(fd)
            sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
            try:
                worker_module.main()
            finally:
                os._exit(0)
        os.close(child_in)
        os.close(child_out)
        self.stdin, self.stdout, self.code = os.fdopen(ours_in, "w"), os.fdopen(ours_out), None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


def study(out: Path, base: str, rows: str):
    return study_of({"out": str(out), "base": base, "methods": ["lora", {"name": "ia3"}], "rates": [0.03, 1e30],
                     "seeds": [0, 1], "curve_points": 3, "validation": 0.25, "general": [f"{rows}.txt"], "general_tokens": 64,
                     "data": {"files": [rows], "holdout": 0.3}, "eval": {"metric": "exact", "max_new_tokens": 3},
                     "train": {"steps": 8, "batch_size": 4, "dtype": "fp32", "save_steps": 2}})


def child(out: Path, base: str, rows: str) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setpgid(0, 0)                          # a group of its own: the compare, its worker, the run
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            runner.worker = Forked
            runner.compare(study(out, base, rows), quiet=True)
            code = 0
        finally:
            os._exit(code)
    return pid


def finish(out: Path, base: str, rows: str) -> float:
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child(out, base, rows), 0)[1]) == 0, f"the study in {out} failed"
    return time.monotonic() - began


def left(out: Path) -> dict:
    """All that must not depend on when a study was stopped: tables without what a clock or a memory meter said, trained files."""
    lines = [line.rsplit(",", 2)[0] for line in (out / "results.csv").read_text().splitlines()]
    found = {}
    for path in sorted((out / "results").rglob("*.json")):
        values = json.loads(path.read_text())
        for key in ("seconds", "memory"):
            values.pop(key, None)
        for point in values.get("curve", []):
            point.pop("seconds")
        found[str(path.relative_to(out))] = values
    kept = {str(p.relative_to(out)): p.read_bytes() for p in sorted((out / "runs").rglob("*.safetensors"))}
    return {"csv": lines, "results": found, "kept": kept}


def main(folder: Path, base: str, rows: str, studies: int, kills: int) -> None:
    rng = random.Random()
    total = finish(folder / "whole", base, rows)
    want = left(folder / "whole")
    found = {"studies": studies, "kills": 0, "landed": 0, "identical": 0, "seconds": round(total, 1)}
    for n in range(studies):
        out = folder / f"study-{n}"
        for k in range(kills):
            pid = child(out, base, rows)
            time.sleep(rng.random() * total * 0.2)
            if k % 2:
                os.kill(pid, signal.SIGKILL)          # the worker notices that its parent is gone
            else:
                try:
                    os.killpg(pid, signal.SIGKILL)    # all at once, as a power cut
                except ProcessLookupError:            # it has not made its group yet
                    os.kill(pid, signal.SIGKILL)
            found["kills"] += 1
            found["landed"] += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        both = [child(out, base, rows), child(out, base, rows)]
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in both] == [0, 0], f"the study in {out} failed"
        found["identical"] += left(out) == want
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
