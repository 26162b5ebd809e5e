"""The decoding loop gives transformers' tokens: every family, adapters of several methods in a batch, padding, stops, draws."""
from __future__ import annotations

import sys
import threading

import pytest
import torch
from tiny import METHOD_CASES, SPECS, attached, ids, tiny
from torch import nn
from transformers import StoppingCriteriaList, TextStreamer

from tsugiki.evaluate import packed as packing
from tsugiki.evaluate.cache import BLOCK, Grown, grown
from tsugiki.evaluate.decode import Decoder, _Rows
from tsugiki.evaluate.packed import Packed, packed

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
WHO = [name for name in ("lora", "series", "prefix", "prompt", "llama_adapter", "reft", "bitfit", "ia3") if name in METHOD_CASES]
STOPS = list(range(3, 200, 3))
family = pytest.mark.parametrize("kind", SPECS)


@pytest.fixture(autouse=True)
def everything_is_packed(monkeypatch):
    """Tiny linears and short generations too."""
    monkeypatch.setattr(packing, "PAYS", 0)
    monkeypatch.setattr(packing, "SMALLEST", 0)


@pytest.fixture
def seen(monkeypatch):
    """What the loop did: "step" a decoding step, with the rows in it."""
    found = []
    step = _Rows.step
    monkeypatch.setattr(_Rows, "step", lambda self: found.append(len(self.ids)) or step(self))
    return found


def left_padded(count: int, width: int = 9) -> dict[str, torch.Tensor]:
    x, mask = ids(count, width), torch.ones(count, width, dtype=torch.long)
    for i in range(count):
        mask[i, :i % 5] = 0
        x[i, :i % 5] = 0
    return {"input_ids": x, "attention_mask": mask}


@pytest.mark.share(3)
@family
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_greedy_tokens_are_those_of_transformers_with_an_adapter_of_another_method_on_each_row(kind, dtype, seen):
    model = tiny(kind, dtype)
    attached(model, *WHO, scale=0.3)
    who = [*WHO, None, ("lora", "bitfit"), {"lora": 0.5, "series": 1.0}]
    options = left_padded(len(who)) | {"max_new_tokens": 12, "do_sample": False, "adapter_ids": who}
    decoder = Decoder(model, steps=12)
    want = model.generate(**options)
    assert torch.equal(decoder.generate(**options), want)
    assert seen == [len(who)] * 11, "transformers' own loop ran, or rows ended"
    stopped = options | {"eos_token_id": STOPS}
    seen.clear()
    assert torch.equal(decoder.generate(**stopped), model.generate(**stopped))
    assert seen and seen[-1] < len(who) and seen == sorted(seen, reverse=True), "no row left"
    assert not torch.equal(want, model.generate(**options | {"adapter_ids": None}))
    with model.adapters.use(who):
        assert torch.equal(decoder.generate(**options | {"adapter_ids": None}), want)


@pytest.mark.share(2)
@family
def test_without_adapters_and_without_padding(kind, seen):
    model = tiny(kind, F64)
    for padding in (True, False):
        options = left_padded(5) if padding else {"input_ids": ids(5)}
        options |= {"max_new_tokens": BLOCK + 5, "do_sample": False, "eos_token_id": None}
        assert torch.equal(Decoder(model, 9).generate(**options), model.generate(**options))
    assert seen == [5] * 2 * (BLOCK + 4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "falcon", "qwen3_moe"])
def test_in_bfloat16_tokens_differ_only_where_two_logits_tie(kind, seen):
    model = tiny(kind, BF16)
    attached(model, "lora", scale=0.3)
    options = left_padded(6) | {"max_new_tokens": 20, "do_sample": False, "eos_token_id": STOPS}
    a, b = model.generate(**options), Decoder(model, 20).generate(**options)
    assert seen
    for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        at = next((n for n, (s, t) in enumerate(zip(x, y, strict=False)) if s != t), None)
        if at is not None:
            start = i % 5
            logits = model(a[i:i + 1, start:at]).logits[0, -1].float()
            assert abs(logits[x[at]] - logits[y[at]]) <= 0.02 * logits.abs().max(), (i, at)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 5},
                                     {"temperature": 1.3, "num_return_sequences": 2}])
def test_sampled_tokens_after_the_same_seed_are_the_same(options, seen):
    model = tiny("llama", F64)
    options = left_padded(4) | options | {"max_new_tokens": 10, "do_sample": True, "eos_token_id": STOPS}
    found = []
    for generate in (model.generate, Decoder(model, 10).generate):
        torch.manual_seed(3)
        found.append(generate(**options))
    assert torch.equal(*found) and seen
    torch.manual_seed(4)
    assert not torch.equal(Decoder(model, 10).generate(**options), found[0])


@pytest.mark.parametrize("settings", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"eos_token_id": STOPS},
                                      {"suppress_tokens": list(range(100))}, {"min_new_tokens": 6, "eos_token_id": STOPS},
                                      {"max_length": 15}])
def test_the_generation_config_of_the_base_is_respected(settings, seen):
    model = tiny("llama", F64)
    options = left_padded(5) | {"do_sample": False} | ({} if "max_length" in settings else {"max_new_tokens": 12})
    before = model.generate(**options)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    want = model.generate(**options)
    assert not torch.equal(want, before)
    assert torch.equal(Decoder(model, 12).generate(**options), want) and seen


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_what_the_loop_does_not_know_goes_to_transformers_own(options, seen):
    model = tiny("llama", F64)
    options = left_padded(3) | options | {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(Decoder(model, 6).generate(**options), model.generate(**options)) and not seen


def test_rows_stay_where_a_criterion_tells_them_by_their_number(seen):
    class Ends:
        def __call__(self, input_ids, scores, **kw):
            return input_ids.shape[1] >= torch.arange(11, 11 + 2 * len(input_ids), 2)
    model = tiny("llama", F64)
    options = left_padded(4) | {"max_new_tokens": 12, "do_sample": False, "eos_token_id": STOPS[:5]}
    options["stopping_criteria"] = StoppingCriteriaList([Ends()])
    assert torch.equal(Decoder(model, 12).generate(**options), model.generate(**options)) and set(seen) == {4}


class Collector:
    def __init__(self):
        self.put_in, self.ended = [], 0

    def put(self, value):
        self.put_in.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


def test_a_model_that_drops_the_cache_in_the_middle_is_left_to_transformers_and_streams_each_token_once(seen):
    """Phi-3 with two rotary tables computes its cache anew where it changes from the short one to the long one."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 14}
    model = tiny("phi3", F64, rope_parameters=rope, original_max_position_embeddings=14)
    options = {"input_ids": ids(1, 10), "max_new_tokens": 12, "do_sample": True, "eos_token_id": None}
    found = []
    for generate in (model.generate, Decoder(model, 12).generate):
        torch.manual_seed(0)
        streamer = Collector()
        found.append((generate(streamer=streamer, **options).tolist(), streamer.put_in, streamer.ended))
    assert found[0] == found[1] and found[0][2] == 1
    assert 0 < len(seen) < 11, "the loop here did not begin, or it went to the end"


def test_streaming_prints_what_is_returned(capsys):
    class Words:
        def decode(self, tokens, **kw):
            return "".join(f"{t} " for t in tokens)
    model = tiny("llama", F64)
    out = Decoder(model, 6).generate(ids(1), max_new_tokens=6, do_sample=False, eos_token_id=None,
                                     streamer=TextStreamer(Words(), skip_prompt=True))
    assert capsys.readouterr().out.split() == [str(t) for t in out[0, 10:].tolist()]


def test_two_threads_with_different_adapters_do_not_disturb_each_other():
    model = tiny("llama", F64)
    attached(model, "lora", "series", scale=0.3)
    decoder, options = Decoder(model, 40), left_padded(4) | {"max_new_tokens": 40, "do_sample": False, "eos_token_id": STOPS}
    want = {name: model.generate(adapter_ids=name, **options) for name in ("lora", "series")}
    assert want["lora"].shape != want["series"].shape or not torch.equal(want["lora"], want["series"])
    wrong, start = [], threading.Barrier(4)

    def work(name):
        start.wait()
        for _ in range(5):
            if not torch.equal(decoder.generate(adapter_ids=name, **options), want[name]):
                wrong.append(name)
    threads = [threading.Thread(target=work, args=(name,)) for name in ("lora", "series") * 2]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def snapshot(model: nn.Module) -> dict:
    return {name: (type(m), sorted(m.__dict__), [id(p) for p in m._parameters.values()], [id(c) for c in m._modules.values()])
            for name, m in model.named_modules()}


@family
def test_the_base_is_left_as_it_is(kind):
    model = tiny(kind)
    attached(model, "lora")
    model(ids(1))
    before, tensors = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    decoder = Decoder(model, 5)
    decoder.generate(**left_padded(3), max_new_tokens=5, do_sample=False)
    assert snapshot(model) == before and all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(m, Packed) for m in model.modules())


needs_packing = pytest.mark.skipif(not packing._works(BF16), reason="this torch packs no weights on this machine")


@needs_packing
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_a_packed_product_is_the_product(dtype):
    torch.manual_seed(0)
    for d_in, d_out, bias in ((576, 192, False), (64, 200, True), (33, 7, True)):
        linear = nn.Linear(d_in, d_out, bias).to(dtype).requires_grad_(False)
        copy = packed(nn.Sequential(linear), 1)[0]
        assert isinstance(copy, Packed) and copy.weight is linear.weight
        for rows in (1, 3, 32, 70):
            x = torch.randn(rows, 1, d_in).to(dtype)
            with torch.no_grad():
                y, z = linear(x), copy(x)
            assert torch.equal(y, z) if dtype == BF16 else float((y - z).abs().max()) <= 1e-5 * float(y.abs().max())


@needs_packing
def test_a_packed_linear_runs_the_hooks_follows_its_weight_and_gives_gradients():
    model = nn.Sequential(nn.Linear(64, 64).to(BF16))
    model[0].register_forward_hook(lambda m, args, out: out + 1)
    twin, x = packed(model, 1), torch.randn(3, 64).to(BF16)
    assert twin is not model and torch.equal(twin(x), model(x))
    with torch.no_grad():
        model[0].weight.mul_(2)                       # the copy is of the old weight
        assert torch.equal(twin(x), model(x))
        model[0].weight = nn.Parameter(model[0].weight * 3)
        assert torch.equal(packed(model, 1)(x), model(x))
    twin(x).sum().backward()
    assert twin[0].weight.grad is not None
    full = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(full, 1)(x.float()), full(x.float())) and full(x.float()).dtype == BF16


def test_only_plain_linears_are_packed_and_only_where_it_pays(monkeypatch):
    class Special(nn.Linear):
        pass
    special = nn.Sequential(Special(64, 64).to(BF16), nn.Linear(64, 64).double())
    assert packed(special, 100) is special
    plain = nn.Sequential(nn.Linear(64, 64).to(BF16), nn.Sequential(Special(64, 64)))
    if packing._works(BF16):
        twin = packed(plain, 100)
        assert isinstance(twin[0], Packed) and twin[1] is plain[1]
    with monkeypatch.context() as m:
        m.setattr(packing, "available", lambda device: 1000)
        assert packed(plain, 100) is plain
    monkeypatch.setattr(packing, "PAYS", 24)
    assert packed(plain, 7) is plain


def test_a_merge_after_packing_is_seen():
    model = tiny("llama", BF16)
    adapters = attached(model, "lora", scale=0.5)
    decoder, options = Decoder(model, 8), left_padded(4) | {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    adapters.active = ()
    base = decoder.generate(**options)
    adapters.active = "lora"
    adapters.merge("lora")
    merged = decoder.generate(**options)
    assert torch.equal(merged, model.generate(**options)) and not torch.equal(merged, base)


@pytest.mark.parametrize("length", [BLOCK - 2, BLOCK - 1, BLOCK, BLOCK + 1])
def test_the_cache_holds_what_was_put_in_and_the_rows_that_were_kept(length):
    cache: Grown = grown()
    draw = torch.Generator().manual_seed(0)
    k, v = (torch.randn(4, 2, length + 70, d, generator=draw) for d in (8, 5))
    for start, end in ((0, length), *((n, n + 1) for n in range(length, length + 70))):
        if start == length + 30:
            keep = torch.tensor([3, 1])
            cache.select(keep, 3)
            k, v = k[keep], v[keep]
        cut = 3 if start >= length + 30 else 0
        assert cache.get_seq_length() == start - cut and cache.get_mask_sizes(1, 0) == (start - cut + 1, 0)
        keys, values = cache.update(k[..., start:end, :], v[..., start:end, :], 0)
        assert torch.equal(keys, k[..., cut:end, :]) and torch.equal(values, v[..., cut:end, :])


def test_answers_and_the_command_line_go_through_the_loop():
    for name in ("tsugiki.evaluate.answers", "tsugiki.cli.generate"):
        __import__(name)
        text = open(sys.modules[name].__file__, encoding="utf-8").read()
        assert "Decoder(" in text and "model.generate(" not in text
