"""Full fine-tuning: the base's own weights, all of them, the first or last layers, or those a regex names."""
from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..edit import Config, setting
from ..errors import UserError
from ..sites import Family, family_of, find
from ..tap import base_parameters


@dataclass(frozen=True, kw_only=True)
class Full(Config):
    """Full fine-tuning. Trains the model's own parameters: not an adapter, the result is a whole model."""
    first: int | None = setting(None, "train only the first n decoder layers", low=1)
    last: int | None = setting(None, "train only the last n decoder layers", low=1)
    params: str | None = setting(None, "train only parameters whose name this regex finds")

    name: ClassVar[str] = "full"
    lr: ClassVar[float] = 2e-5
    small_lr: ClassVar[float] = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.params is not None:
            if self.first or self.last:
                raise UserError("full: params and first/last exclude each other; give one")
            try:
                re.compile(self.params)
            except re.error as e:
                raise UserError(f"full: params {self.params!r} is not a regular expression: {e}") from None

    def select(self, model: nn.Module, family: Family | None = None) -> dict[str, nn.Parameter]:
        """The parameters to train, by name, tied ones once. Raises UserError when nothing matches."""
        named = {n: p for n, p in base_parameters(model) if p.is_floating_point()}
        if self.params is not None:
            # a tied tensor has several names; the regex may know any of them
            hit = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if re.search(self.params, n)}
            found = {n: p for n, p in named.items() if id(p) in hit}
        elif self.first or self.last:
            found = self._by_layer(model, family or family_of(model), named)
        else:
            found = named
        if not found:
            raise UserError(f"full: no parameter name matches params {self.params!r}; a name here: {next(iter(named))}")
        return found

    def _by_layer(self, model: nn.Module, family: Family, named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        count = len(find(model, family.layers, "layers"))
        for key, n in (("first", self.first), ("last", self.last)):
            if n is not None and n > count:
                raise UserError(f"full: {key} is {n}, the model has {count} layers")
        wanted = {*range(self.first or 0), *range(count - (self.last or 0), count)}
        prefixes = tuple(f"{family.layers}.{n}." for n in wanted)
        return {n: p for n, p in named.items() if n.startswith(prefixes)}
