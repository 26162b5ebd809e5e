"""Merging: the merged base equals the adapter, every order of taking out restores the exact bits, tied heads come apart."""
import itertools

import pytest
import torch
from tiny import EXACT, FALCONS, LOOSER, METHOD_CASES, attached, difference, exact, fill, ids, tiny
from transformers import AutoModelForCausalLM

from tsugiki.adapters import attach
from tsugiki.edit import Edit
from tsugiki.errors import UserError
from tsugiki.methods import BitFit, LoRA, Prefix
from tsugiki.sites import FAMILIES

F64 = torch.float64
family = pytest.mark.parametrize("kind", FAMILIES)
MERGEABLE = {n: c for n, c in METHOD_CASES.items() if all(part.edit.merge is not Edit.merge for part in c.parts)}


def bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.share(3)
@family
@pytest.mark.parametrize("name", MERGEABLE)
def test_the_merged_base_equals_the_adapter_and_unmerging_restores_every_bit(kind, name):
    model = tiny(kind, F64)
    adapters = attached(model, name)
    before, x = bits(model), ids(2)
    with torch.no_grad():
        alive, base = model(x).logits, model(x, adapter_ids=()).logits
        report = adapters.merge(name)
        assert difference(model(x).logits, alive) <= LOOSER.get(kind, EXACT)
        assert difference(model(x, adapter_ids=name).logits, alive) <= LOOSER.get(kind, EXACT)      # not applied twice
        assert difference(alive, base) > 1e-3 and report.relative_error < 1e-14 and report.modules > 0
        adapters.unmerge(name)
        assert same(bits(model), before) and difference(model(x).logits, alive) <= LOOSER.get(kind, EXACT)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "falcon", "phi3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_merged_number_is_the_float64_sum_rounded_once(kind, dtype):
    model = tiny(kind, dtype)
    adapters = attached(model, "lora", scale=0.02)
    originals = {s.name: s.exit.weight.detach().double().clone() for s, _ in adapters.get("lora").edits.values()}
    report = adapters.merge("lora")
    for site, edit in adapters.get("lora").edits.values():
        change = (edit.B.double() @ edit.A.double()) * edit.scale
        exact = originals[site.name] + (change.T if type(site.exit).__name__ == "Conv1D" else change)
        assert torch.equal(site.exit.weight, exact.to(dtype)), site.name
    assert (1e-4 < report.relative_error < 0.5) if dtype == torch.bfloat16 else report.relative_error < 1e-5
    assert 0 < report.max_error < (0.01 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_a_hundred_cycles_and_any_order_leave_the_exact_original(dtype):
    model = tiny("gpt2", dtype)
    adapters = attached(model, "lora", "bitfit")
    fill(adapters.add("second", LoRA(rank=2, targets=("q", "v", "down"))), seed=7)
    before, names = bits(model), ("lora", "bitfit", "second")
    for i in range(100):
        for name in names[i % 3:] + names[:i % 3]:
            adapters.merge(name)
        for name in list(itertools.permutations(names))[i % 6]:
            adapters.unmerge(name)
    assert same(bits(model), before) and adapters.merged == ()
    adapters.merge("lora")
    only = bits(model)
    for name in ("second", "bitfit"):
        adapters.merge(name)
    for name in ("second", "bitfit"):
        adapters.unmerge(name)
    assert same(bits(model), only), "what was merged beside it left a trace"


@family
def test_two_merged_adapters_are_their_sum(kind):
    model = tiny(kind, F64)
    adapters = attached(model, "lora", "bitfit")
    x = ids(2)
    with torch.no_grad():
        both = model(x, adapter_ids=("lora", "bitfit")).logits
        adapters.merge("lora")
        assert difference(model(x, adapter_ids=("lora", "bitfit")).logits, both) <= LOOSER.get(kind, EXACT)    # one of each
        adapters.merge("bitfit")
        assert difference(model(x).logits, both) <= LOOSER.get(kind, EXACT)


@pytest.mark.parametrize("kind, overrides", [("phi3", {}), ("gpt2", {}), ("gpt_neox", {}), ("bloom", {})]
                         + [("falcon", v) for v in FALCONS.values()])
@pytest.mark.parametrize("cfg", [LoRA(rank=4, targets=("q", "v")), BitFit(targets=("k",))], ids=["lora", "bitfit"])
def test_parts_of_a_fused_weight_merge_into_its_columns(kind, overrides, cfg):
    model = tiny(kind, F64, **overrides)
    adapters = attach(model)
    fill(adapters.add("a", cfg), seed=1)
    before, x = bits(model), ids(2)
    with torch.no_grad():
        alive = model(x).logits
        adapters.merge("a")
        assert difference(model(x).logits, alive) <= EXACT and not same(bits(model), before)
        adapters.unmerge("a")
    assert same(bits(model), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "opt", "bloom"])
def test_merging_into_a_tied_head_leaves_the_embedding_alone_and_ties_again(kind, tmp_path):
    model = tiny(kind, F64, tie_word_embeddings=True)
    adapters = attach(model)
    fill(adapters.add("a", LoRA(rank=4, targets=("head", "o"))), seed=1, scale=0.3)
    head, embed, x = model.get_output_embeddings(), model.get_input_embeddings(), ids(2)
    assert head.weight is embed.weight
    weight, before = embed.weight, bits(model)
    with torch.no_grad():
        alive = model(x).logits
        adapters.merge("a")
        assert head.weight is not embed.weight is weight
        assert torch.equal(weight, next(v for v in before.values() if v.shape[0] == 200))
        assert model.config.tie_word_embeddings is False and difference(model(x).logits, alive) <= EXACT
        model.save_pretrained(tmp_path)
        again = exact(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=F64).eval())
        assert difference(again(x).logits, alive) <= EXACT
        assert torch.equal(again.get_output_embeddings().weight, head.weight)
        assert torch.equal(again.get_input_embeddings().weight, embed.weight)
        adapters.unmerge("a")
    assert head.weight is embed.weight is weight and model.config.tie_word_embeddings is True and same(bits(model), before)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "falcon", "opt", "gpt2"])
def test_a_merged_bitfit_saves_into_a_plain_folder_where_the_config_can_say_it(kind, tmp_path):
    flags = {f: False for f in FAMILIES[kind].bias_flags}
    model = tiny(kind, F64, **flags)
    adapters = attach(model)
    fill(adapters.add("a", BitFit(targets=("o",))), seed=1, scale=0.3)
    before, config = bits(model), {f: getattr(model.config, f) for f in flags}
    with torch.no_grad():
        alive = model(ids(2)).logits
        report = adapters.merge("a")
        assert report.undeclared == () and difference(model(ids(2)).logits, alive) <= EXACT
        model.save_pretrained(tmp_path)
        again = exact(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=F64).eval())
        assert difference(again(ids(2)).logits, alive) <= EXACT
        adapters.unmerge("a")
    assert same(bits(model), before) and {f: getattr(model.config, f) for f in flags} == config


def test_biases_the_config_cannot_declare_are_named():
    adapters = attach(tiny("mistral"))
    fill(adapters.add("a", BitFit(targets=("o",))))
    assert adapters.merge("a").undeclared == tuple(f"model.layers.{n}.self_attn.o_proj" for n in (0, 1))
    fill(adapters.add("b", BitFit(targets=("head",))))
    assert adapters.merge("b").undeclared[-1] == "lm_head"


def test_rows_without_a_merged_adapter_are_refused():
    model = tiny("llama", F64)
    adapters = attached(model, "lora", "bitfit")
    both = model(ids(2), adapter_ids=["lora", ("lora", "bitfit")]).logits
    adapters.merge("lora")
    assert difference(model(ids(2), adapter_ids=["lora", ("lora", "bitfit")]).logits, both) <= EXACT
    for wanted in ("bitfit", ["lora", None], ["lora", "bitfit"]):
        with pytest.raises(ValueError, match="'lora' is merged into the base"):
            model(ids(2), adapter_ids=wanted)
    with adapters.use(None), pytest.raises(UserError, match="unmerge"):
        model(ids(2))
    for act, says in ((lambda: adapters.merge("lora"), "merged already"), (lambda: adapters.remove("lora"), "unmerge"),
                      (lambda: adapters.unmerge("bitfit"), "is not merged")):
        with pytest.raises(UserError, match=says):
            act()


@pytest.mark.parametrize("name", [n for n in METHOD_CASES if n not in MERGEABLE])
def test_a_method_that_is_no_change_of_weights_says_so(name):
    model = tiny("llama")
    adapters = attached(model, name)
    before = bits(model)
    with pytest.raises(UserError, match=f"{METHOD_CASES[name].name} is not a change of weights"):
        adapters.merge(name)
    assert same(bits(model), before) and adapters.merged == ()


def test_a_merge_that_fails_half_way_changes_nothing():
    model = tiny("llama")
    adapters = attached(model, "lora")
    before, out = bits(model), model(ids(2)).logits
    last = list(adapters.get("lora").edits.values())[-1][1]
    kept, last.B.data = last.B.data, last.B.data[:, :1]
    with pytest.raises(RuntimeError):
        adapters.merge("lora")
    last.B.data = kept
    assert same(bits(model), before) and adapters.merged == () and torch.equal(model(ids(2)).logits, out)


def test_the_fingerprint_names_the_base_in_any_precision_and_ignores_what_is_merged():
    low = tiny("llama", torch.bfloat16)
    single = tiny("llama")
    single.load_state_dict(low.state_dict())
    prints = {attach(low).fingerprint(), attach(single).fingerprint()}
    assert len(prints) == 1
    adapters = single.adapters
    fill(adapters.add("a", LoRA()))
    adapters.add("p", Prefix())
    adapters.merge("a")
    assert adapters.fingerprint() in prints
    adapters.unmerge("a")
    assert adapters.fingerprint() in prints
    with torch.no_grad():
        single.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert adapters.fingerprint() not in prints


def test_compiled_layers_see_a_merge():
    torch._dynamo.reset()
    model = tiny("llama", F64)
    adapters = attached(model, "lora")
    alive = model(ids(2), use_cache=False).logits
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        assert difference(model(ids(2), use_cache=False).logits, alive) <= EXACT
        adapters.merge("lora")
        assert difference(model(ids(2), use_cache=False).logits, alive) <= EXACT
        adapters.unmerge("lora")
        assert difference(model(ids(2), use_cache=False).logits, alive) <= EXACT
