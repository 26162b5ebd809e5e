"""Attention of one new token a row: the two batched products of kernels/one_token.py beside torch's kernel.

    python benchmarks/one_token.py

Keys lie as each side's cache keeps them. Medians of 50 calls in turns, microseconds.
"""
from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from tsugiki.kernels.one_token import FASTER, SMALLEST, one_token

CALLS = 50
SHAPES = [(32, 9, 3, 64), (32, 12, 12, 64), (32, 8, 8, 32), (8, 32, 8, 64), (1, 9, 3, 64)]       # rows, heads, key heads, width


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    print("| dtype | rows, heads, key heads, width | tokens before | torch | here | times as fast | used |\n" + "|---" * 7 + "|")
    for dtype in (torch.bfloat16, torch.float32):
        for rows, heads, kv, width in SHAPES:
            for length in (100, 300):
                q = torch.randn(rows, heads, 1, width).to(dtype)
                k, v = (torch.randn(rows, kv, length, width).to(dtype) for _ in range(2))
                turned = k.transpose(2, 3).contiguous().transpose(2, 3)
                sides = (lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                         lambda q=q, k=turned, v=v: one_token(q, k, v, None, q.shape[-1] ** -0.5))
                assert float((sides[0]().transpose(1, 2) - sides[1]()).abs().max()) < 0.02
                times: list[list[float]] = [[], []]
                for _ in range(CALLS):
                    for side, found in zip(sides, times, strict=True):
                        began = time.perf_counter()
                        side()
                        found.append(time.perf_counter() - began)
                used = rows * heads * length >= SMALLEST and dtype in FASTER
                theirs, ours = (statistics.median(t) * 1e6 for t in times)
                print(f"| {str(dtype)[6:]} | {rows}, {heads}, {kv}, {width} | {length} | {theirs:.0f} | {ours:.0f} | "
                      f"{theirs / ours:.1f} | {'yes' if used else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
