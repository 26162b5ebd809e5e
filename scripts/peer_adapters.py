"""Writes tests/data/adapters: what AdapterHub's `adapters` computes on two tiny models, for tests/test_adapters_library.py.

That library pins an older transformers than ours, so it cannot be installed beside us. Run this in an environment of its own:

    python -m venv peer && peer/bin/pip install torch adapters && peer/bin/python scripts/peer_adapters.py tests/data/adapters

Every number is drawn from a seeded generator in float64, norms and softmax compute in float64, dropout is off.
"""
from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import (
    AdapterConfig,
    DoubleSeqBnConfig,
    LoReftConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=50, max_position_embeddings=64)
GPT2 = dict(n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=32, vocab_size=50, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0)
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODELS = {"llama": (LlamaForCausalLM, LlamaConfig, LLAMA | SPECIAL), "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2 | SPECIAL)}
NORMS = {"llama": ("input_layernorm", "post_attention_layernorm"), "gpt2": ("ln_1", "ln_2")}

# r: the residual stream a block's norm reads; y: what its attention or MLP gives; f(z) = up(act(down(z))) with biases.
STREAM = "r: the residual stream before the block's norm; y: the output of attention or MLP; f(z) = up(act(down(z))); s: scaling"
SERIES = "r + y + s f(y)"
PARALLEL = "r + y + s f(r): it reads the stream BEFORE the block's norm; with the norms taken out r is also what the MLP reads"
PREFIX = ("keys [K, k] and values [V, v], K after rotary: never rotated; text positions count from 0, not from prefix_length; "
          "control_trans as (prefix_length, 2 layers, heads, head_dim), K of layer n at 2n, V at 2n + 1")
REFT = "layer output h -> h + (W h + b - R h)^T R at the first prefix_positions real tokens of a row; R: orthonormal rows"


def bottleneck(kind: type, reduction_factor: int = 4, **fields: Any) -> AdapterConfig:
    return kind(reduction_factor=reduction_factor, **fields)


def cases() -> dict[str, tuple[AdapterConfig, bool, str]]:
    """name -> (their config, whether the model keeps its norms before attention and MLP, what their code computes)."""
    plain = dict(original_ln_before=False)
    flat = PrefixTuningConfig(flat=True, prefix_length=3)
    par = bottleneck(ParBnConfig, scaling=4.0)
    # tied_weights: else a second, unused unit runs on no positions, in float32 whatever the model is in, and stops the forward
    reft = LoReftConfig(r=2, prefix_positions=3, suffix_positions=0, dropout=0.0, tied_weights=True)
    return {
        "houlsby": (bottleneck(DoubleSeqBnConfig), True, f"after attention and after the MLP: {SERIES}"),
        "houlsby_scaled": (bottleneck(DoubleSeqBnConfig, scaling=0.5, non_linearity="gelu"), True, SERIES),
        "pfeiffer": (bottleneck(SeqBnConfig, **plain), True, SERIES),
        "pfeiffer_default": (bottleneck(SeqBnConfig), True, "original_ln_before=True reads the sum: r + y + s f(r + y)"),
        "pfeiffer_ln_before": (bottleneck(SeqBnConfig, ln_before=True, **plain), True, "r + y + s f(LN(y))"),
        "pfeiffer_ln_after": (bottleneck(SeqBnConfig, ln_after=True, scaling=2.0, **plain), True, "r + y + LN(s f(y))"),
        "pfeiffer_ln_after_sum": (bottleneck(SeqBnConfig, ln_after=True, adapter_residual_before_ln=True, scaling=2.0, **plain),
                                  True, "r + LN(y + s f(y))"),
        "parallel": (par, False, PARALLEL),
        "parallel_normed_model": (par, True, PARALLEL),
        "parallel_attention": (bottleneck(ParBnConfig, mh_adapter=True, output_adapter=False, scaling=4.0), False, PARALLEL),
        "prefix": (flat, True, PREFIX),
        "prefix_mlp": (PrefixTuningConfig(prefix_length=3, bottleneck_size=16), True,
                       f"control_trans = Linear(tanh(Linear(wte))), then as flat: {PREFIX}"),
        "mam": (MAMConfig(flat, par), False, f"both: {PREFIX}; {PARALLEL}"),
        "mam_normed_model": (MAMConfig(flat, par), True, f"both: {PREFIX}; {PARALLEL}"),
        "reft": (reft, True, REFT),
        "reft_padded": (reft, True, REFT),
    }


def compute_in_float64() -> None:
    """transformers rounds to float32 in its softmax and RMSNorm."""
    softmax = nn.functional.softmax

    def exact_softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(input, dim=dim, dtype=None if input.dtype == torch.float64 else dtype)

    def exact_norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight
    nn.functional.softmax = exact_softmax
    LlamaRMSNorm.forward = exact_norm


def draw(tensor: Tensor, key: str, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * std


def build(kind: str, norms: bool) -> nn.Module:
    """The seeded base in eval mode. Without norms, those before attention and MLP let everything through.

    Eager attention: adapters 1.3.0 extends a boolean mask, which sdpa gets, so that its prefix is masked.
    """
    cls, config, fields = MODELS[kind]
    model = cls(config(**fields, attn_implementation="eager")).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1.0 if p.dim() == 1 and name.endswith("weight") else 0.0
            p.copy_(around + draw(p, f"{kind} {name}", 0.1 if p.dim() == 1 else 0.2))
    for layer in () if norms else (model.model.layers if kind == "llama" else model.transformer.h):
        for name in NORMS[kind]:
            setattr(layer, name, nn.Identity())
    return model


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :2] = mask[0, :2] = 0                   # row 0 on the left, row 1 on the right
    padded[1, 5:] = mask[1, 5:] = 0
    return {"ids": ids, "padded": padded, "mask": mask}


def adapted(kind: str, case: str, config: AdapterConfig, norms: bool) -> dict[str, Tensor]:
    """One adapter on a fresh base, filled with noise: its tensors under their names, the input and the logits."""
    model = build(kind, norms)
    base = set(model.state_dict())
    adapters.init(model)
    model.add_adapter("a", config=config)
    model.set_active_adapters("a")
    model.double().eval()
    assert base <= set(model.state_dict()), "the library renamed weights of the base"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in base and "parametrizations" not in name:
                around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                p.copy_(around + draw(p, f"{case} {name}", 0.5 if "control_trans" in name or "wte" in name else 0.1))
        tensors, seen = {}, set()                     # a tensor with several names is kept once
        for name, value in model.state_dict().items():
            if name not in base and "parametrizations" not in name and ".pool." not in name and value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                tensors[name] = value
        for name, module in model.named_modules():    # a projection parametrised as orthonormal: set it, keep it as it is used
            if hasattr(module, "parametrizations"):   # Q of a QR: another QR leaves it as it is, signs included
                module.weight = torch.linalg.qr(draw(module.weight.mT, f"{case} {name}", 1.0)).Q.mT
                tensors[f"{name}.weight"] = module.weight
        given = inputs()
        call = ({"input_ids": given["padded"], "attention_mask": given["mask"]} if case.endswith("padded") else
                {"input_ids": given["ids"]})
        return {f"adapter.{k}": v for k, v in tensors.items()} | call | {"logits": model(**call, use_cache=False).logits}


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path)


@torch.no_grad()
def main(folder: Path) -> None:
    compute_in_float64()
    folder.mkdir(parents=True, exist_ok=True)
    ids = inputs()["ids"]
    listed: dict[str, Any] = {}
    for kind in MODELS:
        model = build(kind, True)
        weights = {f"base.{k}": v for k, v in model.state_dict().items()
                   if k != "lm_head.weight" or not model.config.tie_word_embeddings}
        logits = {"logits": model(ids).logits, "logits_without_norms": build(kind, False)(ids).logits}
        write(folder / f"{kind}.safetensors", weights | {"input_ids": ids} | logits)
        for case, (config, norms, formula) in cases().items():
            found = adapted(kind, case, config, norms)
            effect = float((found["logits"] - logits["logits" if norms else "logits_without_norms"]).abs().max())
            assert effect > 1e-2, f"{case} on {kind} changes logits by {effect} only"
            write(folder / f"{kind}-{case}.safetensors", found)
            listed[f"{kind}-{case}"] = {
                "model": kind, "case": case, "norms": norms, "formula": formula, "effect": round(effect, 3),
                "config": {"class": type(config).__name__} | config.to_dict(),
                "shapes": {k.removeprefix("adapter."): list(v.shape) for k, v in found.items() if k.startswith("adapter.")}}
    about = {"versions": {"adapters": adapters.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
             "symbols": STREAM, "models": {kind: fields for kind, (_, _, fields) in MODELS.items()}}
    lines = [f' {json.dumps(k)}: {json.dumps(v)}' for k, v in listed.items()]      # one line a case
    text = json.dumps(about | {"cases": 0}, indent=1).replace('"cases": 0', '"cases": {\n' + ",\n".join(lines) + "\n }")
    (folder / "cases.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
