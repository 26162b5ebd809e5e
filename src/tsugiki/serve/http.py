"""The HTTP interface: OpenAI's routes over the engine, and the front that every request passes first."""
from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tsugiki.errors import UserError
from tsugiki.serve import admin, metrics, page, schema
from tsugiki.serve.answer import Answer
from tsugiki.serve.auth import LOOPBACK, Keys, authorise, known_host
from tsugiki.serve.flight import Flight
from tsugiki.serve.openapi import document
from tsugiki.serve.refusal import Refusal
from tsugiki.serve.wire import described, read_body, reply

if TYPE_CHECKING:
    from pathlib import Path

    from tsugiki.serve.asked import Asked, Models
    from tsugiki.serve.engine import AdapterInfo

HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a server is run. hosts: names that a Host header may have where no user key is set."""

    limits: schema.Limits = schema.Limits()
    keys: Keys = Keys()
    roots: tuple[Path, ...] = ()
    hosts: tuple[str, ...] = LOOPBACK


class Service:
    """The routes. `app` is the ASGI application; all of it runs in one event loop."""

    def __init__(self, models: Models, setting: Setting):
        self.models, self.engine, self.setting = models, models.engine, setting
        self.metrics, self.began = metrics.Metrics(), int(time.time())
        self.page = page.load(setting.keys)
        routes = [
            Route("/", self._page), Route("/health", self._health), Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi), Route("/v1/models", self._list), Route("/v1/models/{model}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            *admin.routes(self)]
        handlers = {Refusal: _refused, UserError: _wrong, HTTPException: _not_routed, Exception: _failed}
        self.inner = Starlette(routes=routes, exception_handlers=handlers)
        self.app = Front(self.inner, self)

    # What is read.

    async def _page(self, request: Request) -> Response:
        return self.page.response(200)

    async def _health(self, request: Request) -> Response:
        return reply({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(self.engine.stats()), media_type=metrics.CONTENT_TYPE)

    async def _openapi(self, request: Request) -> Response:
        return reply(document(self.setting.limits))

    async def _list(self, request: Request) -> Response:
        return reply({"object": "list", "data": [self._entry(None), *map(self._entry, self.engine.adapters())]})

    async def _model(self, request: Request) -> Response:
        return reply(self._entry(self.models.find(request.path_params["model"])))

    def _entry(self, info: AdapterInfo | None) -> dict:
        """OpenAI's model object, and what we know beside."""
        more = {"kind": self.models.kind(info)} if info is None else described(info)
        return {"id": self.models.base if info is None else info.name, "object": "model", "created": self.began,
                "owned_by": "tsugiki", "tsugiki": {"base": info is None} | more}

    # What is answered.

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, True)

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, False)

    async def _answer(self, request: Request, chat: bool) -> Response:
        began, limits = time.monotonic(), self.setting.limits
        body = await read_body(request, limits)
        flight = Flight(self.engine, limits.timeout)

        def begin() -> Asked:
            asked = (self.models.chat if chat else self.models.completion)(body, limits)
            flight.start(asked.requests)
            return asked
        with ExitStack() as ends:
            ends.callback(flight.cancel)
            asked = await run_in_threadpool(begin)
            answer = Answer(asked, chat)
            if not asked.stream:
                return await _unless_gone(request, self._whole(flight, answer, began))
            ends.pop_all()                            # the response cancels the flight when it ends
            return _Events(self._chunks(flight, answer, began), flight)

    async def _whole(self, flight: Flight, answer: Answer, began: float) -> Response:
        async for index, event in self._timed(flight, began):
            answer.choices[index].add(event)
        return reply(answer.whole(flight.cached(answer.each)))

    async def _chunks(self, flight: Flight, answer: Answer, began: float) -> AsyncIterator[str]:
        """Server-sent events. An error after the first of them is an event too, the last."""
        try:
            for index in range(len(answer.choices)):
                for chunk in answer.first(index):
                    yield _event(chunk)
            async for index, event in self._timed(flight, began):
                for chunk in answer.chunks(index, event):
                    yield _event(chunk)
            if answer.asked.usage:
                yield _event(answer.last(flight.cached(answer.each)))
            yield "data: [DONE]\n\n"
        except Refusal as e:
            yield _event(e.body())

    async def _timed(self, flight: Flight, began: float) -> AsyncIterator[tuple[int, Any]]:
        """The flight's events; the first one's time and the whole are counted."""
        first = True
        async for pair in flight.events():
            if first:
                self.metrics.first.add(time.monotonic() - began)
                first = False
            yield pair
        self.metrics.whole.add(time.monotonic() - began)


class _Events(StreamingResponse):
    """Server-sent events of a flight, which ends with the response, also where the client left before the first of them."""

    def __init__(self, chunks: AsyncIterator[str], flight: Flight):
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.flight = flight

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.flight.cancel()


class Front:
    """What every request passes first: the Host header, the key; and what every answer gets: headers, and to be counted."""

    def __init__(self, app: Callable, service: Service):
        self.app, self.service = app, service
        self.fixed = {r.path for r in service.inner.routes if "{" not in r.path}

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return
        setting, status = self.service.setting, 500

        async def sending(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)
        try:
            path, headers = scope["path"], scope["headers"]
            if not setting.keys.user:
                known_host(headers, setting.hosts)
            try:
                authorise(path, headers, setting.keys)
            except Refusal:
                if path != "/" or scope["method"] not in ("GET", "HEAD"):
                    raise
                await self.service.page.response(401)(scope, receive, sending)        # it asks for the key
            else:
                with suppress(Exception):             # logged and answered by `_failed`; the connection goes on
                    await self.app(scope, receive, sending)
        except Refusal as e:
            await reply(e.body(), e.status, e.headers)(scope, receive, sending)
        finally:
            self.service.metrics.answers[self._route(scope["path"]), status] += 1

    def _route(self, path: str) -> str:
        """A label of few values, whatever paths are asked for."""
        whole = next((p for p in ("/v1/models/", "/admin/adapters/") if path.startswith(p)), None)
        return path if path in self.fixed else f"{whole}{{name}}" if whole else "other"


async def _unless_gone(request: Request, work: Awaitable[Response]) -> Response:
    """The result of `work`; when the client leaves first, the work is cancelled."""
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=499)        # nobody reads it; it is counted
    finally:
        for other in (task, watch):
            other.cancel()
        with suppress(asyncio.CancelledError, Refusal):
            await task


def _event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _refused(request: Request, e: Refusal) -> Response:
    return reply(e.body(), e.status, e.headers)


async def _wrong(request: Request, e: UserError) -> Response:
    """What the library refuses that the schemas let pass."""
    return reply(Refusal(400, str(e).splitlines()[0]).body(), 400)


async def _not_routed(request: Request, e: HTTPException) -> Response:
    """A path or a method that is not there."""
    refusal = Refusal(e.status_code, {404: "no such route; /openapi.json lists them", 405: "this route has another method"}.get(
        e.status_code, str(e.detail)))
    return reply(refusal.body(), e.status_code, dict(e.headers or {}))


async def _failed(request: Request, e: Exception) -> Response:
    """A mistake of ours: its traceback is in the server's log, not in the answer."""
    logging.getLogger(__name__).error("%s %s failed", request.method, request.url.path, exc_info=e)
    return reply(Refusal(500, "the server failed on this request; its log says why").body(), 500)


def hosts_of(host: str) -> Iterable[str]:
    """Names that a Host header may have on a server that listens on `host`."""
    return (*LOOPBACK, host.strip("[]").lower())
