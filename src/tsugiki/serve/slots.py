"""Hundreds of registered adapters, a bounded number on the base: read once, kept in memory, attached when a request needs them."""
from __future__ import annotations

import hashlib
import itertools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tsugiki import formats
from tsugiki.adapters import Adapter, Adapters
from tsugiki.data import Renderer
from tsugiki.errors import UserError, nearest
from tsugiki.weights import device_of

FILES = ("adapter_config.json", "adapter_model.safetensors", "MANIFEST.json")
SERIAL = itertools.count(1)                           # of contents: several engines may share a base
READING = 2                                           # adapters read ahead of the requests that can begin


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of a registered adapter."""
    name: str
    method: str
    parameters: int                                   # trained numbers
    bytes: int                                        # of all its tensors
    version: str                                      # hash of its files
    resident: bool                                    # attached to the base now
    base_ok: bool                                     # whether its manifest names this base; False: it has no manifest
    stop_ids: tuple[int, ...]
    kind: str                                         # how its prompts are rendered: "chat" or "plain"
    template: str | None                              # of its own, if it has one
    stop: str | None                                  # the token that ends its answers, if it was named
    score: float | None                               # the last evaluation in its run's metrics, if they lie beside it


@dataclass(eq=False)
class Version:
    """An adapter's content under a name. Requests hold on to the one they were asked of, whatever the name means later."""
    name: str
    path: Path
    content: str                                      # hash of its files
    key: str                                          # what it is called on the base; no other content ever is
    info: AdapterInfo | None = None
    adapter: Adapter | None = field(default=None, repr=False)        # in memory, on the base or not
    virtual: int = 0                                  # virtual tokens
    placed: bool = False                              # edits by the distance to the prompt's end
    resident: bool = False
    rows: int = 0                                     # running with it
    claims: int = 0                                   # requests that wait for it or run with it
    used: int = 0                                     # when it was last wanted
    fresh: bool = False                               # read, and not yet attached
    reading: bool = False
    error: str | None = None                          # why it could not be read again


class Slots:
    """The registered adapters. `add`, `remove`, `replace`, `info` from any thread; the rest is the engine's thread's.

    kept: bytes of adapters that stay in memory beside those attached. `wake` is called when an adapter has been read.
    """

    def __init__(self, home: Adapters, tokenizer: Any, count: int, kept: int, wake: Callable[[], None]):
        self.home, self.tokenizer, self.count, self.kept, self.wake = home, tokenizer, count, kept, wake
        self.lock = threading.RLock()                 # whoever changes what is attached
        self.named: dict[str, Version] = {}
        self.inside: set[Version] = set()             # in memory
        self.clock = itertools.count(1)
        self.loads = self.evictions = 0
        self.load_seconds = 0.0
        self.device = device_of(home.sites[0].exit)
        self.wanted: queue.SimpleQueue[Version | None] = queue.SimpleQueue()
        self.reader: threading.Thread | None = None
        self.renderers: dict[tuple[str | None, str | None], Renderer] = {}

    # From any thread.

    def add(self, name: str, path: str | Path) -> AdapterInfo:
        """Register a folder, which is read and checked now. Raises UserError for a name in use and whatever formats.load does."""
        with self._changing():
            if name in self.named:
                raise UserError(f"adapter {name!r} exists; remove or replace it")
            self.home.check_name(name)
            return self._register(name, Path(path))

    def replace(self, name: str, path: str | Path) -> AdapterInfo:
        """A name means another folder from now on; if that cannot be read it means what it did."""
        with self._changing():
            self.get(name)
            return self._register(name, Path(path))

    def remove(self, name: str) -> None:
        with self._changing():
            self.get(name)
            del self.named[name]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Inside, nobody attaches; who could not is woken once the lock is free again."""
        try:
            with self.lock:
                yield
        finally:
            self.wake()

    def get(self, name: str) -> Version:
        version = self.named.get(name)
        if version is None:
            known = tuple(self.named)
            some = ", ".join((*known[:20], *["..."] * (len(known) > 20))) or "none"
            raise UserError(f"no adapter {name!r} is registered{nearest(name, known)} (registered: {some})")
        version.used = next(self.clock)
        return version

    def infos(self) -> list[AdapterInfo]:
        return [self.info(v) for v in tuple(self.named.values())]

    @staticmethod
    def info(version: Version) -> AdapterInfo:
        return AdapterInfo(**vars(version.info) | {"resident": version.resident})

    def renderer(self, template: str | None = None, stop: str | None = None) -> Renderer:
        if (template, stop) not in self.renderers:
            self.renderers[template, stop] = Renderer(self.tokenizer, template=template, stop=stop)
        return self.renderers[template, stop]

    def _register(self, name: str, path: Path) -> AdapterInfo:
        content = content_of(path)
        version = Version(name, path, content, f"v{next(SERIAL)}.{content[:12]}")
        self._read(version)
        version.fresh, version.used = False, next(self.clock)
        self.named[name] = version
        self._shrink()
        return self.info(version)

    def _read(self, version: Version) -> None:
        """From disk into memory. Built on the base, so that everything is checked, and taken off again."""
        started = time.monotonic()
        formats.load(self.home, version.key, version.path)
        adapter = self.home.remove(version.key)
        if content_of(version.path) != version.content:
            raise UserError(f"{version.path}: was changed while or since it was read; replace the adapter to take the new one")
        version.virtual, version.placed = adapter.virtual, adapter.needs_places
        version.info = version.info or self._describe(version, adapter)
        version.adapter, version.fresh = _moved(adapter, torch.device("cpu")), True
        self.inside.add(version)
        self.loads += 1
        self.load_seconds += time.monotonic() - started

    def _describe(self, version: Version, adapter: Adapter) -> AdapterInfo:
        manifest = formats.read_manifest(version.path) or {}
        note, tensors = manifest.get("extra", {}), adapter.tensors().values()
        template, kind = note.get("template"), note.get("kind")
        own = self.renderer(template, note.get("stop"))
        if kind is None:
            kind = "chat" if self.tokenizer.chat_template else "plain"
        return AdapterInfo(version.name, adapter.cfg.name, sum(p.numel() for p in adapter.parameters().values()),
                           sum(t.numel() * t.element_size() for t in tensors), version.content, False,
                           bool(manifest.get("base")), tuple(sorted({*own.stop_ids, *manifest.get("stop_ids", ())})),
                           "chat" if kind == "chat" else "plain", template, note.get("stop"), score_of(version.path))

    # In the engine's thread.

    def hold(self, version: Version | None) -> bool:
        """Attach it, if it is not, and count one more row on it. False if that cannot be now: all slots are in use, or it
        is being read, which `wake` will tell. After a failed reading `version.error` says why."""
        if version is None:
            return True
        if not version.resident and not self._attach(version):
            return False
        version.rows += 1
        version.used = next(self.clock)
        return True

    def release(self, version: Version | None) -> None:
        if version is not None:
            version.rows -= 1

    def emptiest(self) -> Version | None:
        """The attached adapter that will be free first, by its rows."""
        return min((v for v in tuple(self.inside) if v.resident), key=lambda v: (v.rows, v.used), default=None)

    def _attach(self, version: Version) -> bool:
        if version.adapter is None and version.reading:
            return False
        if not self.lock.acquire(blocking=False):     # someone reads an adapter; steps go on meanwhile
            return False
        try:
            if version.adapter is None:
                self._ask(version)
                return False
            resident = [v for v in self.inside if v.resident]
            if len(resident) >= self.count:
                idle = min((v for v in resident if not v.rows), key=lambda v: v.used, default=None)
                if idle is None:
                    return False
                self._detach(idle)
            self.home.put_back(_moved(version.adapter, self.device))
            version.resident, version.fresh = True, False
            return True
        finally:
            self.lock.release()

    def _detach(self, version: Version) -> None:
        _moved(self.home.remove(version.key), torch.device("cpu"))
        version.resident = False
        self.evictions += 1
        self._shrink()

    def _shrink(self) -> None:
        """Forget adapters that no name and no request means; then the least recently used, down to `kept` bytes."""
        idle = sorted((v for v in self.inside if v.adapter and not v.resident and not (v.fresh and v.claims)),
                      key=lambda v: v.used)
        total = sum(v.info.bytes for v in idle)
        for version in idle:
            named = self.named.get(version.name) is version      # else its folder may hold another content by now
            if not version.claims if not named else total > self.kept:
                total -= version.info.bytes
                version.adapter = None
                self.inside.discard(version)

    def _ask(self, version: Version) -> None:
        if sum(v.reading or v.fresh and v.claims > 0 for v in self.inside) < READING:
            version.reading = True
            self.inside.add(version)
            if self.reader is None:
                self.reader = threading.Thread(target=self._reads, name="tsugiki-adapters", daemon=True)
                self.reader.start()
            self.wanted.put(version)

    def _reads(self) -> None:
        while (version := self.wanted.get()) is not None:
            with self._changing():
                try:
                    self._read(version)
                except Exception as e:
                    version.error = str(e).splitlines()[0] if isinstance(e, UserError) else f"{type(e).__name__} while it was read"
                    self.inside.discard(version)
                version.reading = False

    def close(self) -> None:
        """Take everything off the base."""
        self.wanted.put(None)
        with self.lock:
            for version in [v for v in self.inside if v.resident]:
                self._detach(version)


def _moved(adapter: Adapter, device: torch.device) -> Adapter:
    for module in (*(edit for _, edit in adapter.edits.values()), adapter.shared):
        module.to(device)
    return adapter


def content_of(path: Path) -> str:
    """A hash of an adapter's files. Raises UserError where they cannot be read."""
    digest = hashlib.sha256()
    for name in FILES:
        try:
            data = (path / name).read_bytes()
        except FileNotFoundError:
            data = b""                                # which file must be there is for formats.load to say
        except OSError as e:
            raise UserError(f"{path / name}: cannot be read: {e.strerror or e}") from None
        digest.update(f"{name} {len(data)} ".encode() + data)
    return digest.hexdigest()


def score_of(path: Path) -> float | None:
    """The value of the last evaluation that the run above an adapter's folder wrote down."""
    try:
        lines = (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line)["eval"]["value"] for line in lines if '"eval"' in line]
        return float(found[-1]) if found else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
