"""Keys and values of a generation, written in place into buffers that grow by a block at a time."""
from __future__ import annotations

from functools import partial

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

BLOCK = 64                                            # positions a buffer grows by


class Layer(DynamicLayer):
    """One layer's keys and values: (B, H, capacity, D) buffers, of which the first `length` positions are used.

    transformers' own layer makes new tensors of all positions at every token. It also forgets what is outside of a sliding
    window; here the model's mask hides it. With `transposed`, keys lie in memory as (B, H, D, capacity).
    """
    _layer_type = None                                # not for transformers to choose by itself

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.length, self.transposed = 0, transposed
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[-2]
        states = (key_states, value_states)
        if self.buffers is None or self.length > self.buffers[0].shape[-2]:
            self._grow(states, start)
        for buffer, new in zip(self.buffers, states, strict=True):
            buffer[..., start:self.length, :] = new
        self.is_initialized = True
        self.keys, self.values = states if not start else [b[..., :self.length, :] for b in self.buffers]
        return self.keys, self.values

    def _grow(self, states: tuple[Tensor, Tensor], used: int) -> None:
        room = -(-(self.length + 1) // BLOCK) * BLOCK
        old, self.buffers = self.buffers, tuple(t.new_empty(*t.shape[:-2], room, t.shape[-1]) for t in states)
        if self.transposed:
            keys = states[0]
            self.buffers = keys.new_empty(*keys.shape[:-2], keys.shape[-1], room).transpose(-2, -1), self.buffers[1]
        for buffer, before in zip(self.buffers, old or (), strict=bool(old)):
            buffer[..., :used, :] = before[..., :used, :]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def select(self, rows: Tensor, cut: int = 0) -> None:
        self.buffers = tuple(b[rows, ..., cut:, :] for b in self.buffers)         # indexing keeps how they lie
        self.length -= cut
        self.keys, self.values = (b[..., :self.length, :] for b in self.buffers)


class Grown(Cache):
    """The cache of all layers."""

    def select(self, rows: Tensor, cut: int = 0) -> None:
        """Keep these rows, (n,) int64, without their first `cut` positions."""
        for layer in self.layers:
            layer.select(rows, cut)


def grown(transposed: bool = False) -> Grown:
    return Grown(layer_class_to_replicate=partial(Layer, transposed))
