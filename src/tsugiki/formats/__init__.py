"""Adapters on disk: PEFT's own files where PEFT has the method, else ours, with a manifest that says what is in them."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .disk import (
    CONFIG,
    MANIFEST,
    TENSORS,
    pack_tensors,
    parse_json,
    read_bytes,
    read_json,
    read_tensors,
    settle,
    tensor_hash,
    to_json,
    write_folder,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters import Adapter, Adapters
    from ..edit import Config

VERSION = 1


def save(adapter: Adapter, path: str | Path, *, stop_ids: Iterable[int] = (), base: str | None = None,
         extra: dict[str, Any] | None = None) -> Path:
    """Write an adapter's folder, whole or not at all; an adapter folder already there is replaced.

    stop_ids: token ids that end an answer; base: where the base came from; extra: any JSON object to keep with it.
    Raises UserError for tensors that are not finite, and for a folder that holds other things.
    """
    from . import native
    folder = Path(path)
    cfg, config, tensors = contents(adapter, base)
    data, packed = to_json(config), pack_tensors(tensors, folder / TENSORS)
    print_, rest = adapter.home.fingerprints()
    manifest = {"tsugiki": VERSION, "method": cfg.name, "settings": native.settings(cfg),
                "base": print_, "base_rest": rest, "stop_ids": sorted(set(map(int, stop_ids))), "extra": extra or {},
                "config": hashlib.sha256(data).hexdigest(), "tensors": {n: tensor_hash(t) for n, t in tensors.items()}}
    manifest["self"] = _self_hash(manifest)
    write_folder(folder, {TENSORS: packed, CONFIG: data, MANIFEST: to_json(manifest)})
    return folder


def contents(adapter: Adapter, base: str | None = None) -> tuple[Config, dict[str, Any], dict[str, Tensor]]:
    """What `save` writes: the method's config, the same as JSON, the tensors. In PEFT's form where PEFT has it, else in ours."""
    from . import native, peft  # they know adapters; adapters know only this module
    cfg, tensors = adapter.cfg.stored(adapter)
    if peft.writable(adapter, cfg):
        return cfg, *peft.write(adapter, cfg, tensors, base)
    return cfg, native.write(cfg), tensors


def load(adapters: Adapters, name: str, path: str | Path, *, check_base: bool = True) -> Adapter:
    """Attach the adapter in a folder. With a manifest everything in it must verify, and it must be this base's
    (check_base=False lifts only that). A PEFT folder without one is read strictly. Raises UserError, and adds nothing.
    """
    from . import native, peft
    folder = Path(path)
    manifest = read_manifest(folder)
    config_path, file = folder / CONFIG, folder / TENSORS
    data = read_bytes(config_path)
    config, tensors = parse_json(data, config_path), read_tensors(file)
    if manifest is not None:
        _verify(manifest, data, tensors, folder)
        if check_base and not _same_base(manifest, adapters, folder):
            raise UserError(f"{folder / MANIFEST}: base: the adapter was made on another base model; load it on that one, "
                            "or pass check_base=False")
    if "peft_type" not in config:
        if manifest is None:
            raise UserError(f"{folder / MANIFEST}: no such file, and {CONFIG} has no peft_type: not an adapter that can be checked")
        return native.read(adapters, name, native.read_config(config, config_path), tensors, file)
    cls = peft.read_config(config, config_path, manifest and manifest["method"])
    tensors = peft.without_copies(adapters, tensors, file)
    # a manifest knows the settings PEFT has no field for
    values = manifest["settings"] if manifest is not None else \
        peft.values_of(adapters, cls, config, tensors, config_path, file)
    return peft.read(adapters, name, native.build(cls.name, values, config_path), config, tensors, config_path, file)


def _same_base(manifest: dict[str, Any], adapters: Adapters, folder: Path) -> bool:
    """By all weights where both sides have them in 16 bits or more, else by those that few bits leave as they are."""
    whole, rest = adapters.fingerprints()
    if whole is not None and manifest.get("base") is not None:
        return manifest["base"] == whole
    if "base_rest" not in manifest:
        raise UserError(f"{folder / MANIFEST}: base_rest: is missing, so this older adapter cannot be checked against a base in "
                        "few bits; load it on the 16-bit base and save it again, or pass check_base=False")
    return manifest["base_rest"] == rest


def read_manifest(path: str | Path) -> dict[str, Any] | None:
    """An adapter folder's manifest (method, settings, base, stop_ids, extra), verified in itself; None if it has none."""
    folder = Path(path)
    settle(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_json(folder / MANIFEST)
    if manifest.get("tsugiki") != VERSION:
        raise UserError(f"{folder / MANIFEST}: tsugiki: version {manifest.get('tsugiki')!r} is not known (known: {VERSION})")
    if manifest.get("self") != _self_hash(manifest):
        raise UserError(f"{folder / MANIFEST}: self: the manifest was changed after it was written")
    return manifest


def _self_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(to_json({k: v for k, v in manifest.items() if k != "self"})).hexdigest()


def _verify(manifest: dict[str, Any], config: bytes, tensors: dict[str, Any], folder: Path) -> None:
    if hashlib.sha256(config).hexdigest() != manifest["config"]:
        raise UserError(f"{folder / CONFIG}: was changed after it was written (its sha256 is not the manifest's)")
    for name in sorted(manifest["tensors"].keys() | tensors.keys()):
        if name not in tensors:
            raise UserError(f"{folder / TENSORS}: tensor {name} is missing")
        if name not in manifest["tensors"]:
            raise UserError(f"{folder / TENSORS}: tensor {name} is not in the manifest")
        if tensor_hash(tensors[name]) != manifest["tensors"][name]:
            raise UserError(f"{folder / TENSORS}: tensor {name} was changed after it was written")
