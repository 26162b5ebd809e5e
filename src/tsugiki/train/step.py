"""The maths of one optimizer step, of one job or of several at once, on one screen."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tsugiki.data.batch import IGNORE, Batch
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


@dataclass(kw_only=True)
class Part:
    """One job's part in a step: what it trains, and what its rows have given so far.

    penalty: a term of the method's own, once a step, not part of the loss reported; after: called when the update is done,
    with the gradients still there. source_of: which of the `sources` each row is of; None where there is one.
    """
    params: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip: float
    step: int
    where: Callable[[int], str]
    penalty: Callable[[], Tensor | None] = lambda: None
    after: Callable[[], None] = lambda: None
    source_of: Callable[[Tensor], Tensor] | None = None
    sources: int = 0
    seen: list[Tensor] = field(default_factory=list)  # its data-set rows, as they stand in its forwards
    supervised: int = 0                               # over the WHOLE step
    tokens: int = 0
    total: float = 0.0
    norm: float = 0.0

    def __post_init__(self) -> None:
        self.sums, self.counts = [0.0] * self.sources, [0] * self.sources

    def count(self, batch: Batch, own: Tensor | None) -> None:
        """Take note of its tokens in a forward; own: (B, T) bool, which they are; None: all."""
        real, trained = batch.samples >= 0, batch.targets != IGNORE
        if own is not None:
            real, trained = real & own, trained & own
        self.seen.append(batch.samples if own is None else batch.samples[own])
        self.supervised += int(trained.sum())
        self.tokens += int(real.sum())

    def share(self, losses: Tensor, rows: Tensor) -> Tensor:
        """What its tokens' losses (N,), of its data-set rows (N,), add to the step's: their sum over the count of the step."""
        part = losses.sum()
        if not torch.isfinite(part):
            bad = sorted({int(r) for r in rows[~torch.isfinite(losses)]} or {int(r) for r in rows})
            raise RunError(f"step {self.step}: the loss is not finite in {self.names(bad)}; "
                           "nothing was updated, the last checkpoint is good")
        self.total += float(part.detach())
        if self.source_of is not None:
            kinds = self.source_of(rows)
            for n in range(self.sources):
                self.sums[n] += float(losses.detach()[kinds == n].double().sum())
                self.counts[n] += int((kinds == n).sum())
        return part / self.supervised

    def finish(self) -> None:
        """When all losses have gone backward: the penalty's gradient, the norm, clipping. Raises RunError for what is not finite
        and, at step 1, for a tensor without a gradient."""
        if (extra := self.penalty()) is not None:
            extra.backward()
        norm = grad_norm(self.params.values())
        if not torch.isfinite(norm):
            name = next((n for n, p in self.params.items() if p.grad is not None and not torch.isfinite(p.grad).all()), "their sum")
            raise RunError(f"step {self.step}: the gradient of {name} is not finite, from {self.names(self.rows())}; "
                           "nothing was updated, the last checkpoint is good")
        self.norm = float(norm)
        if self.clip and norm > self.clip:
            scale = self.clip / norm
            for p in self.params.values():
                if p.grad is not None:
                    p.grad.mul_(scale.to(p.grad.dtype))
        silent = [n for n, p in self.params.items() if p.grad is None] if self.step == 1 else []
        if silent:
            raise RunError(f"step 1: {len(silent)} trained tensors get no gradient, first {silent[0]}: they would stay as they are")

    def update(self) -> StepResult:
        """The optimizer's update from the gradients that are there. Raises RunError when it fails, or leaves what is not finite:
        some tensors may be updated then, so this step cannot be taken again."""
        try:
            self.optimizer.step()
            self.after()
        except (RuntimeError, MemoryError) as e:
            raise RunError(f"step {self.step}: the update failed ({next(iter(str(e).splitlines()), type(e).__name__)[:200]}); "
                           "the last checkpoint is good") from e
        if not torch.isfinite(torch.stack([p.detach().sum() for p in self.params.values()]).sum()):
            name = next((n for n, p in self.params.items() if not torch.isfinite(p).all()), "their sum")
            raise RunError(f"step {self.step}: {name} is not finite after the update; the last checkpoint is good")
        self.clear()
        return StepResult(self.total / self.supervised, self.supervised, self.tokens, self.norm,
                          tuple(zip(self.sums, self.counts, strict=True)))

    def clear(self) -> None:
        """Throw its gradients away."""
        self.optimizer.zero_grad(set_to_none=True)

    def rows(self) -> list[int]:
        return sorted({int(r) for samples in self.seen for r in samples.unique() if r >= 0})

    def names(self, rows: Sequence[int]) -> str:
        shown = ", ".join(self.where(r) for r in rows[:4])
        return shown + (f" and {len(rows) - 4} more rows" if len(rows) > 4 else "")


def train_step(model: nn.Module, batches: Sequence[Batch], params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
               *, route: Callable[[Batch], dict] = lambda batch: {},
               autocast: Callable[[], AbstractContextManager] = nullcontext, **part) -> StepResult:
    """One update of one job from all micro-batches; `part`: clip, step, where and the rest of Part.

    Raises RunError before the update when a loss or gradient is not finite, naming the step and the rows.
    """
    job = Part(params=params, optimizer=optimizer, **part)
    try:
        gradients(model, batches, [job], route=route, autocast=autocast)
    except RunError:
        job.clear()
        raise
    return job.update()


def gradients(model: nn.Module, batches: Sequence[Batch], parts: Sequence[Part], *,
              route: Callable[[Batch], dict] = lambda batch: {},
              autocast: Callable[[], AbstractContextManager] = nullcontext) -> None:
    """The gradient of one step of all `parts`: of the sum over parts of (the sum over its supervised tokens / their count over
    the WHOLE step), which gives each part's tensors exactly the gradient it has alone; clipped, and nothing updated.

    batches: `owners` says which part each token is of, where there are several. No micro-batch divides by its own count, so
    every way of cutting a step gives the same gradient. Raises RunError for what is not finite.
    """
    for batch in batches:
        for part, own in _shares(parts, batch.owners):
            part.count(batch, own)
    for part in parts:
        if not part.supervised:
            raise RunError(f"step {part.step}: no token of {part.names(part.rows())} is trained, so there is nothing to "
                           "learn from")
    for batch in batches:
        if not batch.supervised:
            continue
        with autocast():
            losses, rows = token_losses(model, batch, **route(batch))
        owners = None if batch.owners is None else batch.owners[batch.targets != IGNORE]         # (N,), in the order of losses
        first, *others = [part.share(losses, rows) if own is None else part.share(losses[own], rows[own])
                          for part, own in _shares(parts, owners)]
        sum(others, first).backward()
    for part in parts:
        part.finish()


def _shares(parts: Sequence[Part], owners: Tensor | None) -> Iterator[tuple[Part, Tensor | None]]:
    """Each part that is there, with where it is; None: everywhere."""
    if owners is None:
        yield parts[0], None
        return
    for n in sorted({int(n) for n in owners.unique() if n >= 0}):
        yield parts[n], owners == n
