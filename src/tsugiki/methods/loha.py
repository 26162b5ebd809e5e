"""LoHa (LyCORIS, Yeh et al. 2023, arXiv:2309.14859): a change of a weight as a Hadamard product of two low-rank ones."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..edit import Config, Edit, Start, setting
from ..formats.spec import NOTHING, TUNER, Peft, only_linear
from ..route import Context
from ..sites import Site

# PEFT's fields of LoHa and LoKr, and the values of those that ask for nothing.
NEUTRAL = TUNER | {"rank_dropout": (0.0, 0, None), "module_dropout": (0.0, 0, None), "use_effective_conv2d": (False, True),
                   "rank_pattern": NOTHING, "alpha_pattern": NOTHING}


def kaiming(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


class LoHaEdit(Edit):
    """y + s (w1_a w1_b * w2_a w2_b) x, s = alpha / rank: of rank up to rank^2 (FedPara, Hyeon-Woo et al. 2021, proposition 1)."""

    def __init__(self, config: LoHa, site: Site, start: Start):
        super().__init__(config, site, start)
        for n in "12":
            a, b = f"w{n}_a", f"w{n}_b"
            self.register_parameter(a, start.parameter(f"{site.name}.{a}", site.d_out, config.rank, fill=kaiming))
            self.register_parameter(b, start.parameter(f"{site.name}.{b}", config.rank, site.d_in,
                                                       fill=kaiming if n == "1" else None))
        self.scale = config.alpha / config.rank

    def change(self, like: Tensor) -> Tensor:
        """(d_out, d_in)"""
        a1, b1, a2, b2 = (p.to(like) for p in (self.w1_a, self.w1_b, self.w2_a, self.w2_b))
        return self.scale * (a1 @ b1) * (a2 @ b2)

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + F.linear(x, self.change(self.w1_a).to(x.dtype)).to(y.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        return w + self.change(w), b


@dataclass(frozen=True, kw_only=True)
class LoHa(Config):
    """LoHa. Trains 2 * rank * (d_in + d_out) numbers a site; w2_b starts at zero, so a new adapter changes nothing."""
    rank: int = setting(8, "inner width of each of the two factors", low=1)
    alpha: float = setting(8.0, "strength: the change is scaled by alpha / rank", low=1e-6)
    targets: tuple[str, ...] | str = setting("linear", "roles, one regex over site names, or \"linear\": every linear")

    name: ClassVar[str] = "loha"
    edit: ClassVar[type[Edit]] = LoHaEdit
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 3e-3
    peft: ClassVar[Peft] = Peft(
        "LOHA", fields={"rank": "r", "alpha": "alpha"}, known=frozenset({"target_modules"}), fits=only_linear,
        tensors={f"w{n}_{f}": f"hada_w{n}_{f}" for n in "12" for f in "ab"},
        neutral=NEUTRAL | {"init_weights": (True, False)})
