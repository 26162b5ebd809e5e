"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): trained keys and values before the text's own, in every layer."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..edit import Config, Dense, Edit, Start, setting
from ..formats.spec import VIRTUAL, Peft
from ..sites import Site
from .prompts import SHAPE, Tables, VirtualEdit, noise


class PrefixEdit(VirtualEdit):
    """Trained keys and values before the text's own, in every layer; perhaps made by one MLP for all of them."""
    roles, virtual = ("key", "value"), "zero"
    alike = VirtualEdit.alike

    def __init__(self, config: Prefix, site: Site, start: Start):
        super().__init__(config, site, start)
        self.heads_first = site.heads_first
        self.scale = 1.0 / site.key_scale             # the model will multiply it back: cos(0) times its scaling
        self.encoder = None
        if not config.hidden:
            self.tokens = start.parameter(f"{site.name}.tokens", config.tokens, site.d_out, fill=noise)
            return
        if "encoder" not in start.shared:             # Li & Liang, section 4.3: P[i] = MLP(P'[i])
            start.shared["encoder"] = PrefixEncoder(config, start.base[0].d_out, start)
        self.encoder = (start.shared["encoder"],)     # in a tuple: used, not owned
        self.out = Dense(start, f"{site.name}.out", config.hidden, site.d_out)       # this site's rows of the MLP's last matrix

    def table(self) -> Tensor:
        return self.tokens if self.encoder is None else self.out(self.encoder[0]())


class PrefixEncoder(nn.Module):
    """tanh(W P' + c): what all sites of an encoded prefix share."""

    def __init__(self, config: Prefix, width: int, start: Start):
        super().__init__()
        self.embedding = start.parameter("encoder.embedding", config.tokens, width, fill=lambda t, g: t.normal_(0, 1, generator=g))
        self.first = Dense(start, "encoder.first", width, config.hidden)

    def forward(self) -> Tensor:
        return torch.tanh(self.first(self.embedding))                         # (tokens, hidden)


@dataclass(frozen=True, kw_only=True)
class Prefix(Tables, Config):
    """Prefix tuning. Trains tokens * 2 * width of a key numbers a layer, or an MLP that makes them and is dropped."""
    tokens: int = setting(8, "virtual tokens", low=1)
    hidden: int = setting(0, "width of the MLP that makes them while it trains (512 in the paper); 0: none", low=0)

    name: ClassVar[str] = "prefix"
    edit: ClassVar[type[Edit]] = PrefixEdit
    lr: ClassVar[float] = 1e-2
    small_lr: ClassVar[float] = 0.3
    targets: ClassVar[tuple[str, ...]] = ("key", "value")
    variants: ClassVar[tuple[dict, ...]] = ({"hidden": 8},)
    peft: ClassVar[Peft] = Peft(
        "PREFIX_TUNING", fields={"tokens": "num_virtual_tokens"}, virtual=True, size="num_virtual_tokens",
        known=SHAPE | {"encoder_hidden_size"},        # a saved folder holds what the projection made
        neutral=VIRTUAL | {"prefix_projection": (False, None, True), "init_weights": (None, True, False)})
