"""LLM-Adapters' placements of a bottleneck at single linears (Hu et al. 2023, arXiv:2304.01933, sections 2.1 and 3.3)."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..edit import LINEARS, Config, Edit, setting
from ..route import Context
from ..sites import Site
from .bottleneck import ACTIVATIONS, Bottleneck, Bottlenecks
from .parallel import ParallelEdit
from .series import SeriesEdit


class BeforeEdit(Bottleneck):
    """The site's input x becomes x + f(x)."""
    roles, reads = LINEARS, "x"
    alike = Bottleneck.alike

    def pre(self, x: Tensor, ctx: Context) -> Tensor:
        return x + self.change(x)


@dataclass(frozen=True, kw_only=True)
class LinearBottlenecks(Bottlenecks):
    """What the placements of LLM-Adapters share: tanh, no biases."""
    act: str = setting("tanh", "activation", choices=tuple(ACTIVATIONS))
    bias: bool = setting(False, "biases in down and up")


@dataclass(frozen=True, kw_only=True)
class SeriesLinear(LinearBottlenecks):
    """LLM-Adapters' series adapter. Trains 2 * size * width numbers a linear, after it, or before it if its role is in `before`."""
    targets: tuple[str, ...] | str = setting(("down",), "the linears it sits at")
    before: tuple[str, ...] = setting(("gate", "up", "gate_up"), "roles where it changes the linear's input, not its output")

    name: ClassVar[str] = "series_linear"
    lr: ClassVar[float] = 3e-4
    small_lr: ClassVar[float] = 1e-2
    variants: ClassVar[tuple[dict, ...]] = ({"targets": "linear"},)

    @property
    def parts(self) -> tuple[Config, ...]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _After(**values), _Before(**values)


class _After(SeriesLinear):
    edit = SeriesEdit

    @property
    def parts(self) -> tuple[Config, ...]:
        return (self,)

    def pick(self, sites: Sequence[Site]) -> Sequence[Site]:
        return [s for s in sites if s.role not in self.before]


class _Before(_After):
    edit = BeforeEdit

    def pick(self, sites: Sequence[Site]) -> Sequence[Site]:
        return [s for s in sites if s.role in self.before]


@dataclass(frozen=True, kw_only=True)
class ParallelLinear(LinearBottlenecks):
    """LLM-Adapters' parallel adapter. Trains size * (d_in + d_out) numbers a linear of the MLP."""
    targets: tuple[str, ...] | str = setting(("up", "down"), "the linears it sits beside")

    name: ClassVar[str] = "parallel_linear"
    edit: ClassVar[type[Edit]] = ParallelEdit
    lr: ClassVar[float] = 3e-4
    small_lr: ClassVar[float] = 3e-3
