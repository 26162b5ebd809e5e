"""DoRA (Liu et al. 2024, arXiv:2402.09353): a weight's rows have a trained length, and LoRA turns their direction."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..edit import Edit, Frozen, Start
from ..formats.spec import Peft
from ..route import Context
from ..sites import Site
from .lora import LoRA, LoRAEdit


class DoRAEdit(LoRAEdit):
    """W' = g (W + s B A) by rows, g = m / ||W + s B A|| (equation 5); no gradient passes the norm (section 4.3).

    On an output y that holds W x + bias, perhaps already edited: y + (g - 1) (y - bias) + g s B A x. W and bias are the
    base's own, as before any merge, so that m starts as ||W|| and a new adapter changes nothing.
    """

    constants = ("norm",)

    def __init__(self, config: DoRA, site: Site, start: Start):
        super().__init__(config, site, start)
        self.frozen = Frozen(site)
        squares = self.frozen.weight().detach().to(start.dtype).square().sum(1)
        self.register_buffer("squares", squares, persistent=False)            # ||W||^2 by rows
        self.m = nn.Parameter(squares.sqrt())

    @torch.no_grad()
    def norm(self) -> Tensor:
        """||W + s B A|| by rows, (d_out,), without making the sum: ||W||^2 + 2 s (W A^T . B) + s^2 (B A A^T . B)."""
        w, a, b = self.frozen.weight().detach(), self.A, self.B * self.scale
        cross = (w @ a.T.to(w.dtype)).to(a.dtype)                             # (d_out, rank)
        return (self.squares + ((2 * cross + b @ (a @ a.T)) * b).sum(1)).clamp_min(0).sqrt()

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        g, bias = self.m / self.norm(), self.frozen.bias()
        plain = y if bias is None else y - bias.to(y.dtype)
        return y + (g - 1).to(y.dtype) * plain + g.to(y.dtype) * self.change(x, ctx).to(y.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        change = self.scale * (self.B.to(w) @ self.A.to(w))
        g = self.m.to(w) / (self.frozen.weight().to(w) + change).norm(dim=1)
        own = self.frozen.bias()
        if b is not None:
            b = g * b if own is None else g * (b - own.to(w)) + own.to(w)
        return g[:, None] * (w + change), b


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """DoRA. Trains LoRA's numbers and one length a row of the weight; a new adapter changes nothing."""
    bias: ClassVar[bool] = False                      # PEFT has no such DoRA

    name: ClassVar[str] = "dora"
    edit: ClassVar[type[Edit]] = DoRAEdit
    peft: ClassVar[Peft] = replace(
        LoRA.peft, constants={"use_dora": True}, fields={k: v for k, v in LoRA.peft.fields.items() if k != "bias"},
        tensors=LoRA.peft.tensors | {"m": "lora_magnitude_vector"},
        neutral={k: v for k, v in LoRA.peft.neutral.items() if k != "use_dora"} | {"lora_bias": (False, None)})
