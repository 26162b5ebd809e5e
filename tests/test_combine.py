"""One LoRA out of several adapters, or out of one of any method: exact where the rank allows it, the best one where not.

Rows with weights stand beside it: a weighted stack on one row is the combined adapter, for changes that add.
"""
import dataclasses
import json
import math
import re
import typing
from typing import ClassVar

import peft
import pytest
import torch
from kit import TOKENIZER, llama
from peft import LoraConfig, get_peft_model
from tiny import EXACT, METHOD_CASES, attached, difference, fill, ids, tiny
from transformers import AutoModelForCausalLM

from tsugiki import formats
from tsugiki.adapters import attach
from tsugiki.cli.main import main
from tsugiki.combine import HOWS, _narrow_svd, change
from tsugiki.edit import LINEARS, Config, Edit, setting
from tsugiki.errors import UserError
from tsugiki.formats.export import export_model
from tsugiki.methods import BitFit, LoRA, Prompt

F64 = torch.float64
KINDS = ["llama", "gpt2", "phi3"]                     # plain, Conv1D, fused
family = pytest.mark.parametrize("kind", KINDS)


class Turn(Edit):
    """W (I + M): of full rank, and not the same beside another change."""

    def __init__(self, config, site, start):
        super().__init__(config, site, start)
        self.M = start.parameter(f"{site.name}.M", site.d_in, site.d_in)

    def pre(self, x, ctx):
        return x + x @ self.M.to(x).T

    def merge(self, w, b, site):
        return w, b

    def merge_input(self, w, site):
        return w + w @ self.M.to(w)


class Stretch(Edit):
    """(1 + s) y: it changes a bias where there is one."""

    def __init__(self, config, site, start):
        super().__init__(config, site, start)
        self.s = start.parameter(f"{site.name}.s", site.d_out)

    def post(self, x, y, ctx):
        return y + y * self.s.to(y)

    def merge(self, w, b, site):
        return w + w * self.s.to(w)[:, None], b if b is None else b + b * self.s.to(b)


class Lift(Stretch):
    """The same on a norm's vector."""
    roles = ("norm",)

    def merge(self, w, b, site):
        return w + w * self.s.to(w), b if b is None else b + b * self.s.to(b)


def config(edit_, default):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Cfg(Config):
        targets: tuple[str, ...] | str = setting(default, "")
        name: ClassVar[str] = edit_.__name__.lower()
        edit: ClassVar[type] = edit_
        lr: ClassVar[float] = 1e-3
    Cfg.__post_init__ = lambda self: None             # its annotations are not a module's own
    return Cfg


CASES = METHOD_CASES | {
    "turn": config(Turn, "linear")(), "stretch": config(Stretch, "linear")(), "lift": config(Lift, ("norm",))(),
    "parts": LoRA(rank=3, targets=("q", "v", "down")), "rslora": LoRA(rank=4, rslora=True, targets=("v", "o", "head"))}
MERGEABLE = [n for n, c in CASES.items() if all(part.edit.merge is not Edit.merge for part in c.parts)]


def with_cases(model, *names, scale=0.1):
    adapters = attach(model)
    for i, name in enumerate(names):
        fill(adapters.add(name, CASES[name]), seed=i + 1, scale=scale)
    return adapters


def moved(adapter):
    return {site.name: dw for site, dw, _ in change(adapter)}


def by_module(adapter):
    """Its change of each whole weight, parts in their rows."""
    found = {}
    for site, dw, _ in change(adapter):
        full = found.setdefault(site.module, torch.zeros(max(s.d_out for s in adapter.home.sites if s.name == site.module),
                                                         dw.shape[1], dtype=F64))
        full[slice(None) if site.features is None else site.features] += dw
    return found


def refusal(adapter):
    """Why an adapter cannot become a LoRA, told from its sites and its edits' own merge; None if it can."""
    for site in adapter.sites:
        if site.role not in LINEARS:
            return "is no linear"
    return None


def adds(adapter):
    """Whether its change is the same whatever the weight is."""
    def delta(site, edit, w):
        return edit.merge_input(edit.merge(w, None, site)[0], site) - w
    with torch.no_grad():
        return all(difference(delta(site, edit, w), delta(site, edit, 2 * w)) < 1e-12
                   for site, edit in adapter.edits.values() for w in [torch.ones(site.d_out, site.d_in, dtype=F64)])


# One adapter into a LoRA

@family
@pytest.mark.parametrize("name", MERGEABLE)
def test_any_change_of_linear_weights_becomes_a_lora_with_the_same_logits(kind, name):
    model = tiny(kind, F64)
    adapters = with_cases(model, name)
    why = refusal(adapters.get(name))
    if why:
        with pytest.raises(UserError, match=why):
            adapters.convert(name, "new")
        assert adapters.names() == (name,)
        return
    report = adapters.convert(name, "new")
    x = ids(2)
    with torch.no_grad():
        old, new, base = (model(x, adapter_ids=who).logits for who in (name, "new", ()))
    assert difference(old, new) < 1e-10 and difference(old, base) > 1e-3
    assert report.error < 1e-12 and max(report.sites.values()) < 1e-12 and report.rank == adapters.get("new").cfg.rank
    assert set(report.sites) == {s.name for s in adapters.get(name).sites} == {s.name for s in adapters.get("new").sites}


@family
def test_changes_of_biases_become_the_loras_bias(kind):
    model = tiny(kind, F64)
    adapters = with_cases(model, "bitfit", "lora")
    weights = {"bitfit": 0.5, "lora": 2.0}
    adapters.combine("new", weights)
    assert adapters.get("new").cfg.bias
    with torch.no_grad():
        x = ids(2)
        new, stack = (model(x, adapter_ids=who).logits for who in ("new", weights))
        assert difference(new, stack) < 1e-10 and difference(new, model(x, adapter_ids={"lora": 2.0}).logits) > 1e-3


def test_every_reason_of_a_refusal_is_met_here():
    reasons = {refusal(with_cases(tiny("gpt2", F64), name).get(name)) for name in MERGEABLE}
    assert reasons == {None, "is no linear"}


@family
@pytest.mark.parametrize("name", ["lora", "turn"])
def test_the_error_is_the_tail_of_the_singular_values(kind, name):
    adapters = with_cases(tiny(kind, F64), name)
    report = adapters.convert(name, "new", rank=3)
    off = size = 0.0
    for site, dw in moved(adapters.get(name)).items():
        s = torch.linalg.svdvals(dw)
        tail, whole = float(s[3:].square().sum()), float(s.square().sum())
        assert abs(report.sites[site] - math.sqrt(tail / whole)) < 1e-12 and report.sites[site] > 0.1
        off, size = off + tail, size + whole
    assert abs(report.error - math.sqrt(off / size)) < 1e-12
    for _, edit in adapters.get("new").edits.values():                        # balanced: both factors carry the roots
        assert difference((edit.B.T @ edit.B).detach(), (edit.A @ edit.A.T).detach()) < 1e-10


def test_without_a_rank_the_lora_is_as_narrow_as_the_change():
    adapters = attach(tiny("llama", F64))
    fill(adapters.add("a", LoRA(rank=6)), seed=1)
    with torch.no_grad():
        for _, edit in adapters.get("a").edits.values():
            edit.B[:, 3:] = edit.B[:, :3] @ torch.ones(3, 3, dtype=F64)       # rank 3, said in 6
    report = adapters.convert("a", "new")
    assert report.rank == 3 and report.error < 1e-12


@family
@pytest.mark.parametrize("width", [1, 4, 6, 9, 12])
def test_a_dense_change_of_low_rank_is_found_whole_by_the_fast_way_and_by_the_slow(kind, width):
    adapters = attach(tiny(kind, F64))
    fill(adapters.add("a", LoRA(rank=width, targets=("o",))), seed=1)
    dense = adapters.combine("new", {"a": 1.0}, how="magnitude", density=1.0)             # LoRA's factors are not looked at
    assert dense.rank == width and dense.error < 1e-12
    assert all((_narrow_svd(dw, 0.0) is not None) == (width < 8) for dw in moved(adapters.get("new")).values())


def test_a_rank_that_is_not_needed_changes_nothing_and_can_be_trained():
    model = tiny("llama", F64)
    adapters = with_cases(model, "lora")
    adapters.convert("lora", "wide", rank=9)
    model(ids(2), adapter_ids="wide").logits.square().sum().backward()
    for _, edit in adapters.get("wide").edits.values():
        assert not edit.B[:, 4:].any() and edit.A[4:].any() and edit.B.grad[:, 4:].any()
    with torch.no_grad():
        assert difference(model(ids(2), adapter_ids="wide").logits, model(ids(2), adapter_ids="lora").logits) < EXACT


def test_in_float32_the_error_is_that_of_the_stored_numbers():
    adapters = with_cases(tiny("llama"), "lora")
    report = adapters.convert("lora", "new")
    assert 1e-9 < report.error < 1e-6 and report.rank == 4
    assert next(iter(adapters.get("new").parameters().values())).dtype == torch.float32


def test_what_is_merged_does_not_count():
    model = tiny("llama", F64)
    adapters = with_cases(model, "lora", "turn", "rslora")
    adapters.convert("turn", "before", rank=4)
    adapters.merge("lora")
    adapters.merge("turn")
    adapters.convert("turn", "after", rank=4)
    a, b = adapters.get("before").parameters(), adapters.get("after").parameters()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Several

@pytest.mark.parametrize("kind", [*KINDS, "gpt_neox", "falcon"])
@pytest.mark.parametrize("how", ["linear", "cat"])
def test_the_combined_adapter_is_the_stack_with_those_weights(kind, how):
    model = tiny(kind, F64)
    names = ("lora", "parts", "rslora")               # whole linears, parts of fused ones, some sites only
    adapters = with_cases(model, *names)
    x, weights = ids(3), {"lora": 0.7, "parts": -0.4, "rslora": 1.5}
    ones = adapters.combine("ones", names, how=how)
    some = adapters.combine("some", weights, how=how)
    assert max(ones.error, some.error) < 1e-12 and ones.rank == (11 if kind == "llama" else 14)
    with torch.no_grad():
        for new, row in (("ones", names), ("some", weights)):
            got, wanted = model(x, adapter_ids=new).logits, model(x, adapter_ids=row).logits
            assert difference(got, wanted) < EXACT and difference(got, model(x, adapter_ids="lora").logits) > 1e-2


@family
@pytest.mark.parametrize("name", [n for n in MERGEABLE if n != "parts"])
def test_changes_of_any_two_methods_are_summed_and_equal_the_stack_where_they_add(kind, name):
    model = tiny(kind, F64)
    adapters = with_cases(model, name, "parts")
    weights = {name: 2.0, "parts": 0.5}
    if refusal(adapters.get(name)):
        return                                        # told by the tests of refusals
    report = adapters.combine("new", weights)
    first, second, new = (by_module(adapters.get(n)) for n in (name, "parts", "new"))
    for module in first.keys() | second.keys():
        wanted = sum(w * d[module] for w, d in ((2.0, first), (0.5, second)) if module in d)
        assert difference(new[module], wanted) < EXACT
    assert report.error < 1e-12 and new.keys() == first.keys() | second.keys()
    if adds(adapters.get(name)):
        with torch.no_grad():
            assert difference(model(ids(2), adapter_ids="new").logits, model(ids(2), adapter_ids=weights).logits) < 1e-10


@family
def test_merging_the_combined_adapter_adds_the_sum_of_the_changes(kind):
    model = tiny(kind, F64)
    adapters = with_cases(model, "lora", "turn")
    adapters.combine("new", {"lora": 0.5, "turn": -2.0})
    a, b = moved(adapters.get("lora")), moved(adapters.get("turn"))
    before = {s.name: s.exit.weight.clone() for s in adapters.get("new").sites}
    adapters.merge("new")
    for site in adapters.get("new").sites:
        wanted = 0.5 * a[site.name] - 2 * b[site.name]
        got = site.exit.weight - before[site.name]
        assert difference(got.T if kind == "gpt2" else got, wanted) < EXACT and wanted.abs().max() > 0.1


def test_parts_of_a_fused_weight_stay_parts_unless_another_adapter_changes_the_whole():
    model = tiny("phi3", F64)
    adapters = attach(model)
    for i, (name, targets) in enumerate({"q": ("q",), "qv": ("q", "v"), "whole": ("qkv",)}.items()):
        fill(adapters.add(name, LoRA(rank=2, targets=targets)), seed=i + 1)
    assert adapters.combine("parts", ("q", "qv")).adapter.cfg.targets == ("q", "v")
    assert adapters.combine("all", ("q", "qv", "whole")).adapter.cfg.targets == ("qkv",)
    q, k, v = (s for s in adapters.sites if s.layer == 0 and s.role in "qkv" and len(s.role) == 1)
    whole, wide = moved(adapters.get("whole"))[q.module], moved(adapters.get("all"))[q.module]
    assert difference(wide[k.features], whole[k.features]) < EXACT
    assert difference(wide[q.features], whole[q.features] + moved(adapters.get("q"))[q.name]
                      + moved(adapters.get("qv"))[q.name]) < EXACT
    with torch.no_grad():
        assert difference(model(ids(2), adapter_ids="all").logits, model(ids(2), adapter_ids=("q", "qv", "whole")).logits) < EXACT


# Pruning

def by_hand(deltas, weights, density, how):
    """TIES and magnitude pruning, a number at a time."""
    kept = []
    for d in deltas:
        flat = d.flatten().tolist()
        largest = set(sorted(range(len(flat)), key=lambda i, flat=flat: -abs(flat[i]))[:int(density * len(flat))])
        kept.append([x if i in largest else 0.0 for i, x in enumerate(flat)])
    out = []
    for numbers in zip(*kept, strict=True):
        if how == "magnitude":
            out.append(sum(w * x for w, x in zip(weights, numbers, strict=True)))
            continue
        positive = sum(numbers) >= 0
        agree = [w * x for w, x in zip(weights, numbers, strict=True) if x and (x > 0) == positive]
        out.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(out, dtype=F64).view_as(deltas[0])


@pytest.mark.parametrize("how", ["ties", "magnitude"])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_pruned_changes_are_what_the_papers_say(how, density):
    adapters = attach(tiny("llama", F64))
    for i in range(3):
        fill(adapters.add(f"a{i}", LoRA(rank=3, targets=("k",))), seed=i)
    weights = [0.5, 2.0, -1.0]
    report = adapters.combine("new", dict(zip(("a0", "a1", "a2"), weights, strict=True)), how=how, density=density)
    deltas = [moved(adapters.get(f"a{i}")) for i in range(3)]
    assert report.error < 1e-12
    for site, got in moved(adapters.get("new")).items():
        wanted = by_hand([d[site] for d in deltas], weights, density, how)
        assert difference(got, wanted) < EXACT and wanted.abs().max() > 1e-2
        plain = sum(w * d[site] for w, d in zip(weights, deltas, strict=True))
        assert how == "magnitude" and density == 1 or difference(wanted, plain) > 1e-2


def test_dare_keeps_a_share_of_the_numbers_and_scales_it_up():
    adapters = with_cases(tiny("llama", F64), "turn", "lora")
    exact, draws = moved(adapters.get("turn")), []
    for seed in range(40):
        torch.manual_seed(seed % 3)                   # the global generator has no say
        adapters.combine("new", {"turn": 1.0}, how="dare", density=0.25, seed=seed)
        draws.append(moved(adapters.get("new")))
        adapters.remove("new")
    n = kept = 0
    for site, dw in exact.items():
        for got in draws:
            stays = got[site].abs() > dw.abs() / 2
            assert difference(got[site], torch.where(stays, dw / 0.25, 0.0)) < 1e-11
            n, kept = n + dw.numel(), kept + int(stays.sum())
        mean = sum(got[site] for got in draws) / len(draws)                   # unbiased: within 6 standard errors everywhere
        assert ((mean - dw).abs() <= 6 * dw.abs() * math.sqrt(3 / len(draws)) + 1e-11).all()
    assert abs(kept / n - 0.25) < 6 * math.sqrt(0.25 * 0.75 / n)


def test_a_dare_draw_belongs_to_its_seed_adapter_and_site():
    adapters = with_cases(tiny("llama", F64), "turn", "lora")
    options = dict(how="dare", density=0.5)
    for new, names, seed in (("a", {"turn": 1.0}, 0), ("again", {"turn": 1.0}, 0), ("other", {"turn": 1.0}, 1),
                             ("first", {"lora": 1.0}, 0), ("both", {"turn": 1.0, "lora": 1.0}, 0)):
        adapters.combine(new, names, seed=seed, **options)
    a, again, other, first, both = (moved(adapters.get(n)) for n in ("a", "again", "other", "first", "both"))
    sites = list(a)
    assert all(torch.equal(a[s], again[s]) and difference(a[s], other[s]) > 1e-3 for s in sites)
    assert all(difference(both[s], a[s] + first[s]) < 1e-11 for s in sites)   # what is beside it does not change a draw
    assert a[sites[0]].shape == a[sites[3]].shape
    stays = [a[s].abs() > 1e-9 for s in (sites[0], sites[3])]
    assert not torch.equal(*stays) and not torch.equal(stays[0], first[sites[0]].abs() > 1e-9)


def test_dare_ties_is_ties_over_what_dare_left():
    adapters = with_cases(tiny("llama", F64), "turn", "lora")
    for name in ("turn", "lora"):
        adapters.combine(f"{name}-left", {name: 1.0}, how="dare", density=0.5, seed=3)
    adapters.combine("new", {"turn": 0.5, "lora": 2.0}, how="dare_ties", density=0.5, seed=3)
    a, b = (moved(adapters.get(f"{n}-left")) for n in ("turn", "lora"))
    for site, got in moved(adapters.get("new")).items():
        clean = [torch.where(d.abs() > 1e-9, d, 0.0) for d in (a[site], b[site])]     # the SVD leaves 1e-16 where zero was
        assert difference(got, by_hand(clean, [0.5, 2.0], 1.0, "ties")) < 1e-10


# Hugging Face PEFT

def pefts(kind, ranks=(4, 2), **overrides):
    """PEFT's model with two LoRAs, and ours with the same."""
    fan = kind == "gpt2"
    modules = ["c_attn", "c_proj"] if fan else ["qkv_proj", "down_proj"] if kind == "phi3" else ["q_proj", "v_proj", "down_proj"]

    def cfg(r, alpha):
        return LoraConfig(r=r, lora_alpha=alpha, target_modules=modules, fan_in_fan_out=fan, init_lora_weights=False)
    torch.manual_seed(4)
    theirs = get_peft_model(tiny(kind, F64, **overrides), cfg(ranks[0], 8), adapter_name="a")
    theirs.add_adapter("b", cfg(ranks[1], 6))
    model = tiny(kind, F64, **overrides)
    adapters = attach(model)
    for name, r, alpha in (("a", ranks[0], 8.0), ("b", ranks[1], 6.0)):
        adapters.add(name, LoRA(rank=r, alpha=alpha, targets="(" + "|".join(modules) + ")$"))
        with torch.no_grad():
            for site, edit in adapters.get(name).edits.values():
                there = layer(theirs, site)
                edit.A.copy_(there.lora_A[name].weight)
                edit.B.copy_(there.lora_B[name].weight)
    return theirs, model, adapters


def layer(theirs, site):
    return theirs.base_model.model.get_submodule(site.module)


def delta(theirs, site, name, fan):
    d = layer(theirs, site).get_delta_weight(name).detach().double()
    return d.T if fan else d


WEIGHTS = {"a": 0.7, "b": -0.4}
THEIRS = {"cat": ("cat", {}), "svd": ("svd", {"rank": 3}), "ties": ("ties_svd", {"rank": 8, "density": 0.4}),
          "magnitude": ("magnitude_prune_svd", {"rank": 8, "density": 0.3})}


@family
@pytest.mark.parametrize("how", THEIRS)
def test_the_combination_is_pefts(kind, how):
    theirs, model, adapters = pefts(kind)
    name, options = THEIRS[how]
    theirs.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "new", combination_type=name,
                                svd_rank=options.get("rank"), density=options.get("density"))
    report = adapters.combine("new", WEIGHTS, how=how, **options)
    for site, dw in ((s, d) for s, d, _ in change(report.adapter)):
        wanted = delta(theirs, site, "new", kind == "gpt2")
        plain = sum(w * delta(theirs, site, n, kind == "gpt2") for n, w in WEIGHTS.items())
        assert difference(dw, wanted) < 1e-6 * float(wanted.abs().max()), site.name   # PEFT holds the weights in float32
        assert (difference(dw, plain) < 1e-6) if how == "cat" else difference(dw, plain) > 1e-3
    theirs.set_adapter("new")
    with torch.no_grad():
        assert difference(theirs(ids(2)).logits, model(ids(2), adapter_ids="new").logits) < 1e-5


def test_dare_is_pefts_by_its_numbers():
    """Other draws, the same law: what stays is dW / density, and as many stay. (Of one adapter alone PEFT makes "linear".)"""
    theirs, _, adapters = pefts("llama", num_key_value_heads=4)               # PEFT's SVD fails where a rank exceeds a width
    shares = {"theirs": [], "ours": []}
    for seed in range(6):
        torch.manual_seed(seed)
        theirs.add_weighted_adapter(["a", "b"], [1.0, 0.0], f"n{seed}", "dare_linear_svd", svd_rank=64, density=0.3)
        report = adapters.combine(f"n{seed}", {"a": 1.0}, how="dare", density=0.3, seed=seed)
        for site, ours, _ in change(report.adapter):
            exact = delta(theirs, site, "a", False)
            for who, got in (("theirs", delta(theirs, site, f"n{seed}", False)), ("ours", ours)):
                stays = got.abs() > exact.abs()
                big = exact.abs() > 1e-3              # rounding hides what is smaller
                assert ((got - torch.where(stays, exact / 0.3, 0.0)).abs()[big] < 1e-4).all()
                shares[who].append(stays[big].double().mean().item())
    for found in shares.values():
        assert abs(sum(found) / len(found) - 0.3) < 0.01


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pefts_linear_mixes_factors_and_ours_changes(kind):
    """PEFT's "linear" is (sum of roots w_i B_i) (sum of roots w_j A_j): the sum asked for, and cross terms B_i A_j."""
    theirs, _, adapters = pefts(kind, ranks=(4, 4))
    weights = {"a": 0.7, "b": 0.3}
    theirs.add_weighted_adapter(list(weights), list(weights.values()), "new", combination_type="linear")
    adapters.combine("new", weights)
    for site, ours, _ in change(adapters.get("new")):
        (wa, a), (wb, b) = ((w, adapters.get(n).edits[site.name][1]) for n, w in weights.items())
        cross = math.sqrt(wa * a.scale * wb * b.scale) * (b.B @ a.A + a.B @ b.A).detach()
        got = delta(theirs, site, "new", kind == "gpt2")
        assert difference(got - ours, cross) < 1e-5 * float(cross.abs().max()) and cross.abs().max() > 0.05


# What is refused

REFUSED = {
    "nothing": ({}, {}, "no adapter is named"),
    "a name that is not there": ({"loar": 1.0}, {}, "no adapter 'loar' is attached; did you mean 'lora'?"),
    "twice": (["lora", "lora"], {}, "'lora' is named twice"),
    "a weight of text": ({"lora": "0.5"}, {}, "the weight of 'lora' must be a number, got '0.5'"),
    "a weight of nan": ({"lora": math.nan}, {}, "the weight of 'lora' must be a number, got nan"),
    "virtual tokens": (["lora", "prompt"], {}, "prompt is not a change of weights: adapter 'prompt' cannot become a LoRA"),
    "a norm": (["lift"], {}, r"adapter 'lift' \(lift\) changes model.layers.0.input_layernorm, which is no linear"),
    "another how": (["lora"], {"how": "tie"}, "how 'tie' is not known; did you mean 'ties'"),
    "no density": (["lora"], {"how": "ties"}, "ties needs a density"),
    "a density of 0": (["lora"], {"how": "dare", "density": 0}, "above 0 and at most 1; got 0"),
    "a density for none": (["lora"], {"density": 0.5}, r"linear takes no density \(these do: ties dare dare_ties magnitude\)"),
    "half a rank": (["lora"], {"rank": 2.5}, "rank must be a whole number from 1 up, got 2.5"),
    "no rank": (["lora"], {"how": "svd"}, "svd needs a rank"),
    "a rank for cat": (["lora"], {"how": "cat", "rank": 3}, "cat keeps every factor"),
    "cat of others": (["lora", "turn"], {"how": "cat"}, r"cat: adapter 'turn' \(turn\) has no factors to put side by side"),
}


@pytest.fixture(scope="module")
def everything():
    adapters = with_cases(tiny("llama", F64), "lora", "turn", "bitfit", "lift")
    adapters.add("prompt", Prompt(tokens=3))
    return adapters


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_told_in_one_line_and_adds_nothing(case, everything):
    names, options, says = REFUSED[case]
    before = everything.names()
    with pytest.raises(UserError, match=says) as e:
        everything.combine("new", names, **options)
    assert "\n" not in str(e.value) and everything.names() == before


def test_a_name_that_is_taken_or_a_change_that_is_not_finite_is_refused():
    adapters = with_cases(tiny("llama", F64), "lora")
    with pytest.raises(UserError, match="'lora' exists"):
        adapters.convert("lora", "lora")
    next(iter(adapters.get("lora").parameters().values())).data[0, 0] = math.inf
    fill(adapters.get("lora"))
    with pytest.raises(UserError, match="the change at model.layers.0.self_attn.q_proj is not finite"):
        adapters.convert("lora", "new")
    assert adapters.names() == ("lora",)


def test_peft_has_no_combination_that_is_unknown_here():
    known = {"svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
             "magnitude_prune", "magnitude_prune_svd"}
    hints = typing.get_type_hints(peft.tuners.lora.LoraModel.add_weighted_adapter)
    assert set(typing.get_args(hints["combination_type"])) <= known
    assert {t.removesuffix("_svd").replace("_prune", "").replace("dare_linear", "dare") for t in known} == set(HOWS)


# Rows with weights

WEIGHED = [n for n, c in CASES.items() if not any(part.edit.virtual for part in c.parts)]


@family
@pytest.mark.parametrize("name", WEIGHED)
def test_weight_0_is_the_base_and_weight_1_the_plain_name_to_the_bit(kind, name):
    model = tiny(kind)
    with_cases(model, name)
    x = ids(2)
    with torch.no_grad():
        base, plain, half = (model(x, adapter_ids=who).logits for who in ((), name, {name: 0.5}))
        assert torch.equal(model(x, adapter_ids={name: 0.0}).logits, base)
        assert torch.equal(model(x, adapter_ids={name: 1.0}).logits, plain)
        assert torch.equal(model(x, adapter_ids={name: 1}).logits, plain) and torch.equal(model(x, adapter_ids={}).logits, base)
        assert difference(half, base) > 1e-4 and difference(half, plain) > 1e-4


@family
def test_a_batch_of_weighted_rows_is_each_row_alone(kind):
    model = tiny(kind, F64)
    adapters = with_cases(model, *CASES)
    rows = [{name: 0.3 + 0.2 * i} for i, name in enumerate(WEIGHED)]
    rows += [None, {"lora": -0.5, "parts": 2.0}, "lora", {"parts": 2.0, "lora": -0.5}, {"turn": 0.5, "bitfit": 0.5}, {"lora": 0.5},
             *(name for name in CASES if name not in WEIGHED)]
    x = ids(len(rows))

    def run(x, rows):
        model.zero_grad()
        logits = model(x, adapter_ids=rows).logits
        if logits.requires_grad:                      # not so where every row is the base's
            logits.square().sum().backward()
        return logits.detach(), {k: p.grad.clone() for n in CASES for k, p in adapters.get(n).parameters().items()
                                 if p.grad is not None for k in [f"{n} {k}"]}
    together, grads = run(x, rows)
    alone, sums = [], {}
    for i, row in enumerate(rows):
        out, found = run(x[i:i + 1], [row])
        alone.append(out)
        for key, grad in found.items():
            sums[key] = sums.get(key, 0) + grad
    assert difference(together, torch.cat(alone)) < EXACT
    assert grads.keys() == sums.keys() and len(grads) > 50
    assert all(difference(grads[k], sums[k]) < 1e-9 * (1 + float(sums[k].abs().max())) for k in grads)


@family
def test_generation_with_weights_is_each_row_alone_and_use_says_the_same(kind):
    model = tiny(kind, F64)
    adapters = with_cases(model, "lora", "turn", scale=0.3)
    x, rows = ids(3), [{"lora": 0.5, "turn": 0.25}, None, {"lora": 1.5}]
    options = dict(max_new_tokens=6, do_sample=False)
    together = model.generate(x, adapter_ids=rows, **options)
    for i, row in enumerate(rows):
        assert torch.equal(model.generate(x[i:i + 1], adapter_ids=[row], **options)[0], together[i])
    with torch.no_grad(), adapters.use(rows):
        assert torch.equal(model(x).logits, model(x, adapter_ids=rows).logits)


@pytest.mark.parametrize("row, says", [
    ({"lora": "1"}, "the weight of 'lora' must be a number, got '1'"), ({"lora": True}, "must be a number, got True"),
    ({"lora": math.inf}, "must be a number, got inf"), ({"lora": None}, "must be a number, got None"),
    ({"loar": 0.5}, "no adapter 'loar' is attached"),
    ({"prompt": 0.5}, "'prompt' has virtual tokens: it is used whole or not at all"),
    ({"prompt": 0.0}, "not with weight 0.0")])
def test_bad_weights_are_told_in_one_line(row, says):
    model = tiny("llama")
    adapters = with_cases(model, "lora")
    adapters.add("prompt", Prompt(tokens=3))
    for ids_ in (row, [None, row]):
        with pytest.raises(UserError, match=says) as e:
            model(ids(2), adapter_ids=ids_)
        assert "\n" not in str(e.value)
    assert torch.isfinite(model(ids(2), adapter_ids=[{"prompt": 1.0, "lora": 0.5}, None]).logits).all()


def test_a_merged_adapter_cannot_be_weighed():
    model = tiny("llama")
    adapters = attached(model, "lora")
    adapters.merge("lora")
    with pytest.raises(UserError, match="'lora' is merged into the base"):
        model(ids(2), adapter_ids={"lora": 0.5})


# The command

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base on disk and two adapters of different methods, trained with one template and different stop tokens."""
    root = tmp_path_factory.mktemp("combine")
    model = llama()
    base = str(export_model(model, TOKENIZER, root / "base", dtype=torch.float32))
    adapters = attach(model)
    fill(adapters.add("a", LoRA(rank=4)), seed=1)
    fill(adapters.add("b", LoRA(rank=2, targets=("q", "v", "down"))), seed=2)
    fill(adapters.add("c", BitFit()), seed=3)
    for name, stop, note in (("a", 2, {"kind": "chat", "stop": "x"}), ("b", 5, {"kind": "chat"}), ("c", 2, {})):
        adapters.save(name, root / name / "adapter", stop_ids=[stop], extra=note)
    return root, base


def call(capsys, *argv):
    capsys.readouterr()
    code = main([str(a) for a in argv])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("flags", [(), ("--how", "cat"), ("--rank", "3"), ("--how", "ties", "--density", "0.3", "--rank", "8"),
                                   ("--how", "dare", "--density", "0.3", "--seed", "4", "--rank", "8")], ids=" ".join)
def test_the_command_is_the_librarys_function(flags, folders, capsys, tmp_path):
    root, base = folders
    code, out, err = call(capsys, "combine", "--base", base, "--adapter", root / "a" / "adapter=0.7", "--adapter",
                          f"other={root / 'b' / 'adapter'}=-0.3", *flags, "--out", tmp_path / "new", "--json")
    assert code == 0, err
    found, model = json.loads(out), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapters = attach(model)
    for name, folder in (("a", "a"), ("other", "b")):
        adapters.load(name, root / folder / "adapter")
    options = {k.lstrip("-"): v if k == "--how" else float(v) if k == "--density" else int(v)
               for k, v in zip(flags[::2], flags[1::2], strict=True)}
    report = adapters.combine("new", found["weights"], **options)
    assert found["weights"] == {"a": 0.7, "other": -0.3} and found["sites"] == report.sites and found["error"] == report.error
    assert found["rank"] == report.rank and (found["error"] > 0.01) == ("--rank" in flags)
    adapters.load("again", tmp_path / "new")
    a, b = adapters.get("new").parameters(), adapters.get("again").parameters()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    manifest = formats.read_manifest(tmp_path / "new")
    assert manifest["stop_ids"] == [2, 5] and manifest["extra"] == {"kind": "chat"}


def test_the_command_prints_what_is_lost_and_a_weight_may_be_left_out(folders, capsys, tmp_path):
    root, base = folders
    code, out, err = call(capsys, "combine", "--base", base, "--adapter", root / "a" / "adapter", "--rank", "2",
                          "--out", tmp_path / "new")
    assert code == 0 and "a LoRA of rank 2 on 14 sites" in out and re.search(r"[1-9]\d\.\d\d% of the change", out), (out, err)


@pytest.mark.parametrize("flags, says", [
    ((), "--adapter: missing"), (("--adapter", "a/adapter=nan"), "the weight must be a number, got nan"),
    (("--adapter", "nowhere=0.5"), "--adapter nowhere: no adapter_config.json there"),
    (("--adapter", "a/adapter=0.5", "--adapter", "a/adapter=0.5"), "the name 'a' is given twice"),
    (("--adapter", "a/adapter", "--how", "tie"), "did you mean 'ties'"),
    (("--adapter", "a/adapter", "--density", "0.1"), "takes no density"),
    (("--adapter", "a/adapter", "--rank", "0"), "rank must be a whole number from 1 up")])
def test_the_command_says_what_is_wrong_in_one_line_and_writes_nothing(flags, says, folders, capsys, tmp_path, monkeypatch):
    root, base = folders
    monkeypatch.chdir(root)
    code, out, err = call(capsys, "combine", "--base", base, *flags, "--out", tmp_path / "new")
    assert code == 2 and out == "" and says in err and err.count("\n") == 1 and not (tmp_path / "new").exists(), err


def test_the_command_replaces_nothing(folders, capsys, tmp_path):
    root, base = folders
    (tmp_path / "there").write_text("x")
    code, _, err = call(capsys, "combine", "--base", base, "--adapter", root / "a" / "adapter", "--out", tmp_path)
    assert code == 2 and "is there already" in err
