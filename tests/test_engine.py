"""The engine answers each request as generate() alone does, whatever else is in the batch, joins, leaves, or goes wrong."""
from __future__ import annotations

import os
import random
import threading
import time

import pytest
import torch
from kit import TOKENIZER
from serving import WHO, another, draw_requests, greedy, serve, submit
from tiny import METHOD_CASES, SPECS, ids
from tokenizers_tiny import tokenizer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tsugiki.data import Renderer
from tsugiki.evaluate import packed as packing
from tsugiki.serve import sampling
from tsugiki.serve.engine import Request, Sampling
from tsugiki.serve.text import Writer

ALL = os.environ.get("TSUGIKI_TESTS") == "all"
LONG = 60                                             # seconds after which an answer will not come any more


@pytest.fixture(autouse=True)
def everything_is_packed(monkeypatch):
    """Tiny linears too."""
    monkeypatch.setattr(packing, "SMALLEST", 0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return serve(tmp_path_factory.mktemp("llama"))


def finish(streams) -> list[list[int]]:
    return [list(stream.result(LONG).ids) for stream in streams]


def test_greedy_tokens_are_those_of_generate_alone_in_random_order_with_cancellations_evictions_and_a_replace(
        llama, engines, tmp_path):
    requests = draw_requests(llama, 500 if ALL else 80, seed=1)
    new = another(llama, "lora", 99, tmp_path / "new")
    engine = engines(llama, *WHO)
    draw, streams, wanted = random.Random(2), [], []
    for n, (prompt, name, count) in enumerate(requests):
        if n == len(requests) // 2:
            engine.replace("lora", llama.folders[new])
        folder = new if name == "lora" and n >= len(requests) // 2 else name
        streams.append(submit(engine, (prompt, name, count)))
        wanted.append((prompt, folder, count))
        if draw.random() < 0.15:
            engine_cancels = streams[-1]
            threading.Timer(draw.random() * 0.3, engine_cancels.cancel).start()
        if draw.random() < 0.2:
            time.sleep(draw.random() * 0.05)
    ended = {}
    for stream, (prompt, folder, count) in zip(streams, wanted, strict=True):
        result, alone = stream.result(LONG), llama.alone(prompt, folder, count)
        ended[result.finish] = ended.get(result.finish, 0) + 1
        assert list(result.ids) == (alone if result.finish == "length" else alone[:len(result.ids)]), (folder, len(prompt), result)
    stats = engine.stats()
    assert ended.keys() == {"length", "cancelled"} and stats.requests == ended
    assert stats.evictions > 5 and stats.tokens_cached > 0 and stats.resident <= 4 and len(WHO) == 12
    assert any(llama.alone(p, "lora", c) != llama.alone(p, new, c) for p, f, c in wanted if f == new)
    assert stats.running == stats.waiting == stats.cache_tokens == 0
    assert engine.info("lora").version != llama.engine("lora", started=False).info("lora").version


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.share(3)) for k in SPECS])
def test_on_every_family(kind, engines, tmp_path):
    more = {"sliding_window": 9} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    names = ("lora", "prefix", "prompt", "llama_adapter", "reft", "ia3")
    served = serve(tmp_path, kind, names=[n for n in names if n in METHOD_CASES], **more)
    requests = draw_requests(served, 24 if ALL else 8, seed=3, longest=40)
    engine = engines(served, slots=3, batch=4, chunk=16)
    streams = [submit(engine, request) for request in requests]
    for request, found in zip(requests, finish(streams), strict=True):
        assert found == served.alone(*request), request[1:]


def test_every_method_decodes_in_a_mixed_batch_as_alone(engines, tmp_path):
    served = serve(tmp_path, names=list(METHOD_CASES))
    engine = engines(served, slots=len(METHOD_CASES), batch=16, chunk=64)
    requests = [(tuple(ids(1, 6 + n % 9, seed=n)[0].tolist()), name, 8) for n, name in enumerate(METHOD_CASES)]
    streams = [submit(engine, request) for request in requests]
    plain = [served.alone(prompt, None, 8) for prompt, _, _ in requests]
    found = finish(streams)
    for request, tokens in zip(requests, found, strict=True):
        assert tokens == served.alone(*request), request[1]
    assert sum(a != b for a, b in zip(plain, found, strict=True)) > len(found) / 2, "the adapters have no effect"
    assert engine.stats().evictions == 0


def test_a_prompt_in_pieces_and_one_from_the_prefix_cache_are_a_prompt_at_once(llama, engines):
    prompt = tuple(ids(1, 100, seed=5)[0].tolist())
    for chunk in (7, 64, 200):
        engine = engines(llama, "prefix", "prompt", "reft", "lora", chunk=chunk)
        for name in ("prefix", "prompt", "reft", "lora", None):
            first, second, third = (submit(engine, request) for request in (
                (prompt, name, 5), (prompt[:70] + prompt[:9], name, 5), (prompt, name, 5)))
            assert finish([first, second, third]) == [llama.alone(prompt, name, 5), llama.alone(prompt[:70] + prompt[:9], name, 5),
                                                      llama.alone(prompt, name, 5)]
            again = submit(engine, (prompt, name, 5))
            assert finish([again]) == [llama.alone(prompt, name, 5)]
            assert again.cached_tokens == (0 if name == "reft" else 96) and again.prompt_tokens == 100
        assert engine.stats().tokens_cached > 96


def test_the_prefix_cache_is_bounded_and_forgets_what_was_used_longest_ago(llama, engines):
    engine = engines(llama, "lora", prefix_tokens=100)
    first, second = (tuple(ids(1, 70, seed=s)[0].tolist()) for s in (6, 7))
    for prompt in (first, second):
        finish([submit(engine, (prompt, "lora", 2))])
    assert engine.stats().prefix_tokens <= 100
    streams = [submit(engine, (second, "lora", 2)), submit(engine, (first, "lora", 2))]
    assert finish(streams) == [llama.alone(second, "lora", 2), llama.alone(first, "lora", 2)]
    assert streams[0].cached_tokens == 64 and streams[1].cached_tokens < 64


def test_rows_that_need_more_columns_than_there_are_wait_and_are_right(llama, engines):
    engine = engines(llama, "lora", "prefix", cache_tokens=150)
    requests = draw_requests(llama, 20, seed=8, names=("lora", "prefix"))
    most = 0
    streams = [submit(engine, request) for request in requests]
    while not all(stream.done for stream in streams):
        arena = engine.forward.arena
        most = max(most, arena.rows * arena.capacity)
        time.sleep(0.001)
    assert finish(streams) == [llama.alone(*request) for request in requests]
    assert 0 < most <= 150


# Sampling

def test_sampled_tokens_are_a_function_of_the_request_and_its_seed(llama, engines):
    def run(neighbours: int) -> list[list[int]]:
        engine = engines(llama, "lora", "series")
        for request in draw_requests(llama, neighbours, seed=neighbours, names=("lora", "series")):
            submit(engine, request)
        asked = [Sampling(max_tokens=12, temperature=1.5, seed=seed, **more) for seed in (1, 2)
                 for more in ({}, {"top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.7})]
        return finish([engine.submit(Request((5, 6, 7, 8), "lora", s)) for s in asked])
    alone = run(0)
    assert run(9) == alone and not {*map(tuple, alone[:4])} & {*map(tuple, alone[4:])}


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.8}, {"temperature": 2.0}])
def test_tokens_are_drawn_with_the_probabilities_of_transformers(options):
    settings = Sampling(**options)
    scores = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 2
    want = TemperatureLogitsWarper(settings.temperature)(None, scores.clone())
    want = TopKLogitsWarper(settings.top_k)(None, want) if settings.top_k else want
    want = (TopPLogitsWarper(settings.top_p)(None, want) if settings.top_p < 1 else want).softmax(-1)[0]
    count = 4000
    found = sampling.choose(scores.expand(count, -1), [sampling.Draw(settings, seed, seed % 7) for seed in range(count)])
    shares = torch.bincount(torch.tensor(found), minlength=20) / count
    assert ((want > 0) | (shares == 0)).all()
    assert (shares - want).abs().max() < 4 * (0.25 / count) ** 0.5


def test_a_repetition_penalty_is_that_of_transformers(llama, engines):
    engine, prompt = engines(llama, "lora"), (9, 8, 7, 9)
    want = llama.alone(prompt, "lora", 20, repetition_penalty=3.0)
    assert finish([submit(engine, (prompt, "lora", 20), repetition_penalty=3.0)]) == [want] != [llama.alone(prompt, "lora", 20)]


def test_logprobs_are_the_log_softmax_of_the_models_own_scores(llama, engines):
    engine, prompt = engines(llama, "prefix"), (9, 8, 7, 9)
    result = engine.submit(Request(prompt, "prefix", Sampling(max_tokens=6, temperature=2.0, seed=1, top_k=3, logprobs=4,
                                                              repetition_penalty=2.0, ignore_stop_ids=True))).result(LONG)
    from tsugiki import formats
    formats.load(llama.model.adapters, "alone", llama.folders["prefix"])
    with torch.no_grad():
        logs = llama.model(torch.tensor([prompt + result.ids]), adapter_ids="alone").logits[0, 3:-1].float().log_softmax(-1)
    llama.model.adapters.remove("alone")
    assert len(result.logprobs) == 6
    for row, token, found in zip(logs, result.ids, result.logprobs, strict=True):
        assert found.id == token and abs(found.logprob - row[token]) < 1e-5
        best = row.topk(4)
        assert [i for i, _, _ in found.top] == best.indices.tolist()
        assert max(abs(p - q) for (_, _, p), q in zip(found.top, best.values.tolist(), strict=True)) < 1e-5


# Text

@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_pieces_of_text_are_whole_characters_and_joined_what_the_trainer_reads(kind):
    tok = tokenizer(kind, bos="<s>", eos="</s>")
    texts = [" 日本語の文章 🙂🙃 Ünï", "Hello there, how are you?", "\u00e9" * 20]
    for n in range(30 if kind == "bytes" else len(texts)):
        tokens = tok(texts[n], add_special_tokens=False)["input_ids"] if n < len(texts) else ids(1, 12, seed=n)[0].tolist()
        writer = Writer(tok, tok("a", add_special_tokens=False)["input_ids"])
        parts = [writer.push(token) for token in tokens] + [writer.close()]
        assert not any(stopped for _, stopped in parts)
        text = "".join(part for part, _ in parts)
        renderer = Renderer(tok)
        if not set(tokens) & set(renderer.stop_ids):
            assert text == renderer.answer(tokens)
        if n < len(texts):
            assert len([p for p, _ in parts if p]) > 1 and not any("\ufffd" in p for p, _ in parts)


def test_a_stop_text_ends_the_answer_before_it_also_across_tokens_and_nothing_of_it_is_shown(llama, engines):
    engine = engines(llama, "lora")
    for seed in range(6):
        prompt = tuple(ids(1, 8, seed=seed)[0].tolist())
        whole = submit(engine, (prompt, "lora", 30)).result(LONG)
        at = len(whole.text) // 2
        stop = whole.text[at:at + 5]
        seen, cut = [], engine.submit(Request(prompt, "lora", greedy(30, stop=("never", stop))))
        for event in cut:
            seen.append(event.text)
        result = cut.result(LONG)
        assert result.finish == "stop" and result.text == "".join(seen) == whole.text[:whole.text.index(stop)]
        assert list(result.ids) == list(whole.ids)[:len(result.ids)] and len(result.ids) < 30


def test_a_stop_text_that_only_begins_is_given_at_the_end():
    writer = Writer(TOKENIZER, TOKENIZER("a", add_special_tokens=False)["input_ids"], ("END!",))
    parts = [writer.push(i)[0] for i in TOKENIZER(" the EN", add_special_tokens=False)["input_ids"]]
    assert "".join(parts) == " the " and writer.close() == ("EN", False)
    stopping = Writer(TOKENIZER, [], ("b c",))
    assert any(stopping.push(i)[1] for i in TOKENIZER("a b c d", add_special_tokens=False)["input_ids"])


def test_a_stop_token_ends_the_answer_and_has_no_text(llama, engines):
    engine, prompt = engines(llama, "lora"), (5, 6, 7)
    tokens = llama.alone(prompt, "lora", 10)
    version = engine.slots.named["lora"]
    version.info = type(version.info)(**vars(version.info) | {"stop_ids": (tokens[4],)})
    result = engine.submit(Request(prompt, "lora", greedy(10, ignore_stop_ids=False))).result(LONG)
    count = tokens.index(tokens[4]) + 1
    assert result.finish == "stop" and list(result.ids) == tokens[:count]
    renderer = Renderer(TOKENIZER)
    assert result.text == renderer.answer(tokens[:count - 1])
    assert renderer.stop_ids[0] in engine.base_stop_ids
