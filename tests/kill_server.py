"""A fork server: imports once, then trains in forked children that it kills with SIGKILL, and compares what they leave.

Usage: kill_server.py FOLDER RUNS [joint]. Makes RUNS runs, and more while there are fewer than two kills a run, for a kill may
come after the end. Prints one JSON line: runs, kills, in_saves (kills inside a save), identical.
"""
from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "src"), str(Path(__file__).parent)]

import joint_kit  # noqa: E402
from kit import config, go, llama  # noqa: E402
from kit import left as left_by_one  # noqa: E402

from tsugiki.train import checkpoint  # noqa: E402

SETTINGS = {"method": "lora+dropout", "steps": 16, "save_steps": 1, "save_keep": 2, "batch_size": 4}


def train(out: Path, pipe: int) -> None:
    """In a child: the run, with a byte on the pipe as each save starts and ends."""
    plain = checkpoint.save

    def save(*args, **kwargs):
        os.write(pipe, b"[")
        plain(*args, **kwargs)
        os.write(pipe, b"]")
    checkpoint.save = save
    if JOINT:
        joint_kit.joint(joint_kit.draw(7, out, most=3), at=lambda made: time.sleep(0.02), base=MODEL)
    else:
        go(config(out, **SETTINGS), MODEL)


def left(out: Path) -> dict:
    return {p.name: left_by_one(p) for p in (out / "out").glob("job*")} if JOINT else left_by_one(out)


def child(out: Path) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            train(out, write)
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    os.close(write)
    return pid, read


def finish(out: Path) -> tuple[float, float]:
    """Run to the end; (seconds in all, seconds of one save)."""
    began = time.monotonic()
    pid, read = child(out)
    stamps = []
    while os.read(read, 1):
        stamps.append(time.monotonic())
    os.close(read)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, f"the run in {out} failed"
    saves = [b - a for a, b in zip(stamps[::2], stamps[1::2], strict=False)]
    return time.monotonic() - began, sum(saves) / max(len(saves), 1)


def kill_once(out: Path, rng: random.Random, aimed: bool, total: float, save: float) -> str:
    """Start a child and kill it: somewhere, or inside one of its saves. "done" when it was faster."""
    pid, read = child(out)
    seen = b""
    if aimed:
        for _ in range(rng.randint(1, 5)):
            while (byte := os.read(read, 1)) and byte != b"[":
                pass
            seen = byte
        time.sleep(rng.random() * save)
    else:
        time.sleep(rng.random() * total)
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    while chunk := os.read(read, 4096):
        seen += chunk
    os.close(read)
    return "done" if code == 0 else "in a save" if seen.endswith(b"[") else "between saves"


def names(out: Path) -> list[str]:
    """Everything in a run's folder: nothing half made may be left."""
    return sorted(str(p.relative_to(out)) for p in out.rglob("*"))


def main(folder: Path, runs: int) -> None:
    rng = random.Random()
    total, save = finish(folder / "whole")
    want = left(folder / "whole")
    found = {"runs": 0, "kills": 0, "in_saves": 0, "identical": 0, "seconds": round(total, 2), "save": round(save, 4)}
    while (n := found["runs"]) < runs or n < 4 * runs and found["kills"] < 2 * runs:
        found["runs"] += 1
        out = folder / f"run-{n}"
        for k in range(rng.randint(3, 6)):
            how = kill_once(out, rng, (n + k) % 2 == 0, total, save)
            found["kills"] += how != "done"
            found["in_saves"] += how == "in a save"
            if how == "done":
                break
        finish(out)
        found["identical"] += left(out) == want and names(out) == names(folder / "whole")
    print(json.dumps(found))


if __name__ == "__main__":
    JOINT = "joint" in sys.argv[3:]
    MODEL = joint_kit.model() if JOINT else llama()
    main(Path(sys.argv[1]), int(sys.argv[2]))
