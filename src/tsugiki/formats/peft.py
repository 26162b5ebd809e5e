"""Hugging Face PEFT's form on disk, for the methods that declare one: what PEFT writes we read, strictly, and back."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .. import patterns
from ..adapters import Adapter, Adapters
from ..edit import Config
from ..errors import UserError, nearest, shown
from ..methods import METHODS
from ..sites import Site, shortest
from ..tap import Unsaved
from ..weights import transposed
from . import native
from .disk import MANIFEST
from .spec import NOTHING

PREFIX = "base_model.model."
TABLE = "prompt_embeddings"
# Fields that say nothing about what an adapter computes.
FREE = {"auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "peft_type", "runtime_config"}


def writable(adapter: Adapter, cfg: Config) -> bool:
    """Can PEFT address every site of this adapter, as `cfg` stores it?"""
    spec = cfg.peft
    if spec is None or not spec.fits(adapter):
        return False
    if spec.virtual:                                  # PEFT fills the cache, which holds some families' keys repeated
        return not any(s.repeated and s.d_out != adapter.home.sites[0].d_out for s, _ in adapter.edits.values())
    misread = adapter.home.family.peft_means_experts if spec.kind == "LORA" else ()
    return all(s.features is None and not s.span and s.name == s.module and s.role not in misread for s in _named(adapter))


def why_not(adapter: Adapter, cfg: Config) -> str:
    """Why `writable` says no."""
    if cfg.peft is None:
        return f"PEFT has no form for {cfg.name}"
    parts = [s for s, _ in adapter.edits.values() if s.features is not None or s.name != s.module]
    if parts and not cfg.peft.virtual:
        return f"PEFT cannot name {parts[0].name}, a part of {parts[0].module}"
    return f"PEFT's form of {cfg.name} has no place for what this adapter trains on this base"


def differs(cfg: Config, config: dict[str, Any]) -> str | None:
    """A field in which PEFT's config says other than ours, where both say something."""
    both = [(ours, _plain(getattr(cfg, ours)), config.get(theirs)) for ours, theirs in cfg.peft.fields.items()]
    return next((ours for ours, mine, there in both if mine and there and mine != there), None)


def _named(adapter: Adapter) -> list[Site]:
    """The sites whose edits PEFT writes tensors of: those with any."""
    return [s for s, edit in adapter.edits.values() if next(edit.parameters(), None) is not None]


def write(adapter: Adapter, cfg: Config, tensors: dict[str, Tensor],
          base: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config and tensors of an adapter, from what `cfg.stored` gave."""
    spec = cfg.peft
    config = {"peft_type": spec.kind, "task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": base}
    values = {theirs: _plain(getattr(cfg, ours)) for ours, theirs in spec.fields.items()}
    config |= {key: value for key, value in values.items() if value is not None} | dict(spec.constants)   # None: PEFT's default
    found = _named(adapter)

    def names(sites: Iterable[Site]) -> list[str]:
        return _suffixes(adapter.home.model, {spec.path(s) for s in sites})
    if spec.virtual:
        config |= _shape_of(adapter, list(adapter.sites)) | spec.write(adapter, names)
        return config, {TABLE: torch.cat([tensors[f"{s.name}.tokens"] for s in adapter.sites], 1)}   # key 0, value 0, key 1, ...
    if "target_modules" in spec.known:
        config["target_modules"] = names(found)
    if "fan_in_fan_out" in spec.known:
        config["fan_in_fan_out"] = any(transposed(s.exit) for s in found)
    written = {f"{PREFIX}{spec.path(s)}.{theirs}": t.reshape(spec.shapes.get(ours, t.shape))
               for s in found for ours, theirs in spec.tensors.items() if (t := tensors.get(f"{s.name}.{ours}")) is not None}
    written |= {theirs: tensors[f"shared.{ours}"] for ours, theirs in spec.shared.items() if f"shared.{ours}" in tensors}
    return config | spec.write(adapter, names), written


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shape_of(adapter: Adapter, found: list[Site]) -> dict[str, Any]:
    """The fields in which PEFT repeats the model's shape."""
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
        return patterns.fullmatch(targets, name)
    return any(name == t or name.endswith(f".{t}") for t in targets)


def _suffixes(model: nn.Module, modules: set[str]) -> list[str]:
    """The shortest list of suffixes that PEFT matches to exactly these modules; full names if none does."""
    names = _names(model)
    for parts in (1, 2):
        tried = sorted({".".join(m.split(".")[-parts:]) for m in modules})
        if {n for n in names if _matches(tried, n)} == modules:
            return tried
    return sorted(modules)


def read_config(config: dict[str, Any], path: Path, method: str | None = None) -> type[Config]:
    """The method that a config is of; every field is understood or refused. `method`: what a manifest says it is."""
    kind = config.get("peft_type")
    kinds = sorted({cls.peft.kind for cls in METHODS.values() if cls.peft is not None})
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{path}: peft_type: {shown(kind)} is not supported{nearest(kind, kinds)} (supported: {' '.join(kinds)})")
    cls = METHODS.get(method) if method else _method_of(kind, config)
    if cls is None or cls.peft is None or cls.peft.kind != kind:
        raise UserError(f"{path}: peft_type: is {kind}, which the method {method!r} of {MANIFEST} is not written as")
    spec = cls.peft
    for key, value in config.items():
        if key in FREE or key in spec.known or key in spec.fields.values():
            continue
        allowed = (spec.constants[key],) if key in spec.constants else spec.neutral.get(key)
        if allowed is None:
            if value not in (None, False, "") and value != [] and value != {}:
                raise UserError(f"{path}: {key}: not a field of {kind} that is known here{nearest(key, spec.neutral)}")
        elif value in ([], {}) and all(v in allowed for v in NOTHING):
            continue
        elif not any(value is v or (type(value) is type(v) and value == v) for v in allowed):
            raise UserError(f"{path}: {key}: {str(value)[:60]!r} is not supported (supported: {allowed[0]!r})")
    needed = [theirs for ours, theirs in spec.fields.items() if getattr(cls(), ours)]        # PEFT's default may be another
    needed += [spec.size] * bool(spec.size) + ["task_type"] * spec.virtual           # without a task PEFT puts no tokens in
    if missing := [key for key in needed if config.get(key) is None]:
        raise UserError(f"{path}: {missing[0]}: is missing")
    if type(config.get("fan_in_fan_out", False)) is not bool:
        raise UserError(f"{path}: fan_in_fan_out: must be true or false, got {shown(config['fan_in_fan_out'])}")
    return cls


def _method_of(kind: str, config: dict[str, Any]) -> type[Config]:
    """The method that writes its own `peft` of this kind and whose constants the config has; the most special one."""
    mine = [cls for cls in METHODS.values() if cls.peft is not None and cls.peft.kind == kind and "peft" in vars(cls)]
    fits = [c for c in mine if all(config.get(k) == v for k, v in c.peft.constants.items())]
    return max(fits or mine, key=lambda c: len(c.peft.constants))


def values_of(adapters: Adapters, cls: type[Config], config: dict[str, Any], tensors: dict[str, Tensor], path: Path,
              file: Path) -> dict[str, Any]:
    """Our settings, from PEFT's config."""
    spec = cls.peft
    values = {ours: config[theirs] for ours, theirs in spec.fields.items() if theirs in config}

    def targets(wanted: Any) -> tuple[str, ...] | str:
        modules = _targeted(adapters, {"target_modules": wanted}, path)
        return _shortest(adapters, cls, {s.name for s in adapters.sites if s.name == s.module and spec.path(s) in modules})
    if not spec.virtual and "target_modules" in spec.known:
        values["targets"] = targets_of(adapters, cls, config, tensors, path, file)
    try:
        return values | spec.read(config, targets)
    except (TypeError, KeyError, AttributeError, ValueError) as e:
        raise e if isinstance(e, UserError) else UserError(f"{path}: {str(e).splitlines()[0][:200]}") from None


def targets_of(adapters: Adapters, cls: type[Config], config: dict[str, Any], tensors: dict[str, Tensor],
               path: Path, file: Path) -> tuple[str, ...] | str:
    """The sites a PEFT folder names, checked against its tensors, in the shortest form that selects exactly them."""
    modules = _targeted(adapters, config, path)
    roles = {role for part in cls().parts for role in part.edit.roles}
    by_module = {s.module: s for s in adapters.sites if s.name == s.module and s.role in roles}
    for module in sorted(modules):
        if module not in by_module:
            raise UserError(f"{path}: target_modules: matches {module}, which is nothing that {cls.name} can sit on here")
    have = {n.removeprefix(PREFIX).removesuffix(f".{t}") for n in tensors for t in cls.peft.tensors.values()
            if n.startswith(PREFIX) and n.endswith(f".{t}")}
    if missing := sorted(modules - have):
        name = f"{PREFIX}{missing[0]}.{next(iter(cls.peft.tensors.values()))}"
        raise UserError(f"{file}: tensor {name} is missing; target_modules of {path.name} names its module")
    if extra := sorted(have - modules):
        name = next(n for n in sorted(tensors) if n.startswith(f"{PREFIX}{extra[0]}."))
        raise UserError(f"{file}: tensor {name} belongs to a module that target_modules does not name")
    fans = {transposed(by_module[m].exit) for m in modules}
    if "fan_in_fan_out" in cls.peft.known and bool(config.get("fan_in_fan_out")) != (True in fans):
        raise UserError(f"{path}: fan_in_fan_out: is {config.get('fan_in_fan_out')}, the base's weights say {True in fans}")
    return _shortest(adapters, cls, {by_module[m].name for m in modules})


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
    try:
        found = {n for n in names if _matches(targets, n)}
    except UserError as e:
        raise UserError(f"{path}: target_modules: {e}") from None
    lonely = [t for t in targets if not any(_matches([t], n) for n in names)] if isinstance(targets, list) else []
    if lonely or not found:
        raise UserError(f"{path}: target_modules: {shown((lonely or [targets])[0])} matches no module of this model")
    return found


def _shortest(adapters: Adapters, cls: type[Config], names: set[str]) -> tuple[str, ...] | str:
    return shortest(adapters.sites, names, getattr(cls(), "targets", ()))


def read(adapters: Adapters, name: str, cfg: Config, config: dict[str, Any], tensors: dict[str, Tensor], path: Path,
         file: Path) -> Adapter:
    """Add the adapter and fill it from PEFT's tensors; any difference is an error and adds nothing."""
    spec, adapter = cfg.peft, native.add(adapters, name, cfg, tensors, path)
    try:
        if spec.virtual:
            _fill_table(adapter, config, tensors, path, file)
        else:
            mine = adapter.tensors()
            keys = {f"{s.name}.{ours}": f"{PREFIX}{spec.path(s)}.{theirs}" for s in _named(adapter)
                    for ours, theirs in spec.tensors.items() if f"{s.name}.{ours}" in mine}
            tensors = tensors | {theirs: _flat(tensors[theirs], mine[key], shape, theirs, file) for key, theirs in keys.items()
                                 if (shape := spec.shapes.get(key.rpartition(".")[2])) and theirs in tensors}
            keys |= {f"shared.{ours}": theirs for ours, theirs in spec.shared.items() if f"shared.{ours}" in mine}
            native.fill(adapter, keys, tensors, file)
    except BaseException:
        adapters.remove(name)
        raise
    return adapter


def _flat(tensor: Tensor, mine: Tensor, shape: tuple[int, ...], name: str, file: Path) -> Tensor:
    """PEFT's column or row as the vector it is here."""
    if tensor.shape != (expected := mine.reshape(shape).shape):
        raise UserError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")
    return tensor.reshape(mine.shape)


def _fill_table(adapter: Adapter, config: dict[str, Any], tensors: dict[str, Tensor], path: Path, file: Path) -> None:
    widths = [site.d_out for site in adapter.sites]
    extra = sorted(tensors.keys() - {TABLE})
    if extra or TABLE not in tensors:
        raise UserError(f"{file}: tensor {extra[0]} is not expected" if extra else f"{file}: tensor {TABLE} is missing")
    if not writable(adapter, adapter.cfg):
        raise UserError(f"{path}: peft_type: this base's cache repeats its keys, so PEFT's table does not fit its own keys")
    expected = (adapter.cfg.tokens, sum(widths))
    if tensors[TABLE].shape != expected:
        raise UserError(f"{file}: tensor {TABLE} has shape {tuple(tensors[TABLE].shape)}, expected {expected}")
    for key, value in _shape_of(adapter, list(adapter.sites)).items():
        if config.get(key) not in (None, value):
            raise UserError(f"{path}: {key}: is {shown(config[key])}, this base needs {value}")
    for param, part in zip(adapter.parameters().values(), tensors[TABLE].split(widths, 1), strict=True):
        native.assign(param, part)
