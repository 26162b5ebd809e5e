"""How sure a score is: intervals of one, and the difference of two models on the same rows."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsugiki.data.batch import stream_key

Z = 1.959963984540054                                 # of the normal distribution, 97.5 %
DRAWS = 1000                                          # resamplings of a bootstrap
CHUNK = 1 << 21                                       # indices drawn at once


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    p = hits / n
    middle, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return (max(0.0, (middle - half) / (1 + Z * Z / n)), min(1.0, (middle + half) / (1 + Z * Z / n)))


def resampled(stats: Tensor, seed: int = 0) -> Tensor:
    """Sums of DRAWS resamplings of the rows, drawn with replacement: (N, K) float64 -> (DRAWS, K).

    The draws are a stream of their own, a function of (seed, N), so two models on the same rows meet the same resamplings and
    no other draw is moved.
    """
    n = len(stats)
    draw, sums = torch.Generator().manual_seed(stream_key(seed, "bootstrap", n)), []
    for start in range(0, DRAWS, size := max(1, CHUNK // n)):
        picked = torch.randint(n, (min(size, DRAWS - start), n), generator=draw)                    # (d, N)
        ones = torch.ones(picked.shape, dtype=torch.float64)
        sums.append(torch.zeros_like(ones).scatter_add_(1, picked, ones) @ stats)
    return torch.cat(sums)


def bootstrap(stats: Sequence[Sequence[float]], value: Callable[[Sequence[float]], float],
              seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of `value` of the summed rows (percentiles; Efron 1979); None for fewer than two rows."""
    if len(stats) < 2:
        return None
    found = sorted(value(row) for row in resampled(torch.tensor(stats, dtype=torch.float64), seed).tolist())
    return found[int(0.025 * DRAWS)], found[math.ceil(0.975 * DRAWS) - 1]


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test (1947): rows that only one of the two models has right, under a fair coin."""
    n, few = only_a + only_b, min(only_a, only_b)
    tail = term = 1
    for k in range(few):                              # sum of the binomials up to `few`, in whole numbers
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n) if n else 1.0


@dataclass(frozen=True)
class Paired:
    """One model minus another on the same n rows; `better` and `worse` count the rows. `p`: two-sided, that they are alike."""
    metric: str
    difference: float
    interval: tuple[float, float] | None
    p: float
    n: int
    better: int
    worse: int
    test: str

    def plain(self) -> dict:
        return {"metric": self.metric, "difference": self.difference, "interval": list(self.interval) if self.interval else None,
                "p": self.p, "n": self.n, "better": self.better, "worse": self.worse, "test": self.test}


def paired(metric: str, a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], value: Callable[[Sequence[float]], float],
           lower: bool = False, seed: int = 0) -> Paired:
    """a minus b, row by row: exact McNemar where every row is right or wrong, else a paired bootstrap (Koehn 2004).

    a, b: the rows' statistics, (N, K); `value` turns their sum into the score; `lower`: less is better.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} rows and {len(b)} rows are no pairs")
    if not len(a):
        raise ValueError("no rows to compare")
    ta, tb = (torch.tensor(s, dtype=torch.float64) for s in (a, b))
    rows = [(value(x), value(y)) for x, y in zip(ta.tolist(), tb.tolist(), strict=True)]
    better, worse = sum((x < y) if lower else (x > y) for x, y in rows), sum((x > y) if lower else (x < y) for x, y in rows)
    difference = value(ta.sum(0).tolist()) - value(tb.sum(0).tolist())
    drawn = sorted(value(x) - value(y) for x, y in zip(resampled(ta, seed).tolist(), resampled(tb, seed).tolist(), strict=True))
    interval = (drawn[int(0.025 * DRAWS)], drawn[math.ceil(0.975 * DRAWS) - 1]) if len(rows) > 1 else None
    if metric == "accuracy":
        return Paired(metric, difference, interval, mcnemar(better, worse), len(rows), better, worse, "exact McNemar")
    tail = min(sum(d <= 0 for d in drawn), sum(d >= 0 for d in drawn))
    p = min(1.0, 2 * (tail + 1) / (DRAWS + 1))
    return Paired(metric, difference, interval, p, len(rows), better, worse, "paired bootstrap")
