"""What a run reads: its rows, checked and split, what is mixed in, and what it is scored on."""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tsugiki.config import RunConfig
from tsugiki.data import Columns, Conversation, duplicates, load_conversations, split
from tsugiki.data.batch import stream_key
from tsugiki.data.stream import Files
from tsugiki.errors import UserError
from tsugiki.evaluate.tasks import Task
from tsugiki.train import scoring
from tsugiki.train.sources import Sources, digest, read_sources, said, streams


@dataclass(frozen=True)
class Rows:
    """The conversations of a run: what is trained on and what is held out. Large files are named, not read (Files)."""
    train: list[Conversation] | Files
    held_out: list[Conversation]
    fingerprint: str
    template: str | None = None                       # text of data.template
    sources: Sources = Sources()                      # what is mixed in, and held-out text of it
    task: Task | None = None                          # what is scored beside or instead of held-out rows

    @property
    def kind(self) -> str:
        """Of the first row."""
        return next(iter(self.train)).kind


def columns_of(cfg: RunConfig) -> Columns | None:
    """The table templates of data.prompt and data.completion; UserError when only one is given."""
    data = cfg.data
    if not data.prompt and not data.completion:
        return None
    if not (data.prompt and data.completion):
        raise UserError(f"data.{'completion' if data.prompt else 'prompt'}: missing; data.prompt and data.completion go together")
    return Columns(prompt=data.prompt, completion=data.completion, labels=data.labels or None)


def read_rows(cfg: RunConfig, say: Callable[[str], None]) -> Rows:
    """Read, check and split the data of a run; says how many rows, and what stands on both sides of the split."""
    if not cfg.data.files:
        raise UserError("data.files: no training data; give --data FILE")
    columns, data, template = columns_of(cfg), cfg.data, _template(cfg.data.template)
    large = streams(data)
    rows = Files(tuple(data.files), data.format, columns) if large else load_conversations(data.files, data.format, columns)
    if data.max_rows and data.max_rows < len(rows):
        generator = torch.Generator().manual_seed(stream_key(cfg.train.seed, "max_rows"))
        rows = [rows[i] for i in sorted(torch.randperm(len(rows), generator=generator)[:data.max_rows].tolist())]
    if data.eval:
        train, held = rows, load_conversations(data.eval, data.format, columns)
    elif data.holdout:
        train, held = split(rows, data.holdout, cfg.train.seed)
    else:
        train, held = rows, []
    count = f"{', '.join(data.files)} read as it is needed" if large else f"{len(train):,} rows to train on"
    say(count + (f", {len(held):,} held out" if held else ", none held out"))
    sources = read_sources(cfg, say)
    if held and (both := duplicates(train, held)):
        say(f"the held-out score is too good: {both}")
    task = scoring.task_of(cfg, train, say)
    asked = [f"{i.conversation.messages}{i.gold}{i.options}" for i in (task.items if task else ())]
    shown = [digest(train)] if large else list(map(said, train))
    text = "\0".join([*shown, *map(said, held), *filter(None, (template, sources.digest())), *asked])
    count = len(shown)
    fingerprint = hashlib.sha256(f"{count}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()
    return Rows(train, held, fingerprint, template, sources, task)


def _template(path: str | None) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8") if path else None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"data.template: {path}: {getattr(e, 'strerror', None) or 'is not UTF-8 text'}") from None
