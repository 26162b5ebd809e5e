"""Attention of one new token a row to all that was before, on a CPU: two batched matrix products and a softmax.

Without AMX torch's fused kernel is slow on bfloat16 when each row has one query; benchmarks/one_token.py prints both.
transformers calls this as an attention implementation, by name.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tsugiki.kernels.native import processor

NAME = "tsugiki_one_token"
# Where it is the faster one (benchmarks/one_token.py, on a machine with AMX and one without), from so many scores of one call on.
FASTER = () if "amx_bf16" in processor() else (torch.bfloat16,)
SMALLEST = 1 << 11


def one_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one query a row.

    query (B, H, 1, D), key and value (B, K, L, D), K dividing H, any float dtype; mask (B, 1 or H, 1, L) in the same dtype,
    added to the scores, or None; softmax in float32 (float64 for float64). Returns (B, 1, H, D). Keys that lie transposed
    in memory, (B, K, D, L), are read as they are. Source: equation 1 of Vaswani et al. 2017 (arXiv:1706.03762).
    """
    b, h, _, d = query.shape
    kv, length = key.shape[1:3]
    scores = torch.bmm((query * scale).reshape(b * kv, h // kv, d), key.transpose(2, 3).reshape(b * kv, d, length))
    scores = scores.view(b, h, 1, length)
    if mask is not None:
        scores = scores + mask
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=wide).to(query.dtype).view(b * kv, h // kv, length)
    return torch.bmm(weights, value.reshape(b * kv, length, value.shape[3])).view(b, 1, h, value.shape[3])


def _forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
             scaling: float | None = None, dropout: float = 0.0, **kwargs):
    """What transformers calls. Whatever is not plain attention of one token goes to its own `sdpa`."""
    plain = query.shape[2] == 1 and not dropout and query.device.type == "cpu" and query.dtype == key.dtype in FASTER \
        and all(kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias", "cache"))
    if plain and query.shape[0] * query.shape[1] * key.shape[2] >= SMALLEST:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return one_token(query, key, value, attention_mask, float(scale)), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _mask(*args, dtype: torch.dtype = torch.float32, **kwargs) -> Tensor | None:
    """transformers' own mask for `sdpa`, as numbers to add; None where all may be seen."""
    seen = sdpa_mask(*args, **kwargs)
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _mask)


def active(model: nn.Module) -> bool:
    return getattr(model.config, "_attn_implementation", None) == NAME


def with_one_token(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config whose attention is this one; the config itself if its attention is not transformers' `sdpa`."""
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return config
    new = object.__new__(type(config))                # not deepcopy: what hangs on a config stays the same
    new.__dict__.update(config.__dict__)
    new._attn_implementation_internal = NAME
    return new
