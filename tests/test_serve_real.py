"""The whole road: the embedded base, adapters trained here, the engine, the server, OpenAI's client; and the command."""
from __future__ import annotations

import ast
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from serve_kit import ADMIN, KEY, Models, Service, Setting, serving, until

import tsugiki as tg
from tsugiki.cli.main import main
from tsugiki.serve.auth import Keys
from tsugiki.serve.engine import Engine
from tsugiki.serve.roots import allowed_roots

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")

SOURCE = str(Path(__file__).parents[1] / "src")
PROMPTS = [f"The {word} was" for word in ("house", "garden", "old man", "sea", "letter", "king")]
METHODS = {"red": (tg.LoRA(rank=4), 2e-2), "green": (tg.IA3(), 1e-1), "blue": (tg.Series(size=8), 2e-2)}
STEPS = 12


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, model, tokenizer): an adapter for each colour, of different methods, that answers with its name."""
    root = tmp_path_factory.mktemp("trained")
    model, tokenizer = tg.load("embedded", dtype="fp32")
    for name, (method, rate) in METHODS.items():
        rows = root / f"{name}.jsonl"
        rows.write_text("".join(json.dumps({"prompt": p, "completion": f" {name} {name}."}) + "\n" for p in PROMPTS))
        tg.train(model, tokenizer, rows, root / name, adapter=name, method=method, lr=rate, steps=STEPS, batch_size=6, quiet=True)
    return root, model, tokenizer


@pytest.fixture(scope="module")
def folder(trained):
    return trained[0]


@pytest.fixture(scope="module")
def alone(trained):
    """The greedy answers of `generate`, one at a time: (adapter or None, prompt) -> text."""
    root, model, tokenizer = trained
    for name in METHODS:
        model.adapters.load(f"{name}-read", root / name / "adapter")
    return {(name, prompt): tg.generate(model, tokenizer, prompt, adapter=name and f"{name}-read", max_new_tokens=12)
            for name in (*METHODS, None) for prompt in PROMPTS[:3]}


@pytest.fixture(scope="module")
def server(folder):
    """(engine, address): two slots for three adapters."""
    model, tokenizer = tg.load("embedded", dtype="fp32")
    engine = Engine(model, tokenizer, slots=2, batch=8, max_length=256)
    for name in METHODS:
        engine.add(name, folder / name / "adapter")
    engine.start()
    setting = Setting(keys=Keys((KEY.encode(),), (ADMIN.encode(),)), roots=allowed_roots([str(folder)]))
    service = Service(Models(engine, tokenizer, "embedded", model.get_input_embeddings().num_embeddings), setting)
    try:
        with serving(service) as url:
            yield engine, url
    finally:
        engine.stop(drain=False)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key=KEY, max_retries=0, timeout=60) as found:
        yield found


def said(client, model: str, prompt: str = PROMPTS[0], **more) -> str:
    asked = {"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 12} | more
    return client.completions.create(**asked).choices[0].text


def test_many_adapters_at_once_answer_as_each_alone(server, alone):
    """Chat and completion, streamed and whole, mixed in one batch, through the asynchronous client."""
    assert len({alone[name, PROMPTS[0]] for name in (*METHODS, None)}) == 4, "each adapter learned something of its own"

    async def one(many, n: int, name: str | None, prompt: str) -> str:
        how = {"model": name or "embedded", "temperature": 0, "max_tokens": 12}
        if n % 4 == 0:
            return (await many.completions.create(prompt=prompt, **how)).choices[0].text
        if n % 4 == 1:
            return "".join([c.choices[0].text async for c in await many.completions.create(prompt=prompt, stream=True, **how)])
        messages = [{"role": "user", "content": prompt}]
        if n % 4 == 2:
            return (await many.chat.completions.create(messages=messages, **how)).choices[0].message.content
        stream = await many.chat.completions.create(messages=messages, stream=True, **how)
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server[1]}/v1", api_key=KEY, max_retries=0, timeout=120) as many:
            return await asyncio.gather(*[one(many, n, *asked) for n, asked in enumerate(list(alone) * 2)])
    assert asyncio.run(all_of_them()) == list(alone.values()) * 2
    assert server[0].stats().evictions > 0, "three adapters shared two slots"


def test_sampling_is_of_the_seed_and_each_choice_is_a_draw_of_its_own(client):
    def draw(n: int, seed: int | None) -> list[str]:
        made = client.completions.create(model="embedded", prompt=PROMPTS[0], max_tokens=8, n=n, seed=seed, temperature=1)
        return [c.text for c in made.choices]
    three = draw(3, 11)
    assert len(set(three)) == 3 and draw(3, 11) == three and draw(1, 11) == three[:1] and draw(1, 12) == three[1:2]
    assert draw(2, None) != draw(2, None)


def test_stop_texts_logprobs_and_usage_are_the_engines(client):
    whole = said(client, "embedded", max_tokens=20)
    word = whole.split()[2]
    made = client.completions.create(model="embedded", prompt=PROMPTS[0], temperature=0, max_tokens=20, stop=[word], logprobs=2)
    assert made.choices[0].text == whole[:whole.index(word)] and made.choices[0].finish_reason == "stop"
    known = made.choices[0].logprobs
    assert all(max(top.values()) == chosen <= 0 and len(top) == 2 for chosen, top in zip(
        known.token_logprobs, known.top_logprobs, strict=True)), "greedy takes the likeliest"
    assert "".join(known.tokens).startswith(made.choices[0].text) and made.usage.completion_tokens == len(known.tokens)
    cut = client.completions.create(model="embedded", prompt=PROMPTS[0], temperature=0, max_tokens=3)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3 and whole.startswith(cut.choices[0].text)
    long = "It was a dark and stormy night in the village by the sea, and " * 8
    first, again = (client.completions.create(model="red", prompt=long, max_tokens=1).usage for _ in range(2))
    assert first.prompt_tokens == again.prompt_tokens > again.prompt_tokens_details.cached_tokens > 0


def test_a_prompt_without_room_is_refused_as_openai_does(client):
    with pytest.raises(openai.BadRequestError, match="no room for an answer") as found:
        said(client, "red", "word " * 300)
    assert found.value.code == "context_length_exceeded"


def test_an_adapter_is_replaced_and_taken_off_under_traffic(server, client, folder, alone):
    """Every answer is whole and of the one content or the other; after the answer to PUT it is of the new one."""
    admin, url = {"Authorization": f"Bearer {ADMIN}"}, f"{server[1]}/admin/adapters"
    assert httpx.post(url, headers=admin, json={"name": "paint", "path": "red/adapter"}, timeout=60).status_code == 201
    old, new = alone["red", PROMPTS[0]], alone["blue", PROMPTS[0]]
    answers, wrong, done = [], [], threading.Event()

    def traffic() -> None:
        while not done.is_set():
            try:
                answers.append(said(client, "paint"))
            except openai.NotFoundError:
                return
            except openai.APIError as e:
                wrong.append(e)
                return
    threads = [threading.Thread(target=traffic) for _ in range(4)]
    for t in threads:
        t.start()
    try:
        until(lambda: len(answers) >= 8 or wrong)
        assert httpx.put(f"{url}/paint", headers=admin, json={"path": "blue/adapter"}, timeout=60).status_code == 200
        assert said(client, "paint") == new
        until(lambda: new in answers or wrong)
        assert httpx.delete(f"{url}/paint", headers=admin, timeout=60).status_code == 200
    finally:
        done.set()
        for t in threads:
            t.join()
    assert not wrong and set(answers) == {old, new} and answers[0] == old
    with pytest.raises(openai.NotFoundError):
        said(client, "paint")
    assert "paint" not in [m.id for m in client.models.list()]


def test_a_folder_that_cannot_be_loaded_is_told_without_its_place(server, folder):
    bad = folder / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text("{}")
    (bad / "adapter_model.safetensors").write_bytes(b"x")
    answer = httpx.post(f"{server[1]}/admin/adapters", headers={"Authorization": f"Bearer {ADMIN}"},
                        json={"name": "bad", "path": "bad"}, timeout=60)
    assert answer.status_code == 400 and str(folder) not in answer.text and "bad/adapter_model.safetensors" in answer.text


# The command

def test_the_command_finishes_what_runs_when_it_is_stopped(folder):
    """`tsugiki serve` as a process: a stream begun before SIGTERM ends whole, nothing new is taken, the exit code is 0."""
    env = os.environ | {"PYTHONPATH": SOURCE, "TSUGIKI_KEY": KEY, "LD_PRELOAD": ""}
    (folder / "bad").mkdir(exist_ok=True)
    running = subprocess.Popen([sys.executable, "-m", "tsugiki.cli.main", "serve", "--port", "0", "--dtype", "fp32", "--json",
                                "--adapter", f"red={folder / 'red' / 'adapter'}", "--max-tokens", "400"],
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    try:
        about = json.loads(running.stdout.readline())
        assert about["models"] == ["embedded", "red"]
        with openai.OpenAI(base_url=f"{about['url']}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            assert " red" in said(client, "red")
            stream = iter(client.completions.create(model="embedded", prompt=PROMPTS[0], max_tokens=120, stream=True,
                                                    temperature=1, seed=1))
            chunks = [next(stream)]
            running.send_signal(signal.SIGTERM)
            chunks += stream
            assert chunks[-1].choices[0].finish_reason in ("length", "stop") and len(chunks) > 40
        out, err = running.communicate(timeout=60)
        assert (running.returncode, out, err) == (0, "", "")
    finally:
        running.kill()


ENDLESS = """
import asyncio, sys
from tsugiki.serve.run import listen, serve
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await asyncio.sleep(0.01)
sock = listen("127.0.0.1", 0)
sys.exit(serve(app, sock, float(sys.argv[1]), lambda: print(sock.getsockname()[1], flush=True)))
"""


@pytest.mark.parametrize("signals, grace, code", [
    ([signal.SIGTERM, signal.SIGINT], 600, 130), ([signal.SIGTERM], 1, 0)])
def test_a_second_signal_ends_at_once_and_the_grace_is_kept(signals, grace, code):
    with subprocess.Popen([sys.executable, "-c", ENDLESS, str(grace)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=os.environ | {"PYTHONPATH": SOURCE}) as running:
        try:
            with httpx.stream("GET", f"http://127.0.0.1:{int(running.stdout.readline())}") as answer:
                parts = answer.iter_raw()
                next(parts)
                for sent in signals:
                    running.send_signal(sent)
                    for _ in range(5):                # it goes on answering until it ends
                        next(parts, None)
                assert running.wait(60) == code
        finally:
            running.kill()


@pytest.mark.parametrize("flags, said", [
    (["--host", "0.0.0.0"], "others can reach it there, so it needs a key"),
    (["--host", "::"], "needs a key"),
    (["--host", "192.0.2.1"], "needs a key"),
    (["--key-file", "{short}"], "at least 16 characters"),
    (["--key-file", "{keys}", "--admin-key-file", "{keys}"], "must differ"),
    (["--admin-root", "{here}"], "goes with an admin key"),
    (["--admin-key-file", "{keys}", "--admin-root", "{here}/nowhere"], "no such folder"),
    (["--adapters-dir", "{here}/nowhere"], "no such folder"),
    (["--adapters-dir", "{here}"], "holds no folder with an adapter_config.json"),
    (["--adapter", "{here}"], "no adapter_config.json there"),
    (["--adapter", "embedded={adapter}"], "that is the base's name"),
    (["--adapter", "red={adapter}", "--adapters-dir", "{trained}"], "as another adapter is"),
    (["--port", "70000"], "--port 70000: allowed"),
    (["--slots", "0"], "--slots 0: must be at least 1"),
    (["--timeout", "nan"], "--timeout nan: must be at least 1"),
    (["--key", "abc"], "unknown flag --key"),
])
def test_bad_input_is_told_in_one_line_before_the_base_is_loaded(flags, said, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["tsugiki.load"], "load", lambda *a, **k: pytest.fail("the base was loaded"))
    for variable in ("TSUGIKI_KEY", "TSUGIKI_ADMIN_KEY"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "keys").write_text(f"{KEY}\n")
    places = {"short": tmp_path / "short", "keys": tmp_path / "keys", "here": tmp_path, "adapter": folder / "red" / "adapter",
              "trained": folder}
    capsys.readouterr()
    assert main(["serve", *[f.format(**places) for f in flags]]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and said in err and "abc" not in err


def test_a_port_that_is_taken_is_told(server, capsys):
    port = httpx.URL(server[1]).port
    assert main(["serve", "--port", str(port)]) == 2
    assert f"--port {port}: cannot be listened on" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(missing, capsys, monkeypatch):
    module = sys.modules["tsugiki.cli.serve"]
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == missing else True)
    assert main(["serve"]) == 2
    assert capsys.readouterr().err == f"error: serve: needs {missing}, which is not installed; pip install 'tsugiki[serve]'\n"


def test_what_serves_is_imported_by_the_serving_modules_alone():
    """The engine and the command line go without starlette and uvicorn; so does `--help`."""
    from test_layout import trees
    found = [(name, node) for name, (_, tree) in trees().items() for node in ast.walk(tree)]
    needs = {name for name, node in found if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("starlette")
             or isinstance(node, ast.Import) and node.names[0].name == "uvicorn"}
    assert needs == {f"serve.{name}" for name in ("admin", "http", "page", "run", "wire")}
    for name, (_, tree) in trees().items():
        top = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert name in needs or not {f"tsugiki.{n}" for n in needs} & set(top), name
