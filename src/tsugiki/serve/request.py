"""What a client asks of the engine, and what comes back."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_stop_ids: bool = False


@dataclass(frozen=True)
class Request:
    ids: tuple[int, ...]
    adapter: str | None = None
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class TokenLogprob:
    id: int
    text: str
    bytes: tuple[int, ...]
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class Event:
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: str | None
    error: str | None = None


class QueueFull(Exception):
    pass


class Stopped(Exception):
    pass
