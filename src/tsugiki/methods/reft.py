"""LoReFT (Wu et al. 2024, arXiv:2404.03592): edit the hidden state at the first and last tokens of the prompt, in a subspace."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edit import Config, Dense, Edit, Start, setting
from ..route import Context
from ..sites import Site


class ReFTEdit(Edit):
    """h + R^T (W h + b - R h), equation 3; the rows of R are orthonormal: the Q of `R`'s QR decomposition."""
    roles, needs_places = ("block", "attn", "mlp"), True

    def __init__(self, config: LoReFT, site: Site, start: Start):
        super().__init__(config, site, start)
        self.R = start.parameter(f"{site.name}.R", site.d_out, config.rank, fill=lambda t, g: t.normal_(0, 1, generator=g))
        self.W = Dense(start, f"{site.name}.W", site.d_out, config.rank)
        self.first, self.last = config.first, config.last
        with torch.no_grad():
            self.R.copy_(self.rotation())             # as orthonormal as its dtype can be
            self.W.weight.copy_(self.rotation().T)    # W = R: a new adapter changes nothing

    def rotation(self) -> Tensor:
        """(d, rank), orthonormal columns; signs are chosen so that an orthonormal `R` is its own."""
        q, r = torch.linalg.qr(self.R)
        return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        start, back = ctx.places                                              # (B, T) each
        near = ((start >= 0) & (start < self.first)) | ((back >= 0) & (back < self.last))
        rotation = self.rotation()
        low = F.linear(y, (self.W.weight - rotation.T).to(y.dtype), self.W.bias.to(y.dtype))       # (B, T, rank)
        return y + (low * near[..., None]) @ rotation.T.to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class LoReFT(Config):
    """LoReFT. Trains about 2 * rank * width numbers a layer, and changes only some tokens of the prompt."""
    rank: int = setting(8, "width of the subspace", low=1)
    first: int = setting(7, "tokens changed at the start of each row", low=0)
    last: int = setting(7, "tokens changed at the end of its prompt", low=0)
    targets: tuple[str, ...] | str = setting(("block",), "block (the output of decoder layers), attn, mlp, or a regex of sites")

    name: ClassVar[str] = "reft"
    edit: ClassVar[type[Edit]] = ReFTEdit
    lr: ClassVar[float] = 2e-3
    small_lr: ClassVar[float] = 4e-3
    variants: ClassVar[tuple[dict, ...]] = ({"first": 2, "last": 0},)
