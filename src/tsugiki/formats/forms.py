"""An adapter's folder in its other form: PEFT's keys and fields, or ours, the same tensors bit for bit."""
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ..adapters import Adapter
from ..errors import RunError, UserError
from . import FORMS, load, read_manifest, save
from .disk import CONFIG, read_json


def form_of(folder: str | Path) -> str:
    return "peft" if "peft_type" in read_json(Path(folder) / CONFIG) else "native"


def convert(adapter: Adapter, source: str | Path, out: str | Path, to: str, *, base: str | None = None) -> dict[str, Any]:
    """Write `adapter`, attached from the folder `source`, to `out` in the form `to`, and read it back to the same bits.

    What the source's manifest says of prompts and stop ids is kept; base: where the base came from, for PEFT's field.
    Raises UserError for a form that the method or its sites do not have, RunError if what was written reads otherwise.
    """
    source, out = Path(source), Path(out)
    if to not in FORMS:
        raise UserError(f"form {to!r}: allowed: {', '.join(FORMS)}")
    if form_of(source) == to:
        raise UserError(f"{source}: is in the {to} form already")
    manifest = read_manifest(source) or {}
    notes = {"stop_ids": manifest.get("stop_ids", ()), "extra": manifest.get("extra", {})}
    save(adapter, out, base=base, form=to, **notes)
    _check(adapter, out)
    return {"out": str(out), "form": to, "method": adapter.cfg.name, "sites": len(adapter.edits),
            "parameters": sum(p.numel() for p in adapter.parameters().values())}


def _check(adapter: Adapter, out: Path) -> None:
    """The folder reads back as the adapter it was written from; one that does not is not kept."""
    name = next(n for n in ("read-back", "read-back-2") if n not in adapter.home.names())
    try:
        ours, again = adapter.cfg.stored(adapter)[1], load(adapter.home, name, out).tensors()
        same = ours.keys() == again.keys() and all(torch.equal(p, again[key]) for key, p in ours.items())
        adapter.home.remove(name)
    except UserError as e:
        shutil.rmtree(out)
        raise RunError(f"{out}: what was written does not read back ({e}); it is not kept") from None
    if not same:
        shutil.rmtree(out)
        raise RunError(f"{out}: what was written reads back to other numbers; it is not kept")
