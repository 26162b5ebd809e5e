"""What a method declares about its form on disk. Data only: formats.peft reads and writes it."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

NOTHING = (None, False)
# Fields that PEFT's configs of tuned modules share, with the values that ask for nothing.
TUNER: dict[str, tuple] = {"task_type": (None, "CAUSAL_LM")} | dict.fromkeys(
    ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "trainable_token_indices"), (None, []))
# The same of its virtual tokens.
VIRTUAL: dict[str, tuple] = {"task_type": ("CAUSAL_LM",), "num_transformer_submodules": (None, 1), "modules_to_save": (None,)}


def only_linear(adapter: Any) -> bool:
    """PEFT has some methods for nn.Linear, and not for GPT-2's Conv1D."""
    return all(isinstance(site.exit, nn.Linear) for site in adapter.sites)


@dataclass(frozen=True)
class Peft:
    """How Hugging Face PEFT writes a method. Every field of PEFT's config must be named by one of these, or is refused."""
    kind: str                                         # peft_type
    fields: Mapping[str, str] = field(default_factory=dict)    # our config field -> PEFT's
    tensors: Mapping[str, str] = field(default_factory=dict)   # our parameter or buffer -> PEFT's name after the module's path
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)      # our vector -> how PEFT lays it: (-1, 1), (1, -1)
    virtual: bool = False                             # one "prompt_embeddings" table, the edits' `tokens` side by side
    constants: Mapping[str, Any] = field(default_factory=dict)   # fields that tell this method from others of its kind
    neutral: Mapping[str, tuple] = field(default_factory=dict)   # other fields -> the values that change nothing
    known: frozenset[str] = frozenset()               # fields that `read` understands, or that say nothing here
    size: str = "r"                                   # a field that must be there
    shared: Mapping[str, str] = field(default_factory=dict)      # key of a shared tensor -> its whole name in the file
    path: Callable[[Any], str] = lambda site: site.module        # a site -> the path its tensors are named by
    # (adapter, names) -> more fields; names(sites) -> the shortest list of suffixes that name exactly these sites' modules
    write: Callable[[Any, Callable], dict[str, Any]] = lambda adapter, names: {}
    # (PEFT's config, targets) -> our fields; targets(PEFT's list of modules) -> our `targets`. Raises ValueError on a bad one.
    read: Callable[[dict[str, Any], Callable], dict[str, Any]] = lambda config, targets: {}
    fits: Callable[[Any], bool] = lambda adapter: True           # whether PEFT has this very form of the method
