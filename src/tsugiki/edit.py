"""One method at one site: what a method's config and its edit are."""
from __future__ import annotations

import hashlib
import math
import types
import zlib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from .errors import UserError
from .route import Context
from .sites import LINEAR_ROLES, Site

LINEARS = (*LINEAR_ROLES, "head")                     # where a change of a weight can sit


def setting(default: Any = MISSING, help: str = "", *, low: float | None = None, high: float | None = None,
            below: float | None = None, choices: tuple | None = None) -> Any:
    """A config field with its one-line help and the values it allows: low <= value <= high, value < below."""
    limits = {"low": low, "high": high, "below": below, "choices": choices}
    return field(default=default, metadata={"help": help} | {k: v for k, v in limits.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every method's config: frozen, keyword-only, and it checks itself. Raises UserError."""
    name: ClassVar[str]                               # what the method is called on the command line and on disk
    edit: ClassVar[type[Edit] | None] = None          # its Edit; None: the method trains the base itself
    lr: ClassVar[float]                               # the learning rate to start from
    peft: ClassVar[Any] = None                        # how Hugging Face PEFT writes it (formats.peft), if PEFT has it

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            object.__setattr__(self, f.name, self._checked(f.name, getattr(self, f.name), hints[f.name], f.metadata))

    def _checked(self, name: str, value: Any, kind: Any, limits: dict) -> Any:
        where = f"{self.name}: {name}"
        value = _typed(value, kind, where)
        if value is None:
            return value
        if (low := limits.get("low")) is not None and not value >= low:
            raise UserError(f"{where} must be at least {low}, got {value}")
        if (high := limits.get("high")) is not None and not value <= high:
            raise UserError(f"{where} must be at most {high}, got {value}")
        if (below := limits.get("below")) is not None and not value < below:
            raise UserError(f"{where} must be below {below}, got {value}")
        if (choices := limits.get("choices")) is not None and value not in choices:
            raise UserError(f"{where} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        return value


NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list of texts",
         type(None): "nothing"}


def _typed(value: Any, kind: Any, where: str) -> Any:
    """`value` as the annotation `kind` (int float bool str tuple[str, ...] None, and unions), or one line on why not."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        base = get_origin(option) or option
        if base is float and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if base is tuple and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value) and value:
            return tuple(value)
        if base not in (tuple, float) and type(value) is base:
            return value
    wanted = " or ".join(NAMES[get_origin(o) or o] for o in options)
    raise UserError(f"{where} must be {wanted}, got {value!r}")


@dataclass(frozen=True)
class Start:
    """How a new edit begins: its random draws, by (seed, site, parameter); where its tensors live; what it shares."""
    seed: int
    device: torch.device
    dtype: torch.dtype                                # float32, or float64 on a float64 base
    shared: nn.ModuleDict                             # modules that several edits of one adapter use

    def generator(self, key: str) -> torch.Generator:
        """A CPU generator of its own for `key`: the same numbers on every device, whatever was drawn before."""
        digest = hashlib.sha256(f"{self.seed} {key}".encode()).digest()       # torch's CPU generator keeps only 32 bits
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

    def parameter(self, key: str, *shape: int, fill: Callable[[Tensor, torch.Generator], Any] | None = None) -> nn.Parameter:
        """A trained tensor, zero or filled in place by `fill(tensor, generator)`; drawn in float64, then rounded."""
        tensor = torch.zeros(*shape, dtype=torch.float64)
        if fill is not None:
            with torch.no_grad():
                fill(tensor, self.generator(key))
        return nn.Parameter(tensor.to(self.device, self.dtype))


class Edit(nn.Module):
    """One method at one site. It never calls the base. Override `pre` or `post`, and `merge` if the maths allows it.

    x and y come in the base's dtype; cast your own small tensors to it (`self.A.to(x.dtype)`), and return y's dtype.
    """
    roles: ClassVar[tuple[str, ...]] = LINEARS        # sites it may sit on
    virtual: ClassVar[str | None] = None              # its virtual tokens' positions: "sequence", "zero", or it has none
    starts_as_identity: ClassVar[bool] = True         # a new one leaves the model as it is

    def __init__(self, config: Config, site: Site, start: Start):
        super().__init__()
        # Keys this edit's random draws, whatever the adapter is called. A tensor: an int would compile each layer anew.
        self.register_buffer("salt", torch.tensor(zlib.crc32(site.name.encode()), device=start.device), persistent=False)

    def pre(self, x: Tensor, ctx: Context) -> Tensor:
        """The site's input, changed."""
        return x

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        """The site's output, changed, seeing its input."""
        return y

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        """The same change folded into a float64 weight (out, in) and bias, as new tensors."""
        raise NotImplementedError


def mergeable(edit: Edit) -> bool:
    return type(edit).merge is not Edit.merge


def changes_input(edit: Edit) -> bool:
    return type(edit).pre is not Edit.pre
