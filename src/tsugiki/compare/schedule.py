"""Which runs a study needs next: a pure function of the results so far, so that a stop, or a second process, changes nothing."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tsugiki.compare.study import Cell, Study, Variant, alone
from tsugiki.evaluate.metrics import LOWER
from tsugiki.methods import METHODS


@dataclass(frozen=True)
class Lengths:
    """What rates and lengths depend on besides the study: the base's width, and each data set's steps."""
    width: int
    steps: Mapping[str, int]


@dataclass(frozen=True)
class Choice:
    """A method on a data set: the rates tried, the one taken (None while open, or where all failed), whether it is an edge."""
    tried: tuple[Cell, ...]
    lr: float | None
    missing: tuple[Cell, ...]
    edge: str = ""                                    # "lowest" or "highest" of the rates tried


def grid(study: Study, variant: Variant, width: int) -> list[float]:
    """The rates to begin with, rising."""
    if study.rates:
        return sorted(study.rates)
    return sorted({_round(METHODS[variant.method].rate(width) * f) for f in study.factors})


def _round(rate: float) -> float:
    return float(f"{rate:.2g}")


def choice(study: Study, data: str, variant: Variant, results: Mapping[str, dict], lengths: Lengths) -> Choice:
    """The rate of a method: searched with the first seed, on the validation rows alone."""
    rates, tried = grid(study, variant, lengths.width), []
    whole = lengths.steps[data]
    if len(rates) == 1 and (study.rates or not study.extend):
        return Choice((), rates[0], ())
    rungs = math.ceil(math.log2(len(rates))) if study.search == "halving" else 0
    steps = max(1, math.ceil(whole / 2 ** rungs))
    for more in range(study.extend + 1):
        cells = [Cell(data, variant, rate, study.seeds[0], steps) for rate in sorted(rates)]
        if missing := tuple(c for c in cells if c.key not in results):
            return Choice(tuple(cells), None, missing)
        best = ranked(study, cells, results)
        lr = best[0].lr if best else min(rates)       # where all diverged, the way out is down
        further = None if study.rates or more == study.extend else beyond(lr, sorted(rates))
        if further is None:
            break
        rates.append(further)
    tried, alive = list(cells), best
    for rung in range(rungs - 1, 0, -1):
        half = max(1, math.ceil(len(rates) / 2 ** (rungs - rung)))
        longer = [Cell(data, variant, c.lr, c.seed, math.ceil(whole / 2 ** rung)) for c in alive[:half]]
        if missing := tuple(c for c in longer if c.key not in results):
            return Choice((*tried, *longer), None, missing)
        tried, alive = [*tried, *longer], ranked(study, longer, results)
    if not alive:
        return Choice(tuple(tried), None, ())
    lr = alive[0].lr
    edge = "lowest" if lr == min(rates) else "highest" if lr == max(rates) else ""
    return Choice(tuple(tried), lr, (), edge if len(rates) > 1 else "")


def beyond(lr: float, rates: list[float]) -> float | None:
    """The next rate outside the grid where `lr` is its edge, by the grid's own last step (or a factor 3)."""
    ratio = rates[1] / rates[0] if len(rates) > 1 else 3.0
    if lr == rates[-1]:
        return _round(lr * (rates[-1] / rates[-2] if len(rates) > 1 else 3.0))
    return _round(lr / ratio) if lr == rates[0] else None


def ranked(study: Study, cells: list[Cell], results: Mapping[str, dict]) -> list[Cell]:
    """Those that did not fail, the best on the validation rows first; equal ones, the lower rate first."""
    def worth(cell: Cell) -> tuple:
        found = results[cell.key]["validation"]
        loss, value = found["loss"], found[found["metric"]]
        if study.select == "metric":
            return value if found["metric"] in LOWER else -value, loss, cell.lr
        return loss, cell.lr
    return sorted((c for c in cells if "failed" not in results[c.key]), key=worth)


def finals(study: Study, data: str, variant: Variant, lr: float, lengths: Lengths) -> list[Cell]:
    """The runs that are reported: the chosen rate, every seed, scored on the test rows."""
    return [Cell(data, variant, lr, seed, lengths.steps[data], test=True) for seed in study.seeds]


def done(cell: Cell, results: Mapping[str, dict]) -> bool:
    found = results.get(cell.key)
    return found is not None and ("failed" in found or not cell.test or "test" in found)


def pending(study: Study, results: Mapping[str, dict], lengths: Lengths) -> list[Cell]:
    """The cells that can run now, in order: data set by data set, method by method."""
    found = []
    for data in study.names():
        found += [c for c in (alone(data),) if not done(c, results)]
        for variant in study.variants():
            chosen = choice(study, data, variant, results, lengths)
            found += chosen.missing
            if chosen.lr is not None:
                found += [c for c in finals(study, data, variant, chosen.lr, lengths) if not done(c, results)]
    return found


def expected(study: Study, results: Mapping[str, dict], lengths: Lengths) -> list[Cell]:
    """The cells still to run as far as can be told now: open searches in their first size, and the final runs after them."""
    found = []
    for data in study.names():
        found += [c for c in (alone(data),) if not done(c, results)]
        for variant in study.variants():
            chosen, whole = choice(study, data, variant, results, lengths), lengths.steps[data]
            found += chosen.missing
            if chosen.lr is not None:
                found += [c for c in finals(study, data, variant, chosen.lr, lengths) if not done(c, results)]
            elif chosen.missing:
                in_full = chosen.missing[0].steps == whole
                found += [Cell(data, variant, 0.0, s, whole, True) for s in study.seeds[1 if in_full else 0:]]
                if not in_full:
                    rungs = round(math.log2(whole / chosen.missing[0].steps))
                    found += [Cell(data, variant, 0.0, study.seeds[0], math.ceil(whole / 2 ** r))
                              for r in range(rungs - 1, 0, -1) for _ in range(2 ** r)]
    return found
