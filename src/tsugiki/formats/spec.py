"""What a method declares about its form on disk. Data only: formats.peft reads and writes it."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Peft:
    """How Hugging Face PEFT writes a method."""
    kind: str                                         # peft_type
    fields: Mapping[str, str] = field(default_factory=dict)    # our config field -> PEFT's
    tensors: Mapping[str, str] = field(default_factory=dict)   # our parameter -> PEFT's name after the module's path
    virtual: bool = False                             # one "prompt_embeddings" table, the edits' `tokens` side by side
