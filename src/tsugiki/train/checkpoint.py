"""Checkpoints: each a new directory, complete or invisible; resume takes the newest that verifies."""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tsugiki.errors import RunError

NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk: `state` is what `save` was given."""
    path: Path
    step: int
    state: dict


def save(root: Path, step: int, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: dict,
         keep: int = 2, best: dict[str, torch.Tensor] | None = None, buffers: dict[str, torch.Tensor] | None = None) -> Path:
    """Write `root/step-00000123/` under a temporary name, fsync, manifest last, rename; then prune to `keep`.

    buffers: tensors that training changes without an optimizer.

    Raises OSError (disk full, read-only) with every earlier checkpoint untouched.
    """
    final, temporary = root / f"step-{step:08d}", root / f".tmp-{step:08d}-{os.getpid()}"
    root.mkdir(parents=True, exist_ok=True)
    clean(root)
    temporary.mkdir()
    try:
        save_file({n: p.detach().contiguous() for n, p in (params | (buffers or {})).items()}, temporary / "params.safetensors")
        save_file(_optimizer_tensors(params, optimizer), temporary / "optimizer.safetensors")
        if best:
            save_file(best, temporary / "best.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(temporary.iterdir())}
        for name in files:
            _fsync(temporary / name)
        (temporary / "MANIFEST.json").write_text(json.dumps({"step": step, "files": files}, indent=1))
        _fsync(temporary / "MANIFEST.json")
        _fsync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _fsync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(root, keep)
    return final


def clean(root: Path) -> None:
    """Take away what a kill inside a save or a pruning left."""
    for leftover in root.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, counting only those that verify."""
    good = 0
    for path in _newest_first(root):
        if good >= keep:
            doomed = path.with_name(f".tmp-old-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        elif verify(path) is None:
            good += 1


def newest(root: Path, say=lambda line: None) -> Checkpoint | None:
    """The newest checkpoint that verifies; says in one line which newer ones were passed over."""
    for path in _newest_first(root):
        fault = verify(path)
        if fault is None:
            step = int(NAME.fullmatch(path.name)[1])
            return Checkpoint(path, step, json.loads((path / "state.json").read_text()))
        say(f"skipped checkpoint {path.name}: {fault}")
    return None


def verify(path: Path) -> str | None:
    """None when every file has the manifest's size and hash, else what is wrong."""
    try:
        manifest = json.loads((path / "MANIFEST.json").read_text())
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "MANIFEST.json is missing or damaged"
    return None


@dataclass(frozen=True)
class Held:
    """The tensors of a checkpoint, or of one job in it: what training changes, the optimizer's moments, the best so far."""
    where: Path
    tensors: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]

    def take(self, prefix: str) -> Held:
        """Those whose names begin so, without it; they are gone from here."""
        parts = ({n.removeprefix(prefix): some.pop(n) for n in list(some) if n.startswith(prefix)}
                 for some in (self.tensors, self.moments, self.best))
        return Held(self.where, *parts)


def read(checkpoint: Checkpoint) -> Held:
    best = checkpoint.path / "best.safetensors"
    return Held(checkpoint.path, load_file(checkpoint.path / "params.safetensors"),
                load_file(checkpoint.path / "optimizer.safetensors"), load_file(best) if best.exists() else {})


def restore(held: Held, params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer,
            buffers: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Put the saved bits back into params, buffers and optimizer; returns the best tensors so far ({} if none)."""
    tensors = params | (buffers or {})
    if held.tensors.keys() != tensors.keys():
        raise RunError(f"{held.where}: holds other tensors than this run trains; delete it or choose another --out")
    with torch.no_grad():
        for name, p in tensors.items():
            p.copy_(held.tensors[name])
    for name, p in params.items():
        if f"{name}:step" in held.moments:              # of a job that has not taken a step there are none
            entry = {k: held.moments[f"{name}:{k}"] for k in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {k: v if k == "step" and not p.is_cuda else v.to(p.device) for k, v in entry.items()}
    return held.best


def _optimizer_tensors(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {f"{name}:{key}": value.detach().contiguous() for name, p in params.items()
            for key, value in optimizer.state.get(p, {}).items()}


def _newest_first(root: Path) -> Sequence[Path]:
    found = [p for p in root.glob("step-*") if NAME.fullmatch(p.name)] if root.is_dir() else []
    return sorted(found, reverse=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
