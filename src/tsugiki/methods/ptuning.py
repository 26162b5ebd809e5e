"""P-tuning (Liu et al. 2021, arXiv:2103.10385): prompt tuning whose embeddings an MLP makes while it trains."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..edit import Config, Dense, Edit, Start, setting
from ..formats.spec import VIRTUAL, Peft
from ..sites import Site
from .prompts import SHAPE, Tables, VirtualEdit, noise


class EncodedPromptEdit(VirtualEdit):
    """P-tuning: embeddings that a small MLP makes while it trains."""
    roles, virtual = ("embed",), "sequence"
    alike = VirtualEdit.alike

    def __init__(self, config: PTuning, site: Site, start: Start):
        super().__init__(config, site, start)
        key, width, self.encoded = site.name, site.d_out, config.hidden > 0
        if not self.encoded:
            self.tokens = start.parameter(f"{key}.tokens", config.tokens, width, fill=noise)
            return
        self.embedding = start.parameter(f"{key}.embedding", config.tokens, width, fill=lambda t, g: t.normal_(0, 1, generator=g))
        widths = (width, config.hidden, config.hidden, width)
        self.mlp = nn.ModuleList(Dense(start, f"{key}.mlp.{n}", a, b) for n, (a, b) in
                                 enumerate(zip(widths, widths[1:], strict=False)))

    def table(self) -> Tensor:
        if not self.encoded:
            return self.tokens
        h = self.embedding
        for n, layer in enumerate(self.mlp):
            h = layer(torch.relu(h) if n else h)
        return h


@dataclass(frozen=True, kw_only=True)
class PTuning(Tables, Config):
    """P-tuning. Trains an MLP that makes the virtual tokens; tokens * width numbers remain."""
    tokens: int = setting(8, "virtual tokens", low=1)
    hidden: int = setting(128, "width of the MLP while it trains; 0: none, as in an adapter that was saved", low=0)

    name: ClassVar[str] = "ptuning"
    edit: ClassVar[type[Edit]] = EncodedPromptEdit
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 1e-2
    targets: ClassVar[tuple[str, ...]] = ("embed",)
    variants: ClassVar[tuple[dict, ...]] = ({"hidden": 0},)
    peft: ClassVar[Peft] = Peft(
        "P_TUNING", fields={"tokens": "num_virtual_tokens"}, virtual=True, size="num_virtual_tokens",
        known=SHAPE | {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"},
        neutral=VIRTUAL, write=lambda adapter, names: {"encoder_hidden_size": 1}, read=lambda config, targets: {"hidden": 0})
