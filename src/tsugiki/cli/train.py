"""`tsugiki train`: one run, or many on one base. Flags, a YAML file and --set are the same keys; a folder resumes by itself."""
from __future__ import annotations

import argparse

from tsugiki.errors import UserError

HELP = """Fine-tune a model on rows of data.

  tsugiki train --data rows.jsonl --out runs/first
  tsugiki train --base ./my-model --data rows.csv --prompt "Review: {text}\\nSentiment:" --completion " {label}" --out runs/reviews
  tsugiki train --data train.json --task boolq --task-data ./dataset --eval-steps 100 --keep best --patience 5 --out runs/boolq
  tsugiki train --base ./my-model --data notes.txt --format text --method full --set method.last=2 --out runs/notes

  tsugiki train --data notes.txt --replay novels.txt --replay-ratio 0.1 --source-eval novel.txt --out runs/notes

  tsugiki train --jobs jobs.yaml --out runs/many

The folder gets adapter/ (or model/ for full fine-tuning), metrics.jsonl, run.yaml, checkpoints/ and report.html.
Stopped by Ctrl-C, a kill or a power cut? The same command goes on from the last checkpoint, to the same bits.

With --jobs, many adapters are trained on one base, each as it would be alone, and each in its own folder below --out:

  base: embedded                      # one for all, as device and bits
  defaults: {train: {epochs: 2}}      # keys of a run, for every job
  jobs:
    math:    {data: math.jsonl, method: {name: lora, rank: 16}}
    reviews: {data: reviews.jsonl, method: prefix, train: {lr: 0.01}, weight: 2}

Flags and --set win over every job's keys. A job that fails stops alone (exit code 1); see docs/many-adapters.md.
"""
# flag -> key of the configuration
KEYS = {"base": "base", "out": "out", "adapter_name": "adapter", "device": "device", "bits": "bits", "method": "method.name",
        "data": "data.files", "eval_data": "data.eval", "format": "data.format", "prompt": "data.prompt",
        "completion": "data.completion", "holdout": "data.holdout", "max_rows": "data.max_rows", "epochs": "train.epochs",
        "steps": "train.steps", "lr": "train.lr", "batch_size": "train.batch_size", "max_length": "train.max_length",
        "seed": "train.seed", "dtype": "train.dtype", "eval_steps": "train.eval_steps", "save_steps": "train.save_steps",
        "metric": "eval.metric", "task": "eval.task", "task_data": "eval.task_data", "keep": "train.keep",
        "patience": "train.patience", "compile": "train.compile",
        "float8": "train.float8", "replay": "data.replay", "replay_ratio": "data.replay_ratio",
        "source_eval": "data.source_eval", "streaming": "data.streaming", "forgetting": "train.forgetting",
        "forgetting_limit": "train.forgetting_limit"}


def add(commands) -> None:
    from tsugiki.cli.main import EPILOG, common
    p = commands.add_parser("train", help="fine-tune a model on rows of data", description=HELP, epilog=EPILOG,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", metavar="FILE", help="training rows: .jsonl .json .csv .tsv .parquet .txt, also .gz")
    p.add_argument("--eval-data", nargs="+", metavar="FILE", help="held-out rows")
    p.add_argument("--task", help="a task as metric, beside or instead of held-out rows (tsugiki eval --task list)")
    p.add_argument("--task-data", metavar="DIR", help="where the task's rows are")
    p.add_argument("--holdout", help="share of the rows to hold out instead, as 0.05")
    p.add_argument("--method", help="lora (the default), bitfit, full, ...; its fields by --set method.rank=16")
    p.add_argument("--out", metavar="DIR", help="folder of the run")
    p.add_argument("--jobs", metavar="FILE", help="a YAML file of many jobs, trained together on one base")
    p.add_argument("--tokens", help="with --jobs: tokens of the steps that are taken at once (default: what one forward holds)")
    p.add_argument("--format", help="alpaca, messages, sharegpt, prompt-completion or text (default: told from the fields)")
    p.add_argument("--prompt", help="for a table: the prompt as a template over its columns, as 'Review: {sentence}'")
    p.add_argument("--completion", help="for a table: the answer as a template, as ' {label}'")
    p.add_argument("--labels", metavar="V=WORD,...", help="words for a column's values, as 0=negative,1=positive")
    p.add_argument("--replay", nargs="+", metavar="FILE", help="text like what the base was trained on, read beside the data")
    p.add_argument("--mix", nargs="+", metavar="FILE=SHARE", help="more files, each with its share of every step's tokens")
    p.add_argument("--source-eval", nargs="+", metavar="FILE", help="held-out text of the base's kind: shows what is forgotten")
    for flag, text in (("max-rows", "use so many rows"), ("epochs", "passes over the rows (1)"),
                       ("steps", "optimizer steps, instead of epochs"),
                       ("lr", "peak learning rate (default: the method's)"), ("batch-size", "rows of one step (16)"),
                       ("max-length", "longest row in tokens (512)"), ("seed", "everything random is drawn from it (0)"),
                       ("eval-steps", "evaluate every so many steps"), ("save-steps", "a checkpoint every so many steps"),
                       ("replay-ratio", "share of every step's tokens from the replay files (0.1)"),
                       ("forgetting", "when the source loss rises beyond the limit: warn (the default), stop or off"),
                       ("forgetting-limit", "how far it may rise, relatively (0.05)"),
                       ("streaming", "auto (the default: for large files), on or off: tokens on disk, read as they are needed"),
                       ("float8", "on: products of the frozen base in float8, on a GPU that multiplies it (default off)"),
                       ("compile", "auto (the default: in runs so long that it pays), on or off"),
                       ("metric", "auto, exact, number, choice, contains, regex, bleu, rouge_l, perplexity or loss"),
                       ("keep", "which weights are the result: last (the default) or best, by the score"),
                       ("patience", "stop after so many evaluations without improvement"),
                       ("adapter-name", "name of the adapter (default)")):
        p.add_argument(f"--{flag}", help=text)
    p.add_argument("--config", metavar="FILE", help="a YAML file of the same keys; flags win over it")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                   help="any key, as train.warmup=0.1; may be given again")
    common(p, bits=True)
    p.set_defaults(run=run, parser=p)


def labels_of(text: str | None) -> dict:
    """`0=negative,1=positive` as a mapping."""
    if not text:
        return {}
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(sign and value for _, sign, value in pairs):
        raise UserError(f"--labels {text}: expected VALUE=WORD,VALUE=WORD, as 0=negative,1=positive")
    return {key.strip(): value.strip() for key, _, value in pairs}


def mix_of(pairs: list[str]) -> dict:
    """`["chat.jsonl=0.2"]` as a mapping."""
    parts = [pair.rpartition("=") for pair in pairs]
    if not all(name and share for name, _, share in parts):
        raise UserError(f"--mix {' '.join(pairs)}: expected FILE=SHARE, as chat.jsonl=0.2")
    return {name: share for name, _, share in parts}


def flags_of(args: argparse.Namespace, keys: dict[str, str]) -> dict:
    """The flags that were given, as nested keys; `keys` says which flag is which key."""
    from tsugiki.config import put
    flags: dict = {}
    for flag, key in keys.items():
        if getattr(args, flag, None) is not None:
            put(flags, key, getattr(args, flag))
    for key in ("prompt", "completion"):
        if isinstance(flags.get("data", {}).get(key), str):
            flags["data"][key] = flags["data"][key].replace("\\n", "\n")
    if args.labels:
        put(flags, "data.labels", labels_of(args.labels))
    if args.trust_remote_code:
        put(flags, "trust_remote_code", True)
    return flags


def given(args: argparse.Namespace) -> dict:
    """The keys of a run that flags and --set give, later ones winning."""
    from tsugiki.config import assignments, merge, put
    flags = flags_of(args, KEYS)
    if args.mix:
        put(flags, "data.mix", mix_of(args.mix))
    return merge(flags, assignments(args.set))


def config_of(args: argparse.Namespace):
    """The run's configuration from --config, flags and --set, later ones winning."""
    from tsugiki.config import RunConfig, build, merge, read_yaml
    values = merge(read_yaml(args.config) if args.config else {}, given(args))
    if isinstance(values.get("method"), str):
        values["method"] = {"name": values["method"]}
    if isinstance(values.get("method"), dict):
        values["method"].setdefault("name", "lora")
    return build(RunConfig, values)


def run(args: argparse.Namespace) -> int:
    from tsugiki.api import train_run
    from tsugiki.cli.main import emit
    from tsugiki.cli.tables import before_after
    from tsugiki.train.guard import told
    if args.jobs:
        return run_jobs(args)
    if args.tokens:
        raise UserError("--tokens: is for --jobs; the tokens of one forward are train.max_tokens")
    cfg = config_of(args)
    result = train_run(cfg, quiet=args.quiet)
    values = result.plain()
    lines = [before_after(values["before"], values["after"])] if values["after"] else []
    if forgot := told(values["sources"], cfg.train):
        lines.append(forgot)
    if result.progress.stopped:
        lines.append(f"stopped early: {result.progress.stopped}")
    emit(args, values, "\n".join([*lines, f"saved   {result.saved}", f"report  {result.out / 'report.html'}"]))
    return 0


def run_jobs(args: argparse.Namespace) -> int:
    from tsugiki.api import train_jobs
    from tsugiki.cli.main import emit
    from tsugiki.cli.tables import table
    from tsugiki.train.failure import Failure
    from tsugiki.train.jobs import read_jobs
    if args.config:
        raise UserError("--config: is of one run; with --jobs, keys for all jobs stand under `defaults` in that file")
    over = given(args) | ({"tokens": args.tokens} if args.tokens else {})
    results = train_jobs(read_jobs(args.jobs, over), quiet=args.quiet)
    failed = {name: r for name, r in results.items() if isinstance(r, Failure)}
    rows = [(name, r.step if name in failed else r.progress.step, "failed" if name in failed else _told(r), r.out)
            for name, r in results.items()]
    lines = [table(("job", "steps", "result", "folder"), rows), *(f"{name}: {r.reason}" for name, r in failed.items())]
    emit(args, {"jobs": {name: r.plain() for name, r in results.items()}, "failed": list(failed)}, "\n".join(lines))
    return 1 if failed else 0


def _told(result) -> str:
    """`accuracy 0.120 -> 0.870`, or that it is done."""
    before, after = result.progress.before, result.progress.after
    metric = after.get("metric")
    if metric is None:
        return "stopped early" if result.progress.stopped else "done"
    return f"{metric} {before[metric]:.3f} -> {after[metric]:.3f}" if metric in before else f"{metric} {after[metric]:.3f}"
