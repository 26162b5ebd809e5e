"""The LoRA family against its papers' formulas written out densely, and against PEFT run live."""
import math
import re
from functools import partial

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from test_peft import last_names, peft_logits
from tiny import EXACT, METHOD_CASES, difference, fill, ids, tiny
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tsugiki.adapters import attach
from tsugiki.edit import Frozen
from tsugiki.errors import UserError
from tsugiki.methods import EVA, AdaLoRA, DoRA, LoRA, LoRAPlus, OLoRA, PiSSA, VeRA
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
    (dict(ranks={"(.+)+x": 2}), "matches no targeted site"), (dict(ranks={"((((a{9}){9}){9}){9}){9}": 2}), "repeats what repeats"),
    (dict(start="orthogonal", rank=3), "needs even ranks"),
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
def test_parameters_are_counted_without_weights(name):
    model = tiny("llama")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    params = [attach(m).add("a", METHOD_CASES[name]).parameters() for m in (model, empty)]
    assert {k: p.shape for k, p in params[0].items()} == {k: p.shape for k, p in params[1].items()}
    assert all(p.is_meta for p in params[1].values())


def test_a_rank_the_weight_does_not_have_is_refused():
    with pytest.raises(UserError, match="pissa: rank 40 is more than model.layers.0.self_attn.k_proj has, 32"):
        attach(tiny("llama")).add("a", PiSSA(rank=40, targets=("k",)))


# EVA

ROWS_OF = [list(range(i, i + 4)) for i in (0, 4, 8)]


def looked_at(model, cfg, cuts, name="a"):
    """An adapter prepared on 12 rows of unequal lengths, right-padded, cut into forwards as `cuts` says."""
    x, adapters = ids(12, 9, seed=4), attach(model)
    mask = (torch.arange(9)[None] < torch.tensor([9, 3, 7, 5] * 3)[:, None]).long()
    adapter = adapters.add(name, cfg)

    def forward():
        for rows in cuts:
            model(input_ids=x[rows], attention_mask=mask[rows], adapter_ids=name)
    seen = {}
    hooks = [s.exit.register_forward_pre_hook(lambda m, args, s=s: seen.setdefault(s.name, []).append(args[0].detach()))
             for s in adapter.sites]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    cfg.prepare(adapter, forward)
    inputs = {n: torch.cat([x[mask[rows].bool()] for x, rows in zip(xs, cuts, strict=True)]) for n, xs in seen.items()}
    return adapter, inputs


@pytest.mark.parametrize("kind, targets", [("llama", "linear"), ("gpt2", "linear"), ("phi3", ("q", "k", "down"))])
def test_eva_starts_as_the_full_svd_of_all_real_tokens(kind, targets):
    model = tiny(kind, F64)
    base = model(ids(2)).logits
    cfg = EVA(rank=3, rho=2.0, tau=1.0, alpha=6, targets=targets)
    adapter, inputs = looked_at(model, cfg, ROWS_OF)
    assert torch.equal(model(ids(2), adapter_ids="a").logits, base)
    svds = {n: torch.linalg.svd(x, full_matrices=False)[1:] for n, x in inputs.items()}
    found = {n: e for n, (_, e) in adapter.edits.items()}
    shares = {n: (svds[n][0].square() / svds[n][0].square().sum())[:6] for n in found}
    first = dict.fromkeys(found, 1)                   # one a site, then the largest shares; of equal ones the earlier site's
    for _, n in sorted(((-round(float(v), 9), n) for n, s in shares.items() for v in s[1:]),
                       key=lambda pair: (pair[0], list(found).index(pair[1])))[:2 * len(found)]:
        first[n] += 1
    for name, edit in found.items():
        assert len(edit.A) == first[name] == edit.B.shape[1] and edit.scale == pytest.approx(2.0, rel=1e-15)
        overlap = (edit.A @ svds[name][1][:len(edit.A)].T).abs()
        assert difference(overlap, torch.eye(len(edit.A), dtype=F64)) < 1e-6, name
    assert len({len(e.A) for e in found.values()}) > 1 and sum(len(e.A) for e in found.values()) == 3 * len(found)


def test_eva_does_not_depend_on_how_rows_are_cut_and_stores_a_plain_lora(tmp_path):
    cfg = METHOD_CASES["eva"]
    cuts = (ROWS_OF, [[0], [1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])
    a, b = (looked_at(tiny("llama", F64), cfg, cut)[0] for cut in cuts)
    for (_, one), (_, two) in zip(a.edits.values(), b.edits.values(), strict=True):
        assert one.A.shape == two.A.shape and difference(one.A.abs(), two.A.abs()) < 1e-6
    fill(a)
    a.home.save("a", tmp_path)
    right, model = a.home.model(ids(2)).logits, tiny("llama", F64)
    again = attach(model).load("a", tmp_path)
    assert torch.equal(model(ids(2)).logits, right) and again.cfg.ranks == a.cfg.stored(a)[0].ranks is not None
    (tmp_path / "MANIFEST.json").unlink()             # as a PEFT folder, it is a LoRA
    plain = tiny("llama", F64)
    assert type(attach(plain).load("a", tmp_path).cfg) is LoRA and difference(plain(ids(2)).logits, right) <= EXACT
    read = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert difference(peft_logits(read, ids(2)), right) < 1e-4


def test_eva_with_rho_1_keeps_every_rank_and_a_trained_adapter_stays_as_it_is():
    cfg = EVA(rank=3, rho=1.0)
    adapter, _ = looked_at(tiny("llama"), cfg, ROWS_OF)
    assert {len(e.A) for _, e in adapter.edits.values()} == {3} and cfg.stored(adapter)[0].ranks is None
    before = {k: p.detach().clone() for k, p in fill(adapter).parameters().items()}
    cfg.prepare(adapter, lambda: adapter.home.model(ids(2)))
    assert all(torch.equal(before[k], p) for k, p in adapter.parameters().items())


def test_sites_that_read_one_tensor_are_decomposed_once(monkeypatch):
    from tsugiki.methods import eva
    made = []
    monkeypatch.setattr(eva, "Inputs", lambda *a, plain=eva.Inputs: made.append(1) or plain(*a))
    looked_at(tiny("llama"), METHOD_CASES["eva"], ROWS_OF)
    assert len(made) == 2 * 4                         # a layer: q k v, o, gate up, down


# AdaLoRA

STEPS = 20


def peft_adalora(kind, dtype, **more):
    model = tiny(kind, dtype)
    wrapped = get_peft_model(model, AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, beta1=0.8, beta2=0.7, total_step=STEPS,
                                                  task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2",
                                                  target_modules=last_names(model, ROLES), **more)).to(dtype)
    return wrapped, {n.removeprefix("base_model.model."): m for n, m in wrapped.named_modules() if hasattr(m, "lora_E")}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, lr=1e-2, eps=1e-5)],
                         ids=["sgd", "adamw"])        # AdamW's default eps makes rounding of tiny gradients 1e8 times larger
@pytest.mark.parametrize("every", [1, 3])
def test_adalora_is_pefts_step_by_step(kind, optimizer, every):
    wrapped, layers = peft_adalora(kind, F64, tinit=2, tfinal=5, deltaT=every)
    model = tiny(kind, F64)
    for net in (model, wrapped.base_model.model):     # transformers' own rounds to float32
        net.loss_function = lambda logits, labels, **_: F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])
    cfg = AdaLoRA(rank=4, target=2, tinit=2 / STEPS, tfinal=5 / STEPS, every=every, alpha=6, beta1=0.8, beta2=0.7,
                  targets="^(" + "|".join(map(re.escape, layers)) + ")$")
    adapter = attach(model).add("a", cfg)
    pairs = {f"{n}.{k}": getattr(m, f"lora_{k}")["default"] for n, m in layers.items() for k in "AEB"}
    with torch.no_grad():
        for key, p in adapter.parameters().items():
            p.copy_(pairs[key])
    cfg.prepare(adapter, lambda: None)
    ours, theirs = adapter.parameters(), list(pairs.values())     # .to() makes ranknum learn, which PEFT's own does not
    mine, other = optimizer(list(ours.values())), optimizer(theirs)
    counts = []
    for step in range(1, STEPS + 1):
        x = ids(2, seed=step)
        loss = model(input_ids=x, labels=x).loss + cfg.penalty(adapter)
        right = wrapped(input_ids=x, labels=x).loss
        assert abs(float(loss.detach() - right.detach())) < 1e-10
        loss.backward()
        right.backward()
        mine.step()
        other.step()
        cfg.after_step(adapter, step, STEPS)
        wrapped.base_model.update_and_allocate(step)
        mine.zero_grad()
        other.zero_grad()
        assert max(difference(ours[k], pairs[k]) for k in ours) < 1e-10, step
        assert all(torch.equal(ours[k] == 0, pairs[k] == 0) for k in ours if k.endswith(".E")), step
        counts.append(sum(int((p != 0).sum()) for k, p in ours.items() if k.endswith(".E")))
    assert counts[0] == 4 * len(layers) and counts[-1] == 2 * len(layers)


def test_a_pruned_adalora_is_stored_small_and_read_by_peft_and_back(tmp_path):
    wrapped, layers = peft_adalora("llama", torch.float32, tinit=1, tfinal=1)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, STEPS + 1):
        wrapped(input_ids=ids(2, seed=step), labels=ids(2, seed=step)).loss.backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    right = peft_logits(wrapped, ids(2))
    wrapped.save_pretrained(tmp_path / "theirs")
    model = tiny("llama")
    adapter = attach(model).load("a", tmp_path / "theirs")
    assert difference(model(ids(2)).logits, right) < 1e-5 and difference(model(ids(2), adapter_ids=()).logits, right) > 1e-3
    assert sum(len(e.E) for _, e in adapter.edits.values()) == 2 * len(layers) and len(set(adapter.cfg.ranks.values())) > 1
    adapter.home.save("a", tmp_path / "ours")
    back = PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours")
    assert difference(peft_logits(back, ids(2)), right) < 1e-5
    again = attach(tiny("llama")).load("a", tmp_path / "ours")
    assert again.cfg == adapter.cfg.stored(adapter)[0] and 0 in adapter.cfg.ranks.values()     # which becomes a 1 that does nothing


@pytest.mark.parametrize("targets", ["linear", ("q", "k")])
def test_what_adalora_stores_is_what_it_computes_at_any_step(targets, tmp_path):
    """Also between prunings, when an optimizer has moved a pruned value away from zero; fused parts in our own form."""
    model, cfg = tiny("phi3", F64), AdaLoRA(rank=4, targets=targets)
    adapters = attach(model)
    adapter = adapters.add("a", cfg)
    assert "kept" not in dict(next(iter(adapter.edits.values()))[1].named_buffers()), "an adapter that only computes needs none"
    cfg.prepare(adapter, lambda: None)
    optimizer = torch.optim.AdamW(list(adapter.parameters().values()), lr=1e-2)
    sizes = []
    for step in range(1, 11):
        (model(input_ids=ids(2), labels=ids(2)).loss + cfg.penalty(adapter)).backward()
        optimizer.step()
        if step in (4, 10):
            cfg.after_step(adapter, step, 10)
        if step in (4, 5, 10):
            adapters.save("a", tmp_path / str(step))
            other = tiny("phi3", F64)
            again = attach(other).load("a", tmp_path / str(step))
            right = model(ids(2)).logits
            assert difference(other(ids(2)).logits, right) <= EXACT
            assert difference(model(ids(2), adapter_ids=()).logits, right) > 1e-4
            sizes.append(sum(len(e.E) for _, e in again.edits.values()))
    assert sizes[0] < sizes[1] and sizes[2] < sizes[1]


@pytest.mark.parametrize("values, says", [
    (dict(target=13), "target must be at most rank, 12"), (dict(tinit=0.6, tfinal=0.4), "must be below 1"),
    (dict(ranks={"x": 2}), "ranks: 'x' is no targeted site"), (dict(ranks={"x": 13}), "ranks: x must be 0 to 12")])
def test_a_bad_adalora_is_one_line(values, says):
    with pytest.raises(UserError, match=says):
        attach(tiny("llama")).add("a", AdaLoRA(**values))


# VeRA

def test_veras_projections_are_drawn_as_pefts_and_may_be_left_out(tmp_path):
    model = tiny("gpt2")
    for saved in (True, False):
        wrapped = get_peft_model(tiny("gpt2"), VeraConfig(r=6, projection_prng_key=7, save_projection=saved, task_type="CAUSAL_LM",
                                                          fan_in_fan_out=True, target_modules=last_names(model, ROLES)))
        with torch.no_grad():
            for p in wrapped.parameters():
                if p.requires_grad:
                    p.add_(0.3)
        right = peft_logits(wrapped, ids(2))
        wrapped.save_pretrained(tmp_path / f"theirs{saved}")
        model = tiny("gpt2")
        adapter = attach(model).load("a", tmp_path / f"theirs{saved}")
        assert difference(model(ids(2)).logits, right) < 1e-5 and difference(model(ids(2), adapter_ids=()).logits, right) > 1e-3
        fresh = attach(tiny("gpt2")).add("a", adapter.cfg)
        assert torch.equal(fresh.shared["vera"].A, wrapped.base_model.vera_A["default"])
        assert torch.equal(fresh.shared["vera"].B, wrapped.base_model.vera_B["default"])
        adapter.home.save("a", tmp_path / f"ours{saved}")
        assert ("base_model.vera_A" in load_file(tmp_path / f"ours{saved}" / "adapter_model.safetensors")) == saved
        back = PeftModel.from_pretrained(tiny("gpt2"), tmp_path / f"ours{saved}")
        assert difference(peft_logits(back, ids(2)), right) < 1e-5


def test_all_sites_of_a_vera_share_one_pair_of_projections_that_nothing_trains():
    model = tiny("llama", F64)
    adapter = fill(attach(model).add("a", VeRA(rank=5)))
    shared = adapter.shared["vera"]
    assert all(e.projections[0] is shared for _, e in adapter.edits.values())
    assert {k.rpartition(".")[2] for k in adapter.parameters()} == {"d", "b"}
    assert list(adapter.buffers()) == ["shared.vera.A", "shared.vera.B"]
    site, edit = adapter.edits["model.layers.0.mlp.down_proj"]
    change = torch.diag(edit.b) @ shared.B[:site.d_out] @ torch.diag(edit.d) @ shared.A[:, :site.d_in]
    x = torch.randn(2, 3, site.d_in, dtype=F64)
    assert difference(site.exit(x), F.linear(x, site.exit.weight + change)) <= EXACT and float(change.abs().max()) > 1e-2
