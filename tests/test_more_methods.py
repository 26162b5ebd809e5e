"""Methods beside LoRA compute what their papers say, written here densely; what they share with PEFT is PEFT's to the number."""
import dataclasses
import json

import peft.tuners.boft.layer as peft_boft
import pytest
import torch
from peft import BOFTConfig, PeftModel, get_peft_model
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from tiny import EXACT, FALCONS, LOOSER, METHOD_CASES, attached, difference, fill, ids, tiny
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tsugiki.adapters import attach
from tsugiki.edit import Edit, changes_input, mergeable
from tsugiki.errors import UserError
from tsugiki.formats import disk
from tsugiki.methods import BOFT, IA3, OFT, LNTuning, LoHa, LoKr
from tsugiki.methods.lokr import factors
from tsugiki.methods.oft import cayley, cayley_neumann, divisor
from tsugiki.sites import FAMILIES, sites
from tsugiki.weights import dense, normaliser

F64 = torch.float64
family = pytest.mark.parametrize("kind", FAMILIES)
OF_INPUTS = [n for n, c in METHOD_CASES.items() if any(changes_input(part.edit) for part in c.parts)]
FOLDED = [n for n, c in METHOD_CASES.items() if all(part.edit.merge is not Edit.merge for part in c.parts)]
AT_LINEARS = [n for n in FOLDED if "q" in METHOD_CASES[n].edit.roles and any(f.name == "targets" for f in dataclasses.fields(
    METHOD_CASES[n]))]


def merged_pairs(cfg, kind="llama", scale=0.3):
    """(site, edit, frozen weight, frozen bias, merged weight, merged bias) of every site of a filled adapter, merged in float64."""
    model = tiny(kind, F64)
    adapters = attach(model)
    adapter = fill(adapters.add("a", cfg), seed=1, scale=scale)

    def now(site):
        bias = getattr(site.exit, "bias", None)
        return dense(site.exit).clone(), None if bias is None else bias.clone()
    before = {s.name: now(s) for s in adapter.sites}
    alive = model(ids(2)).logits
    adapters.merge("a")
    assert difference(model(ids(2)).logits, alive) <= EXACT
    for site, edit in adapter.edits.values():
        yield site, edit, *before[site.name], *now(site)


# Weights by the papers' formulas

def test_lohas_merged_weight_is_the_hadamard_product_of_two_low_rank_matrices():
    for _, e, w, _, merged, _ in merged_pairs(LoHa(rank=3, alpha=7.0)):
        change = torch.stack([(e.w1_a[:, i:i + 1] @ e.w1_b[i:i + 1]) * (e.w2_a[:, j:j + 1] @ e.w2_b[j:j + 1])
                              for i in range(3) for j in range(3)]).sum(0) * 7 / 3
        assert difference(merged, w + change) <= EXACT and float(change.abs().max()) > 1e-2
        assert torch.linalg.matrix_rank(change) == 9, "rank^2, which a low-rank product of as many numbers cannot reach"


@pytest.mark.parametrize("cfg, parts", [
    (LoKr(rank=4), ({"w1", "w2"}, {"w1", "w2_a", "w2_b"})), (LoKr(rank=64), ({"w1", "w2"},)),
    (LoKr(rank=2, decompose_both=True, alpha=3.0), ({"w1_a", "w1_b", "w2_a", "w2_b"},)),
    (LoKr(rank=3, factor=4), ({"w1", "w2_a", "w2_b"},))])
def test_lokrs_merged_weight_is_a_kronecker_product_that_the_forward_never_makes(cfg, parts, monkeypatch):
    found = set()
    for site, e, w, _, merged, _ in merged_pairs(cfg):
        p = dict(e.named_parameters())
        w1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
        w2 = p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]
        assert w1.shape == tuple(factors(d, cfg.factor)[0] for d in (site.d_out, site.d_in))
        change = torch.einsum("lm,kn->lkmn", w1, w2).reshape(site.d_out, site.d_in) * cfg.alpha / cfg.rank
        assert difference(merged, w + change) <= EXACT and float(change.abs().max()) > 1e-2
        found.add(frozenset(p))
    assert found == {frozenset(part) for part in parts}
    model = tiny("llama", F64)
    fill(attach(model).add("a", cfg))
    monkeypatch.setattr(torch, "kron", None)
    model(ids(1))


def test_lokrs_factors_are_pefts():
    for d in [*range(1, 400), 768, 4096, 11008, 14336]:
        for factor in (-1, 1, 2, 3, 4, 5, 8, 12, 16, 500):
            assert factors(d, factor) == factorization(d, factor), (d, factor)


@pytest.mark.parametrize("cfg", [OFT(size=8, neumann=False), OFT(blocks=4, neumann=False), OFT(size=16, shared=True, neumann=False),
                                 OFT(size=8), OFT(size=8, terms=8)])
def test_ofts_merged_weight_is_the_frozen_one_times_a_block_diagonal_rotation(cfg):
    for site, e, w, b, merged, bias in merged_pairs(cfg, kind="opt"):
        change = e.change(e.R)
        blocks = (change + torch.eye(e.size)).expand(site.d_in // e.size, -1, -1)
        r = torch.block_diag(*blocks)
        assert difference(merged, w @ r.T) <= EXACT and torch.equal(bias, b)
        assert len(e.R) == (1 if cfg.shared else len(blocks)) and difference(r, torch.eye(site.d_in)) > 0.1
        if not cfg.neumann:
            assert difference(r @ r.T, torch.eye(site.d_in, dtype=F64)) <= EXACT
            assert abs(float(torch.linalg.det(r)) - 1) < 1e-9


def test_the_series_is_pefts_and_nears_a_rotation_with_its_terms():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 15, generator=generator, dtype=F64) * 0.1
    theirs = OFTRotationModule(3, 15, 6, 18)
    q, eye, off = theirs._pytorch_skew_symmetric(values, 6), torch.eye(6, dtype=F64), []
    for terms in range(2, 12):
        ours = cayley_neumann(q, terms) + eye
        assert difference(ours, theirs._cayley_batch(values, 6, True, terms)) <= EXACT
        off.append(difference(ours @ ours.mT, eye))
    assert off[1] == off[2] and all(b < a for a, b in zip(off[2:], off[4:], strict=False)) and off[-1] < off[0] / 1e3, off
    exact = torch.linalg.solve(eye - q, eye + q, left=False)
    assert difference(cayley_neumann(q, 80) + eye, exact) <= EXACT
    assert difference((cayley(q) + eye) @ exact, eye) <= EXACT, "the exact one turns the other way, as in PEFT"


def test_a_block_size_that_does_not_divide_is_adjusted_as_in_peft():
    for d in range(2, 130):
        for wanted in range(1, 140):
            assert divisor(d, wanted) == OFTLayer.adjust_oft_parameters(None, d, wanted), (d, wanted)


def test_a_constrained_rotation_stays_near_the_identity_and_steps_from_there():
    cfg = OFT(size=16, constrained=True, eps=0.05, neumann=False)
    model, plain = tiny("llama", F64), tiny("llama", F64)
    a = fill(attach(model).add("a", cfg), seed=1, scale=0.5)
    b = attach(plain).add("a", OFT(size=16, neumann=False))
    for (_, mine), (_, free) in zip(a.edits.values(), b.edits.values(), strict=True):
        with torch.no_grad():
            free.R.copy_(mine.held())
        length = free.R.norm(dim=1) * (2 * len(mine.R))**0.5
        assert difference(length, torch.full_like(length, 0.05)) <= EXACT < difference(mine.R, free.R)
    for m in (model, plain):
        m(ids(2), labels=ids(2)).loss.backward()
    assert difference(model(ids(2)).logits, plain(ids(2)).logits) <= EXACT
    for p, q in zip(a.parameters().values(), b.parameters().values(), strict=True):
        assert difference(p.grad, q.grad) <= EXACT and not torch.equal(p, q)
    cfg.after_step(a, 1, 9)
    assert all(difference(p, q) <= EXACT for p, q in zip(a.parameters().values(), b.parameters().values(), strict=True))


@pytest.fixture
def butterflies(monkeypatch):
    """PEFT has more than one butterfly factor only with its CUDA extension; here is what that computes."""
    class Blocks:
        @staticmethod
        def apply(x):                                 # (N, D, H, H) -> (N, D*H, D*H)
            return torch.stack([torch.block_diag(*blocks) for blocks in x])
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft_boft, "FastBlockDiag", Blocks)


@pytest.mark.parametrize("cfg", [BOFT(size=8), BOFT(size=8, factors=2), BOFT(size=4, factors=4), BOFT(blocks=4, factors=3)])
def test_bofts_merged_weight_is_scaled_and_turned_by_a_butterfly_of_rotations(cfg, butterflies):
    for site, e, w, b, merged, bias in merged_pairs(cfg, kind="opt"):
        with torch.device("cpu"):
            layer = peft_boft.Linear(nn.Linear(site.d_in, site.d_out).double(), "x", BOFTConfig(
                boft_block_size=0 if cfg.blocks else cfg.size, boft_block_num=cfg.blocks, boft_n_butterfly_factor=cfg.factors))
        with torch.no_grad():
            layer.boft_R["x"].data, layer.boft_s["x"].data = e.R.data, e.s.data[:, None]
            eye = torch.eye(site.d_in, dtype=F64)
            turn = eye
            for i, blocks in enumerate(e.R):
                skew = [0.5 * (r - r.T) for r in blocks]
                small = torch.eye(len(skew[0]), dtype=F64)
                p = layer.boft_P[i].double()
                turn = p @ torch.block_diag(*[(small - s) @ torch.linalg.inv(small + s) for s in skew]) @ p.T @ turn
            assert difference(turn, layer.get_delta_weight("x")[0]) < 1e-6        # PEFT's identity is float32
            assert difference(turn @ turn.T, eye) <= EXACT and difference(turn, eye) > 0.1
            assert difference(merged, e.s[:, None] * (w @ turn.T)) <= EXACT and difference(bias, b) <= EXACT


def test_peft_reads_and_writes_several_butterfly_factors(butterflies, tmp_path):
    config = BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=3, init_weights=False, task_type="CAUSAL_LM",
                        target_modules=["q_proj", "down_proj"])
    wrapped = get_peft_model(tiny("llama"), config).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    model = tiny("llama")
    adapters = attach(model)
    cfg = adapters.load("a", tmp_path / "theirs").cfg
    assert cfg == BOFT(size=8, factors=3, targets=("q", "down"))
    with torch.no_grad():
        right = wrapped(input_ids=ids(2)).logits
        assert difference(model(ids(2)).logits, right) < 1e-5 < 1e-2 < difference(model(ids(2), adapter_ids=()).logits, right)
        adapters.save("a", tmp_path / "ours")
        assert difference(PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours").eval()(input_ids=ids(2)).logits, right) < 1e-5


def test_ia3_scales_outputs_with_their_bias_and_inputs():
    found = set()
    for site, e, w, b, merged, bias in merged_pairs(IA3(), kind="opt"):
        found.add(site.role)
        if site.role == "down":
            assert difference(merged, w @ torch.diag(e.l_in)) <= EXACT and torch.equal(bias, b) and not hasattr(e, "l")
        else:
            assert difference(merged, torch.diag(e.l) @ w) <= EXACT and difference(bias, e.l * b) <= EXACT
    assert found == {"k", "v", "down"}


@pytest.mark.parametrize("cfg, scaled", [
    (IA3(targets="linear", inputs=None), set()), (IA3(targets=("down",)), {"down"}), (IA3(targets="linear", inputs="linear"), None),
    (IA3(targets="linear", inputs="o"), {"o"}), (IA3(targets=("q", "o"), inputs=r"\.o_proj$"), {"o"})])
def test_which_of_ia3s_sites_are_scaled_at_their_input_is_a_setting(cfg, scaled):
    adapter = attach(tiny("llama")).add("a", cfg)
    got = {site.role for site, e in adapter.edits.values() if changes_input(e)}
    assert got == ({s.role for s in adapter.sites} if scaled is None else scaled)
    assert sum(p.numel() for p in adapter.parameters().values()) == sum(
        s.d_in if changes_input(e) else s.d_out for s, e in adapter.edits.values())


# Norms

@family
def test_tuned_norms_are_the_model_with_other_norms_and_start_as_its_own(kind):
    model, other = tiny(kind, F64), tiny(kind, F64)
    adapter = attach(model).add("a", LNTuning())
    for site in sites(other):
        if site.role == "norm":
            mine = adapter.edits[site.name][1]
            assert torch.equal(mine.weight, site.exit.weight)
            assert (mine.bias is None) == (getattr(site.exit, "bias", None) is None)
    fill(adapter, seed=1)
    with torch.no_grad():
        base = other(ids(2)).logits
        for site in sites(other):
            if site.role == "norm":
                for name, p in adapter.edits[site.name][1].named_parameters():
                    getattr(site.exit, name).copy_(p)
        right = other(ids(2)).logits
        assert difference(model(ids(2)).logits, right) <= LOOSER.get(kind, EXACT) and difference(right, base) > 1e-3


class Odd(nn.Module):
    """An eps of another name beside numbers that are none, the mean taken out, and 1 + weight."""
    def __init__(self, width):
        super().__init__()
        self.weight, self.scale, self.tiny_number = nn.Parameter(torch.zeros(width)), 2.0, 3e-4

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + self.tiny_number).sqrt() * (1 + self.weight)


class Strange(Odd):
    def forward(self, x):
        return x / x.abs().mean(-1, keepdim=True) * self.weight


@pytest.mark.parametrize("norm, centred, eps", [
    (nn.LayerNorm(48), True, 1e-5), (nn.LayerNorm(48, eps=1e-3, bias=False), True, 1e-3), (nn.RMSNorm(48, eps=1e-8), False, 1e-8),
    (LlamaRMSNorm(48, eps=1e-6), False, 1e-6), (LlamaRMSNorm(48, eps=1e-5).bfloat16(), False, 1e-5),
    (Gemma3RMSNorm(48, eps=1e-4), False, 1e-4), (Odd(48), True, 3e-4), (LlamaRMSNorm(48).to("meta"), False, 1e-6)])
def test_what_a_norm_does_is_found_by_trying_it(norm, centred, eps):
    before = None if norm.weight.is_meta else {k: v.clone() for k, v in norm.state_dict().items()}
    n = normaliser(norm)
    assert (n.centred, n.eps) == (centred, eps)
    if before is not None:
        assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in norm.state_dict().items())
    x = torch.randn(2, 3, 4, 48, dtype=torch.bfloat16)
    assert n(x).dtype == torch.float32 and n(x.double()).dtype == F64


def test_a_norm_of_another_kind_is_refused_in_one_line():
    model = tiny("llama")
    model.model.norm = Strange(64)
    adapters = attach(model)
    with pytest.raises(UserError) as e:
        adapters.add("a", LNTuning())
    assert "Strange is a norm of a kind that is not known here" in str(e.value) and "\n" not in str(e.value)
    assert adapters.names() == ()


# Together with others

@pytest.mark.share(2)
@pytest.mark.parametrize("first, second", [(a, b) for a in FOLDED for b in FOLDED if a != b and (a in OF_INPUTS or b in OF_INPUTS)])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_changes_of_inputs_and_outputs_merge_in_the_order_of_the_stack(first, second, kind):
    model = tiny(kind, F64)
    adapters = attached(model, first, second, scale=0.2)
    with torch.no_grad():
        right = model(ids(2), adapter_ids=(first, second)).logits
        turned = model(ids(2), adapter_ids=(second, first)).logits
        adapters.merge(first)
        adapters.merge(second)
        assert difference(model(ids(2)).logits, right) <= EXACT
        adapters.unmerge(first)
        adapters.merge(first)
        assert difference(model(ids(2)).logits, turned) <= EXACT
    if {first, second} == {"oft", "boft"}:
        assert difference(right, turned) > 1e-3, "the order does not matter here: nothing was tested"


@pytest.mark.share(3)
@pytest.mark.parametrize("name", AT_LINEARS)
@pytest.mark.parametrize("kind, overrides", [("phi3", {}), ("gpt2", {}), ("bloom", {}), ("falcon", FALCONS["new_decoder"])],
                         ids=["phi3", "gpt2", "bloom", "falcon"])
def test_parts_of_fused_weights_are_edited_and_merged_or_refused(kind, overrides, name):
    model = tiny(kind, F64, **overrides)
    adapters = attach(model)
    base = model(ids(2)).logits
    cfg = dataclasses.replace(METHOD_CASES[name], targets=("q", "v"))
    if changes_input(cfg.edit):
        with pytest.raises(UserError, match="changes its site's input, which .* shares with others"):
            adapters.add("a", cfg)
        return
    fill(adapters.add("a", cfg), seed=1)
    with torch.no_grad():
        alive = model(ids(2)).logits
        adapters.merge("a")
        assert difference(model(ids(2)).logits, alive) <= EXACT and difference(alive, base) > 1e-4
        adapters.unmerge("a")
        assert torch.equal(model(ids(2), adapter_ids=()).logits, base)


@pytest.mark.parametrize("name", [n for n in AT_LINEARS if "head" in METHOD_CASES[n].edit.roles])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_tied_head_is_changed_without_its_embedding(kind, name):
    model = tiny(kind, F64, tie_word_embeddings=True)
    adapters = attach(model)
    adapter = fill(adapters.add("a", dataclasses.replace(METHOD_CASES[name], targets=("head",))), seed=1)
    assert all(mergeable(e) for _, e in adapter.edits.values())
    table = model.get_input_embeddings().weight
    before = table.clone()
    with torch.no_grad():
        base, alive = model(ids(2), adapter_ids=()).logits, model(ids(2)).logits
        adapters.merge("a")
        assert difference(model(ids(2)).logits, alive) <= EXACT and difference(alive, base) > 1e-3
        assert torch.equal(table, before) and model.get_output_embeddings().weight is not table
        adapters.unmerge("a")
        assert model.get_output_embeddings().weight is table


def test_an_input_shared_by_the_parts_of_a_fused_linear_cannot_be_scaled_for_one():
    adapters = attach(tiny("phi3"))
    with pytest.raises(UserError, match=r"ia3 changes its site's input, which model\.layers\.0\.mlp\.gate_up_proj\.up shares"):
        adapters.add("a", IA3(targets=("gate", "up"), inputs=("up",)))
    assert adapters.names() == ()


@pytest.mark.parametrize("cfg, kind, says", [
    (BOFT(size=7), "llama", "boft: model.layers.0.self_attn.q_proj has 64 inputs, which 9 blocks of 7 with 1 factors do not cut"),
    (BOFT(size=8, factors=5), "llama", "a multiple of 16"), (BOFT(blocks=3), "llama", "which 3 blocks of 21"),
    (IA3(inputs="("), "llama", "inputs '(' is not a regular expression"),
    (LNTuning(targets=("q",)), "llama", "no site has the role 'q'")])
def test_what_does_not_fit_is_one_line(cfg, kind, says):
    adapters = attach(tiny(kind))
    with pytest.raises(UserError) as e:
        adapters.add("a", cfg)
    assert says in str(e.value) and "\n" not in str(e.value) and adapters.names() == ()


# PEFT's folders

@pytest.mark.parametrize("change, says", [
    ({"peft_version": "0.17.1"}, "peft_version: '0.17.1': the series of use_cayley_neumann is that of PEFT 0.18.0 and later"),
    ({"peft_version": None}, "peft_version: '0'"), ({"module_dropout": 0.1}, "module_dropout: '0.1' is not supported"),
    ({"peft_version": "0.18.1.dev0@abc"}, None), ({"peft_version": None, "use_cayley_neumann": False}, None)])
def test_a_series_of_an_older_peft_is_refused(change, says, tmp_path):
    attach(model := tiny("llama")).add("a", OFT(size=8))
    model.adapters.save("a", tmp_path)
    (tmp_path / disk.MANIFEST).unlink()
    config = json.loads((tmp_path / disk.CONFIG).read_text())
    (tmp_path / disk.CONFIG).write_text(json.dumps(config | change))
    if says is None:
        attach(tiny("llama")).load("x", tmp_path)
        return
    with pytest.raises(UserError) as e:
        attach(tiny("llama")).load("x", tmp_path)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_vector_that_lies_otherwise_in_a_peft_folder_is_refused(tmp_path):
    attach(model := tiny("llama")).add("a", IA3())
    model.adapters.save("a", tmp_path)
    (tmp_path / disk.MANIFEST).unlink()
    from safetensors.torch import load_file, save_file
    tensors = load_file(tmp_path / disk.TENSORS)
    assert {tuple(t.shape) for t in tensors.values()} == {(32, 1), (1, 128)}
    save_file({k: t.T.contiguous() for k, t in tensors.items()}, tmp_path / disk.TENSORS)
    with pytest.raises(UserError, match=r"has shape \(1, 32\), expected \(32, 1\)|has shape \(128, 1\), expected \(1, 128\)"):
        attach(tiny("llama")).load("x", tmp_path)
