"""What the server counts, in Prometheus' text format."""
from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tsugiki.serve.engine import Stats

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)       # seconds
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
        put("requests_running", "gauge", "choices being decoded", one(stats.running))
        put("requests_waiting", "gauge", "choices waiting for a slot", one(stats.waiting))
        put("requests_finished_total", "counter", "choices by how they ended",
            [(f'{{finish="{_escaped(k)}"}}', n) for k, n in sorted(stats.finished.items())])
        put("tokens_generated_total", "counter", "new tokens", one(stats.generated))
        put("tokens_prefilled_total", "counter", "prompt tokens computed", one(stats.prefilled))
        put("tokens_cached_total", "counter", "prompt tokens taken from the prefix cache", one(stats.cached))
        put("tokens_per_second", "gauge", "new tokens a second, of the last seconds", one(stats.tokens_per_second))
        put("cache_tokens", "gauge", "tokens that the key-value cache holds", one(stats.cache_tokens))
        put("cache_tokens_limit", "gauge", "tokens that it may hold", one(stats.cache_limit))
        put("steps_total", "counter", "forwards of the model", one(stats.steps))
        put("adapter_loads_total", "counter", "adapters put in a slot", one(stats.loads))
        put("adapter_evictions_total", "counter", "adapters taken out of a slot for another", one(stats.evictions))
        put("adapter_load_seconds_total", "counter", "time that took", one(stats.load_seconds))
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
