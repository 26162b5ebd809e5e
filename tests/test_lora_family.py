"""The LoRA family against its papers' formulas written out densely, and against PEFT run live."""
import math
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_peft import last_names, peft_logits
from tiny import EXACT, METHOD_CASES, difference, fill, ids, tiny
from torch.nn import functional as F

from tsugiki.adapters import attach
from tsugiki.edit import Frozen
from tsugiki.errors import UserError
from tsugiki.methods import DoRA, LoRA, LoRAPlus, OLoRA, PiSSA
from tsugiki.plan import skeleton
from tsugiki.train.optim import adamw

F64 = torch.float64
ROLES = ("q", "v", "down")


# LoRA's own fields

def test_ranks_and_alphas_are_those_of_the_first_pattern_that_matches(tmp_path):
    adapters = attach(tiny("llama"))
    cfg = LoRA(rank=4, alpha=8, ranks={r"q_proj": 2, r"layers\.0\.self_attn\.q_proj": 6},
               alphas={"1.mlp.down_proj": 3, "k_proj": 5})
    edits = {n: e for n, (_, e) in fill(adapters.add("a", cfg)).edits.items()}
    for name, edit in edits.items():
        rank = 2 if name.endswith("q_proj") else 4
        alpha = 3 if name == "model.layers.1.mlp.down_proj" else 5 if name.endswith("k_proj") else 8
        assert edit.A.shape[0] == edit.B.shape[1] == rank and edit.scale == alpha / rank, name
    adapters.save("a", tmp_path)                      # its JSON files sort the keys: the second pattern would come first
    model = tiny("llama")
    again = attach(model).load("a", tmp_path)
    assert all(e.A.shape == edits[n].A.shape and e.scale == edits[n].scale for n, (_, e) in again.edits.items())
    right = model(ids(2)).logits
    assert torch.equal(right, adapters.model(ids(2)).logits)
    assert difference(peft_logits(PeftModel.from_pretrained(tiny("llama"), tmp_path), ids(2)), right) < 1e-5


@pytest.mark.parametrize("values, says", [
    (dict(ranks={"q_proj": 0}), "ranks: q_proj must be at least 1"), (dict(alphas={"q_proj": -1}), "alphas: q_proj must be at"),
    (dict(ranks={"q_prj": 2}), "ranks: 'q_prj' matches no targeted site"), (dict(ranks={"(": 2}), "not a regular expression"),
    (dict(ranks={"(.+)+x": 2}), "repeats what repeats"), (dict(start="orthogonal", rank=3), "needs even ranks"),
    (dict(start="orthogonal", ranks={"q_proj": 3}), "needs even ranks"), (dict(start="zero"), "start must be one of")])
def test_a_bad_pattern_or_start_is_one_line(values, says):
    with pytest.raises(UserError, match=re.escape(says)) as e:
        attach(tiny("llama")).add("a", LoRA(**values))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("start", ["kaiming", "gaussian", "orthogonal"])
def test_each_start_has_pefts_distribution_and_changes_nothing(start):
    model = tiny("llama", F64, hidden_size=256, num_attention_heads=4)
    base, state = model(ids(2)).logits, torch.random.get_rng_state()
    ours = attach(model).add("a", LoRA(rank=8, targets=("q",), start=start)).edits["model.layers.0.self_attn.q_proj"][1]
    assert torch.equal(state, torch.random.get_rng_state()) and difference(model(ids(2)).logits, base) <= EXACT
    init = {"kaiming": True}.get(start, start)
    wrapped = get_peft_model(tiny("llama", hidden_size=256, num_attention_heads=4),
                             LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=init))
    theirs = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    for mine, other in ((ours.A, theirs.lora_A["default"].weight), (ours.B, theirs.lora_B["default"].weight)):
        assert math.isclose(float(mine.std()), float(other.std()), rel_tol=0.15, abs_tol=1e-9)
        rel = 0.02 if start == "kaiming" else 0.5
        assert math.isclose(float(mine.abs().max()), float(other.abs().max()), rel_tol=rel, abs_tol=1e-9)
    assert start != "orthogonal" or float(ours.B.detach().abs().max()) > 0.01


def test_a_bias_is_scaled_like_the_rest_and_merges_where_there_was_none():
    model = tiny("llama", F64)
    adapters = attach(model)
    adapter = fill(adapters.add("a", LoRA(rank=2, bias=True, targets=("o",))))
    site, edit = next(iter(adapter.edits.values()))
    x = torch.randn(3, 5, site.d_in, dtype=F64, generator=torch.Generator().manual_seed(0))
    want = F.linear(x, site.exit.weight + edit.scale * edit.B @ edit.A, edit.scale * edit.b)
    assert difference(site.exit(x), want) <= EXACT and float(edit.b.detach().abs().max()) > 0.01
    adapters.merge("a")
    assert difference(site.exit.bias, edit.scale * edit.b) <= EXACT


# DoRA

def dora_dense(site, edit):
    """Equation 5 with the sum made: (weight, bias)."""
    w = Frozen(site).weight() + edit.scale * edit.B @ edit.A
    return (edit.m / torch.linalg.norm(w, dim=1))[:, None] * w, Frozen(site).bias()


@pytest.mark.parametrize("kind, targets", [("llama", ("q", "down", "head")), ("gpt2", "linear"), ("gpt2", ("q", "v")),
                                           ("phi3", ("k", "up")), ("gpt_neox", ("v", "o")), ("opt", "linear")])
def test_dora_is_equation_5_written_out_and_its_norm_the_dense_one(kind, targets):
    model = tiny(kind, F64)
    adapter = fill(attach(model).add("a", DoRA(rank=3, targets=targets)))
    for site, edit in adapter.edits.values():
        x = torch.randn(2, 5, site.d_in, dtype=F64, generator=torch.Generator().manual_seed(0))
        plain = F.linear(x, Frozen(site).weight(), Frozen(site).bias())
        w, b = dora_dense(site, edit)
        assert difference(edit.post(x, plain, attach(model)._taps[site.name].context()), F.linear(x, w, b)) <= EXACT
        dense = torch.linalg.norm(Frozen(site).weight() + edit.scale * edit.B @ edit.A, dim=1)
        assert difference(edit.norm(), dense) <= EXACT and difference(dense, edit.squares.sqrt()) > 1e-3


@pytest.mark.parametrize("kind, targets", [("llama", "linear"), ("gpt2", "linear"), ("phi3", ("q", "v", "gate"))])
def test_dora_merges_and_stacks_with_others_in_every_order(kind, targets):
    """The norm is always the base's own: what else is merged or stacked does not reach it."""
    model, x = tiny(kind, F64), ids(2)
    adapters = attach(model)
    for i, (name, cfg) in enumerate({"d": DoRA(rank=2, targets=targets), "e": DoRA(rank=3, targets=targets),
                                     "l": LoRA(rank=2, targets=targets, bias=True)}.items()):
        fill(adapters.add(name, cfg), seed=i)
    with torch.no_grad():
        for order in (("d", "l"), ("l", "d"), ("d", "e"), ("l", "d", "e"), ("e", "l", "d")):
            alive = model(x, adapter_ids=order).logits
            for name in order:
                adapters.merge(name)
                assert difference(model(x, adapter_ids=order).logits, alive) <= EXACT, (order, name)
            for name in order:
                adapters.unmerge(name)
        assert difference(model(x, adapter_ids=("d", "l")).logits, model(x, adapter_ids=("l", "d")).logits) > 1e-4


def test_doras_gradients_are_pefts():
    """No gradient through the norm (section 4.3): m, A and B learn as in PEFT."""
    wrapped = get_peft_model(tiny("llama", F64), LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=last_names(
        tiny("llama"), ROLES), task_type="CAUSAL_LM", init_lora_weights=False)).double()
    model = tiny("llama", F64)
    adapter = attach(model).add("a", DoRA(rank=4, alpha=8, targets=ROLES))
    names = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
    theirs = dict(wrapped.named_parameters())
    pairs = {k: theirs[f"base_model.model.{k.rpartition('.')[0]}.{names[k.rpartition('.')[2]]}"] for k in adapter.parameters()}
    with torch.no_grad():
        for key, p in adapter.parameters().items():
            p.copy_(pairs[key])
    for net in (model, wrapped):
        net(input_ids=ids(2), labels=ids(2)).loss.backward()
    for key, p in adapter.parameters().items():
        assert difference(p.grad, pairs[key].grad) <= EXACT and float(p.grad.abs().max()) > 1e-6, key


# LoRA+

def test_loraplus_is_lora_whose_b_has_another_rate():
    cfg = LoRAPlus(rank=2, ratio=8)
    params = attach(tiny("llama")).add("a", cfg).parameters()
    rates = {id(p): g["lr"] for g in adamw(params, 1e-3, 0.0, 0.999, cfg.lr_scale).param_groups for p in g["params"]}
    assert {rates[id(p)] for n, p in params.items() if n.endswith(".B")} == {8e-3}
    assert {rates[id(p)] for n, p in params.items() if n.endswith(".A")} == {1e-3}


# Starts from the weight

@pytest.mark.parametrize("cfg", [PiSSA(rank=4, alpha=6, targets=ROLES), OLoRA(rank=4, alpha=6, targets=ROLES)],
                         ids=["pissa", "olora"])
def test_starts_from_the_weight_are_pefts_and_the_base_keeps_its_bits(cfg, tmp_path):
    model = tiny("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapters = attach(model)
    adapter = adapters.add("a", cfg)
    wrapped = get_peft_model(tiny("llama"), LoraConfig(r=4, lora_alpha=6, init_lora_weights=cfg.name, task_type="CAUSAL_LM",
                                                       target_modules=last_names(model, ROLES)))
    theirs = dict(wrapped.named_modules())
    for name, (site, edit) in adapter.edits.items():
        layer = theirs[f"base_model.model.{name}"]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert difference(edit.B @ edit.A, b @ a) < 1e-6 and float((b @ a).abs().max()) > 1e-3
        assert difference(site.exit.weight - edit.scale * edit.B @ edit.A, layer.base_layer.weight) < 1e-6
    wrapped.save_pretrained(tmp_path / "first")
    train = ((wrapped, list(p for p in wrapped.parameters() if p.requires_grad)), (model, list(adapter.parameters().values())))
    for net, params in train:                         # the two learn alike, and PEFT's conversion gives what we store
        optimizer = torch.optim.SGD(params, lr=0.1)
        for step in range(3):
            net(input_ids=ids(2, seed=step), labels=ids(2, seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    right = model(ids(2)).logits
    assert difference(peft_logits(wrapped, ids(2)), right) < 1e-5 and difference(model(ids(2), adapter_ids=()).logits, right) > 1e-3
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    wrapped.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    for folder in ("theirs", "ours"):
        adapters.save("a", tmp_path / "ours")
        plain = tiny("llama")
        loaded = attach(plain).load("a", tmp_path / folder).cfg
        assert (loaded.name, loaded.rank, loaded.alpha) == ("lora", 8, 12) and difference(plain(ids(2)).logits, right) < 1e-5


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_stored_start_from_the_weight_is_the_same_function(name, rslora, tmp_path):
    model = tiny("gpt2", F64)
    adapters = attach(model)
    cfg = type(METHOD_CASES[name])(rank=3, rslora=rslora, ranks={"mlp.c_proj": 5}, alphas={"0.mlp.c_fc": 5},
                                   targets=("q", "up", "down"))
    fill(adapters.add("a", cfg))
    adapters.save("a", tmp_path)
    other = tiny("gpt2", F64)
    attach(other).load("a", tmp_path)
    right = model(ids(2)).logits
    assert difference(other(ids(2)).logits, right) <= EXACT and difference(model(ids(2), adapter_ids=()).logits, right) > 1e-3


@pytest.mark.parametrize("name", [n for n, c in METHOD_CASES.items() if isinstance(c, LoRA)])
def test_parameters_are_counted_without_weights(name, tmp_path):
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    count = [sum(p.numel() for p in attach(m).add("a", METHOD_CASES[name]).parameters().values())
             for m in (model, skeleton(str(tmp_path)))]
    assert count[0] == count[1] > 0


def test_a_rank_the_weight_does_not_have_is_refused():
    with pytest.raises(UserError, match="pissa: rank 40 is more than model.layers.0.self_attn.k_proj has, 32"):
        attach(tiny("llama")).add("a", PiSSA(rank=40, targets=("k",)))
