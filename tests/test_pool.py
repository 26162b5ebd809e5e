"""One token a row under many LoRAs, computed as two products: each row as alone, whatever came, left, or changed."""
from __future__ import annotations

import copy
import threading

import pytest
import torch
from tiny import EXACT, difference, fill, ids, tiny

from tsugiki.adapters import attach
from tsugiki.methods import LoRA
from tsugiki.pool import Plan

F64 = torch.float64


@pytest.fixture
def model():
    model = tiny("llama", F64)
    adapters = attach(model)
    for n in range(6):
        fill(adapters.add(f"l{n}", LoRA(rank=2 + n % 3, alpha=3.0 + n)), seed=n, scale=0.3)
    return model


def pools(model) -> list:
    return [pool for tap in model.adapters._taps.values() if (pool := tap.pools.mine[1]) is not None]


@torch.no_grad()
def check(model, who: list[str | None], bad: str | None = None) -> None:
    tokens = ids(len(who), 1, seed=3)
    out = model(tokens, adapter_ids=who).logits
    for row, name in enumerate(who):
        alone = model(tokens[row:row + 1], adapter_ids=[name]).logits
        if name is not None and name == bad:
            assert out[row].isnan().any()
        else:
            assert difference(out[row:row + 1], alone) <= EXACT, (row, name)


def test_rows_are_as_alone_in_any_order_and_those_that_stay_keep_their_places(model):
    check(model, ["l0", "l1", None, "l2", "l0", "l3"])
    first = pools(model)
    assert first and all(pool.size == 4 for pool in first)
    places = dict(first[0].at)
    check(model, ["l3", "l0", "l4", None, "l2"])
    assert pools(model) == first, "the pools were made anew"
    kept = [edit for edit in places if edit in first[0].at]
    assert len(kept) == 3 and all(first[0].at[edit] == places[edit] for edit in kept)
    check(model, [f"l{n}" for n in range(6)])
    assert all(pool.size == 8 for pool in pools(model))
    with torch.enable_grad():
        out = model(ids(2, 1), adapter_ids=["l0", "l1"]).logits
    assert out.requires_grad


def test_changed_numbers_and_an_adapter_that_was_taken_off_and_put_back_are_seen(model):
    who, adapters = ["l0", "l1", "l2"], model.adapters
    check(model, who)
    with torch.no_grad():
        for p in adapters.get("l1").parameters().values():
            p.mul_(-2.0)
    check(model, who)
    gone = adapters.remove("l1")
    check(model, ["l0", None, "l2"])
    fill(gone, seed=50, scale=0.2)
    adapters.put_back(gone)
    check(model, who)
    adapters.remove("l0")
    fill(adapters.add("l0", LoRA(rank=4)), seed=51, scale=0.3)
    check(model, who)


def test_numbers_that_are_not_finite_reach_no_other_row_and_leave_nothing_behind(model):
    check(model, ["l0", "l1", "l2"])
    gone = [p.clone() for p in model.adapters.get("l1").parameters().values()]
    with torch.no_grad():
        for p in model.adapters.get("l1").parameters().values():
            p.fill_(torch.nan)
    check(model, ["l0", "l1", "l2", None], bad="l1")
    check(model, ["l0", "l2", "l3", None])
    with torch.no_grad():
        for p, old in zip(model.adapters.get("l1").parameters().values(), gone, strict=True):
            p.copy_(old)
    check(model, ["l1", "l0", "l2"])


def test_lora_beside_other_methods_weights_and_stacks_is_as_alone(model):
    from tiny import METHOD_CASES, fit
    for name in ("dora", "series", "prefix", "bitfit"):
        if name in METHOD_CASES:
            fill(model.adapters.add(name, fit(model.adapters, METHOD_CASES[name])), seed=7, scale=0.2)
    check(model, ["l0", "dora", "l1", "series", None, "bitfit", "l0"])
    check(model, [("l0", "l1"), "l2", {"l1": 0.5}, "l3"])
    check(model, [{"l1": 0.5}, "l2", "l3", {"l2": 0.25}])


def test_two_threads_that_decode_at_once_never_use_each_others_factors(model, monkeypatch):
    """The second one decodes under other adapters between the first one's plan and its products, at every site."""
    plain, first, failed = Plan.run, threading.get_ident(), []

    def other():
        try:
            check(model, ["l2", "l3"])
        except BaseException as e:
            failed.append(e)

    def run(plan, x, y):
        if threading.get_ident() == first:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return plain(plan, x, y)
    monkeypatch.setattr(Plan, "run", run)
    check(model, ["l0", "l1"])
    check(model, ["l0", "l1"])
    assert not failed


def test_a_copy_of_a_model_that_decoded_is_independent(model):
    check(model, ["l0", "l1", "l2"])
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.adapters.get("l1").parameters().values():
            p.mul_(-2.0)
    check(other, ["l0", "l1", "l2"])
    check(model, ["l0", "l1", "l2"])
