"""What every method promises on every family, generated from the registries: a new method file is covered without a line here.

Where each promise is tested, over METHOD_CASES (tests/tiny.py) and the families:

    a new adapter changes nothing                                   test_core
    a mixed batch is each row alone, logits and gradients           test_core
    every trained tensor gets a gradient; the base keeps its bits   test_core (one step), here (steps, and what is kept beside)
    left padding = right padding = none; cache = none; beams        test_core
    checkpointing = none, re-entrant and not                        test_core
    deepcopy; state_dict keys; save_pretrained                      test_core
    bfloat16 and autocast                                           test_core
    merged = forward, unmerged = original bits                      test_merge (a cycle), here (fifty, beside another)
    saved = loaded                                                  test_formats, test_peft
    accumulated = one batch; packed = padded, as training steps     test_step
    packed = separate, logits                                       here
    gradient = central differences                                  here
    compiled = eager, logits and gradients                          here (routes: test_core; each alone: test_capabilities)
    threads                                                         here (the route itself: test_core)
    nothing is drawn from the global generator                      here
"""
import random
import threading

import pytest
import torch
from tiny import EXACT, LOOSER, METHOD_CASES, SPECS, attached, difference, fill, fit, ids, tiny
from torch.nn import functional as F

from tsugiki.adapters import attach
from tsugiki.edit import Edit
from tsugiki.route import token_keys
from tsugiki.sites import FAMILIES, decoder_layers
from tsugiki.train.layout import packs

F64 = torch.float64
family = pytest.mark.parametrize("kind", FAMILIES)
few_families = pytest.mark.parametrize("kind", ["llama", "gpt2", "phi3", "bloom"])
PLAIN = [n for n, c in METHOD_CASES.items() if not any(part.edit.virtual for part in c.parts)]
MERGEABLE = [n for n, c in METHOD_CASES.items() if all(part.edit.merge is not Edit.merge for part in c.parts)]


def one_layer(kind, dtype=F64):
    key = "n_layer" if "n_layer" in SPECS[kind] else "num_hidden_layers"
    return tiny(kind, dtype, **{key: 1})


def losses(model, x, **kwargs):
    """(B,) the loss of each row."""
    logits = model(input_ids=x, use_cache=False, **kwargs).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none").mean(1)


def grown(adapters, x, who, **kwargs):
    """Gradients of one batch, by (adapter, tensor)."""
    losses(adapters.model, x, adapter_ids=who, **kwargs).sum().backward()
    found = {(n, k): p.grad.clone() for n in set(who) for k, p in adapters.get(n).parameters().items()}
    adapters.model.zero_grad()
    return found


ROUNDS = {*LOOSER, "mixtral"}                         # families that compute something in float32 (Mixtral its router's softmax)


@pytest.mark.share(2)
@pytest.mark.parametrize("kind", [k for k in FAMILIES if k not in ROUNDS])
def test_every_gradient_is_that_of_central_differences(kind):
    """In a random direction through each trained tensor. All methods at once: row i uses method i alone, so it answers for it."""
    model, who, step = one_layer(kind), list(METHOD_CASES), 1e-5
    adapters = attached(model, scale=0.05)
    x = ids(len(who), 7)
    exact = grown(adapters, x, who)
    for edit in (e for n in who for _, e in adapters.get(n).edits.values()):
        for name in edit.constants:                   # what the method's gradient does not pass, as its paper has it
            value = getattr(edit, name)()
            object.__setattr__(edit, name, lambda value=value: value)
    tensors = {n: list(adapters.get(n).parameters().items()) for n in who}
    generator = torch.Generator().manual_seed(5)
    for j in range(max(map(len, tensors.values()))):                          # the j-th tensor of each
        here = {n: t[j] for n, t in tensors.items() if j < len(t)}
        ways = {n: F.normalize(torch.randn(p.numel(), generator=generator, dtype=F64), dim=0).view_as(p)
                for n, (_, p) in here.items()}
        found = []
        with torch.no_grad():
            for sign in (1, -2):
                for n, (_, p) in here.items():
                    p.add_(ways[n], alpha=sign * step)
                found.append(losses(model, x, adapter_ids=who))
            for n, (_, p) in here.items():
                p.add_(ways[n], alpha=step)
        measured = (found[0] - found[1]) / (2 * step)
        for n, (key, _) in here.items():
            size, slope = float(exact[n, key].norm()), float((exact[n, key] * ways[n]).sum())
            error = abs(slope - float(measured[who.index(n)]))
            assert size > 0 and error <= 1e-6 * size + 1e-9, f"{n}: {key}: {error / size:.1e} of the gradient"


@family
def test_documents_packed_into_a_row_are_as_alone(kind):
    model = tiny(kind, F64)
    if not packs(model):
        pytest.skip("this family takes no positions, so its rows are not packed")
    attached(model)
    first, second = ids(len(PLAIN), 6), ids(len(PLAIN), 5, seed=1)
    positions = torch.cat([torch.arange(6), torch.arange(5)]).expand(len(PLAIN), -1)
    with torch.no_grad():
        row = model(torch.cat([first, second], 1), position_ids=positions, adapter_ids=PLAIN, use_cache=False).logits
        alone = torch.cat([model(x, adapter_ids=PLAIN, use_cache=False).logits for x in (first, second)], 1)
        base = torch.cat([model(x, adapter_ids=(), use_cache=False).logits for x in (first, second)], 1)
    for i, name in enumerate(PLAIN):
        assert difference(row[i], alone[i]) <= LOOSER.get(kind, EXACT), name
        assert difference(alone[i], base[i]) > 1e-4, name


@few_families
def test_a_hundred_merges_of_every_method_leave_the_original_bits(kind):
    model = one_layer(kind, torch.bfloat16)
    adapters = attached(model, *MERGEABLE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    order = random.Random(3)
    for name in MERGEABLE:
        adapters.merge(name)
        changed = [k for k, v in model.state_dict().items() if k not in before or not torch.equal(v, before[k])]
        assert changed, f"{name} changed nothing"
        other = order.choice(MERGEABLE)               # beside another, taken out in either order
        for _ in range(50 if kind == "llama" else 5):
            if other != name:
                adapters.merge(other)
            for leaving in order.sample([n for n in {name: 0, other: 0}], 2 if other != name else 1):
                adapters.unmerge(leaving)
            adapters.merge(name)
        adapters.unmerge(name)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items()), name


@pytest.mark.share(3)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_compiled_layers_give_the_logits_and_gradients_of_eager_for_every_method(kind):
    """In one batch, each method on a row of its own: one trace goes through the code of all."""
    torch._dynamo.reset()
    model, graphs = one_layer(kind).train(), []
    adapters = attached(model, scale=0.05)
    x, who = ids(len(METHOD_CASES)), list(METHOD_CASES)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    plain, eager = grown(adapters, x, who), losses(model, x, adapter_ids=who).detach()
    for layer in decoder_layers(model):
        layer.compile(fullgraph=True, backend=backend)
    whole = losses(model, x, adapter_ids=who).detach()
    for i, name in enumerate(who):
        assert difference(whole[i], eager[i]) <= EXACT, name
    for key, gradient in grown(adapters, x, who).items():
        assert difference(gradient, plain[key]) <= EXACT, key
    assert graphs, "nothing was compiled"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_two_threads_with_two_adapters_of_every_method_never_mix(kind):
    model = tiny(kind, F64)
    adapters = attach(model)
    teams = {0: [], 1: []}
    for seed, team in teams.items():
        for name, cfg in METHOD_CASES.items():
            fill(adapters.add(f"{name}.{seed}", fit(adapters, cfg), seed=seed), seed=10 + seed)
            team.append(f"{name}.{seed}")
    x, wrong = ids(len(METHOD_CASES)), []

    def both(team):
        """Logits, and gradients of the team's tensors, without touching .grad, which threads share."""
        params = adapters.parameters(*team)
        loss = losses(model, x, adapter_ids=team)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), params)]
    right = {seed: both(team) for seed, team in teams.items()}
    assert (right[0][0] - right[1][0]).abs().min() > 1e-6
    gate = threading.Barrier(2)

    def work(seed):
        gate.wait()
        for _ in range(3):
            if not all(torch.equal(a, b) for a, b in zip(both(teams[seed]), right[seed], strict=True)):
                wrong.append(seed)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in teams]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@family
def test_nothing_is_drawn_from_the_global_generators_and_starts_are_repeatable(kind):
    model = tiny(kind).train()
    adapters = attach(model)
    x, keys = ids(1), token_keys(0, 1, torch.zeros(1, 10, dtype=torch.long), torch.arange(10)[None])
    for name, cfg in METHOD_CASES.items():
        torch.manual_seed(1)
        state, pythons = torch.random.get_rng_state(), random.getstate()
        first = adapters.add(name, cfg := fit(adapters, cfg))
        losses(model, x, adapter_ids=name, token_keys=keys).sum().backward()
        assert torch.equal(state, torch.random.get_rng_state()) and random.getstate() == pythons, f"{name} drew from it"
        torch.manual_seed(2)
        again = adapters.add("again", cfg)
        assert first.tensors().keys() == again.tensors().keys()
        assert all(torch.equal(a, b) for a, b in zip(first.tensors().values(), again.tensors().values(), strict=True)), name
        adapters.remove("again")


@few_families
def test_steps_change_every_trained_tensor_and_no_other(kind):
    """Three updates of AdamW: the base and what an adapter keeps without training it stay as they are, bit for bit."""
    model = tiny(kind).train()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    adapters = attached(model, scale=0.02)
    who = list(METHOD_CASES)
    kept = {n: {k: t.clone() for k, t in adapters.get(n).buffers().items()} for n in who}
    start = {(n, k): p.detach().clone() for n in who for k, p in adapters.get(n).parameters().items()}
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-3)
    for seed in range(3):
        losses(model, ids(len(who), seed=seed), adapter_ids=who).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for n in who:
        for k, p in adapters.get(n).parameters().items():
            assert not torch.equal(p, start[n, k]), f"{n}: {k}"
        for k, t in adapters.get(n).buffers().items():
            assert torch.equal(t, kept[n][k]), f"{n}: {k}"
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
