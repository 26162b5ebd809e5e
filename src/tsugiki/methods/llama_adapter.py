"""LLaMA-Adapter (Zhang et al. 2023, arXiv:2303.16199): attention to trained prompts in the top layers, gated from zero."""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edit import Config, Edit, Start, setting
from ..errors import UserError, shown
from ..formats.spec import TUNER, Peft
from ..route import Context, Rows
from ..sites import Site, rotate


class PositionsEdit(Edit):
    """Keeps the rotary positions that the layer was called with."""
    roles, keeps_arguments = ("block",), True

    def __init__(self, config: LlamaAdapter, site: Site, start: Start):
        super().__init__(config, site, start)
        self.key = f"positions of {start.adapter}"

    def arguments(self, kwargs: dict[str, Any], rows: Rows, ctx: Context) -> None:
        found = kwargs.get("position_embeddings")
        if kwargs.get("alibi") is not None:
            found = None
        elif found is None:
            found = (kwargs["position_ids"],) if kwargs.get("position_ids") is not None else None
        if found is not None:                         # a batch of one serves every row
            found = tuple(t if len(t) == 1 and not ctx.axis else ctx.of_rows(t, rows) for t in found)
        ctx.scratch[self.key] = found


class QueryEdit(Edit):
    """Keeps the layer's query."""
    roles = ("query",)

    def __init__(self, config: LlamaAdapter, site: Site, start: Start):
        super().__init__(config, site, start)
        self.key = f"query of {start.adapter}"

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        ctx.scratch[self.key] = y
        return y


class Projections:
    """What a layer makes of a hidden state: its own key and value. A plain object: used, not owned."""

    def __init__(self, layer: dict[str, Site]):
        self.k, self.v, self.key = layer["k"], layer["v"], layer["key"]
        self.head_dim = self.key.head_dim

    def __call__(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(1, n, D) -> two of (1, heads, n, head_dim), before positions. `.forward` runs no hook: the base's own."""
        key, value = (self._part(site, h) for site in (self.k, self.v))
        if self.key.exit is not self.k.exit:          # a norm of the key
            whole = len(self.key.exit.weight) == key.shape[-1]
            key = self.key.exit.forward(key if whole else self._heads(key)).reshape(key.shape)
        return self._heads(key).transpose(1, 2), self._heads(value).transpose(1, 2)

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, self.head_dim))

    @staticmethod
    def _part(site: Site, h: Tensor) -> Tensor:
        out = site.exit.forward(h)
        return out if site.features is None else out[..., site.features.to(out.device)]


class AttendEdit(Edit):
    """o's input + gate * softmax(q k'^T * scale) v', with k', v' the layer's own key and value of the prompts (equations 3-6).

    gate: one a head, through tanh, as in the authors' code; or one a layer, as Hugging Face PEFT has it.
    """
    roles = ("o",)

    def __init__(self, config: LlamaAdapter, site: Site, start: Start):
        super().__init__(config, site, start)
        layer = {s.role: s for s in start.base if s.layer == site.layer}
        self.base, self.query = Projections(layer), layer["query"]
        width, heads = layer["block"].d_out, self.query.d_out // self.query.head_dim
        self.by_head = config.gate == "head"
        shape = 1, config.tokens, width
        self.prompt = start.parameter(f"{site.name}.prompt", *shape, fill=lambda t, g: t.normal_(0, 1, generator=g))
        self.gate = start.parameter(f"{site.name}.gate", *((1, heads, 1, 1) if self.by_head else (1,)))
        self.keys = f"query of {start.adapter}", f"positions of {start.adapter}"

    def pre(self, x: Tensor, ctx: Context) -> Tensor:
        query, positions = ctx.scratch.pop(self.keys[0]), ctx.scratch.get(self.keys[1])
        if query.dim() == 3:
            query = query.unflatten(-1, (-1, self.query.head_dim))            # (B, T, H, d)
        if not self.query.heads_first:
            query = query.transpose(1, 2)                                     # (B, H, T, d)
        query = rotate(self.query, query, positions)
        key, value = self.base(self.prompt.to(x.dtype))                       # (1, kv heads, n, d)
        times = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(times, 1) for t in (key, value))
        scores = (query @ key.mT) * self.query.score_scale                    # (B, H, T, n)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = F.softmax(scores, -1, dtype=wide).to(x.dtype)
        gate = (self.gate.tanh() if self.by_head else self.gate).to(x.dtype)
        return x + ((gate * weights) @ value).transpose(1, 2).reshape(x.shape)


def _read(config: dict[str, Any]) -> dict[str, Any]:
    if type(config.get("adapter_layers")) is not int:
        raise ValueError("adapter_layers: must be a whole number")
    return {"gate": "layer", "last": config["adapter_layers"]}


@dataclass(frozen=True, kw_only=True)
class LlamaAdapter(Config):
    """LLaMA-Adapter. Trains tokens * width numbers and the gates in each layer; a new one changes nothing."""
    tokens: int = setting(10, "prompts a layer", low=1)
    last: int | None = setting(None, "only in the last n layers; all of them if not set (30 of 32 in the paper)", low=1)
    gate: str = setting("head", "a gate for each head, or for each layer as in PEFT", choices=("head", "layer"))

    name: ClassVar[str] = "llama_adapter"
    lr: ClassVar[float] = 9e-3
    small_lr: ClassVar[float] = 0.1
    targets: ClassVar[tuple[str, ...]] = ("o",)
    variants: ClassVar[tuple[dict, ...]] = ({"gate": "layer"}, {"last": 1})

    @property
    def parts(self) -> tuple[Config, ...]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _Positions(**values), _Query(**values), _Attend(**values)

    peft: ClassVar[Peft] = Peft(
        "ADAPTION_PROMPT", fields={"tokens": "adapter_len"}, size="adapter_len", path=lambda site: site.module.rpartition(".")[0],
        tensors={"prompt": "adaption_prompt", "gate": "adaption_gate"}, known=frozenset({"adapter_layers"}),
        neutral=TUNER | {"target_modules": (None, "self_attn")},
        write=lambda adapter, names: {"adapter_layers": len(adapter.parameters()) // 2, "target_modules": "self_attn"},
        read=lambda config, targets: _read(config),
        fits=lambda adapter: adapter.cfg.gate == "layer" and adapter.home.family.peft_has_its_attention)


class _Positions(LlamaAdapter):
    edit, targets = PositionsEdit, ("block",)

    @property
    def parts(self) -> tuple[Config, ...]:
        return (self,)

    def pick(self, sites: Sequence[Site]) -> Sequence[Site]:
        count = 1 + max(s.layer for s in sites)
        if self.last is not None and self.last > count:
            raise UserError(f"{self.name}: last is {shown(self.last)}, the model has {count} layers")
        return [s for s in sites if self.last is None or s.layer >= count - self.last]


class _Query(_Positions):
    edit, targets = QueryEdit, ("query",)


class _Attend(_Positions):
    edit, targets = AttendEdit, ("o",)
