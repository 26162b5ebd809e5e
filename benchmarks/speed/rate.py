"""The machine's matrix rate at a model's own shapes: `python -m speed.rate SHAPE TOKENS TRAINED METHOD DEVICE`."""
from __future__ import annotations

import json
import statistics
import sys
import time

from speed.shapes import linears


def rate(shape: str, tokens: int, trained: int, full: bool, device: str, runs: int = 5) -> dict:
    """TFLOP/s of F.linear in bf16, forward and dX (and dW when all is trained), on random data, weighted by FLOPs.

    tokens: rows M of the layers' matrices; trained: of the head's.
    """
    import torch
    import torch.nn.functional as F

    def seconds(work) -> float:
        found = []
        for _ in range(runs + 1):
            began = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
        return statistics.median(found[1:])

    each, done, took = {}, 0.0, 0.0
    torch.manual_seed(0)
    with torch.no_grad():
        for name, n, k, times in linears(shape):
            m = trained if name == "head" else tokens
            x, w, dy = (torch.randn(*size, dtype=torch.bfloat16, device=device) for size in ((m, k), (n, k), (m, n)))
            spent = seconds(lambda x=x, w=w: F.linear(x, w)) + seconds(lambda dy=dy, w=w: dy @ w)
            spent += seconds(lambda dy=dy, x=x: dy.T @ x) if full else 0.0
            work = (6.0 if full else 4.0) * m * n * k
            each[f"{name} {n}x{k}, M={m}"] = work / spent / 1e12
            done, took = done + times * work, took + times * spent
    return {"tflops": done / took / 1e12, "each": each}


if __name__ == "__main__":
    shape, tokens, trained, method, device = sys.argv[1:]
    print(json.dumps(rate(shape, int(tokens), int(trained), method == "full", device)))
