"""Regular expressions from files: matched to names in bounded time, whatever they are, with the answers that `re` gives."""
from __future__ import annotations

import re
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from .errors import UserError, shown

LONGEST = 1 << 16                                     # characters of a pattern
STEPS = 50_000                                        # for one pattern and one name; a usual pattern needs a few hundred
PLAIN = re.compile(r"[^*+?{(\\[]*(\([^*+?{(\[]*)?")      # repeats nothing, and chooses once: `re` itself is as safe, and faster
SETS = re.compile(r"\[\[|\[[^\]]*(--|&&|~~|\|\|)")      # what a later Python will read otherwise


def fullmatch(pattern: str, name: str) -> bool:
    """Whether the whole name matches. Raises UserError for a pattern that is none, or takes too long; the caller adds where."""
    tree = _parsed(pattern)
    if PLAIN.fullmatch(pattern):
        return re.fullmatch(pattern, name) is not None
    return len(name) in _ends(tree, pattern, name, {0})


def search(pattern: str, name: str) -> bool:
    """Whether some part of the name matches."""
    tree = _parsed(pattern)
    if PLAIN.fullmatch(pattern):
        return re.search(pattern, name) is not None
    return bool(_ends(tree, pattern, name, set(range(len(name) + 1))))


def _ends(tree: Any, pattern: str, name: str, starts: set[int]) -> set[int]:
    try:
        return _Run(name, pattern).ends(tree, starts)
    except RecursionError:
        raise UserError(f"{shown(pattern)} is nested too deeply") from None


@lru_cache(256)
def _parsed(pattern: str) -> Any:
    if len(pattern) > LONGEST:
        raise UserError(f"{shown(pattern)} is longer than {LONGEST} characters")
    if SETS.search(pattern):
        raise UserError(f"{shown(pattern)} has a set of characters that can be read in two ways")
    try:
        tree = _parser.parse(pattern)
    except (re.error, OverflowError) as e:
        raise UserError(f"{shown(pattern)} is not a regular expression: {e}") from None
    except RecursionError:
        raise UserError(f"{shown(pattern)} is nested too deeply") from None
    if tree.state.flags & ~re.UNICODE:
        raise UserError(f"{shown(pattern)} sets flags, which is not supported")
    return tree


def _word(c: str) -> bool:
    return c.isalnum() or c == "_"


KINDS = {op.CATEGORY_DIGIT: str.isdecimal, op.CATEGORY_SPACE: str.isspace, op.CATEGORY_WORD: _word,
         op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(), op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
         op.CATEGORY_NOT_WORD: lambda c: not _word(c)}


class _Run:
    """A pattern beside a name: every place where it can stand after each part, instead of one way through after the other."""

    def __init__(self, name: str, pattern: str):
        self.name, self.pattern, self.left = name, pattern, STEPS

    def ends(self, parts: Any, at: set[int]) -> set[int]:
        """From the places `at`, the places after `parts`."""
        for kind, value in parts:
            if not at:
                break
            self.left -= 1 + len(at)
            if self.left < 0:
                raise UserError(f"{shown(self.pattern)} repeats what repeats, which can take forever to match")
            at = self._after(kind, value, at)
        return at

    def _after(self, kind: Any, value: Any, at: set[int]) -> set[int]:
        if kind in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            return {p + 1 for p in at if p < len(self.name) and self._one(kind, value, self.name[p])}
        if kind is op.AT:
            return {p for p in at if self._stands(value, p)}
        if kind is op.BRANCH:
            return set().union(*(self.ends(part, at) for part in value[1]))
        if kind is op.SUBPATTERN and not value[1] and not value[2]:
            return self.ends(value[3], at)
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self._repeated(*value, at)
        if kind in (op.ASSERT, op.ASSERT_NOT):
            return {p for p in at if self._sees(*value, p) == (kind is op.ASSERT)}
        raise UserError(f"{shown(self.pattern)} uses {str(kind).lower()}, which is not supported")

    def _one(self, kind: Any, value: Any, c: str) -> bool:
        """Does one character match?"""
        if kind is op.IN:
            negated = value[0][0] is op.NEGATE
            return any(self._one(*item, c) for item in value[negated:]) != negated
        if kind is op.RANGE:
            return value[0] <= ord(c) <= value[1]
        if kind is op.CATEGORY:
            return KINDS[value](c)
        return c != "\n" if kind is op.ANY else (ord(c) == value) == (kind is op.LITERAL)

    def _stands(self, where: Any, p: int) -> bool:
        last = len(self.name)
        if where in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return p == 0
        if where is op.AT_END:
            return p == last or (p == last - 1 and self.name[p] == "\n")
        if where is op.AT_END_STRING:
            return p == last
        edge = (p > 0 and _word(self.name[p - 1])) != (p < last and _word(self.name[p]))
        return edge == (where is op.AT_BOUNDARY)

    def _repeated(self, low: int, high: int, body: Any, at: set[int]) -> set[int]:
        for _ in range(min(low, len(self.name) + 1)):      # after as many, only rounds that match nothing are left
            at = self.ends(body, at)
        found, new, rounds = set(at), at, low
        while new and rounds < high:
            new, rounds = self.ends(body, new) - found, rounds + 1
            found |= new
        return found

    def _sees(self, direction: int, body: Any, p: int) -> bool:
        if direction > 0:
            return bool(self.ends(body, {p}))
        return any(p in self.ends(body, {s}) for s in range(p + 1))
