"""Where a token stands in its document's prompt: what LoReFT counts by, whatever the padding, packing and cache."""
import pytest
import torch
from tiny import EXACT, attached, difference, fill, ids, tiny

from tsugiki.adapters import attach
from tsugiki.methods import LoReFT
from tsugiki.route import before_first, places

F64 = torch.float64


def slow(real, starts, prompt):
    """The same by going through tokens one by one."""
    found = []
    for r, s, p in zip(real.tolist(), starts.tolist(), prompt.tolist(), strict=True):
        document, number = [], 0
        for i in range(len(r)):
            number += s[i] and i > 0
            document.append(number)
        here, d = range(len(r)), document
        found.append([[sum(r[j] for j in here if j < i and d[j] == d[i]) if r[i] else -1 for i in here],
                      [sum(r[j] and p[j] for j in here if j > i and d[j] == d[i]) if r[i] and p[i] else -1 for i in here]])
    return torch.tensor(found).transpose(0, 1)


def test_places_are_what_counting_one_by_one_gives():
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        real, starts, prompt = (torch.rand(3, 9, generator=draw) < p for p in (0.8, 0.25, 0.6))
        starts[:, 0] = False
        assert torch.equal(places(real, starts, prompt), slow(real, starts, prompt))
        trained = torch.rand(3, 9, generator=draw) < 0.3
        document = starts.cumsum(1)
        first = torch.tensor([[not any(t[j] and d[j] == d[i] for j in range(i + 1)) for i in range(9)]
                              for t, d in zip(trained.tolist(), document.tolist(), strict=True)])
        assert torch.equal(before_first(trained, starts), first)


@pytest.mark.parametrize("first, last", [(2, 0), (0, 2), (2, 2), (7, 7)])
def test_only_the_first_and_last_tokens_of_the_prompt_are_changed(first, last):
    model = tiny("llama", F64)
    fill(attach(model).add("a", LoReFT(rank=4, first=first, last=last, targets=r"\.1\.block")), seed=1)
    x, mask = ids(2, 10), torch.zeros(2, 10, dtype=torch.bool)
    mask[0, :6], mask[1, :9] = True, True
    with torch.no_grad():
        def hidden(name):
            return model(x, adapter_ids=name, prompt_mask=mask, output_hidden_states=True).hidden_states[-1]
        changed = (hidden("a") - hidden(())).abs().amax(-1) > 1e-6
    for row, prompt in enumerate((6, 9)):
        wanted = {i for i in range(10) if i < first or prompt - last <= i < prompt}
        assert {i for i in range(10) if changed[row, i]} == wanted


def test_labels_name_the_prompt_as_the_trainer_does():
    model = tiny("llama", F64)
    attached(model, "reft", scale=0.3)
    x = ids(2, 10)
    mask = torch.arange(10)[None] < torch.tensor([[4], [7]])
    by_mask = model(x, adapter_ids="reft", prompt_mask=mask).logits
    by_labels = model(x, adapter_ids="reft", labels=x.masked_fill(mask, -100)).logits
    assert difference(by_mask, by_labels) <= EXACT
    assert difference(by_mask, model(x, adapter_ids="reft").logits) > 1e-3
