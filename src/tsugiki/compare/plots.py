"""A study's plots as plain geometry: ranking with intervals, scatter with a front, small multiples. Draws nothing itself."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tsugiki.train.chart import Tick, nice_ticks, path, scale, short, span

WIDTH = 400                                           # of every viewBox but the small ones
LEFT, RIGHT, TOP, BOTTOM, HEIGHT = 50, 386, 14, 262, 306
NAMES, LINE = 146, 25                                 # of the ranking: room for names, height of a line
SMALL = (220, 140)                                    # a small multiple's viewBox
SMALL_FRAME = (42, 212, 10, 112)                      # left, right, top, bottom
CHARACTER, TALL = 7.9, 14.0                           # a label's room: a character's width, its height
LONGEST = 17                                          # characters of a label; a longer one is cut
DOT = 5.0


@dataclass(frozen=True)
class Point:
    """One method: a place, and the interval of its score."""
    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Mark:
    """A point in the viewBox: its whisker, its label with the corner it is read from, and a line to it where it is far."""
    label: str
    shown: str
    x: float
    y: float
    whisker: tuple[float, float] | None
    label_x: float
    label_y: float
    leader: bool
    best: bool                                        # nothing is better in both


@dataclass(frozen=True)
class Scatter:
    title: str
    x_title: str
    about: str
    marks: tuple[Mark, ...]
    front: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Bar:
    label: str
    shown: str
    y: float
    x: float
    whisker: tuple[float, float] | None
    value: str
    best: bool


@dataclass(frozen=True)
class Ranking:
    height: int
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    base: float | None
    about: str


@dataclass(frozen=True)
class Small:
    """One method's curve before all others'."""
    title: str
    path: str
    dots: tuple[tuple[float, float], ...]
    mark: tuple[float, float] | None                  # the chosen one
    note: str


@dataclass(frozen=True)
class Multiples:
    panels: tuple[Small, ...]
    others: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    about: str


def cut(label: str) -> str:
    return label if len(label) <= LONGEST else label[:LONGEST - 1] + "…"


def ranking(points: Sequence[Point], best: Sequence[str], base: float | None, digits) -> Ranking | None:
    """A line a method, in the order given; `y` of a point is its score."""
    if not points:
        return None
    ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None] + ([base] if base is not None else [])
    kept = span(ends, 1e-3)
    ticks = nice_ticks(*kept, 4, outwards=True)
    frame = (ticks[0][0], ticks[-1][0])

    def place(value: float) -> float:
        return round(scale(value, frame, NAMES + 6, RIGHT - 4), 1)
    bars = tuple(Bar(p.label, cut(p.label), 20 + LINE * i, place(p.y), (place(p.low), place(p.high)) if p.low is not None else None,
                     digits(p.y), p.label in best) for i, p in enumerate(points))
    about = "; ".join(f"{p.label} {digits(p.y)}" + (f" ({digits(p.low)} to {digits(p.high)})" if p.low is not None else "")
                      for p in points)
    return Ranking(LINE * len(points) + 44, bars, tuple(Tick(place(v), t) for v, t in ticks), None if base is None else place(base),
                   about + ".")


def scatter(title: str, x_title: str, points: Sequence[Point], larger: bool, log: bool, digits) -> Scatter | None:
    """Points with the front of those that nothing beats in both; less of x is better. None for fewer than two."""
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y) and (p.x > 0 or not log)]
    if len(points) < 2:
        return None
    to = math.log10 if log else float
    xs, x_ticks = _axis([p.x for p in points], log)
    y_range = span([v for p in points for v in (p.y, p.low, p.high) if v is not None], 1e-3)
    y_ticks = nice_ticks(*y_range, 5, outwards=True)
    y_range = (y_ticks[0][0], y_ticks[-1][0])

    def place_x(x: float) -> float:
        return round(scale(to(x), xs, LEFT + 8, RIGHT - 8), 1)

    def place_y(y: float) -> float:
        return round(scale(y, y_range, BOTTOM, TOP), 1)
    front = pareto(points, larger)
    spots = [(place_x(p.x), place_y(p.y)) for p in points]
    labels = labelled(spots, [cut(p.label) for p in points])
    marks = tuple(Mark(p.label, cut(p.label), x, y, (place_y(p.low), place_y(p.high)) if p.low is not None else None, lx, ly,
                       gap(x, y, lx, ly, cut(p.label)) > 2 * DOT, p in front)
                  for p, (x, y), (lx, ly) in zip(points, spots, labels, strict=True))
    line, _ = path([(place_x(p.x), place_y(p.y)) for p in sorted(front, key=lambda p: p.x)])
    about = "; ".join(f"{p.label}: {short(p.x)}, {digits(p.y)}" for p in points)
    return Scatter(title, x_title, f"{about}. Not beaten in both: {', '.join(p.label for p in front)}.", marks, line,
                   tuple(Tick(place_x(v), t) for v, t in x_ticks), tuple(Tick(place_y(v), t) for v, t in y_ticks))


def pareto(points: Sequence[Point], larger: bool) -> list[Point]:
    """Those of which no other has as little x and as good a score, one of the two better."""
    sign = 1 if larger else -1

    def beats(a: Point, b: Point) -> bool:
        return a.x <= b.x and sign * a.y >= sign * b.y and (a.x < b.x or a.y != b.y)
    return [p for p in points if not any(beats(q, p) for q in points)]


def _axis(values: Sequence[float], log: bool) -> tuple[tuple[float, float], list[tuple[float, str]]]:
    """(the range in the axis' own unit, ticks in that of the values)."""
    if not log:
        low, high = span(list(values), 0.05)
        room = 0.06 * (high - low)
        ticks = nice_ticks(low - room, high + room, 4)
        return (low - room, high + room), ticks
    low, high = math.log10(min(values)) - 0.12, math.log10(max(values)) + 0.12
    factors = (1,) if high - low > 2.2 else (1, 3) if high - low > 1.2 else (1, 2, 5)
    ticks = [(f * 10.0 ** e, compact(f * 10.0 ** e)) for e in range(math.floor(low), math.ceil(high) + 1) for f in factors
             if low <= math.log10(f * 10.0 ** e) <= high]
    return (low, high), ticks or [(v, compact(v)) for v in (min(values),)]


def compact(value: float) -> str:
    """20k, 3M, 0.002, 1e-5."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    if value >= 1e-3:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def labelled(spots: Sequence[tuple[float, float]], labels: Sequence[str]) -> list[tuple[float, float]]:
    """Where each label begins (its left end, its base line), so that none lies on another, on a point or outside."""
    dots = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in spots]
    taken: list[tuple[float, float, float, float]] = []
    found: dict[int, tuple[float, float]] = {}
    for i in sorted(range(len(spots)), key=lambda i: (spots[i][1], spots[i][0])):
        x, y = spots[i]
        wide = CHARACTER * len(labels[i])
        best = None
        for step, reach in enumerate((9, 9, 22, 36, 52, 70, 90)):
            around = [(0, -1), (0, 1), (1, 0), (-1, 0)] if step == 0 else [
                (math.cos(a * math.pi / 8), math.sin(a * math.pi / 8)) for a in range(16)]
            for dx, dy in around:
                cx, cy = x + dx * (reach + wide / 2), y + dy * (reach + TALL / 4)
                box = (cx - wide / 2, cy - TALL / 2, cx + wide / 2, cy + TALL / 2)
                outside = max(0, LEFT - box[0]) + max(0, box[2] - WIDTH) + max(0, 2 - box[1]) + max(0, box[3] - BOTTOM)
                cost = 20 * outside + sum(overlap(box, b) for b in taken) + sum(overlap(box, b) for b in dots) + 0.02 * reach
                if best is None or cost < best[0]:
                    best = (cost, box)
            if best[0] < 2.0:
                break
        taken.append(best[1])
        found[i] = (round(best[1][0], 1), round(best[1][3] - TALL / 4, 1))
    return [found[i] for i in range(len(spots))]


def gap(x: float, y: float, label_x: float, label_y: float, label: str) -> float:
    """How far a label's box is from its point."""
    dx = max(label_x - x, x - label_x - CHARACTER * len(label), 0.0)
    dy = max(label_y - 0.75 * TALL - y, y - label_y - TALL / 4, 0.0)
    return math.hypot(dx, dy)


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Shared area of two boxes (left, top, right, bottom)."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def multiples(series: Mapping[str, Sequence[tuple[float, float]]], log: bool, marks: Mapping[str, float],
              digits) -> Multiples | None:
    """A panel a method over one pair of axes, all others faint behind it. High values are drawn at the upper edge.

    marks: the x of a method's chosen point.
    """
    clean = {name: [(x, y) for x, y in points if math.isfinite(x) and (x > 0 or not log)] for name, points in series.items()}
    clean = {name: points for name, points in clean.items() if points}
    finite = sorted(y for points in clean.values() for _, y in points if math.isfinite(y))
    if not finite:
        return None
    left, right, top, bottom = SMALL_FRAME
    last = [y for points in clean.values() for y in [p[1] for p in points if math.isfinite(p[1])][-1:]]
    ceiling = min(finite[-1], max(max(sorted(last)[:max(1, math.ceil(0.9 * len(last)))]), finite[int(0.75 * (len(finite) - 1))]))
    low, high = span([finite[0], ceiling], 1e-2)
    y_ticks = nice_ticks(low, high, 3, outwards=True)
    y_range = (y_ticks[0][0], y_ticks[-1][0])
    xs, x_ticks = _axis([x for points in clean.values() for x, _ in points], log)
    to = math.log10 if log else float
    if not log:
        xs = (min(0.0, xs[0]) if xs[0] > 0 else 0.0, max(x for points in clean.values() for x, _ in points))
        x_ticks = [(v, compact(v) if v else "0") for v, _ in nice_ticks(*xs, 3)]

    def place(point: tuple[float, float]) -> tuple[float, float] | None:
        if not math.isfinite(point[1]):
            return None
        return (round(scale(to(point[0]), xs, left, right), 1), round(scale(min(point[1], y_range[1]), y_range, bottom, top), 1))
    drawn = {name: [place(p) for p in points] for name, points in clean.items()}
    panels = []
    for name, points in clean.items():
        line, _ = path(drawn[name])
        mark = next((place(p) for p in points if name in marks and p[0] == marks[name]), None)
        gone = sum(1 for _, y in points if not math.isfinite(y))
        good = [y for _, y in points if math.isfinite(y)]
        note = f"{digits(min(good) if log else good[-1])}" if good else "failed"
        panels.append(Small(name, line, tuple(d for d in drawn[name] if d), mark, note + (f" ✗{gone}" if gone and good else "")))
    others = " ".join(line for line in (path(places)[0] for places in drawn.values()) if line)
    about = "; ".join(f"{p.title}: {p.note}" for p in panels)
    few = x_ticks[::max(1, math.ceil(len(x_ticks) / 3))]
    return Multiples(tuple(panels), others, tuple(Tick(place((v, low))[0], t) for v, t in few),
                     tuple(Tick(place((x_ticks[0][0] if x_ticks else 1, v))[1], t) for v, t in y_ticks), about)
