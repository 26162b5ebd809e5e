"""Means with intervals and paired tests over test rows and seeds: both spreads count, as both would differ another time."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.05
METHOD = ("Intervals are at 95 %. A score is the mean over seeds and test rows; its variance is that of the rows' means over rows "
          "plus that of the seeds' means over seeds (each counts what they share, so the sum is, if anything, too large), and the "
          "interval is Student's t with Satterthwaite's degrees of freedom. A few seeds say little of their spread, so it is taken "
          "from all methods together, or from the method's own seeds where that is larger. Two methods are compared by the same "
          "test on the differences, row by row and seed by seed (where a metric gives no number a row, as corpus BLEU, by "
          "seeds alone); p values are Holm-corrected over all pairs of a data set. Two methods whose corrected p is at least 0.05 "
          "are tied.")
Matrix = Sequence[Sequence[float]]                    # (seeds, rows)


@dataclass(frozen=True)
class Mean:
    """A mean, its standard error and degrees of freedom; nan where one seed without rows leaves the spread unknown."""
    value: float
    error: float
    df: float
    seeds: int
    rows: int

    @property
    def interval(self) -> tuple[float, float] | None:
        if not math.isfinite(self.error):
            return None
        half = self.error * quantile(1 - LEVEL / 2, self.df)
        return self.value - half, self.value + half

    @property
    def p(self) -> float | None:
        """Two-sided, of the mean being zero; None where the spread is unknown."""
        if not math.isfinite(self.error):
            return None
        if self.error == 0:
            return 1.0 if self.value == 0 else 0.0
        return 2 * tail(abs(self.value) / self.error, self.df)


@dataclass(frozen=True)
class Pool:
    """The spread of seeds that several methods share, each giving its own estimate: their mean, and its degrees of freedom."""
    variance: float
    df: int


def pool(tables: Mapping[str, Mapping[int, Sequence[float]]]) -> Pool | None:
    """Of methods with two seeds or more; None where there is none. Three seeds alone say next to nothing of a spread."""
    means = [[sum(rows) / len(rows) for rows in seeds.values()] for seeds in tables.values() if len(seeds) > 1]
    df = sum(len(m) - 1 for m in means)
    return Pool(sum(variance(m) * (len(m) - 1) for m in means) / df, df) if df else None


def mean_of(values: Matrix, shared: Pool | None = None) -> Mean:
    """The mean of (seeds, rows) numbers, both drawn: two-way random effects, moment estimates, no interaction taken off.

    The seeds' variance is their own or that of `shared`, whichever is larger, with the degrees of freedom of `shared`.
    """
    seeds, rows = len(values), len(values[0])
    by_seed = [sum(row) / rows for row in values]
    by_row = [sum(values[s][r] for s in range(seeds)) / seeds for r in range(rows)]
    value = sum(by_seed) / seeds
    own = variance(by_seed) if seeds > 1 else 0.0
    parts = [(spread(by_row) / rows, rows - 1)] if rows > 1 else []
    if shared is not None:
        parts.append((max(own, shared.variance) / seeds, shared.df))
    elif seeds > 1:
        parts.append((own / seeds, seeds - 1))
    if not parts:
        return Mean(value, math.nan, 0, seeds, rows)
    total = sum(v for v, _ in parts)
    df = total * total / sum(v * v / n for v, n in parts) if total else parts[0][1]
    return Mean(value, math.sqrt(total), df, seeds, rows)


def seeds_only(scores: Sequence[float]) -> Mean:
    """The mean of one score a seed: the rows' spread is not in it."""
    return mean_of([[s] for s in scores])


def difference(a: Matrix, b: Matrix, shared: Pool | None = None) -> Mean:
    """The mean of a - b, paired in rows and seeds. shared: of one method; a difference has twice its variance."""
    twice = shared and Pool(2 * shared.variance, shared.df)
    return mean_of([[x - y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)], twice)


def spread(values: Sequence[float]) -> float:
    """The variance; of nothing but zeros or nothing but ones, that of a share with two of each added (Agresti and Coull 1998):
    twelve right answers of twelve do not say that the next one will be right."""
    if set(values) in ({0.0}, {1.0}):
        n = len(values)
        p = 2 / (n + 4)
        return p * (1 - p) * n / (n + 4)
    return variance(values)


def variance(values: Sequence[float]) -> float:
    middle = sum(values) / len(values)
    return sum((v - middle) ** 2 for v in values) / (len(values) - 1)


def holm(p: Mapping[tuple, float]) -> dict[tuple, float]:
    """Corrected p values (Holm 1979)."""
    found, most = {}, 0.0
    for rank, (key, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        most = max(most, min(1.0, (len(p) - rank) * value))
        found[key] = most
    return found


def compared(tables: Mapping[str, Mapping[int, Sequence[float]]]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Of each pair of names: (mean difference, corrected p), both ways round; p None where it cannot be tested.

    tables: by name, the rows of each seed. A pair is compared on the seeds that both have.
    """
    names, tests, shared = list(tables), {}, pool(tables)
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            if both := [s for s in tables[a] if s in tables[b]]:
                tests[a, b] = difference([tables[a][s] for s in both], [tables[b][s] for s in both], shared)
    corrected = holm({pair: p for pair, t in tests.items() if (p := t.p) is not None})
    found = {}
    for i, a in enumerate(names):
        for b in names[i + 1:]:
            value, p = tests[a, b].value if (a, b) in tests else math.nan, corrected.get((a, b))
            found[a, b], found[b, a] = (value, p), (-value, p)
    return found


def ranks(names: Sequence[str], pairs: Mapping[tuple[str, str], tuple[float, float | None]],
          larger: bool) -> dict[str, tuple[int, int]]:
    """The best and the worst place that each may have: only a difference that is not a tie moves it."""
    def beats(a: str, b: str) -> bool:
        value, p = pairs[a, b]
        return p is not None and p < LEVEL and (value > 0 if larger else value < 0)
    return {a: (1 + sum(beats(b, a) for b in names if b != a), len(names) - sum(beats(a, b) for b in names if b != a))
            for a in names}


def tail(t: float, df: float) -> float:
    """P(T > t) of Student's t, t >= 0."""
    return incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2


def quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p, for p above one half."""
    return bisected(lambda t: tail(t, df) - (1 - p), 0.0, 1e4)


def bisected(f: Callable[[float], float], low: float, high: float) -> float:
    """The zero of a falling function."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised, by the continued fraction (Numerical Recipes 6.4, modified Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    f, c, d = 1.0, 1.0, 0.0
    for i in range(400):
        m = i // 2
        step = 1.0 if i == 0 else (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)) if i % 2 == 0
                                   else -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)))
        d = 1 / (1 + step * d if abs(1 + step * d) > tiny else tiny)
        c = 1 + step / c if abs(1 + step / c) > tiny else tiny
        f *= c * d
        if abs(1 - c * d) < 1e-15 and i:
            break
    return front * (f - 1)
