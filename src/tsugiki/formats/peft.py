"""Hugging Face PEFT's form on disk, for the methods that declare one: what PEFT writes we read, strictly, and back."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters import Adapter, Adapters
from ..edit import Config
from ..errors import UserError, nearest
from ..methods import METHODS
from ..sites import LINEAR_ROLES, ROLES, Site
from ..tap import Unsaved
from ..weights import transposed
from . import native

PREFIX = "base_model.model."
TABLE = "prompt_embeddings"
FREE = {"auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "peft_type"}   # say nothing
# Every other field of PEFT 0.21's configs, with the values that ask for nothing. Any other value is an error.
NEUTRAL: dict[str, dict[str, tuple]] = {
    "LORA": {
        "task_type": (None, "CAUSAL_LM"), "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal"),
        "megatron_core": ("megatron.core", None), "qalora_group_size": (16, None), "use_dora": (False, None),
        "use_qalora": (False, None), "lora_bias": (False, None), "ensure_weight_tying": (False, None),
        **dict.fromkeys(("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern",
                         "alpha_pattern", "megatron_config", "trainable_token_indices", "loftq_config", "eva_config",
                         "corda_config", "lora_ga_config", "velora_config", "alora_invocation_tokens",
                         "monteclora_config", "layer_replication", "target_parameters", "use_bdlora", "arrow_config",
                         "kasa_config"), (None, False)),
    },
    "PROMPT_TUNING": {
        "task_type": (None, "CAUSAL_LM"), "num_transformer_submodules": (None, 1), "modules_to_save": (None,),
        "prompt_tuning_init": ("RANDOM", "TEXT", "SAMPLE_VOCAB", None), "tokenizer_kwargs": (None,),
    },
    "PREFIX_TUNING": {
        "task_type": (None, "CAUSAL_LM"), "num_transformer_submodules": (None, 1), "modules_to_save": (None,),
        "prefix_projection": (False, None), "init_weights": (None, True, False),
    },
}
DESCRIBED = {"LORA": {"target_modules", "fan_in_fan_out"},     # fields read elsewhere in this file
             "PROMPT_TUNING": {"token_dim", "num_attention_heads", "num_layers", "prompt_tuning_init_text",
                               "tokenizer_name_or_path"},
             "PREFIX_TUNING": {"token_dim", "num_attention_heads", "num_layers", "encoder_hidden_size"}}


def writable(adapter: Adapter) -> bool:
    """Can PEFT address every site of this adapter?"""
    spec = adapter.cfg.peft
    if spec is None or adapter.shared.state_dict():
        return False
    if spec.virtual:                                  # PEFT fills the cache, which holds some families' keys repeated
        return not any(s.repeated and s.d_out != adapter.home.sites[0].d_out for s, _ in adapter.edits.values())
    return all(s.features is None and s.name == s.module for s, _ in adapter.edits.values())


def write(adapter: Adapter, base: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    spec = adapter.cfg.peft
    config = {"peft_type": spec.kind, "task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": base}
    config |= {theirs: getattr(adapter.cfg, ours) for ours, theirs in spec.fields.items()}
    found = [site for site, _ in adapter.edits.values()]
    if spec.virtual:
        tables = [edit.tokens.detach() for _, edit in adapter.edits.values()]      # key 0, value 0, key 1, ...
        return config | _shape_of(adapter, found), {TABLE: torch.cat(tables, 1)}
    modules = {s.module for s in found}
    config |= {"bias": "none", "target_modules": _suffixes(adapter.home.model, modules),
               "fan_in_fan_out": any(transposed(s.exit) for s in found)}
    params = adapter.parameters()
    return config, {f"{PREFIX}{s.module}.{theirs}": params[f"{s.name}.{ours}"].detach()
                    for s in found for ours, theirs in spec.tensors.items()}


def _shape_of(adapter: Adapter, found: list[Site]) -> dict[str, Any]:
    keys = [s for s in adapter.home.sites if s.role == "key"]
    prefix = found[0].role == "key"
    queries = next(s for s in adapter.home.sites if s.role == "o").d_in
    heads = (keys[0].d_out if prefix else queries) // keys[0].head_dim
    return {"num_transformer_submodules": 1, "token_dim": found[0].d_out, "num_attention_heads": heads, "num_layers": len(keys)}


def _names(model: nn.Module) -> dict[str, nn.Module]:
    """The base's modules by path, without what we attached."""
    ours = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, Unsaved))
    return {n: m for n, m in model.named_modules() if n and not f"{n}.".startswith(ours) and not n.endswith(".taps")}


def _matches(targets: str | list[str], name: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == t or name.endswith(f".{t}") for t in targets)


def _suffixes(model: nn.Module, modules: set[str]) -> list[str]:
    """The shortest list of suffixes that PEFT matches to exactly these modules; full names if none does."""
    names = _names(model)
    for parts in (1, 2):
        tried = sorted({".".join(m.split(".")[-parts:]) for m in modules})
        if {n for n in names if _matches(tried, n)} == modules:
            return tried
    return sorted(modules)


def read_config(config: dict[str, Any], path: Path) -> tuple[type[Config], dict[str, Any]]:
    """The method and its fields (without targets); every field of the file is understood or refused."""
    kinds = {cls.peft.kind: cls for cls in METHODS.values() if cls.peft is not None}
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{path}: peft_type: {kind!r} is not supported{nearest(kind, kinds)} (supported: {' '.join(kinds)})")
    spec, neutral = kinds[kind].peft, NEUTRAL[kind]
    for key, value in config.items():
        if key in FREE or key in DESCRIBED[kind] or key in spec.fields.values():
            continue
        if key not in neutral:
            if value not in (None, False, "") and value != [] and value != {}:
                raise UserError(f"{path}: {key}: not a field of {kind} that is known here{nearest(key, neutral)}")
        elif value not in ([], {}) and not any(value is v or (type(value) is type(v) and value == v) for v in neutral[key]):
            raise UserError(f"{path}: {key}: {str(value)[:60]!r} is not supported (supported: {neutral[key][0]!r})")
    values = {ours: config[theirs] for ours, theirs in spec.fields.items() if config.get(theirs) is not None}
    needed = "num_virtual_tokens" if spec.virtual else "r"
    if needed not in config:
        raise UserError(f"{path}: {needed}: is missing")
    return kinds[kind], values


def targets_of(adapters: Adapters, cls: type[Config], config: dict[str, Any], tensors: dict[str, Tensor],
               path: Path, file: Path) -> tuple[str, ...] | str:
    """The sites a PEFT folder names, checked against its tensors, in the shortest form that selects exactly them."""
    modules = _targeted(adapters, config, path)
    by_module = {s.module: s for s in adapters.sites if s.name == s.module and s.role in cls.edit.roles}
    for module in sorted(modules):
        if module not in by_module:
            raise UserError(f"{path}: target_modules: matches {module}, which is not a linear an adapter can sit on here")
    have = {n.removeprefix(PREFIX).removesuffix(f".{t}") for n in tensors for t in cls.peft.tensors.values()
            if n.startswith(PREFIX) and n.endswith(f".{t}")}
    if missing := sorted(modules - have):
        name = f"{PREFIX}{missing[0]}.{next(iter(cls.peft.tensors.values()))}"
        raise UserError(f"{file}: tensor {name} is missing; target_modules of {path.name} names its module")
    if extra := sorted(have - modules):
        raise UserError(f"{file}: tensor {PREFIX}{extra[0]}... belongs to a module that target_modules does not name")
    fans = {transposed(by_module[m].exit) for m in modules}
    if bool(config.get("fan_in_fan_out")) != (True in fans):
        raise UserError(f"{path}: fan_in_fan_out: is {config.get('fan_in_fan_out')}, the base's weights say {True in fans}")
    return _shortest(adapters, {by_module[m].name for m in modules})


def without_copies(adapters: Adapters, tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """PEFT stores the base's own embedding or head beside an adapter of it: equal copies say nothing, others are refused."""
    base, left = adapters.model.state_dict(), {}
    for name, tensor in tensors.items():
        own = base.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
        if own is None:
            left[name] = tensor
        elif own.shape != tensor.shape or not torch.equal(own.to("cpu", tensor.dtype), tensor):
            raise UserError(f"{file}: tensor {name} is not the base's own; trained embeddings or heads are not supported")
    return left


def _targeted(adapters: Adapters, config: dict[str, Any], path: Path) -> set[str]:
    targets, names = config.get("target_modules"), _names(adapters.model)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        head = adapters.model.get_output_embeddings()
        return {n for n, m in names.items() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    if not targets or not (isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(t, str) for t in targets))):
        raise UserError(f"{path}: target_modules: must be a text or a list of texts, got {str(targets)[:60]!r}")
    if isinstance(targets, str) and (len(targets) > 2000 or re.search(r"\([^()]*[+*}][^()]*\)[+*{]", targets)):
        raise UserError(f"{path}: target_modules: {targets[:60]!r} repeats what repeats, which can take forever to match")
    try:
        found = {n for n in names if _matches(targets, n)}
    except re.error as e:
        raise UserError(f"{path}: target_modules: {targets[:60]!r} is not a regular expression: {e}") from None
    lonely = [t for t in targets if not any(_matches([t], n) for n in names)] if isinstance(targets, list) else []
    if lonely or not found:
        raise UserError(f"{path}: target_modules: {(lonely or [targets])[0]!r} matches no module of this model")
    return found


def _shortest(adapters: Adapters, names: set[str]) -> tuple[str, ...] | str:
    whole = {s.name for s in adapters.sites if s.role in LINEAR_ROLES and s.features is None}
    if names == whole:
        return "linear"
    roles = tuple(r for r in ROLES if any(s.role == r and s.name in names for s in adapters.sites))
    if {s.name for s in adapters.sites if s.role in roles} == names:
        return roles
    return "^(" + "|".join(re.escape(n) for n in sorted(names)) + ")$"


def read(adapters: Adapters, name: str, cfg: Config, config: dict[str, Any], tensors: dict[str, Tensor], path: Path,
         file: Path) -> Adapter:
    """Add the adapter and fill it from PEFT's tensors; any difference is an error and adds nothing."""
    adapter = adapters.add(name, cfg)
    try:
        if cfg.peft.virtual:
            _fill_table(adapter, config, tensors, path, file)
        else:
            keys = {f"{s.name}.{ours}": f"{PREFIX}{s.module}.{theirs}"
                    for s, _ in adapter.edits.values() for ours, theirs in cfg.peft.tensors.items()}
            native.fill(adapter, keys, tensors, file)
    except BaseException:
        adapters.remove(name)
        raise
    return adapter


def _fill_table(adapter: Adapter, config: dict[str, Any], tensors: dict[str, Tensor], path: Path, file: Path) -> None:
    widths = [site.d_out for site, _ in adapter.edits.values()]
    extra = sorted(tensors.keys() - {TABLE})
    if extra or TABLE not in tensors:
        raise UserError(f"{file}: tensor {extra[0]} is not expected" if extra else f"{file}: tensor {TABLE} is missing")
    if not writable(adapter):
        raise UserError(f"{path}: peft_type: this base's cache repeats its keys, so PEFT's table does not fit its own keys")
    expected = (adapter.cfg.tokens, sum(widths))
    if tensors[TABLE].shape != expected:
        raise UserError(f"{file}: tensor {TABLE} has shape {tuple(tensors[TABLE].shape)}, expected {expected}")
    for key, value in _shape_of(adapter, [s for s, _ in adapter.edits.values()]).items():
        if config.get(key) not in (None, value):
            raise UserError(f"{path}: {key}: is {config[key]!r}, this base needs {value}")
    for param, part in zip(adapter.parameters().values(), tensors[TABLE].split(widths, 1), strict=True):
        native.assign(param, part)
