"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): trained embeddings before the text's own."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..edit import Config, Edit, Start, setting
from ..errors import UserError
from ..formats.spec import VIRTUAL, Peft
from ..sites import Site
from .prompts import SHAPE, VirtualEdit, noise


class PromptEdit(VirtualEdit):
    """Trained embeddings before the text's own."""
    roles, virtual = ("embed",), "sequence"

    def __init__(self, config: Prompt, site: Site, start: Start):
        super().__init__(config, site, start)
        key = f"{site.name}.tokens"
        self.tokens = start.parameter(key, config.tokens, site.d_out, fill=noise)
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
    small_lr: ClassVar[float] = 3.0
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
