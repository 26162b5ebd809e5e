"""y + s B (A x) of thin A and B, of one adapter or several, each on its tokens, in one function that reads every activation once,
forward and backward: low_rank.c.

Its plain twin is LoRA's own formula; it serves where this does not.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tsugiki.kernels.native import close, library, processor, run

MOST = 64                     # rank: beyond, matrix products are as quick
LARGE = 1 << 18               # products of a decoding step from which threads pay
BLOCK = 32                    # widths are multiples of it
FEW = 256                     # tokens: below, preparing the factors costs more than is gained


@dataclass(frozen=True)
class Span:
    """The tokens that have these factors: a (r, in), b (out, r)."""
    start: int
    stop: int
    a: Tensor
    b: Tensor
    scale: float

    @property
    def fits(self) -> bool:
        """Whether `added` computes it, and it has so many tokens that it pays."""
        return self.stop - self.start >= FEW and self.a.dtype is self.b.dtype is torch.float32 and len(self.a) <= MOST


def takes(x: Tensor, y: Tensor) -> bool:
    """Whether `added` computes on these. x (..., in), y (..., out)."""
    return x.dtype is y.dtype is torch.bfloat16 and x.device.type == "cpu" and x.shape[-1] % BLOCK == y.shape[-1] % BLOCK == 0 \
        and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode() and works()     # a rehearsal counts products


def added(x: Tensor, y: Tensor, spans: Sequence[Span], weight: Tensor | None = None) -> Tensor:
    """y, and at each span's tokens y + scale * b (a x); in bfloat16, with a, b and a x rounded to it before a product, as in its
    twin; sums are float32. Tokens are counted over all dimensions but the last; spans do not overlap.

    weight (out, in): y is x weight^T, perhaps with a constant, and has no gradient of its own: that of x is found here, in one.
    """
    return Added.apply(x, y, weight, [(s.start, s.stop, s.scale) for s in spans], *(t for s in spans for t in (s.a, s.b)))


class Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, weight: Tensor | None, spans: list[tuple[int, int, float]], *factors: Tensor) -> Tensor:
        x, y, factors, ctx.spans = x.contiguous(), y.contiguous(), [t.contiguous() for t in factors], spans
        whole = spans[0][:2] == (0, y.numel() // y.shape[-1])
        out = torch.empty_like(y) if whole else y.clone()
        for start, stop, scale, a, b in _each(spans, factors):
            x_, y_, out_ = (t.view(-1, t.shape[-1])[start:stop] for t in (x, y, out))
            _checked(run("low_rank_forward", x_, y_, a, b, out_, *_sizes(x_, a, b, scale)))
        ctx.save_for_backward(x, weight, *factors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, *factors = ctx.saved_tensors
        g, dx, found = grad.contiguous(), None, []
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x) if weight is None else g @ weight        # tokens of no span have no change
        for start, stop, scale, a, b in _each(ctx.spans, factors):
            g_, x_, dx_ = (t if t is None else t.view(-1, t.shape[-1])[start:stop] for t in (g, x, dx))
            da, db = (torch.zeros(torch.get_num_threads(), -(-len(a) // 16) * 16, n) for n in (a.shape[1], b.shape[0]))
            _checked(run("low_rank_backward", g_, x_, a, b, dx_, da, db, int(weight is not None), *_sizes(x_, a, b, scale)))
            found += [da[:, :len(a)].sum(0), db[:, :len(a)].sum(0).t()]
        return dx, grad if ctx.needs_input_grad[1] else None, None, None, *found


def _each(spans: list[tuple[int, int, float]], factors: Sequence[Tensor]) -> Iterator[tuple]:
    for n, span in enumerate(spans):
        yield *span, *factors[2 * n:2 * n + 2]


def takes_own(x: Tensor, y: Tensor, rank: int) -> bool:
    """Whether `own` computes this. x (B, 1, in), y (B, 1, out)."""
    return x.dtype is y.dtype is torch.bfloat16 and rank <= MOST and x.shape[-1] % BLOCK == y.shape[-1] % BLOCK == 0 \
        and x.is_cpu and library() is not None


def own(x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: Tensor, place: Tensor, rank: int) -> Tensor:
    """Each row changed by its own factors, y + (scale * (a x)) b: rows place * rank up to (place + 1) * rank of all three.

    x (B, 1, in), y (B, 1, out), a (n * rank, in), b (n * rank, out), scale (n * rank,), all bfloat16 and contiguous but x and y;
    place (B,) int64, below 0: the row stays. What is not finite in a row's factors reaches no other row.
    """
    x, y = x.contiguous(), y.contiguous()
    out, threads = torch.empty_like(y), torch.get_num_threads() if x.numel() * rank > LARGE else 1
    run("own_low_rank", x, y, a, b, scale, place, out, len(x), x.shape[-1], y.shape[-1], rank, threads)
    return out


def _sizes(x: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple:
    return x.numel() // a.shape[1], a.shape[1], len(b), len(a), float(scale), torch.get_num_threads()


def _checked(failed: int) -> None:
    if failed:
        raise MemoryError("not enough memory for a low-rank product")


@cache
@torch.inference_mode(False)
def works() -> bool:
    """Whether the kernel is there, with AMX (without, torch's products are as quick), and what it makes of small numbers, forward
    and backward, is as in float32."""
    if library() is None or "amx_bf16" not in processor():
        return False
    g = torch.Generator().manual_seed(0)
    x, y, grad = (torch.randn(70, n, generator=g).bfloat16() for n in (96, 32, 32))
    a, b = torch.randn(3, 96, generator=g), torch.randn(32, 3, generator=g)
    with torch.enable_grad():
        leaves = [t.clone().requires_grad_() for t in (x, y, a, b)]
        made = added(*leaves[:2], [Span(0, 70, *leaves[2:], 0.5)])
        found = torch.autograd.grad(made, leaves, grad)
    x, y, grad = x.float(), y.float(), grad.float()
    wanted = y + 0.5 * x @ a.t() @ b.t(), 0.5 * grad @ b @ a, grad, 0.5 * (grad @ b).t() @ x, 0.5 * grad.t() @ (x @ a.t())
    return all(close(m.detach(), w) for m, w in zip((made, *found), wanted, strict=True))
