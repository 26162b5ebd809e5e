"""Output head and cross-entropy in one: logits are made a few rows at a time, and their gradient while they are there.

A batch's logits are the largest thing a small model's step makes (rows x vocabulary, several times over). Here none outlives
its chunk, and backward only scales what forward left: the gradient by the hidden states, (N, D).
"""
from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tsugiki.kernels.native import close, library, run

LOGITS = 1 << 23              # logits made at once; twice as many where they stay in 16 bits


class HeadLoss(torch.autograd.Function):
    """Losses (N,) of hidden (N, D), weight (V, D), bias (V,) or None, targets (N,) int64."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.trains = weight.requires_grad or bias is not None and bias.requires_grad
        need = ctx.needs_input_grad[0] and not ctx.trains
        ctx.made = torch.empty_like(hidden) if need else None
        return _losses(hidden, weight, bias, targets, ctx.made)

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, bias, targets = ctx.saved_tensors
        if not ctx.trains:
            return ctx.made * grad.unsqueeze(1).to(ctx.made.dtype), None, None, None
        return (*_all_gradients(hidden, weight, bias, targets, grad, ctx.needs_input_grad), None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def _losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, made: Tensor | None) -> Tensor:
    """The losses; their gradients by hidden go into `made`, if there is one."""
    losses = []
    for h, at, found, low in _chunks(hidden, weight, bias, targets, back=made is not None):
        losses.append(found)
        if made is not None:
            torch.mm(low, weight, out=made[at:at + len(h)])
    return torch.cat(losses) if losses else hidden.new_empty(0, dtype=_wide(hidden.dtype))


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, back: bool) -> Iterator[tuple]:
    """Some rows at a time: the hidden states, from where on, their losses, and if `back` their logits' gradients (n, V)."""
    compiled = hidden.dtype is torch.bfloat16 and hidden.device.type == "cpu" and not is_in_torch_dispatch_mode() and _works() \
        and bool(((targets >= 0) & (targets < len(weight))).all())            # torch refuses others
    size = max(16, (2 * LOGITS if compiled else LOGITS) // len(weight))
    for at in range(0, len(hidden), size):
        h, t = hidden[at:at + size], targets[at:at + size]
        logits = F.linear(h, weight, bias)
        if compiled:
            yield h, at, _compiled(logits, t, back), logits
        else:
            logits = logits.to(_wide(h.dtype))
            losses = F.cross_entropy(logits, t, reduction="none")
            yield h, at, losses, _logit_gradient(logits, t).to(h.dtype) if back else None


def _compiled(logits: Tensor, targets: Tensor, back: bool) -> Tensor:
    """The losses of bfloat16 logits in float32, by passes.c; if `back`, the logits become their gradient."""
    losses = torch.empty(len(logits))
    run("head_losses", logits, targets.contiguous(), losses, *logits.shape, int(back), torch.get_num_threads())
    return losses


@cache
def _works() -> bool:
    """Whether the kernel is there, and what it makes of small numbers is what torch makes."""
    if library() is None:
        return False
    g = torch.Generator().manual_seed(0)
    logits, targets = 4 * torch.randn(5, 77, generator=g).bfloat16(), torch.arange(5) * 19
    wide = logits.float()
    wanted = F.cross_entropy(wide, targets, reduction="none"), _logit_gradient(wide, targets)
    return close(_compiled(logits, targets, back=True), wanted[0]) and close(logits, wanted[1])


def _logit_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """softmax - onehot, in place of the logits."""
    p = torch.softmax(logits, -1, out=logits)
    return p.scatter_add_(1, targets.unsqueeze(1), p.new_full((len(p), 1), -1.0))


def _all_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grad: Tensor, needs):
    """By hidden, weight and bias, where the head itself is trained: its logits are made again."""
    dh = torch.empty_like(hidden) if needs[0] else None
    dw = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if needs[1] else None
    db = torch.zeros_like(bias, dtype=_wide(bias.dtype)) if bias is not None and needs[2] else None
    for h, at, _, low in _chunks(hidden, weight, bias, targets, back=True):
        by = grad[at:at + len(h)].unsqueeze(1).to(h.dtype)
        if dh is not None:
            dh[at:at + len(h)] = (low @ weight).mul_(by)
        if dw is not None:
            dw += low.t() @ (h * by)                  # the rows' factors are cheaper here than on the logits
        if db is not None:
            db += (low.t() @ by)[:, 0]
    return dh, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(bias.dtype)


def head_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Cross-entropy (nats) of each row: (N,) in float32, or float64 for float64.

    hidden (N, D), weight (V, D), bias (V,) or None, all of one dtype; targets (N,) int64.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (t if t is None else t.to(dtype) for t in (hidden, weight, bias))
    return HeadLoss.apply(hidden, weight, bias, targets)
