"""LoKr (LyCORIS, Yeh et al. 2023, arXiv:2309.14859): a change of a weight as a Kronecker product."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edit import Config, Edit, Start, setting
from ..formats.spec import Peft, only_linear
from ..route import Context
from ..sites import Site
from .loha import NEUTRAL, kaiming


def factors(d: int, factor: int) -> tuple[int, int]:
    """(m, n), m * n = d: `factor` and the rest if it divides d, else as near to square as m <= factor lets it be, m <= n.

    -1 sets no limit. It decides the shapes of stored tensors, so it is what PEFT and LyCORIS do, to the letter.
    """
    if factor > 0 and d % factor == 0:
        return factor, d // factor
    small = [m for m in range(1, math.isqrt(d) + 1) if d % m == 0 and (factor == -1 or m <= factor)]
    return (small[-1], d // small[-1]) if small else (1, d)


class LoKrEdit(Edit):
    """y + s (w1 (x) w2) x, s = alpha / rank, section 3.2. The Kronecker product is never made: x is folded to (m, n) instead."""

    def __init__(self, config: LoKr, site: Site, start: Start):
        super().__init__(config, site, start)
        (self.m, self.n), (l, k) = factors(site.d_in, config.factor), factors(site.d_out, config.factor)
        low1 = config.decompose_both and config.rank < max(l, self.m) / 2
        self._factor("w1", l, self.m, config.rank if low1 else 0, True, site, start)
        self._factor("w2", k, self.n, config.rank if config.rank < max(k, self.n) / 2 else 0, False, site, start)
        self.scale = config.alpha / config.rank

    def _factor(self, name: str, d_out: int, d_in: int, rank: int, zero: bool, site: Site, start: Start) -> None:
        """One factor, (d_out, d_in): whole if rank is 0, else a product of two. `zero`: it starts at 0."""
        def new(part: str, *shape: int, zero: bool) -> None:
            self.register_parameter(part, start.parameter(f"{site.name}.{part}", *shape, fill=None if zero else kaiming))
        if not rank:
            return new(name, d_out, d_in, zero=zero)
        new(f"{name}_a", d_out, rank, zero=zero)
        new(f"{name}_b", rank, d_in, zero=False)

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        z = self._times("w2", x.unflatten(-1, (self.m, self.n)))              # (B, T, m, k)
        z = self._times("w1", z.transpose(-1, -2)).transpose(-1, -2)          # (B, T, l, k)
        return y + (z.flatten(-2) * self.scale).to(y.dtype)

    def _times(self, name: str, x: Tensor) -> Tensor:
        for part in (name, f"{name}_b", f"{name}_a"):
            if part in self._parameters:
                x = F.linear(x, self._parameters[part].to(x.dtype))
        return x

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        parts = {name: p.to(w) for name, p in self._parameters.items()}
        w1, w2 = (parts[n] if n in parts else parts[f"{n}_a"] @ parts[f"{n}_b"] for n in ("w1", "w2"))
        return w + self.scale * torch.kron(w1, w2), b


@dataclass(frozen=True, kw_only=True)
class LoKr(Config):
    """LoKr. Trains two small factors a site, whose widths multiply to d_in and d_out; a new adapter changes nothing."""
    rank: int = setting(8, "inner width of the second factor; at half its larger side or more, it is trained whole", low=1)
    alpha: float = setting(8.0, "strength: the change is scaled by alpha / rank", low=1e-6)
    factor: int = setting(-1, "width of the first factor, as near as it divides; -1: both as near to square as can be", low=-1)
    decompose_both: bool = setting(False, "the first factor too is a product of two")
    targets: tuple[str, ...] | str = setting("linear", "roles, one regex over site names, or \"linear\": every linear")

    name: ClassVar[str] = "lokr"
    edit: ClassVar[type[Edit]] = LoKrEdit
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 1e-2
    peft: ClassVar[Peft] = Peft(
        "LOKR", known=frozenset({"target_modules", "rank_dropout_scale"}), fits=only_linear,
        fields={"rank": "r", "alpha": "alpha", "factor": "decompose_factor", "decompose_both": "decompose_both"},
        tensors={f"w{n}{f}": f"lokr_w{n}{f}" for n in "12" for f in ("", "_a", "_b")},
        neutral=NEUTRAL | {"init_weights": (True, False, "lycoris")})
