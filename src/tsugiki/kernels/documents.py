"""Attention by document, compiled: documents.c. attention.py computes the same without it."""
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from tsugiki.kernels.native import close, library

LONGEST, WIDEST = 8192, 256                           # tokens of a document, numbers of a head: beyond, the cache is too small


def takes(query: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> bool:
    """Whether the compiled kernel computes this. query (tokens, H, D), value (tokens, K, D)."""
    return scale > 0 and query.dtype == value.dtype == torch.bfloat16 and query.device.type == "cpu" \
        and query.shape[2] == value.shape[2] <= WIDEST and max(lengths) <= LONGEST and works()


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lengths: Sequence[int], scale: float) -> None:
    """Attention of documents into out. q, out (tokens, H, D), k, v (tokens, K, D), all bfloat16."""
    _run(0, (q, k, v, out), lengths, scale)


def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, found: Sequence[Tensor], lengths: Sequence[int], scale: float) -> None:
    """Its gradients into `found`: those by q, k and v; grad is (tokens, H, D)."""
    _run(1, (q, k, v, grad, *found), lengths, scale)


def _run(back: int, tensors: Sequence[Tensor], lengths: Sequence[int], scale: float) -> None:
    tensors = [t if t.stride(2) == 1 else t.contiguous() for t in tensors]
    at = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    strides = (ctypes.c_long * (2 * len(tensors)))(*(n for t in tensors for n in t.stride()[:2]))
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    heads, kv = tensors[0].shape[1], tensors[1].shape[1]
    failed = library().documents_run(back, at, strides, (ctypes.c_long * len(starts))(*starts), len(lengths), kv, heads // kv,
                               tensors[0].shape[2], ctypes.c_float(scale), torch.get_num_threads())
    if failed:
        raise MemoryError("not enough memory for attention by document")


@cache
def works() -> bool:
    """Whether the kernel is there, and a small document, forward and backward, is as in float32."""
    if library() is None:
        return False
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(40, 2, 32, generator=g).bfloat16() for _ in range(4))
    made = [torch.empty_like(q) for _ in range(4)]
    _run(0, (q, k, v, made[0]), (40,), 0.2)
    _run(1, (q, k, v, grad, *made[1:]), (40,), 0.2)
    q, k, v, grad = (t.float().transpose(0, 1) for t in (q, k, v, grad))                      # (H, T, D)
    p = (q @ k.mT * 0.2).masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf")).softmax(-1)
    dp = grad @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * 0.2
    wanted = p @ v, ds @ k, ds.mT @ q, p.mT @ grad
    return all(close(a.transpose(0, 1), b) for a, b in zip(made, wanted, strict=True))
