"""Which rows a step takes when several sources are mixed by their share of the tokens: a function of (seed, step) alone."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from tsugiki.data.batch import epoch_order, step_rows, stream_key


@dataclass(frozen=True)
class Source:
    """Rows `start` to `start + count` of the examples; `share` of the tokens of each step (the first source has the rest)."""
    name: str
    start: int
    count: int
    share: Fraction = Fraction(0)


@dataclass(frozen=True)
class _Pass:
    """One pass over a source: its rows in order, and how many tokens they and those before them have."""
    order: list[int] | Tensor                         # (N,)
    ends: Tensor                                      # (N,) int64
    twice_middles: Tensor                             # (N,) int64: where a row is half read, times two


@dataclass(frozen=True, eq=False)
class Mixture:
    """The first source sets the pace: batch_size of its rows a step, in the order they would have alone. The others are read
    alongside, pass after pass, each in an order of its own.

    After every step, the tokens that a source has given are its share / the first's share times the first's tokens, to within
    half of its longest row: a row is taken as soon as the target reaches its middle. Tokens are those of whole rows, prompts
    included.
    """
    sources: tuple[Source, ...]
    batch_size: int
    seed: int
    lengths: Tensor | None = None                     # (N,) int64, of all rows; only asked for where sources are mixed
    _passes: dict = field(default_factory=dict, repr=False)

    @staticmethod
    def alone(rows: int, batch_size: int, seed: int) -> Mixture:
        """One source: what `step_rows` gives."""
        return Mixture((Source("data", 0, rows),), batch_size, seed)

    @property
    def mixed(self) -> bool:
        return len(self.sources) > 1

    @property
    def pace(self) -> int:
        """Steps of one pass over the first source."""
        return -(-self.sources[0].count // self.batch_size)

    def rows(self, step: int) -> list[int]:
        """The rows of optimizer step `step` (from 0); a small source may give the same row twice."""
        rows = step_rows(self.sources[0].count, self.batch_size, self.seed, step)
        for n, source in enumerate(self.sources[1:], 1):
            first, last = self._taken(n, step), self._taken(n, step + 1)
            while first < last:
                epoch, place = divmod(first, source.count)
                some = min(last - first, source.count - place)
                rows += [source.start + int(i) for i in self._pass(n, epoch).order[place:place + some]]
                first += some
        return rows

    def tokens(self, step: int) -> list[int]:
        """Tokens that each source has given after `step` steps."""
        found = [self._paced(step)]
        for n, source in enumerate(self.sources[1:], 1):
            epoch, place = divmod(self._taken(n, step), source.count)
            found.append(epoch * self._total(n) + (int(self._pass(n, epoch).ends[place - 1]) if place else 0))
        return found

    def source_of(self, rows: Tensor) -> Tensor:
        """The source that each row belongs to."""
        starts = torch.tensor([s.start for s in self.sources[1:]], device=rows.device)
        return torch.bucketize(rows, starts, right=True)

    def _taken(self, n: int, step: int) -> int:
        """Rows of source n, counted over all passes, that were taken after `step` steps."""
        source, rest = self.sources[n], 1 - sum(s.share for s in self.sources[1:])
        twice = int(2 * self._paced(step) * source.share / rest)
        epoch, left = divmod(twice, 2 * self._total(n))
        return epoch * source.count + int(torch.searchsorted(self._pass(n, epoch).twice_middles, left, right=True))

    def _paced(self, step: int) -> int:
        """Tokens of the first source after `step` steps."""
        epoch, place = divmod(step, self.pace)
        return epoch * self._total(0) + (int(self._pass(0, epoch).ends[place * self.batch_size - 1]) if place else 0)

    def _total(self, n: int) -> int:
        source = self.sources[n]
        key = n, "total"
        if key not in self._passes:
            self._passes[key] = int(self.lengths[source.start:source.start + source.count].sum())
        return self._passes[key]

    def _pass(self, n: int, epoch: int) -> _Pass:
        """A pass, remembered until the one after the next: one asks for them step after step."""
        if (n, epoch) not in self._passes:
            source = self.sources[n]
            seed = self.seed if n == 0 else stream_key(self.seed, "source", n)
            order = torch.tensor(epoch_order(source.count, seed, epoch))
            lengths = self.lengths[source.start:source.start + source.count][order]
            ends = lengths.cumsum(0)
            self._passes[n, epoch] = _Pass(order if n else [], ends, 2 * ends - lengths)
            for old in [key for key in self._passes if key[0] == n and key[1] not in ("total", epoch, epoch - 1)]:
                del self._passes[old]
        return self._passes[n, epoch]


def mixed(counts: Sequence[int], names: Sequence[str], shares: Sequence[Fraction], batch_size: int, seed: int,
          lengths: Tensor) -> Mixture:
    """Sources that lie one after another in the examples; those without a share are left out."""
    found, start = [], 0
    for count, name, share in zip(counts, names, (Fraction(0), *shares), strict=True):
        if share or not start:
            found.append(Source(name, start, count, share))
        start += count
    return Mixture(tuple(found), batch_size, seed, lengths)
