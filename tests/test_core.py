"""The promises of the core, over every method and family: one batch equals each row alone, and the base stays the base."""
import copy
import inspect
import threading

import pytest
import torch
from tiny import EXACT, LOOSER, METHOD_CASES, attached, difference, fill, fit, ids, tiny
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tsugiki.adapters import attach
from tsugiki.edit import Edit
from tsugiki.errors import UserError
from tsugiki.methods import METHODS, BitFit, Full, LoRA, make
from tsugiki.route import cell, token_keys
from tsugiki.sites import FAMILIES

F64 = torch.float64
family = pytest.mark.parametrize("kind", FAMILIES)
method = pytest.mark.parametrize("name", METHOD_CASES)


def has_positions(model):
    return "position_ids" in inspect.signature(type(model).forward).parameters


def padded(model, rows, side, length):
    """Rows of token lists as one padded batch, with positions as transformers' generate gives them."""
    out, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        out[i, at], mask[i, at] = row, 1
    batch = {"input_ids": out, "attention_mask": mask}
    if has_positions(model):
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return batch


def row_losses(model, x, **kwargs):
    logits = model(input_ids=x, use_cache=False, **kwargs).logits
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none").mean(1)


def gradients(adapters):
    every = {(n, k): p for n in adapters.names() for k, p in adapters.get(n).parameters().items()}
    found = {key: p.grad.clone() for key, p in every.items() if p.grad is not None}
    adapters.model.zero_grad()
    return found


def worst(a, b):
    assert a.keys() == b.keys()
    return max(difference(a[k], b[k]) for k in a)


@family
def test_a_new_adapter_of_an_identity_method_changes_nothing(kind):
    model = tiny(kind)
    base = model(input_ids=ids(2)).logits
    adapters = attach(model)
    for name, cfg in METHOD_CASES.items():
        promised = all(edit.starts_as_identity for _, edit in adapters.add(name, fit(adapters, cfg)).edits.values())
        assert torch.equal(model(input_ids=ids(2), adapter_ids=name).logits, base) or not promised, name


@family
def test_one_batch_of_every_method_equals_each_row_alone(kind):
    """Logits and gradients; rows: each method, the base, a stack of two, and the first method again (rows apart)."""
    model = tiny(kind, F64)
    x = ids(len(METHOD_CASES) + 3)
    with torch.no_grad():
        base = model(input_ids=x).logits
    adapters = attached(model)
    who = [*METHOD_CASES, None, ("lora", "bitfit"), next(iter(METHOD_CASES))]
    with torch.no_grad():
        together = model(input_ids=x, adapter_ids=who).logits
        for i, name in enumerate(who):
            alone = model(input_ids=x[i:i + 1], adapter_ids=[name]).logits[0]
            assert difference(together[i], alone) <= LOOSER.get(kind, EXACT), name
            assert (difference(alone, base[i]) > 1e-4) == (name is not None), name
    row_losses(model, x, adapter_ids=who).sum().backward()
    joint = gradients(adapters)
    for i, name in enumerate(who):
        if name is not None:
            row_losses(model, x[i:i + 1], adapter_ids=[name]).sum().backward()
    alone = gradients(adapters)
    assert worst(joint, alone) <= LOOSER.get(kind, EXACT)
    every = {(n, k) for n in adapters.names() for k in adapters.get(n).parameters()}
    assert joint.keys() == every, "a trained tensor got no gradient"
    assert all(float(g.abs().max()) > 0 for g in joint.values())


@family
def test_only_the_adapter_trains_and_the_base_keeps_its_bits(kind):
    model = tiny(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapters = attached(model, scale=0.02)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    start = [p.detach().clone() for p in adapters.parameters()]
    row_losses(model, ids(len(METHOD_CASES)), adapter_ids=list(METHOD_CASES)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(start, adapters.parameters(), strict=True))
    assert all(p.grad is None for n, p in model.named_parameters() if n in before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@family
def test_left_padding_right_padding_and_none_agree(kind):
    model = tiny(kind, F64)
    adapters = attached(model)
    rows = [ids(1, n, seed=n)[0] for n in (6, 9, 4)]
    for name in adapters.names():
        with torch.no_grad():
            left = model(**padded(model, rows, "left", 9), adapter_ids=name).logits
            right = model(**padded(model, rows, "right", 9), adapter_ids=name).logits
            for i, row in enumerate(rows):
                alone = model(input_ids=row[None], adapter_ids=name).logits[0]
                assert difference(left[i, 9 - len(row):], alone) <= LOOSER.get(kind, EXACT), (name, "left")
                assert difference(right[i, :len(row)], alone) <= LOOSER.get(kind, EXACT), (name, "right")


@pytest.mark.share(3)
@family
def test_generate_in_one_left_padded_batch_equals_alone_with_and_without_cache_and_with_beams(kind):
    model = tiny(kind, F64)
    adapters = attached(model, scale=0.3)
    who = [*adapters.names(), None]
    rows = [ids(1, 4 + i % 3, seed=i)[0] for i in range(len(who))]
    batch = padded(model, rows, "left", 6)
    batch.pop("position_ids", None)
    plain = dict(max_new_tokens=5, do_sample=False)
    together = model.generate(**batch, adapter_ids=who, **plain)
    assert torch.equal(together, model.generate(**batch, adapter_ids=who, use_cache=False, **plain))
    with adapters.use(who):
        assert torch.equal(together, model.generate(**batch, **plain))
        beams = model.generate(**batch, num_beams=3, **plain)
    for i, name in enumerate(who):
        one = dict(input_ids=rows[i][None], attention_mask=torch.ones(1, len(rows[i]), dtype=torch.long), adapter_ids=[name])
        for found, options in ((together, {}), (beams, {"num_beams": 3})):
            alone, row = model.generate(**one, **plain, **options)[0, len(rows[i]):], found[i, 6:]
            assert torch.equal(row[:len(alone)], alone) and set(row[len(alone):].tolist()) <= {0, 2}, (name, options)     # pad, eos
    assert not torch.equal(together[:-1, 6:], model.generate(**batch, adapter_ids=[None] * len(who), **plain)[:-1, 6:])


@pytest.mark.share(5)
@family
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_exact_with_two_forwards_before_a_backward(kind, reentrant):
    model = tiny(kind, F64).train()
    adapters = attached(model, scale=0.05)
    x, who = ids(len(METHOD_CASES)), list(METHOD_CASES)
    row_losses(model, x, adapter_ids=who).sum().backward()
    plain = gradients(adapters)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    first = row_losses(model, x, adapter_ids=who)
    second = row_losses(model, x.flip(0), adapter_ids=who[::-1])
    first.sum().backward()
    assert worst(plain, gradients(adapters)) <= EXACT
    second.sum().backward()                           # the same rows in another order: the same gradients
    assert worst(plain, gradients(adapters)) <= EXACT
    with adapters.use(who):                           # the choice has ended when backward replays the layers
        third = row_losses(model, x)
    third.sum().backward()
    assert worst(plain, gradients(adapters)) <= EXACT


def test_threads_never_see_each_others_adapters():
    model = tiny("llama", F64)
    adapters = attached(model, "lora", "bitfit")
    adapters.active = None
    x, failed = ids(2), []
    with torch.no_grad():
        right = {n: model(input_ids=x, adapter_ids=n).logits for n in ("lora", "bitfit", ())}
    gate = threading.Barrier(3)

    def work(name, inside):
        gate.wait()
        for i in range(200):
            with torch.no_grad():
                if inside and i % 2:
                    with adapters.use(name):
                        out = model(input_ids=x).logits
                else:
                    out = model(input_ids=x, adapter_ids=name).logits if name or i % 2 else model(input_ids=x).logits
            if not torch.equal(out, right[name]):
                failed.append(name)
    threads = [threading.Thread(target=work, args=a) for a in (("lora", True), ("bitfit", True), ((), False))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed and difference(right["lora"], right["bitfit"]) > 1e-3


@pytest.mark.share(4)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "phi3"])
def test_layers_compile_whole_and_equal_eager_in_every_route(kind):
    torch._dynamo.reset()
    model = tiny(kind, F64)
    adapters = attached(model, "lora", "bitfit", "prefix", "dora", "pissa")
    fill(adapters.add("dropped", LoRA(dropout=0.3)))
    keys = token_keys(0, 1, torch.arange(3)[:, None].expand(3, 10), torch.arange(10).expand(3, 10))
    layers, x, graphs = model.get_submodule(FAMILIES[kind].layers), ids(3), []
    routes = ("lora", ["lora", None, "bitfit"], ["bitfit", "lora", ("lora", "bitfit")], ["prefix"] * 3, "dora",
              ["pissa", "dora", None])
    calls = [dict(adapter_ids=r) for r in routes]
    calls.append(dict(adapter_ids="dropped", token_keys=keys))

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    with torch.no_grad():
        eager = [model(input_ids=x, use_cache=False, **call).logits for call in calls]
        for layer in layers:
            layer.compile(fullgraph=True, backend=backend)
        for n, (call, expected) in enumerate(zip(calls, eager, strict=True)):
            assert difference(model(input_ids=x, use_cache=False, **call).logits, expected) <= EXACT
            assert len(graphs) == n + 1, "one graph must serve every layer"
        for call in calls:
            model(input_ids=x, use_cache=False, **call)
        assert len(graphs) == len(calls), "a route seen before was compiled again"
        fill(adapters.add("late", LoRA(targets="linear")), seed=9)
        late = model(input_ids=x, use_cache=False, adapter_ids="late").logits
        for layer in layers:
            layer._compiled_call_impl = None
        assert difference(model(input_ids=x, use_cache=False, adapter_ids="late").logits, late) <= EXACT
    assert difference(late, eager[0]) > 1e-3


def test_training_with_compiled_layers_equals_eager():
    torch._dynamo.reset()
    model = tiny("llama", F64).train()
    adapters = attached(model, "lora", scale=0.05)
    row_losses(model, ids(3)).sum().backward()
    plain = gradients(adapters)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    row_losses(model, ids(3)).sum().backward()
    assert worst(plain, gradients(adapters)) <= EXACT


@family
def test_the_models_state_dict_is_the_bases(kind, tmp_path):
    base, model = tiny(kind), tiny(kind)
    keys = list(base.state_dict())
    adapters = attached(model)
    assert type(model) is type(base) and list(model.state_dict()) == keys
    noise = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in base.state_dict().items()}
    kept = [p.detach().clone() for p in adapters.parameters()]
    assert model.load_state_dict(noise, strict=True) and base.load_state_dict(noise, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, adapters.parameters(), strict=True))
    missing = dict(list(noise.items())[1:])
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(missing, strict=True)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(plain.state_dict()) == keys
    assert torch.equal(plain.eval()(input_ids=ids(2)).logits, model(input_ids=ids(2), adapter_ids=()).logits)


@family
def test_a_deep_copy_works_and_is_independent(kind):
    model = tiny(kind)
    adapters = attached(model)
    who, x = list(METHOD_CASES), ids(len(METHOD_CASES))
    with torch.no_grad():
        right = model(input_ids=x, adapter_ids=who).logits
        twin = copy.deepcopy(model)
        assert twin.adapters is not adapters and twin.adapters.model is twin
        assert torch.equal(twin(input_ids=x, adapter_ids=who).logits, right)
        for p in twin.parameters():
            p.zero_()
        twin.adapters.remove(who[0])
        assert torch.equal(model(input_ids=x, adapter_ids=who).logits, right)
        with adapters.use(who[0]), pytest.raises(UserError, match="no adapter"):
            twin(input_ids=x, adapter_ids=who)
        assert not twin.generate(input_ids=x, max_new_tokens=1, adapter_ids=[None] * len(x))[:, -1].any()


def test_a_copy_of_a_merged_model_unmerges_by_itself():
    model = tiny("gpt2", F64)
    base = model(input_ids=ids(2)).logits
    adapters = attached(model, "lora")
    adapters.merge("lora")
    twin = copy.deepcopy(model)
    twin.adapters.unmerge("lora")
    assert torch.equal(twin(input_ids=ids(2), adapter_ids=()).logits, base)
    assert difference(model(input_ids=ids(2)).logits, base) > 1e-3


def test_attaching_twice_gives_the_same_adapters():
    model = tiny("llama")
    adapters = attach(model)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert attach(model) is adapters is model.adapters
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_first_adapter_is_the_default_and_can_be_changed():
    model = tiny("llama", F64)
    base = model(input_ids=ids(2)).logits
    adapters = attached(model, "lora", "bitfit")
    out = {n: model(input_ids=ids(2), adapter_ids=n).logits for n in ("lora", "bitfit")}
    assert adapters.active == ("lora",) and torch.equal(model(ids(2)).logits, out["lora"])
    adapters.active = "bitfit"
    assert torch.equal(model(ids(2)).logits, out["bitfit"])
    with adapters.use(None):
        assert torch.equal(model(ids(2)).logits, base)
        with adapters.use("lora"):
            assert torch.equal(model(ids(2)).logits, out["lora"])
        assert torch.equal(model(ids(2)).logits, base)
    adapters.remove("bitfit")
    assert adapters.active == () and torch.equal(model(ids(2)).logits, base)


def test_the_model_inside_uses_the_same_adapters_as_the_model():
    """Some trainers call model.model and compute the loss from hidden states themselves."""
    model = tiny("llama", F64).train()
    adapters = attached(model, "lora", "bitfit", scale=0.05)
    x, who = ids(2), ["bitfit", "lora"]
    with adapters.use(who):
        through = model.lm_head(model.model(input_ids=x).last_hidden_state)
    assert torch.equal(through, model(input_ids=x, adapter_ids=who).logits)
    assert torch.equal(model.lm_head(model.model(x).last_hidden_state), model(input_ids=x).logits)
    model(input_ids=x, labels=x).loss.backward()
    plain = gradients(adapters)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    logits = model.lm_head(model.model(input_ids=x, use_cache=False).last_hidden_state)
    adapters.active = "bitfit"
    model.loss_function(logits, x, vocab_size=200).backward()
    assert worst(plain, gradients(adapters)) <= EXACT


def test_a_forward_that_raises_leaves_no_route_behind():
    model = tiny("llama")
    adapters = attached(model, "lora", "prefix")
    for bad in (dict(input_ids=torch.tensor([[999]])), dict(input_ids=ids(2), adapter_ids=["lora"] * 3), dict()):
        with pytest.raises((IndexError, UserError)):
            model(**{"adapter_ids": "prefix"} | bad)
        assert cell.ctx is None

    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop
    handle = model.lm_head.register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        model(input_ids=ids(2), adapter_ids="lora")
    handle.remove()
    model(input_ids=ids(2), adapter_ids="lora")       # drops what the interrupted forward left
    assert cell.ctx is None
    assert adapters.names() == ("lora", "prefix")


def test_a_stack_applies_its_adapters_in_each_rows_own_order():
    class Times(Edit):
        def __init__(self, cfg, site, start):
            super().__init__(cfg, site, start)
            self.by = start.parameter("by", 1, fill=lambda t, g: t.fill_(1.5))

        def post(self, x, y, ctx):
            return y * self.by.to(y.dtype)
    scale = type("Scale", (BitFit,), {"name": "scale", "edit": Times})
    model = tiny("llama", F64)
    adapters = attached(model, "bitfit")
    adapters.add("scale", scale())
    x, who = ids(3), [("scale", "bitfit"), ("bitfit", "scale"), "scale"]
    together = model(input_ids=x, adapter_ids=who).logits
    for i, row in enumerate(who):
        assert difference(together[i], model(input_ids=x[i:i + 1], adapter_ids=[row]).logits[0]) <= EXACT
    assert difference(together[:1], model(input_ids=x[:1], adapter_ids=who[1]).logits) > 1e-3


def test_bad_adapter_choices_are_one_line():
    model = tiny("llama")
    adapters = attached(model, "lora", "bitfit")
    for wanted, says in ((["lora"] * 3, "3 entries for a batch of 2 rows"), ("lorra", "did you mean 'lora'"),
                         ([], "0 entries"), (("lora", "lora"), "names an adapter twice"), ([None, "x"], "attached: lora, bitfit")):
        with pytest.raises(UserError) as e:
            model(input_ids=ids(2), adapter_ids=wanted)
        assert says in str(e.value) and "\n" not in str(e.value)
    for name in ("", "a/b", "../x", "-a", ".a", "a b", "x" * 101, None, "lora"):
        with pytest.raises(UserError, match="adapter"):
            adapters.add(name, LoRA())
    for name in ("train", "eval", "keys", "v1.0-beta", "to", "0"):    # names that torch's containers would refuse
        fill(adapters.add(name, LoRA()), seed=5)
        assert model(input_ids=ids(2), adapter_ids=[name, None]).logits.shape == (2, 10, 200)
    adapters.remove("v1.0-beta")
    with pytest.raises(UserError, match="not a method that adds an adapter"):
        adapters.add("f", Full())


def test_start_values_depend_on_seed_and_site_and_on_nothing_else():
    first, second = attach(tiny("llama")), attach(tiny("llama"))
    a = first.add("a", LoRA(rank=4)).parameters()
    state = torch.random.get_rng_state()
    second.add("z", LoRA(rank=4, targets=("v", "q")))
    second.add("b", LoRA(rank=2), seed=3)
    b = second.add("other", LoRA(rank=4)).parameters()
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator was used"
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()
    other = second.add("seeded", LoRA(rank=4), seed=1).parameters()
    names = [k for k in a if k.endswith(".A")]
    assert all(not torch.equal(a[k], other[k]) for k in names)
    assert not torch.equal(a[names[0]], a[names[3]])


def drop(kind="llama", p=0.4, dtype=F64):
    model = tiny(kind, dtype)
    adapters = attach(model)
    fill(adapters.add("a", LoRA(rank=4, dropout=p)), seed=1)
    fill(adapters.add("b", LoRA(rank=2, dropout=p)), seed=2)
    return model


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "falcon"])
def test_dropout_with_token_keys_follows_the_token_whatever_the_batch(kind):
    model = drop(kind)
    x = ids(4)
    samples, positions = torch.arange(4)[:, None].expand(4, 10), torch.arange(10).expand(4, 10)
    keys = token_keys(7, 3, samples, positions)
    who = ["a", "b", "a", None]
    state = torch.random.get_rng_state()
    together = model(input_ids=x, adapter_ids=who, token_keys=keys).logits
    for order in ([2, 0, 3, 1], [1], [3, 0]):
        part = model(input_ids=x[order], adapter_ids=[who[i] for i in order], token_keys=keys[order]).logits
        assert difference(part, together[order]) <= EXACT
    wide = F.pad(x, (3, 0)), F.pad(keys, (3, 0)), F.pad(torch.ones_like(x), (3, 0))
    extra = {"position_ids": F.pad(positions, (3, 0))} if has_positions(model) else {}
    left = model(input_ids=wide[0], token_keys=wide[1], attention_mask=wide[2], adapter_ids=who, **extra).logits[:, 3:]
    assert difference(left, together) <= EXACT
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator was used"
    for changed in (token_keys(8, 3, samples, positions), token_keys(7, 4, samples, positions),
                    token_keys(7, 3, samples + 9, positions), token_keys(7, 3, samples, positions + 1)):
        assert difference(model(input_ids=x, adapter_ids=who, token_keys=changed).logits[:3], together[:3]) > 1e-3
    assert difference(model(input_ids=x, adapter_ids=who).logits[:3], together[:3]) > 1e-3      # eval, no keys: no dropout


def test_dropout_masks_are_random_over_tokens_features_and_sites():
    from tsugiki.route import Context, dropout
    keys = token_keys(0, 0, torch.arange(64)[:, None].expand(64, 64), torch.arange(64).expand(64, 64))
    assert keys.unique().numel() == keys.numel()
    ones = torch.ones(64, 64, 96, dtype=F64)
    kept = torch.stack([dropout(ones, 0.3, Context(keys=keys), torch.tensor(salt), False) for salt in (11, 12)])
    mask = (kept != 0).double()
    assert difference(kept[kept != 0], torch.tensor(1 / 0.7, dtype=F64)) < 1e-12
    assert abs(float(mask.mean()) - 0.7) < 2e-3
    for axis in (1, 2, 3):                            # over rows, positions and features: no line is unlike the others
        spread = mask.mean(dim=[d for d in range(4) if d != axis]).std()
        assert float(spread) < 3 * (0.21 / (mask.numel() / mask.shape[axis])) ** 0.5, axis
    centred = mask - 0.7
    for a, b in ((centred[0], centred[1]), (centred[:, 1:], centred[:, :-1]), (centred[:, :, 1:], centred[:, :, :-1]),
                 (centred[..., 1:], centred[..., :-1])):
        assert abs(float((a * b).mean()) / 0.21) < 0.01
    columns = centred[0].reshape(-1, 96)
    correlation = (columns.T @ columns / len(columns) / 0.21).fill_diagonal_(0).abs().max()
    assert float(correlation) < 6 / len(columns) ** 0.5


def test_dropout_without_keys_is_torchs_own_and_only_in_training():
    model = drop()
    x = ids(2)
    assert torch.equal(model(x, adapter_ids="a").logits, model(x, adapter_ids="a").logits)
    model.train()
    assert difference(model(x, adapter_ids="a").logits, model(x, adapter_ids="a").logits) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma2", "falcon"])
def test_float32_adapters_on_a_bfloat16_base_compute_in_bfloat16(kind):
    model = tiny(kind, torch.bfloat16)
    adapters = attached(model, scale=0.02)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    x, who = ids(len(METHOD_CASES)), list(METHOD_CASES)
    seen = []
    for m in model.modules():
        if type(m).__name__ in ("Linear", "Conv1D", "FalconLinear"):
            m.register_forward_hook(lambda m, a, y: seen.append((a[0].dtype, y.dtype)))
    out = model(input_ids=x, adapter_ids=who, labels=x)
    out.loss.backward()
    assert {d for pair in seen for d in pair} == {torch.bfloat16} and out.logits.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.parameters())


def test_autocast_works_over_a_float32_base():
    model = tiny("llama")
    adapters = attached(model, scale=0.02)
    x, who = ids(len(METHOD_CASES)), list(METHOD_CASES)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(input_ids=x, adapter_ids=who, labels=x)
    low.loss.backward()
    assert all(p.grad is not None for p in adapters.parameters())
    assert difference(low.logits.float(), model(input_ids=x, adapter_ids=who).logits) < 0.2


@pytest.mark.parametrize("values, says", [
    (dict(rank=0), "lora: rank must be at least 1, got 0"), (dict(rank="8"), "lora: rank must be a whole number, got '8'"),
    (dict(rank=True), "must be a whole number"), (dict(rank=8.5), "must be a whole number"), (dict(dropout=1), "must be below 1.0"),
    (dict(dropout=-0.1), "at least 0.0"), (dict(dropout=float("nan")), "must be a number"),
    (dict(alpha=float("inf")), "must be a number"), (dict(alpha=None), "must be a number"),
    (dict(targets=3), "must be a list of texts or text"), (dict(targets=[]), "must be a list"),
    (dict(rslora="yes"), "true or false"),
    (dict(rnak=4), "did you mean 'rank'"), (dict(targets=["q", 1]), "must be a list of texts")])
def test_a_wrong_setting_is_one_line(values, says):
    with pytest.raises(UserError) as e:
        make("lora", **values)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_methods_are_found_and_made_by_name():
    assert {"lora", "bitfit", "full", "prompt", "prefix"} <= METHODS.keys()
    assert make("lora", rank=4, targets=["q", "v"]) == LoRA(rank=4, targets=("q", "v")) and make("lora", alpha=8).alpha == 8.0
    with pytest.raises(UserError, match="did you mean 'lora'"):
        make("lorra")
    for cls in METHODS.values():
        assert 0 < cls.lr < 1 and cls.__doc__


@family
def test_full_fine_tuning_selects_all_layers_by_number_or_names_by_regex(kind):
    model = tiny(kind)
    whole = Full().select(model)
    assert {id(p) for p in whole.values()} == {id(p) for p in model.parameters()} and len(whole) == len(list(model.parameters()))
    path = FAMILIES[kind].layers
    assert set(Full(first=1).select(model)) == {n for n in whole if n.startswith(f"{path}.0.")} != set()
    assert set(Full(last=1).select(model)) == {n for n in whole if n.startswith(f"{path}.1.")}
    assert set(Full(first=1, last=1).select(model)) == {n for n in whole if n.startswith(f"{path}.")}
    head = Full(params=r"^lm_head\.weight$").select(model)
    assert len(head) == 1 and next(iter(head.values())) is model.get_output_embeddings().weight     # tied or not
    attached(model)
    assert Full().select(model).keys() == whole.keys()
    for cfg, says in ((dict(params="nothing"), "no parameter name matches"), (dict(last=3), "the model has 2 layers"),
                      (dict(first=0), "at least 1"), (dict(params="("), "not a regular expression"),
                      (dict(params="a", last=1), "exclude each other")):
        with pytest.raises(UserError, match=says):
            Full(**cfg).select(model)


@pytest.mark.share(2)
@method
def test_removing_an_adapter_leaves_the_base_and_the_others(name):
    model = tiny("gemma2", F64)
    count = len(list(model.parameters()))
    base = model(input_ids=ids(2)).logits
    adapters = attached(model)
    others = [n for n in METHOD_CASES if n != name]
    right = {n: model(input_ids=ids(2), adapter_ids=n).logits for n in others}
    adapters.remove(name)
    assert all(torch.equal(model(input_ids=ids(2), adapter_ids=n).logits, right[n]) for n in others)
    for n in others:
        adapters.remove(n)
    assert torch.equal(model(input_ids=ids(2)).logits, base) and len(list(model.parameters())) == count
