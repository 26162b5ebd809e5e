"""`tsugiki eval`: a score with its n and its 95 % interval, of rows, of tasks, or of lm-evaluation-harness tasks."""
from __future__ import annotations

import argparse
from pathlib import Path

HELP = """Score a model on rows it has not seen: loss, perplexity, and accuracy where answers are short.

  tsugiki eval --base ./my-model --adapter runs/first/adapter --data test.jsonl
  tsugiki eval --data dev.tsv --prompt "Review: {sentence}\\nSentiment:" --completion " {label}" --labels 0=negative,1=positive
  tsugiki eval --base ./my-model --adapter runs/first/adapter --task boolq ARC-Easy --task-data ./dataset --against base
  tsugiki eval --base ./my-model --task ./my-task --train train.jsonl --out results.jsonl
  tsugiki eval --base ./my-model --harness arc_easy --include-path ./tasks

--task: a name (tsugiki eval --task list shows them), whose rows are looked for at --task-data, or a folder with a test.json.
"""


def add(commands) -> None:
    from tsugiki.cli.main import common
    from tsugiki.cli.models import adapter_flags
    from tsugiki.config import CHOICE_BY, METRICS
    p = commands.add_parser("eval", help="score a model on held-out rows", description=HELP,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", nargs="+", metavar="FILE", help="rows to score")
    what.add_argument("--task", nargs="+", metavar="TASK", help="tasks by name, or folders of tasks; 'list' shows the names")
    what.add_argument("--harness", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness; needs tsugiki[eval]")
    p.add_argument("--task-data", metavar="DIR", help="where the tasks' rows are: a task's folder, the one above it, or a file")
    p.add_argument("--shape", choices=("auto", "plain", "chat"), default="auto", help="ask a task in its own prompt, or as a chat "
                   "message through the model's template (default: as the adapter was trained)")
    p.add_argument("--include-path", metavar="DIR", help="a folder of harness tasks of your own")
    p.add_argument("--against", metavar="base|DIR|FILE", help="compare on the same rows with the base alone, another adapter, or "
                   "results that --out wrote")
    p.add_argument("--train", nargs="+", metavar="FILE", help="training files: test rows that they hold are counted first")
    p.add_argument("--out", metavar="FILE", help="write every row's result here, as JSON lines")
    p.add_argument("--format", default="auto", help="shape of the rows (default: told from the fields)")
    p.add_argument("--prompt", help="for a table: the prompt as a template over its columns")
    p.add_argument("--completion", help="for a table: the answer as a template")
    p.add_argument("--labels", metavar="V=WORD,...", help="words for a column's values")
    p.add_argument("--metric", default="auto", help=f"{', '.join(METRICS[:-1])} or {METRICS[-1]}")
    p.add_argument("--choices", metavar="A,B,...", help="the allowed answers of metric choice (default: the distinct answers)")
    p.add_argument("--choice-by", default="auto", help=f"metric choice by {', '.join(CHOICE_BY[1:])} (default: the task's own)")
    p.add_argument("--pattern", metavar="REGEX", help="of metric regex: what is looked for in answers")
    p.add_argument("--max-rows", type=int, help="score only the first rows")
    p.add_argument("--max-new-tokens", type=int, help="longest generated answer (default: the task's, else 64)")
    p.add_argument("--max-length", type=int, default=1024, help="longest row in tokens (%(default)s)")
    p.add_argument("--batch-size", type=int, default=32, help="rows generated at once (%(default)s)")
    p.add_argument("--show", type=int, default=0, metavar="N", help="also print the first N answers")
    adapter_flags(p)
    common(p, bits=True)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> int:
    from tsugiki.errors import UserError
    if len(args.adapter) > 1:
        raise UserError("eval takes one --adapter")
    for flag, needs, there in (("task_data", "--task", args.task), ("include_path", "--harness", args.harness)):
        if getattr(args, flag) and not there:
            raise UserError(f"--{flag.replace('_', '-')}: goes with {needs}")
    if args.against == "base" and not args.adapter:
        raise UserError("--against base: give --adapter, which is compared with it")
    if args.task == ["list"]:
        return _list(args)
    return _harness(args) if args.harness else _eval(args)


def _list(args: argparse.Namespace) -> int:
    from tsugiki.cli.main import emit
    from tsugiki.cli.tables import table
    from tsugiki.evaluate.tasks import builtin
    known = builtin().values()
    rows = [(s.name, s.metric + (f" ({s.choice_by})" if s.metric == "choice" else ""), s.about, s.source) for s in known]
    emit(args, {s.name: {"metric": s.metric, "about": s.about, "source": s.source} for s in known},
         table(("task", "metric", "about", "source"), rows))
    return 0


def _config(args: argparse.Namespace):
    from tsugiki.config import EvalConfig, build
    given = {"metric": args.metric, "choices": args.choices.split(",") if args.choices else [], "choice_by": args.choice_by,
             "pattern": args.pattern, "max_rows": args.max_rows, "max_new_tokens": args.max_new_tokens,
             "batch_size": args.batch_size}
    return build(EvalConfig, given, "eval.")


def _columns(args: argparse.Namespace):
    """(the data's format, its column templates)."""
    from tsugiki.cli.train import labels_of
    from tsugiki.config import DataConfig, RunConfig, build
    from tsugiki.train.rows import columns_of
    text = {key: value.replace("\\n", "\n") for key in ("prompt", "completion") if (value := getattr(args, key))}
    data = build(DataConfig, {"format": args.format, "labels": labels_of(args.labels)} | text, "data.")
    return data.format, columns_of(RunConfig(data=data))


def _eval(args: argparse.Namespace) -> int:
    """Rows or tasks: data is read and checked first, then the model is loaded."""
    from tsugiki.cli.main import emit
    from tsugiki.cli.models import load_with_adapters
    from tsugiki.data import load_conversations
    from tsugiki.evaluate.results import read_results, write_results
    from tsugiki.evaluate.score import Item
    from tsugiki.evaluate.tasks import load
    cfg, (format, columns) = _config(args), _columns(args)
    train = load_conversations(args.train, format, columns) if args.train else []
    rows = load_conversations(args.data, format, columns) if args.data else []
    tasks = [load(name, args.task_data, cfg.max_rows) for name in args.task or ()]
    names = [t.name for t in tasks] or ["data"]
    overlaps = {n: _overlap(args, n, train, t.items if tasks else [Item(c, c.reference) for c in rows[:cfg.max_rows]])
                for n, t in zip(names, tasks or [None], strict=True) if train}
    other = args.against if args.against and (args.against == "base" or Path(args.against).is_dir()) else None
    saved = read_results(args.against) if args.against and not other else {}
    args.adapter = [*args.adapter, *([other] if other not in (None, "base") else [])]
    loaded = load_with_adapters(args)
    who = [*loaded.notes, None] if other == "base" and loaded.notes else list(loaded.notes) or [None]
    who = [None, *who] if other and other != "base" and len(who) == 1 else who
    scores = [_scores(args, loaded, adapter, who[0], cfg, rows, tasks) for adapter in who[:2]]
    if args.out:
        write_results(args.out, scores[0], {"base": args.base or "embedded", "adapter": who[0]})
    pairs = _pairs(args, scores, saved)
    _print(args, emit, scores[0], overlaps, pairs, {"adapter": who[0]} | ({"data": args.data} if args.data else {}))
    return 0


def _overlap(args: argparse.Namespace, name: str, train, items):
    import sys

    from tsugiki.evaluate.overlap import overlap
    found = overlap(train, items)
    if not args.quiet:
        print(f"{name}: {found}", file=sys.stderr)
    return found


def _scores(args: argparse.Namespace, loaded, adapter: str | None, asked_as: str | None, cfg, rows, tasks) -> dict:
    """Name -> Score of one adapter (None: the base, asked as `asked_as` is)."""
    from tsugiki.evaluate.answers import room
    from tsugiki.evaluate.score import evaluate
    from tsugiki.evaluate.tasks import load, score
    from tsugiki.load import pad_id
    from tsugiki.train.log import Bar
    asked = adapter if adapter is not None else asked_as
    limit, found = min(args.max_length, room(loaded.model) or args.max_length), {}
    chat = args.shape == "chat" or args.shape == "auto" and loaded.kind(asked) == "chat"
    with loaded.adapters.use(adapter):
        for task in tasks or [None]:
            if task is not None and chat:
                task = load(task.spec, task.file, cfg.max_rows, chat=True)
            with Bar(task.name if task else "eval", len(task.items if task else rows), quiet=args.quiet) as bar:
                def progress(done: int, total: int, bar=bar) -> None:
                    bar.total = total
                    bar.update(done)
                how = (cfg, pad_id(loaded.tokenizer), limit, progress)
                found[task.name if task else "data"] = (score(loaded.model, loaded.renderer(asked), task, *how) if task else
                                                        evaluate(loaded.model, loaded.renderer(asked), rows, *how))
    return found


def _pairs(args: argparse.Namespace, scores: list[dict], saved: dict) -> dict:
    """Name -> the difference to what --against names."""
    from tsugiki.errors import UserError
    from tsugiki.evaluate.results import compared
    if not args.against:
        return {}
    if not saved:
        saved = {name: (s.metric, s.results) for name, s in scores[-1].items()}
    for name in scores[0]:
        if name not in saved:
            raise UserError(f"--against {args.against}: has no results of {name}; it has {', '.join(saved)}")
    return {name: compared(s, *saved[name], args.against) for name, s in scores[0].items()}


def _print(args: argparse.Namespace, emit, scores: dict, overlaps: dict, pairs: dict, about: dict) -> None:
    from tsugiki.cli.tables import paired_line, score_line
    values, lines = {}, []
    for name, s in scores.items():
        lines += [f"{r.prompt}\n  expected: {r.expected}\n  answer:   {r.answer.strip()}"
                  for r in s.results[:args.show] if r.prompt]
        lines.append((f"{name}: " if name != "data" else "") + score_line(s.plain()))
        lines += [f"  against {args.against}: {paired_line(pairs[name])}"] if name in pairs else []
        values[name] = s.plain() | ({"overlap": overlaps[name].plain()} if name in overlaps else {}) | (
            {"against": pairs[name].plain() | {"name": args.against}} if name in pairs else {})
    one = len(values) == 1
    emit(args, (next(iter(values.values())) if one else {"tasks": values}) | (
        {"task": next(iter(values))} if one and args.task else {}) | about, "\n".join(lines))


def _harness(args: argparse.Namespace) -> int:
    from tsugiki.cli.main import emit
    from tsugiki.cli.models import load_with_adapters
    from tsugiki.cli.tables import table
    from tsugiki.evaluate.harness import needed, run_harness
    needed()
    loaded = load_with_adapters(args)
    adapter = next(iter(loaded.notes), None)
    with loaded.adapters.use(adapter):
        results = run_harness(loaded.model, loaded.renderer(adapter), args.harness, include_path=args.include_path,
                              limit=args.max_rows, batch_size=args.batch_size, max_length=args.max_length)
    rows = [(task, key, f"{value:.4f}", "" if error is None else f"{error:.4f}", n)
            for task, key, value, error, n in results.lines()]
    emit(args, results.plain() | {"adapter": adapter}, table(("task", "metric", "value", "+-", "n"), rows))
    return 0
