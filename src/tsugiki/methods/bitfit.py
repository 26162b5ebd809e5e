"""BitFit (Ben Zaken et al. 2021, arXiv:2106.10199): a trained offset on every linear's output."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..edit import Config, Edit, Start, setting
from ..formats.spec import TUNER, Peft, only_linear
from ..route import Context
from ..sites import Site


class BitFitEdit(Edit):
    """y + offset; where the linear has a bias, the same as training that bias."""

    def __init__(self, config: BitFit, site: Site, start: Start):
        super().__init__(config, site, start)
        self.offset = start.parameter(f"{site.name}.offset", site.d_out)

    def alike(self) -> Any:
        return ()

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + self.offset.to(y.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        offset = self.offset.to(w)
        return w, offset if b is None else b + offset


@dataclass(frozen=True, kw_only=True)
class BitFit(Config):
    """BitFit. Trains d_out numbers a site; linears without a bias get one when it is merged."""
    targets: tuple[str, ...] | str = setting("linear", "roles, one regex over site names, or \"linear\": every linear")

    name: ClassVar[str] = "bitfit"
    edit: ClassVar[type[Edit]] = BitFitEdit
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 4e-3
    peft: ClassVar[Peft] = Peft(                      # its BEFT is this, said of the values' linear (2025, arXiv:2509.15974)
        "BEFT", tensors={"offset": "beft_bias"}, shapes={"offset": (1, -1)}, size="target_modules", fits=only_linear,
        known=frozenset({"target_modules"}), neutral=TUNER | {"init_weights": (True, False)})
