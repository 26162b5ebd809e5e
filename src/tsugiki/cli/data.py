"""`tsugiki data check` and `data show`: every bad row by file and line; what is trained on, by token."""
from __future__ import annotations

import argparse

from tsugiki.errors import UserError

HELP = """Look at data before training on it.

  tsugiki data check rows.jsonl            every bad row as file:line: field: reason
  tsugiki data show rows.jsonl --base B    rows as the model sees them; trained tokens coloured
"""


def add(commands) -> None:
    from tsugiki.cli.main import common
    p = commands.add_parser("data", help="check data, or show what is trained on", description=HELP,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=("check", "show"))
    p.add_argument("files", nargs="+", metavar="FILE")
    p.add_argument("--format", default="auto", help="shape of the rows (default: told from the fields)")
    p.add_argument("--prompt", help="for a table: the prompt as a template over its columns")
    p.add_argument("--completion", help="for a table: the answer as a template")
    p.add_argument("--labels", metavar="V=WORD,...", help="words for a column's values")
    p.add_argument("--rows", type=int, default=3, help="show: how many rows (%(default)s)")
    common(p)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> int:
    import sys

    from tsugiki.cli.main import emit
    from tsugiki.cli.train import labels_of
    from tsugiki.config import DataConfig, RunConfig, build
    from tsugiki.data import Renderer, load_conversations
    from tsugiki.data.check import check, show
    from tsugiki.load import EMBEDDED, load_tokenizer
    from tsugiki.train.rows import columns_of
    text = {key: value.replace("\\n", "\n") for key in ("prompt", "completion") if (value := getattr(args, key))}
    data = build(DataConfig, {"files": args.files, "format": args.format, "labels": labels_of(args.labels)} | text, "data.")
    columns = columns_of(RunConfig(data=data))
    renderer = None
    if args.base or args.action == "show":
        renderer = Renderer(load_tokenizer(args.base or EMBEDDED, args.trust_remote_code))
    if args.action == "check":
        problems, summary = check(data.files, data.format, columns, renderer=renderer)
        found = [str(p) for p in problems]
        emit(args, summary | {"problems": found}, "\n".join([*found, _summary(summary, problems)]))
        return 2 if problems else 0
    conversations = load_conversations(data.files, data.format, columns)
    if args.rows < 1:
        raise UserError(f"--rows {args.rows}: must be at least 1")
    if args.json:
        examples, _ = renderer.examples(conversations[:args.rows], 1 << 30)
        emit(args, {"rows": [{"where": e.where, "ids": e.ids, "trained": e.trained} for e in examples]})
    else:
        print(show(renderer, conversations, args.rows, colour=sys.stdout.isatty()))
    return 0


def _summary(summary: dict, problems: list) -> str:
    parts = [f"{key} {value}" for key, value in summary.items() if not isinstance(value, (dict, list))]
    return f"{len(problems)} problems; " + ", ".join(parts)
