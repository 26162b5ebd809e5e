"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): LoRA whose B learns faster than its A."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..edit import setting
from .lora import LoRA


@dataclass(frozen=True, kw_only=True)
class LoRAPlus(LoRA):
    """LoRA+. Trains what LoRA trains, B at `ratio` times the learning rate of A (section 4; the paper recommends 2^4)."""
    ratio: float = setting(16.0, "learning rate of B over that of A", low=1e-6)

    name: ClassVar[str] = "loraplus"
    lr: ClassVar[float] = 5e-5                        # A's
    small_lr: ClassVar[float] = 5e-4

    def lr_scale(self, key: str) -> float:
        return self.ratio if key.endswith(".B") else 1.0
