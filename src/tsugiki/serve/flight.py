"""One HTTP request's choices under way in the engine: its thread's events brought to the event loop."""
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tsugiki.errors import UserError
from tsugiki.serve.refusal import Refusal
from tsugiki.serve.request import Event, QueueFull, Request, Stopped

if TYPE_CHECKING:
    from tsugiki.serve.engine import Engine, Stream


class Flight:
    """Made in the event loop; `start` may be called in another thread; whoever makes one calls `cancel` in the end."""

    def __init__(self, engine: Engine, seconds: float):
        self.engine, self.ends = engine, time.monotonic() + seconds
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        self._streams: list[Stream] = []

    def start(self, requests: Sequence[Request]) -> None:
        """All of them or none. Raises Refusal."""
        try:
            for index, request in enumerate(requests):
                self._streams.append(self.engine.submit(request, partial(self._arrived, index)))
        except BaseException as e:
            self.cancel()
            if isinstance(e, QueueFull):
                raise Refusal(429, "too many requests are waiting; try again in a moment", code="queue_full",
                              headers={"Retry-After": "1"}) from None
            if isinstance(e, Stopped):
                raise Refusal(503, "the server is stopping", code="stopping") from None
            if isinstance(e, UserError):
                long = len(request.ids) >= self.engine.max_length
                raise Refusal(400, str(e).splitlines()[0], code="context_length_exceeded" if long else None) from None
            raise

    def _arrived(self, index: int, event: Event) -> None:
        """In the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
        except RuntimeError:                          # the loop is closed: nobody listens any more
            pass

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(choice, event) as they come, until every choice is finished. Raises Refusal when time is up."""
        left = len(self._streams)
        while left:
            try:
                async with asyncio.timeout(self.ends - time.monotonic()):     # wait_for of Python 3.11 may lose a cancellation
                    index, event = await self._events.get()
            except TimeoutError:
                raise Refusal(504, "the answer took longer than the server allows", code="timeout") from None
            left -= event.finish is not None
            yield index, event

    def cached(self, each: int) -> int:
        """Prompt tokens that the engine had from before; of a prompt's `each` choices the first counts."""
        return sum(s.cached_tokens for s in self._streams[::each])

    def cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()
