"""The report of a run: one HTML file that needs nothing else, from plain data of which any part may be missing."""
from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from tsugiki.evaluate.metrics import LOWER, TEXTS
from tsugiki.train.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, as_float, chart, short
from tsugiki.train.scoring import SCORES

TEMPLATE = Path(__file__).with_name("report.html.j2")
STYLE = Path(__file__).with_name("style.css.j2")     # of this page and of a study's
LOSSES = ("train loss", "held-out loss")             # drawn in one chart; every other curve has its own
CURVES = {"loss": "train loss", "lr": "learning rate", "norm": "gradient norm", "tokens_per_second": "tokens/s"}
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def write_report(path: str | Path, run: Mapping) -> None:
    """Write `run` as a self-contained HTML page to `path`, which is replaced only when the page is complete.

    Keys of `run`, all optional: title, summary {label: value}, config (nested), curves {name: [(step, value)]},
    parameters {total, trainable, share, rows: [{site, count}]}, samples [{prompt, expected, before, after}],
    before_after {metric: {before, after, n, interval: [low, high]}}, environment {label: value}.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.partial"):              # by a process that was killed as it wrote
        left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(render(run).encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def render(run: Mapping) -> str:
    """The page as text."""
    curves = run.get("curves") or {}
    groups: dict[str, dict] = {"Loss": {name: curves[name] for name in LOSSES if name in curves}}
    for name, points in curves.items():
        kind, _, source = name.partition(" on ")
        if kind in LOSSES and source:                 # of one source of several
            groups.setdefault(f"Loss on {source}", {})[kind] = points
        elif name not in LOSSES:
            groups[name[:1].upper() + name[1:]] = {name: points}
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


def curves_of(lines: Iterable[Mapping], scores: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
    """The curves of metrics.jsonl's lines; those of a source of several are named "train loss on NAME".

    scores: key of an evaluation -> its curve's name; other keys are not drawn.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        found = [(name, line[key]) for key, name in CURVES.items() if key in line]
        found += [(f"train loss on {name}", s["loss"]) for name, s in line.get("sources", {}).items() if s["supervised"]]
        found += [(scores[key], value) for key, value in line.get("eval", {}).items() if key in scores]
        found += [(f"held-out loss on {name}", s["loss"]) for name, s in line.get("eval_sources", {}).items()]
        for name, value in found:
            curves.setdefault(name, []).append((line["step"], value))
    return curves


def table_of(before: Mapping, after: Mapping, sources_before: Mapping, sources_after: Mapping) -> dict:
    """Scores before and after, of the data and of each source whose held-out text was watched."""
    table = {key: {"before": before.get(key), "after": after.get(key), "n": after.get("n") if key != "held_out_loss" else None,
                   "interval": after.get("interval") if key == after.get("metric") else None}
             for key in SCORES if key in after}
    return table | {f"{key} on {name}": {"before": sources_before[name][key], "after": s[key], "n": s["n"]}
                    for name, s in sources_after.items() for key in ("loss", "perplexity")}


@cache
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
    if interval and metric not in (*LOWER, *TEXTS) and all(0 <= end <= 1 for end in (*interval, after)):
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
