"""LoRA (Hu et al. 2021, arXiv:2106.09685): a trained low-rank change beside a frozen weight."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..edit import Config, Edit, Start, setting
from ..formats.spec import NOTHING, TUNER, Peft
from ..route import Context, dropout
from ..sites import Site


class LoRAEdit(Edit):
    """y + s * B A drop(x), s = alpha / rank (equation 3), or alpha / sqrt(rank) with rsLoRA (Kalajdzievski 2023)."""

    def __init__(self, config: LoRA, site: Site, start: Start):
        super().__init__(config, site, start)
        self.A = start.parameter(f"{site.name}.A", config.rank, site.d_in, fill=_kaiming)
        self.B = start.parameter(f"{site.name}.B", site.d_out, config.rank)
        self.scale = config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)
        self.p = config.dropout

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        x = dropout(x, self.p, ctx, self.salt, self.training)
        low = F.linear(x, self.A.to(x.dtype)) * self.scale                    # (B, T, rank)
        return y + F.linear(low, self.B.to(low.dtype)).to(y.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        return w + self.scale * (self.B.to(w) @ self.A.to(w)), b


def _kaiming(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


@dataclass(frozen=True, kw_only=True)
class LoRA(Config):
    """LoRA. Trains rank * (d_in + d_out) numbers a site; B starts at zero, so a new adapter changes nothing."""
    rank: int = setting(8, "inner width of the change", low=1)
    alpha: float = setting(16.0, "strength: the change is scaled by alpha / rank", low=1e-6)
    dropout: float = setting(0.0, "share of inputs dropped in training", low=0.0, below=1.0)
    targets: tuple[str, ...] | str = setting("linear", "roles, one regex over site names, or \"linear\": every linear")
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead")

    name: ClassVar[str] = "lora"
    edit: ClassVar[type[Edit]] = LoRAEdit
    lr: ClassVar[float] = 2e-4
    peft: ClassVar[Peft] = Peft(
        "LORA", fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"},
        tensors={"A": "lora_A.weight", "B": "lora_B.weight"}, known=frozenset({"target_modules", "fan_in_fan_out"}),
        neutral=TUNER | {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal"),
                         "megatron_core": ("megatron.core", None), "qalora_group_size": (16, None)}
        | dict.fromkeys(("use_dora", "use_qalora", "lora_bias", "ensure_weight_tying", "rank_pattern", "alpha_pattern",
                         "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
                         "alora_invocation_tokens", "monteclora_config", "layer_replication", "target_parameters",
                         "use_bdlora", "arrow_config", "kasa_config"), NOTHING))
