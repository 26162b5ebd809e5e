"""The engine: one thread that runs every forward, and answers many requests at once, each under the adapter that it names.

Between two steps of one token for all rows, rows that ended leave, others join, and a piece of the waiting prompts is computed.
"""
from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tsugiki.errors import UserError
from tsugiki.memory import available, out_of_memory
from tsugiki.serve import sampling
from tsugiki.serve.arena import SLACK
from tsugiki.serve.forward import Forward
from tsugiki.serve.prefix import PrefixCache
from tsugiki.serve.request import (
    Event,
    QueueFull,
    Request,
    Result,
    Sampling,
    Stopped,
    Stream,
    TokenLogprob,
)
from tsugiki.serve.rows import Row
from tsugiki.serve.slots import AdapterInfo, Slots
from tsugiki.serve.stats import Counts, Stats
from tsugiki.serve.text import Writer
from tsugiki.serve.waiting import Waiting

__all__ = ["AdapterInfo", "Engine", "Event", "QueueFull", "Request", "Result", "Sampling", "Stats", "Stopped", "Stream",
           "TokenLogprob"]

LONGEST = 4096                                        # tokens of a prompt with its answer, where the base does not say
CACHE_SHARE, PREFIX_SHARE, KEPT_SHARE = 0.4, 0.1, 0.2    # of the memory that is free, where nothing else is said
STEPS = 1 << 20                                       # a server's weights are always worth packing


class Engine:
    """Serves one base with many adapters.

    slots: adapters attached at once; batch: rows that run at once; max_length: tokens of a prompt with its answer and virtual
    tokens (None: the base's positions); cache_tokens: columns of keys and values for running rows, prefix_tokens: for
    prompts seen before (None: by the free memory); queue: requests that may wait; chunk: prompt tokens between two steps;
    kept_bytes: adapters kept in memory beside those attached.
    Raises UserError for a base that cannot be served so. `start` begins; until then requests wait.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, slots: int = 16, batch: int = 16, max_length: int | None = None,
                 cache_tokens: int | None = None, prefix_tokens: int | None = None, queue: int = 256, chunk: int = 256,
                 kept_bytes: int | None = None):
        sizes = {"slots": slots, "batch": batch, "max_length": max_length, "cache_tokens": cache_tokens, "queue": queue,
                 "chunk": chunk}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise UserError(f"{name}: must be at least 1, got {value}")
        self.tokenizer = copy.deepcopy(tokenizer)     # of our own: others may change how theirs pads or cuts, in other threads
        self.batch, self.queue, self.chunk = batch, queue, chunk
        self.forward = Forward(model, STEPS)
        limit = self.forward.longest()
        if max_length is not None and limit is not None and max_length > limit:
            raise UserError(f"max_length: {max_length} is more than the {limit} positions of the base")
        self.max_length = max_length or limit or LONGEST
        free, column = available(self.forward.device), self.forward.column_bytes
        most = int(batch * self.max_length * 1.5)
        self.cache_tokens = cache_tokens or max(1, min(most, int(free * CACHE_SHARE) // column))
        self.forward.arena.limit = self.cache_tokens
        self.prefix = PrefixCache(min(most, int(free * PREFIX_SHARE) // column) if prefix_tokens is None else prefix_tokens)
        kept = int(available(torch.device("cpu")) * KEPT_SHARE) if kept_bytes is None else kept_bytes
        self.slots = Slots(self.forward.home, self.tokenizer, slots, kept, self._notify)
        self.base_stop_ids = frozenset(self.slots.renderer().stop_ids) | _config_stop_ids(model)
        self.anchor = tokenizer("a", add_special_tokens=False)["input_ids"]       # what a first token's leading space needs
        self.counts, self.waiting = Counts(), Waiting()
        self.starting: list[Row] = []                 # whose prompts are being computed
        self.running: list[Row] = []                  # in the order of the arena
        self.wake = threading.Condition()             # guards what follows
        self.inbox: list[Row] = []
        self.changed, self.closed, self.dropping, self.queued = False, False, False, 0
        self.thread: threading.Thread | None = None

    # From any thread.

    def start(self) -> None:
        with self.wake:
            if self.closed:
                raise Stopped("the engine was stopped")
            if self.thread is None:
                self.thread = threading.Thread(target=self._loop, name="tsugiki-engine", daemon=True)
                self.thread.start()

    def stop(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and end. drain: those that are here finish first, for `timeout` seconds at most."""
        with self.wake:
            self.closed = True
            self.dropping = self.dropping or not drain or self.thread is None
            thread = self.thread
        self._notify()
        if thread is None:
            self._drop()
        else:
            thread.join(timeout)
            if thread.is_alive():
                with self.wake:
                    self.dropping = True
                self._notify()
                thread.join()
        self.slots.close()

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Stream:
        """Queue a request; its stream begins when there is room. on_event is called in the engine's thread.

        Raises QueueFull, Stopped, and UserError for an adapter that is not registered or a prompt that is empty, holds no
        tokens of this base, or leaves no room for an answer.
        """
        version = None if request.adapter is None else self.slots.get(request.adapter)
        most = min(self.max_length, int(self.cache_tokens / SLACK))
        room = most - (version.virtual if version else 0) - len(request.ids)
        self._check(request, room)
        seed = request.sampling.seed
        stream = Stream(request, int.from_bytes(os.urandom(8), "big") if seed is None else seed, self._notify, on_event)
        stop_ids = self.base_stop_ids if version is None else version.info.stop_ids
        row = Row(stream, version, stop_ids, min(request.sampling.max_tokens, room))
        with self.wake:
            if self.closed:
                raise Stopped("the engine takes no more requests")
            if self.queued >= self.queue:
                raise QueueFull(f"{self.queued} requests wait already")
            self.queued += 1
            if version is not None:
                version.claims += 1
            self.inbox.append(row)
        self._notify()
        return stream

    def _check(self, request: Request, room: int) -> None:
        vocabulary = self.forward.model.get_input_embeddings().weight.shape[0]
        if not request.ids:
            raise UserError("the prompt is empty: there is nothing to continue")
        if wrong := [i for i in request.ids if type(i) is not int or not 0 <= i < vocabulary]:
            raise UserError(f"the prompt: {wrong[0]!r} is no token of this base (0 to {vocabulary - 1})")
        if room < 1:
            raise UserError(f"the prompt has {len(request.ids)} tokens, which leaves no room for an answer "
                            f"(room for {len(request.ids) + room - 1})")

    def add(self, name: str, path: str | Path) -> AdapterInfo:
        """Register an adapter's folder under a name; it is read and checked at once. Raises UserError."""
        return self.slots.add(name, path)

    def remove(self, name: str) -> None:
        """Forget a name. Requests that named it finish."""
        self.slots.remove(name)

    def replace(self, name: str, path: str | Path) -> AdapterInfo:
        """Give a name another folder's content. Requests that named it before finish on what it was."""
        return self.slots.replace(name, path)

    def adapters(self) -> list[AdapterInfo]:
        return self.slots.infos()

    def info(self, name: str) -> AdapterInfo:
        return self.slots.info(self.slots.get(name))

    def stats(self) -> Stats:
        versions, arena = tuple(self.slots.inside), self.forward.arena
        return Stats(running=len(self.running) + len(self.starting), waiting=self.queued, loads=self.slots.loads,
                     load_seconds=self.slots.load_seconds, evictions=self.slots.evictions,
                     resident=sum(v.resident for v in versions), registered=len(self.slots.named),
                     cache_tokens=sum(tuple(arena.lengths)), cache_limit=self.cache_tokens, prefix_tokens=self.prefix.used,
                     prefix_limit=self.prefix.limit, **self.counts.look())

    def _notify(self) -> None:
        with self.wake:
            self.changed = True
            self.wake.notify()

    # In the engine's thread.

    def _loop(self) -> None:
        with torch.no_grad():
            while True:
                with self.wake:
                    while not (self.changed or self.running or self.starting):
                        self.wake.wait()
                    self.changed = False
                    arrived, self.inbox = self.inbox, []
                    closed, dropping = self.closed, self.dropping
                for row in arrived:
                    self.waiting.put(row)
                if dropping:
                    self._drop()
                if closed and not (self.running or self.starting or self.queued):
                    return
                try:
                    self._cancel()
                    self._admit()
                    self._prompts()
                    self._step()
                except Exception as e:                # a fault of ours: those who run end, the others go on
                    self._fail_all(_line(e))

    def _drop(self) -> None:
        with self.wake:
            arrived, self.inbox = self.inbox, []
        for row in [*arrived, *self.waiting, *self.starting, *self.running]:
            row.stream.cancelled = True
        for row in arrived:
            self.waiting.put(row)
        self._cancel()

    def _cancel(self) -> None:
        for row in [row for row in self.waiting if row.stream.cancelled]:
            self._unqueue(row)
            self._end(row, "cancelled")
        for row in [row for row in self.starting if row.stream.cancelled]:
            self._stop_row(row, "cancelled")
        for row in [row for row in self.running if row.stream.cancelled]:
            self._stop_row(row, "cancelled")

    def _admit(self) -> None:
        """Let waiting requests begin, as long as there are rows, columns and slots for them."""
        for row in [row for row in self.waiting if row.version and row.version.error]:
            self._unqueue(row)
            self._end(row, "error", row.version.error)
            if not row.version.claims:                # whoever asks for it next has it read again
                row.version.error = None
        while len(self.running) + len(self.starting) < self.batch and (row := self._next()):
            with self.wake:
                self.queued -= 1
            row.writer = Writer(self.tokenizer, self.anchor, row.sampling.stop)
            if not row.placed:
                row.done, row.kv = self.prefix.take(row.content, row.prompt)
                row.stream.cached_tokens = row.done
                self.counts.cached += row.done
            self.starting.append(row)

    def _next(self) -> Row | None:
        aged = self.waiting.aged()
        if aged is None:
            return self.waiting.take(self._begin)
        if self._begin(aged):
            self.waiting.drop(aged)
            return aged
        if not self._fits(aged):                      # it needs columns: nobody takes any until it has them
            return None
        # It needs a slot: the emptiest one is let run empty, and no other adapter takes one.
        attached = [None, *(v for v in tuple(self.slots.inside) if v.resident)]
        return self.waiting.take(lambda row: row.version in attached and self._begin(row), self.slots.emptiest() or ())

    def _begin(self, row: Row) -> bool:
        return self._fits(row) and self.slots.hold(row.version)

    def _fits(self, row: Row) -> bool:
        taken = [r.columns for r in (*self.running, *self.starting)]
        return not taken or self.forward.arena.cost([*taken, row.columns]) <= self.cache_tokens

    def _unqueue(self, row: Row) -> None:
        self.waiting.drop(row)
        with self.wake:
            self.queued -= 1

    def _prompts(self) -> None:
        """Compute up to `chunk` tokens of prompts; whose prompt is done gets its first token and joins those that run."""
        if not self.starting:
            return
        group = self.forward.group(self.starting, self.chunk)
        try:
            scores = self.forward.prompt(group)
        except Exception as e:
            if len(group) == 1:
                self._stop_row(group[0][0], "error", _line(e))
                return
            scores = self._prompts_alone(group)
        self.counts.prefilled += sum(size for _, size in group)
        done = [(row, s) for (row, _), s in zip(group, scores, strict=True) if s is not None]
        for row, _ in done:
            if not row.placed:
                self.prefix.keep(row.content, row.prompt, row.kv)
            self.starting.remove(row)
            self.forward.arena.join(row.kv)
            self.running.append(row)
            row.kv = None
        if done:
            self._choose([row for row, _ in done], torch.stack([s for _, s in done]))

    def _prompts_alone(self, group: list[tuple[Row, int]]) -> list[Tensor | None]:
        """One by one, after all together failed: who fails again ends."""
        found = []
        for row, size in group:
            try:
                found += self.forward.prompt([(row, size)])
            except Exception as e:
                self._stop_row(row, "error", _line(e))
                found.append(None)
        return found

    def _step(self) -> None:
        if not self.running:
            return
        rows = list(self.running)
        try:
            scores = self.forward.step(rows)
        except Exception:
            rows, scores = self._step_alone(rows)
        self.counts.steps += 1
        if rows:
            self._choose(rows, scores)

    def _step_alone(self, rows: list[Row]) -> tuple[list[Row], Tensor | None]:
        good, scores, failed = [], [], []
        for i, row in enumerate(rows):
            try:
                scores.append(self.forward.alone(i, row))
                good.append(row)
            except Exception as e:
                failed.append((row, _line(e)))
        self.forward.arena.advance()
        for row, line in failed:
            self._stop_row(row, "error", line)
        return good, torch.stack(scores) if scores else None

    def _choose(self, rows: list[Row], scores: Tensor) -> None:
        """The next token of each of these running rows, from scores (n, V)."""
        finite = scores.amax(-1).isfinite().tolist()
        tokens = sampling.choose(scores, [row.draw() for row in rows])
        for row, token, ok, own in zip(rows, tokens, finite, scores, strict=True):
            if not ok:
                self._stop_row(row, "error", "the model's scores are not finite numbers"
                               + (f" with the adapter {row.version.name!r}" if row.version else ""))
                continue
            try:
                if finish := row.push(token, own, self.tokenizer):
                    self._stop_row(row, finish, told=True)
            except Exception as e:                    # its text cannot be made
                self._stop_row(row, "error", _line(e))
        self.counts.tokens(sum(finite))

    def _stop_row(self, row: Row, finish: str, error: str | None = None, told: bool = False) -> None:
        """Take a row out of what runs. told: its last event has been given."""
        if row in self.running:
            at = self.running.index(row)
            last = self.running.pop()
            if last is not row:
                self.running[at] = last
            self.forward.arena.leave(at, clean=finish == "error")
        else:
            self.starting.remove(row)
        self.slots.release(row.version)
        self._end(row, finish, error, told)

    def _end(self, row: Row, finish: str, error: str | None = None, told: bool = False) -> None:
        self.counts.end(row.stream.request.adapter, finish, len(row.answer))
        with self.wake:
            self.changed = True                       # someone may be able to begin now
            if row.version is not None:
                row.version.claims -= 1
        if not told:
            row.end(finish, error)

    def _fail_all(self, line: str) -> None:
        for row in [*self.starting, *self.running]:
            with suppress(Exception):
                self.slots.release(row.version)
            self._end(row, "error", line)
        self.starting, self.running = [], []
        self.forward.renew()


def _line(error: Exception) -> str:
    if out_of_memory(error):
        return "there was not enough memory for this request"
    if isinstance(error, UserError):
        return str(error).splitlines()[0]
    return f"the computation failed ({type(error).__name__})"


def _config_stop_ids(model: nn.Module) -> frozenset[int]:
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset() if found is None else frozenset(found) if isinstance(found, (list, tuple)) else frozenset((found,))
