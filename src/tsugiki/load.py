"""Models and tokenizers from a folder, the hub, or the embedded base."""
from __future__ import annotations

import logging
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tsugiki.errors import UserError, nearest
from tsugiki.weights import few_bits, keep_exact

EMBEDDED = "embedded"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def base_path(base: str) -> str:
    """The folder of a base model, or the hub id as it is; UserError for a folder that is no model."""
    if base == EMBEDDED:
        folder = Path(str(files("tsugiki") / "assets" / "base"))
        if not (folder / "config.json").is_file():
            raise UserError("base: this installation has no embedded base (assets/base); make it with scripts/pretrain_base.py")
        return str(folder)
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"base: {base} has no config.json, so it is not a transformers model folder")
        return str(path)
    if path.exists():
        raise UserError(f"base: {base} is a file; give the folder of a transformers model")
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise UserError(f"base: no folder {base}{nearest(base, [EMBEDDED])}; give a model folder, a hub id as 'org/name', "
                        "or 'embedded'")
    return base


def device_of(name: str) -> torch.device:
    """`auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":
        raise UserError(f"device: {name!r} is not a device; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device: no CUDA GPU is to be seen here; allowed: auto, cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies it, else float32."""
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"dtype: {name!r} is not one of auto, {', '.join(DTYPES)}{nearest(name, DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    try:
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        fast = False
    return torch.bfloat16 if fast else torch.float32


def load_tokenizer(base: str = EMBEDDED, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The base's own tokenizer; UserError in one line when it cannot be read."""
    path = base_path(base)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as e:
        raise UserError(f"base: the tokenizer of {base} cannot be read: {_first_line(e)}") from None


def load(base: str = EMBEDDED, *, bits: int | None = None, dtype: str | torch.dtype = "auto", device: str = "auto",
         trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A transformers model in evaluation mode and its tokenizer, from a folder, a hub id or "embedded".

    bits: 4 (NF4, its scales in 8 bits) or 8 (int8, a scale a row) store the linears of the layers so, through bitsandbytes;
    embeddings, norms, biases and the head keep `dtype`, which is also what everything is computed in.
    dtype: "auto" (bf16 where the hardware multiplies it), "bf16", "fp32", "fp64", or a torch dtype.
    """
    path, where = base_path(base), device_of(device)
    chosen = dtype if isinstance(dtype, torch.dtype) else compute_dtype(dtype, where)
    few = few_bits_options(bits, chosen, where) if bits else {}
    if chosen == torch.float64:                       # torch's grouped product, which experts are computed with, has none
        few["experts_implementation"] = "eager"
    tokenizer = load_tokenizer(base, trust_remote_code)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=chosen, trust_remote_code=trust_remote_code, **few)
    except Exception as e:
        raise UserError(f"base: {base} cannot be loaded: {_first_line(e)}") from None
    stored = few_bits(model)                          # may be so without `bits`: a base that is on disk in few bits
    if bits and stored != bits:
        why = f"it is stored in {stored} bits" if stored else "none of its linears is of a kind that bitsandbytes replaces"
        raise UserError(f"bits: {base} cannot be loaded in {bits} bits: {why}")
    keep_exact(model)
    return (model if stored else model.to(where)).eval(), tokenizer


def few_bits_options(bits: int, dtype: torch.dtype, device: torch.device) -> dict:
    """from_pretrained's arguments for a base in few bits; UserError where that cannot be."""
    if bits not in (4, 8):
        raise UserError(f"bits: {bits!r} is not one of 4, 8 (leave it out for 16 or 32)")
    if dtype == torch.float64:
        raise UserError(f"bits: {bits} computes in bf16 or fp32, not in fp64")
    for name in ("bitsandbytes", "accelerate"):
        if find_spec(name) is None:
            raise UserError(f"bits: {bits} needs {name}, which is not installed; pip install 'tsugiki[quant]'")
    if (log := logging.getLogger("bitsandbytes")).level == logging.NOTSET:
        log.setLevel(logging.ERROR)                   # it warns at import of a kernel that is not used here
    kind = {"load_in_8bit": True} if bits == 8 else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return {"quantization_config": BitsAndBytesConfig(**kind), "device_map": {"": device}}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to fill padding with. Which one does not matter: padding is never attended to and never a target."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    return next((i for i in ids if i is not None), 0)


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence the model was made for, if it says so."""
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        if isinstance(value := getattr(model.config, name, None), int):
            return value
    return None


def stored_dtype(base: str) -> torch.dtype:
    """The dtype a base's weights have on disk, as its config says; float32 where it does not, or is not to be had."""
    try:
        found = getattr(AutoConfig.from_pretrained(base_path(base)), "dtype", None)
    except (OSError, ValueError):
        return torch.float32
    return found if isinstance(found, torch.dtype) else torch.float32


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
