"""`tsugiki compare`: which method, at which rate, and by how much: a study that goes on where it stopped, and its report."""
from __future__ import annotations

import argparse

from tsugiki.errors import UserError

HELP = """Which method suits your data? Train several, each at several learning rates, the best rate with several seeds, and
rank them with intervals; methods that cannot be told apart are called tied.

  tsugiki compare --data rows.jsonl --methods lora series prefix full --out runs/which
  tsugiki compare --base B --data train.tsv --eval-data dev.tsv --prompt "{sentence}\\nThis was" --completion " {label}" \\
      --labels 0=bad,1=good --methods lora:rank=4,16 dora ia3 --rates auto --seeds 0 1 2 --steps 200 --out runs/sst2
  tsugiki compare --config study.yaml --plan               what it will take: runs, parameters, memory, time; trains nothing
  tsugiki compare --data rows.jsonl --methods lora series ia3 --parameters 100000 --general novel.txt --out runs/fair

Rates are chosen on validation rows held out of the training rows; the test rows (--eval-data, --task, or a tenth of the rows) are
only scored with the chosen rate. The full length of a run is --epochs or --steps. --search halving spends less on bad rates.
The folder gets results.csv, results.md, report.html and every final run. Stopped by Ctrl-C, a kill or a power cut? The same
command goes on; more methods, rates or seeds may be added; a second process given the same folder shares the work.
"""
# flag -> key of the study or of its runs
KEYS = {"out": "out", "rates": "rates", "factors": "factors", "seeds": "seeds", "search": "search", "select": "select",
        "parameters": "parameters", "general": "general", "validation": "validation", "curve_points": "curve_points"}
OF_A_RUN = ("base", "device", "bits", "data", "eval_data", "format", "prompt", "completion", "holdout", "max_rows", "epochs",
            "steps", "batch_size", "max_length", "dtype", "metric", "task", "task_data", "compile")


def add(commands) -> None:
    from tsugiki.cli.main import EPILOG, common
    p = commands.add_parser("compare", help="which method, rate and size: a study with a report", description=HELP, epilog=EPILOG,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", metavar="FILE", help="training rows: .jsonl .json .csv .tsv .parquet .txt, also .gz")
    p.add_argument("--eval-data", nargs="+", metavar="FILE", help="test rows (default: a tenth of the rows)")
    p.add_argument("--holdout", help="share of the rows that is the test, without --eval-data (0.1)")
    p.add_argument("--task", help="a task as the test instead (tsugiki eval --task list)")
    p.add_argument("--task-data", metavar="DIR", help="where the task's rows are")
    p.add_argument("--methods", nargs="+", metavar="M", help="as lora series lora:rank=4,16 full (lora series prefix)")
    p.add_argument("--rates", nargs="+", metavar="LR", help="auto (the default: around each method's recommended rate) or rates")
    p.add_argument("--factors", nargs="+", metavar="F", help="what auto multiplies the recommended rate with (0.3 1 3)")
    p.add_argument("--seeds", nargs="+", metavar="N", help="seeds of the final runs (0 1 2)")
    p.add_argument("--search", help="grid (each rate in full length) or halving (short runs first, the better half goes on)")
    p.add_argument("--select", help="choose rates by the validation rows' loss (the default) or metric")
    p.add_argument("--validation", help="share of the training rows that rates are chosen on (0.1, at most 500 rows)")
    p.add_argument("--parameters", help="choose ranks and sizes so that each method trains about so many numbers")
    p.add_argument("--general", nargs="+", metavar="FILE", help="plain texts to measure forgetting on: their loss before and after")
    p.add_argument("--curve-points", help="how often a run's validation loss is taken (8)")
    p.add_argument("--out", metavar="DIR", help="folder of the study")
    p.add_argument("--plan", action="store_true", help="show what it will take and stop")
    p.add_argument("--retry", action="store_true", help="make runs again that failed")
    p.add_argument("--format", help="alpaca, messages, sharegpt, prompt-completion or text (default: told from the fields)")
    p.add_argument("--prompt", help="for a table: the prompt as a template over its columns, as 'Review: {sentence}'")
    p.add_argument("--completion", help="for a table: the answer as a template, as ' {label}'")
    p.add_argument("--labels", metavar="V=WORD,...", help="words for a column's values, as 0=negative,1=positive")
    for flag, text in (("max-rows", "use so many rows"), ("epochs", "passes over the rows (1)"),
                       ("steps", "optimizer steps, instead of epochs"), ("batch-size", "rows of one step (16)"),
                       ("max-length", "longest row in tokens (512)"), ("compile", "auto, on or off"),
                       ("metric", "auto, exact, number, choice, contains, regex, bleu, rouge_l, perplexity or loss")):
        p.add_argument(f"--{flag}", help=text)
    p.add_argument("--config", metavar="FILE", help="a YAML file of the same keys, and of several data sets; flags win over it")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                   help="any key of a study or of its runs, as extend=0 or train.warmup=0.1; may be given again")
    common(p, bits=True)
    p.set_defaults(run=run, parser=p)


def method_of(text: str) -> dict:
    """`lora:rank=4,16:alpha=8` as {name: lora, rank: [4, 16], alpha: 8}."""
    from tsugiki.config import assignments
    name, *fields = text.split(":")
    found: dict = {"name": name}
    for field in fields:
        key, sign, values = field.partition("=")
        if not sign or not key or not values:
            raise UserError(f"--methods {text}: expected NAME or NAME:FIELD=VALUE,VALUE, as lora:rank=4,16")
        read = [assignments([f"x={v}"])["x"] for v in values.split(",")]
        found[key] = read if len(read) > 1 else read[0]
    return found


def study_from(args: argparse.Namespace):
    """The study from --config, flags and --set, later ones winning."""
    from tsugiki.cli.train import KEYS as RUN_KEYS
    from tsugiki.cli.train import flags_of
    from tsugiki.compare import study_of
    from tsugiki.config import assignments, merge, read_yaml
    flags = flags_of(args, KEYS | {f: RUN_KEYS[f] for f in OF_A_RUN})
    if args.methods:
        flags["methods"] = [method_of(m) for m in args.methods]
    return study_of(merge(read_yaml(args.config) if args.config else {}, flags, assignments(args.set)))


def run(args: argparse.Namespace) -> int:
    from tsugiki.cli.main import emit
    from tsugiki.compare.runner import compare, prepare
    from tsugiki.train.log import console
    study = study_from(args)
    say = (lambda line: None) if args.quiet else (lambda line: console().print(line, markup=False))
    if args.plan:
        _, _, plan = prepare(study, say, save=False)
        emit(args, plan.plain(), plan_text(plan, {}))
        return 0
    outcome = compare(study, quiet=args.quiet, retry=args.retry, say=say, show=lambda plan, seen: say(plan_text(plan, seen)))
    emit(args, outcome.plain(), ranking_text(outcome))
    return 0


def plan_text(plan, seen: dict) -> str:
    """What a study will take, a line a method."""
    from tsugiki.cli.tables import table
    from tsugiki.train.log import clock
    mb = 1 << 20
    lines = [table(("method", "trained", "share", "memory MB", "s a step"),
                   [(label, f"{p.trainable:,}", f"{p.trainable / p.total:.3%}", f"{p.memory / mb:,.0f}", f"{p.step_seconds:.3g}")
                    for label, p in plan.plans.items()])]
    lines += [f"not on this base: {why}" for why in plan.refused.values()]
    for name, size in plan.loads.items():
        lines.append(f"{name}: {size.steps:,} steps of about {size.step_tokens:,.0f} tokens")
    lines.append(f"{len(plan.cells)} runs to make, about {clock(plan.left(plan.cells, seen))} (memory: what tensors hold in "
                 "a step; time: from a rehearsed step, without generated answers; both are estimates)")
    return "\n".join(lines)


def ranking_text(outcome) -> str:
    """The rankings as text."""
    from tsugiki.cli.tables import table
    from tsugiki.compare.output import cells, place
    lines = []
    for data in outcome.table.data:
        forgot = any(r.forgetting for r in data.rows)
        head = ("place", "method", data.metric, "95 % interval", "rate", "trained", *(("forgetting",) if forgot else ()), "seeds",
                "s", "peak MB")
        base = f", the base alone {data.base['score']:.3f}" if data.base and data.base["score"] is not None else ""
        lines += [f"{data.name}: {data.n} test rows{base}",
                  table(head, [(place(r), r.label, *cells(r, forgot)) for r in data.rows]), ""]
    lines += [f"failed: {line}" for line in outcome.table.failures]
    return "\n".join([*lines, "a place such as 1–3 is a tie: significant differences (Holm, 95 %) leave these places open",
                      f"report  {outcome.out / 'report.html'}", f"table   {outcome.out / 'results.md'}, results.csv"])
