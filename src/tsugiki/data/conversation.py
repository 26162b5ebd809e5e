"""Rows to conversations: five row shapes told by their fields, and templates over the columns of any other table."""
from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from tsugiki.data.rows import Bad, Problem, Row, kind_of, raise_problems, read
from tsugiki.errors import UserError, nearest

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "tool": "tool", "observation": "tool"}
CALLS = ("function_call", "tool_call", "function")          # roles of turns that call a tool
UNRENDERED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")    # keys of a message
SIDE = {"tools": "tool definitions", "functions": "tool definitions", "images": "pictures", "videos": "videos",
        "audios": "sound"}


@dataclass(frozen=True)
class Message:
    """One turn. `role`: system, user, assistant or tool. `trained` is False for an answer of weight 0 in the data."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Conversation:
    """What one row says, and its "file:line".

    kind "chat": rendered by a chat template; "plain": (user, assistant) joined as given; "text": one assistant message.
    """

    kind: str
    messages: tuple[Message, ...]
    where: str

    @property
    def reference(self) -> str:
        """The expected answer: text of the last assistant message."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")

    @property
    def prompt_text(self) -> str:
        """What comes before the last answer, readable, for reports."""
        before = self.messages[:-1] if self.messages and self.messages[-1].role == "assistant" else self.messages
        if self.kind != "chat" or len(before) == 1:
            return "".join(m.content for m in before)
        return "\n".join(f"{m.role}: {m.content}" for m in before)


@dataclass(frozen=True)
class Columns:
    """Prompt and completion as templates over a table's columns: Columns("Review: {text}\\nSentiment:", " {label}").

    `labels` maps the values of the completion's columns to words: {"0": "negative", "1": "positive"}. `{{` and `}}` are
    literal braces. Raises UserError for a broken template.
    """

    prompt: str
    completion: str
    labels: dict[str, str] | None = None

    def __post_init__(self):
        for name in ("prompt", "completion"):
            _template(name, getattr(self, name))
        if not self.completion:
            raise UserError("columns: completion: is empty; nothing would be trained")
        if self.labels is not None:
            labels = {str(k): v for k, v in self.labels.items()}
            if not labels or not all(isinstance(v, str) and v for v in labels.values()):
                raise UserError("columns: labels: must map values to words, such as {\"0\": \"negative\"}")
            object.__setattr__(self, "labels", labels)

    @property
    def names(self) -> list[str]:
        """The columns the templates use."""
        return [n for t in (self.prompt, self.completion) for _, n in _template("", t) if n is not None]

    def convert(self, fields: dict) -> tuple[str, list[Message]]:
        prompt = "".join(text + ("" if n is None else _cell(fields, n)) for text, n in _template("prompt", self.prompt))
        parts = []
        for text, n in _template("completion", self.completion):
            value = "" if n is None else _cell(fields, n)
            if n is not None and self.labels is not None:
                if value not in self.labels:
                    raise Bad(n, f"value {value[:40]!r} is not among the labels: {', '.join(self.labels)[:80]}")
                value = self.labels[value]
            elif n is not None and not value.strip():
                raise Bad(n, "is empty: no answer to train on")
            parts.append(text + value)
        return "plain", [Message("user", prompt), Message("assistant", "".join(parts))]


def _template(name: str, text: str) -> list[tuple[str, str | None]]:
    """(literal, column or None) pieces of a template."""
    if not isinstance(text, str):
        raise UserError(f"columns: {name}: is {kind_of(text)}, not a template text")
    try:
        pieces = [(a, b, c, d) for a, b, c, d in string.Formatter().parse(text)]
    except ValueError as e:
        raise UserError(f"columns: {name}: broken template ({e}); {{column}}, and {{{{ or }}}} for a brace") from None
    if any(c or d or b == "" for _, b, c, d in pieces):
        raise UserError(f"columns: {name}: only plain {{column}} is allowed, without a format, and never empty")
    return [(a, b) for a, b, _, _ in pieces]


def _cell(fields: dict, name: str) -> str:
    """A table's value as text."""
    value = _get(fields, name)
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return _text(value, name)


def _get(fields: dict, name: str) -> object:
    if name not in fields:
        raise Bad(name, f"missing; the row has {_names(fields)}{nearest(name, fields)}")
    return fields[name]


def _names(fields: dict) -> str:
    return ", ".join(map(str, fields))[:80] or "no fields"


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise Bad(name, f"is {kind_of(value)}, not text")
    return value


def _answer(value: object, name: str) -> str:
    if not _text(value, name).strip():
        raise Bad(name, "is empty: no answer to train on")
    return value


def _optional(fields: dict, name: str) -> str:
    return "" if fields.get(name) is None else _text(fields[name], name)


def _alpaca(fields: dict) -> tuple[str, list[Message]]:
    messages = [Message("system", s)] if (s := _optional(fields, "system")) else []
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise Bad("history", f"is {kind_of(history)}, not a list of [question, answer] pairs")
    for n, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Bad(f"history[{n}]", "is not a [question, answer] pair")
        messages.append(Message("user", _text(pair[0], f"history[{n}][0]")))
        messages.append(Message("assistant", _answer(pair[1], f"history[{n}][1]")))
    asked = [t for t in (_text(_get(fields, "instruction"), "instruction"), _optional(fields, "input")) if t.strip()]
    if not asked:
        raise Bad("instruction", "is empty, and so is input")
    answer = _answer(_get(fields, "output"), "output")
    return "chat", [*messages, Message("user", "\n".join(asked)), Message("assistant", answer)]


def _chat(key: str) -> Callable[[dict], tuple[str, list[Message]]]:
    def convert(fields: dict) -> tuple[str, list[Message]]:
        for name, what in SIDE.items():
            if fields.get(name) not in (None, "", "[]", []):
                raise Bad(name, f"{what} cannot be rendered; drop the column to train without them")
        turns = _get(fields, key)
        if not isinstance(turns, list):
            raise Bad(key, f"is {kind_of(turns)}, not a list of messages")
        if not turns:
            raise Bad(key, "is empty")
        messages = [_message(turn, f"{key}[{n}]") for n, turn in enumerate(turns)]
        system = _optional(fields, "system")
        if system and messages[0].role == "system":
            raise Bad("system", "given twice: as a field and as the first message")
        _order(messages, key)
        return "chat", [Message("system", system), *messages] if system else messages
    return convert


def _message(turn: object, at: str) -> Message:
    if not isinstance(turn, dict):
        raise Bad(at, f"is {kind_of(turn)}, not an object with role and content")
    said, content = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    role = turn.get(said)
    if said not in turn:
        raise Bad(f"{at}.{said}", f"missing; the message has {_names(turn)}{nearest(said, turn)}")
    if not isinstance(role, str):
        raise Bad(f"{at}.{said}", f"is {kind_of(role)}, not a role")
    called = next((k for k in UNRENDERED if turn.get(k)), None)
    if role in CALLS or called:
        reason = f"{called or role} cannot be rendered; write it as assistant text or drop the row"
        raise Bad(f"{at}.{called or said}", reason)
    if role not in ROLES:
        raise Bad(f"{at}.{said}", f"unknown role {role[:40]!r}; known: {', '.join(ROLES)}{nearest(role, ROLES)}")
    if content not in turn:
        raise Bad(f"{at}.{content}", f"missing; the message has {_names(turn)}{nearest(content, turn)}")
    text, trained = _content(turn[content], f"{at}.{content}"), _weight(turn, at)
    if ROLES[role] == "assistant" and trained:
        _answer(text, f"{at}.{content}")
    return Message(ROLES[role], text, trained)


def _content(value: object, at: str) -> str:
    """Text, or a list of text parts joined."""
    if not isinstance(value, list):
        return _text(value, at)
    texts = []
    for n, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = f"is {kind_of(part)}, not a typed part" if kind is None else f"type {str(kind)[:40]!r} is not text"
            raise Bad(f"{at}[{n}]", what)
        texts.append(_text(part.get("text", part.get("value")), f"{at}[{n}].text"))
    return "".join(texts)


def _weight(turn: dict, at: str) -> bool:
    """OpenAI's weight (or loss_weight) of a message: 0 leaves the answer out, 1 trains it."""
    for key in ("weight", "loss_weight"):
        if turn.get(key) is not None and turn[key] not in (0, 1):
            raise Bad(f"{at}.{key}", f"is {str(turn[key])[:20]!r}; only 0 and 1 are known")
        if turn.get(key) == 0:
            return False
    return True


def _order(messages: list[Message], key: str) -> None:
    """System first, then user and assistant in turn (tool results between two answers), an answer last."""
    allowed = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    before = ""
    for n, m in enumerate(messages):
        if m.role == "system" and n == 0:
            continue
        if m.role not in allowed[before]:
            after = f"after {before}" if before else "at the start"
            raise Bad(f"{key}[{n}]", f"{m.role} {after}, where {' or '.join(allowed[before])} is expected")
        before = m.role
    if before != "assistant":
        last = f"{key}[{len(messages) - 1}]"
        raise Bad(last, f"the last message is from {before or 'system'}; training needs an assistant answer last")
    if not any(m.trained for m in messages if m.role == "assistant"):
        raise Bad(key, "every answer has weight 0: nothing to train on")


def _prompt_completion(fields: dict) -> tuple[str, list[Message]]:
    return "plain", [Message("user", _text(_get(fields, "prompt"), "prompt")),
                     Message("assistant", _answer(_get(fields, "completion"), "completion"))]


def _plain_text(fields: dict) -> tuple[str, list[Message]]:
    return "text", [Message("assistant", _answer(_get(fields, "text"), "text"))]


@dataclass(frozen=True)
class Shape:
    needs: tuple[str, ...]
    convert: Callable[[dict], tuple[str, list[Message]]]


SHAPES = {
    "messages": Shape(("messages",), _chat("messages")),
    "sharegpt": Shape(("conversations",), _chat("conversations")),
    "alpaca": Shape(("instruction", "output"), _alpaca),
    "prompt-completion": Shape(("prompt", "completion"), _prompt_completion),
    "text": Shape(("text",), _plain_text),
}


def detect(rows: Sequence[Row]) -> str:
    """The shape the first rows have; a structured shape wins over `text`. Raises Bad naming fields and known shapes."""
    fields = dict.fromkeys(str(k) for row in rows for k in row.fields)
    found = ", ".join(fields)[:120] or "none"
    if {"chosen", "rejected"} <= fields.keys():
        raise Bad("row", f"preference pairs (chosen, rejected) are not rows to imitate; fields: {found}")
    fits = [name for name, shape in SHAPES.items() if all(n in fields for n in shape.needs)]
    fits = [name for name in fits if name != "text"] or fits
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise Bad("row", f"the fields ({found}) fit {' and '.join(fits)}; choose one with --format")
    known = "; ".join(f"{name} ({', '.join(s.needs)})" for name, s in SHAPES.items())
    needs = [n for s in SHAPES.values() for n in s.needs if n not in fields]
    near = next(filter(None, (nearest(f, needs) for f in fields)), "")
    other = "for another table give prompt and completion templates"
    raise Bad("row", f"fields {found} fit no known shape: {known}; {other}{near}")


@dataclass
class Collected:
    """Everything read: the good conversations, all problems, and the shape of each file."""

    conversations: list[Conversation]
    problems: list[Problem]
    formats: dict[str, str]


def collect(files: str | Path | Iterable[str | Path], format: str = "auto", columns: Columns | None = None,
            max_rows: int | None = None) -> Collected:
    """Read and convert every row of every file, keeping good rows and problems apart."""
    files = [files] if isinstance(files, str | Path) else list(files)
    if not files:
        raise UserError("data: no file given")
    if format != "auto" and format not in SHAPES:
        raise UserError(f"format: unknown {format!r}; allowed: auto, {', '.join(SHAPES)}{nearest(format, SHAPES)}")
    if format != "auto" and columns is not None:
        raise UserError(f"format: {format!r} and column templates exclude each other; give one")
    if max_rows is not None and max_rows < 1:
        raise UserError(f"max_rows: is {max_rows}; must be at least 1")
    out = Collected([], [], {})
    for file in files:
        left = None if max_rows is None else max_rows - len(out.conversations)
        if left is None or left > 0:
            _collect_file(file, format, columns, left, out)
    return out


def _collect_file(file: str | Path, format: str, columns: Columns | None, left: int | None, out: Collected) -> None:
    out.conversations += stream(file, format, columns, out.problems, out.formats, left)


def stream(file: str | Path, format: str, columns: Columns | None, problems: list[Problem], formats: dict[str, str],
           left: int | None = None) -> Iterator[Conversation]:
    """The good rows of a file (of its first `left`), one at a time; the others go to `problems`, the file's shape to `formats`."""
    rows = read(file, problems)
    head = list(islice(rows, 20 if left is None else min(20, left)))
    if not head:
        return
    try:
        if columns is None:
            name = detect(head) if format == "auto" else format
            convert = SHAPES[name].convert
        else:
            name, convert = "columns", columns.convert
            for n in columns.names:
                if not any(n in row.fields for row in head):
                    _get(head[0].fields, n)
    except Bad as e:
        problems.append(Problem(head[0].file, head[0].line, e.field, e.reason))
        return
    formats[str(file)] = name
    for row in islice(chain(head, rows), left):
        try:
            kind, messages = convert(row.fields)
            made = Conversation(kind, tuple(messages), f"{row.file}:{row.line}")
        except Bad as e:
            problems.append(Problem(row.file, row.line, e.field, e.reason))
            continue
        yield made


def load_conversations(files: str | Path | Sequence[str | Path], format: str = "auto", columns: Columns | None = None,
                       max_rows: int | None = None) -> list[Conversation]:
    """All rows of the files as conversations, or one UserError with the first problems; `format`: "auto" or a shape."""
    got = collect(files, format, columns, max_rows)
    raise_problems(got.problems)
    return got.conversations
