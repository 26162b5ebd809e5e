"""MAM adapter (He et al. 2022, arXiv:2110.04366, section 4.6): prefix tuning in attention, a scaled parallel adapter at the MLP."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..edit import Config, setting
from .bottleneck import ACTIVATIONS
from .parallel import Parallel
from .prefix import Prefix
from .prompts import Tables


@dataclass(frozen=True, kw_only=True)
class MAM(Tables, Config):
    """Mix-and-match adapter (MAM). Trains a prefix and a parallel adapter as one."""
    tokens: int = setting(30, "virtual tokens of the prefix", low=1)
    hidden: int = setting(0, "width of the prefix's MLP while it trains; 0: none", low=0)
    size: int = setting(64, "width of the parallel adapter's bottleneck (512 in the paper)", low=1)
    act: str = setting("relu", "activation of the parallel adapter", choices=tuple(ACTIVATIONS))
    scale: float = setting(4.0, "what the parallel adapter's output is multiplied with")

    name: ClassVar[str] = "mam"
    lr: ClassVar[float] = 1e-3
    small_lr: ClassVar[float] = 2e-3

    @property
    def parts(self) -> tuple[Config, ...]:
        return Prefix(tokens=self.tokens, hidden=self.hidden), Parallel(size=self.size, act=self.act, scale=self.scale)
