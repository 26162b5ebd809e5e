"""Several adapters of one method at one site, computed as one: their tensors stacked, their rows gathered beside each other.

Nothing is summed over adapters and no filler belongs to another's rows: what one adapter makes, a NaN too, reaches no other.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .edit import Edit
from .pool import version
from .route import Context, Rows

Part = tuple[Edit, Rows, float]                       # an edit, the rows (or positions) that are its own, its weight


def together(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts in groups that can be computed as one each; most groups hold one part."""
    if len(parts) == 1 or torch.compiler.is_compiling():                      # a graph is for one route: nothing to share
        return [[part] for part in parts]
    groups: dict[object, list[Part]] = {}
    for n, (edit, rows, weight) in enumerate(parts):
        alike = edit.alike() if weight == 1.0 and rows is not None else None
        groups.setdefault(n if alike is None else (type(edit), alike), []).append((edit, rows, weight))
    if torch.is_grad_enabled():
        return list(groups.values())
    # By adapter, not by row: when rows trade places, stacks that are kept still serve.
    return [sorted(group, key=lambda part: id(part[0])) for group in groups.values()]


@dataclass(frozen=True)
class Gather:
    """How n adapters' rows lie beside each other, each as many as the most has.

    slice: where they are already, in this order and equally many; else index: (n * most,) int64, an adapter's first row in
    the place of those it lacks, and `own`, which of the index are no fillers (None: all).
    """
    count: int
    slice: slice | None
    index: Tensor | None = None
    own: Tensor | None = None

    def take(self, t: Tensor) -> Tensor:
        """(R, ...) -> (n * most, ...)"""
        return t[self.slice] if self.index is None else t.index_select(0, self.index)

    def put(self, t: Tensor, new: Tensor) -> Tensor:
        """t with the rows of `new`, (n * most, ...), in their places."""
        if self.index is None:
            return torch.cat([t[:self.slice.start], new, t[self.slice.stop:]])
        return t.index_copy(0, self.index, new) if self.own is None else t.index_copy(0, self.index[self.own], new[self.own])


def gather(rows: Sequence[Rows], device: torch.device) -> Gather:
    """Of the rows of several adapters, slices or int64 tensors."""
    sizes = [r.stop - r.start if isinstance(r, slice) else len(r) for r in rows]
    most = max(sizes)
    if min(sizes) == most and all(isinstance(r, slice) for r in rows) \
            and all(a.stop == b.start for a, b in zip(rows, rows[1:], strict=False)):
        return Gather(len(rows), slice(rows[0].start, rows[-1].stop))
    full = [torch.arange(r.start, r.stop) if isinstance(r, slice) else r.cpu() for r in rows]
    index = torch.cat([torch.cat([r, r[:1].expand(most - len(r))]) for r in full])
    own = torch.cat([torch.arange(most) < n for n in sizes]).nonzero()[:, 0]
    return Gather(len(rows), None, index.to(device), None if min(sizes) == most else own.to(device))


def run(parts: Sequence[Part], stack: Edit, x: Tensor | None, t: Tensor, ctx: Context) -> Tensor:
    """t with the rows of all parts edited by their stacked edits. t, x: (B, T, D), D that of the input in x; x None: the
    edit is one of the input itself, t."""
    key = ("gather", tuple(id(edit) for edit, _, _ in parts))
    how = ctx.scratch.get(key)
    if how is None:
        how = ctx.scratch[key] = gather([rows for _, rows, _ in parts], t.device)
    n, width = how.count, t.shape[1]
    flat = t if ctx.axis == 0 else t[0]                                       # (R, T, D), or (R, D) of one packed row

    def lay(value: Tensor) -> Tensor:
        part = how.take(value if ctx.axis == 0 else value[0])
        return part if stack.by_row else part.reshape(n, -1, value.shape[-1])

    keys = None if ctx.keys is None or stack.by_row else lay(ctx.keys[:, -width:, None])[..., 0]
    part = replace(ctx, mask=None, keys=keys, places=None)
    now = lay(t)
    new = stack.pre(now, part) if x is None else stack.post(lay(x), now, part)
    new = how.put(flat, new.to(t.dtype).reshape(-1, *flat.shape[1:]))
    return new if ctx.axis == 0 else new[None]


def stacked(modules: Sequence[nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
    """One edit (or part of one) with the tensors of several that are alike: a matrix (a, b) becomes (n, a, b), a vector (a,)
    (n, 1, a), smaller ones filled up with zeros; numbers in `scalars` (n, 1, 1). dtype: what they are cast to, for use without
    gradients."""
    first = modules[0]
    new = object.__new__(type(first))
    nn.Module.__init__(new)
    inner = set(vars(new))
    for name, value in vars(first).items():
        if name not in inner:
            new.__dict__[name] = value
    new.__dict__["training"] = first.training
    for name in getattr(first, "scalars", ()):
        values = [getattr(m, name) for m in modules]
        if any(v != values[0] for v in values):
            tensor = next(m for m in modules[0].parameters())
            new.__dict__[name] = torch.tensor(values, device=tensor.device, dtype=tensor.dtype)[:, None, None]
    for name, tensor in (*first._parameters.items(), *first._buffers.items()):
        same = tensor is None or name == "salt"
        new.__dict__[name] = tensor if same else _stack([getattr(m, name) for m in modules], dtype)
    for name, child in first._modules.items():
        new._modules[name] = stacked([m._modules[name] for m in modules], dtype) if child is not None else None
    return new


def _stack(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    if any(list(t.shape) != shape for t in tensors):
        tensors = [F.pad(t, [n for size, now in zip(shape[::-1], t.shape[::-1], strict=True) for n in (0, size - now)])
                   for t in tensors]
    whole = torch.stack(list(tensors))
    whole = whole[:, None] if len(shape) == 1 else whole
    return whole if dtype is None else whole.to(dtype)


class _Kept:
    """A stacked edit, and what it was made of."""

    def __init__(self, edits: Sequence[Edit], dtype: torch.dtype):
        self.edits = tuple(edits)                     # held, so that their ids stay theirs
        self.places = [(m._parameters, name) for edit in edits for m in edit.modules() for name, p in m._parameters.items()
                       if p is not None]
        self.state = self._state()
        self.edit = stacked(edits, dtype)

    def _state(self) -> list[tuple[int, int]]:
        found = [of[name] for of, name in self.places]
        return [(t.data_ptr(), version(t)) for t in found]

    def fresh(self) -> bool:
        return self.state == self._state()


class Stacks:
    """Stacked edits that are kept while no gradient is wanted, as long as none of their tensors changes."""
    KEPT = 4                                          # sets of adapters a site

    def __init__(self) -> None:
        self.kept: dict[tuple, _Kept] = {}

    def __deepcopy__(self, memo: dict) -> Stacks:
        return Stacks()                               # of a copied model: its edits are others

    def forget(self, edit: Edit) -> None:
        for key in [key for key in tuple(self.kept) if id(edit) in key]:
            self.kept.pop(key, None)

    def get(self, edits: Sequence[Edit], dtype: torch.dtype) -> Edit:
        if torch.is_grad_enabled():
            return stacked(edits)
        key = (dtype, *map(id, edits))
        found = self.kept.get(key)
        if found is not None and found.fresh():
            return found.edit
        for old in list(self.kept)[:1 - self.KEPT]:   # a list: other threads may be here too
            self.kept.pop(old, None)
        made = self.kept[key] = _Kept(edits, dtype)
        return made.edit
