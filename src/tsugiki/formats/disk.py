"""The one door to disk for adapters: safetensors and JSON in, whole folders out, or nothing."""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..errors import UserError, shown

TENSORS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "MANIFEST.json"
OURS = {TENSORS, CONFIG, MANIFEST, "README.md"}       # what a folder may hold and still be replaced by a save
MAX_DEPTH, LONGEST_NAME = 64, 300                     # of JSON; of a key or a tensor's name, which messages repeat
MAX_JSON = 16 << 20                                   # bytes; an adapter's config is a few hundred


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no key twice, no NaN, no nesting bombs. Raises UserError naming the file."""
    return parse_json(read_bytes(path), path)


def read_bytes(path: Path, limit: int = MAX_JSON) -> bytes:
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if os.path.lexists(path) else 'no such file'}")
    try:
        if path.stat().st_size > limit:
            raise UserError(f"{path}: larger than {limit >> 20} MB")
        return path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {shown(key)} is there twice")
            if not key.isprintable() or len(key) > LONGEST_NAME:         # it could not stand in a one-line message
                raise ValueError(f"the key {shown(key)} is no name")
            found[key] = value
        return found

    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
        _check_values(value)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not a JSON file: {str(e).splitlines()[0][:200]}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def _check_values(value: Any) -> None:
    """What JSON lets pass and this could not write again."""
    left = [(value, 0)]
    while left:
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ValueError("is nested too deeply")
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError("holds half of a surrogate pair")
        if isinstance(value, (dict, list)):
            left += [(v, depth + 1) for v in (value.values() if isinstance(value, dict) else value)]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, finite and floating. Raises UserError naming the file and tensor."""
    if not path.is_file():
        pickled = [p.name for p in path.parent.glob("*.bin")] + [p.name for p in path.parent.glob("*.pt")]
        hint = f" ({pickled[0]} is a pickle, which can run code: convert it to safetensors)" if pickled else ""
        raise UserError(f"{path}: {'is not a file' if os.path.lexists(path) else 'no such file'}{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, ArithmeticError, OSError) as e:
        raise UserError(f"{path}: not a whole safetensors file: {(str(e).splitlines() or [type(e).__name__])[0][:200]}") from None
    if not tensors:
        raise UserError(f"{path}: holds no tensor")
    for name, tensor in tensors.items():
        if not name.isprintable() or not 0 < len(name) <= LONGEST_NAME:
            raise UserError(f"{path}: tensor {shown(name)}: is no name of a tensor")
        if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"{path}: tensor {name} is {str(tensor.dtype)[6:]}, not a floating-point tensor")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: tensor {name} holds NaN or infinity")
    return tensors


def tensor_hash(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)} ".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def pack_tensors(tensors: Mapping[str, Tensor], path: Path) -> bytes:
    """A safetensors file's bytes; refuses what a reader would have to refuse."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0 or not tensor.isfinite().all():
            raise UserError(f"{path}: tensor {name} is empty or not finite; nothing was saved")
        found[name] = tensor.detach().cpu().contiguous().clone()
    return save(found, metadata={"format": "pt"})


def settle(folder: Path) -> None:
    """Finish what an interrupted save left: the old folder is back if the new one never arrived."""
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder whole: under a temporary name beside it, fsynced, then renamed over the old one."""
    settle(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the name of a folder")
    strangers = sorted({p.name for p in folder.iterdir()} - OURS) if folder.exists() else []
    if strangers:
        raise UserError(f"{folder}: holds {strangers[0]!r}, so it is not only an adapter; save to a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)        # left by a save that was killed
        new.mkdir()
        for name, data in files.items():
            with open(new / name, "xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        _sync(new)
        if folder.exists():
            folder.rename(folder.with_name(f".{folder.name}.old"))
        new.rename(folder)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written: {e.strerror or e}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    settle(folder)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
