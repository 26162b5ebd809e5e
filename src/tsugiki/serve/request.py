"""What is asked of the engine and what comes back: requests, events, and the stream that carries them between threads."""
from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tsugiki.errors import UserError

MOST_LOGPROBS = 100


class QueueFull(RuntimeError):
    """As many requests wait as may; try again later."""


class Stopped(RuntimeError):
    """The engine takes no more requests."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when to end. Raises UserError for a value that is not allowed."""
    max_tokens: int = 256
    temperature: float = 1.0                          # 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0                                    # 0: all
    repetition_penalty: float = 1.0                   # of the prompt's and the answer's tokens, as in transformers
    seed: int | None = None                           # None: drawn; token t is drawn from (seed, t) alone
    stop: tuple[str, ...] = ()                        # texts that end the answer; they are no part of it
    logprobs: int | None = None                       # of the chosen token and of so many of the likeliest
    ignore_stop_ids: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (("max_tokens", 1, 1 << 30), ("temperature", 0.0, 1e6), ("top_k", 0, 1 << 30)):
            _between(name, getattr(self, name), low, high)
        for name, high in (("top_p", 1.0), ("repetition_penalty", 1e6)):
            _between(name, getattr(self, name), 1e-6, high)
        if self.logprobs is not None:
            _between("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if self.seed is not None and type(self.seed) is not int:
            raise UserError(f"seed: must be a whole number, got {self.seed!r}")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise UserError(f"stop: must be texts of at least one character, got {self.stop!r}")


def _between(name: str, value: float, low: float, high: float) -> None:
    whole = isinstance(low, int)
    if type(value) not in ((int,) if whole else (int, float)) or not math.isfinite(value) or not low <= value <= high:
        raise UserError(f"{name}: must be a {'whole ' * whole}number from {low:g} to {high:g}, got {value!r}")


@dataclass(frozen=True)
class Request:
    """Prompt tokens, and which adapter answers them (None: the base)."""
    ids: tuple[int, ...]
    adapter: str | None = None
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class TokenLogprob:
    """Of one answered token, from the float32 log-softmax of the model's own scores: before any penalty or temperature."""
    id: int
    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[tuple[int, str, float], ...]           # the likeliest: (id, text, logprob)


@dataclass(frozen=True)
class Event:
    """New tokens of a request. The text lags behind while a character is incomplete or may begin a stop text."""
    text: str
    ids: tuple[int, ...]                              # with the stop token, which has no text
    logprobs: tuple[TokenLogprob, ...]
    finish: str | None                                # None, "stop", "length", "cancelled", "error"
    error: str | None = None                          # with "error": one line


@dataclass(frozen=True)
class Result:
    """All events of a request in one."""
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: str
    error: str | None = None


class Stream:
    """The answer to one request as it comes. One thread iterates; any may cancel or wait for the result."""

    def __init__(self, request: Request, seed: int, wake: Callable[[], None],
                 on_event: Callable[[Event], None] | None = None):
        self.request, self.seed = request, seed
        self.prompt_tokens = len(request.ids)
        self.cached_tokens = 0                        # of the prompt, found in the prefix cache; set when it begins
        self.cancelled = False
        self._wake, self._on_event = wake, on_event
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._all: list[Event] = []
        self._done = threading.Event()

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            yield event
            if event.finish is not None:
                self._events.put(event)               # whoever iterates again does not wait for ever
                return

    def cancel(self) -> None:
        """End it as "cancelled" at the next step, wherever it is; nothing happens if it has ended."""
        self.cancelled = True
        self._wake()

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end. Raises TimeoutError after `timeout` seconds."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"the request has not ended after {timeout} seconds")
        last = self._all[-1]
        return Result("".join(e.text for e in self._all), tuple(i for e in self._all for i in e.ids),
                      tuple(p for e in self._all for p in e.logprobs), last.finish, last.error)

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def put(self, event: Event) -> None:
        """The engine's side. A callback that fails cancels its own request."""
        self._all.append(event)
        self._events.put(event)
        if event.finish is not None:
            self._done.set()
        if self._on_event is not None:
            try:
                self._on_event(event)
            except Exception:
                self._on_event = None
                self.cancelled = True
