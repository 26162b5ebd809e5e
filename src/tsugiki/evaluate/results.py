"""Every row's result on disk, as JSON lines, and the comparison of two models that answered the same rows."""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tsugiki.errors import UserError
from tsugiki.evaluate.intervals import Paired, paired
from tsugiki.evaluate.metrics import LOWER, value
from tsugiki.evaluate.score import Row, Score


def write_results(path: str | Path, scores: dict[str, Score], about: dict) -> None:
    """A line a task with its score and `about`, then a line a row: task, row, prompt, expected, answer, value, stats."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for task, score in scores.items():
        lines.append({"task": task, "score": score.plain()} | about)
        lines += [{"task": task, "row": r.where, "prompt": r.prompt, "expected": r.expected, "answer": r.answer, "value": v,
                   "stats": list(r.stats)} for r, v in zip(score.results, score.rows, strict=True)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def read_results(path: str | Path) -> dict[str, tuple[str, tuple[Row, ...]]]:
    """Task -> (metric, rows) of a file that `write_results` wrote. UserError names the line that is not of it."""
    found: dict[str, tuple[str, list[Row]]] = {}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or 'is not UTF-8 text'}") from None
    for n, line in enumerate(text.splitlines(), 1):
        try:
            fields = json.loads(line)
            if "score" in fields:
                found[fields["task"]] = (fields["score"]["metric"], [])
            else:
                stats = tuple(float(x) for x in fields["stats"])
                found[fields["task"]][1].append(Row(fields["row"], fields["prompt"], fields["expected"], fields["answer"], stats))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}:{n}: is not a line of results (tsugiki eval --out writes them)") from None
    if not found:
        raise UserError(f"{path}: holds no results (tsugiki eval --out writes them)")
    return {task: (metric, tuple(rows)) for task, (metric, rows) in found.items()}


def compared(score: Score, metric: str, rows: Sequence[Row], other: str) -> Paired:
    """This score minus the other rows'. UserError where they are not the same rows, or not the same metric."""
    if metric != score.metric:
        raise UserError(f"--against {other}: its metric is {metric}, not {score.metric}")
    for a, b in zip(score.results, rows, strict=False):
        if (a.expected, a.where.rpartition(":")[2]) != (b.expected, b.where.rpartition(":")[2]):
            raise UserError(f"--against {other}: {b.where} there, {a.where} here: they are not the same rows")
    if len(rows) != len(score.results):
        raise UserError(f"--against {other}: {len(rows)} rows there, {len(score.results)} here")
    return paired(metric, [r.stats for r in score.results], [r.stats for r in rows], value(metric), metric in LOWER)
