"""What the engine has done, counted."""
from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field

RECENT = 10.0                                         # seconds that tokens_per_second looks back


@dataclass(frozen=True)
class Stats:
    """A look at an engine."""
    running: int
    waiting: int
    requests: dict[str, int]                          # ended, by how: "stop", "length", "cancelled", "error"
    tokens_generated: int
    tokens_prefilled: int                             # of prompts, computed
    tokens_cached: int                                # of prompts, found in the prefix cache
    tokens_per_second: float                          # generated, over the last seconds
    steps: int
    loads: int                                        # adapters read from disk
    load_seconds: float
    evictions: int                                    # adapters taken off the base for others
    resident: int
    registered: int
    cache_tokens: int                                 # columns of the cache in use
    cache_limit: int
    prefix_tokens: int
    prefix_limit: int
    adapters: dict[str | None, tuple[int, int]] = field(default_factory=dict)     # name -> (requests ended, tokens generated)


class Counts:
    """The engine's tallies. Written by its thread, read by any."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ended: Counter[str] = Counter()
        self.by_adapter: dict[str | None, list[int]] = {}
        self.generated = self.prefilled = self.cached = self.steps = 0
        self.recent: deque[tuple[float, int]] = deque()

    def tokens(self, count: int) -> None:
        now = time.monotonic()
        with self.lock:
            self.generated += count
            self.recent.append((now, count))
            while self.recent and self.recent[0][0] < now - RECENT:
                self.recent.popleft()

    def end(self, adapter: str | None, finish: str, tokens: int) -> None:
        with self.lock:
            self.ended[finish] += 1
            entry = self.by_adapter.setdefault(adapter, [0, 0])
            entry[0] += 1
            entry[1] += tokens

    def look(self) -> dict:
        """The fields of Stats that are counted here."""
        now = time.monotonic()
        with self.lock:
            recent = [(at, n) for at, n in self.recent if at >= now - RECENT]
            rate = sum(n for _, n in recent) / max(now - recent[0][0], 0.1) if recent else 0.0
            return {"requests": dict(self.ended), "tokens_generated": self.generated, "tokens_prefilled": self.prefilled,
                    "tokens_cached": self.cached, "tokens_per_second": rate, "steps": self.steps,
                    "adapters": {name: (a, b) for name, (a, b) in self.by_adapter.items()}}
