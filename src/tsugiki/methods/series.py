"""Series adapters: after attention and MLP (Houlsby et al. 2019, arXiv:1902.00751), or the MLP alone (arXiv:2005.00247)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..edit import Edit, setting
from ..route import Context
from .bottleneck import Bottleneck, Bottlenecks


class SeriesEdit(Bottleneck):
    """y + f(y)."""
    alike = Bottleneck.alike

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + self.change(y)


@dataclass(frozen=True, kw_only=True)
class Series(Bottlenecks):
    """Series adapter after attention and MLP (Houlsby). Trains about 4 * size * width numbers a layer."""
    targets: tuple[str, ...] | str = setting(("attn", "mlp"), "where it sits: attn, mlp, both, or linears")

    name: ClassVar[str] = "series"
    edit: ClassVar[type[Edit]] = SeriesEdit
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 2e-3
    variants: ClassVar[tuple[dict, ...]] = ({"start": "bert"},)


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Bottlenecks):
    """Series adapter after the MLP alone (Pfeiffer). Trains about 2 * size * width numbers a layer."""
    targets: tuple[str, ...] | str = setting(("mlp",), "where it sits")

    name: ClassVar[str] = "pfeiffer"
    edit: ClassVar[type[Edit]] = SeriesEdit
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 2e-3
    variants: ClassVar[tuple[dict, ...]] = ({"norm": "before"}, {"norm": "after"})
