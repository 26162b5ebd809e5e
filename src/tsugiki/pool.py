"""Decoding under several low-rank adapters: their factors lie side by side, and all rows' changes are two products.

With A the A's of n adapters above each other, (n * r, in), and B their B's, (n * r, out), a row's change is (own * s * (A x)) B,
where `own` leaves of the n * r numbers those of the row's own adapter. That is n times the work of each row's own product, and
yet less time, as long as there are few rows: see benchmarks/serve_speed.py. In bfloat16, where it can be compiled, each row
multiplies its own factors alone (kernels/low_rank.c). A change of the batch's adapters copies the factors of those that came; the
others keep their places. A pool is one thread's: another one that decodes makes its own, so nobody's factors change under his
products.
"""
from __future__ import annotations

import math
import threading
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .edit import Edit
from .kernels import low_rank
from .route import Context, Level, Stack

FEWEST = 2                                            # adapters from which it is used


class Pool:
    """The factors of adapters at one site, in the dtype they are computed in; each in a place of its own."""

    @torch.inference_mode(False)                      # its tensors are written again later, perhaps outside of it
    def __init__(self, edits: Sequence[Edit], dtype: torch.dtype):
        self.size = 1 << (len(edits) - 1).bit_length()
        self.at: dict[Edit, tuple[int, tuple]] = {}   # where an edit lies, and the state of its numbers then
        factors = [edit.factors() for edit in edits]
        a, b, _ = factors[0]
        self.rank = max(len(a) for a, _, _ in factors)
        self.a = a.new_zeros(self.size * self.rank, a.shape[1], dtype=dtype)
        self.b = b.new_zeros(self.size * self.rank, b.shape[0], dtype=dtype)
        self.scale = a.new_zeros(self.size * self.rank, dtype=dtype)

    def places(self, edits: Sequence[Edit], known: Container[Edit]) -> list[int] | None:
        """Where each of these edits lies, put there if it did not; None if they need another pool. known: those whose
        numbers are as they were."""
        if len(edits) > self.size:
            return None
        new = [e for e in edits if e not in self.at or e not in known and self.at[e][1] != state(holders(e))]
        if new:
            for edit in [e for e in tuple(self.at) if e in new or len(new) + len(self.at) > self.size and e not in edits]:
                del self.at[edit]
            free = sorted({*range(self.size)} - {place for place, _ in self.at.values()})
            if not all(self._put(place, edit) for place, edit in zip(free, new, strict=False)):
                return None
        return [self.at[edit][0] for edit in edits]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _put(self, place: int, edit: Edit) -> bool:
        a, b, scale = edit.factors()
        if len(a) > self.rank or a.device != self.a.device:
            return False
        whole = slice(place * self.rank, (place + 1) * self.rank)
        if len(a) < self.rank:
            self.a[whole], self.b[whole] = 0, 0
        rows = slice(whole.start, whole.start + len(a))
        self.a[rows], self.b[rows], self.scale[whole] = a.detach(), b.detach().t(), scale
        self.at[edit] = place, state(holders(edit))
        # A zero times what is not finite would reach the rows of the others.
        return math.isfinite(float(self.a[rows].sum(dtype=torch.float64) + self.b[rows].sum(dtype=torch.float64)))


def holders(edit: Edit) -> list[tuple[dict, str]]:
    return [(edit._parameters, name) for name, t in edit._parameters.items() if t is not None]


def state(of: Iterable[tuple[dict, str]]) -> tuple:
    """What changes when the numbers do that are there."""
    tensors = [parameters[name] for parameters, name in of]
    try:
        return [t._version for t in tensors], [t.data_ptr() for t in tensors]
    except RuntimeError:                              # torch does not count with tensors made under inference_mode
        return [version(t) for t in tensors], [t.data_ptr() for t in tensors]


def version(t: Tensor) -> int:
    """How often it was written in place; -1 where torch does not count."""
    return -1 if t.is_inference() else t._version


@dataclass(frozen=True)
class Plan:
    """What a site does in a forward whose rows have these adapters: it holds from step to step."""
    thread: int                                       # whose it is
    rows: tuple[Stack, ...]
    dtype: torch.dtype
    names: tuple[str, ...]                            # the adapters in the pool,
    edits: tuple[Edit, ...]                           # and what they are here
    holders: tuple[tuple[dict, str], ...]             # where their numbers are from
    state: tuple
    pool: Pool | None                                 # None: nothing here is computed so
    place: Tensor | None                              # (B,) int64: the row's own in the pool, or -1
    others: Tensor | None                             # (B, 1, n * r) bool: what is not a row's own
    rest: Level                                       # the adapters that are not in the pool

    def run(self, x: Tensor, y: Tensor) -> Tensor:
        pool = self.pool
        if low_rank.takes_own(x, y, pool.rank):
            return low_rank.own(x, y, pool.a, pool.b, pool.scale, self.place, pool.rank)
        return y + F.linear(x, pool.a).mul_(pool.scale).masked_fill_(self.others, 0) @ pool.b


class Pools:
    """A site's pool and its plan for the batch that is being decoded."""

    def __init__(self, fewest: int = FEWEST) -> None:
        self.fewest = fewest
        self.mine: tuple[int, Pool | None] = 0, None  # the thread that decoded last, and its pool
        self.plan: Plan | None = None

    def forget(self, edit: Edit) -> None:
        """An edit is no more at this site."""
        self.plan = None
        if self.mine[1] is not None:
            self.mine[1].at.pop(edit, None)

    def keep(self, edits: Iterable[Edit]) -> None:
        """Forget all but these."""
        here, pool, self.plan = {*edits}, self.mine[1], None
        for edit in [e for e in (() if pool is None else pool.at) if e not in here]:
            del pool.at[edit]

    def of(self, edits: Mapping[str, Edit], level: Level, t: Tensor, ctx: Context) -> Plan:
        """The plan for a level of the route, one token a row. t: the site's output, (B, 1, D)."""
        plan, thread = self.plan, threading.get_ident()
        same = plan is not None and plan.thread == thread and plan.state == state(plan.holders) \
            and [edits.get(name) for name in plan.names] == [*plan.edits]     # modules are equal if they are the same
        if not same or plan.rows != ctx.rows or plan.dtype != t.dtype:
            plan = self.plan = self._made(edits, level, t, ctx, plan.edits if same else ())
        return plan

    def _made(self, edits: Mapping[str, Edit], level: Level, t: Tensor, ctx: Context, known: Container[Edit]) -> Plan:
        low = {name: edits[name] for name, rows, weight in level
               if (rows is not None or self.fewest == 1) and weight == 1.0 and name in edits and edits[name].factors() is not None}
        chosen, thread = tuple(low.values()), threading.get_ident()
        if len(chosen) >= self.fewest:
            owner, pool = self.mine
            fits = pool is not None and owner == thread and pool.a.dtype == t.dtype
            places = pool.places(chosen, known) if fits else None
            if places is None:
                pool = Pool(chosen, t.dtype)
                places = pool.places(chosen, ())
            self.mine = thread, None if places is None else pool
            if places is not None:                    # else numbers that are not finite: each by itself
                key = ("owns", *places, *low, pool.size, pool.rank)
                if key not in ctx.scratch:
                    ctx.scratch[key] = _owns(ctx.rows, dict(zip(low, places, strict=True)), pool, t.device)
                of = tuple(holder for edit in chosen for holder in holders(edit))
                return Plan(thread, ctx.rows, t.dtype, tuple(low), chosen, of, state(of), pool, *ctx.scratch[key],
                            tuple(part for part in level if part[0] not in low or part[2] != 1.0))
        return Plan(thread, ctx.rows, t.dtype, (), (), (), state(()), None, None, None, level)


def _owns(rows: Sequence[Stack], places: Mapping[str, int], pool: Pool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B,) int64, where each row's adapter lies, -1 for one that is elsewhere; (B, 1, n * r) bool: which of the numbers of A x are
    not of the row's own adapter."""
    own = torch.tensor([places.get(stack[0][0], -1) if stack and stack[0][1] == 1.0 else -1 for stack in rows], device=device)
    return own, (own[:, None] != torch.arange(pool.size, device=device).repeat_interleave(pool.rank))[:, None]
