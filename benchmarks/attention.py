"""Attention by document, forward and backward: the compiled kernel, the batched products it stands for, and torch's own.

    python benchmarks/attention.py [--calls 9]

Sixteen documents laid end to end, bfloat16, at the heads of one layer; torch's kernel takes them one by one. In turns, medians
in milliseconds; outputs and gradients are compared. "times as fast": compiled over products; a dash where there is none.
"""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from tsugiki.kernels import documents as kernel
from tsugiki.kernels.attention import documents
from tsugiki.kernels.native import processor

SHAPES = [(9, 3, 64), (14, 2, 64), (32, 8, 64)]        # heads, key heads, width: SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B
LENGTHS = (64, 174, 512)                               # tokens of a document on average; they vary by half of it
DOCUMENTS = 16
CLOSE = 0.02


def torchs(q, k, v, lengths: list[int]) -> torch.Tensor:
    parts = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*p, is_causal=True, enable_gqa=True) for p in parts], 2).transpose(1, 2)


def timed(side: Callable, given: list[torch.Tensor], grad: torch.Tensor) -> tuple[float, float, list[torch.Tensor]]:
    """(seconds forward, seconds backward, output and gradients)"""
    began = time.perf_counter()
    out = side(*given)
    middle = time.perf_counter()
    grads = torch.autograd.grad(out, given, grad)
    return middle - began, time.perf_counter() - middle, [out.detach(), *grads]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=9)
    args = parser.parse_args()
    compiled = kernel.works()
    print(f"{torch.get_num_threads()} threads, {'AMX' if 'amx_bf16' in processor() else 'no AMX'}; forward + backward, ms")
    print("| heads, key heads, width | tokens a document | compiled | products | torch | times as fast |\n" + "|---" * 6 + "|")
    g = torch.Generator().manual_seed(0)
    for heads, kv, width in SHAPES:
        for length in LENGTHS:
            lengths = torch.randint(length // 2, length * 3 // 2, (DOCUMENTS,), generator=g).tolist()
            ends, tokens = torch.tensor([0, *lengths]).cumsum(0).int(), sum(lengths)
            given = [torch.randn(1, tokens, h, width, generator=g).bfloat16().transpose(1, 2).requires_grad_()
                     for h in (heads, kv, kv)]
            grad = torch.randn(1, tokens, heads, width, generator=g).bfloat16()

            def by_document(q, k, v, ends=ends):
                return documents(q, k, v, ends, q.shape[-1] ** -0.5)
            sides = {"products": (by_document, False), "torch": (lambda *t, n=lengths: torchs(*t, n), False)}
            sides = ({"compiled": (by_document, True)} if compiled else {}) | sides
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
            for call in range(args.calls + 1):
                found = {}
                for name, (side, there) in sides.items():
                    kernel.works = lambda there=there: there       # what `documents` asks
                    forward, backward, found[name] = timed(side, given, grad)
                    times[name] += [(forward, backward)] * (call > 0)
            for made in found.values():
                assert all((a - b).norm() <= CLOSE * b.norm() for a, b in zip(made, found["torch"], strict=True))
            shown = {name: [statistics.median(t) * 1e3 for t in zip(*ts, strict=True)] for name, ts in times.items()}
            cells = [" + ".join(f"{t:.1f}" for t in shown[n]) if n in shown else "-" for n in ("compiled", "products", "torch")]
            gain = f"{sum(shown['products']) / sum(shown['compiled']):.1f}" if compiled else "-"
            print(f"| {heads}, {kv}, {width} | {length} | {' | '.join(cells)} | {gain} |", flush=True)


if __name__ == "__main__":
    main()
