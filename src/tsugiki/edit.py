"""One method at one site: what a method's config and its edit are."""
from __future__ import annotations

import functools
import hashlib
import math
import sys
import types
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError, shown
from .route import Context, Rows
from .sites import LINEAR_ROLES, SHARED_GATE, Site
from .weights import dense, unmerged

LINEARS = (*LINEAR_ROLES, SHARED_GATE, "head")        # where a change of a weight can sit
NARROW, WIDE = 256, 2048                              # hidden widths that `small_lr` and `lr` are for


def setting(default: Any = MISSING, help: str = "", *, low: float | None = None, high: float | None = None,
            below: float | None = None, choices: tuple | None = None) -> Any:
    """A config field with its one-line help and the values it allows: low <= value <= high, value < below."""
    limits = {"low": low, "high": high, "below": below, "choices": choices}
    return field(default=default, metadata={"help": help} | {k: v for k, v in limits.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every method's config: frozen, keyword-only, and it checks itself. Raises UserError."""
    name: ClassVar[str]                               # what the method is called on the command line and on disk
    edit: ClassVar[type[Edit] | None] = None          # its Edit; None: see `parts`
    lr: ClassVar[float]                               # the learning rate to start from: the paper's, for bases WIDE or wider
    small_lr: ClassVar[float | None] = None           # and for bases NARROW or narrower, found by search; None: as `lr`
    peft: ClassVar[Any] = None                        # how Hugging Face PEFT writes it (formats.peft), if PEFT has it
    variants: ClassVar[tuple[dict, ...]] = ()         # settings that go another way through its code: tests run each

    def __init_subclass__(cls) -> None:
        """A method with an `lr` of its own does not take over the `small_lr` of the one it extends."""
        super().__init_subclass__()
        if "lr" in vars(cls) and "small_lr" not in vars(cls):
            cls.small_lr = None

    @classmethod
    def rate(cls, width: int) -> float:
        """The learning rate to start from on a base of hidden width `width`; between NARROW and WIDE, a power of the width."""
        if cls.small_lr is None or width >= WIDE:
            return cls.lr
        if width <= NARROW:
            return cls.small_lr
        return float(f"{cls.small_lr * (cls.lr / cls.small_lr) ** math.log(width / NARROW, WIDE / NARROW):.2g}")

    @property
    def parts(self) -> tuple[Config, ...]:
        """The configs whose edits make up an adapter: itself, several for a combination, none if it trains the base itself."""
        return () if self.edit is None else (self,)

    def pick(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Of the sites that `targets` selected, those it edits."""
        return sites

    # What a method may do around the training loop. All are called with the Adapter; none is called outside of training.

    def prepare(self, adapter: Any, forward: Callable[[], Any]) -> None:
        """Before the first step: `forward()` runs the model over some training rows, for a start that is made from data."""

    def lr_scale(self, key: str) -> float:
        """What the learning rate of the trained tensor `key` is multiplied with."""
        return 1.0

    def penalty(self, adapter: Any) -> Tensor | None:
        """Added to the loss of every step, once."""
        return None

    def after_step(self, adapter: Any, step: int, steps: int) -> None:
        """After the optimizer's update number `step` (from 1) of `steps`, with the gradients still there."""

    def stored(self, adapter: Any) -> tuple[Config, dict[str, Tensor]]:
        """What is written to disk: a config and its tensors, by name. Both may be smaller than what is trained."""
        return self, adapter.tensors()

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for f in fields(self):
            object.__setattr__(self, f.name, self._checked(f.name, getattr(self, f.name), hints[f.name], f.metadata))

    def _checked(self, name: str, value: Any, kind: Any, limits: dict) -> Any:
        where = f"{self.name}: {name}"
        value = _typed(value, kind, where)
        if value is None:
            return value
        if (low := limits.get("low")) is not None and not value >= low:
            raise UserError(f"{where} must be at least {low}, got {shown(value)}")
        if (high := limits.get("high")) is not None and not value <= high:
            raise UserError(f"{where} must be at most {high}, got {shown(value)}")
        if (below := limits.get("below")) is not None and not value < below:
            raise UserError(f"{where} must be below {below}, got {shown(value)}")
        if (choices := limits.get("choices")) is not None and value not in choices:
            raise UserError(f"{where} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
        return value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """A class's annotations, which Python has to evaluate."""
    return get_type_hints(cls)


NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list of texts",
         dict: "names with numbers", type(None): "nothing"}


def _typed(value: Any, kind: Any, where: str) -> Any:
    """`value` as the annotation `kind` (int float bool str tuple[str, ...] dict[str, ...] None, unions), or a line on why not."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        base = get_origin(option) or option
        if base is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:     # an int may have no float
            return float(value)
        if base is tuple and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value) and value:
            return tuple(value)
        if base is dict and isinstance(value, dict):
            return {_typed(k, str, where): _typed(v, get_args(option)[1], f"{where}: {k}") for k, v in value.items()}
        if base not in (tuple, float, dict) and type(value) is base:
            return value
    wanted = " or ".join(NAMES[get_origin(o) or o] for o in options)
    raise UserError(f"{where} must be {wanted}, got {shown(value)}")


class Frozen:
    """A look at a site's frozen weight. A plain object, so that the edit that keeps one does not own the base's module."""

    def __init__(self, site: Site):
        self.module, self.features = site.exit, site.features

    def weight(self) -> Tensor:
        """Dense (d_out, d_in), as before any merge; the rows of the site where it is a part of a fused weight."""
        w = dense(self.module, unmerged(self.module)[0])
        return w if self.features is None else w[self.features.to(w.device)]

    def bias(self) -> Tensor | None:
        """(d_out,), as before any merge, or None."""
        b = unmerged(self.module)[1]
        return b if b is None or self.features is None else b[self.features.to(b.device)]


@dataclass(frozen=True)
class Start:
    """How a new edit begins: its random draws, by (seed, site, parameter); where its tensors live; what it shares."""
    seed: int
    device: torch.device
    dtype: torch.dtype                                # float32, or float64 on a float64 base
    shared: nn.ModuleDict                             # modules that several edits of one adapter use
    adapter: str = ""                                 # the adapter's name, unique on its base
    sites: tuple[Site, ...] = ()                      # every site this config edits
    base: Sequence[Site] = ()                         # every site of the base
    tokenizer: Any = None                             # the base's, if the caller gave one
    room: list[int] | None = None                     # how many numbers may still be made, where a file set the sizes

    def generator(self, key: str) -> torch.Generator:
        """A CPU generator of its own for `key`: the same numbers on every device, whatever was drawn before."""
        digest = hashlib.sha256(f"{self.seed} {key}".encode()).digest()       # torch's CPU generator keeps only 32 bits
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))

    def parameter(self, key: str, *shape: int, fill: Callable[[Tensor, torch.Generator], Any] | None = None) -> nn.Parameter:
        """A trained tensor, zero or filled in place by `fill(tensor, generator)`; drawn in float64, then rounded."""
        return nn.Parameter(self.tensor(key, *shape, fill=fill))

    def tensor(self, key: str, *shape: int, fill: Callable[[Tensor, torch.Generator], Any] | None = None) -> Tensor:
        """The same without training: for a buffer."""
        if self.room is not None:
            self.room[0] -= math.prod(shape)
            if self.room[0] < 0:
                raise UserError(f"{key} would have the shape {shown(shape)}, more than the tensors of the file hold")
        tensor = torch.zeros(*shape, dtype=torch.float64)
        if fill is not None:
            with torch.no_grad():
                fill(tensor, self.generator(key))
        return tensor.to(self.device, self.dtype)


class Dense(nn.Module):
    """A trained linear map of an edit's own. Not an nn.Linear: whoever looks for the base's linears does not find it."""

    def __init__(self, start: Start, key: str, d_in: int, d_out: int, bias: bool = True,
                 fill: Callable[[Tensor, torch.Generator], Any] | None = None):
        super().__init__()
        bound = d_in ** -0.5
        fill = fill or (lambda t, g: t.uniform_(-bound, bound, generator=g))
        self.weight = start.parameter(f"{key}.weight", d_out, d_in, fill=fill)
        self.bias = start.parameter(f"{key}.bias", d_out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; of stacked weights (n, out, in) and biases (n, 1, out) a product for each of x (n, R, in)."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return x @ weight.mT if bias is None else torch.baddbmm(bias, x, weight.mT)


def times(x: Tensor, factor: float | Tensor) -> Tensor:
    """x * factor in x's dtype; of a stack the factors are (n, 1, 1)."""
    return x * factor if isinstance(factor, float) else (x * factor).to(x.dtype)


class Edit(nn.Module):
    """One method at one site. It never calls the base. Override `pre` or `post`, and `merge` if the maths allows it.

    x and y come in the base's dtype; cast your own small tensors to it (`self.A.to(x.dtype)`), and return y's dtype.
    """
    roles: ClassVar[tuple[str, ...]] = LINEARS        # sites it may sit on
    virtual: ClassVar[str | None] = None              # its virtual tokens' positions: "sequence", "zero", or it has none
    starts_as_identity: ClassVar[bool] = True         # a new one leaves the model as it is
    needs_places: ClassVar[bool] = False              # reads ctx.places
    scalars: ClassVar[tuple[str, ...]] = ()           # its numbers that may differ between edits computed together (group.py)
    by_row: ClassVar[bool] = False                    # computed together, it wants (n * rows, T, D), not (n, rows * T, D)
    constants: ClassVar[tuple[str, ...]] = ()         # its methods whose result the gradient takes as a constant, by definition
    keeps_arguments: ClassVar[bool] = False           # on a block: `arguments` is called with what the layer was called with

    def __init_subclass__(cls) -> None:
        """A class that edits otherwise than the one it extends is not computed together as that one is."""
        super().__init_subclass__()
        if vars(cls).keys() & {"pre", "post", "change", "table"} and "alike" not in vars(cls):
            cls.alike = Edit.alike

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

    def arguments(self, kwargs: dict[str, Any], rows: Rows, ctx: Context) -> None:
        """On a block, if keeps_arguments: the keyword arguments of the layer's call, and the batch rows that are this edit's."""

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """(A (r, in), B (out, r), s) if `post` is y + s B (A x), now and for every row; else None."""
        return None

    def alike(self) -> Any:
        """What must be equal for edits of one class to be computed together; None: it never is.

        Together, `pre` or `post` runs once on an edit with stacked tensors, (n, a, b) or (n, 1, a), and x, y of (n, rows * T, D).
        So they may use `linear`, `times` and what broadcasts, and of ctx only `keys` and `virtual`. A class that overrides them
        says anew what is alike.
        """
        return None

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        """What `post` does, folded into a float64 weight (out, in) and bias, as new tensors."""
        raise NotImplementedError

    def merge_input(self, w: Tensor, site: Site) -> Tensor:
        """What `pre` does, folded into a float64 weight (out, in), as a new tensor: the weight of pre(x) as one of x."""
        return w


def kept_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to what a module is: all but those registered with persistent=False."""
    for path, part in module.named_modules():
        for name, tensor in part._buffers.items():
            if tensor is not None and name not in part._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, tensor


def mergeable(edit: Edit) -> bool:
    return type(edit).merge is not Edit.merge


def changes_input(edit: Edit | type[Edit]) -> bool:
    return (edit if isinstance(edit, type) else type(edit)).pre is not Edit.pre
