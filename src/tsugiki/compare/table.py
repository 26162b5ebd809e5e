"""The table of a study: a pure function of its results. What a clock or a memory meter said is kept apart as `measured`."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from tsugiki.compare.schedule import Choice, Lengths, choice, finals
from tsugiki.compare.sizes import equal_parameters
from tsugiki.compare.stats import Mean, Pool, compared, mean_of, pool, ranks, seeds_only
from tsugiki.compare.study import Cell, Study, Variant, alone
from tsugiki.evaluate.metrics import LOWER

SAME = 1e-4                                           # how far the mean of a score's rows may be from the score


@dataclass(frozen=True)
class Row:
    """One method on one data set, at its chosen rate, over its seeds."""
    variant: Variant
    lr: float | None
    edge: str
    score: Mean | None                                # None: every run failed, or none is there yet
    loss: float
    validation: float
    trainable: int
    total: int
    forgetting: Mean | None
    failed: tuple[str, ...]                           # of the final runs, "seed 1: why"
    seeds: int
    rank: tuple[int, int] = (0, 0)
    tie: bool = False                                 # with the best
    measured: dict = field(default_factory=dict)      # seconds, memory

    @property
    def label(self) -> str:
        return self.variant.label

    def plain(self) -> dict:
        found = {"method": self.label, "rate": self.lr, "edge": self.edge, "seeds": self.seeds, "failed": list(self.failed),
                 "trainable": self.trainable, "share": self.trainable / self.total if self.total else 0.0}
        if self.score is not None:
            found |= {"score": self.score.value, "interval": list(self.score.interval or ()), "loss": self.loss,
                      "validation_loss": self.validation, "rank": list(self.rank), "tied_with_best": self.tie}
        if self.forgetting is not None:
            found |= {"forgetting": self.forgetting.value, "forgetting_interval": list(self.forgetting.interval or ())}
        return found | {"measured": self.measured}


@dataclass(frozen=True)
class DataTable:
    """All methods on one data set, the best first."""
    name: str
    metric: str
    n: int
    base: dict | None                                 # {score, loss, general}
    rows: tuple[Row, ...]
    pairs: Mapping[tuple[str, str], tuple[float, float | None]]
    curves: Mapping[str, tuple[dict, ...]]            # by label: validation loss along the run, mean over seeds
    sweeps: Mapping[str, tuple[tuple[float, float], ...]]        # by label: (rate, validation loss) of the runs that chose
    answers: Mapping[str, tuple[tuple[str, bool | None], ...]]        # by label: what was answered, whether it is right
    equal_time: Mapping[str, float]                   # by label: validation loss at `seconds` of training
    seconds: float
    equal_parameters: tuple[str, ...]                 # labels, nearest to the budget
    budget: int | None                                # trained parameters: the study's, or the middle one's of several sizes

    @property
    def larger(self) -> bool:
        return self.metric not in LOWER

    def plain(self) -> dict:
        return {"metric": self.metric, "n": self.n, "base": self.base, "methods": [r.plain() for r in self.rows],
                "pairs": [{"a": a, "b": b, "difference": d, "p": p} for (a, b), (d, p) in self.pairs.items()],
                "equal_parameters": list(self.equal_parameters),
                "measured": {"seconds": self.seconds, "validation_loss_then": dict(self.equal_time)}}


@dataclass(frozen=True)
class Table:
    """A study's results."""
    data: tuple[DataTable, ...]
    runs: tuple[dict, ...]                            # every run, search and final, one flat row each
    failures: tuple[str, ...]
    open: int                                         # methods on data sets that are not finished

    def plain(self) -> dict:
        return {"data": {d.name: d.plain() for d in self.data}, "runs": len(self.runs), "failures": list(self.failures),
                "open": self.open}

    def overall(self) -> list[tuple[str, float, list[float | None]]]:
        """(label, mean place, score on each data set), the best first; only methods that every data set has a score of."""
        found = []
        labels = [r.label for r in self.data[0].rows] if self.data else []
        for label in labels:
            rows = [next((r for r in d.rows if r.label == label), None) for d in self.data]
            if all(r is not None and r.score is not None for r in rows):
                places = [_place(d, r) for d, r in zip(self.data, rows, strict=True)]
                found.append((label, sum(places) / len(places), [r.score.value for r in rows]))
        return sorted(found, key=lambda item: (item[1], item[0]))


def _place(data: DataTable, row: Row) -> float:
    """The middle of the places that a row may have: tied methods share theirs."""
    return (row.rank[0] + row.rank[1]) / 2


def tabled(study: Study, results: Mapping[str, dict], lengths: Lengths) -> Table:
    """The table of what is there; a method without results yet is left out and counted as open."""
    tables, runs, failures, still = [], [], [], 0
    for data in study.names():
        chosen = {v.label: choice(study, data, v, results, lengths) for v in study.variants()}
        last = {v.label: finals(study, data, v, c.lr, lengths) if (c := chosen[v.label]).lr is not None else []
                for v in study.variants()}
        still += sum(bool(chosen[label].missing) or any(c.key not in results for c in cells) for label, cells in last.items())
        tables.append(_of_data(study, data, chosen, last, results))
        for v in study.variants():
            for cell in {c.key: c for c in (*chosen[v.label].tried, *last[v.label])}.values():
                if cell.key in results:
                    runs.append(flat(cell, results[cell.key], any(c.key == cell.key for c in last[v.label])))
    failures += [f"{r['data']}, {r['method']}, rate {r['rate']:g}, seed {r['seed']}: {r['failed']}" for r in runs if r["failed"]]
    failures += [f"{d}, the base alone: {results[alone(d).key]['failed']}" for d in study.names()
                 if "failed" in results.get(alone(d).key, {})]
    return Table(tuple(tables), tuple(runs), tuple(failures), still)


def flat(cell: Cell, result: Mapping, final: bool) -> dict:
    """One run as one row; the last two columns are measured."""
    test = result.get("test", {})
    return {"data": cell.data, "method": cell.variant.label, "rate": cell.lr, "seed": cell.seed, "steps": cell.steps,
            "part": "final" if final else "search", "failed": result.get("failed", ""), "trainable": result.get("trainable"),
            "tokens": result.get("tokens"), "validation_loss": result.get("validation", {}).get("loss"),
            "metric": test.get("metric"), "score": test.get(test["metric"]) if test else None, "n": test.get("n"),
            "test_loss": test.get("loss"), "general_loss": result.get("general"),
            "seconds": result.get("seconds"), "peak_memory_bytes": result.get("memory")}


def _of_data(study: Study, data: str, chosen: Mapping[str, Choice], last: Mapping[str, list[Cell]],
             results: Mapping[str, dict]) -> DataTable:
    base = results.get(alone(data).key, {})
    good = {label: [(c, results[c.key]) for c in cells if "test" in results.get(c.key, {})] for label, cells in last.items()}
    there = [r for runs in good.values() for _, r in runs]
    metric = there[0]["test"]["metric"] if there else base.get("test", {}).get("metric", "loss")
    tables = scores_by_seed({label: runs for label, runs in good.items() if runs}, metric)
    pairs = compared(tables)
    places = ranks(list(tables), pairs, metric not in LOWER)
    rows = [_row(v, chosen[v.label], last[v.label], good[v.label], results, tables.get(v.label), base,
                 places.get(v.label, (0, 0)), pool(tables)) for v in study.variants()
            if good[v.label] or any("failed" in results.get(c.key, {}) for c in (*chosen[v.label].tried, *last[v.label]))]
    sign = -1 if metric not in LOWER else 1
    rows.sort(key=lambda r: (r.score is None, sign * r.score.value if r.score else 0, r.label))
    if rows and rows[0].score:
        rows = [_tied(r, rows[0].label, pairs) for r in rows]
    curves = {r.label: mean_curve([x["curve"] for _, x in good[r.label]]) for r in rows if good[r.label]}
    seconds = min((points[-1]["seconds"] for points in curves.values() if points), default=0.0)
    answers = {"base": base.get("test", {})} | {r.label: good[r.label][0][1]["test"] for r in rows if good[r.label]}
    counts = [(r.variant, r.trainable) for r in rows if r.score]
    several = len({v.method for v, _ in counts}) < len(counts)
    budget = study.parameters or (sorted(n for _, n in counts)[len(counts) // 2] if several else None)
    equal = {v.label for v in equal_parameters(counts, budget).values()} if budget else set()
    return DataTable(data, metric, there[0]["test"]["n"] if there else 0, _base(base, metric), tuple(rows), pairs, curves,
                     {label: sweep(c, results) for label, c in chosen.items()},
                     {label: tuple(zip_longest(test.get("answers", ()), test.get("right", ()))) for label, test in answers.items()},
                     {label: at(points, seconds) for label, points in curves.items()}, seconds,
                     tuple(r.label for r in rows if r.label in equal), budget)


def _base(base: Mapping, metric: str) -> dict | None:
    if "test" not in base:
        return None
    return {"score": base["test"].get(metric), "loss": base["test"]["loss"]} | (
        {"general": base["general"]} if "general" in base else {})


def scores_by_seed(good: Mapping[str, Sequence[tuple[Cell, dict]]], metric: str) -> dict[str, dict[int, list[float]]]:
    """By label and seed: a number a test row where the score is their mean, of all methods; else one number a seed."""
    tests = {label: {c.seed: r["test"] for c, r in runs} for label, runs in good.items()}
    every = [test for seeds in tests.values() for test in seeds.values()]
    length = len(every[0].get("rows") or ()) if every else 0
    fits = length and all(len(t.get("rows") or ()) == length and
                          abs(sum(t["rows"]) / length - t[metric]) <= SAME * max(1, abs(t[metric])) for t in every)
    return {label: {s: t["rows"] if fits else [t[metric]] for s, t in seeds.items()} for label, seeds in tests.items()}


def _row(variant: Variant, chosen: Choice, cells: Sequence[Cell], good: Sequence[tuple[Cell, dict]], results: Mapping[str, dict],
         scores: Mapping[int, list[float]] | None, base: Mapping, places: tuple[int, int],
         shared: Pool | None) -> Row:
    found, n = [r for _, r in good], max(1, len(good))
    failed = [f"seed {c.seed}: {results[c.key]['failed']}" for c in cells if "failed" in results.get(c.key, {})]
    if not cells and not chosen.missing:
        failed = [f"every rate failed; at {c.lr:g}: {results[c.key]['failed']}" for c in chosen.tried[:1]]
    general = [r["general"] - base["general"] for r in found if "general" in r] if "general" in base else []
    measured = {}
    if found:
        measured = {"seconds": sum(r["seconds"] for r in found) / n, "memory_bytes": max(r["memory"] for r in found)}
    return Row(variant, chosen.lr, chosen.edge, mean_of(list(scores.values()), shared) if scores else None,
               sum(r["test"]["loss"] for r in found) / n if found else math.nan,
               sum(r["validation"]["loss"] for r in found) / n if found else math.nan,
               found[0]["trainable"] if found else 0, found[0]["total"] if found else 0,
               seeds_only(general) if general else None, tuple(failed), len(good), places, False, measured)


def _tied(row: Row, best: str, pairs: Mapping) -> Row:
    tie = row.score is not None and row.label != best and row.rank[0] == 1
    return Row(**vars(row) | {"tie": tie})


def mean_curve(curves: Sequence[Sequence[dict]]) -> tuple[dict, ...]:
    """Point by point over seeds, as far as all of them go."""
    return tuple({key: sum(p[key] for p in points) / len(points) for key in ("step", "tokens", "seconds", "loss")}
                 for points in zip(*curves, strict=False))


def at(points: Sequence[dict], seconds: float) -> float:
    """The loss at that time, on the line between the two points around it."""
    for before, after in zip(points, points[1:], strict=False):
        if after["seconds"] >= seconds:
            share = (seconds - before["seconds"]) / max(1e-9, after["seconds"] - before["seconds"])
            return before["loss"] + min(1.0, max(0.0, share)) * (after["loss"] - before["loss"])
    return points[-1]["loss"] if points else math.nan


def sweep(chosen: Choice, results: Mapping[str, dict]) -> tuple[tuple[float, float], ...]:
    """(rate, validation loss) of the searching runs; nan for one that failed. Of several lengths, the longest of a rate."""
    found = {}
    for cell in chosen.tried:
        if cell.key in results:
            found[cell.lr] = results[cell.key].get("validation", {}).get("loss", math.nan)
    return tuple(sorted(found.items()))
