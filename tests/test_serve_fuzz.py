"""Whatever is sent, the server answers with no 5xx and goes on: bodies made from its own OpenAPI document, and raw bytes.

200 requests in a usual run, 2,000 with TSUGIKI_TESTS=all.
"""
from __future__ import annotations

import json
import os
import random
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from serve_kit import ADMIN, KEY, Script, service, serving, until

from tsugiki.serve.auth import Keys

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

ALL = os.environ.get("TSUGIKI_TESTS") == "all"
REQUESTS = 1000 if ALL else 100     # of each kind
CHECKS = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance,
          checks.negative_data_rejection]
USER = {"Authorization": f"Bearer {KEY}"}
BEARER = {"user": KEY, "admin": ADMIN}


@pytest.fixture(scope="module")
def server():
    engine = Script(words=2)
    with serving(service(engine, keys=Keys((KEY.encode(),), (ADMIN.encode(),)))) as url:
        yield engine, url
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        made = httpx.post(f"{url}/v1/completions", json={"model": "alpha", "prompt": "a"}, headers=USER)
        assert made.json()["choices"][0]["text"] == " alpha alpha", "after all that it answers as before"
        until(lambda: not engine.running)


def asking(url: str, operation, mode: GenerationMode, made: list[int]):
    """What is done with each case: sent, with the key of its route, and its answer held against the document."""
    key = BEARER["admin" if operation.path.startswith("/admin") else "user"]

    def ask(case):
        if mode is GenerationMode.POSITIVE and operation.path.startswith("/v1/") and isinstance(case.body, dict):
            case.body["model"] = "alpha"          # no text made by chance names a model that is there
        response = case.call(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30)
        made.append(response.status_code)
        case.validate_response(response, checks=CHECKS)
    return ask


def test_requests_made_from_our_own_document_are_answered_as_it_says(server):
    _, url = server
    document = httpx.get(f"{url}/openapi.json", headers=USER).json()
    for part in (document, *(o for operations in document["paths"].values() for o in operations.values())):
        part.pop("security", None)                                        # the keys are ours to send
    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    kinds = [(o, mode) for o in operations for mode in GenerationMode if mode is GenerationMode.POSITIVE or o.body]
    weights = [8 if o.body else 1 for o, _ in kinds]                      # a route without a body has little to vary
    made: list[int] = []
    for (operation, mode), weight in zip(kinds, weights, strict=True):
        examples = settings(max_examples=-(-REQUESTS * weight // sum(weights)), deadline=None, database=None, derandomize=not ALL,
                            suppress_health_check=list(HealthCheck))
        examples(given(case=operation.as_strategy(generation_mode=mode))(asking(url, operation, mode, made)))()
    print(f"{len(made)} requests from the document: {({s: made.count(s) for s in sorted(set(made))})}")
    assert len(made) >= REQUESTS * 0.9 and {200, 400} <= set(made), "some are good and some are not"


def mutated(rng: random.Random) -> bytes:
    """A request with something wrong in its line, its headers or its body; or bytes of no kind."""
    body = json.dumps({"model": "alpha", "prompt": "a", "n": 2}).encode()
    if rng.random() < 0.3:
        body = bytes(rng.randrange(256) for _ in range(rng.randrange(60)))
    paths = [b"/v1/completions", b"/v1/completions", b"/v1/completions", b"/health",
             b"/v1/chat/completions", b"/admin/adapters", b"/v1/models", b"/%00", b"/..%2f..%2fetc/passwd",
             b"/v1/models/%ff%fe", b"//v1//models", b"/?" + b"a" * 300, b"*", b"http://other/v1/models", b"/\xc3\xa4", b""]
    methods = [b"GET", b"POST", b"POST", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"HEAD", b"TRACE", b"BREW", b"p\x00st"]
    versions = [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b""]
    lines = [b" ".join([rng.choice(methods), rng.choice(paths), rng.choice(versions)]), b"Host: localhost",
             b"Authorization: Bearer " + rng.choice([KEY, KEY, KEY, ADMIN, "x", "\xe4" * 40]).encode(),
             b"Content-Type: application/json", b"Content-Length: %d" % (len(body) + rng.choice([0, 0, 0, -1, 5, 10 ** 12]))]
    extra = [b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Upgrade: websocket", b"Connection: upgrade", b": empty",
             b"X: " + b"y" * 70_000, b"no colon", b"Content-Length: -1", b"Content-Length: 5, 6", b"Range: bytes=0-5",
             b"\x00: \x01", b"Host: other"]
    lines += rng.sample(extra, rng.choice([0, 0, 1, 2]))
    data = b"\r\n".join(lines) + b"\r\n\r\n" + body
    for _ in range(rng.choice([0, 0, 0, 1, 5])):
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + rng.choice([0, 1, 1, 30]):]
    return data


def test_raw_bytes_are_answered_below_500_or_the_connection_is_closed(server):
    _, url = server
    rng, at, statuses = random.Random(None if ALL else 0), (httpx.URL(url).host, httpx.URL(url).port), []
    for _ in range(REQUESTS):
        with socket.create_connection(at, timeout=30) as raw:
            try:
                raw.sendall(mutated(rng))
                raw.shutdown(socket.SHUT_WR)
                answer = b""
                while part := raw.recv(65536):
                    answer += part
            except ConnectionError:               # closed while we were still sending
                answer = b""
        assert not answer or answer.startswith(b"HTTP/1.1 "), answer[:100]
        statuses.append(int(answer[9:12]) if answer else 0)
        assert statuses[-1] < 500, answer
    print(f"{len(statuses)} raw requests: {({s: statuses.count(s) for s in sorted(set(statuses))})}")
    assert {200, 400, 401} <= set(statuses), "some got as far as they should"
