"""Optimizer and learning-rate schedules, as plain functions."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn


def adamw(params: dict[str, nn.Parameter], lr: float, weight_decay: float, beta2: float,
          scale: Callable[[str], float] = lambda name: 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused. Vectors (norms, biases, gates) are not decayed.

    scale: by a parameter's name, what its learning rate is multiplied with; each group keeps it under "scale".
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in params.items():
        groups.setdefault((weight_decay if p.dim() >= 2 else 0.0, scale(name)), []).append(p)
    made = [{"params": ps, "weight_decay": decay, "lr": lr * by, "scale": by} for (decay, by), ps in groups.items()]
    return torch.optim.AdamW(made, lr=lr, betas=(0.9, beta2), fused=True)


def schedule(kind: str, step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at `step` (from 0) of `steps`.

    Linear warm-up over the first `warmup` share of the steps, then a half cosine or a line to zero, or constant.
    """
    rising = max(1, round(steps * warmup)) if warmup else 0
    if step < rising:
        return (step + 1) / rising
    if kind == "constant":
        return 1.0
    done = (step - rising) / max(1, steps - rising)
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def grad_norm(params: Iterable[nn.Parameter]) -> torch.Tensor:
    """Euclidean norm over all gradients, summed in float64 (a scalar tensor)."""
    squares = [p.grad.detach().double().square().sum() for p in params if p.grad is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)
