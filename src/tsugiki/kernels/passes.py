"""RMS norms, gated activations and rotary embeddings, each a single pass over its numbers where torch makes four to ten.

passes.c computes them, on a CPU, in bfloat16 or float32. A model's own modules and functions stay as they are where the compiled
kernels are absent, and each is replaced only while a run lasts, and only if a probe finds that it computes what the kernel does.
"""
from __future__ import annotations

import copy
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import _disable_current_modes

from tsugiki.kernels.native import close, library, run

KINDS = (torch.bfloat16, torch.float32)
NEAR = {torch.bfloat16: 5e-4, torch.float32: 1e-5}    # relatively, in a probe: nearer than another way to round, or another GELU
ROTARY = "apply_rotary_pos_emb"                       # what transformers' modeling files call it
FEW = 4096                                            # numbers: below, a call costs more than the pass;
MANY = 1 << 15                                        # below, one thread is as quick as several


def _takes(first: Tensor, second: Tensor) -> bool:
    """Whether a kernel may run on these."""
    return first.dtype is second.dtype and first.dtype in KINDS and first.is_cpu and second.is_cpu and first.numel() >= FEW \
        and not torch.compiler.is_compiling()         # a compiler fuses them into their neighbours


class NoContext:
    """What a pass is given to remember things for its backward, where there will be none."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def _applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), without its cost where no gradients are made: in decoding more than the pass itself."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(NoContext(), *args)


def _wide(t: Tensor) -> int:
    return int(t.dtype is torch.float32)


def _threads(t: Tensor) -> int:
    return torch.get_num_threads() if t.numel() >= MANY else 1


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * (weight + offset), the quotient rounded to x's dtype first if `inner` (arXiv:1910.07467,
    equation 4). x (..., D), weight (D,)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, offset: float, inner: bool) -> Tensor:
        x, y, ctx.offset = x.contiguous(), torch.empty(x.shape, dtype=x.dtype), offset
        scale = torch.empty(x.shape[:-1], dtype=torch.float32)
        run("norm_forward", x, weight, y, scale, scale.numel(), x.shape[-1], eps, offset, int(inner), _wide(x), _threads(x))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        grad, dx, threads = grad.contiguous(), torch.empty_like(x), _threads(x)
        dw = torch.zeros(threads, x.shape[-1]) if ctx.needs_input_grad[1] else None
        run("norm_backward", grad, x, weight, scale, dx, dw, scale.numel(), x.shape[-1], ctx.offset, _wide(x), threads)
        return dx, None if dw is None else dw.sum(0).to(weight.dtype), None, None, None


class Gated(torch.autograd.Function):
    """act(a) * b, of one shape; act is SiLU, or GELU by tanh (arXiv:2002.05202)."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, tanh: bool) -> Tensor:
        a, b, ctx.tanh = a.contiguous(), b.contiguous(), tanh
        y = torch.empty_like(a)
        run("gated_forward", a, b, y, a.numel(), int(tanh), _wide(a), _threads(a))
        ctx.save_for_backward(a, b)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        a, b = ctx.saved_tensors
        grad, da, db = grad.contiguous(), torch.empty_like(a), torch.empty_like(b)
        run("gated_backward", grad, a, b, da, db, a.numel(), int(ctx.tanh), _wide(a), _threads(a))
        return da, db, None


class Rotary(torch.autograd.Function):
    """x cos + rotate_half(x) sin (arXiv:2104.09864, equation 34). x (B, H, T, D), cos and sin (B or 1, T, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turned(x, cos, sin, torch.promote_types(x.dtype, cos.dtype), back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        return _turned(grad, *ctx.saved_tensors, ctx.dtype, back=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool) -> Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    b, h, t, d = x.shape
    y = torch.empty(b, t, h, d, dtype=dtype).transpose(1, 2)                # as the linear before it lays its output out
    strides = [_longs(v.stride(0), v.stride(2), v.stride(1)) for v in (x, y)]
    run("rotary", x, cos, sin, y, _longs(b, t, h, d), *strides, t * d if cos.shape[0] > 1 else 0, int(back), _wide(x), _wide(cos),
        _wide(y), _threads(x))
    return y


def _longs(*numbers: int) -> ctypes.Array:
    return (ctypes.c_long * len(numbers))(*numbers)


# What stands in for a module's forward or a modeling file's function. Each goes back to it for what the kernel does not take.

@dataclass(frozen=True)
class Norm:
    module: nn.Module
    plain: Callable[[Tensor], Tensor]
    eps: float
    offset: float
    inner: bool

    def __call__(self, x: Tensor) -> Tensor:
        if not _takes(x, self.module.weight):
            return self.plain(x)
        return _applied(RMSNorm, x, self.module.weight, self.eps, self.offset, self.inner)


@dataclass(frozen=True)
class GatedMLP:
    module: nn.Module
    plain: Callable[[Tensor], Tensor]
    tanh: bool

    def __call__(self, x: Tensor) -> Tensor:
        mlp = self.module
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return self.plain(x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        if _takes(gate, up) and gate.shape == up.shape:
            return mlp.down_proj(_applied(Gated, gate, up, self.tanh))
        return mlp.down_proj(mlp.act_fn(gate) * up)


@dataclass(frozen=True)
class Rotation:
    plain: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        fits = not (args or kwargs) and q.dim() == 4 and _takes(q, k) and cos.device.type == "cpu" \
            and cos.dtype in KINDS and sin.dtype is cos.dtype and cos.shape == sin.shape and cos.shape[0] in (1, q.shape[0]) \
            and q.shape[2:] == k.shape[2:] == cos.shape[1:] and q.shape[3] % 2 == 0
        if not fits:
            return self.plain(q, k, cos, sin, *args, **kwargs)
        return _applied(Rotary, q, cos, sin), _applied(Rotary, k, cos, sin)


@contextmanager
def single(model: nn.Module) -> Iterator[int]:
    """Inside, the model's passes are single ones, where a probe shows that they do what they did; yields how many."""
    with ExitStack() as stack:
        made = [(module, stands_in) for module in model.modules() if (stands_in := standing_in(module)) is not None]
        for module, stands_in in made:
            module.forward = stands_in
            stack.callback(_restore, module, stands_in)
        yield len(made) + stack.enter_context(rotating(model))


def standing_in(module: nn.Module) -> Norm | GatedMLP | None:
    """What computes what this module does, on a CPU, in one pass; None where a probe finds nothing."""
    if library() is None or "forward" in vars(module):
        return None
    with _disable_current_modes():                    # a rehearsal's: a probe needs numbers
        return next((s for s in (*_norms(module), *_mlps(module)) if _same(module, s)), None)


@contextmanager
def rotating(model: nn.Module) -> Iterator[int]:
    """Inside, rotary embeddings of the files that the model is from are single passes; yields how many were replaced."""
    with ExitStack() as stack:
        files = map(sys.modules.get, {type(m).__module__ for m in model.modules()} if library() is not None else ())
        yield sum(stack.enter_context(_rotating(file)) for file in files if hasattr(file, ROTARY))


def carry(module: nn.Module) -> None:
    """Of a shallow copy of a module: what stands in for its forward is its own."""
    stands_in = vars(module).get("forward")
    if isinstance(stands_in, (Norm, GatedMLP)):
        module.__dict__["forward"] = replace(stands_in, module=module)


def has_single(layers: Sequence[nn.Module]) -> bool:
    """Whether passes of these layers are single ones now, so that a compiler has little left to fuse."""
    return any(isinstance(vars(module).get("forward"), (Norm, GatedMLP)) for layer in layers for module in layer.modules())


def take_back(layers: Sequence[nn.Module]) -> list[tuple[nn.Module, Norm | GatedMLP]]:
    """Leave layers their own forwards, for a compiler: it would compile each layer anew for one of another. Gives what stood in."""
    inside = (module for layer in layers for module in layer.modules())
    found = [(m, stands_in) for m in inside if isinstance(stands_in := vars(m).get("forward"), (Norm, GatedMLP))]
    for module, _ in found:
        del module.forward
    return found


def _restore(module: nn.Module, stands_in: object) -> None:
    if vars(module).get("forward") is stands_in:
        del module.forward


def _norms(module: nn.Module) -> Iterator[Norm]:
    """What an RMS norm of transformers may be: the ways to round and to count the weight from 0 or 1 that its models have."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" in type(module).__name__ and len(module._parameters) == 1 and weight is not None and weight.dim() == 1 \
            and isinstance(eps, float) and weight.device.type == "cpu" and weight.dtype in KINDS:
        for offset, inner in ((0.0, True), (1.0, False), (0.0, False)):
            yield Norm(module, module.forward, eps, offset, inner)


def _mlps(module: nn.Module) -> Iterator[GatedMLP]:
    if set(module._modules) >= {"gate_proj", "up_proj", "down_proj", "act_fn"} \
            and all(isinstance(getattr(module, f"{n}_proj"), nn.Linear) for n in ("gate", "up", "down")) \
            and module.gate_proj.weight.device.type == "cpu" and not any(isinstance(m, _DropoutNd) for m in module.modules()):
        for tanh in (False, True):
            yield GatedMLP(module, module.forward, tanh)


@torch.no_grad()
def _same(module: nn.Module, stands_in: Norm | GatedMLP) -> bool:
    """Whether both make the same of random numbers, with random weights."""
    norm = isinstance(stands_in, Norm)
    dtype = module.weight.dtype if norm else torch.float32
    width = len(module.weight) if norm else 64
    x = (4 * _draw(-(-FEW // width), width)).to(dtype)
    bare = copy.copy(module)
    bare.training = True                              # one that draws numbers then is none of these
    try:
        if norm:
            weight = (1 + 0.5 * _draw(width)).to(dtype)
            bare.__dict__["_parameters"] = {"weight": weight}
            made = RMSNorm.apply(x, weight, stands_in.eps, stands_in.offset, stands_in.inner)
        else:                                         # 2 act(x) (-x), if it is one of these
            by = {"gate_proj": 1.0, "up_proj": -1.0, "down_proj": 2.0}
            bare.__dict__["_modules"] = module._modules | {name: _Times(factor) for name, factor in by.items()}
            made = 2 * Gated.apply(x, -x, stands_in.tanh)
        wanted = type(module).forward(bare, x)
    except (TypeError, ValueError, RuntimeError, AttributeError):             # its forward takes something else
        return False
    return made.dtype == wanted.dtype and made.shape == wanted.shape and close(made, wanted, NEAR[made.dtype])


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


class _Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


_lock, _users = threading.Lock(), dict[str, int]()


@contextmanager
def _rotating(where: ModuleType) -> Iterator[bool]:
    """Inside, a modeling file's function is the kernel; several runs may be inside at once."""
    name = where.__name__
    with _lock:
        there = getattr(where, ROTARY)
        with _disable_current_modes():
            rotates = not isinstance(there, Rotation) and _rotates(there)
        if rotates:
            setattr(where, ROTARY, Rotation(there))
        on = isinstance(getattr(where, ROTARY), Rotation)
        _users[name] = _users.get(name, 0) + on
    try:
        yield on
    finally:
        with _lock:
            _users[name] -= on
            there = getattr(where, ROTARY)
            if not _users[name] and isinstance(there, Rotation):
                setattr(where, ROTARY, there.plain)


@torch.no_grad()
def _rotates(plain: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    q, k, cos, sin = _draw(2, 4, 16, 32), _draw(2, 4, 16, 32).neg(), _draw(2, 16, 32), _draw(2, 16, 32).neg()
    try:
        wanted = plain(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):                # it has another signature or takes other shapes
        return False
    made = Rotation(plain)(q, k, cos, sin)
    return all(a.shape == b.shape and close(a, b, NEAR[torch.float32]) for a, b in zip(made, wanted, strict=True))
