"""Our own form of an adapter, for the methods and sites that PEFT cannot write: the same two files in our keys."""
from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter, Adapters
from ..edit import Config
from ..errors import UserError, shown
from ..methods import make

VERSION = 1


def settings(cfg: Config) -> dict[str, Any]:
    """A config's fields as JSON has them."""
    values = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def write(cfg: Config) -> dict[str, Any]:
    return {"tsugiki": VERSION, "method": cfg.name, "settings": settings(cfg)}


def read_config(config: dict[str, Any], path: Path) -> Config:
    if config.get("tsugiki") != VERSION:
        raise UserError(f"{path}: tsugiki: format {shown(config.get('tsugiki'))} is not known (known: {VERSION})")
    unknown = sorted(config.keys() - {"tsugiki", "method", "settings"})
    if unknown or not isinstance(config.get("settings"), dict) or not isinstance(config.get("method"), str):
        raise UserError(f"{path}: {unknown[0] if unknown else 'method'}: must hold tsugiki, method and settings, nothing else")
    return build(config["method"], config["settings"], path)


def build(method: str, values: dict[str, Any], path: Path) -> Config:
    try:
        return make(method, **values)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def add(adapters: Adapters, name: str, cfg: Config, tensors: dict[str, Tensor], path: Path) -> Adapter:
    """Add the adapter that a file's config asks for, unless it would be much larger than the file's tensors."""
    fixed = max(p.numel() for p in adapters.model.parameters())          # room for what a method keeps and does not store
    try:
        return adapters.add(name, cfg, room=2 * sum(t.numel() for t in tensors.values()) + fixed)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def read(adapters: Adapters, name: str, cfg: Config, tensors: dict[str, Tensor], config_path: Path, path: Path) -> Adapter:
    """Add the adapter and fill every tensor; a missing, extra or misshapen tensor is an error and adds nothing."""
    adapter = add(adapters, name, cfg, tensors, config_path)
    try:
        fill(adapter, {key: key for key in adapter.tensors()}, tensors, path)
    except BaseException:
        adapters.remove(name)
        raise
    return adapter


def fill(adapter: Adapter, keys: dict[str, str], tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors into parameters and buffers; keys: our tensor -> its name in the file. All or nothing."""
    params = adapter.parameters() | adapter.buffers()
    for theirs in keys.values():
        if theirs not in tensors:
            raise UserError(f"{path}: tensor {theirs} is missing")
    for theirs in tensors:
        if theirs not in keys.values():
            raise UserError(f"{path}: tensor {theirs} belongs to no site of this adapter")
    for ours, theirs in keys.items():
        if tensors[theirs].shape != params[ours].shape:
            raise UserError(f"{path}: tensor {theirs} has shape {tuple(tensors[theirs].shape)}, "
                            f"expected {tuple(params[ours].shape)}")
    for ours, theirs in keys.items():
        assign(params[ours], tensors[theirs])


def assign(param: Tensor, value: Tensor) -> None:
    """A tensor takes a file's numbers exactly: it widens to the file's dtype if that is wider."""
    wide = torch.promote_types(param.dtype, value.dtype)
    param.data = value.detach().to(param.device, wide).clone()
