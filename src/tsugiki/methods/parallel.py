"""Scaled parallel adapter (He et al. 2022, arXiv:2110.04366, table 1 and section 4.5)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..edit import Edit, setting
from ..route import Context
from .bottleneck import Bottleneck, Bottlenecks


class ParallelEdit(Bottleneck):
    """y + f(x)."""
    reads = "x"
    alike = Bottleneck.alike

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + self.change(x)


@dataclass(frozen=True, kw_only=True)
class Parallel(Bottlenecks):
    """Scaled parallel adapter beside the MLP, attention or both (He et al.). Trains about 2 * size * width numbers a site."""
    scale: float = setting(4.0, "what its output is multiplied with")
    targets: tuple[str, ...] | str = setting(("mlp",), "where it sits: attn, mlp, both, or linears")

    name: ClassVar[str] = "parallel"
    edit: ClassVar[type[Edit]] = ParallelEdit
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 2e-3
