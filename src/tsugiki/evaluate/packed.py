"""A copy of a model for decoding on a CPU: weights laid out once, not at every product, attention of one token, single passes."""
from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tsugiki.evaluate.steps import step_of
from tsugiki.kernels import rows
from tsugiki.kernels.one_token import with_one_token
from tsugiki.kernels.passes import GatedMLP, Norm, carry, standing_in
from tsugiki.memory import available
from tsugiki.pool import version

PAYS = 24                                             # decoding steps from which packing costs less than it saves; a third of
                                                      # them where weights are laid out by kernels/rows, which saves more
SMALLEST = 1 << 14                                    # weights of a linear from which the product outweighs the call
MANY = 256                                            # rows from which torch's own product of a packed weight gains nothing
SHARE = 0.5                                           # of the memory that is free now
CLOSE = {torch.bfloat16: 0.0, torch.float32: 1e-5}    # how far a product may be from torch's own, relative to its size


class Packed(nn.Linear):
    """A linear with a packed copy of its weight, for inference; everything else is the linear that it stands for."""
    product: Callable[[Tensor, Tensor | None], Tensor] | None                 # of the copy, with a bias
    most: int                                         # rows that it takes; 0 if there is no copy
    laid: rows.Laid | None                            # the copy, if that is what it is

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if self.changed or x.dtype is not weight.dtype or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") \
                or x.numel() > self.most * x.shape[-1]:
            return F.linear(x.contiguous(), weight, bias)             # torch's is very slow on a slice, if the weight is frozen
        return self.product(x, bias)

    @property
    def changed(self) -> bool:
        """Whether the weight is another than when it was copied."""
        weight = self._parameters["weight"]
        return weight is not self.source or version(weight) != self.version or weight.data_ptr() != self.at


def _product(copy: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, copy, bias, "none", [], "")


def packed(model: nn.Module, steps: int) -> nn.Module:
    """A model that shares everything with `model` but its linears, which are packed, its attention, which is that of
    kernels/one_token where it was transformers' sdpa, its norms and gates (kernels/passes), and whole layers where one call does
    all that is in them (steps.py). Where that does not pay, only its output head takes slices as they are.

    Modules on the way to a linear are shallow copies: parameters, hooks and adapters are the same objects. For decoding
    on a CPU in bfloat16 and float32, the same to rounding; `steps` tokens will be decoded.
    """
    if next(model.parameters()).device.type != "cpu":
        return model
    if steps < (PAYS // 3 if next(model.parameters()).dtype is torch.bfloat16 and rows.works() else PAYS):
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        plain = type(head) is nn.Linear and "forward" not in vars(head)
        return _copy(model, {head: _as_packed(head)}, whole=False) if plain else model
    linears = [m for m in model.modules() if _fits(m)]
    size = sum(m.weight.numel() * m.weight.element_size() for m in linears)
    fits = size <= SHARE * available(torch.device("cpu"))
    with torch.no_grad():
        by = {m: _pack(m) for m in linears} if fits else {}
        by |= {m: _passing(m, s) for m in model.modules() if isinstance(s := standing_in(m), Norm)}
        return _copy(model, by, named=getattr(model, "_supports_attention_backend", False))


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__ or module.weight.device.type != "cpu":
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.numel() >= SMALLEST and (rows.fits(weight) or _works(weight.dtype))


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    """Whether this torch on this machine packs weights of this type and multiplies with them as it does without."""
    if dtype not in CLOSE or not torch.backends.mkldnn.is_available():
        return False
    try:
        draw = torch.Generator().manual_seed(0)
        weight, bias, x = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((192, 320), (192,), (5, 1, 320)))
        with torch.no_grad():
            copy = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            pairs = [(F.linear(x, weight, b), _product(copy, x, b)) for b in (None, bias)]
        return all(float((y - z).abs().max()) <= CLOSE[dtype] * float(y.abs().max()) for y, z in pairs)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def _pack(linear: nn.Linear) -> Packed:
    weight, laid = linear.weight, None
    if rows.fits(weight):
        laid = rows.laid(weight)
        product, most = laid.product, rows.MOST
    else:
        product, most = functools.partial(_product, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)), MANY
    return _as_packed(linear, product, most, laid)


def _as_packed(linear: nn.Linear, product: Callable | None = None, most: int = 0, laid: rows.Laid | None = None) -> Packed:
    new, weight = _shallow(linear), linear.weight
    new.__class__ = Packed
    new.__dict__.update(source=weight, version=version(weight), at=weight.data_ptr(), product=product, most=most, laid=laid)
    return new


def _passing(norm: nn.Module, stands_in: Norm) -> nn.Module:
    """The same norm in a single pass."""
    new = _shallow(norm)
    new.__dict__["forward"] = replace(stands_in, module=new)
    return new


def _copy(module: nn.Module, by: dict[nn.Module, nn.Module], whole: bool = True, named: bool = False) -> nn.Module:
    """The module with what `by` replaces, and if `whole` MLPs and layers for decoding, and attention if it is called by name;
    itself if nothing in it is replaced. A module that is there twice becomes one."""
    if module in by:
        return by[module]
    children = {name: child and _copy(child, by, whole, named) for name, child in module._modules.items()}
    config = getattr(module, "config", None)
    other = with_one_token(config) if named and isinstance(config, PretrainedConfig) else config
    if other is config and all(children[name] is child for name, child in module._modules.items()):
        return module
    new = by[module] = _shallow(module)
    new.__dict__["_modules"] = children
    if other is not config:
        new.__dict__["config"] = other
    if not whole:
        return new
    if isinstance(stands_in := standing_in(module), GatedMLP):
        new.__dict__["forward"] = replace(stands_in, module=new)
    elif (step := step_of(new)) is not None:
        new.__dict__["forward"] = step
    return new


def _shallow(module: nn.Module) -> nn.Module:
    new = object.__new__(type(module))
    new.__dict__.update(module.__dict__)
    new.__dict__["_compiled_call_impl"] = None        # it would run the module that this is a copy of
    carry(new)
    return new
