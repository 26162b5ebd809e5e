"""The server as a process: a socket, uvicorn, and signals that end it cleanly."""
from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable

import uvicorn

from tsugiki.errors import UserError


class Server(uvicorn.Server):
    """uvicorn with other signals: the first stops accepting and lets requests finish, the second ends at once."""

    second: int | None = None

    def handle_exit(self, sig: int, frame: object) -> None:
        if self.should_exit:
            self.second, self.force_exit = sig, True
        self.should_exit = True


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises UserError."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: allowed: 0 (any free one) to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as e:
        raise UserError(f"--host {host} --port {port}: cannot be listened on: {e.strerror or e}") from None


def configured(app: Callable, grace: float) -> uvicorn.Config:
    """Plain HTTP/1.1, nothing believed of proxies' headers, only mistakes of ours in the log."""
    return uvicorn.Config(app, http="h11", ws="none", lifespan="off", loop="asyncio", access_log=False, log_config=None,
                          log_level="error", proxy_headers=False, server_header=False,
                          timeout_graceful_shutdown=max(1, round(grace)))


def serve(app: Callable, sock: socket.socket, grace: float, ready: Callable[[], None]) -> int:
    """Answer until a signal; then requests that run have `grace` seconds to finish. The exit code: 0, or of a second signal.

    Must be called in the main thread.
    """
    server = Server(configured(app, grace))

    async def main() -> None:
        task = asyncio.ensure_future(server.serve(sockets=[sock]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        await task
    asyncio.run(main())
    return 128 + server.second if server.second else 0
