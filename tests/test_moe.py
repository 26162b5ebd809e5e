"""Mixtures of experts: sparse and dense layers have the sites they can have, and no row's experts depend on another row."""
import pytest
import torch
from kit import TOKENIZER, llama
from tiny import EXACT, METHOD_CASES, attached, difference, fill, ids, tiny
from transformers import AutoModelForCausalLM

import tsugiki as tg
from tsugiki.adapters import attach
from tsugiki.errors import UserError
from tsugiki.formats.export import merge_to_folder
from tsugiki.methods import IA3, Full, LoRA, Parallel, SeriesLinear
from tsugiki.plan import _Case, _count, base_config
from tsugiki.sites import FAMILIES, SHARED_GATE
from tsugiki.weights import few_bits

F64 = torch.float64
KINDS = [kind for kind, family in FAMILIES.items() if family.experts]
kinds = pytest.mark.parametrize("kind", KINDS)
IN_MLP = {"gate", "up", "down", SHARED_GATE}


def sparse_layers(model):
    return [n for n, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]


@kinds
@pytest.mark.parametrize("dense", [[], [0], [1], [0, 1]], ids=str)
def test_a_layer_has_the_linears_it_has_and_an_mlp_either_way(kind, dense):
    if dense and not hasattr(tiny(kind).config, "mlp_only_layers"):
        pytest.skip("all of its layers are sparse")
    model = tiny(kind, **({"mlp_only_layers": dense} if hasattr(tiny(kind).config, "mlp_only_layers") else {}))
    found, sparse = attach(model).sites, sparse_layers(model)
    assert sparse == [n for n in (0, 1) if n not in dense]
    for n in (0, 1):
        here = {s.role for s in found if s.layer == n} & IN_MLP
        assert here == ({"gate", "up", "down"} if n in dense else {*FAMILIES[kind].shared}), n
        mlp, = (s for s in found if s.layer == n and s.role == "mlp")
        assert mlp.span == (n in dense) and mlp.d_in == mlp.d_out == 64
        assert n in dense or mlp.exit is model.model.layers[n].mlp


@kinds
def test_a_parallel_adapter_of_a_sparse_block_adds_a_function_of_its_input(kind):
    model = tiny(kind, F64)
    adapters, n = attach(model), sparse_layers(model)[-1]
    adapter = fill(adapters.add("a", Parallel(size=8)), seed=1)
    edit = next(edit for site, edit in adapter.edits.values() if site.layer == n)
    seen = []
    handle = model.model.layers[n].mlp.register_forward_hook(lambda m, a, y: seen.append((a[0], y)))
    with torch.no_grad():
        model(ids(2), adapter_ids="a")
        handle.remove()
        (x, y), = seen
        base = type(model.model.layers[n].mlp).forward(model.model.layers[n].mlp, x)
        assert difference(y, base + edit.change(x)) <= EXACT and difference(y, base) > 1e-2


@kinds
def test_the_experts_of_a_row_are_those_it_has_alone_and_adapters_change_them(kind):
    model = tiny(kind, F64)
    adapters = attached(model, "lora", "parallel", "prefix", scale=0.5)
    who, x, picked = [*adapters.names(), None], ids(4), []
    for n in sparse_layers(model):
        model.model.layers[n].mlp.gate.register_forward_hook(lambda m, a, y: picked.append(y[2]))

    def run(rows, names):
        """Experts by sparse layer, row and real token."""
        picked.clear()
        with torch.no_grad():
            model(input_ids=rows, adapter_ids=names)
        return [p.view(len(rows), -1, p.shape[-1])[:, -10:].sort(-1).values for p in picked]
    together, plain = run(x, who), run(x, [None] * 4)
    for i, name in enumerate(who):
        alone = run(x[i:i + 1], [name])
        assert all(torch.equal(a[i], b[0]) for a, b in zip(together, alone, strict=True)), name
        assert name is None or any(not torch.equal(a[i], b[i]) for a, b in zip(together, plain, strict=True)), name


@kinds
def test_grouped_products_and_single_experts_agree(kind):
    """transformers multiplies groups of tokens at once unless told not to; adapters and their gradients are the same."""
    found = {}
    for way in ("eager", "grouped_mm"):
        model = tiny(kind)
        model.set_experts_implementation(way)
        adapters = attached(model, "lora", "parallel", scale=0.05)
        logits = model(ids(2), adapter_ids=["lora", "parallel"]).logits
        logits.square().mean().backward()
        found[way] = [logits.detach(), *(p.grad for p in adapters.parameters())]
    assert all(difference(a, b) < 1e-5 for a, b in zip(*found.values(), strict=True))


@kinds
def test_targets_that_no_linear_holds_are_one_line_that_says_what_does(kind):
    dense = {"mlp_only_layers": []} if hasattr(tiny(kind).config, "mlp_only_layers") else {}
    adapters = attach(tiny(kind, **dense))
    shared = bool(FAMILIES[kind].shared)
    for cfg in (LoRA(targets=("q", "gate_up")), LoRA(targets=r"experts\.down"), *([] if shared else [SeriesLinear()])):
        with pytest.raises(UserError) as e:
            adapters.add("a", cfg)
        says = str(e.value)
        assert "\n" not in says and "method full trains them" in says and " q k v o " in says.partition("roles here:")[2]
    with pytest.raises(UserError, match="did you mean 'mlp'"):
        adapters.add("a", Parallel(targets=("mpl",)))
    assert adapters.names() == ()


@kinds
def test_a_methods_own_roles_that_are_not_here_are_left_out_and_a_users_are_refused(kind):
    dense = {"mlp_only_layers": []} if hasattr(tiny(kind).config, "mlp_only_layers") else {}
    adapters = attach(tiny(kind, **dense))
    roles = {s.role for s in adapters.add("default", IA3()).sites}
    assert roles == {"k", "v"} | ({"down"} if FAMILIES[kind].shared else set())
    if not FAMILIES[kind].shared:
        with pytest.raises(UserError, match="no site has the role 'down'"):
            adapters.add("asked", IA3(targets=("k", "down")))


def test_a_model_of_dense_and_sparse_layers_is_edited_where_it_can_be():
    adapters = attach(tiny("qwen3_moe", mlp_only_layers=[1]))
    assert [s.name for s in adapters.add("a", SeriesLinear()).sites] == ["model.layers.1.mlp.down_proj"]


@kinds
def test_full_fine_tuning_of_the_experts_alone(kind):
    model = tiny(kind)
    chosen = Full(params=r"\.experts\.").select(model)
    assert {n.rpartition(".")[2] for n in chosen} == {"gate_up_proj", "down_proj"}
    assert len(chosen) == 2 * len(sparse_layers(model)) and all(p.dim() == 3 for p in chosen.values())
    model(ids(4), labels=ids(4)).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in chosen.values())


@pytest.mark.share(3)
@kinds
@pytest.mark.parametrize("cfg", [LoRA(rank=3), Full(params=r"\.experts\.")], ids=["lora", "experts"])
def test_a_plan_counts_the_experts_a_token_passes(kind, cfg, tmp_path):
    """On shapes alone what a real step holds and does, and more of it with another expert a token."""
    done = {}
    for top in (2, 3):
        tiny(kind, num_experts_per_tok=top).config.save_pretrained(tmp_path / str(top))
        read = base_config(str(tmp_path / str(top)))
        case = _Case(cfg, 4, 16, 0.5, torch.float32, torch.device("cpu"), torch.float32, False)
        shapes, real = _count(case, read), _count(case, read, fake=False)
        assert (shapes.trainable, shapes.flops) == (real.trainable, real.flops)
        assert max(shapes.early, shapes.late) == pytest.approx(max(real.early, real.late), rel=5e-3)
        done[top] = shapes.flops
    model = tiny(kind)
    ff = model.model.layers[-1].mlp.experts.down_proj.shape[-1]
    forward = 2 * 64 * 3 * 64 * ff * len(sparse_layers(model))             # 64 tokens, gate, up and down of one expert more
    assert done[3] - done[2] >= 2 * forward


def test_the_gate_of_a_shared_expert_takes_an_adapter_that_merges():
    model = tiny("qwen2_moe", F64)
    adapters = attach(model)
    assert SHARED_GATE not in {s.role for s in adapters.add("linear", LoRA(rank=1)).sites}
    fill(adapters.add("a", LoRA(rank=1, targets=(SHARED_GATE,))), seed=1, scale=1.0)
    x = ids(3)
    with torch.no_grad():
        together = model(x, adapter_ids=["a", None, "a"]).logits
        alone = [model(x[i:i + 1], adapter_ids=[n]).logits[0] for i, n in enumerate(("a", None, "a"))]
        assert max(difference(a, b) for a, b in zip(together, alone, strict=True)) <= EXACT
        assert difference(together[0], model(x, adapter_ids=()).logits[0]) > 1e-4
        adapters.remove("linear")
        adapters.active = "a"
        alive = model(x).logits
        adapters.merge("a")
        assert difference(model(x).logits, alive) <= EXACT


@kinds
def test_a_merged_folder_loads_as_the_live_model_with_its_experts_as_they_were(kind, tmp_path):
    model = llama(kind=kind)
    adapters = attach(model)
    fill(adapters.add("a", LoRA(rank=4)), scale=0.05)
    x = ids(2)
    with torch.no_grad():
        live, base = model(x).logits, model(x, adapter_ids=()).logits
        merge_to_folder(model, TOKENIZER, adapters, ["a"], tmp_path / "m", dtype=torch.float32)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
        assert difference(again(x).logits, live) < 1e-5 and difference(live, base) > 1e-3
    there = dict(again.named_parameters())
    assert all(torch.equal(there[n], p) for n, p in model.named_parameters() if ".experts." in n)


@kinds
def test_a_base_in_float64_is_loaded_with_experts_that_can_compute_in_it(kind, tmp_path):
    llama(kind=kind).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model, _ = tg.load(str(tmp_path), dtype="fp64", device="cpu")
    assert difference(model(ids(2)).logits, llama(kind=kind)(ids(2)).logits.double()) < 1e-5


@kinds
@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits_store_the_linears_and_leave_the_experts(kind, bits, tmp_path):
    """Every method in one batch equals each row alone there too, as close as float32 sums are."""
    pytest.importorskip("bitsandbytes")
    llama(kind=kind).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model, _ = tg.load(str(tmp_path), bits=bits, dtype="fp32", device="cpu")
    adapters = attached(model)
    linears = {s.exit for s in adapters.sites if s.role in ("q", "k", "v", "o", *IN_MLP)}
    assert {few_bits(m) for m in linears} == {bits}
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".experts." in n)
    x, who = ids(len(METHOD_CASES)), list(METHOD_CASES)
    with torch.no_grad():
        together, base = model(x, adapter_ids=who).logits, model(x, adapter_ids=()).logits
        for i, name in enumerate(who):
            assert difference(together[i], model(x[i:i + 1], adapter_ids=[name]).logits[0]) < 2e-5, name
            assert difference(together[i], base[i]) > 1e-4, name
