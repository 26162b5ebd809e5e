"""Every fast path equals its plain twin: attention by document, and the head that makes its loss in chunks."""
from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from kit import PAD, TOKENIZER, llama
from test_step import rows
from tiny import EXACT, LOOSER, fill, tiny

from tsugiki.adapters import attach
from tsugiki.config import TrainConfig
from tsugiki.data.batch import collate, micro_batches
from tsugiki.kernels import documents as compiled
from tsugiki.kernels import head, low_rank, native
from tsugiki.kernels.attention import BLOCK, active, by_document, documents, groups
from tsugiki.kernels.head import head_losses
from tsugiki.methods import METHODS, LoRA
from tsugiki.sites import FAMILIES
from tsugiki.train import loss as loss_module
from tsugiki.train.layout import arranged, packs
from tsugiki.train.loss import token_losses

F64 = torch.float64
LENGTHS = {"one": (17,), "ones": (1, 1, 1), "alike": (6, 6, 6), "unlike": (5, 60, 7, 31, 1, 6), "long": (BLOCK + 40, 3, 2 * BLOCK)}
BY_DOCUMENT = [k for k in FAMILIES if k not in ("gptj", "bloom", "gemma2")]     # their attention is not plain or not by name


def tensors(tokens: int, heads: int, kv: int, dtype=F64, rows: int = 1):
    g = torch.Generator().manual_seed(tokens)
    def one(h):
        return torch.randn(rows, tokens, h, 8, dtype=dtype, generator=g).transpose(1, 2).requires_grad_()
    return one(heads), one(kv), one(kv), torch.randn(rows, tokens, heads, 8, dtype=dtype, generator=g)


def plain(q, k, v, lengths, scale):
    """torch's own attention, a document at a time."""
    parts = [F.scaled_dot_product_attention(*ts, is_causal=True, scale=scale, enable_gqa=True)
             for ts in zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)]
    return torch.cat(parts, 2).transpose(1, 2)


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention_by_document_is_attention_of_each_document(lengths, heads):
    q, k, v, g = tensors(sum(lengths), *heads)
    got, want = documents(q, k, v, ends(lengths), 0.3), plain(q, k, v, lengths, 0.3)
    assert (got - want).abs().max() <= EXACT and want.abs().max() > 0.1
    for a, b in zip(torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g), strict=True):
        assert (a - b).abs().max() <= 10 * EXACT and (b.abs().max() > 0.1 or sum(lengths) == len(lengths))


def test_rows_without_ends_are_one_document_each():
    q, k, v, g = tensors(9, 4, 2, rows=3)
    got, want = documents(q, k, v, None, 0.3), plain(q, k, v, (9,), 0.3)
    assert (got - want).abs().max() <= EXACT
    for a, b in zip(torch.autograd.grad(got, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g), strict=True):
        assert (a - b).abs().max() <= EXACT


def test_attention_by_document_has_the_gradient_of_finite_differences_and_a_shape_for_compilation():
    q, k, v, _ = tensors(7, 4, 2)
    assert torch.autograd.gradcheck(lambda *t: documents(*t, ends((3, 4)), 0.3), (q, k, v))
    torch.library.opcheck(documents, (q, k, v, ends((3, 4)), 0.3), test_utils=("test_schema", "test_faketensor"))


@pytest.fixture
def built(tmp_path, monkeypatch):
    """The compiled kernel, built anew for this test."""
    monkeypatch.setenv("TSUGIKI_CACHE", str(tmp_path / "cache"))
    caches = native.library, compiled.works
    for cached in caches:
        cached.cache_clear()
    if native.library() is None:
        pytest.skip("no gcc here, or a processor that does not multiply bfloat16: there is no compiled kernel")
    yield tmp_path / "cache"
    for cached in caches:
        cached.cache_clear()


@pytest.mark.share(2)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("heads, kv, d", [(6, 2, 64), (4, 4, 80), (2, 1, 8), (8, 2, 256)])
def test_the_compiled_kernel_is_nearer_to_the_truth_than_products_that_round_in_between(built, monkeypatch, heads, kv, d, threads):
    lengths, g = (1, 70, 32, 0, 33, 250), torch.Generator().manual_seed(d)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def both(dtype, there):
        monkeypatch.setattr(compiled, "works", lambda: there)
        given = [t.detach().to(dtype).requires_grad_() for t in low[:3]]
        out = documents(*given, ends(lengths), d ** -0.5)
        return [out, *torch.autograd.grad(out, given, low[3].to(dtype))]
    try:
        low = [torch.randn(1, sum(lengths), h, d, generator=g).bfloat16().transpose(1, 2) for h in (heads, kv, kv)]
        low.append(torch.randn(1, sum(lengths), heads, d, generator=g).bfloat16())
        truth, ours, twin = both(F64, True), both(torch.bfloat16, True), both(torch.bfloat16, False)
        again = both(torch.bfloat16, True)
    finally:
        torch.set_num_threads(before)
    for t, a, b, c in zip(truth, ours, twin, again, strict=True):
        assert 0 < (a - t).norm() <= 1.05 * (b - t).norm() and (a - t).norm() < 0.01 * t.norm()
        assert torch.equal(a, c), "the same inputs must give the same bits, whatever thread computes a document"


def test_what_is_not_finite_in_a_document_stays_there_in_the_compiled_kernel(built):
    q, k, v, g = (t.detach().bfloat16() for t in tensors(90, 4, 2))
    clean = documents(q, k, v, ends((40, 50)), 0.3)
    for t in (q, k, v):
        broken = [x.clone() for x in (q, k, v)]
        broken[[x is t for x in (q, k, v)].index(True)][:, :, 10] = float("nan")
        given = [x.requires_grad_() for x in broken]
        out = documents(*given, ends((40, 50)), 0.3)
        grads = torch.autograd.grad(out, given, g)
        assert torch.equal(out[:, 40:], clean[:, 40:]) and bool(out[:, 10].isnan().any())
        assert all(bool(x[:, :, 40:].isfinite().all()) for x in grads) and any(bool(x.isnan().any()) for x in grads)


def test_it_is_built_once_and_only_where_nobody_else_can_write(built, monkeypatch):
    file, = built.iterdir()
    when = file.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None and file.stat().st_mtime_ns == when
    built.chmod(0o777)
    native.library.cache_clear()
    monkeypatch.setattr(native.tempfile, "tempdir", str(built.parent / "temp"))
    (built.parent / "temp").mkdir()
    assert native.library() is not None and not list((built.parent / "temp").iterdir()) and [file] == list(built.iterdir())
    for name, value in (("TSUGIKI_NATIVE", "off"), ("PATH", str(built.parent))):
        with monkeypatch.context() as m:
            m.setenv(name, value)
            native.library.cache_clear()
            compiled.works.cache_clear()
            assert native.library() is None
    q, k, v, _ = (t.detach().bfloat16() for t in tensors(20, 4, 2))
    assert documents(q, k, v, ends((20,)), 0.3).isfinite().all(), "without it, the plain twin computes"


def test_where_there_is_a_compiler_and_a_processor_for_them_the_kernels_are_built_and_all_work():
    """Nothing else would show a mistake in their source: without them, everything is computed, more slowly."""
    if shutil.which("gcc") is None or "avx512_bf16" not in native.processor():
        pytest.skip("no gcc here, or a processor that does not multiply bfloat16: there is no compiled kernel")
    assert compiled.works() and head._works() and low_rank.works() == ("amx_bf16" in native.processor())


def test_a_kernel_that_computes_something_else_is_not_used(built, monkeypatch):
    monkeypatch.setattr(native, "CLOSE", 1e-6)        # so near no bfloat16 is
    assert not compiled.works()


def test_in_16_bits_it_is_as_near_to_the_truth_as_torchs_own():
    lengths = (50, 44, 130)
    exact = tensors(sum(lengths), 6, 2)
    low = [t.detach().bfloat16().requires_grad_() for t in exact[:3]]
    truth = torch.autograd.grad(plain(*exact[:3], lengths, 0.3), exact[:3], exact[3])
    ours = torch.autograd.grad(documents(*low, ends(lengths), 0.3), low, exact[3].bfloat16())
    theirs = torch.autograd.grad(plain(*low, lengths, 0.3), low, exact[3].bfloat16())
    for a, b, t in zip(ours, theirs, truth, strict=True):
        assert (a - t).norm() <= 2 * (b - t).norm() and (a - t).norm() > 0


def test_a_group_holds_documents_of_like_length_and_all_are_in_one():
    lengths = (5, 60, 7, 31, 1, 6, 58, 300)
    found = groups(lengths, 9)
    tokens = torch.cat([g.rows if g.real is None else g.rows[g.real] for g in found])
    assert sorted(tokens.tolist()) == list(range(sum(lengths)))
    assert all(g.real is None or len(g.real) >= 0.5 * len(g.rows) for g in found) and len(found) < len(lengths)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_the_chunked_head_is_cross_entropy_of_all_logits(bias, trained, monkeypatch):
    monkeypatch.setattr(head, "LOGITS", 16 * 50)                             # several chunks
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 12, dtype=F64, generator=g).requires_grad_() for n in (41, 50))
    b = torch.randn(50, dtype=F64, generator=g).requires_grad_() if bias else None
    targets, weights = torch.randint(0, 50, (41,), generator=g), torch.rand(41, dtype=F64, generator=g)
    head_of = (weight, b) if trained else (weight.detach(), None if b is None else b.detach())
    got = head_losses(hidden, *head_of, targets)
    want = F.cross_entropy(F.linear(hidden, weight, b), targets, reduction="none")
    assert (got - want).abs().max() <= EXACT
    by = [t for t in (hidden, *head_of) if t is not None and t.requires_grad]
    for a, c in zip(torch.autograd.grad((got * weights).sum(), by), torch.autograd.grad((want * weights).sum(), by), strict=True):
        assert (a - c).abs().max() <= EXACT and c.abs().max() > 1e-3


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_by_document_has_the_losses_and_gradients_of_one_with_masks(kind):
    """Packed rows, on every family that takes attention by name; the others are left as they are."""
    examples, model = rows(), llama(F64, kind)
    params = attach(model).add("a", LoRA(rank=4)).parameters()
    if not packs(model):
        pytest.skip("this family takes no positions, so its rows are not packed")
    [forward] = micro_batches([len(e.ids) for e in examples], range(8), "pack", 4096)
    batch, found = collate(examples, forward, PAD), []
    with torch.no_grad():
        for p in params.values():
            p.add_(0.02)
    with arranged(model, examples, TrainConfig(layout="pack"), virtual=False) as layout:
        assert layout == "pack" and active(model) == (kind in BY_DOCUMENT)
        for fast in (True, False):
            if not fast and active(model):
                model.set_attn_implementation("sdpa")
            losses, of = token_losses(model, batch, adapter_ids="a")
            found.append((losses.detach(), *torch.autograd.grad(losses.sum(), list(params.values()))))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= LOOSER.get(kind, 1e-11) and b.abs().max() > 0
    assert not active(model), "the model keeps an attention that is not its own"


def test_a_model_that_does_more_with_its_logits_is_told_from_one_that_does_not():
    """Gemma 2 caps them: its loss is still that of its own logits; Llama's is made in chunks."""
    examples = rows()
    for kind in ("llama", "gemma2"):
        model = tiny(kind, F64, vocab_size=len(TOKENIZER), **({"final_logit_softcapping": 0.5} if kind == "gemma2" else {}))
        batch = collate(examples, [[i] for i in range(8)], PAD)
        at = batch.targets >= 0
        for _ in range(2):
            losses, _ = token_losses(model, batch)
            want = F.cross_entropy(model(batch.ids).logits[at], batch.targets[at], reduction="none")
            assert (losses - want).abs().max() <= EXACT
        assert (model in loss_module._has_tail) == (kind == "gemma2")


@pytest.mark.parametrize("method", [None, "prefix", "prompt", "llama_adapter"])
def test_rows_filled_up_at_the_right_need_no_mask_and_those_at_the_left_do(method, monkeypatch):
    """Real tokens' logits and the gradients from them are those of transformers' sdpa; numbers of fillers reach none of them."""
    model, calls, plain = tiny("llama", F64), [], documents._opoverload
    if method:
        fill(attach(model).add("a", METHODS[method]()))
    real = torch.tensor([9, 4, 7])
    mask = (torch.arange(9) < real[:, None]).long()
    ids = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("tsugiki.kernels.attention.documents", lambda *a: (calls.append(1), plain(*a))[1])

    def both(ids, mask):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        params = [p for p in model.parameters() if p.requires_grad]
        return [logits, *(torch.autograd.grad(logits.square().sum(), params) if params else ())]
    for given, fast in ((mask, True), (mask.flip(1), False)):
        want = both(ids, given)
        with by_document(model):
            calls.clear()
            got, other = both(ids, given), both(torch.where(given.bool(), ids, 5), given)
        assert bool(calls) == fast
        assert all((a - b).abs().max() <= EXACT * b.abs().max().clamp_min(1) and torch.equal(a, c)
                   for a, b, c in zip(got, want, other, strict=True))


def test_generation_and_padded_masks_still_work_while_attention_goes_by_document():
    model = llama(F64)
    ids = torch.tensor([[0, 0, 5, 6, 7], [4, 9, 8, 7, 6]])
    mask = (ids > 0).long()
    want = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=PAD)
    logits = model(ids, attention_mask=mask).logits[mask.bool()]
    with by_document(model) as there:
        assert there
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=PAD),
                           want)
        assert (model(ids, attention_mask=mask).logits[mask.bool()] - logits).abs().max() <= EXACT
    assert model.config._attn_implementation == "sdpa"


def test_packed_rows_without_their_ends_are_refused_by_the_probe():
    """A model that drops the ends on the way to its attention would mix documents: it is not taken."""
    class Deaf(type(llama())):
        def forward(self, input_ids=None, position_ids=None, cu_seq_lens_q=None, **kwargs):
            return super().forward(input_ids, position_ids=position_ids, **kwargs)
    model = llama(F64)
    model.__class__ = Deaf
    with by_document(model):
        assert not packs(model)
    with arranged(model, rows(), TrainConfig(layout="pack"), virtual=False) as layout:
        assert layout == "pack" and not active(model)


def test_full_fine_tuning_under_autocast_takes_the_fast_paths_and_has_the_plain_gradients():
    examples, model = rows(), llama(torch.float32)
    [forward] = micro_batches([len(e.ids) for e in examples], range(8), "pack", 4096)
    batch, params, found = collate(examples, forward, PAD), list(model.parameters()), []
    with arranged(model, examples, TrainConfig(layout="pack"), virtual=False):
        assert active(model)
        for fast in (True, False):
            if not fast:
                model.set_attn_implementation("sdpa")
                loss_module._has_tail[model] = True                          # its own logits
            with torch.autocast("cpu", torch.bfloat16):
                losses, _ = token_losses(model, batch)
            found.append((losses.detach(), *torch.autograd.grad(losses.mean(), params)))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 0.03 * b.norm() and b.norm() > 0 and a.dtype == b.dtype


def test_sixteen_bits_through_many_layers_are_no_disagreement():
    """Rounding alone moves the logits of a deep model by some percent, as between transformers' own two ways."""
    from tsugiki.methods import Prefix
    from tsugiki.train.layout import _logits, _row
    model = llama(torch.bfloat16, num_hidden_layers=24)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    attach(model).add("p", Prefix(tokens=4))
    with torch.no_grad():
        wanted = _logits(model, _row(model, 3))
        with by_document(model):
            apart = (_logits(model, _row(model, 3)) - wanted).norm() / wanted.norm()
    assert apart > 0.01
    with arranged(model, rows(), TrainConfig(), virtual=True) as layout:
        assert layout == "pack" and active(model)


def test_where_no_kernel_takes_the_ends_of_documents_rows_go_the_models_own_way(monkeypatch):
    """As on a GPU in float32: nothing fails, packed rows get masks, and virtual tokens are padded."""
    from tsugiki.kernels import attention
    plain = attention._forward
    def none(module, query, key, value, mask, cu_seq_lens_q=None, **kwargs):
        if cu_seq_lens_q is not None and mask is None:
            raise attention.Undivided("here")
        return plain(module, query, key, value, mask, **kwargs)
    attention.AttentionInterface.register(attention.NAME, none)
    try:
        for virtual, want in ((False, "pack"), (True, "pad")):
            model = llama(torch.float32)
            attach(model).add("a", METHODS["prefix" if virtual else "lora"]())
            with arranged(model, rows(), TrainConfig(), virtual=virtual) as layout:
                assert layout == want or not virtual and layout == "pad"
                assert active(model) == virtual
    finally:
        attention.AttentionInterface.register(attention.NAME, plain)


def test_an_attention_that_does_something_else_is_not_taken(monkeypatch):
    from tsugiki.kernels import attention
    model, plain = llama(torch.bfloat16), attention._forward
    def other(module, query, key, value, mask, scaling=None, **kwargs):
        return plain(module, query, key, value, mask, scaling=2 * scaling, **kwargs)
    attention.AttentionInterface.register(attention.NAME, other)
    try:
        with arranged(model, rows(), TrainConfig(), virtual=False):
            assert not active(model)
    finally:
        attention.AttentionInterface.register(attention.NAME, plain)
    with arranged(model, rows(), TrainConfig(), virtual=False):
        assert active(model)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_a_window_shorter_than_the_row_is_kept(kind):
    """Packed documents longer than the window, and a row of several: as with transformers' masks."""
    examples, model = rows(), llama(F64, kind, sliding_window=5)
    [forward] = micro_batches([len(e.ids) for e in examples], range(8), "pack", 4096)
    batch, found = collate(examples, forward, PAD), []
    wide = llama(F64, kind)
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        outside = token_losses(wide, batch)[0]
        with arranged(model, examples, TrainConfig(layout="pack"), virtual=False):
            assert active(model)
            found.append(token_losses(model, batch)[0])
            model.set_attn_implementation("sdpa")
            found.append(token_losses(model, batch)[0])
    assert (found[0] - found[1]).abs().max() <= EXACT and (found[1] - outside).abs().max() > 1e-3
