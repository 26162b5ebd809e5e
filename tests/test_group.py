"""Adapters of one method computed as one give what each gives alone, whatever their sizes and rows; nothing passes between them."""
import dataclasses

import pytest
import torch
from tiny import EXACT, METHOD_CASES, difference, fill, fit, ids, tiny

from tsugiki import group, tap
from tsugiki.adapters import attach
from tsugiki.errors import UserError
from tsugiki.methods import IA3, LoRA, Prefix, Series
from tsugiki.route import Spans, token_keys

F64 = torch.float64
RANKS = (2, 4, 3)


def grouped() -> dict:
    """The method cases with an edit that can be computed together."""
    adapters = attach(tiny("llama", F64))
    return {name: cfg for name, cfg in METHOD_CASES.items()
            if any(e.alike() is not None for _, e in adapters.add(name, fit(adapters, cfg)).edits.values())}


GROUPED = grouped()
PACKED = [name for name, cfg in GROUPED.items() if not any(part.edit.virtual for part in cfg.parts)]


def three(name: str, kind: str = "llama", **values):
    """A model with three adapters of one method, of unequal sizes where it has one."""
    adapters, cfg = attach(tiny(kind, F64)), METHOD_CASES[name]
    size = next((f.name for f in dataclasses.fields(cfg) if f.name in ("rank", "size")), None)
    for n, rank in enumerate(RANKS):
        own = dataclasses.replace(cfg, **values | ({size: rank if size == "rank" else 2 * rank} if size else {}))
        fill(adapters.add(f"a{n}", fit(adapters, own)), seed=n + 1)
    return adapters


def losses(adapters, x, ids, **kwargs):
    logits = adapters.model(input_ids=x, adapter_ids=ids, use_cache=False, **kwargs).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none").mean(1)


def gradients(adapters) -> dict[str, torch.Tensor]:
    found = {f"{n} {k}": p.grad.clone() for n in adapters.names() for k, p in adapters.get(n).parameters().items()
             if p.grad is not None}
    adapters.model.zero_grad()
    return found


@pytest.fixture
def counted(monkeypatch):
    """How many groups of several were computed."""
    calls = []
    monkeypatch.setattr(tap, "run", lambda *args: calls.append(1) or group.run(*args))
    return calls


@pytest.mark.share(3)
@pytest.mark.parametrize("who", [["a0", "a1", "a2"], ["a1", None, "a0", "a2", "a1", "a1"], [None, "a2", "a2", "a0", "a0"]],
                         ids=["side by side", "apart", "equal shares"])
@pytest.mark.parametrize("name", GROUPED)
def test_a_group_is_each_row_alone_in_logits_and_gradients(name, who, counted):
    adapters, x = three(name), ids(len(who))
    keys = token_keys(0, 1, torch.arange(len(who))[:, None].expand(-1, 10), torch.arange(10).expand(len(who), -1))
    adapters.model.train()
    together = losses(adapters, x, who, token_keys=keys)
    assert counted
    together.sum().backward()
    joint = gradients(adapters)
    for i, name in enumerate(who):
        alone = losses(adapters, x[i:i + 1], name or (), token_keys=keys[i:i + 1])
        assert difference(together[i:i + 1], alone) <= EXACT
        if name:
            alone.backward()
    for key, grad in gradients(adapters).items():
        assert difference(joint[key], grad) <= EXACT, key
    with torch.no_grad():                             # the way without gradients keeps what it stacked
        for _ in range(2):
            assert difference(losses(adapters, x, who, token_keys=keys), together) <= EXACT


@pytest.mark.share(3)
@pytest.mark.parametrize("name", PACKED)
def test_spans_of_a_packed_row_are_its_documents_alone(name):
    adapters, documents = three(name), [ids(1, n, seed=n) for n in (5, 4, 6, 3)]
    who, ends = ("a0", "a2", None, "a1"), (5, 9, 15, 18)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    row = adapters.model(input_ids=torch.cat(documents, 1), position_ids=positions, adapter_ids=Spans(who, ends),
                         use_cache=False).logits.split([5, 4, 6, 3], 1)
    for logits, document, name in zip(row, documents, who, strict=True):
        assert difference(logits, adapters.model(input_ids=document, adapter_ids=name or (), use_cache=False).logits) <= EXACT


@pytest.mark.share(3)
@pytest.mark.parametrize("name", [n for n, c in METHOD_CASES.items() if not any(part.edit.virtual for part in c.parts)])
def test_every_method_beside_others_in_the_spans_of_one_row_is_as_alone(name):
    adapters = attach(tiny("llama", F64))
    for n, case in enumerate({name: METHOD_CASES[name], "lora": LoRA(rank=3)}.items()):
        if case[0] not in adapters.names():
            fill(adapters.add(case[0], fit(adapters, case[1])), seed=n)
    documents, who = [ids(1, n, seed=n) for n in (5, 4, 6)], (name, "lora", name)
    prompt = torch.tensor([1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0], dtype=torch.bool)[None]
    row = adapters.model(input_ids=torch.cat(documents, 1), position_ids=torch.cat([torch.arange(n) for n in (5, 4, 6)])[None],
                         adapter_ids=Spans(who, (5, 9, 15)), prompt_mask=prompt, use_cache=False).logits.split([5, 4, 6], 1)
    for logits, document, one, own in zip(row, documents, who, prompt.split([5, 4, 6], 1), strict=True):
        alone = adapters.model(input_ids=document, adapter_ids=one, prompt_mask=own, use_cache=False).logits
        assert difference(logits, alone) <= EXACT


@pytest.mark.parametrize("who", [["a0", "a1", "a2"], ["a1", "a0", "a2", "a1", "a1"]], ids=["side by side", "apart"])
@pytest.mark.parametrize("cfg", [LoRA(rank=4), Series(size=8), IA3(), Prefix(tokens=3)], ids=lambda c: c.name)
def test_what_is_not_finite_in_one_adapter_changes_no_bit_of_the_others(cfg, who):
    def run(broken: bool):
        adapters = attach(tiny("llama", F64))
        for n in range(3):
            fill(adapters.add(f"a{n}", cfg), seed=n + 1)
        if broken:
            with torch.no_grad():
                for p in adapters.get("a1").parameters().values():
                    p.fill_(float("nan"))
        found = losses(adapters, ids(len(who)), who)
        found.sum().backward()
        return found.detach(), gradients(adapters)
    (good, grads), (bad, tainted) = run(False), run(True)
    for i, name in enumerate(who):
        assert torch.equal(good[i], bad[i]) if name != "a1" else bool(bad[i].isnan())
    for key, grad in grads.items():
        assert key.startswith("a1 ") or torch.equal(grad, tainted[key]), key


def test_what_is_kept_between_forwards_follows_a_change_in_place_and_a_removal(counted):
    adapters, x = three("lora"), ids(3)
    with torch.no_grad():
        before = losses(adapters, x, ["a0", "a1", "a2"])
        fill(adapters.get("a1"), seed=7, scale=0.3)
        after = losses(adapters, x, ["a0", "a1", "a2"])
        assert difference(after[[0, 2]], before[[0, 2]]) <= EXACT < 1e-4 < difference(after[1], before[1])
        assert difference(after[1:2], losses(adapters, x[1:2], "a1")) <= EXACT
        adapters.remove("a1")
        fill(adapters.add("a1", LoRA(rank=4)), seed=9)
        again = losses(adapters, x, ["a0", "a1", "a2"])
        assert difference(again[1:2], losses(adapters, x[1:2], "a1")) <= EXACT < 1e-4 < difference(again[1], after[1])
    assert counted


def test_a_class_that_edits_otherwise_is_not_computed_as_the_one_it_extends():
    class Other(type(three("lora").get("a0").edits["model.layers.0.mlp.down_proj"][1])):
        def change(self, x, ctx):
            return super().change(x, ctx) * 2
    assert Other.alike(None) is None


@pytest.mark.parametrize("spans, says", [
    (lambda: Spans(("a0", "a1"), (5, 3)), "rising ends"), (lambda: Spans(("a0",), (3, 5)), "1 adapters for the ends"),
    (lambda: Spans(("a0", "a1"), (3, 5)), "the last span ends at 5, the row at 10"),
    (lambda: Spans(("a0", "b"), (3, 10)), "no adapter 'b' is attached")])
def test_bad_spans_are_one_line(spans, says):
    adapters = three("lora")
    with pytest.raises(UserError, match=says):
        adapters.model(input_ids=ids(1), adapter_ids=spans())
    with pytest.raises(UserError, match="Spans are of one packed row, the batch has 2"):
        adapters.model(input_ids=ids(2), adapter_ids=Spans(("a0", "a1"), (3, 10)))
