"""Tiny random models of every family, every method at a small size, and adapters with an effect: what the tests run on."""
from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tsugiki.adapters import Adapter, Adapters, attach
from tsugiki.edit import Config
from tsugiki.methods import METHODS
from tsugiki.sites import FAMILIES

transformers.logging.set_verbosity_error()

VOCAB = 200
PLAIN = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
GQA = PLAIN | dict(num_key_value_heads=2)
MOE = GQA | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=256)
SPECS: dict[str, dict[str, Any]] = {
    "llama": GQA, "mistral": GQA, "qwen2": GQA, "olmo2": GQA, "phi3": GQA, "phi": PLAIN,
    "mixtral": MOE | dict(num_local_experts=4), "qwen2_moe": MOE | dict(shared_expert_intermediate_size=64),
    "qwen3_moe": MOE | dict(head_dim=32, mlp_only_layers=[0]), "olmoe": MOE,
    "qwen3": GQA | dict(head_dim=32), "gemma": GQA | dict(num_key_value_heads=1, head_dim=16),
    "gemma2": GQA | dict(head_dim=16), "gemma3_text": GQA | dict(head_dim=16),
    "gpt2": GPT2, "gptj": GPT2 | dict(rotary_dim=8), "gpt_neox": PLAIN, "bloom": dict(hidden_size=64, n_layer=2, n_head=4),
    "opt": dict(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
                word_embed_proj_dim=64),
    "falcon": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=True),
}
FALCONS = {
    "multi_query": dict(multi_query=True, new_decoder_architecture=False),
    "new_decoder": dict(new_decoder_architecture=True, num_kv_heads=2),
    "per_head_alibi": dict(multi_query=False, new_decoder_architecture=False, parallel_attn=False, alibi=True, bias=True),
}
assert SPECS.keys() == FAMILIES.keys(), "a family without a tiny model is a family without tests"
EXACT = 1e-12
LOOSER = {"gptj": 1e-6}                               # transformers computes GPT-J's attention scores in float32
SMALL = {"rank": 4, "tokens": 3, "size": 8, "hidden": 0}           # fields that give a method its size


def small(cls: type[Config], **values: Any) -> Config:
    """A method's config at a small size."""
    return cls(**{f.name: SMALL[f.name] for f in dataclasses.fields(cls) if f.name in SMALL} | values)


def cases(cls: type[Config]) -> dict[str, Config]:
    """A method at a small size, and each other way through its code that it declares."""
    found = {cls.name: small(cls)}
    for values in cls.variants:
        found[".".join([cls.name, *(f"{k}-{v}" for k, v in values.items() if not isinstance(v, dict))])] = small(cls, **values)
    return found


# While writing a method: TSUGIKI_METHODS="mine other" leaves out the rest, but for two that stand beside it.
ONLY = {*os.environ["TSUGIKI_METHODS"].split(), "lora", "bitfit"} if "TSUGIKI_METHODS" in os.environ else METHODS.keys()
METHOD_CASES: dict[str, Config] = {name: cfg for cls in METHODS.values() if cls.name in ONLY
                                   for name, cfg in cases(cls).items() if cfg.parts}


_softmax = torch.nn.functional.softmax


def _exact_softmax(input, dim=None, _stacklevel=3, dtype=None):
    """transformers' eager attention rounds to float32 in its softmax; in these tests float64 stays float64."""
    return _softmax(input, dim=dim, dtype=None if input.dtype == torch.float64 else dtype)


torch.nn.functional.softmax = _exact_softmax


def tiny(model_type: str, dtype: torch.dtype = torch.float32, attn: str | None = None, **overrides: Any) -> nn.Module:
    """A seeded random model in eval mode, without dropout; in float64 its norms and softmax compute in float64 too."""
    torch.manual_seed(0)
    spec = SPECS[model_type] | dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2) | overrides
    config = AutoConfig.for_model(model_type, **spec)
    for key, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).to(dtype).eval()
    with torch.no_grad():                             # biases and norms that start at 0 or 1 would hide mistakes
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.1)
            elif not p.count_nonzero():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.02)
    return exact(model) if dtype == torch.float64 else model


def exact(model: nn.Module) -> nn.Module:
    """Norms that compute in the model's own precision, and experts in float64: torch's grouped product has none."""
    model.set_experts_implementation("eager")
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and not type(module).__name__.startswith("Exact"):
            module.__class__ = _exact(type(module))
    return model


@functools.cache                                      # one class a norm: layers must share their compiled code
def _exact(norm: type) -> type:
    """transformers' RMSNorms round to float32 inside; these do not."""
    gemma = "Gemma" in norm.__name__

    def forward(self, x):
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + self.weight if gemma else self.weight)
    return type("Exact" + norm.__name__, (norm,), {"forward": forward})


def fill(adapter: Adapter, seed: int = 0, scale: float = 0.1) -> Adapter:
    """Add noise to an adapter's parameters, so that it has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters().values():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) * scale)
    return adapter


def fit(adapters: Adapters, cfg: Config) -> Config:
    """The case, where this base has it: of the roles it names those that are there, or every linear if none is."""
    roles, targets = {s.role for s in adapters.sites}, getattr(cfg, "targets", "linear")
    if isinstance(targets, str) or "targets" not in {f.name for f in dataclasses.fields(cfg)} or roles >= set(targets):
        return cfg
    return dataclasses.replace(cfg, targets=tuple(r for r in targets if r in roles) or "linear")


def attached(model: nn.Module, *names: str, scale: float = 0.1):
    """`attach` with one filled adapter a method, named after it (all of METHOD_CASES unless some are named)."""
    adapters = attach(model)
    for i, name in enumerate(names or METHOD_CASES):
        fill(adapters.add(name, fit(adapters, METHOD_CASES[name])), seed=i + 1, scale=scale)
    return adapters


def ids(rows: int, length: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
