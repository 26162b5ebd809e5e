"""Decoding in bfloat16 on a CPU: products of few rows, attention of one token, whole layers, each beside its plain twin."""
from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from tiny import METHOD_CASES, SPECS, attached, ids, tiny

from tsugiki.adapters import attach
from tsugiki.evaluate import packed as packing
from tsugiki.evaluate.cache import grown
from tsugiki.evaluate.decode import Decoder, _largest
from tsugiki.evaluate.packed import Packed, packed
from tsugiki.evaluate.steps import Step, step_of
from tsugiki.kernels import native, one_token, rows
from tsugiki.methods import LoRA
from tsugiki.serve.arena import Arena

BF16 = torch.bfloat16
LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "qwen3_moe")             # the last one in its first layer alone
llama = pytest.mark.parametrize("kind", LLAMAS)
pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiled kernels on this machine")


@pytest.fixture(autouse=True)
def everything_is_packed(monkeypatch):
    monkeypatch.setattr(packing, "PAYS", 0)
    monkeypatch.setattr(packing, "SMALLEST", 0)


@pytest.fixture
def calls(monkeypatch):
    """Layers that went in one call: rows of each."""
    found, module = [], __import__("sys").modules[Step.__module__]
    step = module.step
    monkeypatch.setattr(module, "step", lambda layer, x, *args: found.append(len(x)) or step(layer, x, *args))
    return found


def wide(kind: str, dtype: torch.dtype = BF16) -> torch.nn.Module:
    """A tiny model whose heads have 32 numbers."""
    more = {"n_embd": 128} if kind in ("gpt2", "gptj") else {"hidden_size": 128}
    more |= {"head_dim": 32} if "head_dim" in SPECS[kind] else {"word_embed_proj_dim": 128} if kind == "opt" else {}
    return tiny(kind, dtype, **more)


def steps_of(body: torch.nn.Module) -> list[Step]:
    return [f for m in body.modules() if isinstance(f := vars(m).get("forward"), Step)]


def logits(body: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor, **more) -> torch.Tensor:
    """(B, T, V) of tokens x, the first four at once, the others one by one."""
    cache, found = grown(), []
    with torch.no_grad():
        for start, end in ((0, 4), *((n, n + 1) for n in range(4, x.shape[1]))):
            found.append(body(input_ids=x[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True,
                              position_ids=(mask[:, :end].cumsum(1) - 1).clamp_min(0)[:, start:end], **more).logits.float())
    return torch.cat(found, 1)


def batch(count: int, width: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(count, width, dtype=torch.long)
    for i in range(count):
        mask[i, :i % 3] = 0
    return ids(count, width), mask


@pytest.mark.parametrize("d_in, d_out", [(32, 16), (64, 49), (576, 192), (1536, 100)])
def test_a_product_of_few_rows_is_the_product_and_a_row_of_it_is_its_own(d_in, d_out):
    g = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*shape, generator=g).to(BF16) for shape in ((d_out, d_in), (d_out,), (64, d_in)))
    copy = rows.laid(weight)
    for count in (1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64):
        for b in (None, bias):
            want = F.linear(x[:count].double(), weight.double(), None if b is None else b.double())
            made = copy.product(x[:count].view(count, 1, d_in), b)[:, 0]
            plain = F.linear(x[:count], weight, b)
            assert (made - want).norm() <= 1.05 * (plain - want).norm() and made.shape == want.shape
    whole = copy.product(x, bias)
    assert all(torch.equal(copy.product(x[i:i + 1], bias)[0], whole[i]) for i in (0, 17, 40, 63))
    x[5] = float("nan")
    broken = copy.product(x, bias)
    assert broken[5].isnan().all() and torch.equal(broken[[*range(5), *range(6, 64)]], whole[[*range(5), *range(6, 64)]])


@pytest.mark.parametrize("heads, kv, d", [(6, 6, 32), (9, 3, 64), (8, 1, 128), (5, 5, 96)])
@pytest.mark.parametrize("length", [1, 7, 16, 33, 150])
def test_attention_of_one_token_is_nearer_to_the_truth_than_torchs_and_reads_nothing_that_is_masked(heads, kv, d, length):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, h, n, d, generator=g).to(BF16) for h, n in ((heads, 1), (kv, length + 5), (kv, length + 5)))
    k, v = k[:, :, 2:2 + length], v[:, :, 2:2 + length]
    seen = torch.arange(length) >= torch.tensor([0, length // 2, length - 1, length // 3])[:, None, None, None]
    for mask in (None, seen, seen[1:2]):
        assert one_token.takes(q, k, v, mask)
        want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, scale=0.3, enable_gqa=True).transpose(1, 2)
        plain = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True).transpose(1, 2)
        made = one_token.one_token(q, k, v, mask, 0.3)
        assert made.shape == want.shape and (made - want).norm() <= 1.02 * (plain - want).norm()
    whole = one_token.one_token(q, k, v, seen, 0.3)
    hidden = ~seen.transpose(2, 3)
    for bad in (float("nan"), float("inf")):
        assert torch.equal(one_token.one_token(q, k.masked_fill(hidden, bad), v.masked_fill(hidden, bad), seen, 0.3), whole)
    v = v.clone()
    v[2, :, -1] = float("nan")
    broken = one_token.one_token(q, k, v, seen, 0.3)
    assert broken[2].isnan().all() and torch.equal(broken[[0, 1, 3]], whole[[0, 1, 3]])


@pytest.mark.parametrize("kind", SPECS)
def test_attention_of_one_token_takes_the_steps_of_every_model_that_had_sdpa_by_name(kind, monkeypatch):
    model, found = wide(kind), []
    body, plain = packed(model, 9), one_token.one_token
    monkeypatch.setattr(one_token, "one_token", lambda *args: found.append(args[0].shape) or plain(*args))
    logits(body, *batch(3))
    own = kind in ("gptj", "bloom", "gemma2", "falcon")                         # they call no attention by name
    assert len(found) == (0 if own else 10 * (model.config.num_hidden_layers - len(steps_of(body))))
    assert model.config._attn_implementation != one_token.NAME


@pytest.mark.parametrize("kind", SPECS)
def test_a_body_is_as_near_to_the_truth_as_the_model(kind, calls):
    model, (x, mask) = wide(kind), batch(5)
    body, truth = packed(model, 9), wide(kind, torch.float32)
    truth.load_state_dict(model.state_dict())
    calls.clear()                                     # the probes'
    made, plain, want = (logits(m, x, mask) for m in (body, model, truth))
    real = mask.bool()
    assert (made - want)[real].norm() <= 1.3 * (plain - want)[real].norm()
    assert bool(steps_of(body)) == (kind in LLAMAS) and calls == [5] * 10 * len(steps_of(body))
    alone = logits(body, x[1:2, 1:], mask[1:2, 1:])
    assert (alone - made[1:2, 1:]).norm() <= 0.02 * made[1:2, 1:].norm()
    assert not any(isinstance(m, Packed) or isinstance(vars(m).get("forward"), Step) for m in model.modules())


@pytest.mark.share(2)
@llama
def test_rows_with_loras_of_their_own_go_in_one_call_too(kind, calls):
    model, (x, mask) = wide(kind), batch(6)
    home = attached(model, "lora", "bitfit", scale=0.1)
    for n in range(3):
        home.add(f"l{n}", LoRA(rank=(4, 8, 70)[n]))
        for p in home.get(f"l{n}").parameters().values():
            p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(n))
    truth = wide(kind, torch.float32)
    truth.load_state_dict(model.state_dict())
    there = attach(truth)
    for name in home.names():
        copied = there.add(name, home.get(name).cfg).parameters()
        for key, p in home.get(name).parameters().items():
            copied[key].data.copy_(p.data)
    body = packed(model, 9)
    layers = len(steps_of(body))
    assert layers
    for who, one_call in ((["l0", None, "l1", "lora", "l1", None], True), (["l1"] * 6, True), ([None] * 6, True),
                          (["l2", "lora"] * 3, False), ([("l0", "l1")] * 6, False), ([{"l0": 0.5}] * 6, False),
                          (["l0", "bitfit"] * 3, False)):
        calls.clear()
        made, plain, want = (logits(m, x, mask, adapter_ids=who) for m in (body, model, truth))
        assert (made - want)[mask.bool()].norm() <= 1.5 * (plain - want)[mask.bool()].norm(), who
        assert calls == ([6] * 10 * layers if one_call else []), who
        for i in (0, 2, 5):
            alone = logits(body, x[i:i + 1], mask[i:i + 1], adapter_ids=[who[i]])
            real = mask[i].bool()
            assert (alone[0, real] - made[i, real]).norm() <= 0.03 * made[i, real].norm(), (who, i)


def test_an_adapter_that_is_changed_replaced_or_removed_is_followed(calls):
    model, (x, mask) = wide("llama"), batch(3)
    home = attached(model, "lora", scale=0.05)
    body = packed(model, 9)
    calls.clear()
    before = logits(body, x, mask, adapter_ids="lora")
    for p in home.get("lora").parameters().values():
        p.data.mul_(2)
    body = packed(model, 9)                           # a body is of the numbers that are there when it is made
    for change in (None, lambda: home.remove("lora"), lambda: attached(model, "lora", scale=0.15)):
        if change is not None:
            change()
        who = "lora" if "lora" in home.names() else None
        with torch.no_grad():
            want = model(input_ids=x, attention_mask=mask, adapter_ids=who, use_cache=False,
                         position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits.float()
        made = logits(body, x, mask, adapter_ids=who)
        assert (made - want)[mask.bool()].norm() <= 0.04 * want[mask.bool()].norm()
        assert (made - before).norm() > 0.1 * before.norm()
    assert len(calls) == 4 * 10 * 2 + 2, "and a probe of each layer"


def test_a_models_own_decoding_follows_numbers_that_are_changed_behind_torchs_back():
    """p.data.mul_ counts no version: under one adapter nothing is kept from step to step."""
    model, (x, mask) = wide("llama"), batch(2)
    home = attached(model, "lora", scale=0.05)
    for _ in range(2):
        with torch.no_grad():
            want = model(input_ids=x, attention_mask=mask, adapter_ids="lora", use_cache=False,
                         position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits.float()
        made = logits(model, x, mask, adapter_ids="lora")
        assert (made - want)[mask.bool()].norm() <= 0.04 * want[mask.bool()].norm()
        for p in home.get("lora").parameters().values():
            p.data.mul_(3)


def test_factors_written_in_place_are_seen_by_the_next_generation_and_soon_by_this_one(calls):
    model, (x, mask) = wide("llama"), batch(2, 40)
    home, body, cache, found = attached(model, "lora", scale=0.05), packed(model, 9), grown(), []
    with torch.no_grad():
        for start, end in ((0, 4), *((n, n + 1) for n in range(4, 40))):
            found.append(body(input_ids=x[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True,
                              position_ids=(mask[:, :end].cumsum(1) - 1).clamp_min(0)[:, start:end], adapter_ids="lora").logits)
            if end == 10:
                for p in home.get("lora").parameters().values():
                    p.mul_(3)
    made, new = torch.cat(found, 1).float(), logits(body, x, mask, adapter_ids="lora")
    far = (made - new).norm(dim=-1)[0] / new.norm(dim=-1)[0]
    assert far[:10].min() > 0.1 and far[30:].mean() < 0.75 * far[:10].mean(), "its cache holds some old keys"


def test_a_removed_adapter_is_let_go_at_the_next_step():
    model, (x, mask) = wide("llama"), batch(3)
    home = attached(model, "lora", scale=0.1)
    body = packed(model, 9)
    logits(body, x, mask, adapter_ids="lora")
    there = [weakref.ref(p) for p in home.get("lora").parameters().values()]
    home.remove("lora")
    logits(body, x, mask, adapter_ids=[None])
    gc.collect()
    assert not any(ref() is not None for ref in there)


def test_inference_mode_comes_and_goes():
    """Evaluated under inference_mode, trained on, evaluated again; adapters and bases that were made under it."""
    model, (x, mask) = wide("llama"), batch(3)
    home = attached(model, "lora", scale=0.05)
    body = packed(model, 9)
    with torch.inference_mode():
        logits(body, x, mask, adapter_ids="lora")
        home.add("late", LoRA(rank=4))
    with torch.no_grad():
        for p in home.get("lora").parameters().values():
            p.mul_(2)
    for who in ("lora", "late", ["lora", "late", "lora"]):
        made, want = logits(body, x, mask, adapter_ids=who), logits(model, x, mask, adapter_ids=who)
        assert (made - want)[mask.bool()].norm() <= 0.04 * want[mask.bool()].norm()
    with torch.inference_mode():
        other = wide("llama")
        given = dict(zip(("input_ids", "attention_mask"), batch(4), strict=True)) | {"max_new_tokens": 3, "do_sample": False}
        assert Decoder(other, 3).generate(**given).shape == (4, 17)


def test_a_body_kept_while_its_model_becomes_float32_computes_in_float32():
    model, (x, mask) = wide("llama"), batch(3)
    body = packed(model, 9)
    model.float()
    made, want = logits(body, x, mask), logits(model, x, mask)
    assert made.isfinite().all() and (made - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("change", ["hook", "weight", "norm", "bias", "training", "grad"])
def test_what_comes_later_is_followed(change, calls):
    model, (x, mask) = wide("qwen2"), batch(3)
    body, layer = packed(model, 9), model.model.layers[1]
    before = logits(body, x, mask)
    calls.clear()
    with torch.no_grad():
        if change == "hook":
            layer.mlp.register_forward_hook(lambda m, args, out: out * 3)
        elif change == "weight":
            layer.self_attn.o_proj.weight.mul_(30)
        elif change == "norm":
            layer.input_layernorm.weight = torch.nn.Parameter(layer.input_layernorm.weight.roll(3) * 2)
        elif change == "bias":
            layer.self_attn.v_proj.bias = torch.nn.Parameter(layer.self_attn.v_proj.bias + 3)
    if change in ("training", "grad"):
        (body if change == "training" else model).train(change == "training")
        with torch.enable_grad():
            out = body(input_ids=x, attention_mask=mask, use_cache=False).logits
        assert (change == "training" or out.requires_grad) and not calls
        return
    made, want = logits(body, x, mask), logits(model, x, mask)
    assert (made - want)[mask.bool()].norm() <= 0.02 * want[mask.bool()].norm() and (made - before).norm() > 0.02 * before.norm()
    assert len(calls) == 10, "only the other layer goes in one call"


@pytest.mark.parametrize("fault", ["residual", "extra", "scale", "mlp"])
def test_a_layer_that_only_looks_alike_keeps_its_own_forward(fault):
    model = wide("llama")
    layer = model.model.layers[0]
    own, attention, mlp = type(layer), type(layer.self_attn), type(layer.mlp)

    class Other(own):
        def forward(self, hidden_states, **kwargs):
            out = own.forward(self, hidden_states, **kwargs)
            return 0.9 * out if fault == "residual" else out + 0.1 * out.roll(1, -1)

    class Scaled(attention):
        def forward(self, *args, **kwargs):
            before, self.scaling = self.scaling, 1.5 * self.scaling
            try:
                return attention.forward(self, *args, **kwargs)
            finally:
                self.scaling = before
    if fault == "scale":
        layer.self_attn.__class__ = Scaled
    elif fault == "mlp":
        layer.mlp.forward = lambda x: mlp.forward(layer.mlp, x) * 2
    else:
        layer.__class__ = Other
    body, (x, mask) = packed(model, 9), batch(3)
    assert len(steps_of(body)) == 1 and step_of(body.model.layers[0]) is None
    made, want = logits(body, x, mask), logits(model, x, mask)
    assert (made - want)[mask.bool()].norm() <= 0.02 * want[mask.bool()].norm()


def test_threads_decode_under_adapters_of_their_own():
    model, (x, mask) = wide("llama"), batch(4)
    home = attached(model, "lora", scale=0.3)
    home.add("other", METHOD_CASES["lora"])
    for p in home.get("other").parameters().values():
        p.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(7))
    body, found = packed(model, 9), {}
    whos = {"a": ["lora"] * 4, "b": ["other"] * 4, "c": ["lora", "other", None, "lora"], "d": [None] * 4}
    want = {name: logits(body, x, mask, adapter_ids=who) for name, who in whos.items()}

    def work(name: str) -> None:
        found[name] = all(torch.equal(logits(body, x, mask, adapter_ids=whos[name]), want[name]) for _ in range(6))
    threads = [threading.Thread(target=work, args=(name,)) for name in whos]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == dict.fromkeys(whos, True)


def test_the_engines_cache_takes_layers_in_one_call(calls):
    model, x = wide("llama"), ids(3, 14)
    body, arena = packed(model, 9), Arena()
    calls.clear()
    with torch.no_grad():
        for row, length in enumerate((4, 2, 3)):
            own = grown()
            model(input_ids=x[row:row + 1, :length], past_key_values=own, use_cache=True)
            arena.join([(layer.keys[0], layer.values[0]) for layer in own.layers])
        for n in range(8):
            arena.room(3, 0, 1)
            at = torch.tensor([[4 + n], [2 + n], [3 + n]])
            made = body(input_ids=x.gather(1, at), attention_mask=arena.mask(), position_ids=at, past_key_values=arena,
                        use_cache=True).logits[:, 0]
            arena.advance()
            for row in range(3):
                want = model(input_ids=x[row:row + 1, :int(at[row]) + 1], use_cache=False).logits[0, -1]
                assert (made[row].float() - want.float()).norm() <= 0.02 * want.float().norm()
    assert calls == [3] * 16


@pytest.mark.parametrize("size", [5, 255, 256, 257, 512, 1000])
def test_the_largest_score_is_found_as_argmax_finds_it(size):
    scores = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    scores[:8] = scores[:8].round()                   # ties
    scores[8], scores[9] = 0.0, float("-inf")
    scores[10, size // 2] = float("nan")
    scores[11, -1] = scores[12, 0] = 99.0
    assert torch.equal(_largest(scores), scores.argmax(-1))


def test_few_steps_pack_nothing_but_the_head_which_takes_a_slice(monkeypatch):
    monkeypatch.setattr(packing, "PAYS", 24)
    model = wide("llama").requires_grad_(False)
    body = packed(model, 3)
    assert [name for name, m in body.named_modules() if isinstance(m, Packed)] == ["lm_head"] and not steps_of(body)
    given = dict(zip(("input_ids", "attention_mask"), batch(4), strict=True)) | {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(Decoder(model, 3).generate(**given), model.generate(**given))
    hidden = torch.randn(4, 9, 128).to(BF16)[:, -1:]
    with torch.no_grad():
        assert torch.equal(body.lm_head(hidden), model.lm_head(hidden))
