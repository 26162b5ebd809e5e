"""The HTTP interface: OpenAI's own client against it, limits, keys, administration, and what a client that leaves does."""
from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time

import pytest
from kit import TOKENIZER
from serve_kit import ADMIN, BASE, KEY, Script, service, serving, until
from tokenizers_tiny import CHATML

from tsugiki.data import Conversation, Message, Renderer
from tsugiki.errors import UserError
from tsugiki.serve import auth, schema
from tsugiki.serve.auth import Keys, matches, read_keys
from tsugiki.serve.refusal import Refusal
from tsugiki.serve.roots import allowed_roots, resolve

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")

ASKED = [{"role": "user", "content": "what is two plus two?"}]
WEB = httpx.Client(timeout=30)          # one, since each makes a TLS context
KEYS = Keys((KEY.encode(), b"another-user-key-0123"), (ADMIN.encode(),))


def client(url: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, http_client=WEB)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def post(url: str, path: str = "/v1/chat/completions", **more) -> httpx.Response:
    body = {"model": "alpha"} | ({"messages": ASKED} if "chat" in path else {"prompt": "a"}) | more
    return WEB.post(url + path, json=body)


@pytest.fixture(scope="module")
def open_server():
    """(engine, address) of a server without keys."""
    engine = Script()
    with serving(service(engine)) as url:
        yield engine, url


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """(engine, address, root) of a server with keys of both kinds and a folder that adapters may be loaded from."""
    root = tmp_path_factory.mktemp("root")
    for name in ("one", "two"):
        (root / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (root / name / file).write_text("{}")
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{}")
    engine = Script()
    with serving(service(engine, keys=KEYS, roots=allowed_roots([str(root)]))) as url:
        yield engine, url, root


# OpenAI's client

def test_a_chat_is_answered_with_usage_and_a_reason_it_ended(open_server):
    engine, url = open_server
    made = client(url).chat.completions.create(model="alpha", messages=ASKED)
    assert made.choices[0].message.content == " alpha" * 5 and made.choices[0].message.role == "assistant"
    assert made.choices[0].finish_reason == "stop" and made.object == "chat.completion" and made.id.startswith("chatcmpl-")
    prompt = len(engine.asked[-1].ids)
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (prompt, 5, prompt + 5)
    assert made.usage.prompt_tokens_details.cached_tokens == 1 and abs(made.created - time.time()) < 60
    other = client(url).chat.completions.create(model="beta", messages=ASKED, max_tokens=2)
    assert other.choices[0].message.content == " beta beta" and other.choices[0].finish_reason == "length"
    assert client(url).chat.completions.create(model=BASE, messages=ASKED).choices[0].message.content == " the base" * 5


def test_a_stream_gives_the_same_text_in_chunks_and_the_usage_last(open_server):
    _, url = open_server
    chunks = list(client(url).chat.completions.create(model="beta", messages=ASKED, stream=True, n=2,
                                                      stream_options={"include_usage": True}))
    assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant"] * 2 and chunks[0].object == "chat.completion.chunk"
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(c.delta.content or "" for c in mine) == " beta" * 5
        assert [c.finish_reason for c in mine if c.finish_reason] == ["stop"] and mine[-1].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 10 and all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_a_stream_is_server_sent_events_to_the_byte(open_server):
    _, url = open_server
    answer = post(url, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts[-1] == "" and parts[-2] == "data: [DONE]" and all(p.startswith("data: ") and "\n" not in p for p in parts[:-1])
    assert all(json.loads(p[6:])["object"] == "chat.completion.chunk" for p in parts[:-2])


def test_completions_take_texts_and_token_ids_one_or_many(open_server):
    engine, url = open_server
    made = client(url).completions.create(model="alpha", prompt="one and", max_tokens=3)
    assert made.choices[0].text == " alpha" * 3 and made.object == "text_completion" and made.choices[0].finish_reason == "length"
    plain = Renderer(TOKENIZER).prompt(Conversation("plain", (Message("user", "one and"), Message("assistant", "")), "prompt"))
    assert list(engine.asked[-1].ids) == plain
    many = client(url).completions.create(model="alpha", prompt=["one", "two"], n=2, seed=5)
    assert [c.index for c in many.choices] == [0, 1, 2, 3] and len({engine.asked[-1].ids, engine.asked[-3].ids}) == 2
    assert [r.sampling.seed for r in engine.asked[-4:]] == [5, 6, 5, 6], "the first choice of each is what it gives alone"
    assert many.usage.prompt_tokens == len(engine.asked[-1].ids) + len(engine.asked[-3].ids), "a prompt counts once"
    client(url).completions.create(model="alpha", prompt=[5, 6, 7])
    assert engine.asked[-1].ids == (5, 6, 7)
    client(url).completions.create(model="alpha", prompt=[[5, 6], [7]])
    assert [r.ids for r in engine.asked[-2:]] == [(5, 6), (7,)]
    assert "".join(c.choices[0].text for c in client(url).completions.create(model="beta", prompt="a", stream=True)) == " beta" * 5


def test_logprobs_have_openais_shapes(open_server):
    _, url = open_server
    made = client(url).chat.completions.create(model="alpha", messages=ASKED, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert len(made.content) == 5 and made.content[0].token == " alpha" and bytes(made.content[0].bytes) == b" alpha"
    assert made.content[0].logprob == -0.5 and [t.token for t in made.content[0].top_logprobs] == ["t0", "t1"]
    bare = client(url).chat.completions.create(model="alpha", messages=ASKED, logprobs=True).choices[0].logprobs
    assert [t.top_logprobs for t in bare.content] == [[]] * 5
    plain = client(url).completions.create(model="alpha", prompt="a", logprobs=1).choices[0].logprobs
    assert plain.tokens == [" alpha"] * 5 and plain.text_offset == [0, 6, 12, 18, 24] and plain.top_logprobs[0] == {"t0": -1.0}
    streamed = [c.choices[0] for c in client(url).completions.create(model="alpha", prompt="a", logprobs=0, stream=True)]
    assert [o for c in streamed if c.logprobs for o in c.logprobs.text_offset] == [0, 6, 12, 18, 24]


def test_several_adapters_answer_at_once_through_the_async_client(open_server):
    _, url = open_server

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as many:
            async def one(name: str) -> str:
                stream = await many.chat.completions.create(model=name, messages=ASKED, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])
            return await asyncio.gather(*[one(name) for name in ["alpha", "beta", BASE] * 5])
    assert asyncio.run(all_of_them()) == [" alpha" * 5, " beta" * 5, " the base" * 5] * 5


def test_models_are_listed_and_described(open_server):
    _, url = open_server
    assert [m.id for m in client(url).models.list()] == [BASE, "alpha", "beta"]
    assert client(url).models.retrieve("beta").tsugiki["method"] == "lora"
    with pytest.raises(openai.NotFoundError, match="did you mean 'beta'"):
        client(url).models.retrieve("betta")


@pytest.mark.parametrize("body, error, param", [
    ({"model": "alpah"}, openai.NotFoundError, "model"),
    ({"model": ""}, openai.BadRequestError, "model"),
    ({"messages": []}, openai.BadRequestError, "messages"),
    ({"messages": "hi"}, openai.BadRequestError, "messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, openai.BadRequestError, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, openai.BadRequestError, "messages[0].content"),
    ({"messages": [*ASKED, {"role": "assistant", "content": "I"}]}, openai.BadRequestError, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}]},
     openai.BadRequestError, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "a </s> b"}]}, openai.BadRequestError, "messages"),
    ({"temperature": 3}, openai.BadRequestError, "temperature"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
    ({"top_p": 0}, openai.BadRequestError, "top_p"),
    ({"max_tokens": 10_000}, openai.BadRequestError, "max_tokens"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, openai.BadRequestError, "max_tokens"),
    ({"n": 17}, openai.BadRequestError, "n"),
    ({"n": True}, openai.BadRequestError, "n"),
    ({"stop": ["a"] * 17}, openai.BadRequestError, "stop"),
    ({"stop": [""]}, openai.BadRequestError, "stop[0]"),
    ({"seed": 1 << 64}, openai.BadRequestError, "seed"),
    ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
    ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty"),
    ({"frequency_penalty": False}, openai.BadRequestError, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, openai.BadRequestError, "logit_bias.5"),
    ({"tools": [{}]}, openai.BadRequestError, "tools"),
    ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format.type"),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
    ({"extra_body": {"kind": "chatty"}}, openai.BadRequestError, "kind"),
])
def test_what_is_wrong_is_refused_by_field_as_the_clients_own_error(open_server, body, error, param):
    engine, url = open_server
    before = len(engine.asked)
    with pytest.raises(error) as found:
        client(url).chat.completions.create(**{"model": "alpha", "messages": ASKED} | body)
    assert found.value.param == param and len(engine.asked) == before
    message = found.value.body["message"]
    assert param.split("[")[0].split(".")[0] in message and "\n" not in message and found.value.body.keys() == {
        "message", "type", "param", "code"}


def test_refusals_tell_what_helps(open_server):
    _, url = open_server
    assert "repetition_penalty" in post(url, presence_penalty=1).text
    assert "did you mean 'temperature'" in post(url, temprature=1).text
    assert "nothing is fetched" in post(url, messages=[{"role": "user", "content": [{"type": "image_url"}]}]).text
    assert "special token" in post(url, messages=[{"role": "user", "content": "</s>"}]).text
    assert "the model has 100" in post(url, "/v1/completions", prompt=[5, 100]).json()["error"]["message"]


def test_neutral_and_harmless_fields_that_clients_send_are_taken(open_server):
    _, url = open_server
    body = {"user": "me", "metadata": {"a": "b"}, "store": False, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
            "tools": [], "response_format": {"type": "text"}, "parallel_tool_calls": True, "top_p": None, "stop": None, "n": None,
            "service_tier": "auto"}
    assert post(url, **body).status_code == 200
    sent_back = {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    assert post(url, messages=[*ASKED, sent_back, *ASKED]).status_code == 200
    assert post(url, "/v1/completions", echo=False, best_of=1, suffix=None).status_code == 200
    assert post(url, "/v1/completions", echo=True).json()["error"]["param"] == "echo"


def test_sampling_reaches_the_engine_as_it_was_sent(open_server):
    engine, url = open_server
    post(url, temperature=0, top_p=0.5, top_k=7, repetition_penalty=1.2, seed=-3, stop="end", max_completion_tokens=9,
         logprobs=True, top_logprobs=4)
    s = engine.asked[-1].sampling
    assert (s.temperature, s.top_p, s.top_k, s.repetition_penalty, s.stop) == (0, 0.5, 7, 1.2, ("end",))
    assert (s.max_tokens, s.logprobs, s.seed) == (9, 4, (1 << 63) - 3)
    post(url)
    s = engine.asked[-1].sampling
    assert (s.temperature, s.top_p, s.seed, s.stop, s.logprobs, s.max_tokens) == (1, 1, None, (), None, schema.Limits().max_tokens)
    post(url, "/v1/completions")
    assert engine.asked[-1].sampling.max_tokens == 16


def test_prompts_are_the_ids_that_training_saw(open_server):
    engine, url = open_server
    engine.known["own"] = engine._info("own", "1")
    engine.known["own"].template, engine.known["own"].stop = CHATML, "<|im_end|>"
    engine.known["flat"] = engine._info("flat", "1")
    engine.known["flat"].kind = "plain"
    try:
        messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [
            {"type": "text", "text": "one and "}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": "three"}, *ASKED]
        said = tuple(Message({"developer": "system"}.get(m["role"], m["role"]), m["content"]) for m in messages)
        said = (said[0], Message("user", "one and two"), *said[2:], Message("assistant", ""))
        for name, renderer in (("own", Renderer(TOKENIZER, template=CHATML, stop="<|im_end|>")), ("alpha", Renderer(TOKENIZER))):
            assert post(url, model=name, messages=messages).status_code == 200
            assert list(engine.asked[-1].ids) == renderer.prompt(Conversation("chat", said, "messages"))
        assert post(url, model="flat").status_code == 200
        plain = Conversation("plain", (Message("user", ASKED[0]["content"]), Message("assistant", "")), "prompt")
        assert list(engine.asked[-1].ids) == Renderer(TOKENIZER).prompt(plain)
        assert "plain prompts" in post(url, model="flat", messages=messages).text
        assert "plain prompts" in post(url, model=BASE, messages=messages).text, "the tokenizer has no chat template"
        assert post(url, model="flat", messages=messages, kind="chat").status_code == 200
    finally:
        del engine.known["own"], engine.known["flat"]


# Bodies

@pytest.mark.parametrize("data, said", [
    (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"\xff", "not UTF-8"), (b"[]", "is a list, not an object"),
    (b"{} {}", "more than one"), (b'{"model": "a", "model": "b"}', "appears twice"), (b'{"temperature": NaN}', "NaN is not"),
    (b'{"temperature": 1e999}', "too large"), (b'{"model": "\\ud800"}', "surrogate"), (b"[" * 100_000, "nested too deeply"),
    (b'{"n": ' + b"9" * 10_000 + b"}", "not valid JSON"), (b'{"model": "a\\u0000"}', "NUL")])
def test_a_body_that_is_not_strict_json_is_refused(open_server, data, said):
    _, url = open_server
    answer = WEB.post(f"{url}/v1/chat/completions", content=data, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_a_body_of_another_type_is_refused(open_server):
    """A form on another site can send text/plain without asking, but not application/json."""
    _, url = open_server
    data = json.dumps({"model": "alpha", "messages": ASKED})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""):
        assert WEB.post(f"{url}/v1/chat/completions", content=data, headers={"Content-Type": kind}).status_code == 415
    good = WEB.post(f"{url}/v1/chat/completions", content=data, headers={"Content-Type": "application/JSON; charset=utf-8"})
    assert good.status_code == 200 and "access-control-allow-origin" not in good.headers


def test_a_body_that_is_too_large_or_too_slow_is_refused():
    with serving(service(Script(), limits=schema.Limits(body_bytes=5000, body_seconds=0.2))) as url:
        answer = post(url, messages=[{"role": "user", "content": "a" * 20_000}])
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
        assert post(url, messages=[{"role": "user", "content": "a" * 4000}]).status_code == 200
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                         b"Content-Length: 100\r\n\r\n{")
            slow.settimeout(10)
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


# Queue, time, clients that leave

def test_a_full_queue_is_429_and_leaves_nothing_behind():
    engine = Script(queue=2, pace=0.05, words=400)
    with serving(service(engine)) as url:
        with pytest.raises(openai.RateLimitError) as found:
            client(url).chat.completions.create(model="alpha", messages=ASKED, n=3)
        assert found.value.response.headers["retry-after"] == "1" and found.value.code == "queue_full"
        until(lambda: not engine.running)
        assert engine.finished["cancelled"] == 2, "the choices that had begun were cancelled"


def test_an_answer_that_takes_too_long_ends_whole_and_streamed():
    engine = Script(pace=0.05, words=400)
    with serving(service(engine, limits=schema.Limits(timeout=0.3))) as url:
        whole = post(url)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match="took longer"):
            list(client(url).chat.completions.create(model="alpha", messages=ASKED, stream=True))
        until(lambda: engine.finished["cancelled"] == 2 and not engine.running)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(stream):
    engine = Script(pace=0.02, words=5000)
    with serving(service(engine)) as url:
        data = json.dumps({"model": "alpha", "messages": ASKED, "stream": stream, "n": 2}).encode()
        asked = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                 b"Content-Length: %d\r\n\r\n" % len(data) + data)
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as leaving:
            leaving.sendall(asked)
            until(lambda: len(engine.running) == 2)
        until(lambda: not engine.running)
        assert engine.finished == {"cancelled": 2}
        for _ in range(10):                           # also one that leaves before the first event
            with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as leaving:
                leaving.sendall(asked)
        WEB.get(f"{url}/health")
        until(lambda: not engine.running)
        assert set(engine.finished) == {"cancelled"}
        before = engine.finished["cancelled"]
        with client(url).chat.completions.create(model="alpha", messages=ASKED, stream=True) as chunks:
            next(iter(chunks))
        until(lambda: engine.finished["cancelled"] > before)


def test_a_mistake_of_ours_is_an_error_of_openais_shape_without_internals(monkeypatch, caplog):
    engine = Script()
    with serving(service(engine)) as url:
        monkeypatch.setattr(engine, "submit", lambda *a: 1 / 0)
        answer = post(url)
        assert answer.status_code == 500 and "ZeroDivision" not in answer.text and "Traceback" not in answer.text
        assert answer.json()["error"]["type"] == "server_error"
        with pytest.raises(openai.InternalServerError):
            client(url).chat.completions.create(model="alpha", messages=ASKED)
        assert "/v1/chat/completions failed" in caplog.text and "ZeroDivisionError" in caplog.text, "the log has it"


# Keys

def routes(app) -> list[tuple[str, str]]:
    """(method, path) of every route, found by walking the router."""
    return [(method, re.sub(r"{\w+}", "nobody", r.path)) for r in app.routes for method in sorted(r.methods)]


def test_every_route_but_health_answers_401_without_the_key(locked):
    _, url, _ = locked
    found = routes(service(Script()).inner)
    assert len(found) > 15 and ("POST", "/v1/chat/completions") in found and ("DELETE", "/admin/adapters/nobody") in found
    for method, path in [*found, ("GET", "/no/such/route"), ("OPTIONS", "/v1/models"), ("GET", "//health"), ("GET", "/health/")]:
        for headers in ({}, bearer("wrong-key-0123456789"), *({"Authorization": v} for v in ("Bearer", KEY, f"Basic {KEY}"))):
            answer = WEB.request(method, url + path, headers=headers)
            assert answer.status_code == (200 if path == "/health" else 401), (method, path)
            assert path == "/health" or answer.headers["www-authenticate"] == "Bearer"
    doubled = WEB.get(f"{url}/v1/models", headers=[("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")])
    assert doubled.status_code == 401


def test_each_key_opens_its_own_routes_and_no_other(locked):
    _, url, _ = locked
    for method, path in routes(service(Script()).inner):
        admin = path.startswith("/admin")
        keys = (KEY, "another-user-key-0123", ADMIN)
        mine = {key: WEB.request(method, url + path, headers=bearer(key)).status_code for key in keys}
        assert (mine[KEY] == 401) == admin and (mine["another-user-key-0123"] == 401) == admin
        assert (mine[ADMIN] == 401) == (not admin and path != "/health"), path
    with pytest.raises(openai.AuthenticationError):
        client(url, "wrong-key-0123456789").models.list()
    assert len(list(client(url, KEY).models.list())) >= 3


def test_without_an_admin_key_nothing_is_administered(open_server):
    _, url = open_server
    for method, path in routes(service(Script()).inner):
        if path.startswith("/admin"):
            assert WEB.request(method, url + path, headers=bearer(KEY)).status_code == 403


def test_keys_are_compared_in_constant_time_and_all_of_them(monkeypatch):
    compared = []

    def spy(a, b):
        compared.append((a, b))
        return a == b
    keys = (b"first-key-0123456789", b"second-key-0123456789", b"third-key-01234567890")
    assert matches(keys[0], keys) and matches(keys[2], keys) and not matches(b"other", keys) and not matches(b"", keys)
    monkeypatch.setattr(auth.hmac, "compare_digest", spy)
    assert matches(keys[0], keys) and not matches(b"x", keys) and len(compared) == 6, "an early end tells which key was right"
    assert {len(side) for pair in compared for side in pair} == {32}, "digests, so that no length is told"


def test_key_files_are_read_strictly_and_never_shown(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n  {ADMIN}  \n")
    monkeypatch.delenv("TSUGIKI_KEY", raising=False)
    assert read_keys(str(file), "TSUGIKI_KEY", "--key-file") == (KEY.encode(), ADMIN.encode())
    monkeypatch.setenv("TSUGIKI_KEY", "from-the-environment-1")
    assert read_keys(None, "TSUGIKI_KEY", "--key-file") == (b"from-the-environment-1",)
    monkeypatch.delenv("TSUGIKI_KEY")
    assert read_keys(None, "TSUGIKI_KEY", "--key-file") == ()
    for text, said in (("short", "at least 16"), ("", "holds no key"), ("a key with spaces in it", "without spaces"),
                       ("schlüssel-mit-umlaut-0", "printable ASCII")):
        file.write_text(text)
        with pytest.raises(UserError, match=said) as found:
            read_keys(str(file), "TSUGIKI_KEY", "--key-file")
        assert not text or text not in str(found.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(str(tmp_path / "none"), "TSUGIKI_KEY", "--key-file")
    with pytest.raises(UserError, match="must differ"):
        Keys((KEY.encode(),), (KEY.encode(),))


def test_without_a_key_only_this_machines_names_are_answered(open_server, locked):
    """DNS rebinding: a page elsewhere points its own name here and would read the answers as its own."""
    _, url = open_server
    port = httpx.URL(url).port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "LOCALHOST", f"[::1]:{port}"):
        assert WEB.get(f"{url}/v1/models", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.nip.io", "", "localhost:1:2"):
        assert WEB.get(f"{url}/v1/models", headers={"Host": host}).status_code == 403, host
        assert WEB.get(f"{url}/", headers={"Host": host}).status_code == 403, host
    assert WEB.get(f"{locked[1]}/v1/models", headers=bearer(KEY) | {"Host": "my.name.example"}).status_code == 200


# Administration

def test_adapters_are_loaded_replaced_and_taken_off_over_http(locked):
    engine, url, root = locked
    head, at = bearer(ADMIN), f"{url}/admin/adapters"
    made = WEB.post(at, headers=head, json={"name": "new", "path": "one"})
    assert made.status_code == 201 and made.json()["name"] == "new" and made.json()["method"] == "lora"
    assert "new" in [m.id for m in client(url, KEY).models.list()]
    assert client(url, KEY).chat.completions.create(model="new", messages=ASKED).choices[0].message.content == " new" * 5
    assert WEB.post(at, headers=head, json={"name": "new", "path": "one"}).status_code == 409
    assert WEB.post(at, headers=head, json={"name": BASE, "path": "one"}).status_code == 409
    before = client(url, KEY).chat.completions.create(model="new", messages=ASKED).system_fingerprint
    assert WEB.put(f"{at}/new", headers=head, json={"path": str(root / "two")}).status_code == 200
    assert client(url, KEY).chat.completions.create(model="new", messages=ASKED).system_fingerprint != before
    assert WEB.delete(f"{at}/new", headers=head).json() == {"name": "new", "deleted": True}
    assert WEB.delete(f"{at}/new", headers=head).status_code == 404
    assert WEB.put(f"{at}/new", headers=head, json={"path": "one"}).status_code == 404
    assert [a["name"] for a in WEB.get(at, headers=head).json()["adapters"]] == ["alpha", "beta"]
    broken = WEB.post(at, headers=head, json={"name": "x", "path": "broken"})
    assert broken.status_code == 400 and str(root) not in broken.text
    assert "broken/adapter_model.safetensors: no such file" in broken.text
    outside = WEB.post(at, headers=head, json={"name": "x", "path": "../one"})
    assert outside.status_code == 400 and outside.json()["error"]["param"] == "path"
    assert WEB.post(at, headers=head, json={"name": "x"}).status_code == 400


def test_the_resolver_gives_only_plain_folders_below_a_root(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root / "a" / "deep", other / "b", root / "linked-file"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    (root / "link").symlink_to(other / "b")
    (root / "up").symlink_to(root / "a", target_is_directory=True)
    (root / "linked-file" / "adapter_model.safetensors").symlink_to(other / "b" / "adapter_config.json")
    (root / "file").write_text("")
    (root / "empty").mkdir()
    roots = allowed_roots([str(root)])
    assert {resolve(p, roots) for p in ("a/deep", str(root / "a" / "deep"), "./a//deep/")} == {root / "a" / "deep"}
    wrong = ["", " ", ".", "..", "../other/b", "a/../a/deep", str(other / "b"), "/", "/etc", "link", "up/deep", "linked-file",
             "file", "empty", "none", "a\0b", "a/deep\0", "..\\other", "x" * 5000, "~", f"{root}/../other/b", f"/{root}/a/deep",
             f"{root}2"]
    said = set()
    for path in wrong:
        with pytest.raises(UserError) as found:
            resolve(path, roots)
        said.add(str(found.value))
    assert said == {"path: names no adapter folder below an allowed root"}, "one message, that tells nothing"
    with pytest.raises(UserError, match="--admin-root"):
        resolve("a/deep", ())
    (tmp_path / "alias").symlink_to(root)
    assert resolve("a/deep", allowed_roots([str(tmp_path / "alias")])) == root / "a" / "deep", "the operator's own link is followed"
    with pytest.raises(UserError, match="no such folder"):
        allowed_roots([str(tmp_path / "nowhere")])


# Documents

def test_the_openapi_document_is_valid_and_names_every_route(open_server):
    schemas = pytest.importorskip("jsonschema_rs")
    _, url = open_server
    made = WEB.get(f"{url}/openapi.json").json()
    assert made["openapi"] == "3.1.0"
    listed = {(m.upper(), p) for p, operations in made["paths"].items() for m in operations}
    assert listed == {(m, r.path) for r in service(Script()).inner.routes for m in r.methods - {"HEAD"}}
    for operations in made["paths"].values():
        for operation in operations.values():
            for part in [operation.get("requestBody", {"content": {}}), *operation["responses"].values()]:
                for media, content in part["content"].items():
                    if media == "text/event-stream":                         # which JSON Schema does not describe
                        assert content == {}
                    else:
                        schemas.Draft202012Validator(content["schema"])


def test_bodies_are_checked_as_the_document_says(open_server):
    """Our messages and a JSON Schema library, on bodies at and beyond every limit."""
    schemas = pytest.importorskip("jsonschema_rs")
    limits = schema.Limits()
    values = [None, True, False, 0, 1, -1, 2, 3, 16, 17, 20, 21, 1024, 1025, 1.0, 1.5, 1e-9, 1 << 63, -(1 << 63) - 1, "", "a",
              "text", "chat", "none", "x" * 256, "x" * 257, [], [1], [0.5], ["a"], [""], ["text"], ["a"] * 17, [[1]], [[]],
              [[1], [-1]], ["a", 1], {}, {"a": 1}, {"type": "text"}, {"type": "json"},
              {"include_usage": True}, {"include_usage": 1}, [{}], ASKED, [{"role": "user"}],
              [{"role": "user", "content": ["a"]}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
              [{"role": "user", "content": []}], [{"role": "user", "content": "a", "more": 1}]]
    tried = wrong = 0
    for made, good in ((schema.chat(limits), {"model": "m", "messages": ASKED}),
                       (schema.completion(limits), {"model": "m", "prompt": "a"}),
                       (schema.admin(True), {"name": "n", "path": "p"})):
        validator = schemas.Draft202012Validator(made)
        for key in [*made["properties"], "stranger"]:
            for value in values:
                body = good | {key: value}
                try:
                    schema.check(body, made)
                    mine = True
                except Refusal as e:
                    assert e.status == 400 and key in e.message
                    mine = False
                assert mine == validator.is_valid(body), (key, value)
                tried, wrong = tried + 1, wrong + (not mine)
    assert tried > 3000 and 0.3 * tried < wrong < 0.9 * tried


def test_metrics_are_prometheus_text(open_server):
    _, url = open_server
    post(url)
    WEB.get(f"{url}/no/such")
    answer = WEB.get(f"{url}/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.text.splitlines()
    sample = re.compile(r'tsugiki_\w+(\{(\w+="([^"\\\n]|\\.)*",?)+\})? -?[\d.e+-]+')
    assert all(sample.fullmatch(line) or line.startswith(("# HELP ", "# TYPE ")) for line in lines), lines
    assert [n for n in lines if n.startswith("tsugiki_http_requests_total") and '"/v1/chat/completions",status="200"' in n]
    assert 'tsugiki_http_requests_total{route="other",status="404"} ' in answer.text and "/no/such" not in answer.text
    assert r'tsugiki_adapter_tokens_total{adapter="al\"pha"} 4' in lines and 'tsugiki_adapter_requests_total{adapter=""} 1' in lines
    counts = [int(n.rpartition(" ")[2]) for n in lines if n.startswith("tsugiki_request_seconds_bucket")]
    assert counts == sorted(counts) and counts[-1] >= 1 and f"tsugiki_request_seconds_count {counts[-1]}" in lines


def test_answers_carry_headers_that_keep_browsers_strict(open_server):
    _, url = open_server
    page = WEB.get(url)
    assert page.status_code == 200 and page.headers["x-content-type-options"] == "nosniff"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"(src|href)=\"(?!data:|#)", page.text)
    assert "://" not in page.text.replace("http://www.w3.org/2000/svg", "")


# Load

def test_many_clients_at_once_each_get_their_own(open_server):
    _, url = open_server
    wrong = []

    def work(n: int) -> None:
        name = ("alpha", "beta")[n % 2]
        with httpx.Client() as http:
            for _ in range(5):
                made = http.post(f"{url}/v1/chat/completions", json={"model": name, "messages": ASKED}, timeout=60)
                wrong.extend([made.text] if made.json()["choices"][0]["message"]["content"] != f" {name}" * 5 else [])
    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_no_flag_takes_a_key():
    """What stands in a command line is to be read by everyone on the machine."""
    from tsugiki.cli.main import parser
    flags = [f for a in parser()._subparsers._group_actions[0].choices["serve"]._actions for f in a.option_strings]
    assert {f for f in flags if "key" in f} == {"--key-file", "--admin-key-file"}
