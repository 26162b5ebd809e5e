"""What a run will need, before it starts: trained parameters by the method's own shapes, memory by what training keeps."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tsugiki.adapters import attach
from tsugiki.edit import Config
from tsugiki.errors import UserError
from tsugiki.load import base_path
from tsugiki.methods import Full
from tsugiki.sites import LINEAR_ROLES, sites

# Activations an eager forward keeps for backward, over what its linears read and write; norms, casts, gates and attention
# keep copies of their own. A rule of thumb from published profiles of Llama-3-8B, not yet checked against measured peaks.
KEPT = 2.3


@dataclass(frozen=True)
class Plan:
    """One method on one base. Sizes in bytes; memory is an estimate for `tokens` tokens in one forward."""
    method: str
    total: int
    trainable: int
    weights: int
    optimizer: int
    activations: int
    checkpoint: int

    @property
    def memory(self) -> int:
        return self.weights + self.optimizer + self.activations

    def plain(self) -> dict:
        return {"method": self.method, "total": self.total, "trainable": self.trainable, "share": self.trainable / self.total,
                "memory_bytes": self.memory, "weights_bytes": self.weights, "optimizer_bytes": self.optimizer,
                "activations_bytes": self.activations, "checkpoint_bytes": self.checkpoint}


def skeleton(base: str, trust_remote_code: bool = False) -> nn.Module:
    """The base without weights (meta tensors): its shapes at no cost."""
    try:
        config = AutoConfig.from_pretrained(base_path(base), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as e:
        raise UserError(f"base: {base} cannot be read: {(str(e).splitlines() or [''])[0][:200]}") from None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def lora_parameters(d_in: int, d_out: int, rank: int) -> int:
    """LoRA's own count for one d_out x d_in matrix: B is d_out x r, A is r x d_in (Hu et al. 2021, section 4.1)."""
    return rank * (d_in + d_out)


def plan(base: str, config: Config, *, tokens: int = 4096, width: int = 2, trust_remote_code: bool = False) -> Plan:
    """Count `config` on `base` by building it on meta tensors, so every method counts itself.

    tokens: of one forward (train.max_tokens); width: bytes of a base weight (2 for bf16).
    """
    model = skeleton(base, trust_remote_code)
    total = sum(p.numel() for p in model.parameters())
    vocabulary = model.get_input_embeddings().weight.shape[0]
    read = sum(s.d_in + s.d_out for s in sites(model) if s.role in LINEAR_ROLES and s.features is None)
    if isinstance(config, Full):
        trained = config.select(model)
        trainable, frozen = sum(p.numel() for p in trained.values()), total
        frozen -= trainable
    else:
        trainable, frozen = sum(p.numel() for p in attach(model).add("plan", config).parameters().values()), total
    # float32 master, gradient, two moments; a full run loads all of the base in float32 and keeps 16-bit copies for the products
    full = isinstance(config, Full)
    optimizer = trainable * (16 + (width if full and width < 4 else 0))
    activations = int(tokens * (KEPT * read * width + vocabulary * (width + 4 + 4)))
    return Plan(config.name, total + (0 if full else trainable), trainable, frozen * (max(width, 4) if full else width), optimizer,
                activations, trainable * 12)
