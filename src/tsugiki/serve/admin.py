"""Routes that load, replace and take off adapters while others answer. They have a key of their own (see `auth`)."""
from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tsugiki.errors import UserError
from tsugiki.serve import schema
from tsugiki.serve.refusal import Refusal
from tsugiki.serve.roots import resolve
from tsugiki.serve.wire import described, read_body, reply

if TYPE_CHECKING:
    from tsugiki.serve.http import Service


def routes(service: Service) -> list[Route]:
    one = _Admin(service)
    return [Route("/admin/adapters", one.list), Route("/admin/adapters", one.load, methods=["POST"]),
            Route("/admin/adapters/{name}", one.replace, methods=["PUT"]),
            Route("/admin/adapters/{name}", one.remove, methods=["DELETE"])]


class _Admin:
    """One change at a time; reading a folder and checking it happens in a thread."""

    def __init__(self, service: Service):
        self.service, self.engine, self.lock = service, service.engine, asyncio.Lock()

    async def list(self, request: Request) -> Response:
        return reply({"adapters": [{"name": a.name} | described(a) for a in self.engine.adapters()]})

    async def load(self, request: Request) -> Response:
        body = await self._body(request, True)
        name, folder = body["name"], self._folder(body["path"])
        async with self.lock:
            if name == self.service.models.base or any(a.name == name for a in self.engine.adapters()):
                raise Refusal(409, f"name: {name!r} is taken; PUT /admin/adapters/{name} replaces an adapter", "name", "taken")
            info = await self._change(self.engine.add, name, folder, body["path"])
        return reply({"name": name} | described(info), 201)

    async def replace(self, request: Request) -> Response:
        body = await self._body(request, False)
        name, folder = request.path_params["name"], self._folder(body["path"])
        async with self.lock:
            self._known(name)
            info = await self._change(self.engine.replace, name, folder, body["path"])
        return reply({"name": name} | described(info))

    async def remove(self, request: Request) -> Response:
        name = request.path_params["name"]
        async with self.lock:
            self._known(name)
            await run_in_threadpool(self.engine.remove, name)
        return reply({"name": name, "deleted": True})

    async def _body(self, request: Request, named: bool) -> dict:
        body = await read_body(request, self.service.setting.limits)
        schema.check(body, schema.admin(named))
        return body

    def _folder(self, path: str) -> Path:
        try:
            return resolve(path, self.service.setting.roots)
        except UserError as e:
            raise Refusal(400, str(e), "path") from None

    def _known(self, name: str) -> None:
        if not any(a.name == name for a in self.engine.adapters()):
            raise Refusal(404, f"name: there is no adapter {name[:100]!r}", "name", "model_not_found")

    async def _change(self, change: Callable, name: str, folder: Path, given: str):
        """Messages name the folder as it was given, not where it lies."""
        try:
            return await run_in_threadpool(change, name, folder)
        except UserError as e:
            raise Refusal(400, str(e).splitlines()[0].replace(str(folder), given)) from None
