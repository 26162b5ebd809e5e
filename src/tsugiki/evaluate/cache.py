"""Keys and values of a generation, written in place into buffers that grow by a block at a time."""
from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

BLOCK = 64                                            # positions a buffer grows by


class Layer(DynamicLayer):
    """One layer's keys and values: (B, H, capacity, D) buffers, of which the first `length` positions are used.

    transformers' own layer makes new tensors of all positions at every token. It also forgets what is outside of a sliding
    window; here the model's mask hides it.
    """
    _layer_type = None                                # not for transformers to choose by itself

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, states = self.length, (key_states, value_states)
        for view, new in zip(self.place(len(key_states), key_states.shape[-2], states), states, strict=True):
            view[..., start:, :] = new
        self.is_initialized = True
        if not start:
            self.keys, self.values = states
        return self.keys, self.values

    def place(self, rows: int, count: int, states: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """All rows' keys and values with `count` new positions at the end, to be written. states: like them, the first time."""
        start, self.length = self.length, self.length + count
        if self.buffers is None or self.length > self.buffers[0].shape[-2]:
            self._grow(states or self.buffers, start)
        self.keys, self.values = (b[..., :self.length, :] for b in self.buffers)
        return self.keys, self.values

    def _grow(self, states: tuple[Tensor, Tensor], used: int) -> None:
        room = -(-(self.length + 1) // BLOCK) * BLOCK
        old, self.buffers = self.buffers, tuple(t.new_empty(*t.shape[:-2], room, t.shape[-1]) for t in states)
        for buffer, before in zip(self.buffers, old or (), strict=bool(old)):
            buffer[..., :used, :] = before[..., :used, :]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def select(self, rows: Tensor, cut: int = 0) -> None:
        self.buffers = tuple(b[rows, ..., cut:, :] for b in self.buffers)
        self.length -= cut
        self.keys, self.values = (b[..., :self.length, :] for b in self.buffers)


class Grown(Cache):
    """The cache of all layers."""

    def select(self, rows: Tensor, cut: int = 0) -> None:
        """Keep these rows, (n,) int64, without their first `cut` positions."""
        for layer in self.layers:
            layer.select(rows, cut)


def grown() -> Grown:
    return Grown(layer_class_to_replicate=Layer)
