"""What bottleneck adapters share: down, activation, up (Houlsby et al. 2019, arXiv:1902.00751, figure 2)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..edit import LINEARS, Config, Dense, Edit, Start, changes_input, setting, times
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
        if self.weight.dim() == 1:
            return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype))
        return F.layer_norm(x, x.shape[-1:]) * self.weight.to(x.dtype) + self.bias.to(x.dtype)       # of several (group.py)


class Bottleneck(Edit):
    """f(h) = scale * up(act(down(h))); up starts at zero, so a new adapter changes nothing."""
    roles = ("attn", "mlp", *LINEARS)
    scalars = ("scale",)
    reads = "y"                                       # what it is a function of: the site's output y or input x

    def __init__(self, config: Bottlenecks, site: Site, start: Start):
        super().__init__(config, site, start)
        width, key = site.d_out if self.reads == "y" else site.d_in, site.name
        self.starts_as_identity = config.start == "zero"
        out = site.d_in if changes_input(self) else site.d_out
        self.down = Dense(start, f"{key}.down", width, config.size, bias=config.bias)
        self.up = Dense(start, f"{key}.up", config.size, out, fill=_bert if config.start == "bert" else _zero, bias=config.bias)
        self.act, self.scale, self.where = ACTIVATIONS[config.act], config.scale, config.norm
        if config.norm != "none":
            self.norm = Norm(start, f"{key}.norm", width if config.norm == "before" else out)

    def alike(self) -> Any:
        return self.act, self.where, self.down.bias is None

    def change(self, h: Tensor) -> Tensor:
        h = self.norm(h) if self.where == "before" else h
        h = times(self.up(self.act(self.down(h))), self.scale)
        return self.norm(h) if self.where == "after" else h


@dataclass(frozen=True, kw_only=True)
class Bottlenecks(Config):
    """Fields that all of them share."""
    size: int = setting(64, "width of the bottleneck", low=1)
    act: str = setting("relu", "activation", choices=tuple(ACTIVATIONS))
    scale: float = setting(1.0, "what its output is multiplied with")
    norm: str = setting("none", "a layer norm of its own, on its input or its output", choices=("none", "before", "after"))
    bias: bool = setting(True, "biases in down and up")
    start: str = setting("zero", "up begins at zero, or with deviation 0.02 as in BERT", choices=("zero", "bert"))
