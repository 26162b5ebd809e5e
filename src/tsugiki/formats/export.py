"""Whole models on disk: plain transformers folders, written whole or not at all, and checked by loading them again."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ..adapters import Adapters
from ..errors import RunError, UserError
from ..load import max_positions


def export_model(model: nn.Module, tokenizer, folder: str | Path, *, dtype: torch.dtype, stop_ids: Iterable[int] = (),
                 template: str | None = None) -> Path:
    """Write model and tokenizer in `dtype`, replacing a model folder that is there. The model itself keeps its dtype.

    stop_ids, template: what ends an answer, and the chat template it was trained with, for whoever serves the folder.
    Raises UserError when the folder holds something else, OSError when the disk is full, with nothing half written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there and is no model folder; choose another")
    temporary = folder.with_name(f".{folder.name}.new")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.rmtree(temporary, ignore_errors=True)   # left by a save that was killed
        model.save_pretrained(temporary, state_dict=_state(model, dtype))
        _set(temporary / "config.json", "dtype", str(dtype).removeprefix("torch."))
        if stop_ids := sorted(set(stop_ids)):
            _set(temporary / "generation_config.json", "eos_token_id", stop_ids)
        if tokenizer is not None:
            tokenizer = copy(tokenizer)
            tokenizer.chat_template = template or tokenizer.chat_template
            tokenizer.save_pretrained(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _state(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The model's tensors in `dtype`; what is one tensor under two names (a tied head) stays one, so it is stored once."""
    made: dict[tuple, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in made:
            made[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        state[name] = made[key]
    return state


def _set(path: Path, key: str, value) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(values | {key: value}, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def merge_to_folder(model: nn.Module, tokenizer, adapters: Adapters, names: Sequence[str], folder: str | Path, *,
                    dtype: torch.dtype, limit: float = 0.1, stop_ids: Iterable[int] = (),
                    template: str | None = None) -> dict:
    """Merge `names` into a plain transformers folder in `dtype`, and check it: logits of the folder, loaded again, against the
    unmerged model's, on random tokens. `model` must be in float32 (or wider), so that only the weights' rounding differs.

    Returns max_error (of a logit), relative_error = ||merged - unmerged|| / ||unmerged - base|| over logits, weight_error
    (the same over weights). Raises RunError, and keeps no folder, when relative_error is above `limit`.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; choose another --out")
    probe = _probe(model)
    with adapters.use(None):
        base = model(input_ids=probe, use_cache=False).logits
    with adapters.use(tuple(names)):
        unmerged = model(input_ids=probe, use_cache=False).logits
    merged = []
    try:
        for name in names:
            report = adapters.merge(name)
            merged.append(name)
            if report.undeclared:
                raise UserError(f"adapter {name!r} gives {report.undeclared[0]} a bias, which a {type(model).__name__} folder "
                                "cannot hold, so it cannot be exported; use the adapter as it is")
        weight_error = _rounding(adapters, dtype)
        export_model(model, tokenizer, folder, dtype=dtype, stop_ids=stop_ids, template=template)
    finally:
        for name in reversed(merged):
            adapters.unmerge(name)
    try:
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=next(model.parameters()).dtype).to(probe.device).eval()
        found = again(input_ids=probe, use_cache=False).logits
    except BaseException:
        shutil.rmtree(folder)
        raise
    effect, error = float((unmerged - base).norm()), float((found - unmerged).norm())
    relative = error / effect if effect else error
    if not relative <= limit:
        shutil.rmtree(folder)
        raise RunError(f"merge: in {str(dtype)[6:]} the folder differs from the unmerged model by {relative:.1%} of the "
                       f"adapter's effect (limit {limit:.0%}), nothing was kept; try --dtype fp32, or raise --limit")
    return {"out": str(folder), "adapters": list(names), "dtype": str(dtype).removeprefix("torch."), "relative_error": relative,
            "max_error": float((found - unmerged).abs().max()), "weight_error": weight_error}


def _probe(model: nn.Module) -> torch.Tensor:
    """(4, 32) random token ids, the same every time; fewer columns for a model of fewer positions."""
    vocabulary, length = model.get_input_embeddings().weight.shape[0], min(32, max_positions(model) or 32)
    ids = torch.randint(0, vocabulary, (4, length), generator=torch.Generator().manual_seed(0))
    return ids.to(model.get_input_embeddings().weight.device)


def _rounding(adapters: Adapters, dtype: torch.dtype) -> float:
    """||round(W) - W|| / ||W - W0|| over every weight a merge changed, W0 being what it was before."""
    lost = change = 0.0
    for module, kept in adapters.originals():
        now, before = module.weight.double(), kept.double()
        lost += float((now.to(dtype).double() - now).square().sum())
        change += float((now - before).square().sum())
    return (lost / change) ** 0.5 if change else 0.0
