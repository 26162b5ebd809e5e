"""A decoder layer for one new token a row, in one call: layer.c.

    n = first(x);   h = x + o(attention(rotary(norm(q(n))), rotary(norm(k(n))), v(n)))
    m = second(h);  out = h + down(act(gate(m)) up(m))

as in Llama (arXiv:2302.13971) and what follows it. Between the products a layer of small rows costs more in calls than in work.
"""
from __future__ import annotations

import ctypes
import threading
from ctypes import Structure, c_double, c_long, c_void_p

import torch
from torch import Tensor

from tsugiki.kernels.native import run
from tsugiki.kernels.rows import ALONE


class NormArgs(Structure):
    """weight (D,): null where there is none; see passes.RMSNorm."""
    _fields_ = (("weight", c_void_p), ("eps", c_double), ("offset", c_double), ("inner", c_long))


class LinearArgs(Structure):
    """A laid-out weight (rows.Laid), a bias or null; and each row's own low-rank change, as low_rank.own takes it, or rank 0."""
    _fields_ = (("tiles", c_void_p), ("bias", c_void_p), ("out", c_long), ("width", c_long), ("a", c_void_p), ("b", c_void_p),
                ("scale", c_void_p), ("place", c_void_p), ("rank", c_long))


NORMS, LINEARS = ("first", "second", "query", "key"), ("q", "k", "v", "o", "gate", "up", "down")


class LayerArgs(Structure):
    _fields_ = (*((name, NormArgs) for name in NORMS), *((name, LinearArgs) for name in LINEARS),
                ("heads", c_long), ("kv_heads", c_long), ("d", c_long), ("tanh", c_long), ("scaling", c_double))


ALIGNED = 64                                          # bytes
_own = threading.local()


def step(layer: LayerArgs, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The layer's output for x (B, 1, D), B at most rows.MOST. cos, sin (B or 1, 1, d) contiguous; keys, values (B, K, L, d), whose
    last token is the new one's place: it is written; mask (B or 1, 1, 1, L) bool, True: seen; all else bfloat16."""
    x, out = x.contiguous(), torch.empty_like(x)
    threads = torch.get_num_threads() if layer.gate.out * layer.gate.width >= ALONE else 1
    by = (0, 0, *keys.stride()[:3], *values.stride()[:3], mask.stride(0) if mask is not None and len(mask) > 1 else 0)
    if run("layer_step", ctypes.byref(layer), x, out, cos, sin, cos.shape[2] if len(cos) > 1 else 0, keys, values, mask,
           (c_long * len(by))(*by), len(x), keys.shape[2], _room(layer, len(x)), threads):
        raise MemoryError("not enough memory for a layer")
    return out


def _room(layer: LayerArgs, rows: int) -> Tensor:
    """Memory of this thread for what lies between: new memory at every call would cost more than it is used."""
    size = 2 * rows * (3 * layer.q.width + layer.q.out + layer.k.out + layer.v.out + layer.o.width + 2 * layer.gate.out) + ALIGNED
    if getattr(_own, "room", None) is None or _own.room.numel() < size:
        _own.room = torch.empty(size, dtype=torch.uint8)
    return _own.room

