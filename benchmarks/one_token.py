"""Attention of one new token a row: kernels/one_token.py beside torch's kernel.

    python benchmarks/one_token.py

Twenty layers' caches in turn, as in decoding, so that keys and values come from memory. Medians of nine rounds in turns,
microseconds a call.
"""
from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from tsugiki.kernels.one_token import one_token, takes

LAYERS, ROUNDS = 20, 9
SHAPES = [(32, 9, 3, 64), (32, 12, 12, 64), (32, 8, 8, 32), (8, 32, 8, 64), (1, 9, 3, 64)]       # rows, heads, key heads, width


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    print("| rows, heads, key heads, width | tokens before | torch | here | times as fast |\n" + "|---" * 5 + "|")
    for rows, heads, kv, width in SHAPES:
        for length in (100, 300):
            q = torch.randn(rows, heads, 1, width).bfloat16()
            caches = [[torch.randn(rows, kv, length, width).bfloat16() for _ in range(2)] for _ in range(LAYERS)]
            scale = width ** -0.5
            sides = (lambda k, v, q=q: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                     lambda k, v, q=q, scale=scale: one_token(q, k, v, None, scale))
            if not takes(q, *caches[0], None):
                raise SystemExit("the kernel cannot be built on this machine, or does not take these shapes")
            assert float((sides[0](*caches[0]).transpose(1, 2) - sides[1](*caches[0])).abs().max()) < 0.02
            times: list[list[float]] = [[], []]
            for _ in range(ROUNDS):
                for side, found in zip(sides, times, strict=True):
                    began = time.perf_counter()
                    for k, v in caches:
                        side(k, v)
                    found.append((time.perf_counter() - began) / LAYERS)
            theirs, ours = (statistics.median(t) * 1e6 for t in times)
            print(f"| {rows}, {heads}, {kv}, {width} | {length} | {theirs:.0f} | {ours:.0f} | {theirs / ours:.1f} |", flush=True)


if __name__ == "__main__":
    main()
