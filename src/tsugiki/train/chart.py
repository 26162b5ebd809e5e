"""Line charts as plain geometry: (step, value) points in, SVG paths and tick labels out; draws nothing itself."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 230                             # of the viewBox; a phone shows it at about 0.9, a desktop at 1.3
LEFT, RIGHT, TOP, BOTTOM = 50, 388, 10, 192
MOST_POINTS = 600                                    # a longer line keeps the lowest and highest point of each bucket
FEW_POINTS = 24                                      # a line this short shows its points
HUGE = 1e30                                          # beyond this a value is called not finite: its span would overflow

Point = tuple[float, float]                          # (step, value)


@dataclass(frozen=True)
class Line:
    """One series: its faint raw path, its clear path, lone points, and what the legend says."""
    name: str
    path: str
    faint: str
    dots: tuple[Point, ...]                          # in the viewBox
    last: str


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    title: str
    about: str                                       # the curve in words, for who cannot see it
    note: str                                        # values that could not be drawn
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def chart(title: str, series: Mapping[str, Iterable]) -> Chart | None:
    """The chart of one or more series over a common step axis; None when there is no point at all."""
    clean = {name: points for name, points in ((name, numbers(raw)) for name, raw in series.items()) if points}
    drawn = [point for points in clean.values() for point in points if math.isfinite(point[1])]
    if not clean:
        return None
    x_range, y_range = span([step for step, _ in drawn], 1e-9), span([value for _, value in drawn], 1e-3)
    x_ticks, y_ticks = nice_ticks(*x_range, 5, whole=True), nice_ticks(*y_range, 5, outwards=True)
    y_range = (y_ticks[0][0], y_ticks[-1][0])

    def place(point: Point) -> Point:
        return (round(scale(point[0], x_range, LEFT, RIGHT), 1), round(scale(point[1], y_range, BOTTOM, TOP), 1))

    return Chart(title, " ".join(about(name, points) for name, points in clean.items()), missing(clean),
                 tuple(line(name, points, place) for name, points in clean.items()),
                 tuple(Tick(place((x, y_range[0]))[0], label) for x, label in x_ticks),
                 tuple(Tick(place((x_range[0], y))[1], label if drawn else "") for y, label in y_ticks))


def numbers(raw: Iterable) -> list[Point]:
    """Points sorted by step; any value not finite becomes NaN; a point without a step is dropped."""
    points = []
    for step, value in raw or ():
        step, value = as_float(step), as_float(value)
        if not math.isnan(step):
            points.append((step, value))
    return sorted(points, key=lambda point: point[0])


def as_float(value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) < HUGE else math.nan


def span(values: list[float], least: float) -> tuple[float, float]:
    """(low, high), widened when narrower than the share `least` of the values' size; for no values, 0 to 1."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    size = max(abs(low), abs(high))
    if high - low > size * least:
        return low, high
    room = size * min(0.1, 100 * least) or 1.0
    return low - room, high + room


def scale(value: float, source: tuple[float, float], low: float, high: float) -> float:
    return low + (value - source[0]) / (source[1] - source[0]) * (high - low)


def nice_ticks(low: float, high: float, about_how_many: int, whole: bool = False,
               outwards: bool = False) -> list[tuple[float, str]]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high] (or just around it), labelled alike."""
    rough = (high - low) / about_how_many
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if outwards:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [(index * step, tick_label(index * step, step)) for index in range(first, last + 1)]


def tick_label(value: float, step: float) -> str:
    size = max(abs(value), step)
    if value == 0:
        return "0"
    if size >= 1e7 or step < 1e-3:
        decimals = math.floor(math.log10(size) + 1e-9) - math.floor(math.log10(step) + 1e-9)
        mantissa, exponent = f"{value:.{max(0, decimals)}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    if step >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def line(name: str, points: list[Point], place) -> Line:
    """A noisy series is drawn faint under its moving average; any other, clear."""
    finite = [point for point in points if math.isfinite(point[1])]
    raw, lone = path([place(point) if math.isfinite(point[1]) else None for point in thinned(points)])
    last = short(finite[-1][1]) if finite else "no finite value"
    if noisy([value for _, value in finite]):
        smooth = smoothed(finite)
        every = math.ceil(len(smooth) / MOST_POINTS)
        clear, _ = path([place(point) for point in [*smooth[:-1:every], smooth[-1]]])
        return Line(name, clear, raw, (), last)
    dots = tuple(place(point) for point in finite) if len(points) <= FEW_POINTS else lone
    return Line(name, raw, "", dots, last)


def noisy(values: list[float]) -> bool:
    """Whether a line of many points goes up and down more than a few times its own range."""
    travelled = sum(abs(after - before) for before, after in zip(values, values[1:], strict=False))
    return len(values) > FEW_POINTS and travelled > 4 * (max(values) - min(values))


def smoothed(points: list[Point]) -> list[Point]:
    """Moving average over about a twentieth of the points: narrower at the start, which may be steep."""
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    reach, end = max(2, len(points) // 40), len(points) - 1
    averages = []
    for index, (step, _) in enumerate(points):
        left, right = index - min(reach, index), index + min(reach, index, end - index)
        averages.append((step, (sums[right + 1] - sums[left]) / (right + 1 - left)))
    return averages


def thinned(points: list[Point]) -> list[Point]:
    """About MOST_POINTS points at most: first, last and each bucket's extremes (spikes survive); NaN stays a gap."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept = [points[0]]
    for start in range(0, len(points), size):
        bucket = points[start: start + size]
        finite = [point for point in bucket if math.isfinite(point[1])]
        extremes = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        gap = [next(point for point in bucket if math.isnan(point[1]))] if len(finite) < len(bucket) else []
        kept += sorted([*extremes, *gap], key=lambda point: point[0])
    return [*kept, points[-1]]


def path(places: list[Point | None]) -> tuple[str, tuple[Point, ...]]:
    """SVG path data, broken where a place is None; places with no neighbour are returned as lone points."""
    runs, run = [], []
    for place in [*places, None]:
        if place is not None:
            run.append(place)
        elif run:
            runs.append(run)
            run = []
    lone = tuple(run[0] for run in runs if len(set(run)) == 1)
    return " ".join("M" + "L".join(f"{x:g} {y:g}" for x, y in run) for run in runs if len(set(run)) > 1), lone


def short(value: float) -> str:
    """Four significant digits, thousands apart."""
    if value and not 1e-4 <= abs(value) < 1e9:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def about(name: str, points: list[Point]) -> str:
    finite = [point for point in points if math.isfinite(point[1])]
    if not finite:
        return f"{name}: no finite value."
    (first_step, first), (last_step, last) = finite[0], finite[-1]
    low, high = (choose(finite, key=lambda point: point[1]) for choose in (min, max))
    if len(finite) == 1:
        return f"{name}: {short(first)} at step {short(first_step)}."
    return (f"{name}: from {short(first)} at step {short(first_step)} to {short(last)} at step {short(last_step)};"
            f" lowest {short(low[1])} at step {short(low[0])}, highest {short(high[1])} at step {short(high[0])}.")


def missing(series: Mapping[str, list[Point]]) -> str:
    notes = []
    for name, points in series.items():
        steps = [short(step) for step, value in points if math.isnan(value)]
        if steps:
            more = ", ..." if len(steps) > 3 else ""
            plural = "s" if len(steps) > 1 else ""
            notes.append(f"{name}: {len(steps)} value{plural} not finite, at step{plural} {', '.join(steps[:3])}{more}")
    return "; ".join(notes)
