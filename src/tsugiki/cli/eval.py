"""`tsugiki eval`: a score with its n and its 95 % interval."""
from __future__ import annotations

import argparse

HELP = """Score a model on rows it has not seen: loss, perplexity, and accuracy where answers are short.

  tsugiki eval --base ./my-model --adapter runs/first/adapter --data test.jsonl
  tsugiki eval --data dev.tsv --prompt "Review: {sentence}\\nSentiment:" --completion " {label}" --labels 0=negative,1=positive
"""


def add(commands) -> None:
    from tsugiki.cli.main import common
    from tsugiki.cli.models import adapter_flags
    p = commands.add_parser("eval", help="score a model on held-out rows", description=HELP,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", metavar="FILE", required=True, help="rows to score")
    p.add_argument("--format", default="auto", help="shape of the rows (default: told from the fields)")
    p.add_argument("--prompt", help="for a table: the prompt as a template over its columns")
    p.add_argument("--completion", help="for a table: the answer as a template")
    p.add_argument("--labels", metavar="V=WORD,...", help="words for a column's values")
    p.add_argument("--metric", default="auto", help="auto, exact, choice, bleu or loss")
    p.add_argument("--choices", metavar="A,B,...", help="the allowed answers of metric choice (default: the distinct answers)")
    p.add_argument("--max-rows", type=int, help="score only the first rows")
    p.add_argument("--max-new-tokens", type=int, default=64, help="longest generated answer (%(default)s)")
    p.add_argument("--max-length", type=int, default=1024, help="longest row in tokens (%(default)s)")
    p.add_argument("--show", type=int, default=0, metavar="N", help="also print the first N answers")
    adapter_flags(p)
    common(p, bits=True)
    p.set_defaults(run=run, parser=p)


def run(args: argparse.Namespace) -> int:
    from tsugiki.cli.main import emit
    from tsugiki.cli.models import load_with_adapters
    from tsugiki.cli.tables import score_line
    from tsugiki.cli.train import labels_of
    from tsugiki.config import DataConfig, EvalConfig, RunConfig, build
    from tsugiki.data import load_conversations
    from tsugiki.errors import UserError
    from tsugiki.evaluate.answers import room
    from tsugiki.evaluate.score import evaluate
    from tsugiki.load import pad_id
    from tsugiki.train.log import Bar
    from tsugiki.train.run import columns_of
    if len(args.adapter) > 1:
        raise UserError("eval takes one --adapter")
    text = {key: value.replace("\\n", "\n") for key in ("prompt", "completion") if (value := getattr(args, key))}
    data = build(DataConfig, {"files": args.data, "format": args.format, "labels": labels_of(args.labels)} | text, "data.")
    cfg = build(EvalConfig, {"metric": args.metric, "choices": args.choices.split(",") if args.choices else [],
                             "max_rows": args.max_rows, "max_new_tokens": args.max_new_tokens}, "eval.")
    rows = load_conversations(data.files, data.format, columns_of(RunConfig(data=data)))
    loaded = load_with_adapters(args)
    adapter = next(iter(loaded.notes), None)
    limit = min(args.max_length, room(loaded.model) or args.max_length)
    with loaded.adapters.use(adapter), Bar("eval", len(rows), quiet=args.quiet) as bar:
        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)
        score = evaluate(loaded.model, loaded.renderer(adapter), rows, cfg, pad_id(loaded.tokenizer), limit, progress)
    shown = [f"{c.prompt_text}\n  expected: {c.reference.strip()}\n  answer:   {a.strip()}"
             for c, a in list(zip(rows, score.answers, strict=False))[:args.show]]
    emit(args, score.plain() | {"data": args.data, "adapter": adapter}, "\n".join([*shown, score_line(score.plain())]))
    return 0
