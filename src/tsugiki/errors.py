"""The two ways a command ends badly, and the nearest spelling for a message."""
from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one to three lines that say what, where, and what is allowed (exit code 2)."""


class RunError(RuntimeError):
    """A run that cannot go on: one line that says why and what was kept (exit code 1)."""


def shown(value: object, limit: int = 60) -> str:
    """A value from outside as a message shows it: one line, and not all of a long one."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def nearest(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean 'rank'?"` for a misspelt word, or nothing."""
    close = difflib.get_close_matches(str(word), [str(c) for c in choices], 1)
    return f"; did you mean {close[0]!r}?" if close else ""
