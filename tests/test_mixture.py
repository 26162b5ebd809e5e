"""Sources are mixed by their share of the tokens: exact to half a row after every step, and a function of (seed, step) alone."""
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsugiki.data.batch import step_rows
from tsugiki.data.mixture import Mixture, mixed


def make(counts, shares, batch=4, seed=0, longest=40) -> Mixture:
    lengths = torch.tensor([random.Random(i).randint(2, longest) for i in range(sum(counts))])
    names = ["data", *(f"s{n}" for n in range(1, len(counts)))]
    return mixed(counts, names, [Fraction(str(s)) for s in shares], batch, seed, lengths)


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=4), share=st.integers(1, 30), batch=st.integers(1, 9),
       seed=st.integers(0, 2**40))
def test_after_every_step_each_source_has_given_its_share_to_half_a_row(counts, share, batch, seed):
    shares = [Fraction(share, 100)] * (len(counts) - 1)
    lengths = torch.tensor([random.Random(i).randint(2, 40) for i in range(sum(counts))])
    mixture = mixed(counts, [str(n) for n in range(len(counts))], shares, batch, seed, lengths)
    given_ = [0] * len(counts)
    rest = 1 - sum(shares)
    for step in range(25):
        for row in mixture.rows(step):
            given_[int(mixture.source_of(torch.tensor([row])))] += int(lengths[row])
        assert mixture.tokens(step + 1) == given_
        for tokens, part, source in zip(given_[1:], shares, mixture.sources[1:], strict=True):
            longest = int(lengths[source.start:source.start + source.count].max())
            assert abs(tokens - given_[0] * part / rest) <= Fraction(longest, 2)


def test_the_first_source_keeps_the_rows_it_would_have_alone():
    mixture = make([22, 9, 5], [0.2, 0.1])
    for step in range(20):
        rows = mixture.rows(step)
        alone = step_rows(22, 4, 0, step)
        assert rows[:len(alone)] == alone and all(r >= 22 for r in rows[len(alone):])
    assert any(len(mixture.rows(step)) > 4 for step in range(20))


@pytest.mark.parametrize("mixture", [Mixture.alone(22, 4, 7), make([22, 9], [0], seed=7)], ids=["alone", "a share of nothing"])
def test_one_source_is_what_a_run_had_before(mixture):
    assert [mixture.rows(s) for s in range(15)] == [step_rows(22, 4, 7, s) for s in range(15)]
    assert not mixture.mixed and mixture.pace == 6


def test_rows_of_a_step_do_not_depend_on_what_was_asked_before_and_follow_the_seed():
    want = [make([22, 9, 5], [0.2, 0.1]).rows(s) for s in range(40)]
    mixture = make([22, 9, 5], [0.2, 0.1])
    for step in random.Random(0).sample(range(40), 40):
        torch.rand(1)
        assert mixture.rows(step) == want[step]
    assert [make([22, 9, 5], [0.2, 0.1], seed=1).rows(s) for s in range(40)] != want


def test_a_source_is_read_whole_before_any_row_of_it_comes_again_and_each_pass_has_its_own_order():
    mixture = make([50, 7], [0.3])
    taken = [r for step in range(60) for r in mixture.rows(step) if r >= 50]
    passes = [taken[k:k + 7] for k in range(0, len(taken) - 6, 7)]
    assert len(passes) > 5 and all(sorted(p) == list(range(50, 57)) for p in passes)
    assert len({tuple(p) for p in passes}) > 1


def test_two_added_sources_of_one_size_have_orders_of_their_own():
    mixture = make([50, 20, 20], [0.3, 0.3])
    orders = [[r - s.start for step in range(8) for r in mixture.rows(step) if s.start <= r < s.start + 20][:20]
              for s in mixture.sources[1:]]
    assert orders[0] != orders[1]
