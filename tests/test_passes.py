"""The compiled passes over activations and the low-rank product: nearer to the truth than their twins, and only in their place."""
from __future__ import annotations

import copy
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCAB, tiny
from torch import nn
from torch._dynamo.testing import CompileCounter

from tsugiki.adapters import attach
from tsugiki.evaluate.decode import Decoder
from tsugiki.evaluate.packed import Packed, packed
from tsugiki.kernels import head, low_rank, native, passes
from tsugiki.kernels.passes import Gated, RMSNorm, Rotary, single
from tsugiki.methods import IA3, LoRA
from tsugiki.route import Spans
from tsugiki.sites import FAMILIES
from tsugiki.train.compiled import compiling

pytestmark = pytest.mark.skipif(native.library() is None,
                                reason="no gcc here, or a processor that does not multiply bfloat16: there is no compiled kernel")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
NORMS = {"rounded inside": (0.0, True), "from one": (1.0, False), "rounded once": (0.0, False)}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def norm(x, w, offset, inner):
    y = x.to(torch.promote_types(x.dtype, F32))
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5)
    return w * y.to(x.dtype) if inner else (y * (w.to(y.dtype) + offset)).to(x.dtype)


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat([-b, a], -1) * sin.unsqueeze(1)


def results(function, inputs, grad, dtype):
    given = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out = function(*given)
    return [out, *torch.autograd.grad(out, given, grad.to(out.dtype))]


def check(kernel, plain, inputs, grad, dtype, least=0.99):
    """Output and every gradient: as near to float64's as the plain twin's, the same bits again, and close with three threads."""
    rounded = [t.to(dtype).double() for t in inputs]
    truth, ours, twin = (results(f, rounded, grad, d) for f, d in ((plain, F64), (kernel, dtype), (plain, dtype)))
    again, before = results(kernel, rounded, grad, dtype), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threads = results(kernel, rounded, grad, dtype)
    finally:
        torch.set_num_threads(before)
    for t, a, b, c, d in zip(truth, ours, twin, again, threads, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, c)
        assert (a - t).norm() <= max(1.05 * (b - t).norm(), 1e-6 * t.norm()) and t.norm() > 0
        assert (a - d).norm() <= 1e-3 * t.norm()


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(5, 70, 24), (3, 576), (2, 3, 4, 33), (200, 1)], ids=str)
def test_norms_are_nearer_to_the_truth(shape, kind, dtype):
    offset, inner = NORMS[kind]
    check(lambda x, w: RMSNorm.apply(x, w, 1e-5, offset, inner), lambda x, w: norm(x, w, offset, inner),
          [3 * draw(*shape), draw(shape[-1], seed=1)], draw(*shape, seed=2), dtype)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("tanh", [False, True])
def test_gated_activations_are_nearer_to_the_truth(tanh, dtype):
    def plain(a, b):
        return (F.gelu(a, approximate="tanh") if tanh else F.silu(a)) * b
    check(lambda a, b: Gated.apply(a, b, tanh), plain, [4 * draw(7, 1111), draw(7, 1111, seed=1)], draw(7, 1111, seed=2), dtype)


def test_gated_activations_far_out_are_zero_or_the_identity():
    a = torch.tensor([-1e20, -300.0, -90.0, 0.0, 90.0, 300.0, float("nan")], requires_grad=True)
    for tanh in (False, True):
        y = Gated.apply(a, torch.ones(7), tanh)
        g, = torch.autograd.grad(y.nansum(), a)
        assert torch.allclose(y[:6], torch.tensor([0.0, 0, 0, 0, 90, 300]), atol=1e-12) and bool(y[6].isnan())
        assert torch.allclose(g[1:6], torch.tensor([0.0, 0, 0.5, 1, 1]), atol=1e-6)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("rows, d", [(1, 64), (3, 24), (2, 2)])
def test_rotations_are_nearer_to_the_truth(rows, d, dtype):
    angle = draw(rows, 9, d // 2, seed=3).repeat(1, 1, 2)
    for many in (rows, 1):
        cos, sin = angle[:many].cos().to(dtype), angle[:many].sin().to(dtype)
        x = draw(rows, 9, 5, d).transpose(1, 2)
        check(lambda x, c=cos, s=sin: Rotary.apply(x, c, s), lambda x, c=cos, s=sin: rotated(x, c.to(x.dtype), s.to(x.dtype)),
              [x], draw(rows, 5, 9, d, seed=2), dtype)
    assert Rotary.apply(x.to(BF16), cos.float(), sin.float()).dtype == F32      # as under autocast: torch promotes


needs_amx = pytest.mark.skipif(not low_rank.works(), reason="this processor has no AMX: there is no low-rank kernel")


@needs_amx
@pytest.mark.parametrize("rank, tokens, width, out",
                         [(1, 3, 32, 64), (8, 65, 96, 32), (3, 257, 64, 160), (33, 40, 192, 32), (64, 128, 64, 64)])
def test_low_rank_products_are_nearer_to_the_truth(rank, tokens, width, out):
    x, y, grad = draw(tokens, width).to(BF16), draw(tokens, out, seed=1).to(BF16), draw(tokens, out, seed=2)
    a, b = draw(rank, width, seed=3).to(BF16).float(), draw(out, rank, seed=4).to(BF16).float()

    def both(function, dtype, factors):
        given = [t.to(d).requires_grad_() for t, d in zip((x, y, a, b), (dtype, dtype, factors, factors), strict=True)]
        made = function(*given)
        return [made, *torch.autograd.grad(made, given, grad.to(dtype))]

    def plain(x, y, a, b):
        return y + F.linear(F.linear(x, a.to(x.dtype)) * 0.3, b.to(x.dtype))
    truth, twin = both(plain, F64, F64), both(plain, BF16, F32)

    def kernel(x, y, a, b):
        return low_rank.added(x, y, [low_rank.Span(0, tokens, a, b, 0.3)])
    ours, again = (both(kernel, BF16, F32) for _ in range(2))
    for t, p, m, n in zip(truth, twin, ours, again, strict=True):
        assert m.dtype == p.dtype and m.shape == p.shape and torch.equal(m, n)
        assert (m - t).norm() <= 1.05 * (p - t).norm() + 1e-6 * t.norm()


@pytest.mark.parametrize("rank, width, out", [(1, 32, 64), (8, 96, 32), (17, 2048, 4096)])
def test_rows_with_low_rank_changes_of_their_own_are_nearer_to_the_truth(rank, width, out):
    x, y, place = draw(7, 1, width).to(BF16), draw(7, 1, out, seed=1).to(BF16), torch.tensor([2, -1, 0, 2, 1, -1, 0])
    a, b, scale = draw(3 * rank, width, seed=2).to(BF16), draw(3 * rank, out, seed=3).to(BF16), draw(3 * rank, seed=4).to(BF16)

    def plain(dtype):
        rows = []
        for i, p in enumerate(place.tolist()):
            of = slice(p * rank, (p + 1) * rank)
            low = F.linear(x[i].to(dtype), a[of].to(dtype)) * scale[of].to(dtype)
            rows.append(y[i].to(dtype) + (low @ b[of].to(dtype) if p >= 0 else 0))
        return torch.stack(rows)
    truth, ours = plain(F64), low_rank.own(x, y, a, b, scale, place, rank)
    assert ours.dtype == BF16 and (ours - truth).norm() <= 1.05 * (plain(BF16) - truth).norm()
    assert torch.equal(ours[place < 0], y[place < 0])
    a[rank], b[2 * rank - 1, 0] = float("nan"), float("inf")                    # of adapter 1
    broken = low_rank.own(x, y, a, b, scale, place, rank)
    assert torch.equal(broken[place != 1], ours[place != 1]) and not broken[place == 1].isfinite().all()


def test_what_is_not_finite_stays_in_its_row():
    x = draw(40, 64).to(BF16)
    broken = x.clone()
    broken[7, 3], broken[11, 5] = float("nan"), float("inf")
    a, b, w = draw(4, 64, seed=1).float(), draw(64, 4, seed=2).float(), torch.ones(64, dtype=BF16)
    others = torch.tensor([i not in (7, 11) for i in range(40)])
    span = [low_rank.Span(0, 40, a, b, 1.0)]
    thin = (lambda t: low_rank.added(t, x, span), lambda t: low_rank.added(x, t, span))
    rows = (lambda t: RMSNorm.apply(t, w, 1e-5, 0.0, True), lambda t: Gated.apply(t, t, False))
    for f in (*rows, *(thin if low_rank.works() else ())):
        clean, dirty = x.clone().requires_grad_(), broken.clone().requires_grad_()
        made = f(clean), f(dirty)
        grads = [torch.autograd.grad(m, t, x)[0] for m, t in zip(made, (clean, dirty), strict=True)]
        assert torch.equal(made[0][others], made[1][others]) and torch.equal(grads[0][others], grads[1][others])
        assert not made[1][7].isfinite().all() and not made[1][11].isfinite().all()


@pytest.mark.parametrize("trains", [False, True])
def test_losses_of_bfloat16_logits_are_nearer_to_the_truth(trains, monkeypatch):
    hidden, weight, bias = 2 * draw(70, 48).to(BF16), draw(301, 48, seed=1).to(BF16), draw(301, seed=2).to(BF16)
    targets, grad = torch.arange(70) * 4, draw(70, seed=3)
    monkeypatch.setattr(head, "LOGITS", 301 * 16)     # several chunks

    def both(dtype, compiled):
        monkeypatch.setattr(head, "_works", lambda: compiled)
        given = [t.to(dtype).requires_grad_(trains or n == 0) for n, t in enumerate((hidden, weight, bias))]
        losses = head.head_losses(*given, targets)
        return [losses, *torch.autograd.grad(losses, [t for t in given if t.requires_grad], grad.to(losses.dtype))]
    for t, a, b in zip(both(F64, False), both(BF16, True), both(BF16, False), strict=True):
        assert a.dtype == b.dtype and (a - t).norm() <= 1.05 * (b - t).norm()
    broken = hidden.clone()
    broken[3, 0] = float("nan")
    losses = head.head_losses(broken, weight, None, targets)
    assert losses.isnan().tolist() == [i == 3 for i in range(70)]
    with pytest.raises(IndexError):
        head.head_losses(hidden, weight, None, targets + 100)


def replaced(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if "forward" in vars(m)]


def loss_and_gradients(model):
    ids = torch.arange(3, 3 + 2 * 128).remainder(model.config.vocab_size).view(2, 128)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss, dict(zip(params, torch.autograd.grad(loss, list(params.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_with_single_passes_computes_the_same(kind, monkeypatch):
    """Every RMS norm is replaced, every gated MLP of three linears, and all of it is taken back."""
    model = tiny(kind).float()
    monkeypatch.setattr(passes, "FEW", 64)
    modeling = sys.modules[type(model).__module__]
    function = getattr(modeling, passes.ROTARY, None)
    want, wanted = loss_and_gradients(model)
    calls = {c: [] for c in (RMSNorm, Gated, Rotary)}
    for c, seen in calls.items():
        monkeypatch.setattr(c, "apply", lambda *a, c=c, seen=seen, apply=c.apply: (seen.append(1), apply(*a))[1])
    with single(model) as count:
        assert count == len(replaced(model)) + (getattr(modeling, passes.ROTARY, None) is not function)
        norms = [m for m in model.modules() if "RMSNorm" in type(m).__name__]
        mlps = [m for m in model.modules() if type(m).__name__.endswith("MLP") and {"gate_proj", "act_fn"} <= set(m._modules)]
        assert set(replaced(model)) == {*norms, *mlps}
        loss, grads = loss_and_gradients(model)
    assert not replaced(model) and getattr(modeling, passes.ROTARY, None) is function
    assert bool(calls[RMSNorm]) == bool(norms) and bool(calls[Gated]) == bool(mlps) and bool(calls[Rotary]) == (kind in ROTATED)
    assert (loss - want).abs() <= 1e-5 and grads.keys() == wanted.keys()
    for name, g in grads.items():
        if g is not None:
            assert (g - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-7, name


ROTATED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen2_moe", "qwen3_moe",
           "olmoe", "phi", "falcon", "phi3"}


def test_a_module_that_computes_something_else_keeps_its_own_forward():
    model = tiny("llama").float()

    class OtherRMSNorm(type(model.model.norm)):
        def forward(self, x):
            return super().forward(x) * 1.1

    class OtherMLP(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
    model.model.norm.__class__, model.model.layers[0].mlp.__class__ = OtherRMSNorm, OtherMLP
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    with single(model):
        left = {model.model.norm, *(layer.mlp for layer in model.model.layers[:2])}
        assert not left & set(replaced(model)) and len(replaced(model)) > 2
    assert not replaced(model)


def test_several_runs_may_be_inside_at_once_and_a_copied_model_is_its_own():
    model, other = tiny("llama").float(), tiny("llama").float()
    modeling = sys.modules[type(model).__module__]
    function = getattr(modeling, passes.ROTARY)
    first, second = single(model), single(other)
    first.__enter__()
    second.__enter__()
    copied = copy.deepcopy(model)
    first.__exit__(None, None, None)
    assert getattr(modeling, passes.ROTARY) is not function and replaced(other) and not replaced(model)
    second.__exit__(None, None, None)
    assert getattr(modeling, passes.ROTARY) is function and not replaced(other)
    assert all(m.forward.module is m for m in replaced(copied))


def test_a_copy_that_decodes_with_packed_weights_has_passes_of_its_own():
    model = tiny("llama", hidden_size=128, intermediate_size=128).float()
    for training in (True, False):
        with single(model) if training else nullcontext():
            body = packed(model, 1000)
            mlps = [m for m in body.modules() if "gate_proj" in m._modules]
            assert body is not model and mlps and all(m.forward.module is m and type(m.gate_proj) is Packed for m in mlps)
            assert sum("RMSNorm" in type(m).__name__ for m in replaced(body)) == 5
    assert not replaced(model)
    ids, rows = torch.arange(3, 3 + 64 * 5).remainder(VOCAB - 3).add(3).view(64, 5), []
    for decoder in (Decoder(model, 1000), model):
        rows.append(decoder.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None))
    assert torch.equal(*rows)


def test_without_the_kernels_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(passes, "library", lambda: None)
    model = tiny("llama").float()
    with single(model) as count:
        assert not count and not replaced(model)


@needs_amx
@pytest.mark.parametrize("settings, taken", [({}, True), ({"rank": 70}, False), ({"dropout": 0.5}, False), ({"bias": True}, False)],
                         ids=str)
def test_lora_takes_the_kernel_where_it_computes_the_same(settings, taken, monkeypatch):
    """Also with the gradient of the frozen product in it, which is only where nothing else has to do with that product."""
    model = tiny("llama").to(BF16).requires_grad_(True)
    trained = attach(model).add("a", LoRA(**{"rank": 4} | settings)).parameters().values()
    with torch.no_grad():
        for n, p in enumerate(trained):
            p.normal_(std=0.05, generator=torch.Generator().manual_seed(n))
    calls, apply = [], low_rank.Added.apply
    monkeypatch.setattr(low_rank.Added, "apply", lambda *a: (calls.append(a[2] is not None), apply(*a))[1])
    model.train().requires_grad_(True)
    everything = loss_and_gradients(model)
    assert bool(calls) == taken and not any(calls), "the base is trained: its own products have gradients"
    if not taken:
        return
    model.requires_grad_(False)
    for p in trained:
        p.requires_grad_()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, y: 2 * y)
    calls.clear()
    loss, grads = loss_and_gradients(model)
    assert sorted(calls) == [False] + [True] * (len(calls) - 1), "a product that something else changes keeps its own"
    monkeypatch.setattr(low_rank, "takes", lambda *a: False)
    want, wanted = loss_and_gradients(model)
    assert (loss - want).abs() < 0.01 * want and grads.keys() == wanted.keys() and len(grads) == len(trained)
    for name, g in grads.items():
        assert (g - wanted[name]).norm() <= 0.05 * wanted[name].norm(), name
    assert all(g is not None for g in everything[1].values())


def test_layers_with_single_passes_are_compiled_only_where_it_is_asked_for():
    model, said = tiny("llama").float(), []
    with single(model):
        for wish, want in (("auto", False), ("on", True)):
            with compiling(model.model.layers, wish, 1e30, torch.device("cpu"), said.append) as made:
                assert made.on == want
    assert not said


def test_one_compilation_serves_all_layers_of_a_model_with_single_passes():
    model = tiny("llama", num_hidden_layers=10).float()
    with single(model), compiling(model.model.layers, "on", 1.0, torch.device("cpu"), str) as made:
        assert made.on and not [m for layer in model.model.layers for m in replaced(layer)]
        backend = CompileCounter()
        for layer in model.model.layers:
            layer.compile(backend=backend)
        loss_and_gradients(model)
    assert backend.frame_count == 1 and not replaced(model)


@needs_amx
@pytest.mark.parametrize("packed_row", [False, True])
def test_several_loras_and_another_method_share_a_batch_each_on_its_own_rows(packed_row, monkeypatch):
    """With the gradient of the frozen product in it; rows of no adapter, too few tokens for one, one level on another."""
    model, few = tiny("llama", max_position_embeddings=2048).to(BF16).requires_grad_(False), 40
    adapters = attach(model)
    made = {f"a{n}": adapters.add(f"a{n}", cfg) for n, cfg in enumerate((LoRA(rank=4), LoRA(rank=40), LoRA(rank=8), IA3()))}
    params = {f"{name}/{k}": p for name, adapter in made.items() for k, p in adapter.parameters().items()}
    with torch.no_grad():
        for n, p in enumerate(params.values()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n)))
    who = ["a0", ("a0", "a3"), None, "a1", "a3"]
    ids = torch.arange(5 * 300).remainder(VOCAB - 3).add(3)
    if packed_row:
        call = {"input_ids": ids[None], "adapter_ids": Spans((*who, "a2", None), (300, 560, 700, 1000, 1200, 1200 + few, 1500))}
    else:
        call = {"input_ids": ids.view(5, 300), "adapter_ids": who}
    calls, apply = [], low_rank.Added.apply
    monkeypatch.setattr(low_rank.Added, "apply", lambda *a: (calls.append((a[2] is not None, len(a[3]))), apply(*a))[1])

    def both():
        logits = model(**call, use_cache=False).logits.float()
        return [logits, *torch.autograd.grad(logits.square().mean(), list(params.values()), allow_unused=True)]
    ours = both()
    assert (True, 2) in calls, "two adapters in one call, with the frozen product"
    monkeypatch.setattr(low_rank, "takes", lambda *a: False)
    for name, a, b in zip(("logits", *params), ours, both(), strict=True):
        assert (a is None) == (b is None) == (not packed_row and name.startswith("a2/")), name
        assert a is None or (a - b).norm() <= 0.05 * b.norm(), name


@needs_amx
def test_a_float32_base_under_autocast_has_its_gradients():
    """There the low-rank kernel sees bfloat16, and the frozen weight is float32."""
    model, ids = tiny("llama").float().requires_grad_(False), torch.arange(3, 3 + 300).remainder(VOCAB - 3).add(3).view(2, 150)
    params = list(attach(model).add("a", LoRA(rank=4)).parameters().values())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, params))


def test_an_mlp_that_drops_in_training_or_has_linears_of_another_kind_keeps_its_own_forward():
    model = tiny("llama").float()
    first, second = (layer.mlp for layer in model.model.layers[:2])

    class Dropping(type(first)):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.5, self.training)

    class Weightless(nn.Module):
        def forward(self, x):
            return x
    first.__class__ = Dropping
    second.gate_proj = Weightless()
    with single(model):
        assert not {first, second} & set(replaced(model)) and replaced(model)
