"""Keys and values of rows of unequal lengths, right-aligned: the newest token of every row is in one column.

    row 0   . . . a b c d      Distances between columns are distances between tokens, so sliding windows and ALiBi hold, and
    row 1   . . . . . x y      a step writes one column. Rows join and leave between steps; the window of used columns,
    row 2   . p q r s t u      [start, end), moves to the right and is taken back when it meets the end of the buffers.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

KV = list[tuple[Tensor, Tensor]]                      # of one row, a layer each: (H, L, D)
SPARE = 128                                           # free columns of new buffers, beside as many as are used
SLACK = 1.25                                          # columns a full arena has, over its longest row: else every step moves it


class Layer(DynamicLayer):
    """One layer's buffers, (R, H, capacity, D) each."""
    _layer_type = None                                # not for transformers to choose by itself

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena, self.buffers = arena, None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """New columns of all rows, (B, H, T, D) each; gives the window with them."""
        count, width = key_states.shape[0::2]
        if self.buffers is None:
            self.buffers = tuple(self.arena.empty(states) for states in (key_states, value_states))
        for view, states in zip(self.place(count, width), (key_states, value_states), strict=True):
            view[:, :, view.shape[2] - width:] = states
        self.is_initialized = True
        return self.keys, self.values

    def place(self, rows: int, count: int) -> tuple[Tensor, Tensor]:
        """The window of the first rows with `count` new columns at its end, which are to be written."""
        self.keys, self.values = (b[:rows, :, self.arena.start:self.arena.end + count] for b in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.arena.end - self.arena.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class Arena(Cache):
    """The cache of the rows that run. `lengths` says how many columns each has."""

    def __init__(self, limit: int | None = None):
        super().__init__(layer_class_to_replicate=partial(Layer, self))
        self.limit = limit
        self.lengths: list[int] = []
        self.end = self.capacity = self.rows = 0

    @property
    def start(self) -> int:
        return self.end - max(self.lengths, default=0)

    def empty(self, like: Tensor) -> Tensor:
        """A buffer for states (?, H, ?, D). Zeros: what is masked must be finite all the same, NaN would pass through a mask."""
        return like.new_zeros(self.rows, like.shape[-3], self.capacity, like.shape[-1])

    def room(self, rows: int, length: int, more: int) -> None:
        """Make place for `rows` rows, for one of `length` columns that end where all end, and for `more` columns after it."""
        if rows <= self.rows and length <= self.end and self.end + more <= self.capacity:
            return
        window = max([length, *self.lengths])
        rows, spare = max(rows, len(self.lengths)), window + SPARE
        if self.limit is None or (rows + 3 & ~3) * (window + more) <= self.limit:
            rows = rows + 3 & ~3
        if self.limit is not None:
            spare = max(more, min(spare, self.limit // rows - window))
        self._move(rows, window + spare, window)

    def _move(self, rows: int, capacity: int, end: int) -> None:
        """New buffers, in which the window ends at `end`."""
        used, count, old_end = self.end - self.start, len(self.lengths), self.end
        self.rows, self.capacity, self.end = rows, capacity, end
        for layer in self.layers:
            old = layer.buffers
            layer.keys = layer.values = layer.buffers = None
            new = []
            for buffer in old:
                new.append(self.empty(buffer))
                new[-1][:count, :, end - used:end] = buffer[:count, :, old_end - used:old_end]
            layer.buffers = tuple(new)

    def put(self, row: int, kv: KV, end: int) -> None:
        """Write a row's keys and values so that they end at column `end`."""
        while len(self.layers) < len(kv):
            self.layers.append(self.layer_class_to_replicate())
        for layer, states in zip(self.layers, kv, strict=True):
            if layer.buffers is None:
                layer.buffers = tuple(self.empty(t) for t in states)
                layer.is_initialized = True
            for buffer, t in zip(layer.buffers, states, strict=True):
                buffer[row, :, end - t.shape[-2]:end] = t

    def row(self, row: int, start: int, end: int) -> KV:
        """Columns [start, end) of a row, as views."""
        return [tuple(b[row, :, start:end] for b in layer.buffers) for layer in self.layers]

    def join(self, kv: KV) -> None:
        """A row comes in, the last of all."""
        length = kv[0][0].shape[-2]
        self.room(len(self.lengths) + 1, length, 1)
        self.put(len(self.lengths), kv, self.end)
        self.lengths.append(length)

    def advance(self) -> None:
        """A step wrote one more column of every row."""
        self.end += 1
        self.lengths = [n + 1 for n in self.lengths]

    def leave(self, row: int, clean: bool = False) -> None:
        """A row goes; the last one takes its place. clean: its numbers may not be finite."""
        last = len(self.lengths) - 1
        if clean:
            for layer in self.layers:
                for buffer in layer.buffers:
                    buffer[row] = 0
        if row < last:
            length = self.lengths[last]
            self.put(row, self.row(last, self.end - length, self.end), self.end)
            self.lengths[row] = length
        self.lengths.pop()
        if not self.lengths:
            self.end = 0

    def mask(self, more: int = 1) -> Tensor:
        """(B, window + more) int64: 1 where a row has a token, the `more` new columns among them."""
        device = self.layers[0].buffers[0].device
        width = self.end - self.start + more
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        return (torch.arange(width, device=device) >= width - more - lengths).long()

    def cost(self, lengths: Sequence[int]) -> int:
        """Columns that rows which grow to these lengths take at most."""
        return int(len(lengths) * max(lengths, default=0) * SLACK)


def past_of(kvs: Sequence[KV | None], new: int) -> Arena:
    """An arena for one forward of `new` columns after what the rows have."""
    lengths = [kv[0][0].shape[-2] if kv else 0 for kv in kvs]
    arena = Arena()
    arena.rows, arena.end = len(kvs), max(lengths)
    arena.capacity, arena.lengths = arena.end + new, lengths
    for row, kv in enumerate(kvs):
        if kv:
            arena.put(row, kv, arena.end)
    return arena
