"""The report of a study: one HTML file that needs nothing else, from the table and what is said about it."""
from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from tsugiki.compare import plots
from tsugiki.compare.plots import Point
from tsugiki.compare.stats import LEVEL
from tsugiki.compare.table import DataTable, Row, Table
from tsugiki.train.report import digits as of_number
from tsugiki.train.report import exact, flat, page

TEMPLATE = Path(__file__).with_name("page.html.j2")


def render(table: Table, about: Mapping) -> str:
    """The page as text. about: protocol (sentences), environment, study (plain), samples {data: [(prompt, expected)]}."""
    parts = [section(d, about["samples"].get(d.name, [])) for d in table.data]
    names = [d.name for d in table.data]
    overall = [(label, f"{place:.2f}", [digits(v) for v in values]) for label, place, values in table.overall()]
    return page(TEMPLATE).render(
        title="Which method?", sections=parts, names=names, overall=overall if len(names) > 1 else [],
        failures=table.failures, still=table.open, protocol=about["protocol"],
        facts=[("base", exact(about["study"]["run"].get("base", "embedded"))), ("data sets", str(len(names))),
               ("methods", str(max((len(d.rows) for d in table.data), default=0))), ("runs", f"{len(table.runs):,}"),
               ("failed", str(len(table.failures)))],
        settings=[(key, exact(value)) for key, value in flat(about["study"]) if value not in (None, [], {})],
        environment=[(key, exact(value)) for key, value in flat(about["environment"])],
        frame={"width": plots.WIDTH, "height": plots.HEIGHT, "left": plots.LEFT, "right": plots.RIGHT, "top": plots.TOP,
               "bottom": plots.BOTTOM, "names": plots.NAMES},
        small={"width": plots.SMALL[0], "height": plots.SMALL[1], "left": plots.SMALL_FRAME[0], "right": plots.SMALL_FRAME[1],
               "top": plots.SMALL_FRAME[2], "bottom": plots.SMALL_FRAME[3]})


def section(data: DataTable, samples: list) -> dict:
    """What the page shows of one data set."""
    rows = [r for r in data.rows if r.score is not None]
    best = [r.label for r in rows if r.rank[0] == 1]
    return {"name": data.name, "metric": data.metric, "n": data.n, "verdict": verdict(data, rows),
            "ranking": plots.ranking([point(r, 0.0) for r in rows], best, data.base["score"] if data.base else None, digits),
            "rows": [line(r) for r in data.rows], "forgot": any(r.forgetting for r in data.rows),
            "scatters": [s for s in scatters(data, rows) if s],
            "curves": plots.multiples({label: [(p["tokens"], p["loss"]) for p in points if p["step"]]
                                       for label, points in data.curves.items()}, False, {}, digits),
            "sweeps": sweeps(data), "equal_time": equal_time(data), "seconds": f"{data.seconds:.3g}",
            "equal_parameters": [line(r) for r in rows if r.label in data.equal_parameters],
            "budget": f"{data.budget:,}" if data.budget else "", "pairs": pairs(data, rows), "samples": side_by_side(data, samples)}


def verdict(data: DataTable, rows: list[Row]) -> str:
    """The result in a sentence."""
    if not rows:
        return "No run has finished yet, or all failed."
    first, tied = rows[0], [r.label for r in rows if r.tie]
    said = f"{first.label} is ahead with {data.metric} {digits(first.score.value)}"
    if interval := first.score.interval:
        said += f" (95 % interval {digits(interval[0])} to {digits(interval[1])})"
    if data.base and data.base["score"] is not None:
        said += f"; the base alone has {digits(data.base['score'])}"
    if len(rows) == 1:
        return said + "."
    if len(tied) == len(rows) - 1:
        return said + ". No difference between the methods is significant."
    return said + (f". Not told apart from it: {', '.join(tied)}." if tied else ". Every other method is significantly behind.")


def point(row: Row, x: float) -> Point:
    low, high = row.score.interval or (None, None)
    return Point(row.label, x, row.score.value, low, high)


def scatters(data: DataTable, rows: list[Row]) -> list:
    """Score against what it costs."""
    costs = {"trained parameters": lambda r: float(r.trainable),
             "peak memory, MB": lambda r: r.measured["memory_bytes"] / 2 ** 20,
             "seconds of training": lambda r: r.measured["seconds"],
             "forgetting, nats a token": lambda r: r.forgetting.value if r.forgetting else math.nan}
    found = []
    for name, cost in costs.items():
        points = [point(r, cost(r)) for r in rows]
        known = [p.x for p in points if math.isfinite(p.x)]
        log = bool(known) and min(known) > 0 and max(known) > 5 * min(known)
        found.append(plots.scatter(f"{data.metric} and {name.partition(',')[0]}", name, points, data.larger, log, digits))
    return found


def sweeps(data: DataTable):
    """Validation loss by rate, the chosen one marked; none where no rate was searched."""
    several = {label: points for label, points in data.sweeps.items() if len(points) > 1}
    chosen = {r.label: r.lr for r in data.rows if r.lr is not None}
    return plots.multiples(several, True, chosen, digits) if several else None


def line(row: Row) -> dict:
    """A row of the ranking's table."""
    if row.score is None:
        return {"label": row.label, "failed": row.failed[0] if row.failed else "failed"}
    low, high = row.rank
    interval = row.score.interval
    return {"label": row.label, "failed": "", "place": f"{low}" if low == high else f"{low}–{high}", "tie": row.tie,
            "score": digits(row.score.value),
            "interval": f"{digits(interval[0])} to {digits(interval[1])}" if interval else "unknown",
            "loss": digits(row.loss), "rate": f"{row.lr:g}", "edge": row.edge, "trained": f"{row.trainable:,}",
            "share": f"{row.trainable / row.total:.2%}", "forgetting": f"{row.forgetting.value:+.3f}" if row.forgetting else "–",
            "seeds": f"{row.seeds}" + (f", {len(row.failed)} failed" if row.failed else ""),
            "seconds": f"{row.measured['seconds']:.3g}", "memory": f"{row.measured['memory_bytes'] / 2 ** 20:,.0f}"}


def equal_time(data: DataTable) -> list[tuple[str, str, float]]:
    """(label, validation loss at the same seconds, share of a bar), the least loss first."""
    found = sorted((item for item in data.equal_time.items() if math.isfinite(item[1])), key=lambda item: item[1])
    most = max((v for _, v in found), default=1.0)
    return [(label, digits(v), round(100 * v / most, 1) if most > 0 else 0.0) for label, v in found] if len(found) > 1 else []


def pairs(data: DataTable, rows: list[Row]) -> list[tuple[str, list[dict]]]:
    """The table of all pairs: of each row's method minus each column's."""
    def cell(a: str, b: str) -> dict:
        if a == b:
            return {"text": "", "kind": "self", "p": ""}
        value, p = data.pairs[a, b]
        if p is None:
            return {"text": "?", "kind": "", "p": "cannot be tested"}
        better = (value > 0) == data.larger
        kind = "" if p >= LEVEL else "good" if better else "bad"
        return {"text": ("=" if p >= LEVEL else "+" if better else "−"), "kind": kind, "p": f"{value:+.3f}, p {p:.2g}"}
    labels = [r.label for r in rows]
    return [(a, [cell(a, b) for b in labels]) for a in labels] if len(labels) > 1 else []


def side_by_side(data: DataTable, samples: list) -> list[dict]:
    """The same test rows answered by the base and by each method with its first seed."""
    found = []
    for i, (prompt, expected) in enumerate(samples):
        given = [(label, said.strip(), said.strip() == expected.strip() if right is None and data.metric == "accuracy" else right)
                 for label, answers in data.answers.items() for said, right in answers[i:i + 1]]
        if given:
            found.append({"prompt": prompt.strip(), "expected": expected.strip(), "answers": given})
    return found


def digits(value: float | None) -> str:
    """Three decimals for a score, four digits for anything larger."""
    return of_number(math.nan if value is None else value)
