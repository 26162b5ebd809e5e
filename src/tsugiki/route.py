"""Which rows use which adapter: one immutable Context a forward, kept per thread, and random draws that belong to tokens."""
from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError

Rows = slice | Tensor | None                          # None: every row
Level = tuple[tuple[str, Rows, float], ...]           # adapters on disjoint rows, each with the weight of its change
# Rows are rows of the batch, or with Context.axis 1 the positions of its one packed row.
Stack = tuple[tuple[str, float], ...]                 # the adapters of one row with their weights, applied in this order


@dataclass(frozen=True)
class Context:
    """What one forward tells the edits. Immutable; a new one per forward, in the calling thread only."""
    route: tuple[Level, ...] = ()                     # level i holds the i-th adapter of each row's stack
    rows: tuple[Stack, ...] = ()                      # the same by row
    size: int = 0                                     # rows in the batch; 0: no forward of the model is in progress
    length: int = 0                                   # positions a row, virtual ones included
    axis: int = 0                                     # what the route's Rows count: rows, or 1: positions of one packed row
    virtual: int = 0                                  # virtual positions at the left of this forward's sequence
    slots: Tensor | None = None                       # of one packed row: (n,) int64, where each document's virtual tokens are
    mask: Tensor | None = None                        # (B, S) attention mask, virtual positions included
    keys: Tensor | None = None                        # (B, T) int64: one key a token, for draws that follow the token
    places: Tensor | None = None                      # (2, B, T) int64: see `places`; only if an adapter of the route asks
    scratch: dict = field(default_factory=dict, compare=False, repr=False)   # a span's input, from its entry to its exit
    home: Any = None                                  # the Adapters this forward belongs to
    of: nn.Module | None = None                       # the module whose forward this is
    outer: Context | None = None                      # the forward around this one, restored when this one ends

    def only(self, rows: Rows) -> Context:
        """The same context for some of the rows."""
        if rows is None or self.mask is None and self.keys is None and self.places is None:
            return self
        return replace(self, mask=None if self.mask is None else self.of_rows(self.mask, rows),
                       keys=None if self.keys is None else self.of_rows(self.keys, rows),
                       places=None if self.places is None else self.of_rows(self.places, rows, 1))

    def of_rows(self, t: Tensor, rows: Rows, at: int = 0) -> Tensor:
        """The part of t that is these rows', where dimension `at` counts rows and the next one their positions."""
        return cut(t, rows, at + self.axis)


def cut(t: Tensor, rows: Rows, at: int) -> Tensor:
    """t with these rows alone in dimension `at`."""
    if rows is None:
        return t
    return t.narrow(at, rows.start, rows.stop - rows.start) if isinstance(rows, slice) else t.index_select(at, rows.to(t.device))


@dataclass(frozen=True)
class Spans:
    """`adapter_ids` of one packed row: entry i, as adapter_ids takes it for a row, holds for the tokens up to ends[i]."""
    ids: tuple[Any, ...]
    ends: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.ends) or any(b <= a for a, b in zip((0, *self.ends), self.ends, strict=False)):
            raise UserError(f"Spans: {len(self.ids)} adapters for the ends {self.ends}; give one a span, and rising ends")


class _Cell(threading.local):
    """The one mutable place: the forward in progress and the `use` blocks around it, per thread."""
    ctx: Context | None = None
    uses: tuple[tuple[Any, Any], ...] = ()            # (Adapters, ids), innermost last
    prompt: int | None = None                         # inside generate: columns of the prompt


cell = _Cell()


@contextmanager
def using(home: Any, ids: Any) -> Iterator[Any]:
    before = cell.uses
    cell.uses = (*before, (home, ids))
    try:
        yield home
    finally:
        cell.uses = before


@contextmanager
def prompting(columns: int | None) -> Iterator[None]:
    """Inside: forwards of a generation whose prompt has so many columns."""
    before, cell.prompt = cell.prompt, columns
    try:
        yield
    finally:
        cell.prompt = before


UNSET = object()


def wanted(home: Any) -> Any:
    """What the innermost `use` of this thread says for these Adapters; UNSET outside of any."""
    for owner, ids in reversed(cell.uses):
        if owner is home:
            return ids if ids is not None else ()
    return UNSET


def stacks(ids: Any, size: int) -> list[Stack]:
    """One stack a row from what a user may pass: a name, a tuple of names or a dict of names with weights (every row), or a
    list with one of them a row.

    A list shorter than the batch is repeated in place when it divides it, as beams and num_return_sequences repeat rows.
    """
    if ids is None or isinstance(ids, (str, tuple, dict)):
        ids = [ids] * size
    if not isinstance(ids, Sequence) or not ids or size % len(ids):
        count = len(ids) if isinstance(ids, Sequence) else type(ids).__name__
        raise UserError(f"adapter_ids: {count} entries for a batch of {size} rows; pass a name, or a list of one a row")
    return [row for row in map(stack_of, ids) for _ in range(size // len(ids))]


def stack_of(entry: Any) -> Stack:
    """The stack of what `adapter_ids` takes for a row."""
    if isinstance(entry, dict):
        for name, weight in entry.items():
            if type(weight) not in (int, float) or not math.isfinite(weight):
                raise UserError(f"adapter_ids: the weight of {name!r} must be a number, got {weight!r}")
        return tuple((name, float(weight)) for name, weight in entry.items())
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    if len(set(names)) != len(names):
        raise UserError(f"adapter_ids: {names} names an adapter twice")
    return tuple((name, 1.0) for name in names)


def levels(rows: Sequence[Stack], device: torch.device | str = "cpu", ends: Sequence[int] | None = None) -> tuple[Level, ...]:
    """The route: per stack position, each adapter with its rows, as slices where they are contiguous. ends: the rows are spans
    of one packed row, up to these positions."""
    found = []
    for depth in range(max(map(len, rows), default=0)):
        where: dict[tuple[str, float], list[int]] = {}
        for i, row in enumerate(rows):
            if depth < len(row):
                where.setdefault(row[depth], []).append(i)
        found.append(tuple((name, _shape(at, len(rows), device, ends), weight) for (name, weight), at in where.items()))
    return tuple(found)


def _shape(rows: list[int], size: int, device: torch.device | str, ends: Sequence[int] | None) -> Rows:
    if ends is not None:
        starts, size = (0, *ends), ends[-1]
        rows = [at for i in rows for at in range(starts[i], ends[i])]
    if rows[-1] - rows[0] + 1 == len(rows):
        return None if len(rows) == size else slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def places(real: Tensor, starts: Tensor, prompt: Tensor) -> Tensor:
    """Where each token stands in its document: (2, B, T) int64.

    [0] counts its real tokens from 0; [1] counts back from the last token of the document's prompt, which is 0.
    -1 where there is no such place: padding, and in [1] what comes after the prompt. real, starts, prompt: (B, T) bool:
    tokens that are no padding, first tokens of a document, tokens of a prompt.
    """
    prompt, ends = prompt & real, F.pad(starts[:, 1:], (0, 1))
    before = _count(real, starts) - 1
    after = _count(prompt.flip(1), ends.flip(1)).flip(1) - 1
    return torch.stack([before.masked_fill(~real, -1), after.masked_fill(~prompt, -1)])


def before_first(trained: Tensor, starts: Tensor) -> Tensor:
    """(B, T) bool: the tokens of each document that stand before its first trained one: its prompt."""
    return _count(trained, starts) == 0


def _count(flags: Tensor, starts: Tensor) -> Tensor:
    """(B, T) int64: how many of a document's flags are set up to each token, this one included; `starts` begin documents."""
    count = flags.cumsum(1)                                                   # never falls: cummax holds it at a document's start
    return count - ((count - flags.long()) * starts).cummax(1).values


def pinned(checkpoint: Callable) -> Callable:
    """Wrap a checkpoint function: a layer replayed in backward sees the context of its own forward, in any thread."""
    def run(function: Callable, *args: Any, **kwargs: Any) -> Any:
        ctx = cell.ctx

        def body(*a: Any, **k: Any) -> Any:
            now, cell.ctx = cell.ctx, ctx
            try:
                return function(*a, **k)
            finally:
                cell.ctx = now
        return checkpoint(body, *args, **kwargs)
    run.pinned = True
    return run


# Random draws. A draw depends on (seed, step, sample, position, site, feature) and on nothing else: not on the batch it
# is in, not on the global generator. splitmix64 in wrapping int64 arithmetic makes one key a token; a 32-bit finaliser
# over (token, feature) makes the mask, since it touches every element.

def _signed(value: int, bits: int = 64) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser; shifts are made logical by masking off the copied sign bits."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def token_keys(seed: int, step: int, samples: Tensor, positions: Tensor) -> Tensor:
    """(B, T) int64 keys from (B, T) sample numbers and positions within the sample; equal inputs, equal keys."""
    key = _mix(torch.tensor(_signed(seed), dtype=torch.int64, device=samples.device))
    for part in (torch.tensor(_signed(step), dtype=torch.int64, device=samples.device), samples, positions):
        key = _mix(key ^ _mix(part.to(torch.int64)))
    return key


def dropout(x: Tensor, p: float, ctx: Context, salt: Tensor, training: bool) -> Tensor:
    """Dropout of x (B, T, D); `salt`, an int64 scalar, is the site's. With token keys the mask follows the token; without,
    it is torch's own, if training."""
    if p == 0.0:
        return x
    if ctx.keys is None:
        return F.dropout(x, p, training)
    if ctx.keys.shape[1] < x.shape[1]:
        raise UserError(f"token_keys has {ctx.keys.shape[1]} positions, the sequence {x.shape[1]}")
    tokens = (_mix(ctx.keys[:, -x.shape[1]:] ^ _mix(salt)) >> 32).to(torch.int32)
    features = (_mix(torch.arange(x.shape[-1], device=x.device)) >> 32).to(torch.int32)
    z = tokens[..., None] ^ features                                          # (B, T, D), then uniform over int32
    z = z.bitwise_xor_(z >> 16).mul_(_signed(0x7FEB352D, 32))                 # in place: this touches every element
    z = z.bitwise_xor_(z >> 15).mul_(_signed(0x846CA68B, 32))
    keep = z >= round(p * (1 << 32)) - (1 << 31)
    return (x * keep).mul_(1.0 / (1.0 - p))
