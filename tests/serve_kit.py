"""A server for the tests: in a thread, over the real engine or over one that answers from a script."""
from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import pytest
from kit import TOKENIZER

pytest.importorskip("starlette", reason="tsugiki[serve] is not installed")
pytest.importorskip("uvicorn", reason="tsugiki[serve] is not installed")

from tsugiki.errors import UserError  # noqa: E402
from tsugiki.serve.asked import Models  # noqa: E402
from tsugiki.serve.http import Service, Setting  # noqa: E402
from tsugiki.serve.request import Event, QueueFull, Request, TokenLogprob  # noqa: E402
from tsugiki.serve.run import Server, configured, listen  # noqa: E402
from tsugiki.serve.stats import Stats  # noqa: E402

KEY, ADMIN = "user-key-0123456789abcdef", "admin-key-0123456789abcdef"
BASE = "base"


@dataclass
class Script:
    """An engine that answers `words` times with the adapter's name, a token each `pace` seconds, and counts what is asked."""

    words: int = 5
    pace: float = 0.0
    queue: int = 1000
    max_length: int = 10_000
    names: tuple[str, ...] = ("alpha", "beta")
    running: set = field(default_factory=set)
    finished: Counter = field(default_factory=Counter)
    asked: list[Request] = field(default_factory=list)
    gate: threading.Event | None = None               # what answers wait for when they are half said

    def __post_init__(self):
        self.known = {name: self._info(name, "0") for name in self.names}

    @staticmethod
    def _info(name: str, version: str):
        return SimpleNamespace(name=name, method="lora", parameters=1234, bytes=4936, version=version, resident=True, kind="chat",
                               stop_ids=(2,), template=None, stop=None, score=0.5, base_ok=True)

    def adapters(self):
        return list(self.known.values())

    def info(self, name):
        if name not in self.known:
            raise UserError(f"no adapter {name!r}")
        return self.known[name]

    def add(self, name, path):
        if not (path / "adapter_model.safetensors").is_file():
            raise UserError(f"{path / 'adapter_model.safetensors'}: no such file")
        self.known[name] = self._info(name, str(path))
        return self.known[name]

    replace = add

    def remove(self, name):
        del self.known[name]

    def stats(self):
        counts = {f.name: 1 for f in fields(Stats)} | {"running": len(self.running), "waiting": 0, "tokens_per_second": 1.5}
        return Stats(**counts | {"requests": dict(self.finished), "adapters": {None: (1, 2), 'al"pha': (3, 4)}})

    def submit(self, request, on_event=None):
        if len(self.running) >= self.queue:
            raise QueueFull
        if len(request.ids) >= self.max_length:
            raise UserError("the prompt leaves no room for an answer")
        stream = SimpleNamespace(request=request, cached_tokens=1, stop=threading.Event())
        stream.cancel = stream.stop.set
        self.asked.append(request)
        self.running.add(id(stream))
        threading.Thread(target=self._answer, args=(stream, on_event), daemon=True).start()
        return stream

    def _answer(self, stream, on_event):
        finish, text, sampling = "stop", f" {stream.request.adapter or 'the base'}", stream.request.sampling
        for n in range(min(self.words, sampling.max_tokens)):
            if self.gate is not None and n == self.words // 2:
                self.gate.wait(120)
            if stream.stop.wait(self.pace):
                finish = "cancelled"
                break
            known = () if sampling.logprobs is None else (TokenLogprob(
                7, text, tuple(text.encode()), -0.5, tuple((k, f"t{k}", -1.0 - k) for k in range(sampling.logprobs))),)
            on_event(Event(text, (7,), known, None))
        else:
            finish = "stop" if self.words <= sampling.max_tokens else "length"
        self.running.discard(id(stream))
        self.finished[finish] += 1
        on_event(Event("", (), (), finish))


def service(engine, tokenizer=TOKENIZER, vocabulary: int = 100, **setting) -> Service:
    return Service(Models(engine, tokenizer, BASE, vocabulary), Setting(**setting))


@contextmanager
def serving(app_service: Service):
    """The server's address, as long as the block lasts."""
    with listen("127.0.0.1", 0) as sock:
        server = Server(configured(app_service.app, 5))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield "http://{}:{}".format(*sock.getsockname())
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not end"


def until(done, seconds: float = 20.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
