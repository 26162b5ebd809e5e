"""What a task is made of, as data: names of fields, templates, and how an answer is scored; read from YAML, checked at once."""
from __future__ import annotations

import re
import string
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path

import yaml

from tsugiki.config import CHOICE_BY, METRICS, read_yaml
from tsugiki.errors import UserError, nearest

SPACES = " " * 16                                     # {s} in a template
LISTS = ("files", "choices", "until", "also", "lines")
DICTS = ("rename", "labels")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A task without its rows.

    files: names tried in the task's folder. rename: {a row's field: what the templates call it}, where the row lacks it.
    lines: [separator, field, field...] for a .txt whose lines are rows. text: rows are plain text.
    prompt, message: what is asked, as plain text and as a chat message; prompt_with_input where a row's `input` is not empty.
    question: what is compared with training data (default: message, else prompt).
    gold: the expected answer; labels: words for its values. target: the field whose text's loss is told, where it is not
    empty; completion: else this, with {gold} or {choice}, which is also how a choice is said when its likelihood is taken.
    choices: the allowed answers, or choices_in: a pattern that finds them, joined by "/", in the row's `instruction` (or prompt).
    metric, choice_by, pattern, tolerance, max_new_tokens, until, also: as the keys of `eval`.
    """
    name: str = ""
    about: str = ""
    source: str = ""
    abstract: bool = False
    files: tuple[str, ...] = ("test.json", "test.jsonl", "test.csv", "test.tsv")
    rename: dict[str, str] | None = None
    lines: tuple[str, ...] = ()
    text: bool = False
    prompt: str = "{instruction}"
    prompt_with_input: str | None = None
    message: str | None = None
    question: str | None = None
    gold: str = "{answer}"
    labels: dict[str, str] | None = None
    target: str | None = None
    completion: str = "{gold}"
    metric: str = "exact"
    choice_by: str = "likelihood"
    choices: tuple[str, ...] = ()
    choices_in: str | None = None
    pattern: str | None = None
    tolerance: float = 1e-3
    max_new_tokens: int = 64
    until: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


def spec_of(values: dict, where: str) -> Spec:
    """A checked Spec; UserError names the key and what is allowed."""
    known = {f.name: f for f in fields(Spec)}
    made = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: {key}: unknown key{nearest(key, known)}; allowed: {', '.join(known)}")
        if key in LISTS:
            value = tuple(map(str, value if isinstance(value, list) else [value]))
        elif key in DICTS:
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key}: expected keys and values, found {str(value)[:60]!r}")
            value = {str(k): str(v) for k, v in value.items()}
        else:
            kinds = {bool: (bool,), float: (int, float), int: (int,)}.get(type(known[key].default), (str,))
            if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
                raise UserError(f"{where}: {key}: expected {kinds[0].__name__}, found {str(value)[:60]!r}")
        made[key] = value
    _check(spec := Spec(**made), where)
    return spec


def _check(spec: Spec, where: str) -> None:
    for key, value, allowed in (("metric", spec.metric, METRICS[1:]), ("choice_by", spec.choice_by, CHOICE_BY[1:]),
                                *(("also", m, ("bleu", "rouge_l")) for m in spec.also)):
        if value not in allowed:
            raise UserError(f"{where}: {key}: {value!r} is not one of {', '.join(allowed)}{nearest(value, allowed)}")
    for key in ("pattern", "choices_in"):
        try:
            re.compile(getattr(spec, key) or "")
        except re.error as e:
            raise UserError(f"{where}: {key}: not a regular expression: {e}") from None
    if spec.metric == "choice" and len(set(spec.choices)) < 2 and not spec.choices_in:
        raise UserError(f"{where}: choices: metric choice needs at least two, or choices_in, a pattern that finds them in a row")
    for key in ("prompt", "prompt_with_input", "message", "question", "gold", "target", "completion"):
        template(getattr(spec, key) or "", f"{where}: {key}")


def template(text: str, where: str) -> list[tuple[str, str | None]]:
    """(literal, field or None) pieces of "Question: {question}"; UserError for anything but plain fields."""
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as e:
        raise UserError(f"{where}: broken template ({e}); {{field}}, and {{{{ or }}}} for a brace") from None
    if any(spec or conversion or name == "" for _, name, spec, conversion in pieces):
        raise UserError(f"{where}: only plain {{field}} is allowed in a template")
    return [(literal, name) for literal, name, _, _ in pieces]


def builtin() -> dict[str, Spec]:
    """The tasks known by name."""
    text = (files("tsugiki") / "evaluate" / "tasks" / "builtin.yaml").read_text(encoding="utf-8")
    found = {}
    for name, values in yaml.safe_load(text).items():
        # a block that others build on says so itself; what builds on it does not inherit that
        if not (values.get("abstract") and "about" not in values):
            found[name] = spec_of({k: v for k, v in values.items() if v is not None} | {"name": name, "abstract": False}, name)
    return found


def read_spec(path: Path) -> Spec:
    """A user's task.yaml; `like: NAME` takes a built-in task's settings for what is not given."""
    values = read_yaml(str(path))
    like = values.pop("like", None)
    known = builtin()
    if like is not None and like not in known:
        raise UserError(f"{path}: like: no task is called {like!r}{nearest(str(like), known)}; known: {', '.join(known)}")
    base = {f.name: getattr(known[like], f.name) for f in fields(Spec)} if like else {}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in base.items() if v is not None and k not in ("name", "about")}
    given = spec_of(plain | {k: v for k, v in values.items() if v is not None}, str(path))
    return given if given.name else replace(given, name=path.parent.resolve().name)
