"""Examples to batches: which rows go into which forward, padded or packed. One object holds ids, targets and positions."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from tsugiki.data.render import Example

IGNORE = -100
LAYOUTS = ("auto", "pad", "pack")
# A forward costs about as much as this many more tokens (launches, small matrices) in a model of some million parameters;
# used only to choose cuts.
FORWARD_OVERHEAD = 192


@dataclass(frozen=True)
class Batch:
    """One forward's input. Right-padded rows need no mask: a causal model's real tokens never look to their right.

    ids: (B, T) int64. targets: (B, T) int64, the token to predict FROM this position, or -100.
    positions: (B, T) int64, restarting at 0 with every document. samples: (B, T) int64, row of the data set, -1 in padding.
    packed: rows hold several documents, so positions must be given to the model.
    owners: (B, T) int64, which of the jobs of a step each token is of, -1 in padding; None: there is one job.
    slots: (B, T) int64, of packed rows under virtual tokens: which one of its document's stands here, -1 where none does; they
    are before the document, which keeps its own positions. None: there are none, or the forward makes room for them.
    """
    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    samples: torch.Tensor
    packed: bool
    owners: torch.Tensor | None = None
    slots: torch.Tensor | None = None

    @property
    def supervised(self) -> int:
        return int((self.targets != IGNORE).sum())

    @property
    def tokens(self) -> int:
        return int((self.samples >= 0).sum())

    def ends(self) -> torch.Tensor:
        """(documents + 1,) int32: 0, and where each document of the rows laid end to end is over; padding counts as one."""
        first = self.positions == 0
        if self.slots is not None:
            first = torch.where(self.samples >= 0, False, first & (self.slots <= 0))
        starts = first.flatten().nonzero().flatten()
        return torch.cat([starts, starts.new_tensor([self.positions.numel()])]).int()

    def to(self, device: torch.device | str) -> Batch:
        names = ("ids", "targets", "positions", "samples", "owners", "slots")
        tensors = {k: v for k in names if (v := getattr(self, k)) is not None}
        return replace(self, **{k: v.to(device) for k, v in tensors.items()})


def stream_key(seed: int, *parts: object) -> int:
    """A 63-bit seed for one purpose: draws for one purpose never depend on how often another drew."""
    text = "/".join(map(str, (seed, *parts))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n rows in one epoch: a function of (seed, epoch) alone."""
    return _order(n, seed, epoch).tolist()


def step_rows(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """The rows of optimizer step `step` (from 0), the same after any interruption."""
    per_epoch = -(-n // batch_size)
    epoch, place = divmod(step, per_epoch)
    return _order(n, seed, epoch)[place * batch_size:(place + 1) * batch_size].tolist()


@lru_cache(maxsize=2)                                   # one epoch is asked for step after step
def _order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """(n,) int64: eight bytes a row, since there may be many."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(stream_key(seed, "order", epoch)))


def lengths_of(examples: Sequence[Example]) -> torch.Tensor:
    """(N,) int64: tokens of each row, without reading rows that lie on disk."""
    found = getattr(examples, "lengths", None)
    return torch.tensor([len(e.ids) for e in examples]) if found is None else found


def micro_batches(lengths: Sequence[int], rows: Sequence[int], layout: str, max_tokens: int,
                  overhead: int = FORWARD_OVERHEAD) -> list[list[list[int]]]:
    """Cut one step's rows into forwards: a list of forwards, each a list of batch rows, each a list of documents.

    "pad": rows sorted by length and cut where padding plus overhead is least. "pack": documents laid end to end in
    batch rows of at most max_tokens (first fit, longest first). Both hold every row exactly once.
    """
    ordered = sorted(rows, key=lambda i: (-lengths[i], i))
    if layout == "pack":
        return [[bin_] for bin_ in _bins(lengths, ordered, max_tokens)]
    cuts = _cuts([lengths[i] for i in ordered], max_tokens, overhead)
    return [[[i] for i in ordered[a:b]] for a, b in zip(cuts, cuts[1:], strict=False)]


def _bins(lengths: Sequence[int], ordered: Sequence[int], room: int) -> list[list[int]]:
    bins: list[tuple[int, list[int]]] = []
    for i in ordered:
        for n, (used, members) in enumerate(bins):
            if used + lengths[i] <= room:
                bins[n] = (used + lengths[i], [*members, i])
                break
        else:
            bins.append((lengths[i], [i]))
    return [members for _, members in bins]


def _cuts(lengths: Sequence[int], max_tokens: int, overhead: int) -> list[int]:
    """Cheapest way to cut descending lengths into groups of (rows x longest) <= max_tokens, by dynamic programming."""
    n = len(lengths)
    best, back = [0.0] + [float("inf")] * n, [0] * (n + 1)
    for end in range(1, n + 1):
        for start in range(end - 1, -1, -1):
            area = (end - start) * lengths[start]
            if area > max_tokens and end - start > 1:
                break
            cost = best[start] + area + overhead
            if cost < best[end]:
                best[end], back[end] = cost, start
    cuts = [n]
    while cuts[-1]:
        cuts.append(back[cuts[-1]])
    return cuts[::-1]


def collate(examples: Sequence[Example], forward: Sequence[Sequence[int]], pad_id: int, multiple: int = 1,
            virtual: int = 0) -> Batch:
    """Lay out one forward. Padding is a document of its own (positions restart), so nothing attends into it. Packed rows are
    filled up to a multiple of `multiple` tokens, so that forwards have few shapes, and each document has room for `virtual`
    tokens before it."""
    packed = any(len(row) > 1 for row in forward)
    virtual = virtual if packed else 0
    width = max(sum(len(examples[i].ids) + virtual for i in row) for row in forward)
    if packed:
        width = -(-width // multiple) * multiple
    ids = torch.full((len(forward), width), pad_id)
    targets = torch.full_like(ids, IGNORE)
    samples = torch.full_like(ids, -1)
    positions = torch.zeros_like(ids)
    slots = torch.full_like(ids, -1) if virtual else None
    for b, row in enumerate(forward):
        at = 0
        for i in row:
            example, n = examples[i], len(examples[i].ids)
            if virtual:
                slots[b, at:at + virtual] = torch.arange(virtual)
                at += virtual
            tokens = torch.tensor(example.ids)
            ids[b, at:at + n] = tokens
            trained = torch.tensor(example.trained[1:], dtype=torch.bool)
            targets[b, at:at + n - 1] = torch.where(trained, tokens[1:], IGNORE)
            samples[b, at:at + n] = i
            positions[b, at:at + n] = torch.arange(n)
            at += n
        positions[b, at:] = torch.arange(width - at) if packed else torch.arange(at, width)
    return Batch(ids, targets, positions, samples, packed, slots=slots)
