"""Decoding under several low-rank adapters: their factors lie side by side, and all rows' changes are two products.

With A the A's of n adapters above each other, (n * r, in), and B their B's beside each other, (out, n * r), a row's change is
B (own * s * (A x)), where `own` leaves of the n * r numbers those of the row's own adapter. That is n times the work of each
row's own product, and yet less time, as long as there are few rows: see benchmarks/serve_speed.py. A change of the
batch's adapters copies the factors of those that came; the others keep their places.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .edit import Edit
from .route import Context, Level, Stack

FEWEST = 2                                            # adapters from which it is used


class Pool:
    """The factors of adapters at one site, in the dtype they are computed in; each in a place of its own."""

    def __init__(self, edits: Sequence[Edit], dtype: torch.dtype):
        self.edits: list[Edit | None] = [None] * (1 << (len(edits) - 1).bit_length())
        self.states: list[tuple] = [()] * len(self.edits)
        factors = [edit.factors() for edit in edits]
        a, b, _ = factors[0]
        self.rank, size = max(len(a) for a, _, _ in factors), len(self.edits)
        self.a = a.new_zeros(size * self.rank, a.shape[1], dtype=dtype)
        self.b = b.new_zeros(b.shape[0], size * self.rank, dtype=dtype)
        self.scale = a.new_zeros(size * self.rank, dtype=dtype)

    def places(self, edits: Sequence[Edit]) -> list[int] | None:
        """Where each of these edits lies, put there if it did not; None if they need another pool."""
        if len(edits) > len(self.edits):
            return None
        free = [n for n, edit in enumerate(self.edits) if edit not in edits]
        found = []
        for edit in edits:
            if edit not in self.edits:
                if not self._put(free.pop(), edit):
                    return None
            elif self.states[self.edits.index(edit)] != state(holders(edit)) and not self._put(self.edits.index(edit), edit):
                return None
            found.append(self.edits.index(edit))
        return found

    def _put(self, place: int, edit: Edit) -> bool:
        a, b, scale = edit.factors()
        if len(a) > self.rank or a.device != self.a.device:
            return False
        rows = slice(place * self.rank, place * self.rank + len(a))
        whole = slice(place * self.rank, (place + 1) * self.rank)
        self.a[whole], self.b[:, whole], self.scale[whole] = 0, 0, scale
        self.a[rows], self.b[:, rows] = a.detach(), b.detach()
        self.edits[place], self.states[place] = edit, state(holders(edit))
        # A zero times what is not finite would reach the rows of the others.
        return bool(self.a[rows].isfinite().all() and self.b[:, rows].isfinite().all())


def holders(edit: Edit) -> list[tuple[dict, str]]:
    return [(edit._parameters, name) for name, t in edit._parameters.items() if t is not None]


def state(of: Iterable[tuple[dict, str]]) -> tuple:
    """What changes when the numbers do that are there."""
    tensors = [parameters[name] for parameters, name in of]
    return [t._version for t in tensors], [t.data_ptr() for t in tensors]


@dataclass(frozen=True)
class Plan:
    """What a site does in a forward whose rows have these adapters: it holds from step to step."""
    rows: tuple[Stack, ...]
    dtype: torch.dtype
    holders: tuple[tuple[dict, str], ...]             # where the pooled numbers are from
    state: tuple
    pool: Pool | None                                 # None: nothing here is computed so
    others: Tensor | None                             # (B, 1, n * r) bool: what is not a row's own
    rest: Level                                       # the adapters that are not in the pool

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        low = F.linear(x, self.pool.a).mul_(self.pool.scale).masked_fill_(self.others, 0)
        return y + F.linear(low, self.pool.b)


class Pools:
    """A site's pool and its plan for the batch that is being decoded."""

    def __init__(self) -> None:
        self.pool: Pool | None = None
        self.plan: Plan | None = None

    def forget(self, edit: Edit | None = None) -> None:
        """The site's edits changed; `edit` is no more."""
        self.plan = None
        if self.pool is not None and edit in self.pool.edits:
            self.pool.edits[self.pool.edits.index(edit)] = None

    def of(self, edits: Mapping[str, Edit], level: Level, t: Tensor, ctx: Context) -> Plan:
        """The plan for a level of the route, one token a row. t: the site's output, (B, 1, D)."""
        plan = self.plan
        if plan is None or plan.rows != ctx.rows or plan.dtype != t.dtype or plan.state != state(plan.holders):
            plan = self.plan = self._made(edits, level, t, ctx)
        return plan

    def _made(self, edits: Mapping[str, Edit], level: Level, t: Tensor, ctx: Context) -> Plan:
        low = [(name, edits[name]) for name, rows, weight in level
               if rows is not None and weight == 1.0 and name in edits and edits[name].factors() is not None]
        low = low if len(low) >= FEWEST else []
        chosen = tuple(edit for _, edit in low)
        if chosen:
            places = None if self.pool is None or self.pool.a.dtype != t.dtype else self.pool.places(chosen)
            if places is None:
                self.pool = Pool(chosen, t.dtype)
                places = self.pool.places(chosen)
            if places is not None:
                place = {name: n for (name, _), n in zip(low, places, strict=True)}
                own = torch.tensor([place.get(stack[0][0], -1) if stack else -1 for stack in ctx.rows], device=t.device)
                at = torch.arange(len(self.pool.edits), device=t.device).repeat_interleave(self.pool.rank)
                rest = tuple(part for part in level if part[0] not in place)
                of = tuple(holder for edit in chosen for holder in holders(edit))
                return Plan(ctx.rows, t.dtype, of, state(of), self.pool, (own[:, None] != at)[:, None], rest)
        return Plan(ctx.rows, t.dtype, (), state(()), None, None, level)
