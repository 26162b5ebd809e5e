"""How fast this machine is: its rates at a step's own shapes, measured on random numbers in a second or so, once a process."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tsugiki.kernels.attention import documents
from tsugiki.rehearsal import Attention, Product, Work

COVERED = 0.95                                        # share of the FLOPs whose shapes are measured, the largest first
SMALL = 5e8                                           # FLOPs of one measurement: larger shapes are cut down to it
STREAM = 1 << 20                                      # elements of one tensor where memory traffic is measured


def seconds(work: Mapping[Any, Work], calls: int, device: torch.device, dtype: torch.dtype) -> float:
    """Time of one step's work: each product at the rate of its shape or at that of memory, whichever is slower; all other
    operations by the bytes they move; and what a call costs however small it is.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        return _seconds(work, calls, device, dtype)


def _seconds(work: Mapping[Any, Work], calls: int, device: torch.device, dtype: torch.dtype) -> float:
    stream = bandwidth(device, dtype)
    heavy = {kind: w for kind, w in work.items() if w.flops}
    known, left = {}, COVERED * sum(w.flops for w in heavy.values())
    for kind, w in sorted(heavy.items(), key=lambda item: -item[1].flops):
        if isinstance(kind, (Product, Attention)) and (left > 0 or isinstance(kind, Attention)):
            known[kind], left = rate(_cut(kind), device), left - w.flops
    usual = sum(heavy[k].flops for k in known) / sum(heavy[k].flops / r for k, r in known.items()) if known else 1.0
    products = sum(max(w.flops / known.get(kind, usual), w.moved / stream) for kind, w in heavy.items())
    rest = sum(w.moved for kind, w in work.items() if kind not in heavy) / stream
    return products + rest + calls * call_cost(device)


def _cut(shape: Product | Attention) -> Product | Attention:
    """The shape with its largest sides halved until one run of it is short."""
    if isinstance(shape, Attention):
        shape, size = replace(shape, batch=1), 4 * shape.queries * shape.keys * shape.head
        return replace(shape, heads=max(1, min(shape.heads, int(SMALL / size))))
    while 2 * shape.m * shape.k * shape.n > SMALL:
        side = max(("m", "k", "n"), key=lambda name: getattr(shape, name))
        shape = replace(shape, **{side: -(-getattr(shape, side) // 2)})
    return replace(shape, batch=max(1, min(shape.batch, int(SMALL / (2 * shape.m * shape.k * shape.n)))))


@cache
def rate(shape: Product | Attention, device: torch.device) -> float:
    """FLOPs a second of one shape."""
    draw = partial(torch.randn, dtype=shape.dtype, device=device)
    if isinstance(shape, Attention):
        return _attention_rate(shape, draw, device)
    batch = (shape.batch,) if shape.batch > 1 else ()
    sides = [(shape.m, shape.k), (shape.k, shape.n)]
    a, b = (draw(*batch, *side[::-1]).mT if turned else draw(*batch, *side)
            for side, turned in zip(sides, shape.transposed, strict=True))
    return 2 * shape.batch * shape.m * shape.k * shape.n / _time(lambda: a @ b, device)


def _attention_rate(shape: Attention, draw: Callable[..., Tensor], device: torch.device) -> float:
    lead = (shape.batch, shape.heads)
    q, k, v = (draw(*lead, length, shape.head).requires_grad_() for length in (shape.queries, shape.keys, shape.keys))
    mask = torch.ones(shape.queries, shape.keys, dtype=torch.bool, device=device).tril() if shape.masked else None
    flops = 4 * shape.batch * shape.heads * shape.queries * shape.keys * shape.head

    def forward() -> Tensor:
        if shape.by_document:
            return documents(q, k, v, None, shape.head ** -0.5)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and shape.queries > 1)
    if not shape.backward:
        return flops / _time(forward, device)
    out = forward()
    grad = torch.randn_like(out)
    return 2.5 * flops / _time(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), device)


@cache
def bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second, read and written, of what a decoder does beside products: add, multiply, activate, cast."""
    tensors = [torch.randn(STREAM, dtype=dtype, device=device) for _ in range(16)]
    other = torch.float32 if dtype != torch.float32 else torch.bfloat16
    size = tensors[0].nbytes

    def mix() -> None:
        for x, y in zip(tensors[::2], tensors[1::2], strict=True):
            F.silu(x + y) * x
            x.to(other)
    moved = len(tensors) // 2 * (8 * size + size + STREAM * other.itemsize)
    return moved / _time(mix, device)


@cache
def call_cost(device: torch.device) -> float:
    """Seconds that one operation takes when it has next to nothing to compute, Python and autograd included."""
    layers = nn.ModuleList(nn.Linear(4, 4, device=device) for _ in range(50))

    def chain() -> None:
        x = torch.ones(1, 4, device=device)
        for layer in layers:
            x = x + F.silu(layer(x))
        x.sum().backward()
        for p in layers.parameters():
            p.grad = None
    counted = _Calls()
    with counted:
        chain()
    return _time(chain, device) / counted.calls


class _Calls(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _time(run: Callable[[], object], device: torch.device, times: int = 7) -> float:
    """Seconds of the fastest of a few runs, after one to warm up: what others do on the machine only ever adds."""
    found = []
    for _ in range(times + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])
