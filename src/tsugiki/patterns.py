"""Regular expressions from files: the answers of `re`, and an end to every match, whatever the pattern is."""
from __future__ import annotations

import re
import warnings
from functools import lru_cache

import regex

from .errors import UserError, shown

LONGEST = 1 << 16                                     # characters; a list of a large model's sites is a few thousand
SECONDS = 2.0                                         # for one pattern and one name; a usual pattern needs microseconds
NESTED = re.compile(r"(\}\)\{\d+(,\d*)?){3}")          # counted repeats of counted repeats grow with every level


def fullmatch(pattern: str, name: str) -> bool:
    """Whether the whole name matches. Raises UserError for a pattern that is none, or takes too long; the caller adds where."""
    return _match(pattern, "fullmatch", name)


def search(pattern: str, name: str) -> bool:
    """Whether some part of the name matches."""
    return _match(pattern, "search", name)


def _match(pattern: str, how: str, name: str) -> bool:
    try:
        return getattr(_compiled(pattern), how)(name, timeout=SECONDS) is not None
    except (TimeoutError, MemoryError, RecursionError):
        raise UserError(f"{shown(pattern)} takes too long to match") from None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> regex.Pattern:
    if len(pattern) > LONGEST or pattern.count("(") > 500:
        raise UserError(f"{shown(pattern)} is longer than {LONGEST} characters or has more than 500 groups")
    if NESTED.search(pattern):
        raise UserError(f"{shown(pattern)} repeats what repeats, counted, which can take forever to match")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")            # sets of characters that a later Python will read otherwise
            flags = re.compile(pattern).flags
        compiled = regex.compile(pattern, regex.VERSION0)
    except (re.error, regex.error, OverflowError, RecursionError, Warning) as e:
        raise UserError(f"{shown(pattern)} is not a regular expression: {e}") from None
    if flags & ~re.UNICODE:
        raise UserError(f"{shown(pattern)} sets flags, which is not supported")
    return compiled
