"""LayerNorm tuning (Zhao et al. 2023, arXiv:2312.11420): the norms' own weights and biases are trained, and nothing else."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..edit import Config, Edit, Frozen, Start, setting
from ..formats.spec import TUNER, Peft
from ..route import Context
from ..sites import Site
from ..weights import normaliser


class LNTuningEdit(Edit):
    """y + n(x) * (weight - frozen weight) + (bias - frozen bias), n(x) the normalised input: the norm with the new ones."""
    roles = ("norm",)

    def __init__(self, config: LNTuning, site: Site, start: Start):
        super().__init__(config, site, start)
        self.frozen, self.normalised = Frozen(site), normaliser(site.exit)
        self.weight = _copy(start, f"{site.name}.weight", self.frozen.weight())
        bias = self.frozen.bias()
        self.register_parameter("bias", None if bias is None else _copy(start, f"{site.name}.bias", bias))

    def alike(self) -> Any:
        return ()

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        change = self.normalised(x) * (self.weight - self.frozen.weight().to(self.weight.dtype))
        if self.bias is not None:
            change = change + (self.bias - self.frozen.bias().to(self.bias.dtype))
        return y + change.to(y.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        w = w + (self.weight.to(w) - self.frozen.weight().to(w))
        return w, b if self.bias is None else b + (self.bias.to(b) - self.frozen.bias().to(b))


def _copy(start: Start, key: str, value: Tensor):
    """A trained tensor that begins as the frozen one; on a base without weights, as zeros."""
    return start.parameter(key, len(value), fill=None if value.is_meta else lambda tensor, _: tensor.copy_(value))


@dataclass(frozen=True, kw_only=True)
class LNTuning(Config):
    """LayerNorm tuning. Trains the width of every norm, twice where it has a bias; all start as the frozen ones."""
    targets: tuple[str, ...] | str = setting(("norm",), "role norm: all, or one regex over the norms' names")

    name: ClassVar[str] = "ln_tuning"
    edit: ClassVar[type[Edit]] = LNTuningEdit
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 3e-2
    peft: ClassVar[Peft] = Peft(
        "LN_TUNING", tensors={"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"},
        size="target_modules", known=frozenset({"target_modules"}), neutral=TUNER)
