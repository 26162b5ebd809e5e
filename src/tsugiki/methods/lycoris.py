"""LoHa and LoKr (LyCORIS, Yeh et al. 2023, arXiv:2309.14859): a change of a weight as a Hadamard or a Kronecker product."""
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

# PEFT's fields of both, and the values of those that ask for nothing.
NEUTRAL = TUNER | {"rank_dropout": (0.0, 0, None), "module_dropout": (0.0, 0, None), "use_effective_conv2d": (False, True),
                   "rank_pattern": NOTHING, "alpha_pattern": NOTHING}


def _kaiming(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


class LoHaEdit(Edit):
    """y + s (w1_a w1_b * w2_a w2_b) x, s = alpha / rank: of rank up to rank^2 (FedPara, Hyeon-Woo et al. 2021, proposition 1)."""

    def __init__(self, config: LoHa, site: Site, start: Start):
        super().__init__(config, site, start)
        for n in "12":
            a, b = f"w{n}_a", f"w{n}_b"
            self.register_parameter(a, start.parameter(f"{site.name}.{a}", site.d_out, config.rank, fill=_kaiming))
            self.register_parameter(b, start.parameter(f"{site.name}.{b}", config.rank, site.d_in,
                                                       fill=_kaiming if n == "1" else None))
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
    peft: ClassVar[Peft] = Peft(
        "LOHA", fields={"rank": "r", "alpha": "alpha"}, known=frozenset({"target_modules"}), fits=only_linear,
        tensors={f"w{n}_{f}": f"hada_w{n}_{f}" for n in "12" for f in "ab"},
        neutral=NEUTRAL | {"init_weights": (True, False)})


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
            self.register_parameter(part, start.parameter(f"{site.name}.{part}", *shape, fill=None if zero else _kaiming))
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
    """LoKr. About d_in and d_out as products of two widths: small factors; one starts at zero: a new adapter changes nothing."""
    rank: int = setting(8, "inner width of the second factor; at half its larger side or more, it is trained whole", low=1)
    alpha: float = setting(8.0, "strength: the change is scaled by alpha / rank", low=1e-6)
    factor: int = setting(-1, "width of the first factor, as near as it divides; -1: both as near to square as can be", low=-1)
    decompose_both: bool = setting(False, "the first factor too is a product of two")
    targets: tuple[str, ...] | str = setting("linear", "roles, one regex over site names, or \"linear\": every linear")

    name: ClassVar[str] = "lokr"
    edit: ClassVar[type[Edit]] = LoKrEdit
    lr: ClassVar[float] = 1e-3
    peft: ClassVar[Peft] = Peft(
        "LOKR", known=frozenset({"target_modules", "rank_dropout_scale"}), fits=only_linear,
        fields={"rank": "r", "alpha": "alpha", "factor": "decompose_factor", "decompose_both": "decompose_both"},
        tensors={f"w{n}{f}": f"lokr_w{n}{f}" for n in "12" for f in ("", "_a", "_b")},
        neutral=NEUTRAL | {"init_weights": (True, False, "lycoris")})
