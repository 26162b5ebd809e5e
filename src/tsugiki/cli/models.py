"""What generate, chat, eval and merge share: a base with adapters, and how each adapter's prompts are rendered."""
from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from tsugiki.errors import UserError


@dataclass(frozen=True)
class Loaded:
    """A base, its tokenizer, the attached adapters, and what each adapter's folder says of prompts ({} for the base)."""
    model: object
    tokenizer: object
    adapters: object
    notes: dict[str, dict]

    def renderer(self, adapter: str | None):
        from tsugiki.data import Renderer
        note = self.notes.get(adapter, {})
        return Renderer(self.tokenizer, template=note.get("template"), stop=note.get("stop"))

    def kind(self, adapter: str | None, asked: str = "auto") -> str:
        """Whether a prompt is rendered by the chat template or taken as it is: as the adapter was trained."""
        if asked != "auto":
            return asked
        trained = self.notes.get(adapter, {}).get("kind")
        if trained:
            return "chat" if trained == "chat" else "plain"
        return "chat" if self.tokenizer.chat_template else "plain"

    def conversation(self, text: str, adapter: str | None, asked: str = "auto", system: str | None = None, history=()):
        """The conversation whose last answer is to be written."""
        from tsugiki.data import Conversation, Message
        kind = self.kind(adapter, asked)
        if kind == "plain":
            return Conversation("plain", (Message("user", text), Message("assistant", "")), "prompt")
        first = (Message("system", system),) if system else ()
        return Conversation("chat", (*first, *history, Message("user", text), Message("assistant", "")), "prompt")

    def stop_ids(self, adapter: str | None) -> list[int]:
        return sorted({*self.renderer(adapter).stop_ids, *self.notes.get(adapter, {}).get("stop_ids", ())})


def adapter_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR",
                   help="an adapter folder, ours or Hugging Face PEFT's; may be given again")


def folders(given: list[str]) -> dict[str, str]:
    """Name -> folder of every --adapter (default: the folder's name)."""
    wanted: dict[str, str] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not sign or Path(text).is_dir():            # a folder's name may hold a "="
            name, folder = name_of(Path(text)), text
        if not (Path(folder) / "adapter_config.json").is_file():
            hint = "; that is a whole model: give it as --base" if (Path(folder) / "config.json").is_file() else ""
            if (Path(folder) / "adapter" / "adapter_config.json").is_file():
                hint = f"; did you mean {Path(folder) / 'adapter'}?"
            raise UserError(f"--adapter {folder}: no adapter_config.json there{hint}")
        if name in wanted:
            raise UserError(f"--adapter {text}: the name {name!r} is given twice; use NAME=DIR")
        wanted[name] = folder
    return wanted


def name_of(path: Path) -> str:
    """An adapter's name from its folder: of runs/math/adapter it is math."""
    name = path.resolve().parent.name if path.name == "adapter" else path.resolve().name
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name).lstrip(".-") or "adapter"


def load_base(args: argparse.Namespace, dtype: str | None = None):
    """(model, tokenizer) of --base with the flags of `common`."""
    from tsugiki.load import EMBEDDED, load
    return load(args.base or EMBEDDED, bits=getattr(args, "bits", None) or None, dtype=dtype or args.dtype or "auto",
                device=args.device or "auto", trust_remote_code=args.trust_remote_code)


def load_with_adapters(args: argparse.Namespace, dtype: str | None = None) -> Loaded:
    """The base of --base with every --adapter attached under its name."""
    from tsugiki import formats
    from tsugiki.adapters import attach
    wanted = folders(args.adapter)
    model, tokenizer = load_base(args, dtype)
    adapters, notes = attach(model), {}
    for name, folder in wanted.items():
        formats.load(adapters, name, folder)
        manifest = formats.read_manifest(folder) or {}
        notes[name] = manifest.get("extra", {}) | {"stop_ids": manifest.get("stop_ids", [])}
    return Loaded(model, tokenizer, adapters, notes)
