"""A dense view of a frozen weight in any storage, and writing a changed one back. The only file that knows storages."""
from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import UserError


def dims(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out), read from the module."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, Conv1D):                    # GPT-2: weight is (in, out)
        return tuple(module.weight.shape)
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    raise UserError(f"{type(module).__name__} is not a linear or an embedding: its input and output widths are unknown")


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def dense(module: nn.Module, stored: torch.Tensor | None = None) -> torch.Tensor:
    """The frozen weight (or `stored`, an earlier copy of it) as a dense (out, in) tensor; a norm's is a vector."""
    weight = module.weight if stored is None else stored
    if hasattr(weight, "dequantize") and not weight.is_floating_point():
        weight = weight.dequantize()
    if not weight.is_floating_point() or weight.dim() > 2:
        raise UserError(f"{type(module).__name__}: a weight stored as {weight.dtype} cannot be read as a matrix")
    return weight.T if isinstance(module, Conv1D) else weight


def unmerged(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) as stored, from before any merge."""
    kept = module.__dict__.get("kept")
    return (module.weight, getattr(module, "bias", None)) if kept is None else (kept.weight, kept.bias)


def write(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Write a dense (out, in) weight and a bias into the module's own tensors, rounding once; a missing bias is made."""
    target = module.weight
    if type(target.data) is not torch.Tensor or not target.is_floating_point():
        raise UserError(f"{type(module).__name__}: a weight stored as {type(target.data).__name__} {target.dtype} "
                        "cannot take a merge; merge into the 16-bit weights")
    with torch.no_grad():
        target.copy_(weight.T if isinstance(module, Conv1D) else weight)
        if bias is None:
            module.bias = None
        elif module.bias is None:
            module.bias = nn.Parameter(bias.to(target.dtype), requires_grad=False)
        else:
            module.bias.copy_(bias)


def restore(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Write stored originals back, bit for bit, in the module's own layout."""
    write(module, weight.T if isinstance(module, Conv1D) else weight, bias)
