"""(IA)^3 (Liu et al. 2022, arXiv:2205.05638): trained vectors that scale keys, values and the hidden features of the MLP."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import patterns
from ..edit import Config, Edit, Start, setting
from ..errors import UserError
from ..formats.spec import NOTHING, TUNER, Peft
from ..route import Context
from ..sites import LINEAR_ROLES, ROLES, Site


class OutputEdit(Edit):
    """l * y, section 3.3: keys and values. The bias is scaled with the rest of the output."""

    def __init__(self, config: IA3, site: Site, start: Start):
        super().__init__(config, site, start)
        self.l = start.parameter(f"{site.name}.l", site.d_out, fill=_ones)

    def alike(self) -> Any:
        return ()

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y * self.l.to(y.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        l = self.l.to(w)
        return l[:, None] * w, None if b is None else l * b


class InputEdit(Edit):
    """W (l * x), section 3.3: what goes into the MLP's second linear."""

    def __init__(self, config: IA3, site: Site, start: Start):
        super().__init__(config, site, start)
        self.l_in = start.parameter(f"{site.name}.l_in", site.d_in, fill=_ones)

    def alike(self) -> Any:
        return ()

    def pre(self, x: Tensor, ctx: Context) -> Tensor:
        return x * self.l_in.to(x.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        return w, b                                   # the output is the base's own

    def merge_input(self, w: Tensor, site: Site) -> Tensor:
        return w * self.l_in.to(w)


def _ones(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.fill_(1.0)


def _written(adapter: Any, names: Any) -> dict[str, Any]:
    """PEFT wants the names of scaled inputs among the targets, word for word."""
    scaled = names(s for s, edit in adapter.edits.values() if isinstance(edit, InputEdit))
    rest = names(s for s, edit in adapter.edits.values() if isinstance(edit, OutputEdit))
    return {"feedforward_modules": scaled, "target_modules": sorted({*scaled, *rest})}


def _read(config: dict[str, Any], targets: Any) -> dict[str, Any]:
    found = config.get("feedforward_modules")
    if found is None:
        raise ValueError("feedforward_modules: is missing")
    return {"inputs": targets(found) if found else None}


@dataclass(frozen=True, kw_only=True)
class IA3(Config):
    """(IA)^3. Trains one number a scaled feature; all start at 1, so a new adapter changes nothing."""
    targets: tuple[str, ...] | str = setting(("k", "v", "down"), "roles, one regex over site names, or \"linear\": every linear")
    inputs: tuple[str, ...] | str | None = setting(("down",), "of these, the ones whose input is scaled, named in the same way; "
                                                   "the others' output is; nothing: every output")

    name: ClassVar[str] = "ia3"
    edit: ClassVar[type[Edit]] = OutputEdit
    lr: ClassVar[float] = 3e-3
    small_lr: ClassVar[float] = 0.1
    peft: ClassVar[Peft] = Peft(
        "IA3", tensors={"l": "ia3_l", "l_in": "ia3_l"}, shapes={"l": (-1, 1), "l_in": (1, -1)}, size="target_modules",
        write=_written, read=_read,
        known=frozenset({"target_modules", "feedforward_modules", "fan_in_fan_out"}),
        neutral=TUNER | {"init_ia3_weights": (True, *NOTHING)})

    @property
    def parts(self) -> tuple[Config, ...]:
        return (self,) if self.inputs is None else (self, _Inputs(targets=self.targets, inputs=self.inputs))

    def pick(self, sites: Sequence[Site]) -> Sequence[Site]:
        return [s for s in sites if not self._input(s)]

    def _input(self, site: Site) -> bool:
        if self.inputs is None:
            return False
        if self.inputs == "linear":
            return site.role in LINEAR_ROLES
        if isinstance(self.inputs, tuple) or self.inputs in ROLES:
            return site.role in ((self.inputs,) if isinstance(self.inputs, str) else self.inputs)
        try:
            return patterns.search(self.inputs, site.name)
        except UserError as e:
            raise UserError(f"{self.name}: inputs {e}") from None


class _Inputs(IA3):
    """The part of it that scales inputs."""
    edit: ClassVar[type[Edit]] = InputEdit

    @property
    def parts(self) -> tuple[Config, ...]:
        return (self,)

    def pick(self, sites: Sequence[Site]) -> Sequence[Site]:
        return [s for s in sites if self._input(s)]
