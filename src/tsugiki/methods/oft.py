"""OFT (Qiu et al. 2023, arXiv:2306.07280; v2: Qiu et al. 2025, arXiv:2506.19847): blocks of a linear's input are rotated."""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..edit import Config, Edit, Start, setting
from ..errors import UserError
from ..formats.spec import TUNER, Peft, only_linear
from ..route import Context
from ..sites import Site


def cayley(q: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1 - I of skew-symmetric matrices (..., b, b): an exact rotation less the identity, 0 at Q = 0."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye + q, -2 * q, left=False)


def cayley_neumann(q: Tensor, terms: int) -> Tensor:
    """(I + Q)(I - Q)^-1 - I with the inverse cut to a series: 2Q + 2Q^2 + ... + Q^top (v2, section 4.2).

    PEFT's count of terms: 2 is 2Q, 3 and 4 stop at the cube, t > 4 at the power t - 1. Its turn is the other way round
    than `cayley`'s, so tensors trained with one do not do with the other.
    """
    if terms < 3:
        return 2 * q * (terms - 1)
    power, total = q, 2 * q
    for _ in range(2, max(3, terms - 1)):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def rotated(x: Tensor, change: Tensor) -> Tensor:
    """Each block of x (..., d) times its I + change (blocks or 1, b, b); x itself, bit for bit, where the change is 0."""
    b = change.shape[-1]
    if len(change) == 1:
        return x + (x.unflatten(-1, (-1, b)) @ change[0].to(x.dtype)).flatten(-2)
    return x + torch.einsum("...rk,rkc->...rc", x.unflatten(-1, (-1, b)), change.to(x.dtype)).flatten(-2)


def divisor(d: int, wanted: int) -> int:
    """The divisor of d nearest to `wanted`, the smaller of two: what PEFT turns a block size that does not divide d into."""
    if wanted >= d:
        return d
    near = [n for n in range(1, d + 1) if d % n == 0]
    return min(near, key=lambda n: (abs(n - wanted), n))


class OFTEdit(Edit):
    """W R^T x, R = diag(R_1, ..., R_r), each R_i a rotation made from a skew-symmetric matrix (section 3.2)."""

    def __init__(self, config: OFT, site: Site, start: Start):
        super().__init__(config, site, start)
        blocks = divisor(site.d_in, config.blocks) if config.blocks else site.d_in // divisor(site.d_in, config.size)
        self.size, self.config = site.d_in // blocks, config
        if self.size < 2:
            raise UserError(f"oft: {site.name} has {site.d_in} inputs, of which no block near {config.size} wide can be made")
        self.R = start.parameter(f"{site.name}.R", 1 if config.shared else blocks, self.size * (self.size - 1) // 2)
        upper = torch.triu_indices(self.size, self.size, 1, device=start.device)
        self.register_buffer("upper", upper, persistent=False)

    def change(self, like: Tensor) -> Tensor:
        """(blocks or 1, size, size): rotations, less the identity."""
        values = (self.R + (self.held() - self.R).detach() if self.config.constrained else self.R).to(like)
        q = values.new_zeros(len(values), self.size, self.size)
        q[:, self.upper[0], self.upper[1]] = values
        q = q - q.mT
        return cayley_neumann(q, self.config.terms) if self.config.neumann else cayley(q)

    def held(self) -> Tensor:
        """R, with every block's matrix no longer than eps / sqrt(blocks) (Frobenius)."""
        norm = self.R.detach().norm(dim=1, keepdim=True) * math.sqrt(2)       # each number stands twice in its matrix
        return self.R.detach() * (self.config.eps / math.sqrt(len(self.R)) / norm).clamp(max=1)

    def pre(self, x: Tensor, ctx: Context) -> Tensor:
        return rotated(x, self.change(self.R))

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        return w, b                                   # the output is the base's own

    def merge_input(self, w: Tensor, site: Site) -> Tensor:
        return rotated(w, self.change(w).mT)


SINCE = "0.18.0"                                       # PEFT's series was another before


def _read(config: dict[str, Any], targets: Any) -> dict[str, Any]:
    version = str(config.get("peft_version") or "0")
    if config.get("use_cayley_neumann", True) and [int(n) for n in re.findall(r"\d+", version)[:2]] < [0, 18]:
        raise ValueError(f"peft_version: {version[:40]!r}: the series of use_cayley_neumann is that of PEFT {SINCE} and later")
    return {} if config["oft_block_size"] else {"size": 32}


@dataclass(frozen=True, kw_only=True)
class OFT(Config):
    """OFT. Trains d_in * (size - 1) / 2 numbers a site; all start at 0: the identity."""
    size: int = setting(32, "width of a rotated block, or the nearest that divides a site's input", low=2)
    blocks: int = setting(0, "number of blocks, instead of their width; 0: by the width", low=0)
    shared: bool = setting(False, "one rotation for all blocks of a site")
    neumann: bool = setting(True, "a series instead of an exact inverse: faster, and a rotation only nearly")
    terms: int = setting(5, "terms of the series", low=2)
    constrained: bool = setting(False, "COFT: keep every rotation within eps of the identity")
    eps: float = setting(6e-5, "how far a constrained rotation may go", low=1e-12)
    targets: tuple[str, ...] | str = setting("linear", "roles of whole linears, one regex over site names, or \"linear\": all")

    name: ClassVar[str] = "oft"
    edit: ClassVar[type[Edit]] = OFTEdit
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 4e-3
    peft: ClassVar[Peft] = Peft(
        "OFT", fields={"blocks": "r", "size": "oft_block_size", "shared": "block_share", "neumann": "use_cayley_neumann",
                       "terms": "num_cayley_neumann_terms", "constrained": "coft", "eps": "eps"},
        tensors={"R": "oft_R.weight"}, known=frozenset({"target_modules", "fan_in_fan_out"}), fits=only_linear,
        size="oft_block_size",
        neutral=TUNER | {"bias": ("none",), "module_dropout": (0.0, 0), "init_weights": (True, False)},
        write=lambda adapter, names: {"peft_version": SINCE} | ({"oft_block_size": 0} if adapter.cfg.blocks else {}), read=_read)

    def after_step(self, adapter: Any, step: int, steps: int) -> None:
        if self.constrained:                          # what is stepped from is what the forward uses
            with torch.no_grad():
                for _, edit in adapter.edits.values():
                    edit.R.copy_(edit.held())
