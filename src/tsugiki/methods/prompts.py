"""Virtual tokens: prompt tuning (Lester et al. 2021, arXiv:2104.08691), prefix tuning (Li & Liang 2021, arXiv:2101.00190)."""
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..edit import Config, Edit, Start, setting
from ..formats.spec import VIRTUAL, Peft
from ..route import Context
from ..sites import Site

SHAPE = frozenset({"token_dim", "num_attention_heads", "num_layers"})       # of the model, which formats.peft compares


class VirtualEdit(Edit):
    """Puts its `tokens` where the site's output stands for this adapter's virtual positions."""
    starts_as_identity = False
    scale = 1.0

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        if not ctx.virtual:                           # decoding: the virtual positions are in the cache already
            return y
        tokens = self.tokens.to(y.dtype) * self.scale                         # (n, D)
        if y.dim() == 4:                              # a key norm sees (B, T, H, d) or (B, H, T, d)
            tokens = tokens.unflatten(-1, (-1, y.shape[-1]))
            tokens = tokens.transpose(0, 1) if self.heads_first else tokens
        along = y.dim() - 2 if self.heads_first else 1
        start = ctx.virtual - len(self.tokens)        # rows with fewer tokens have the slots left of theirs masked
        before, after = y.narrow(along, 0, start), y.narrow(along, ctx.virtual, y.shape[along] - ctx.virtual)
        return torch.cat([before, tokens.expand(len(y), *tokens.shape), after], along)


class PromptEdit(VirtualEdit):
    """Trained embeddings before the text's own."""
    roles, virtual, heads_first = ("embed",), "sequence", False

    def __init__(self, config: Prompt, site: Site, start: Start):
        super().__init__(config, site, start)
        key = f"{site.name}.tokens"
        self.tokens = start.parameter(key, config.tokens, site.d_out, fill=lambda t, g: t.normal_(0, 0.02, generator=g))
        if config.start == "vocabulary":
            ids = torch.randint(site.d_in, (config.tokens,), generator=start.generator(key))
            with torch.no_grad():                     # .forward: no hook, but the scale some embeddings apply
                self.tokens.copy_(site.exit.forward(ids.to(start.device)))


class PrefixEdit(VirtualEdit):
    """Trained keys and values before the text's own, in every layer."""
    roles, virtual = ("key", "value"), "zero"

    def __init__(self, config: Prefix, site: Site, start: Start):
        super().__init__(config, site, start)
        self.heads_first = site.heads_first
        self.scale = 1.0 / site.key_scale             # the model will multiply it back: cos(0) times its scaling
        self.tokens = start.parameter(f"{site.name}.tokens", config.tokens, site.d_out,
                                      fill=lambda t, g: t.normal_(0, 0.02, generator=g))


@dataclass(frozen=True, kw_only=True)
class Prompt(Config):
    """Prompt tuning. Trains tokens * width numbers."""
    tokens: int = setting(8, "virtual tokens", low=1)
    start: str = setting("vocabulary", "where they begin: embeddings of random words, or noise",
                         choices=("vocabulary", "random"))

    name: ClassVar[str] = "prompt"
    edit: ClassVar[type[Edit]] = PromptEdit
    lr: ClassVar[float] = 3e-2
    targets: ClassVar[tuple[str, ...]] = ("embed",)
    peft: ClassVar[Peft] = Peft(
        "PROMPT_TUNING", fields={"tokens": "num_virtual_tokens"}, virtual=True, size="num_virtual_tokens",
        known=SHAPE | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
        neutral=VIRTUAL)


@dataclass(frozen=True, kw_only=True)
class Prefix(Config):
    """Prefix tuning without the MLP. Trains tokens * 2 * width of a key numbers a layer."""
    tokens: int = setting(8, "virtual tokens", low=1)

    name: ClassVar[str] = "prefix"
    edit: ClassVar[type[Edit]] = PrefixEdit
    lr: ClassVar[float] = 1e-2
    targets: ClassVar[tuple[str, ...]] = ("key", "value")
    peft: ClassVar[Peft] = Peft(
        "PREFIX_TUNING", fields={"tokens": "num_virtual_tokens"}, virtual=True, size="num_virtual_tokens",
        known=SHAPE | {"encoder_hidden_size"},
        neutral=VIRTUAL | {"prefix_projection": (False, None), "init_weights": (None, True, False)})
