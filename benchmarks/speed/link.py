"""How sides take turns: each is a process that blocks until it is told to do one optimizer step, then says what it measured."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path


def memory() -> dict[str, float]:
    """GB of this process: resident now, and the peak since it began or since `forget_peak`."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {"now": int(lines["VmRSS"].split()[0]) / 1e6, "peak": int(lines["VmHWM"].split()[0]) / 1e6}
    except (OSError, KeyError):                       # not Linux: the peak alone, in bytes there
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
        return {"now": peak, "peak": peak}


class Link:
    """The side's end. stdout is for measurements; what libraries print there goes to stderr, the side's log."""

    def __init__(self, device: str):
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.device, self.base, self.top, self.began = device, memory()["now"], 0.0, 0.0

    def tell(self, **values) -> None:
        self.out.write(json.dumps(values) + "\n")

    def wait(self) -> None:
        """Block until the parent says "step"; with anything else, end the process."""
        line = sys.stdin.readline().strip()
        if line == "forget":                          # warm-up is over: from here on the peak is that of steps
            self.top = memory()["peak"]
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:
                pass
            line = sys.stdin.readline().strip()
        if line != "step":
            steps = memory()["peak"]
            told = {"base_gb": self.base, "steps_gb": steps, "peak_gb": max(self.top, steps)}
            if self.device == "cuda":
                import torch
                told["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
            self.tell(**told)
            os._exit(0)                               # no last checkpoint, no summary: nobody waits for them
        self.began = time.perf_counter()

    def took(self) -> float:
        if self.device == "cuda":
            import torch
            torch.cuda.synchronize()
        return time.perf_counter() - self.began


class Side:
    """The parent's end of one side."""

    def __init__(self, name: str, command: list[str], log: Path, env: dict):
        self.name, self.log, began = name, log, time.perf_counter()
        with open(log, "w") as f:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=f, text=True, env=env)
        self.about = self._read()
        self.load = time.perf_counter() - began

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            told = [x.strip() for x in self.log.read_text(errors="replace").splitlines() if x.strip()]
            named = [x for x in told if re.match(r"[\w.]*(Error|Exception|Killed)\b", x)] or told or ["it said nothing"]
            raise RuntimeError(f"{self.name} ended with {code}: {named[-1]} ({self.log})")
        return json.loads(line)

    def step(self) -> dict:
        """Seconds, real tokens, trained tokens, loss and gradient norm of one optimizer step."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._read()

    def forget(self) -> None:
        self.process.stdin.write("forget\n")
        self.process.stdin.flush()

    def stop(self) -> dict:
        """End it; its memory."""
        self.process.stdin.write("stop\n")
        self.process.stdin.flush()
        told = self._read()
        self.process.wait()
        return told

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
