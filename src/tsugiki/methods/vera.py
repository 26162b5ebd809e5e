"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): random matrices that every site shares, scaled by two trained vectors."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..edit import Config, Edit, Start, setting
from ..formats.spec import TUNER, Peft
from ..route import Context, dropout
from ..sites import Site


class Projections(nn.Module):
    """A (rank, widest input) and B (widest output, rank), drawn as PEFT draws them: float32, one CPU generator, A first."""

    def __init__(self, config: VeRA, sites: Sequence[Site], start: Start):
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        for name, shape in (("A", (config.rank, max(s.d_in for s in sites))), ("B", (max(s.d_out for s in sites), config.rank))):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))   # He's uniform, over the second dimension
            drawn = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(start.device, start.dtype), persistent=config.projections)


class VeRAEdit(Edit):
    """y + b * (B (d * (A drop(x)))), A and B cut to the site's widths (equation 2)."""

    def __init__(self, config: VeRA, site: Site, start: Start):
        super().__init__(config, site, start)
        if "vera" not in start.shared:
            start.shared["vera"] = Projections(config, start.sites, start)
        self.projections = (start.shared["vera"],)    # in a tuple: known, not owned
        self.d_in, self.d_out, self.p = site.d_in, site.d_out, config.dropout
        self.d = start.parameter(f"{site.name}.d", config.rank, fill=lambda t, g: t.fill_(config.d_initial))
        self.b = start.parameter(f"{site.name}.b", site.d_out)

    def cut(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A (rank, d_in) and B (d_out, rank) of this site, in the dtype and on the device of `like`."""
        shared = self.projections[0]
        return shared.A[:, :self.d_in].to(like), shared.B[:self.d_out].to(like)

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        x = dropout(x, self.p, ctx, self.salt, self.training)
        a, b = self.cut(x)
        low = F.linear(x, a) * self.d.to(x.dtype)                             # (B, T, rank)
        return y + (F.linear(low, b) * self.b.to(x.dtype)).to(y.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        low, high = self.cut(w)
        return w + (self.b.to(w)[:, None] * high) @ (self.d.to(w)[:, None] * low), b


@dataclass(frozen=True, kw_only=True)
class VeRA(Config):
    """VeRA. Trains rank + d_out numbers a site; b starts at zero, so a new adapter changes nothing."""
    rank: int = setting(256, "width of the random projections", low=1)
    d_initial: float = setting(0.1, "where d starts (table 6)")
    dropout: float = setting(0.0, "share of inputs dropped in training", low=0.0, below=1.0)
    targets: tuple[str, ...] | str = setting("linear", "roles, one regex over site names, or \"linear\": every linear")
    seed: int = setting(0, "the random projections are drawn from it, not from the run's seed", low=0, high=2**63 - 1)
    projections: bool = setting(True, "store the random projections too; else they are drawn again when it is loaded")

    name: ClassVar[str] = "vera"
    edit: ClassVar[type[Edit]] = VeRAEdit
    lr: ClassVar[float] = 4e-3
    small_lr: ClassVar[float] = 5e-2
    peft: ClassVar[Peft] = Peft(
        "VERA", fields={"rank": "r", "d_initial": "d_initial", "dropout": "vera_dropout", "seed": "projection_prng_key",
                        "projections": "save_projection"},
        tensors={"d": "vera_lambda_d", "b": "vera_lambda_b"}, shared={"vera.A": "base_model.vera_A", "vera.B": "base_model.vera_B"},
        known=frozenset({"target_modules", "fan_in_fan_out"}),
        neutral=TUNER | {"bias": ("none",), "init_weights": (True, False)})
