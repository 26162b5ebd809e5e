"""What a request's body may hold, as JSON Schema: the same data checks a body and stands in the OpenAPI document."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tsugiki.data.strict import Broken, Strict, kind_of
from tsugiki.errors import nearest, shown
from tsugiki.serve.refusal import Refusal


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for. Times are in seconds."""

    max_tokens: int = 1024          # new tokens of one choice
    timeout: float = 300.0          # from the request to its last token
    body_bytes: int = 4 << 20
    body_seconds: float = 30.0      # for the body to arrive
    messages: int = 1000
    choices: int = 16               # n, and how many prompts a completion may hold
    stops: int = 16
    stop_length: int = 256
    top_logprobs: int = 20


def parse(data: bytes) -> dict[str, Any]:
    """A body that is one JSON object, strictly. Raises Refusal."""
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise Refusal(400, "body: is not UTF-8") from None
    reader = Strict()
    try:
        value, end = reader.decode(text, 0)
    except Broken as e:
        raise Refusal(400, f"body: {e.args[0]}") from None
    if reader.defects:
        where, what = reader.defects[0]
        raise Refusal(400, f"{'body' if where == 'row' else where[:100]}: {what}")
    if end != len(text):
        raise Refusal(400, "body: holds more than one JSON value")
    if not isinstance(value, dict):
        raise Refusal(400, f"body: is {kind_of(value)}, not an object")
    return value


# Checking: the part of JSON Schema that is used below, with messages that name the field.

WORDS = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false", "array": "a list",
         "object": "an object", "null": "null"}


def _is(value: object, kind: str) -> bool:
    if kind == "integer":
        return type(value) is int or type(value) is float and value.is_integer()
    if kind == "number":
        return type(value) in (int, float)
    return type(value) is {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}[kind]


def _same(a: object, b: object) -> bool:
    return kind_of(a) == kind_of(b) and a == b            # in Python, False == 0


def check(value: object, schema: dict, at: str = "") -> None:
    """Raise Refusal (400) naming the field, unless `value` is what the schema says."""
    if choices := schema.get("anyOf"):
        return _any(value, choices, at)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, k) for k in kinds):
        raise _wrong(at, f"is {kind_of(value)}, not {' or '.join(WORDS[k] for k in kinds if k != 'null')}")
    if "enum" in schema and not any(_same(value, e) for e in schema["enum"]):
        allowed = [e for e in schema["enum"] if e is not None]
        about = f" ({schema['description']})" if "description" in schema else ""
        near = nearest(value, [e for e in allowed if isinstance(e, str)]) if isinstance(value, str) else ""
        raise _wrong(at, f"{shown(value)} is not supported; allowed: {', '.join(map(str, allowed)) or 'null'}{about}{near}")
    if isinstance(value, str):
        _length(len(value), schema, at, "minLength", "maxLength", "characters")
    elif isinstance(value, list):
        _length(len(value), schema, at, "minItems", "maxItems", "items")
        for n, item in enumerate(value):
            check(item, schema.get("items", {}), f"{at}[{n}]")
    elif isinstance(value, dict):
        _object(value, schema, at)
    elif type(value) in (int, float):
        _range(value, schema, at)


def _any(value: object, choices: list[dict], at: str) -> None:
    """One of several: the message is that of the choice which fitted furthest."""
    found = []
    for schema in choices:
        try:
            return check(value, schema, at)
        except Refusal as e:
            found.append(e)
    kinds = {k for c in choices for k in ([c["type"]] if isinstance(c["type"], str) else c["type"])}
    if not any(_is(value, k) for k in kinds):
        raise _wrong(at, f"is {kind_of(value)}, not {' or '.join(sorted(WORDS[k] for k in kinds - {'null'}))}")
    raise max(found, key=lambda e: len(e.param or ""))


def _object(value: dict, schema: dict, at: str) -> None:
    known, dot = schema.get("properties", {}), f"{at}." if at else ""
    for key in value:
        if key in known:
            check(value[key], known[key], f"{dot}{key}")
        elif schema.get("additionalProperties", True) is False:
            raise _wrong(f"{dot}{shown(key)[1:-1]}", f"unknown field{nearest(key, known)}", code="unknown_parameter")
    for key in schema.get("required", ()):
        if key not in value:
            raise _wrong(f"{dot}{key}", "is missing", code="missing_required_parameter")


def _range(value: float, schema: dict, at: str) -> None:
    low, high, above = schema.get("minimum"), schema.get("maximum"), schema.get("exclusiveMinimum")
    if low is not None and value < low or high is not None and value > high or above is not None and value <= above:
        start = f"above {above}" if above is not None else f"at least {low}" if low is not None else ""
        raise _wrong(at, f"{shown(value)} is out of range, allowed: "
                         + " and ".join(filter(None, (start, f"at most {high}" if high is not None else ""))))


def _length(length: int, schema: dict, at: str, low: str, high: str, what: str) -> None:
    if length < schema.get(low, 0):
        raise _wrong(at, "is empty" if length == 0 else f"has {length} {what}, at least {schema[low]} are needed")
    if length > schema.get(high, length):
        raise _wrong(at, f"has {length} {what}, at most {schema[high]} are allowed")


def _wrong(at: str, what: str, code: str | None = None) -> Refusal:
    return Refusal(400, f"{at or 'body'}: {what}", param=at or None, code=code)


# The bodies.

def _maybe(kind: str, **more: Any) -> dict:
    """A field that null leaves at its default."""
    return {"type": [kind, "null"]} | more


def _only(*allowed: object, why: str) -> dict:
    """A field of OpenAI's that only has its neutral values here."""
    return {"enum": [*allowed, None], "description": why}


IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
NOTHING = "not supported"


def _shared(limits: Limits) -> dict:
    penalty = _only(0, why="repetition_penalty is there instead")
    return {
        "model": {"type": "string", "minLength": 1, "maxLength": 300, "description": "an adapter's name, or the base's"},
        "max_tokens": _maybe("integer", minimum=1, maximum=limits.max_tokens),
        "temperature": _maybe("number", minimum=0, maximum=2, description="0 takes the likeliest token; default 1"),
        "top_p": _maybe("number", minimum=1e-6, maximum=1),
        "top_k": _maybe("integer", minimum=0, maximum=1 << 20, description="0: all tokens"),
        "repetition_penalty": _maybe("number", minimum=1e-6, maximum=10),
        "seed": _maybe("integer", minimum=-(1 << 63), maximum=(1 << 63) - 1),
        "stop": {"anyOf": [_maybe("string", minLength=1, maxLength=limits.stop_length),
                           {"type": "array", "maxItems": limits.stops,
                            "items": {"type": "string", "minLength": 1, "maxLength": limits.stop_length}}]},
        "n": _maybe("integer", minimum=1, maximum=limits.choices),
        "stream": _maybe("boolean"),
        "stream_options": _maybe("object", additionalProperties=False, properties={
            "include_usage": _maybe("boolean"), "include_obfuscation": _only(False, why=NOTHING)}),
        "presence_penalty": penalty, "frequency_penalty": penalty,
        "logit_bias": _maybe("object", additionalProperties=False, properties={}, description=NOTHING),
    } | {name: {"description": "taken and not used"} for name in IGNORED}


def _message() -> dict:
    part = {"type": "object", "required": ["type", "text"], "additionalProperties": False, "properties": {
        "type": {"type": "string", "enum": ["text"], "description": "nothing is fetched or decoded"}, "text": {"type": "string"}}}
    empty = _maybe("array", maxItems=0, description="tool calls are not supported")
    return {"type": "object", "required": ["role", "content"], "additionalProperties": False, "properties": {
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "maxItems": 1000, "items": part}]},
        "name": {"description": "taken and not used"},
        # what an answer of ours holds, when a client sends it back
        "refusal": _only(why=NOTHING), "audio": _only(why=NOTHING), "function_call": _only(why=NOTHING),
        "tool_calls": empty, "annotations": empty}}


def chat(limits: Limits) -> dict:
    """Body of /v1/chat/completions."""
    none = _maybe("array", maxItems=0, description="tools are not supported")
    return {"type": "object", "required": ["model", "messages"], "additionalProperties": False, "properties": _shared(limits) | {
        "messages": {"type": "array", "minItems": 1, "maxItems": limits.messages, "items": _message()},
        "max_completion_tokens": _maybe("integer", minimum=1, maximum=limits.max_tokens),
        "logprobs": _maybe("boolean"),
        "top_logprobs": _maybe("integer", minimum=0, maximum=limits.top_logprobs),
        "kind": {"enum": ["auto", "chat", "plain", None],
                 "description": "chat: through the chat template; plain: the one user message as it is; auto: as trained"},
        "tools": none, "functions": none, "tool_choice": _only("none", "auto", why="tools are not supported"),
        "parallel_tool_calls": {"description": "taken and not used"},
        "response_format": _maybe("object", required=["type"], additionalProperties=False,
                                  properties={"type": {"enum": ["text"], "description": "answers are text"}}),
        "modalities": {"anyOf": [{"type": ["array", "null"], "items": {"enum": ["text"], "description": "answers are text"}}]},
    }}


def completion(limits: Limits) -> dict:
    """Body of /v1/completions."""
    ids = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}}
    texts = {"type": "array", "minItems": 1, "maxItems": limits.choices, "items": {"type": "string"}}
    return {"type": "object", "required": ["model", "prompt"], "additionalProperties": False, "properties": _shared(limits) | {
        "prompt": {"anyOf": [{"type": "string"}, texts, ids,
                             {"type": "array", "minItems": 1, "maxItems": limits.choices, "items": ids}]},
        "logprobs": _maybe("integer", minimum=0, maximum=limits.top_logprobs),
        "echo": _only(False, why="the prompt is not given back"),
        "best_of": _only(1, why="use n"),
        "suffix": _only(why="nothing is inserted before a text"),
    }}


def admin(named: bool) -> dict:
    """Body that loads (`named`: with the name in it) or replaces an adapter."""
    fields = {"path": {"type": "string", "minLength": 1, "maxLength": 4096, "description": "a folder below an --admin-root"}}
    if named:
        fields["name"] = {"type": "string", "minLength": 1, "maxLength": 100}
    return {"type": "object", "required": sorted(fields), "additionalProperties": False, "properties": fields}
