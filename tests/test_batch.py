"""Batches: every row once an epoch, forwards within their size, an order that is a function of (seed, step) alone."""
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.data.batch import IGNORE, collate, epoch_order, micro_batches, step_rows, stream_key
from tsugiki.data.render import Example


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 90), batch=st.integers(1, 25), seed=st.integers(0, 2**60), epoch=st.integers(0, 3))
def test_every_row_comes_once_an_epoch(n, batch, seed, epoch):
    steps = math.ceil(n / batch)
    parts = [step_rows(n, batch, seed, epoch * steps + s) for s in range(steps)]
    assert sorted(i for part in parts for i in part) == list(range(n))
    assert all(len(part) == batch for part in parts[:-1]) and 1 <= len(parts[-1]) <= batch


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40), room=st.integers(2, 150),
       layout=st.sampled_from(["pad", "pack"]))
def test_forwards_hold_every_row_once_and_stay_within_max_tokens(lengths, room, layout):
    rows = random.Random(0).sample(range(len(lengths)), len(lengths))
    forwards = micro_batches(lengths, rows, layout, room)
    assert sorted(i for forward in forwards for row in forward for i in row) == sorted(rows)
    for forward in forwards:
        width = max(sum(lengths[i] for i in row) for row in forward)
        assert len(forward) * width <= room or sum(len(row) for row in forward) == 1        # one row alone may be longer


def test_padding_never_costs_more_than_a_forward_a_row():
    rng = random.Random(1)
    for _ in range(50):
        lengths = [rng.randint(2, 200) for _ in range(rng.randint(1, 32))]
        forwards = micro_batches(lengths, range(len(lengths)), "pad", 4096)
        area = sum(len(f) * max(lengths[row[0]] for row in f) + 192 for f in forwards)
        assert area <= sum(lengths) + 192 * len(lengths)
        assert area <= len(lengths) * max(lengths) + 192 or len(lengths) * max(lengths) > 4096


def test_the_order_is_a_function_of_seed_and_step_whatever_is_drawn_in_between():
    want = [step_rows(50, 8, 3, step) for step in range(20)]
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for step in random.Random(0).sample(range(20), 20):
        torch.rand(1)
        assert step_rows(50, 8, 3, step) == want[step]
    torch.set_rng_state(state)
    step_rows(50, 8, 99, 1000)
    epoch_order(777, 5, 1)
    assert torch.equal(torch.get_rng_state(), state), "drawing an order moved the global generator"
    assert want[0] != step_rows(50, 8, 4, 0) and epoch_order(50, 3, 0) != epoch_order(50, 3, 1)


def test_streams_of_different_purposes_do_not_meet():
    assert len({stream_key(0, "order", 1), stream_key(1, "order", 0), stream_key(0, "order", 11), stream_key(0, "max_rows")}) == 4


def random_examples(n: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    made = []
    for i in range(n):
        size = rng.randint(2, 12)
        trained = [False] + [rng.random() < 0.6 for _ in range(size - 1)]
        made.append(Example([rng.randint(4, 90) for _ in range(size)], trained, f"f:{i}"))
    return made


@pytest.mark.parametrize("layout, multiple", [("pad", 1), ("pack", 1), ("pad", 16), ("pack", 16)])
def test_a_batch_says_of_every_token_its_row_place_and_target(layout, multiple):
    rows = random_examples(30)
    seen = []
    for forward in micro_batches([len(e.ids) for e in rows], range(30), layout, 40):
        batch = collate(rows, forward, 7, multiple)
        assert not batch.packed or batch.ids.shape[1] % multiple == 0
        for b in range(len(batch.ids)):
            for i in batch.samples[b].unique().tolist():
                if i < 0:
                    continue
                at = batch.samples[b] == i
                seen.append(i)
                assert batch.ids[b][at].tolist() == rows[i].ids
                assert batch.positions[b][at].tolist() == list(range(len(rows[i].ids)))
                want = [t if on else IGNORE for t, on in zip(rows[i].ids[1:], rows[i].trained[1:], strict=True)]
                assert batch.targets[b][at].tolist() == [*want, IGNORE]
        pad = batch.samples < 0
        assert (batch.targets[pad] == IGNORE).all() and (batch.ids[pad] == 7).all()
        assert batch.tokens == int((~pad).sum()) and batch.packed == any(len(row) > 1 for row in forward)
        if batch.packed and pad.any():
            assert (batch.positions[pad][:1] == 0).all(), "padding must not continue the document before it"
    assert sorted(seen) == list(range(30))
