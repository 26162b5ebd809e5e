"""A dense view of a frozen weight in any storage, and writing a changed one back. The only file that knows storages."""
from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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


def transposed(module: nn.Module) -> bool:
    """Whether its weight lies (in, out) in a 16-bit base. GPT-2's does; in few bits it is stored (out, in) like any other."""
    return isinstance(module, Conv1D) or getattr(module, "source_cls", None) is Conv1D


def dense(module: nn.Module, stored: torch.Tensor | None = None) -> torch.Tensor:
    """The frozen weight (or `stored`, an earlier copy of it) as a dense, floating (out, in) tensor; a norm's is a vector.

    In few bits it is the very matrix that the forward multiplies with. It is made anew by every call and not kept.
    """
    weight = module.weight if stored is None else stored
    if (bits := few_bits(module)) and not weight.is_floating_point():
        return _nf4(module) if bits == 4 else _int8(weight, _scale(module), torch.float32)
    if hasattr(weight, "dequantize") and not weight.is_floating_point():
        weight = weight.dequantize()
    if not weight.is_floating_point() or weight.dim() > 2:
        raise UserError(f"{type(module).__name__}: a weight stored as {weight.dtype} cannot be read as a matrix")
    return weight.T if isinstance(module, Conv1D) else weight


def unmerged(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) as stored, from before any merge."""
    kept = module.__dict__.get("kept")
    return (module.weight, getattr(module, "bias", None)) if kept is None else (kept.weight, kept.bias)


def check_writable(module: nn.Module) -> None:
    """UserError for a weight in few bits: rounding a merge to them again would lose most of it."""
    if bits := few_bits(module):
        raise UserError(f"the base is in {bits} bits, which cannot take a merge without rounding it away; merge into the original "
                        "16-bit weights: `tsugiki merge --base ...` loads them")


def write(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Write a dense (out, in) weight and a bias into the module's own tensors, rounding once; a missing bias is made."""
    check_writable(module)
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


# Bases in few bits: bitsandbytes' NF4 (Dettmers et al. 2023, arXiv:2305.14314) and int8 with a scale a row. It is an extra,
# so it is not imported here: whoever holds such a model has imported it.

def _is(module: nn.Module, name: str) -> bool:
    library = sys.modules.get("bitsandbytes")
    return library is not None and isinstance(module, getattr(library.nn, name))


def few_bits(module: nn.Module) -> int | None:
    """4 or 8 if the weight of this module, or of one inside it, is stored in so few bits; else None."""
    for m in module.modules():
        if isinstance(m, nn.Linear) and not m.weight.is_floating_point():
            for bits, name in ((4, "Linear4bit"), (8, "Linear8bitLt")):
                if _is(m, name):
                    return bits
    return None


def quantisable(model: nn.Module) -> set[str]:
    """The names of the parameters that a quantiser may touch: weights of linears, unless an embedding shares them."""
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {f"{name}.weight" for name, m in model.named_modules()
            if isinstance(m, (nn.Linear, Conv1D)) and id(m.weight) not in shared}


def numel(p: Tensor) -> int:
    """How many numbers a parameter holds; in 4 bits two of them share a byte."""
    state = getattr(p, "quant_state", None)
    return p.numel() if state is None else math.prod(state.shape)


def keep_exact(model: nn.Module) -> None:
    """Make few-bit linears compute the same function in every mode, row by row, with its gradient; changes no stored bit.

    Two habits of bitsandbytes stand against that. (1) On CPUs with AVX512-BF16 a 4-bit linear repacks its weight at its first
    forward without gradients: in place, with rounding, under the feet of other threads, and what it computes with afterwards
    has no gradient. (2) An 8-bit linear (LLM.int8) rounds its input to 8 bits too, but for features that are large in some
    row of the batch, so a row's result depends on its neighbours, and on a CPU training mode computes something else again.
    Raises UserError for a model that (1) has struck already.
    """
    for m in model.modules():
        if _is(m, "Linear4bit"):
            if getattr(m.weight.quant_state, "packing_format_for_cpu", False):
                raise UserError("the base's 4-bit weights were repacked for inference by a forward without gradients; "
                                "load it anew (tsugiki.load does it right), or attach before the first forward")
            m.support_avx512bf16_for_cpu = False
        elif _is(m, "Linear8bitLt") and few_bits(m):           # (not one that keeps 16-bit weights)
            m.state.SCB = _scale(m)
            m.__class__ = _weight_only()


def _nf4(module: nn.Module) -> Tensor:
    weight = module.weight
    return sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, weight.quant_state or module.quant_state)


def _scale(module: nn.Module) -> Tensor:
    """(out,) float32, the largest magnitude of each row of an 8-bit linear; it lies in one of two places."""
    scale = getattr(module.weight, "SCB", None)
    return module.state.SCB if scale is None else scale


def _int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(scale.unsqueeze(1) / 127.0)              # whole numbers to 127 are exact in every dtype


class _Int8Linear(torch.autograd.Function):
    """x @ W.T + b for W in int8; backward makes W again, so nothing dense is kept."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _int8(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        x = grad @ _int8(weight, scale, grad.dtype) if ctx.needs_input_grad[0] else None
        return x, None, None, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None


@functools.cache
def _weight_only() -> type[nn.Module]:
    class WeightOnly8bit(sys.modules["bitsandbytes"].nn.Linear8bitLt):
        """bitsandbytes' 8-bit linear with its input left as it is."""

        def forward(self, x: Tensor) -> Tensor:
            return _Int8Linear.apply(x, self.weight.data, _scale(self), self.bias)
    return WeightOnly8bit


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
