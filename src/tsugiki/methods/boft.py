"""BOFT (Liu et al. 2023, arXiv:2311.06243): a linear's input is turned by a product of sparse rotations, a butterfly."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..edit import Config, Edit, Frozen, Start, setting
from ..errors import UserError
from ..formats.spec import TUNER, Peft, only_linear
from ..route import Context
from ..sites import Site
from .oft import cayley, rotated


def butterfly(d: int, blocks: int, size: int) -> Tensor:
    """Order of d features before a rotation by blocks: within each of `blocks` stretches, half blocks at even places first.

    So a block rotates two half blocks that lie d / blocks / 2 apart (section 4, block butterfly).
    """
    halves = torch.arange(d).view(blocks, -1, 2, size // 2)       # (stretch, pair, even or odd, features of a half block)
    return halves.transpose(1, 2).flatten()


class BOFTEdit(Edit):
    """s * (W (B_m ... B_1)^T x) + b, B_i = P_i diag(R_i1, ..., R_in) P_i^T (equation 4)."""

    def __init__(self, config: BOFT, site: Site, start: Start):
        super().__init__(config, site, start)
        size = max(1, site.d_in // config.blocks) if config.blocks else config.size
        blocks, stretch = site.d_in // size, 2 ** (config.factors - 1)
        halved = config.factors > 1 and (size % 2 or blocks % stretch)
        if blocks * size != site.d_in or config.blocks and blocks != config.blocks or halved:
            raise UserError(f"boft: {site.name} has {site.d_in} inputs, which {config.blocks or blocks} blocks of {size} with "
                            f"{config.factors} factors do not cut; the width must divide it, and be even and the number of "
                            f"blocks a multiple of {stretch} for more than one factor")
        self.R = start.parameter(f"{site.name}.R", config.factors, blocks, size, size)
        self.s = start.parameter(f"{site.name}.s", site.d_out, fill=lambda t, g: t.fill_(1.0))
        orders = [butterfly(site.d_in, blocks // 2**i, size) if config.factors > 1 else torch.arange(site.d_in)
                  for i in range(config.factors)]
        self.register_buffer("order", torch.stack(orders).to(start.device), persistent=False)
        self.register_buffer("back", torch.stack([o.argsort() for o in orders]).to(start.device), persistent=False)
        self.base = Frozen(site)

    def turned(self, x: Tensor, like: Tensor, transpose: bool) -> Tensor:
        """x (..., d) times B_m ... B_1, or times its transpose; computed in the precision of `like`."""
        change = cayley(0.5 * (self.R - self.R.mT).to(like))                  # (m, blocks, size, size)
        steps = range(len(change))
        for i in steps if transpose else reversed(steps):
            x = rotated(x[..., self.back[i]], change[i].mT if transpose else change[i])[..., self.order[i]]
        return x

    def pre(self, x: Tensor, ctx: Context) -> Tensor:
        return self.turned(x, self.R, transpose=False)

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        bias = self.base.bias()                       # the scale is the weight's, not the bias's
        plain = y if bias is None else y - bias.to(y.dtype)
        return y + plain * (self.s - 1).to(y.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        s, bias = self.s.to(w), self.base.bias()
        if b is not None:
            b = b + (s - 1) * (b if bias is None else b - bias.to(b))
        return s[:, None] * w, b

    def merge_input(self, w: Tensor, site: Site) -> Tensor:
        return self.turned(w, w, transpose=True)


@dataclass(frozen=True, kw_only=True)
class BOFT(Config):
    """BOFT. Trains factors * d_in * size + d_out numbers a site; the rotations start at 0, the scale at 1: the identity."""
    size: int = setting(4, "width of a rotated block; it must divide a site's input", low=1)
    blocks: int = setting(0, "number of blocks, instead of their width; 0: by the width", low=0)
    factors: int = setting(1, "sparse rotations in the product; with 1 it is OFT with a scale", low=1)
    targets: tuple[str, ...] | str = setting("linear", "roles of whole linears, one regex over site names, or \"linear\": all")

    name: ClassVar[str] = "boft"
    edit: ClassVar[type[Edit]] = BOFTEdit
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 4e-3
    peft: ClassVar[Peft] = Peft(
        "BOFT", fields={"size": "boft_block_size", "blocks": "boft_block_num", "factors": "boft_n_butterfly_factor"},
        tensors={"R": "boft_R", "s": "boft_s"}, shapes={"s": (-1, 1)}, fits=only_linear, size="boft_block_size",
        known=frozenset({"target_modules", "fan_in_fan_out"}),
        neutral=TUNER | {"bias": ("none",), "boft_dropout": (0.0, 0), "init_weights": (True, False)},
        write=lambda adapter, names: {"boft_block_size": 0} if adapter.cfg.blocks else {},
        read=lambda config, targets: {} if config["boft_block_size"] else {"size": 4})
