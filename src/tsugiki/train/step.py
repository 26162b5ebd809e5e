"""The maths of one optimizer step, on one screen."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from tsugiki.data.batch import Batch
from tsugiki.errors import RunError
from tsugiki.train.loss import token_losses
from tsugiki.train.optim import grad_norm


@dataclass(frozen=True)
class StepResult:
    """What one step measured: mean loss (nats) over `supervised` tokens, norm of the gradient before clipping; of each source
    the sum of its losses and the number of its supervised tokens."""
    loss: float
    supervised: int
    tokens: int
    norm: float
    sources: tuple[tuple[float, int], ...] = ()


def train_step(model: nn.Module, batches: Sequence[Batch], params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
               *, clip: float, step: int, where: Callable[[int], str],
               route: Callable[[Batch], dict] = lambda batch: {},
               autocast: Callable[[], AbstractContextManager] = nullcontext,
               penalty: Callable[[], torch.Tensor | None] = lambda: None, after: Callable[[], None] = lambda: None,
               source_of: Callable[[torch.Tensor], torch.Tensor] | None = None, sources: int = 0) -> StepResult:
    """One update from all micro-batches: loss = sum over supervised tokens / their count over the WHOLE step.

    penalty: a term of the method's own, once a step, not part of the loss reported; after: called when the update is done,
    with the gradients still there. source_of: which of the `sources` each row is of; None where there is one.

    No micro-batch divides by its own count, so every way of cutting a step gives the same gradient.
    Raises RunError before the update when a loss or gradient is not finite, naming the step and the rows.
    """
    count = sum(batch.supervised for batch in batches)
    if not count:
        raise RunError(f"step {step}: no token of {_names(_rows(batches), where)} is trained, so there is nothing to learn from")
    total, sums, counts = 0.0, [0.0] * sources, [0] * sources
    for batch in batches:
        if not batch.supervised:
            continue
        with autocast():
            losses, rows = token_losses(model, batch, **route(batch))
        part = losses.sum()
        if not torch.isfinite(part):
            bad = sorted({int(r) for r in rows[~torch.isfinite(losses)]} or {int(r) for r in rows})
            optimizer.zero_grad(set_to_none=True)
            raise RunError(f"step {step}: the loss is not finite in {_names(bad, where)}; "
                           "nothing was updated, the last checkpoint is good")
        (part / count).backward()
        total += float(part.detach())
        if source_of is not None:
            kinds = source_of(rows)
            for n in range(sources):
                sums[n] += float(losses.detach()[kinds == n].double().sum())
                counts[n] += int((kinds == n).sum())
    if (extra := penalty()) is not None:
        extra.backward()
    norm = grad_norm(params.values())
    if not torch.isfinite(norm):
        name = next((n for n, p in params.items() if p.grad is not None and not torch.isfinite(p.grad).all()), "their sum")
        optimizer.zero_grad(set_to_none=True)
        raise RunError(f"step {step}: the gradient of {name} is not finite, from {_names(_rows(batches), where)}; "
                       "nothing was updated, the last checkpoint is good")
    if clip and norm > clip:
        scale = clip / norm
        for p in params.values():
            if p.grad is not None:
                p.grad.mul_(scale.to(p.grad.dtype))
    silent = [n for n, p in params.items() if p.grad is None] if step == 1 else []
    if silent:
        raise RunError(f"step 1: {len(silent)} trained tensors get no gradient, first {silent[0]}: they would stay as they are")
    try:
        optimizer.step()
        after()
    except (RuntimeError, MemoryError) as e:          # some tensors may be updated: this step cannot be taken again
        raise RunError(f"step {step}: the update failed ({next(iter(str(e).splitlines()), type(e).__name__)[:200]}); "
                       "the last checkpoint is good") from e
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total / count, count, sum(b.tokens for b in batches), float(norm), tuple(zip(sums, counts, strict=True)))


def _rows(batches: Sequence[Batch]) -> list[int]:
    return sorted({int(r) for batch in batches for r in batch.samples.unique() if r >= 0})


def _names(rows: Sequence[int], where: Callable[[int], str]) -> str:
    shown = ", ".join(where(r) for r in rows[:4])
    return shown + (f" and {len(rows) - 4} more rows" if len(rows) > 4 else "")
