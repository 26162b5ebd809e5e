"""Causal attention of many documents laid end to end, each seeing only itself: work sum(l^2), where a mask costs T^2.

On a CPU torch's fused kernel is slow, backward most of all; here documents of like length go through batched matrix products
(AMX or AVX512 do those well), in blocks of queries, and backward makes the scores again, so that nothing quadratic is kept.
In bfloat16 documents.py's compiled kernel does the same without writing scores to memory, where it can be built.
On CUDA it is torch's variable-length kernel. Models take it as an attention implementation of transformers, by name.
"""
from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from tsugiki.kernels import documents as compiled

NAME = "tsugiki_documents"
SCORES = 1 << 20              # scores computed at once: more would leave the cache
BLOCK = 128                   # queries a block of a long document: half of its square lies behind the diagonal


class Undivided(RuntimeError):
    """Packed rows came to where no kernel takes their ends, without a mask."""


@dataclass(frozen=True)
class Group:
    """Documents of like length, computed at once."""
    rows: Tensor                                      # (G * L,) int64: which token; the first one where there is none
    real: Tensor | None                               # (n,) int64: places of `rows` that hold a token; None: all
    count: int
    length: int


@lru_cache(maxsize=32)
def groups(lengths: tuple[int, ...], heads: int) -> tuple[Group, ...]:
    """Cut documents into groups: within one, a document is filled by at most an eighth of its length, or 16 tokens."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
    found, at = [], 0
    while at < len(order):
        longest = lengths[order[at]]
        most = max(1, SCORES // (heads * longest * min(longest, BLOCK)))
        members = [i for i in order[at:at + most] if longest - lengths[i] <= max(16, longest // 8)]
        at += len(members)
        rows = torch.stack([_padded(starts[i], lengths[i], longest) for i in members]).flatten()
        real = (rows >= 0).nonzero().flatten()
        found.append(Group(rows.clamp_min(0), None if len(real) == len(rows) else real, len(members), longest))
    return tuple(found)


def _padded(start: int, length: int, width: int) -> Tensor:
    row = torch.arange(start, start + width)
    row[length:] = -1
    return row


@lru_cache(maxsize=8)
def _causal(width: int, dtype: torch.dtype) -> Tensor:
    """(width, width), -inf above the diagonal."""
    return torch.full((width, width), float("-inf"), dtype=dtype).triu_(1)


def _gather(t: Tensor, group: Group, kv_heads: int) -> Tensor:
    """(tokens, H, D) -> (G * kv_heads, H / kv_heads, L, D)."""
    picked = t.index_select(0, group.rows).view(group.count, group.length, kv_heads, -1, t.shape[-1])
    return picked.permute(0, 2, 3, 1, 4).reshape(group.count * kv_heads, -1, group.length, t.shape[-1])


def _scatter(out: Tensor, t: Tensor, group: Group, kv_heads: int) -> None:
    """The way back, into `out` (tokens, H, D)."""
    t = t.view(group.count, kv_heads, -1, group.length, t.shape[-1]).permute(0, 3, 1, 2, 4).reshape(-1, *out.shape[1:])
    rows = group.rows
    if group.real is not None:
        t, rows = t.index_select(0, group.real), rows.index_select(0, group.real)
    out.index_copy_(0, rows, t)


def _weights(q: Tensor, k: Tensor, first: int, scale: float) -> Tensor:
    """softmax(scale q k^T) of the queries first.. of each document: (N, g, b, first + b), in float32 or better."""
    n, g, b, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q.reshape(n, g * b, d), k.transpose(1, 2)).view(n, g, b, first + b)
    size = -(-(first + b) // BLOCK) * BLOCK                          # few sizes, so that few masks are kept
    return torch.softmax(torch.add(_causal(size, wide)[first:first + b, :first + b], scores, alpha=scale), -1)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, BLOCK):
        yield first, min(first + BLOCK, length)


def _tokens(t: Tensor) -> Tensor:
    """(B, H, T, D) -> (B * T, H, D)."""
    return t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3])


def _lengths(query: Tensor, ends: Tensor | None) -> tuple[int, ...]:
    if ends is None:
        return (query.shape[2],) * query.shape[0]
    return tuple(ends.diff().tolist())


@torch.library.custom_op("tsugiki::documents", mutates_args=())
def documents(query: Tensor, key: Tensor, value: Tensor, ends: Tensor | None, scale: float) -> Tensor:
    """Causal attention within each document.

    query (B, H, T, D), key and value (B, K, T, D), K dividing H, any float dtype; softmax in float32 (float64 for float64).
    ends: (documents + 1,) integers, 0 and where each document of the B * T tokens ends; None: each row is one document.
    Returns (B, T, H, D). Source: equation 1 of Vaswani et al. 2017 (arXiv:1706.03762).
    """
    kv, d, lengths = key.shape[1], value.shape[3], _lengths(query, ends)
    q, k, v = _tokens(query), _tokens(key), _tokens(value)
    out = q.new_empty(*q.shape[:2], d)
    fast = compiled.takes(q, v, lengths, scale)
    if fast:
        compiled.forward(q, k, v, out, lengths, scale)
    for group in () if fast else groups(lengths, q.shape[1]):
        qs, ks, vs = (_gather(t, group, kv) for t in (q, k, v))
        ks, vs, made = ks.squeeze(1), vs.squeeze(1), qs.new_empty(*qs.shape[:3], d)
        for a, b in _blocks(group.length):
            p = _weights(qs[:, :, a:b], ks[:, :b], a, scale).to(q.dtype)
            made[:, :, a:b] = torch.bmm(p.view(len(p), -1, b), vs[:, :b]).view(*p.shape[:3], d)
        _scatter(out, made, group, kv)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:])


@documents.register_fake
def _(query, key, value, ends, scale):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("tsugiki::documents_backward", mutates_args=())
def documents_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, ends: Tensor | None,
                       scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `documents` by query, key and value, in their shapes; grad is (B, T, H, D)."""
    kv, lengths = key.shape[1], _lengths(query, ends)
    q, k, v, do = _tokens(query), _tokens(key), _tokens(value), grad.reshape(-1, *grad.shape[2:])
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    fast = compiled.takes(q, v, lengths, scale)
    if fast:
        compiled.backward(q, k, v, do, (dq, dk, dv), lengths, scale)
    for group in () if fast else groups(lengths, q.shape[1]):
        qs, ks, vs, dos = (_gather(t, group, kv) for t in (q, k, v, do))
        if group.real is not None:
            _clear_filling(dos, group, kv)
        for t, made in zip((dq, dk, dv), _group_backward(dos, qs, ks.squeeze(1), vs.squeeze(1), scale), strict=True):
            _scatter(t, made, group, kv)
    shape = (query.shape[0], query.shape[2])
    return tuple(t.view(*shape, *t.shape[1:]).transpose(1, 2) for t in (dq, dk, dv))


@documents_backward.register_fake
def _(grad, query, key, value, ends, scale):
    return tuple(t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (query, key, value))


def _clear_filling(grad: Tensor, group: Group, kv_heads: int) -> None:
    """No gradient comes from queries that are filling; so none reaches a key or a value from there."""
    filling = torch.ones(group.count * group.length, dtype=torch.bool)
    filling[group.real] = False
    grad.view(group.count, kv_heads, -1, group.length, grad.shape[-1]).masked_fill_(
        filling.view(group.count, 1, 1, group.length, 1), 0)


def _group_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """do, q: (N, g, L, D); k, v: (N, L, D)."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for a, b in _blocks(q.shape[2]):
        qb, dob = q[:, :, a:b], do[:, :, a:b]
        p = _weights(qb, k[:, :b], a, scale)
        qb, dob = qb.reshape(len(q), -1, q.shape[3]), dob.reshape(len(q), -1, do.shape[3])   # (N, g * b, D)
        dp = torch.bmm(dob, v[:, :b].transpose(1, 2)).view(p.shape)
        ds = torch._softmax_backward_data(dp.to(p.dtype), p, -1, p.dtype).mul_(scale).to(q.dtype).view(len(q), -1, b)
        dq[:, :, a:b] = torch.bmm(ds, k[:, :b]).view(*p.shape[:3], -1)
        dk[:, :b] += torch.bmm(ds.transpose(1, 2), qb)
        dv[:, :b] += torch.bmm(p.to(q.dtype).view(ds.shape).transpose(1, 2), dob)
    return dq, dk.unsqueeze(1), dv.unsqueeze(1)


def _save(ctx, inputs, output) -> None:
    query, key, value, ends, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, ends)


def _backward(ctx, grad):
    return (*documents_backward(grad, *ctx.saved_tensors, ctx.scale), None, None)


documents.register_autograd(_backward, setup_context=_save)


def _varlen(query: Tensor, key: Tensor, value: Tensor, ends: Tensor | None, scale: float) -> Tensor:
    """The same on CUDA, in bfloat16 or float16."""
    from torch.nn.attention.varlen import varlen_attn
    rows, length = query.shape[0], query.shape[2]
    if ends is None:
        ends = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query.device)
    out = varlen_attn(_tokens(query), _tokens(key), _tokens(value), ends, ends, length, length, scale=scale,
                      window_size=(-1, 0), enable_gqa=query.shape[1] != key.shape[1])
    return out.view(rows, length, *out.shape[1:])


def _forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
             scaling: float | None = None, dropout: float = 0.0, cu_seq_lens_q: Tensor | None = None, **kwargs):
    """What transformers calls. Whatever is not plain causal attention goes to its own `sdpa`."""
    plain = attention_mask is None and not dropout and query.shape[2] == key.shape[2] > 1 \
        and kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False \
        and all(kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias", "cache"))
    if plain and (query.device.type == "cpu" or _has_varlen(query, value)):     # value has the dtype that all will have
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        made = documents if query.device.type == "cpu" else _varlen
        if torch.is_autocast_enabled(query.device.type):              # as torch's own attention: rotary leaves float32 behind
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (t.to(dtype) for t in (query, key, value))
        return made(query, key, value, cu_seq_lens_q, float(scale)), None
    if cu_seq_lens_q is not None and attention_mask is None:
        raise Undivided("documents in one row cannot be told apart here: no mask was made")
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _has_varlen(query: Tensor, value: Tensor) -> bool:
    return query.device.type == "cuda" and value.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] == value.shape[-1] \
        and query.shape[-1] <= 256 and hasattr(torch.nn.attention, "varlen")


def _mask(batch_size: int, q_length: int, kv_length: int, *args, attention_mask: Tensor | None = None,
          local_size: int | None = None, **kwargs) -> Tensor | None:
    """No mask where attention is plain and causal; transformers' own where rows are cached, filled up at the left, or wider than a
    window. What fills a row up at the right is seen by no token before it, and what it sees itself nobody asks for."""
    if q_length == kv_length and (local_size is None or kv_length <= local_size):
        causal = local_size is not None or kwargs.get("mask_function") is causal_mask_function
        if attention_mask is None or attention_mask.shape[1] == kv_length and (
                bool(attention_mask.all()) or causal and _filled_at_the_right(attention_mask)):
            return None
    return sdpa_mask(batch_size, q_length, kv_length, *args, attention_mask=attention_mask, local_size=local_size, **kwargs)


def _filled_at_the_right(mask: Tensor) -> bool:
    """Whether the tokens of each row, (B, S), are its first ones."""
    real = mask.bool()
    return bool((real[:, 1:] <= real[:, :-1]).all())


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _mask)


def active(model: nn.Module) -> bool:
    return getattr(model.config, "_attn_implementation", None) == NAME


@contextmanager
def by_document(model: nn.Module) -> Iterator[bool]:
    """Inside: the model's attention is this one, if it takes transformers' sdpa by name; yields whether."""
    before = getattr(model.config, "_attn_implementation", None)
    if before != "sdpa":
        yield before == NAME
        return
    log = logging.getLogger("transformers.modeling_utils")
    level = log.level
    log.setLevel(logging.ERROR)                       # of models that cannot: it says so, and changes nothing
    try:
        model.set_attn_implementation(NAME)
    finally:
        log.setLevel(level)
    try:
        yield active(model)
    finally:
        if active(model):
            model.set_attn_implementation(before)
