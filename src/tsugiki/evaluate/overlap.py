"""Contamination: test questions that training rows hold, word for word or nearly, counted before a score is believed.

A question and a row are compared as words (case, punctuation and white space aside). Exact: the whole question stands in the row.
Near: at least SHARE of the question's runs of RUN words do. Runs that many test questions have (the wording of a task) say
nothing and are left out; a question of fewer words than a run is one run.
"""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

from tsugiki.data.conversation import Conversation
from tsugiki.evaluate.score import Item

RUN, SHARE = 4, 0.5
COMMON = 0.02                                         # a run that this share of the test questions has is wording
WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+")


@dataclass(frozen=True)
class Overlap:
    """Of n test rows, how many questions are in training word for word, and how many nearly; a few as "test = training"."""
    exact: int
    near: int
    n: int
    pairs: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.exact or self.near)

    def __str__(self) -> str:
        text = f"{self.exact} of {self.n} test questions are in the training data word for word, {self.near} more nearly"
        return ": ".join([text, *(["; ".join(self.pairs)] if self.pairs else [])])

    def plain(self) -> dict:
        return {"exact": self.exact, "near": self.near, "n": self.n, "pairs": list(self.pairs)}


def words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def runs(of: Sequence[str], length: int, known: Container | None = None) -> set[tuple[str, ...]]:
    """The runs of words of a length; of a long text only those that are known, so that no more is held."""
    found = (tuple(of[n:n + length]) for n in range(len(of) - length + 1))
    return set(found) if known is None else {run for run in found if run in known}


def overlap(train: Sequence[Conversation], items: Sequence[Item], shown: int = 3) -> Overlap:
    """What training rows and test questions share, by the rule above. Exact matches come first in `pairs`."""
    asked = [words(i.question or i.conversation.prompt_text or i.conversation.reference) for i in items]
    each = [runs(q, min(RUN, len(q))) if q else set() for q in asked]
    seen = Counter(run for run_set in each for run in run_set)
    limit = max(3, COMMON * len(items))
    each = [{r for r in run_set if seen[r] <= limit} or run_set for run_set in each]
    places: dict[tuple[str, ...], list[int]] = {}
    for n, run_set in enumerate(each):
        for run in run_set:
            places.setdefault(run, []).append(n)
    lengths = sorted({len(r) for r in places})
    texts = [f" {' '.join(q)} " for q in asked]
    best: dict[int, tuple[bool, float, str]] = {}     # test row -> (word for word, share, training row)
    for c in train:
        said = words("\n".join(m.content for m in c.messages))
        whole = f" {' '.join(said)} "
        shared = Counter(n for length in lengths for run in runs(said, length, places) for n in places[run])
        for n, count in shared.items():
            share = count / len(each[n])
            if share >= SHARE and (found := (texts[n] in whole, share, c.where)) [:2] > best.get(n, (False, 0.0))[:2]:
                best[n] = found
    exact = sum(found[0] for found in best.values())
    first = sorted(best, key=lambda n: (not best[n][0], -best[n][1], n))[:shown]
    pairs = tuple(f"{items[n].conversation.where} {'=' if best[n][0] else '~'} {best[n][2]}" for n in first)
    return Overlap(exact, len(best) - exact, len(items), pairs)
