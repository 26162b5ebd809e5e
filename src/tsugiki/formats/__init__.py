"""Adapters on disk: PEFT's own files where PEFT has the method, else ours, with a manifest that says what is in them."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, shown
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
FORMS = ("peft", "native")
# What a manifest holds, and of which kinds. Older ones have no base_rest.
FIELDS: dict[str, tuple[type, ...]] = {"tsugiki": (int,), "method": (str,), "settings": (dict,), "base": (str, type(None)),
                                       "stop_ids": (list,), "extra": (dict,), "config": (str,), "tensors": (dict,), "self": (str,)}


def save(adapter: Adapter, path: str | Path, *, stop_ids: Iterable[int] = (), base: str | None = None,
         extra: dict[str, Any] | None = None, form: str | None = None) -> Path:
    """Write an adapter's folder, whole or not at all; an adapter folder already there is replaced.

    stop_ids: token ids that end an answer; base: where the base came from; extra: any JSON object to keep with it; form:
    "peft" or "native" keys and fields, or None: PEFT's where it has the method and can name its sites.
    Raises UserError for a form that it does not have, tensors that are not finite, and a folder that holds other things.
    """
    from . import native
    folder = Path(path)
    cfg, config, tensors = contents(adapter, base, form)
    data, packed = to_json(config), pack_tensors(tensors, folder / TENSORS)
    print_, rest = adapter.home.fingerprints()
    manifest = {"tsugiki": VERSION, "method": cfg.name, "settings": native.settings(cfg),
                "base": print_, "base_rest": rest, "stop_ids": sorted(set(map(int, stop_ids))), "extra": extra or {},
                "config": hashlib.sha256(data).hexdigest(), "tensors": {n: tensor_hash(t) for n, t in tensors.items()}}
    manifest["self"] = _self_hash(manifest)
    write_folder(folder, {TENSORS: packed, CONFIG: data, MANIFEST: to_json(manifest)})
    return folder


def contents(adapter: Adapter, base: str | None = None,
             form: str | None = None) -> tuple[Config, dict[str, Any], dict[str, Tensor]]:
    """What `save` writes: the method's config, the same as JSON, the tensors. In PEFT's form where PEFT has it, else in ours."""
    from . import native, peft  # they know adapters; adapters know only this module
    cfg, tensors = adapter.cfg.stored(adapter)
    if form not in (None, *FORMS):
        raise UserError(f"form {form!r}: allowed: {', '.join(FORMS)}")
    if form != "native" and peft.writable(adapter, cfg):
        return cfg, *peft.write(adapter, cfg, tensors, base)
    if form == "peft":
        raise UserError(f"adapter {adapter.name!r} cannot be written as peft: {peft.why_not(adapter, cfg)}")
    return cfg, native.write(cfg), tensors


def load(adapters: Adapters, name: str, path: str | Path, *, check_base: bool = True) -> Adapter:
    """Attach the adapter in a folder. With a manifest everything in it must verify, and it must be this base's
    (check_base=False lifts only that). A PEFT folder without one is read strictly. Raises UserError, and adds nothing.
    """
    from . import native, peft
    adapters.check_name(name)
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
        cfg = native.read_config(config, config_path)
        if manifest is not None and (manifest["method"], manifest["settings"]) != (cfg.name, native.settings(cfg)):
            raise UserError(f"{folder / MANIFEST}: settings: are not those of {CONFIG}")
        return native.read(adapters, name, cfg, tensors, config_path, file)
    cls = peft.read_config(config, config_path, manifest and manifest["method"])
    tensors = peft.without_copies(adapters, tensors, file)
    # a manifest knows the settings PEFT has no field for
    values = manifest["settings"] if manifest is not None else \
        peft.values_of(adapters, cls, config, tensors, config_path, file)
    cfg = native.build(cls.name, values, config_path)
    if manifest is not None and (wrong := peft.differs(cfg, config)):
        raise UserError(f"{folder / MANIFEST}: settings: {wrong} is not that of {CONFIG}")
    return peft.read(adapters, name, cfg, config, tensors, config_path, file)


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
    if not os.path.lexists(folder / MANIFEST):            # a link that leads nowhere is a damaged manifest, not none
        return None
    manifest = read_json(folder / MANIFEST)
    if manifest.get("tsugiki") != VERSION:
        raise UserError(f"{folder / MANIFEST}: tsugiki: version {shown(manifest.get('tsugiki'))} is not known (known: {VERSION})")
    if manifest.get("self") != _self_hash(manifest):
        raise UserError(f"{folder / MANIFEST}: self: the manifest was changed after it was written")
    for key, kinds in FIELDS.items():
        if type(manifest.get(key, ...)) not in kinds:
            raise UserError(f"{folder / MANIFEST}: {key}: {'is of another kind' if key in manifest else 'is missing'}")
    if any(type(n) is not int for n in manifest["stop_ids"]):
        raise UserError(f"{folder / MANIFEST}: stop_ids: must be whole numbers")
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
