"""The compiled passes over activations beside torch's, forward and backward, at real sizes.

    python benchmarks/passes.py [--tokens 2778] [--calls 15]

Both sides in turns on random numbers in bfloat16; medians in milliseconds, outputs and gradients compared. "torch": what a model of
transformers, or LoRA's formula, does otherwise. LoRA has rank 8, its linear's own product is not in it; the head's products are.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tsugiki.kernels import head, low_rank
from tsugiki.kernels.native import library, processor
from tsugiki.kernels.passes import Gated, RMSNorm, Rotary
from tsugiki.memory import keep_freed_memory

CLOSE = 0.02
WIDTH, INNER, HEADS, VOCABULARY = 576, 1536, 9, 49152     # SmolLM2-135M


def norm(x: Tensor, w: Tensor) -> Tensor:
    y = x.float()
    return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)


def plain_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    works, head._works = head._works, lambda: False
    try:
        return head.head_losses(hidden, weight, None, targets)
    finally:
        head._works = works


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def cases(tokens: int) -> list[tuple[str, Callable, Callable, list[Tensor]]]:
    """Name, compiled, torch's, and what both get; what has a gradient first."""
    angle = torch.randn(1, tokens, 32).repeat(1, 1, 2)
    cos, sin, targets = angle.cos().bfloat16(), angle.sin().bfloat16(), torch.randint(0, VOCABULARY, (tokens // 2,))
    found = [("RMS norm", lambda x, w: RMSNorm.apply(x, w.detach(), 1e-5, 0.0, True), lambda x, w: norm(x, w.detach()),
              [draw(1, tokens, WIDTH), draw(WIDTH)]),
             ("SiLU gate", lambda a, b: Gated.apply(a, b, False), lambda a, b: F.silu(a) * b,
              [draw(1, tokens, INNER), draw(1, tokens, INNER)]),
             ("rotary", lambda x: Rotary.apply(x, cos, sin), lambda x: rotated(x, cos, sin),
              [draw(1, tokens, HEADS, WIDTH // HEADS).transpose(1, 2)]),
             ("head and loss", lambda h, w: head.head_losses(h, w.detach(), None, targets),
              lambda h, w: plain_head(h, w.detach(), targets),
              [draw(tokens // 2, WIDTH) / WIDTH ** 0.5, draw(VOCABULARY, WIDTH)])]
    for n_in, n_out in ((WIDTH, WIDTH), (WIDTH, INNER), (INNER, WIDTH)) if low_rank.works() else ():
        found.append((f"LoRA, {n_in} to {n_out}", lambda x, y, a, b: low_rank.added(x, y, [low_rank.Span(0, tokens, a, b, 2.0)]),
                      lambda x, y, a, b: y + F.linear(F.linear(x, a.to(x.dtype)) * 2.0, b.to(x.dtype)),
                      [draw(1, tokens, n_in), draw(1, tokens, n_out), torch.randn(8, n_in) / n_in ** 0.5, torch.randn(n_out, 8)]))
    return found


def timed(side: Callable, given: Sequence[Tensor]) -> tuple[float, float, list[Tensor]]:
    leaves = [t.detach().requires_grad_() for t in given]
    began = time.perf_counter()
    out = side(*leaves)
    middle = time.perf_counter()
    found = torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
    return middle - began, time.perf_counter() - middle, [out.detach(), *(t for t in found if t is not None)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=2778)
    parser.add_argument("--calls", type=int, default=15)
    args = parser.parse_args()
    if library() is None:
        sys.exit("no gcc here, or a processor that does not multiply bfloat16: there is nothing compiled to measure")
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"{args.tokens} tokens, {torch.get_num_threads()} threads, {'AMX' if 'amx_bf16' in processor() else 'no AMX'}; ms, "
          "forward + backward")
    print("| pass | compiled | torch | times as fast |\n| --- | --- | --- | --- |")
    for name, ours, theirs, given in cases(args.tokens):
        times: dict[Callable, list[tuple[float, float]]] = {ours: [], theirs: []}
        for call in range(args.calls + 1):
            made = []
            for side, took in times.items():
                forward, backward, results = timed(side, given)
                made.append(results)
                took += [(forward, backward)] * (call > 0)
        assert all((a - b).norm() <= CLOSE * b.norm() for a, b in zip(*made, strict=True)), name
        fast, slow = ([statistics.median(t) * 1e3 for t in zip(*took, strict=True)] for took in times.values())
        cells = " | ".join(f"{forward:.2f} + {backward:.2f}" for forward, backward in (fast, slow))
        print(f"| {name} | {cells} | {sum(slow) / sum(fast):.1f} |", flush=True)


if __name__ == "__main__":
    main()
