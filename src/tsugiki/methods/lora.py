"""LoRA (Hu et al. 2021, arXiv:2106.09685): a trained low-rank change beside a frozen weight."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import patterns
from ..edit import Config, Edit, Start, linear, setting, times
from ..errors import UserError
from ..formats.spec import NOTHING, TUNER, Peft
from ..route import Context, dropout
from ..sites import Site


class LoRAEdit(Edit):
    """y + s * (B A drop(x) + b), s = alpha / rank (equation 3), or alpha / sqrt(rank) with rsLoRA (arXiv:2312.03732)."""
    scalars = ("scale",)

    def __init__(self, config: LoRA, site: Site, start: Start):
        super().__init__(config, site, start)
        rank = config.rank_at(site)
        a, b = FILLS[config.start]
        self.A = start.parameter(f"{site.name}.A", rank, site.d_in, fill=a)
        self.B = start.parameter(f"{site.name}.B", site.d_out, rank, fill=b)
        self.b = start.parameter(f"{site.name}.b", site.d_out) if config.bias else None
        if config.start == "orthogonal":
            _orthogonal(self, start.generator(f"{site.name}.Q"))
        self.scale = config.scale_at(site)
        self.p = config.dropout

    def alike(self) -> Any:
        return self.p, self.b is None

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        plain = type(self).post is LoRAEdit.post and type(self).change is LoRAEdit.change
        return (self.A, self.B, self.scale) if plain and self.b is None and not (self.p and self.training) else None

    def change(self, x: Tensor, ctx: Context) -> Tensor:
        """s * (B A drop(x) + b), in x's dtype."""
        x = dropout(x, self.p, ctx, self.salt, self.training)
        low = times(linear(x, self.A.to(x.dtype)), self.scale)                # (B, T, rank)
        return linear(low, self.B.to(low.dtype), None if self.b is None else times(self.b.to(low.dtype), self.scale))

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        return y + self.change(x, ctx).to(y.dtype)

    def merge(self, w: Tensor, b: Tensor | None, site: Site) -> tuple[Tensor, Tensor | None]:
        if self.b is not None:
            b = self.b.to(w) * self.scale + (0.0 if b is None else b)
        return w + self.scale * (self.B.to(w) @ self.A.to(w)), b


def _kaiming(tensor: Tensor, generator: torch.Generator) -> None:
    nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


def _gaussian(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0, 1 / len(tensor), generator=generator)


def _normal(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0, 1, generator=generator)


@torch.no_grad()
def _orthogonal(edit: LoRAEdit, generator: torch.Generator) -> None:
    """A spans the odd and B the even rows of one orthogonal matrix, so that B A = 0 although neither is (to rounding)."""
    rank = len(edit.A)
    q = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64, generator=generator))[0].to(edit.A)
    edit.A.copy_(q[0::2].T @ edit.A[:rank // 2] / 10)
    edit.B.copy_(edit.B[:, :rank // 2] @ q[1::2] / 10)


FILLS = {"kaiming": (_kaiming, None), "gaussian": (_gaussian, None), "orthogonal": (_normal, _normal)}
STARTS = {"kaiming": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}   # PEFT's init_lora_weights


def matching(wanted: Mapping[str, Any] | None, name: str, order: Any = list) -> str | None:
    """The first pattern that is a site's name or the end of it, from a dot on; as PEFT's get_pattern_key matches."""
    return next((key for key in order(wanted or ()) if patterns.fullmatch(rf"(.*\.)?({key})", name)), None)


@dataclass(frozen=True, kw_only=True)
class LoRA(Config):
    """LoRA. Trains rank * (d_in + d_out) numbers a site; B starts at zero, so a new adapter changes nothing.

    `ranks` and `alphas` hold other values for some sites: a regex that must match the end of the site's name, from a dot on;
    of several that do, the first. Start "orthogonal" needs even ranks, and is zero only to rounding.
    """
    rank: int = setting(8, "inner width of the change", low=1)
    alpha: float = setting(16.0, "strength: the change is scaled by alpha / rank", low=1e-6)
    dropout: float = setting(0.0, "share of inputs dropped in training", low=0.0, below=1.0)
    targets: tuple[str, ...] | str = setting("linear", "roles, one regex over site names, or \"linear\": every linear")
    rslora: bool = setting(False, "scale by alpha / sqrt(rank) instead")
    ranks: dict[str, int] | None = setting(None, "other ranks for some sites: regex over the end of the name -> rank")
    alphas: dict[str, float] | None = setting(None, "other alphas for some sites: regex over the end of the name -> alpha")
    bias: bool = setting(False, "train an offset of the output too")
    start: str = setting("kaiming", "how A is drawn", choices=tuple(FILLS))

    name: ClassVar[str] = "lora"
    edit: ClassVar[type[Edit]] = LoRAEdit
    lr: ClassVar[float] = 2e-4
    small_lr: ClassVar[float] = 2e-3
    peft: ClassVar[Peft] = Peft(
        "LORA", fields={"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora",
                        "ranks": "rank_pattern", "alphas": "alpha_pattern", "bias": "lora_bias"},
        tensors={"A": "lora_A.weight", "B": "lora_B.weight", "b": "lora_B.bias"},
        known=frozenset({"target_modules", "fan_in_fan_out", "init_lora_weights", "eva_config"}),
        neutral=TUNER | {"bias": ("none",), "megatron_core": ("megatron.core", None), "qalora_group_size": (16, None)}
        | dict.fromkeys(("use_dora", "use_qalora", "ensure_weight_tying", "megatron_config", "loftq_config", "corda_config",
                         "lora_ga_config", "velora_config", "alora_invocation_tokens", "monteclora_config", "layer_replication",
                         "target_parameters", "use_bdlora", "arrow_config", "kasa_config"), NOTHING),
        write=lambda adapter, names: {"init_lora_weights": adapter.cfg.bias or STARTS[adapter.cfg.start]},
        read=lambda config, targets: _start_of(config))

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, low in (("ranks", 1), ("alphas", 1e-6)):
            values = getattr(self, key) or {}
            object.__setattr__(self, key, values or None)
            for pattern, value in values.items():
                _check_pattern(f"{self.name}: {key}", pattern)
                if not value >= low:
                    raise UserError(f"{self.name}: {key}: {pattern} must be at least {low}, got {value}")
        if self.start == "orthogonal" and any(r % 2 for r in (self.rank, *(self.ranks or {}).values())):
            raise UserError(f"{self.name}: start \"orthogonal\" needs even ranks, got {self.rank} {self.ranks or ''}".rstrip())

    def pick(self, sites: Sequence[Site]) -> Sequence[Site]:
        for key in ("ranks", "alphas"):
            for pattern in getattr(self, key) or ():
                if not any(matching([pattern], s.name) for s in sites):
                    raise UserError(f"{self.name}: {key}: {pattern!r} matches no targeted site; a name here: {sites[0].name}")
        return sites

    def rank_at(self, site: Site) -> int:
        key = matching(self.ranks, site.name)
        return self.rank if key is None else self.ranks[key]

    def scale_at(self, site: Site) -> float:
        key, rank = matching(self.alphas, site.name), self.rank_at(site)
        return (self.alpha if key is None else self.alphas[key]) / (math.sqrt(rank) if self.rslora else rank)

    def stored(self, adapter: Any) -> tuple[Config, dict[str, Tensor]]:
        """JSON files sort their keys: where that would change which pattern is the first, each site is named in full."""
        cfg, names = self, [s.name for s in adapter.sites]
        for key in ("ranks", "alphas"):
            old = getattr(self, key) or {}
            if any(matching(old, n) != matching(old, n, sorted) for n in names):
                found = {n: matching(old, n) for n in names}
                cfg = replace(cfg, **{key: {n: old[k] for n, k in found.items() if k is not None}})
        return cfg, adapter.tensors()


def _check_pattern(where: str, pattern: str) -> None:
    try:
        patterns.fullmatch(rf"(.*\.)?({pattern})", "")
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _start_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our `start` from PEFT's init_lora_weights; those that change the base's own weight are refused."""
    given = config.get("init_lora_weights", True)
    if given in (True, False, "eva"):                 # EVA only makes the start; what is stored is a LoRA
        return {}
    if given not in ("gaussian", "orthogonal"):
        raise ValueError(f"init_lora_weights: {str(given)[:60]!r} is not supported (supported: True, False, 'gaussian', "
                         "'orthogonal', 'eva'; one that changes the base must be converted to a LoRA when it is saved)")
    return {"start": given}
