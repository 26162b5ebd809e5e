"""Held-out rows: a split that is a function of (number of rows, seed), and what the two sides have in common."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tsugiki.data.conversation import Conversation
from tsugiki.errors import UserError


def split(conversations: Sequence[Conversation], fraction: float,
          seed: int = 0) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out), both in the order of the file, drawn by a keyed permutation, never a global generator.

    fraction: share of rows held out, 0 <= fraction < 1; above 0 at least one row goes to each side.
    """
    if isinstance(fraction, bool) or not 0 <= fraction < 1:
        raise UserError(f"held_out: is {fraction}; must be a fraction from 0 up to, not including, 1")
    if fraction == 0:
        return list(conversations), []
    n = len(conversations)
    if n < 2:
        raise UserError(f"held_out: {n} row{'s' * (n != 1)} cannot be split; give a held-out file or more rows")
    count = min(max(round(n * fraction), 1), n - 1)
    order = sorted(range(n), key=lambda i: hashlib.blake2b(f"{seed}/held-out/{i}".encode(), digest_size=16).digest())
    held = set(order[:count])
    return [c for i, c in enumerate(conversations) if i not in held], [conversations[i] for i in sorted(held)]


@dataclass(frozen=True)
class Duplicates:
    """Held-out rows that training also sees: whole conversations, and prompts alone (same question, another answer)."""

    exact: int
    prompt: int
    examples: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.exact or self.prompt)

    def __str__(self) -> str:
        text = f"{self.exact} held-out rows are also in train, {self.prompt} more share their prompt"
        return ": ".join([text, *(["; ".join(self.examples)] if self.examples else [])])


def _key(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def _keys(c: Conversation) -> tuple[bytes, bytes | None]:
    """Keys of the whole conversation and of its prompt (None where there is none), blind to case and white space."""
    answer = c.messages[-1:] if c.messages and c.messages[-1].role == "assistant" else ()
    before = "\n".join(f"{m.role}: {m.content}" for m in c.messages[:len(c.messages) - len(answer)])
    whole = "\n".join([before, *(f"{m.role}: {m.content}" for m in answer)])
    return _key(whole), _key(before) if any(m.content.strip() for m in c.messages[:-1]) else None


def duplicates(train: Iterable[Conversation], held_out: Sequence[Conversation], shown: int = 3) -> Duplicates:
    """Held-out rows whose conversation, or at least prompt, is in train; a few of them as "file:line = file:line".

    Of train, which is read once, only what is held out too is remembered."""
    held = [_keys(c) for c in held_out]
    known = {key for pair in held for key in pair}
    wholes: dict[bytes, str] = {}
    prompts: dict[bytes, str] = {}
    for c in train:
        whole, prompt = _keys(c)
        if whole in known:
            wholes.setdefault(whole, c.where)
        if prompt is not None and prompt in known:
            prompts.setdefault(prompt, c.where)
    exact, same, examples = 0, 0, []
    for c, (whole, prompt) in zip(held_out, held, strict=True):
        if whole in wholes:
            exact += 1
            examples.append(f"{c.where} = {wholes[whole]}")
        elif prompt in prompts:
            same += 1
            examples.append(f"{c.where} asks what {prompts[prompt]} asks")
    return Duplicates(exact, same, tuple(examples[:shown]))
