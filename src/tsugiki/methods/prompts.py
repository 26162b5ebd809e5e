"""What methods of virtual tokens share: a table put at virtual positions, made by an encoder that is dropped when it is saved."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..edit import Config, Edit
from ..route import Context

SHAPE = frozenset({"token_dim", "num_attention_heads", "num_layers"})       # of the model, which formats.peft compares


def noise(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0, 0.02, generator=generator)


class VirtualEdit(Edit):
    """Puts its table of `tokens` where the site's output stands for this adapter's virtual positions."""
    starts_as_identity = False
    by_row, heads_first, scale = True, False, 1.0

    def table(self) -> Tensor:
        """(tokens, width)"""
        return self.tokens

    def alike(self) -> Any:
        return self.tokens.shape if "tokens" in self._parameters else None

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        if ctx.slots is not None:
            tokens = self.table().to(y.dtype) * self.scale                    # (n, D)
            tokens = tokens.expand(len(ctx.slots) // len(tokens), -1, -1).flatten(0, 1)[None]
            return y.index_copy(y.dim() - 2 if self.heads_first else 1, ctx.slots, self._as(tokens, y))
        if not ctx.virtual:                           # decoding: the virtual positions are in the cache already
            return y
        tokens = self.table().to(y.dtype) * self.scale                        # (n, D), or of several adapters (g, n, D)
        count = tokens.shape[-2]
        tokens = tokens.reshape(-1, 1, *tokens.shape[-2:])
        tokens = tokens.expand(-1, len(y) // len(tokens), -1, -1).flatten(0, 1)         # (B, n, D)
        tokens = self._as(tokens, y)
        along = y.dim() - 2 if self.heads_first else 1
        start = ctx.virtual - count                   # rows with fewer tokens have the slots left of theirs masked
        before, after = y.narrow(along, 0, start), y.narrow(along, ctx.virtual, y.shape[along] - ctx.virtual)
        return torch.cat([before, tokens, after], along)

    def _as(self, tokens: Tensor, y: Tensor) -> Tensor:
        """(B, n, D) as y lays it out: a key norm sees (B, T, H, d) or (B, H, T, d)."""
        if y.dim() == 4:
            tokens = tokens.unflatten(-1, (-1, y.shape[-1]))
            return tokens.transpose(1, 2) if self.heads_first else tokens
        return tokens


class Tables:
    """A config whose adapter is stored as the tables that its encoders make."""

    def stored(self, adapter: Any) -> tuple[Config, dict[str, Tensor]]:
        tensors = {key: t for key, t in adapter.tensors().items() if key.partition(".")[0] != "shared"}
        for site, edit in adapter.edits.values():
            if isinstance(edit, VirtualEdit):
                tensors = {key: t for key, t in tensors.items() if not key.startswith(f"{site.name}.")}
                tensors[f"{site.name}.tokens"] = edit.table().detach()
        return replace(self, hidden=0), {key: tensors[key] for key in sorted(tensors, key=_in_order(adapter))}


def _in_order(adapter: Any) -> Any:
    """Keys by the order of their sites."""
    order = {name: n for n, name in enumerate(adapter.edits)}
    return lambda key: next(n for name, n in order.items() if key.startswith(f"{name}."))
