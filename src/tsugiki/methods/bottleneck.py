"""Bottleneck adapters: down, activation, up. In series with a sublayer or a linear, or parallel to it.

Series after attention and MLP: Houlsby et al. 2019, arXiv:1902.00751, section 2.1; after the MLP alone: Pfeiffer et al. 2021,
arXiv:2005.00247. Parallel, scaled: He et al. 2022, arXiv:2110.04366, table 1. At linears: Hu et al. 2023, arXiv:2304.01933.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..edit import LINEARS, Config, Dense, Edit, Start, setting
from ..route import Context
from ..sites import Site

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def _zero(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.zero_()


def _bert(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0, 0.02, generator=generator)


class Norm(nn.Module):
    """A layer norm of the adapter's own."""

    def __init__(self, start: Start, key: str, width: int):
        super().__init__()
        self.weight = start.parameter(f"{key}.weight", width, fill=lambda t, g: t.fill_(1.0))
        self.bias = start.parameter(f"{key}.bias", width)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype))


class Bottleneck(Edit):
    """f(h) = scale * up(act(down(h))); up starts at zero, so a new adapter changes nothing."""
    roles = ("attn", "mlp", *LINEARS)
    reads = "y"                                       # what it is a function of: the site's output y or input x

    def __init__(self, config: Bottlenecks, site: Site, start: Start):
        super().__init__(config, site, start)
        width, key = site.d_out if self.reads == "y" else site.d_in, site.name
        self.starts_as_identity = config.start == "zero"
        out = site.d_in if changes_x(self) else site.d_out
        self.down = Dense(start, f"{key}.down", width, config.size, bias=config.bias)
        self.up = Dense(start, f"{key}.up", config.size, out, fill=_bert if config.start == "bert" else _zero, bias=config.bias)
        self.act, self.scale, self.where = ACTIVATIONS[config.act], config.scale, config.norm
        if config.norm != "none":
            self.norm = Norm(start, f"{key}.norm", width if config.norm == "before" else out)

    def change(self, h: Tensor) -> Tensor:
        h = self.norm(h) if self.where == "before" else h
        h = self.up(self.act(self.down(h))) * self.scale
        return self.norm(h) if self.where == "after" else h


def changes_x(edit: Edit) -> bool:
    return isinstance(edit, BeforeEdit)


class SeriesEdit(Bottleneck):
    """y + f(y)."""
    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + self.change(y)


class ParallelEdit(Bottleneck):
    """y + f(x)."""
    reads = "x"

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + self.change(x)


class BeforeEdit(Bottleneck):
    """The site's input x becomes x + f(x)."""
    roles, reads = LINEARS, "x"

    def pre(self, x: Tensor, ctx: Context) -> Tensor:
        return x + self.change(x)


@dataclass(frozen=True, kw_only=True)
class Bottlenecks(Config):
    """Fields that all of them share."""
    size: int = setting(64, "width of the bottleneck", low=1)
    act: str = setting("relu", "activation", choices=tuple(ACTIVATIONS))
    scale: float = setting(1.0, "what its output is multiplied with")
    norm: str = setting("none", "a layer norm of its own, on its input or its output", choices=("none", "before", "after"))
    bias: bool = setting(True, "biases in down and up")
    start: str = setting("zero", "up begins at zero, or with deviation 0.02 as in BERT", choices=("zero", "bert"))


@dataclass(frozen=True, kw_only=True)
class Series(Bottlenecks):
    """Series adapter after attention and after the MLP (Houlsby). Trains about 4 * size * width numbers a layer."""
    targets: tuple[str, ...] | str = setting(("attn", "mlp"), "where it sits: attn, mlp, both, or linears")

    name: ClassVar[str] = "series"
    edit: ClassVar[type[Edit]] = SeriesEdit
    lr: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[dict, ...]] = ({"start": "bert"},)


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Bottlenecks):
    """Series adapter after the MLP alone (Pfeiffer). Trains about 2 * size * width numbers a layer."""
    targets: tuple[str, ...] | str = setting(("mlp",), "where it sits")

    name: ClassVar[str] = "pfeiffer"
    edit: ClassVar[type[Edit]] = SeriesEdit
    lr: ClassVar[float] = 1e-3
    variants: ClassVar[tuple[dict, ...]] = ({"norm": "before"}, {"norm": "after"})


@dataclass(frozen=True, kw_only=True)
class Parallel(Bottlenecks):
    """Scaled parallel adapter beside the MLP, attention or both (He et al.). Trains about 2 * size * width numbers a site."""
    scale: float = setting(4.0, "what its output is multiplied with")
    targets: tuple[str, ...] | str = setting(("mlp",), "where it sits: attn, mlp, both, or linears")

    name: ClassVar[str] = "parallel"
    edit: ClassVar[type[Edit]] = ParallelEdit
    lr: ClassVar[float] = 1e-3


@dataclass(frozen=True, kw_only=True)
class LinearBottlenecks(Bottlenecks):
    """What the placements of LLM-Adapters share: tanh, no biases."""
    act: str = setting("tanh", "activation", choices=tuple(ACTIVATIONS))
    bias: bool = setting(False, "biases in down and up")


@dataclass(frozen=True, kw_only=True)
class SeriesLinear(LinearBottlenecks):
    """LLM-Adapters' series adapter: after the linear, or before it where its role is in `before`."""
    targets: tuple[str, ...] | str = setting(("down",), "the linears it sits at")
    before: tuple[str, ...] = setting(("gate", "up", "gate_up"), "roles where it changes the linear's input, not its output")

    name: ClassVar[str] = "series_linear"
    lr: ClassVar[float] = 3e-4
    variants: ClassVar[tuple[dict, ...]] = ({"targets": "linear"},)

    @property
    def parts(self) -> tuple[Config, ...]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _After(**values), _Before(**values)


class _After(SeriesLinear):
    edit = SeriesEdit

    @property
    def parts(self) -> tuple[Config, ...]:
        return (self,)

    def pick(self, sites: Sequence[Site]) -> Sequence[Site]:
        return [s for s in sites if s.role not in self.before]


class _Before(_After):
    edit = BeforeEdit

    def pick(self, sites: Sequence[Site]) -> Sequence[Site]:
        return [s for s in sites if s.role in self.before]


@dataclass(frozen=True, kw_only=True)
class ParallelLinear(LinearBottlenecks):
    """LLM-Adapters' parallel adapter, beside linears of the MLP."""
    targets: tuple[str, ...] | str = setting(("up", "down"), "the linears it sits beside")

    name: ClassVar[str] = "parallel_linear"
    edit: ClassVar[type[Edit]] = ParallelEdit
    lr: ClassVar[float] = 3e-4
