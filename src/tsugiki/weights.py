"""A dense view of a frozen weight in any storage, and writing a changed one back. The only file that knows storages."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
            module.bias = nn.Parameter(bias.to(target.dtype, copy=True), requires_grad=False)    # never an adapter's own
        else:
            module.bias.copy_(bias)


def restore(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Write stored originals back, bit for bit, in the module's own layout."""
    write(module, weight.T if isinstance(module, Conv1D) else weight, bias)


def normaliser(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a norm does before its weight: n(x), so that its output is n(x) times its weight (or 1 + weight), plus its bias.

    Found by trying the module's own forward on float64 numbers, not by its name: whether it takes the mean out, and which of
    its numbers is the eps. n computes in float32 at least and gives float32 or wider. Raises UserError for another kind.
    """
    width = len(module.weight)
    twin = object.__new__(type(module))               # the same forward and settings; no hooks, none of its children
    twin.__dict__ = {k: v for k, v in module.__dict__.items() if k != "_modules"} | {"_modules": {}}

    def plain(x: torch.Tensor, fill: float) -> torch.Tensor:
        twin.__dict__["_parameters"] = {name: None if p is None else torch.full((width,), fill if name == "weight" else 0.0,
                                                                                dtype=torch.float64, device="cpu")
                                        for name, p in module._parameters.items()}
        with torch.no_grad():
            return type(module).forward(twin, x)
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu") + 0.5
    x = x * torch.tensor([[1e-3], [1e-2], [1.0], [10.0]], dtype=torch.float64, device="cpu")          # small ones show the eps
    seen = plain(x, 1.0) - plain(x, 0.0)              # 1 + weight and weight alike
    numbers = [v for v in vars(module).values() if type(v) is float and v > 0]
    for centred in (False, True):
        for eps in numbers:
            n = Normaliser(centred, eps)
            if torch.allclose(n(x), seen.double(), rtol=1e-4, atol=1e-6):
                return n
    raise UserError(f"{type(module).__name__} is a norm of a kind that is not known here: neither a layer norm nor an RMS norm")


@dataclass(frozen=True)
class Normaliser:
    """x / sqrt(mean(x^2) + eps) over the last dimension, less the mean of x before if `centred`."""
    centred: bool
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
