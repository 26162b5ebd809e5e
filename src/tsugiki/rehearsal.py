"""A training step without its numbers: every operation runs on shapes alone, and a ledger adds up what it holds and does.

Tensors are torch's fake ones: shape, dtype and device, no storage. So a model of any size is built, a method attached and a
step taken in seconds, by the code that trains, and whatever a method computes is counted. Small whole numbers (token ids,
positions, targets) stay real, so that code which reads them goes the way it goes in a run.
"""
from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten, prim = torch.ops.aten, torch.ops.prim
REAL = 1 << 20                                        # elements up to which a tensor computed from real ones alone is real


@dataclass
class Work:
    """What one kind of operation amounts to in a step."""
    calls: int = 0
    flops: int = 0
    moved: int = 0                                    # bytes read and written


@dataclass(frozen=True)
class Product:
    """One shape of a matrix product: (batch, m, k) x (batch, k, n); which operands lie transposed in memory."""
    batch: int
    m: int
    k: int
    n: int
    dtype: torch.dtype
    transposed: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Attention:
    """One shape of a fused attention: (batch, heads, queries, head) over `keys` keys."""
    batch: int
    heads: int
    queries: int
    keys: int
    head: int
    dtype: torch.dtype
    masked: bool
    backward: bool
    by_document: bool = False                         # by kernels.attention, not torch's


class NeedsValues(RuntimeError):
    """An operation that cannot go on without numbers which a fake tensor does not have."""


class Ledger(TorchDispatchMode):
    """Counts bytes of living storages (`live`) and the work of what runs inside.

    early, late: the most that lived before and since the last `mark`. fake=False counts a real computation in the same way.
    """

    def __init__(self, fake: bool = True):
        super().__init__()
        self.shapes = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)   # it logs each refusal it raises
        self.live = 0
        self.living: dict[int, weakref.ref] = {}
        self.begin()

    def begin(self) -> None:
        """Count peaks and work from here on."""
        self.early = self.late = self.live
        self.work: dict[Any, Work] = {}
        self.calls = 0

    def mark(self) -> None:
        self.early, self.late = max(self.early, self.late), self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is prim.device.default:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _as_in_a_good_run(args[0])
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        out = self._run(func, args, kwargs, inputs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in outputs:
            self._hold(tensor)
        self.late = max(self.late, self.live)
        self.calls += 1
        if not func.is_view and not func._schema.name.startswith(("aten::empty", "aten::new_empty", "aten::_unsafe_view")):
            self._count(func, args, kwargs, out, sum(map(_bytes, inputs)) + sum(map(_bytes, outputs)))
        return out

    def _run(self, func, args, kwargs, inputs: list[Tensor]) -> Any:
        if func is GROUPED and any(isinstance(x, FakeTensor) for x in inputs):
            return _grouped(*args, **kwargs)
        if self.shapes is None or any(isinstance(x, FakeTensor) for x in inputs):
            return func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            return func(*args, **kwargs)              # numbers are there
        with self.shapes:
            out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.numel() > REAL or not inputs and x.is_floating_point() for x in made):
            return out
        return func(*args, **kwargs)

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.living:
            return

        def gone(_):
            self.live -= size
            del self.living[key]
        self.living[key] = weakref.ref(storage, gone)
        self.live += size

    def _count(self, func, args, kwargs, out, moved: int) -> None:
        packet, name = func._overloadpacket, func._schema.name
        kind, flops = None, 0
        if name.startswith("tsugiki::documents"):     # attention by document: here each row is one
            backward = name.endswith("backward")
            query, key = args[backward:backward + 2]
            kind = Attention(*query.shape[:3], key.shape[2], query.shape[3], query.dtype, False, backward, True)
        elif name.startswith("aten::_scaled_dot_product_"):
            kind = _attention(func._schema, args, kwargs)
        if isinstance(kind, Attention):
            flops = (5 if kind.backward else 2) * 2 * kind.batch * kind.heads * kind.queries * kind.keys * kind.head
        elif func is GROUPED:                         # each group has its rows: together 2 * rows * k * n, as of one product
            kind, flops = packet, 2 * args[0].numel() * args[1].shape[-1]
        elif packet in flop_registry:
            kind = _product(args[PRODUCTS[packet]:]) if packet in PRODUCTS else packet
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        entry = self.work.setdefault(kind, Work())
        entry.calls, entry.flops, entry.moved = entry.calls + 1, entry.flops + flops, entry.moved + moved


GROUPED = getattr(getattr(aten, "_grouped_mm", None), "default", None)       # experts, all of them at once
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}          # where their two matrices begin


def _grouped(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """What a grouped product of fake tensors gives. torch's own rule for shapes takes bfloat16 alone; its kernels do not."""
    rows = (len(offs), a.shape[0]) if a.dim() == b.dim() == 2 else (a.shape[-2],)         # (k, S) x (S, n), or (S, k) x (E, k, n)
    return a.new_empty(*rows, b.shape[-1], dtype=out_dtype or a.dtype)


def _product(args: tuple) -> Product:
    a, b = args[:2]
    return Product(a.shape[0] if a.dim() == 3 else 1, *a.shape[-2:], b.shape[-1], a.dtype,
                   tuple(x.stride(-1) != 1 and x.shape[-1] > 1 for x in (a, b)))


def _attention(schema: Any, args: tuple, kwargs: dict) -> Attention:
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    query, key = given["query"], given["key"]         # (B, H, T, d), (B, H, S, d)
    masked = isinstance(given.get("attn_mask", given.get("attn_bias")), Tensor)
    return Attention(*query.shape[:3], key.shape[2], query.shape[3], query.dtype, masked, schema.name.endswith("backward"))


def _bytes(x: Tensor) -> int:
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())    # an expanded tensor is read once


def _as_in_a_good_run(x: Tensor) -> bool | float:
    """What code that asks a computed tensor for its value is told: yes (all is finite), or one. Whole numbers are refused:
    they are counts and places, and what depends on them could be anything."""
    if x.dtype == torch.bool:
        return True
    if x.is_floating_point():
        return 1.0
    raise NeedsValues("a whole number is read from a tensor that has no values")
