"""The OpenAPI document, made from the schemas that check the bodies."""
from __future__ import annotations

from functools import lru_cache

from tsugiki.serve import schema
from tsugiki.serve.answer import VERSION

TEXT = {"type": "string"}
ERROR = {"type": "object", "required": ["error"], "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"],
    "properties": {"message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]}}}}}
ADAPTER = {"type": "object", "required": ["name", "method", "resident"], "properties": {
    "name": TEXT, "method": TEXT, "parameters": {"type": "integer"}, "bytes": {"type": "integer"}, "version": TEXT,
    "resident": {"type": "boolean"}, "kind": {"enum": ["chat", "plain"]}, "score": {"type": ["number", "null"]}}}
MODEL = {"type": "object", "required": ["id", "object", "created", "owned_by"], "properties": {
    "id": TEXT, "object": {"enum": ["model"]}, "created": {"type": "integer"}, "owned_by": TEXT, "tsugiki": {"type": "object"}}}
ANSWER = {"type": "object", "required": ["id", "object", "created", "model", "choices", "usage"], "properties": {
    "id": TEXT, "object": TEXT, "created": {"type": "integer"}, "model": TEXT,
    "choices": {"type": "array", "items": {"type": "object", "required": ["index", "finish_reason"]}},
    "usage": {"type": "object", "required": ["prompt_tokens", "completion_tokens", "total_tokens"]}}}
REASONS = {400: "the request is wrong; the message names the field", 401: "no key, or not a known one", 403: "not allowed",
           404: "no such model or route", 405: "another method", 408: "the body took too long", 409: "the name is taken",
           413: "the body is too large", 415: "the body is not JSON", 429: "the queue is full; try again",
           500: "the model or the server failed", 503: "the server is stopping", 504: "the answer took too long"}


def _json(schema: dict) -> dict:
    return {"application/json": {"schema": schema}}


def _operation(about: str, answers: dict[int, tuple[str, dict]], body: dict | None = None, path: str | None = None,
               errors: tuple[int, ...] = (401, 403)) -> dict:
    """answers: status -> (description, content)."""
    found: dict = {"summary": about, "responses": {
        str(status): {"description": text, "content": content} for status, (text, content) in answers.items()}}
    if body is not None:
        found["requestBody"] = {"required": True, "content": _json(body)}
        errors = (*errors, 400, 408, 413, 415)
    if path is not None:
        found["parameters"] = [{"name": path, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
        errors = (*errors, 404)
    found["responses"] |= {str(s): {"description": REASONS[s], "content": _json(ERROR)} for s in sorted({*errors})}
    return found


@lru_cache(1)
def document(limits: schema.Limits) -> dict:
    """OpenAPI 3.1. Its request bodies are `schema`'s, with this server's limits."""
    streamed = _json(ANSWER) | {"text/event-stream": {}}        # events, which JSON Schema does not describe
    busy = (401, 403, 404, 429, 500, 503, 504)
    adapters = {"type": "object", "properties": {"adapters": {"type": "array", "items": ADAPTER}}}
    models = {"type": "object", "required": ["object", "data"], "properties": {"data": {"type": "array", "items": MODEL}}}
    admin = {"security": [{"admin": []}]}
    paths = {
        "/": {"get": _operation("the page", {200: ("HTML", {"text/html": {"schema": TEXT}})}, errors=(403,))},
        "/health": {"get": _operation("whether it answers; needs no key", {200: ("it does", _json({"type": "object"}))},
                                      errors=(403,)) | {"security": []}},
        "/metrics": {"get": _operation("counts, for Prometheus", {200: ("text", {"text/plain": {"schema": TEXT}})})},
        "/openapi.json": {"get": _operation("this document", {200: ("OpenAPI 3.1", _json({"type": "object"}))})},
        "/v1/models": {"get": _operation("the base and its adapters", {200: ("models", _json(models))})},
        "/v1/models/{model}": {"get": _operation("one of them", {200: ("a model", _json(MODEL))}, path="model")},
        "/v1/chat/completions": {"post": _operation("answer messages", {200: ("an answer, or chunks of one", streamed)},
                                                    schema.chat(limits), errors=busy)},
        "/v1/completions": {"post": _operation("continue texts", {200: ("an answer, or chunks of one", streamed)},
                                               schema.completion(limits), errors=busy)},
        "/admin/adapters": {
            "get": _operation("every adapter", {200: ("adapters", _json(adapters))}) | admin,
            "post": _operation("load an adapter", {201: ("the adapter", _json(ADAPTER))}, schema.admin(True),
                               errors=(401, 403, 409)) | admin},
        "/admin/adapters/{name}": {
            "put": _operation("put other content under its name", {200: ("the adapter", _json(ADAPTER))}, schema.admin(False),
                              "name") | admin,
            "delete": _operation("take it off; what runs on it ends", {200: ("it is off", _json({"type": "object"}))},
                                 path="name") | admin}}
    schemes = {"user": {"type": "http", "scheme": "bearer"}, "admin": {"type": "http", "scheme": "bearer"}}
    return {"openapi": "3.1.0", "info": {"title": "Tsugiki", "version": VERSION}, "paths": paths,
            "security": [{"user": []}], "components": {"securitySchemes": schemes}}
