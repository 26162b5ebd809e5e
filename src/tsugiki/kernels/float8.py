"""Products of frozen linears in float8, on a GPU that multiplies it, at up to twice the rate of bfloat16.

Everything is e4m3 (Micikevicius et al. 2022, arXiv:2209.05433): a weight is rounded once, activations and gradients at every
product; sums are float32. Each row has the scale of its largest number, so no row of a batch changes another. The weight's own
gradient is never asked for: it is frozen.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KIND = torch.float8_e4m3fn
MOST = torch.finfo(KIND).max
BLOCK = 16                                            # widths are multiples of it
SMALLEST = 1 << 18                                    # weights of a linear from which the product outweighs the rounding


def rounded(t: Tensor) -> tuple[Tensor, Tensor]:
    """(t (R, C) in e4m3, the scale of each row, (R, 1) float32). A row that is not finite stays so."""
    scale = t.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / MOST
    return (t.float() / scale).clamp(-MOST, MOST).to(KIND), scale


def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x (M, C) in bfloat16 times the transpose of a rounded weight (R, C) with its scales (R, 1): (M, R) bfloat16."""
    low, by = rounded(x)
    return torch._scaled_mm(low, weight.t(), scale_a=by, scale_b=scale.t(), out_dtype=x.dtype)


class Product(torch.autograd.Function):
    """x (M, in) w^T; forward and backward each have a copy of w rounded along its own rows."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, turned: Tensor, turned_scale: Tensor) -> Tensor:
        ctx.save_for_backward(turned, turned_scale)
        return product(x, weight, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return product(grad.contiguous(), *ctx.saved_tensors), None, None, None, None


class Float8(nn.Linear):
    """A frozen linear while a run lasts: its class is this one, and everything else its own."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.bfloat16:
            return F.linear(x, self.weight, self.bias)
        y = Product.apply(x.reshape(-1, x.shape[-1]), self.low, self.low_scale, self.turned, self.turned_scale)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias


@contextmanager
def in_float8(layers: Sequence[nn.Module]) -> Iterator[int]:
    """Inside, frozen bfloat16 linears of these layers multiply in float8; yields how many. Copies take as much memory as these."""
    linears = [m for layer in layers for m in layer.modules() if _fits(m)]
    try:
        with torch.no_grad():
            for linear in linears:
                linear.low, linear.low_scale = rounded(linear.weight)
                linear.turned, linear.turned_scale = rounded(linear.weight.t().contiguous())
                linear.__class__ = Float8
        yield len(linears)
    finally:
        for linear in linears:
            linear.__class__ = nn.Linear
            for name in ("low", "low_scale", "turned", "turned_scale"):
                vars(linear).pop(name, None)


def copies(model: nn.Module) -> list[Tensor]:
    """What linears `in_float8` hold beside their weights."""
    return [t for m in model.modules() if type(m) is Float8 for t in (m.low, m.low_scale, m.turned, m.turned_scale)]


def refusal(layers: Sequence[nn.Module], device: torch.device) -> str | None:
    """Why these layers cannot be `in_float8`; None if they can."""
    if not multiplies(device):
        return f"a GPU that multiplies float8 (compute capability 8.9 or more), not {device.type}"
    if not any(_fits(m) for layer in layers for m in layer.modules()):
        return "a base in bf16 whose layers have frozen linears; here are none"
    return None


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module) or module.weight.dtype is not torch.bfloat16:
        return False
    n, k = module.weight.shape
    return not module.weight.requires_grad and n % BLOCK == k % BLOCK == 0 and n * k >= SMALLEST


@cache
def multiplies(device: torch.device) -> bool:
    """Whether products in float8 are there and right: only on GPUs; a CPU's are slower than those in bfloat16."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=draw).to(device, torch.bfloat16) for n in (48, 32))
    try:
        made, want = product(x, *rounded(w)).float(), x.float() @ w.float().t()
    except RuntimeError:
        return False
    return bool((made - want).norm() <= 0.06 * want.norm())
