"""Text from tokens as they come: whole characters only, and nothing of a stop text."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"                                 # what a decoder shows for a character's first bytes


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Writer:
    """The text of one answer. All that it gave, joined, is what the tokens decode to after `anchor`, up to the stop text.

    anchor: ids of some text, so that a first token keeps its leading space. The bytes of a character may lie in several
    tokens, so a piece is the difference of two decodings from the same token on.
    """

    def __init__(self, tokenizer: Any, anchor: Sequence[int], stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.ids, self.start, self.read = list(anchor), 0, len(anchor)
        self.shown = decode(tokenizer, anchor)        # of ids[start:read]
        self.held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """(new text, whether a stop text came)."""
        self.ids.append(token)
        now = decode(self.tokenizer, self.ids[self.start:])
        if now.endswith(INCOMPLETE) or len(now) <= len(self.shown):
            return "", False
        new = now[len(self.shown):]
        self.start, self.read = self.read, len(self.ids)
        self.shown = decode(self.tokenizer, self.ids[self.start:])
        return self._pass(new)

    def close(self) -> tuple[str, bool]:
        """What was held back, and whether a stop text is in it, which is left out."""
        new = decode(self.tokenizer, self.ids[self.start:])[len(self.shown):]
        text, stopped = self._pass(new)
        return (text, True) if stopped else (text + self.held, False)

    def _pass(self, new: str) -> tuple[str, bool]:
        text = self.held + new
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.held = ""
            return text[:min(found)], True
        keep = max((n for s in self.stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0)
        self.held = text[len(text) - keep:]
        return text[:len(text) - keep], False
