"""A task with its rows: found by name or folder, read, rendered as the model is to be asked, and scored."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from tsugiki.config import EvalConfig
from tsugiki.data.conversation import Conversation, Message, load_conversations
from tsugiki.data.render import Renderer
from tsugiki.data.rows import Problem, Row, raise_problems, read
from tsugiki.errors import UserError, nearest
from tsugiki.evaluate.extract import number
from tsugiki.evaluate.metrics import Scoring
from tsugiki.evaluate.score import Item, Progress, Score, measure
from tsugiki.evaluate.tasks.spec import SPACES, Spec, builtin, read_spec, spec_of, template


@dataclass(frozen=True)
class Task:
    """What is asked, of which rows, and how answers are scored. `file`: where the rows came from."""
    spec: Spec
    file: Path
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def conversations(self) -> list[Conversation]:
        return [i.conversation for i in self.items]


def load(name_or_path: str | Path | Spec, data: str | Path | None = None, max_rows: int | None = None, chat: bool = False) -> Task:
    """A task by name with its rows at `data`, or a folder that holds both.

    A folder needs a test.json alone; a task.yaml in it says how to ask and score, else its name or its rows do. data: the
    task's folder, a folder that has one of the task's name, or a file. chat: rows become chat messages, for the model's template,
    else the task's own prompt. Raises UserError naming the file, the row, and what is allowed.
    """
    spec, where = (name_or_path, None) if isinstance(name_or_path, Spec) else _spec(str(name_or_path))
    where = Path(data).expanduser() if data is not None else where
    if where is None:
        raise UserError(f"task {spec.name}: its rows are not part of this package; say where they are with --task-data DIR "
                        f"({' or '.join(spec.files[:2])} is looked for)")
    path = _file(spec, where)
    if spec.text:
        rows = load_conversations([path] if path.is_file() else sorted(path.glob("*.txt")))
        return Task(spec, path, tuple(Item(c, c.reference) for c in rows[:max_rows]))
    problems: list[Problem] = []
    rows = [_renamed(r, spec) for r in (_lines(path, spec) if path.suffix == ".txt" else read(path, problems))]
    raise_problems(problems)
    rows = rows[:max_rows]
    if not spec.prompt:
        spec = _guessed(spec, rows)
    items = [i for i in (_item(r, spec, chat, problems) for r in rows) if i is not None]
    raise_problems(problems)
    return Task(spec, path, tuple(items))


def score(model: nn.Module, renderer: Renderer, task: Task, cfg: EvalConfig, pad_id: int, max_length: int,
          progress: Progress | None = None) -> Score:
    """Score `model`, as it is routed now, on a task. cfg's metric, choice_by, max_new_tokens and the like, where set, win over the
    task's. A row too long for the model is wrong and counted (`unanswered`). Raises as `evaluate`."""
    items = task.items[:cfg.max_rows]
    if not items:
        raise UserError(f"task {task.name}: no rows in {task.file}")
    return measure(model, renderer, items, scoring(task, cfg), cfg.batch_size, pad_id, max_length, progress, lenient=True)


def scoring(task: Task, cfg: EvalConfig) -> Scoring:
    """The task's scoring, with what cfg sets beside it."""
    spec, metric = task.spec, task.spec.metric if cfg.metric == "auto" else cfg.metric
    if metric == "choice" and not all(len(i.options) > 1 for i in task.items):
        raise UserError(f"eval.metric: choice does not fit task {task.name}: its rows have no choices")
    return Scoring(metric=metric, choice_by=spec.choice_by if cfg.choice_by == "auto" else cfg.choice_by,
                   pattern=cfg.pattern or spec.pattern, tolerance=spec.tolerance if cfg.tolerance is None else cfg.tolerance,
                   max_new_tokens=cfg.max_new_tokens or spec.max_new_tokens, until=tuple(cfg.until) or spec.until,
                   also=spec.also if metric in ("bleu", "rouge_l") else ())


def _spec(name: str) -> tuple[Spec, Path | None]:
    """What the task is, and where its rows are if the name was a folder or a file."""
    known, path = builtin(), Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return read_spec(path), path.parent
    if path.is_dir() and (name not in known or "/" in name):
        if (path / "task.yaml").is_file():
            return read_spec(path / "task.yaml"), path
        folder = path.resolve().name
        return known.get(folder) or Spec(name=folder, prompt=""), path
    if name in known:
        return known[name], None
    near = nearest(name, known) or next((f"; did you mean {k!r}?" for k in known if k.lower() == name.lower()), "")
    raise UserError(f"task: no task is called {name!r}{near}; known: {', '.join(known)}; or give a folder with a test.json")


def _file(spec: Spec, where: Path) -> Path:
    """The file of the rows: `where` itself, or one of the task's names in it or in its subfolder of the task's name."""
    if where.is_file():
        return where
    if not where.is_dir():
        raise UserError(f"task {spec.name}: no file or folder {where}")
    for folder in (where, where / spec.name):
        for file in spec.files:
            if (folder / file).is_file():
                return folder / file
    if spec.text and any(where.glob("*.txt")):
        return where
    raise UserError(f"task {spec.name}: {where} holds none of {', '.join(spec.files)}, nor does {where / spec.name}")


def _lines(path: Path, spec: Spec) -> list[Row]:
    """Rows of a text file whose lines are fields with a separator between."""
    if len(spec.lines) < 3:
        raise UserError(f"task {spec.name}: {path}: a .txt needs `lines`, its separator and fields")
    separator, *names = spec.lines
    rows = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        parts = [p.strip() for p in line.split(separator)]
        if len(parts) != len(names):
            raise UserError(f"{path}:{n}: {len(parts)} parts between {separator!r}, expected {len(names)} ({', '.join(names)})")
        rows.append(Row(dict(zip(names, parts, strict=True)), str(path), n))
    return rows


def _renamed(row: Row, spec: Spec) -> Row:
    named = {new: row.fields[old] for old, new in (spec.rename or {}).items() if old in row.fields and new not in row.fields}
    low = {k.lower(): v for k, v in row.fields.items() if k.lower() not in row.fields}      # "MR" for "mr"
    return replace(row, fields=row.fields | low | named)


class _Wrong(Exception):
    """(field, reason) of a row that does not fit the task."""


def _fill(text: str, row: dict, where: str) -> str:
    """A template with the row's fields in it."""
    parts = []
    for literal, name in template(text, where):
        if name is not None and name != "s" and name not in row:
            raise _Wrong(name, f"missing; the row has {', '.join(map(str, row))[:80]}{nearest(name, row)}")
        value = "" if name is None else SPACES if name == "s" else row[name]
        if not isinstance(value, (str, int, float)):
            raise _Wrong(name, "is neither a text nor a number")
        parts.append(literal + str(value))
    return "".join(parts)


def _item(row: Row, spec: Spec, chat: bool, problems: list[Problem]) -> Item | None:
    """A row as the model is asked; None and a problem for one that does not fit."""
    try:
        gold = _fill(spec.gold, row.fields, spec.name).strip()
        if spec.labels is not None:
            if gold not in spec.labels:
                raise _Wrong("answer", f"{gold[:40]!r} is not among the labels: {', '.join(spec.labels)[:80]}")
            gold = spec.labels[gold]
        asked = spec.message if chat and spec.message else spec.prompt
        if asked is spec.prompt and spec.prompt_with_input and str(row.fields.get("input") or "").strip():
            asked = spec.prompt_with_input
        prompt = _fill(asked, row.fields, spec.name)
        if chat and str(row.fields.get("input") or "").strip():
            prompt = f"{prompt}\n{row.fields['input']}"
        if spec.metric == "number" and number(gold) is None:
            raise _Wrong("answer", f"{gold[:60]!r} holds no number, which metric number compares")
        options = tuple((c, _said(spec, row.fields | {"choice": c, "gold": c}, chat)) for c in _choices(spec, row, prompt))
        if options and gold not in (named := [c for c, _ in options]):
            raise _Wrong("answer", f"{gold[:60]!r} is not among the choices {', '.join(named)[:100]}{nearest(gold, named)}")
        target = str(row.fields.get(spec.target.strip("{}")) or "") if spec.target else ""
        target = target if target.strip() else _said(spec, row.fields | {"choice": gold, "gold": gold}, chat)
        if not target.strip():
            raise _Wrong("answer", "is empty: there is nothing to expect")
    except _Wrong as e:
        problems.append(Problem(row.file, row.line, *e.args))
        return None
    messages = (Message("user", prompt), Message("assistant", target))
    return Item(Conversation("chat" if chat else "plain", messages, f"{row.file}:{row.line}"), gold, options,
                _fill(spec.question or spec.message or spec.prompt, row.fields, spec.name))


def _said(spec: Spec, row: dict, chat: bool) -> str:
    text = _fill(spec.completion, row, spec.name)
    return text.strip() if chat else text


def _choices(spec: Spec, row: Row, prompt: str) -> Sequence[str]:
    if spec.choices or not spec.choices_in:
        return spec.choices
    text = str(row.fields.get("instruction", prompt))
    found = re.search(spec.choices_in, text)
    choices = [c.strip() for c in found[1].split("/")] if found else []
    if len(set(choices)) < 2:
        raise _Wrong("instruction", f"names no choices where {spec.choices_in!r} looks for them")
    return choices


def _guessed(spec: Spec, rows: Sequence[Row]) -> Spec:
    """How to score a folder that is a test.json alone, in LLM-Adapters' fields: by what its answers are."""
    golds = [str(r.fields.get("answer", "")).strip() for r in rows]
    like, offered = builtin(), builtin()["boolq"].choices_in
    if any("instruction" not in r.fields or "answer" not in r.fields for r in rows):
        raise UserError(f"task {spec.name}: rows without instruction and answer need a task.yaml beside them that says how to ask")
    if all(re.search(offered, str(r.fields["instruction"])) for r in rows):
        return replace(like["boolq"], name=spec.name, about="")
    if all(number(g) is not None for g in golds):
        return replace(like["AddSub"], name=spec.name, about="")
    few = sorted(set(golds))
    values = {"metric": "choice", "choices": few} if 1 < len(few) <= 20 and len(golds) >= 3 * len(few) else {"metric": "exact"}
    base = like["AddSub"]
    return spec_of(values | {"name": spec.name, "prompt": base.prompt, "prompt_with_input": base.prompt_with_input,
                             "message": base.message, "target": base.target, "completion": "{gold}",
                             "until": list(base.until)}, spec.name)
