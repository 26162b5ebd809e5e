"""Virtual tokens: prompt tuning (Lester et al. 2021, arXiv:2104.08691), P-tuning (Liu et al. 2021, arXiv:2103.10385), prefix
tuning (Li & Liang 2021, arXiv:2101.00190). What an encoder makes is kept and the encoder dropped when an adapter is saved."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..edit import Config, Dense, Edit, Start, setting
from ..errors import UserError
from ..formats.spec import VIRTUAL, Peft
from ..route import Context
from ..sites import Site

SHAPE = frozenset({"token_dim", "num_attention_heads", "num_layers"})       # of the model, which formats.peft compares


def _noise(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0, 0.02, generator=generator)


class VirtualEdit(Edit):
    """Puts its table of `tokens` where the site's output stands for this adapter's virtual positions."""
    starts_as_identity = False
    heads_first, scale = False, 1.0

    def table(self) -> Tensor:
        """(tokens, width)"""
        return self.tokens

    def post(self, x: Tensor, y: Tensor, ctx: Context) -> Tensor:
        if not ctx.virtual:                           # decoding: the virtual positions are in the cache already
            return y
        tokens = self.table().to(y.dtype) * self.scale                        # (n, D)
        count = len(tokens)
        if y.dim() == 4:                              # a key norm sees (B, T, H, d) or (B, H, T, d)
            tokens = tokens.unflatten(-1, (-1, y.shape[-1]))
            tokens = tokens.transpose(0, 1) if self.heads_first else tokens
        along = y.dim() - 2 if self.heads_first else 1
        start = ctx.virtual - count                   # rows with fewer tokens have the slots left of theirs masked
        before, after = y.narrow(along, 0, start), y.narrow(along, ctx.virtual, y.shape[along] - ctx.virtual)
        return torch.cat([before, tokens.expand(len(y), *tokens.shape), after], along)


class PromptEdit(VirtualEdit):
    """Trained embeddings before the text's own."""
    roles, virtual = ("embed",), "sequence"

    def __init__(self, config: Prompt, site: Site, start: Start):
        super().__init__(config, site, start)
        key = f"{site.name}.tokens"
        self.tokens = start.parameter(key, config.tokens, site.d_out, fill=_noise)
        if config.start == "random":
            return
        ids = torch.randint(site.d_in, (config.tokens,), generator=start.generator(key))
        if config.start == "text":
            ids = _ids_of(config, start.tokenizer)
        with torch.no_grad():                         # .forward: no hook, but the scale some embeddings apply
            self.tokens.copy_(site.exit.forward(ids.to(start.device)))


def _ids_of(config: Prompt, tokenizer: Any) -> Tensor:
    """The token ids of the text, repeated or cut to the number of virtual tokens."""
    if tokenizer is None:
        raise UserError("prompt: start is \"text\", which needs the tokenizer: adapters.add(name, config, tokenizer=tokenizer)")
    found = tokenizer(config.text, add_special_tokens=False)["input_ids"]
    if not found:
        raise UserError(f"prompt: text must hold at least one token, got {config.text!r}")
    return torch.tensor((found * config.tokens)[:config.tokens])


class EncodedPromptEdit(VirtualEdit):
    """P-tuning: embeddings that a small MLP makes while it trains."""
    roles, virtual = ("embed",), "sequence"

    def __init__(self, config: PTuning, site: Site, start: Start):
        super().__init__(config, site, start)
        key, width, self.encoded = site.name, site.d_out, config.hidden > 0
        if not self.encoded:
            self.tokens = start.parameter(f"{key}.tokens", config.tokens, width, fill=_noise)
            return
        self.embedding = start.parameter(f"{key}.embedding", config.tokens, width, fill=lambda t, g: t.normal_(0, 1, generator=g))
        widths = (width, config.hidden, config.hidden, width)
        self.mlp = nn.ModuleList(Dense(start, f"{key}.mlp.{n}", a, b) for n, (a, b) in
                                 enumerate(zip(widths, widths[1:], strict=False)))

    def table(self) -> Tensor:
        if not self.encoded:
            return self.tokens
        h = self.embedding
        for n, layer in enumerate(self.mlp):
            h = layer(torch.relu(h) if n else h)
        return h


class PrefixEdit(VirtualEdit):
    """Trained keys and values before the text's own, in every layer; perhaps made by one MLP for all of them."""
    roles, virtual = ("key", "value"), "zero"

    def __init__(self, config: Prefix, site: Site, start: Start):
        super().__init__(config, site, start)
        self.heads_first = site.heads_first
        self.scale = 1.0 / site.key_scale             # the model will multiply it back: cos(0) times its scaling
        self.encoder = None
        if not config.hidden:
            self.tokens = start.parameter(f"{site.name}.tokens", config.tokens, site.d_out, fill=_noise)
            return
        if "encoder" not in start.shared:             # Li & Liang, section 4.3: P[i] = MLP(P'[i])
            start.shared["encoder"] = PrefixEncoder(config, start.base[0].d_out, start)
        self.encoder = (start.shared["encoder"],)     # in a tuple: used, not owned
        self.out = Dense(start, f"{site.name}.out", config.hidden, site.d_out)       # this site's rows of the MLP's last matrix

    def table(self) -> Tensor:
        return self.tokens if self.encoder is None else self.out(self.encoder[0]())


class PrefixEncoder(nn.Module):
    """tanh(W P' + c): what all sites of an encoded prefix share."""

    def __init__(self, config: Prefix, width: int, start: Start):
        super().__init__()
        self.embedding = start.parameter("encoder.embedding", config.tokens, width, fill=lambda t, g: t.normal_(0, 1, generator=g))
        self.first = Dense(start, "encoder.first", width, config.hidden)

    def forward(self) -> Tensor:
        return torch.tanh(self.first(self.embedding))                         # (tokens, hidden)


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


@dataclass(frozen=True, kw_only=True)
class Prompt(Config):
    """Prompt tuning. Trains tokens * width numbers."""
    tokens: int = setting(8, "virtual tokens", low=1)
    start: str = setting("vocabulary", "where they begin: embeddings of random words, of a text's, or noise",
                         choices=("vocabulary", "text", "random"))
    text: str = setting("", "the text to begin with")

    name: ClassVar[str] = "prompt"
    edit: ClassVar[type[Edit]] = PromptEdit
    lr: ClassVar[float] = 3e-2
    targets: ClassVar[tuple[str, ...]] = ("embed",)
    variants: ClassVar[tuple[dict, ...]] = ({"start": "random"},)
    peft: ClassVar[Peft] = Peft(
        "PROMPT_TUNING", fields={"tokens": "num_virtual_tokens"}, virtual=True, size="num_virtual_tokens",
        known=SHAPE | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
        neutral=VIRTUAL)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.start == "text") != bool(self.text):
            raise UserError("prompt: start \"text\" and text go together; give both, or neither")

    def stored(self, adapter: Any) -> tuple[Config, dict[str, Tensor]]:
        return (replace(self, start="vocabulary", text="") if self.text else self), adapter.tensors()


@dataclass(frozen=True, kw_only=True)
class PTuning(Tables, Config):
    """P-tuning. Trains an MLP that makes the virtual tokens; tokens * width numbers remain."""
    tokens: int = setting(8, "virtual tokens", low=1)
    hidden: int = setting(128, "width of the MLP while it trains; 0: none, as in an adapter that was saved", low=0)

    name: ClassVar[str] = "ptuning"
    edit: ClassVar[type[Edit]] = EncodedPromptEdit
    lr: ClassVar[float] = 1e-3
    targets: ClassVar[tuple[str, ...]] = ("embed",)
    variants: ClassVar[tuple[dict, ...]] = ({"hidden": 0},)
    peft: ClassVar[Peft] = Peft(
        "P_TUNING", fields={"tokens": "num_virtual_tokens"}, virtual=True, size="num_virtual_tokens",
        known=SHAPE | {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"},
        neutral=VIRTUAL, write=lambda adapter, names: {"encoder_hidden_size": 1}, read=lambda config, targets: {"hidden": 0})


@dataclass(frozen=True, kw_only=True)
class Prefix(Tables, Config):
    """Prefix tuning. Trains, or with the MLP leaves behind, tokens * 2 * width of a key numbers a layer."""
    tokens: int = setting(8, "virtual tokens", low=1)
    hidden: int = setting(0, "width of the MLP that makes them while it trains (512 in the paper); 0: none", low=0)

    name: ClassVar[str] = "prefix"
    edit: ClassVar[type[Edit]] = PrefixEdit
    lr: ClassVar[float] = 1e-2
    targets: ClassVar[tuple[str, ...]] = ("key", "value")
    variants: ClassVar[tuple[dict, ...]] = ({"hidden": 8},)
    peft: ClassVar[Peft] = Peft(
        "PREFIX_TUNING", fields={"tokens": "num_virtual_tokens"}, virtual=True, size="num_virtual_tokens",
        known=SHAPE | {"encoder_hidden_size"},        # a saved folder holds what the projection made
        neutral=VIRTUAL | {"prefix_projection": (False, None, True), "init_weights": (None, True, False)})
