"""The report of a run: one HTML file that needs nothing else, from plain data of which any part may be missing."""
from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup

from tsugiki.train.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, as_float, chart, short

TEMPLATE = Path(__file__).with_name("report.html.j2")
STYLE = Path(__file__).with_name("style.css.j2")     # of this page and of a study's
LOSSES = ("train loss", "held-out loss")             # drawn in one chart; every other curve has its own
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def write_report(path: str | Path, run: Mapping) -> None:
    """Write `run` as a self-contained HTML page to `path`, which is replaced only when the page is complete.

    Keys of `run`, all optional: title, summary {label: value}, config (nested), curves {name: [(step, value)]},
    parameters {total, trainable, share, rows: [{site, count}]}, samples [{prompt, expected, before, after}],
    before_after {metric: {before, after, n, interval: [low, high]}}, environment {label: value}.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(render(run).encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def render(run: Mapping) -> str:
    """The page as text."""
    curves = run.get("curves") or {}
    groups = {"Loss": {name: curves[name] for name in LOSSES if name in curves}}
    groups |= {name[:1].upper() + name[1:]: {name: points} for name, points in curves.items() if name not in LOSSES}
    charts = [made for made in (chart(title, series) for title, series in groups.items()) if made]
    return page(TEMPLATE).render(
        title=run.get("title") or "Training run", charts=charts,
        summary=[(label, shown(value)) for label, value in (run.get("summary") or {}).items()],
        scores=[score(metric, entry or {}) for metric, entry in (run.get("before_after") or {}).items()],
        samples=[sample(entry) for entry in run.get("samples") or []],
        parameters=parameters(run.get("parameters") or {}),
        config=[(key, exact(value)) for key, value in flat(run.get("config") or {})],
        environment=[(key, exact(value)) for key, value in flat(run.get("environment") or {})],
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM})


def page(template: Path) -> jinja2.Template:
    """A template with the pages' style, in which every value is escaped and printable."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True, finalize=printable)
    environment.globals["style"] = Markup(STYLE.read_text(encoding="utf-8"))
    return environment.from_string(template.read_text(encoding="utf-8"))


def printable(value):
    """What a browser may not be given (control characters, halves of a character) becomes a visible mark."""
    if isinstance(value, Markup) or not isinstance(value, str):       # markup is the page's own, its values went through here
        return value
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)


def shown(value) -> str:
    """A value for reading: thousands apart, four digits."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) < 1e30:
        return f"{value:,}"
    if isinstance(value, float):
        return short(value) if math.isfinite(value) else str(value)
    return exact(value)


def exact(value) -> str:
    """A value as it was set: nothing rounded."""
    if isinstance(value, (bool, list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "–" if value is None else str(value)


def flat(values: Mapping, above: str = "") -> list[tuple[str, object]]:
    """Nested {"train": {"lr": 1}} as [("train.lr", 1)], in the order given."""
    pairs = []
    for key, value in values.items():
        name = f"{above}.{key}" if above else str(key)
        pairs += flat(value, name) if isinstance(value, Mapping) and value else [(name, value)]
    return pairs


def score(metric: str, entry: Mapping) -> dict:
    """A row of the before/after table; a proportion with an interval also gets a bar."""
    before, after = as_float(entry.get("before")), as_float(entry.get("after"))
    interval = [as_float(end) for end in entry.get("interval") or ()]
    if len(interval) != 2 or any(map(math.isnan, interval)):
        interval = []
    change = "–" if math.isnan(after - before) else ("−" if after < before else "+") + digits(abs(after - before))
    bar = None
    if interval and all(0 <= end <= 1 for end in (*interval, after)):
        bar = {"before": 100 * before if 0 <= before <= 1 else None, "after": 100 * after,
               "low": 100 * interval[0], "high": 100 * interval[1]}
    return {"metric": metric, "before": digits(before), "after": digits(after), "change": change, "bar": bar,
            "interval": " to ".join(digits(end) for end in interval) or "–", "n": shown(entry.get("n"))}


def digits(value: float) -> str:
    """Three decimals for a score, four digits for anything larger."""
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else short(value)


def sample(entry: Mapping) -> dict:
    """A sample with marks: is the answer the expected one? Space around a text is not shown."""
    texts = {key: None if entry.get(key) is None else str(entry[key]).strip()
             for key in ("prompt", "expected", "before", "after")}
    right = {key: texts["expected"] is not None and texts[key] is not None
             and texts[key] == texts["expected"] for key in ("before", "after")}
    return texts | {"right": right}


def parameters(entry: Mapping) -> dict | None:
    """Counts for the page, or None when nothing is known."""
    total, trainable = entry.get("total"), entry.get("trainable")
    share = as_float(entry.get("share"))
    rows = [(exact(row.get("site")), shown(row.get("count"))) for row in entry.get("rows") or []]
    if total is None and trainable is None and not rows:
        return None
    percent = "–" if math.isnan(share) else f"{100 * share:.3g} %"
    return {"total": shown(total), "trainable": shown(trainable), "percent": percent, "rows": rows,
            "width": 0 if math.isnan(share) else min(100, max(0.5, 100 * share))}
