"""Attention of one new token a row to all that was before, on a CPU in bfloat16: rows.c, which reads keys and values once.

torch's fused kernel is made for many queries; benchmarks/one_token.py prints both. transformers calls this as an attention
implementation, by name. Whatever is not plain attention of one token goes to transformers' own `sdpa`.
"""
from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tsugiki.kernels.native import close, library, run

NAME = "tsugiki_one_token"
ALONE = 1 << 14                                       # scores of one call from which threads pay


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether `one_token` computes on these. mask (B, 1, 1, L) bool, True: seen; or None."""
    seen = mask is None or mask.dtype is torch.bool and mask.shape[1:] == (1, 1, key.shape[2]) and mask.stride(3) == 1 \
        and len(mask) in (1, len(query))
    return seen and query.dtype is key.dtype is value.dtype is torch.bfloat16 and query.is_cpu and query.shape[2] == 1 \
        and query.shape[3] == value.shape[3] and query.shape[3] % 32 == 0 and key.stride(3) == value.stride(3) == 1 and works()


def one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query a row.

    query (B, H, 1, D), key and value (B, K, L, D), K dividing H, bfloat16; mask as in `takes`; between a load and a store
    all is float32. What is not seen is not read. Returns (B, 1, H, D). Source: equation 1 of arXiv:1706.03762.
    """
    b, h, _, d = query.shape
    kv, length = key.shape[1:3]
    query = query if query.stride(3) == 1 else query.contiguous()
    out = query.new_empty(b, 1, h, d)
    by = (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3], mask.stride(0) if mask is not None and len(mask) > 1 else 0)
    threads = torch.get_num_threads() if b * h * length >= ALONE else 1
    if run("one_token", query, key, value, mask, out, (ctypes.c_long * len(by))(*by), b, kv, h // kv, length, d, scale, threads):
        raise MemoryError("not enough memory for attention of one token")
    return out


def _forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
             scaling: float | None = None, dropout: float = 0.0, **kwargs):
    """What transformers calls."""
    if takes(query, key, value, attention_mask) and not dropout and not torch.is_grad_enabled() \
            and all(kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias", "cache")):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return one_token(query, key, value, attention_mask, float(scale)), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@cache
def works() -> bool:
    """Whether the kernel is there, and what it makes of small numbers is as torch's in float32."""
    if library() is None:
        return False
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 32, generator=g).bfloat16() for heads, n in ((6, 1), (2, 21), (2, 21)))
    mask = torch.arange(21).view(1, 1, 1, 21) >= torch.tensor([0, 4]).view(2, 1, 1, 1)
    wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, scale=0.3, enable_gqa=True)
    return close(one_token(q, k, v, mask, 0.3), wanted.transpose(1, 2))


def with_one_token(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config whose attention is this one; the config itself if its attention is not transformers' `sdpa`, or the kernel
    is not there."""
    if getattr(config, "_attn_implementation", None) != "sdpa" or not works():
        return config
    new = object.__new__(type(config))                # not deepcopy: what hangs on a config stays the same
    new.__dict__.update(config.__dict__)
    new._attn_implementation_internal = NAME
    return new
