"""Held-out rows: the same rows for the same seed, whatever else drew random numbers; duplicates are told."""

from __future__ import annotations

import random

import pytest

from tsugiki.data import Conversation, Message, duplicates, split
from tsugiki.errors import UserError


def plain(prompt: str, answer: str, n: int = 1) -> Conversation:
    return Conversation("plain", (Message("user", prompt), Message("assistant", answer)), f"f.jsonl:{n}")


ROWS = [plain(f"q{n}", f"a{n}", n) for n in range(1000)]


def test_a_split_is_a_function_of_rows_fraction_and_seed_alone():
    random.seed(1)
    state = random.getstate()
    first = split(ROWS, 0.1, seed=3)
    assert random.getstate() == state
    random.seed(2)
    assert split(ROWS, 0.1, seed=3) == first
    train, held = first
    assert len(held) == 100 and sorted([*train, *held], key=lambda c: int(c.where[8:])) == ROWS
    assert train == [c for c in ROWS if c in train] and held == [c for c in ROWS if c in held]
    other = split(ROWS, 0.1, seed=4)[1]
    assert 0 < len({c.where for c in other} & {c.where for c in held}) < 40


def test_a_larger_fraction_holds_out_a_superset():
    assert {c.where for c in split(ROWS, 0.1, 0)[1]} <= {c.where for c in split(ROWS, 0.2, 0)[1]}


def test_both_sides_get_a_row_and_nonsense_is_refused():
    assert split(ROWS, 0) == (ROWS, [])
    assert [len(side) for side in split(ROWS[:2], 0.001)] == [1, 1] == [len(side) for side in split(ROWS[:2], 0.999)]
    for fraction in (-0.1, 1, 1.5, True, float("nan")):
        with pytest.raises(UserError, match="held_out: is"):
            split(ROWS, fraction)
    with pytest.raises(UserError, match="1 row cannot be split"):
        split(ROWS[:1], 0.5)


def test_duplicates_are_found_through_case_and_white_space():
    train = [
        plain("Who are you?", " Nobody", 1),
        plain("What?", "This", 2),
        Conversation("text", (Message("assistant", "A story."),), "t:1"),
    ]
    held = [
        plain("who are  YOU?\n", "nobody ", 11),
        plain("What?", "That", 12),
        plain("New", "Row", 13),
        Conversation("text", (Message("assistant", "a  story."),), "t:2"),
        Conversation("text", (Message("assistant", "Else"),), "t:3"),
    ]
    found = duplicates(train, held)
    assert (found.exact, found.prompt) == (2, 1) and found
    assert found.examples == ("f.jsonl:11 = f.jsonl:1", "f.jsonl:12 asks what f.jsonl:2 asks", "t:2 = t:1")
    assert str(found).startswith("2 held-out rows are also in train, 1 more share their prompt: f.jsonl:11")
    assert not duplicates(train, held[2:3]) and not duplicates([plain("", "a")], [plain("", "b")])
