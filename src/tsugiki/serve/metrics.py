"""What the server counts, in Prometheus' text format."""
from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tsugiki.serve.engine import Stats

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)       # seconds
# Fields of the engine's Stats.
ENGINE = (
    ("tokens_generated", "counter", "new tokens"),
    ("tokens_prefilled", "counter", "prompt tokens computed"),
    ("tokens_cached", "counter", "prompt tokens taken from the prefix cache"),
    ("tokens_per_second", "gauge", "new tokens a second, of the last seconds"),
    ("steps", "counter", "forwards of one token a row"),
    ("loads", "counter", "adapters read from disk"),
    ("load_seconds", "counter", "seconds that took"),
    ("evictions", "counter", "adapters taken off the base for others"),
    ("resident", "gauge", "adapters on the base"),
    ("registered", "gauge", "adapters that have a name"),
    ("cache_tokens", "gauge", "columns of keys and values in use"),
    ("cache_limit", "gauge", "columns there may be"),
    ("prefix_tokens", "gauge", "tokens of prompts kept for others"),
    ("prefix_limit", "gauge", "tokens there may be"))
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Seconds, counted in buckets."""

    def __init__(self):
        self.counts, self.total = [0] * (len(BUCKETS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterable[str]:
        below = 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {below}"


class Metrics:
    """Of HTTP; what the engine counts is added when it is asked for. Used in the event loop's thread only."""

    def __init__(self):
        self.answers: Counter[tuple[str, int]] = Counter()        # (route, status)
        self.first, self.whole = Histogram(), Histogram()

    def text(self, stats: Stats) -> str:
        out: list[str] = []

        def put(name: str, kind: str, about: str, values: Iterable[tuple[str, float]]) -> None:
            out.extend([f"# HELP tsugiki_{name} {about}", f"# TYPE tsugiki_{name} {kind}"])
            out.extend(f"tsugiki_{name}{labels} {value:.10g}" for labels, value in values)

        def one(value: float) -> list[tuple[str, float]]:
            return [("", value)]
        put("http_requests_total", "counter", "answers by route and status",
            [(f'{{route="{_escaped(route)}",status="{status}"}}', n) for (route, status), n in sorted(self.answers.items())])
        put("requests_running", "gauge", "choices that are being answered", one(stats.running))
        put("requests_waiting", "gauge", "choices that wait", one(stats.waiting))
        put("requests_finished_total", "counter", "choices by how they ended",
            [(f'{{finish="{_escaped(k)}"}}', n) for k, n in sorted(stats.requests.items())])
        for name, kind, about in ENGINE:
            put(f"{name}_total" if kind == "counter" else name, kind, about, one(getattr(stats, name)))
        for what, position in (("requests", 0), ("tokens", 1)):
            put(f"adapter_{what}_total", "counter", f"{what} by adapter; the base has no name",
                [(f'{{adapter="{_escaped(name or "")}"}}', counts[position])
                 for name, counts in sorted(stats.adapters.items(), key=lambda item: item[0] or "")])
        for name, about, histogram in (("first_token_seconds", "from a request to its first text", self.first),
                                       ("request_seconds", "from a request to its end", self.whole)):
            out.extend([f"# HELP tsugiki_{name} {about}", f"# TYPE tsugiki_{name} histogram", *histogram.lines(f"tsugiki_{name}")])
        return "\n".join(out) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
