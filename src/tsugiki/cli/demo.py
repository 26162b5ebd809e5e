"""`tsugiki demo`: the whole road once, on the embedded base: fine-tune, score, sample, merge, check."""
from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tsugiki.errors import UserError

if TYPE_CHECKING:
    from tsugiki.evaluate.score import Score

HELP = "Fine-tune the embedded base on the embedded tasks with one LoRA, and show what changed. Takes a few minutes on a laptop."
TASKS = {"record": "a record as a sentence", "intent": "a request's intent", "arithmetic": "sums in words",
         "past": "present to past"}


def add(commands) -> None:
    from tsugiki.cli.main import common
    p = commands.add_parser("demo", help="the whole road in a few minutes", description=HELP)
    p.add_argument("--out", default="runs/demo", help="folder of the run (%(default)s)")
    p.add_argument("--method", default="lora", help="any method (%(default)s)")
    p.add_argument("--epochs", type=float, default=3.0, help="passes over the rows (%(default)s)")
    p.add_argument("--lr", type=float, default=None, help="peak learning rate (default: the method's)")
    p.add_argument("--again", action="store_true", help="delete the folder's earlier run first")
    common(p, base=False)
    p.set_defaults(run=run, parser=p)


def forget(out: Path) -> None:
    """Delete the demo's earlier run and merged model in `out`; UserError for a folder that is not the demo's."""
    run = out / "run"
    if run.exists() and not (run / "run.yaml").is_file():
        raise UserError(f"{run}: holds no run, so it is not deleted; choose another --out")
    for folder in (run, out / "merged"):
        shutil.rmtree(folder, ignore_errors=True)


def improved(before: Score, after: Score) -> bool:
    """At least 0.9, or doubled; and either way the two 95 % intervals do not touch, since twice nothing is nothing."""
    apart = after.interval[0] > before.interval[1]
    return apart and (after.value >= 0.9 or after.value >= 2 * before.value)


def run(args: argparse.Namespace) -> int:
    from importlib.resources import files

    from tsugiki import formats
    from tsugiki.adapters import attach
    from tsugiki.api import train_run
    from tsugiki.cli.main import emit
    from tsugiki.cli.tables import table
    from tsugiki.config import EvalConfig, RunConfig, build
    from tsugiki.data import Renderer, load_conversations
    from tsugiki.evaluate.score import evaluate
    from tsugiki.formats.export import merge_to_folder
    from tsugiki.load import load, pad_id, stored_dtype
    from tsugiki.train.log import console
    say = (lambda line: None) if args.quiet else (lambda line: console().print(line, markup=False))
    out = Path(args.out)
    if args.again:
        forget(out)
    root = Path(str(files("tsugiki") / "assets" / "demo"))
    tests = {name: load_conversations([root / name / "test.jsonl"]) for name in TASKS}
    scoring = EvalConfig(metric="exact", max_new_tokens=24, max_rows=100)

    def scores(model, tokenizer, adapter: str | None) -> dict:
        renderer = Renderer(tokenizer)
        with attach(model).use(adapter):
            return {name: evaluate(model, renderer, rows, scoring, pad_id(tokenizer), 512) for name, rows in tests.items()}

    say("scoring the base as it is ...")
    model, tokenizer = load("embedded")
    before = scores(model, tokenizer, None)
    cfg = build(RunConfig, {"out": str(out / "run"), "method": {"name": args.method}, "adapter": "demo",
                            "data": {"files": [str(root / name / "train.jsonl") for name in TASKS]},
                            "train": {"epochs": args.epochs, "lr": args.lr, "batch_size": 16, "seed": 0}})
    result = train_run(cfg, quiet=args.quiet)
    say("scoring the fine-tuned model ...")
    model, tokenizer = load("embedded", dtype="fp32")
    adapters = attach(model)
    formats.load(adapters, "demo", result.saved)
    after = scores(model, tokenizer, "demo")
    shutil.rmtree(out / "merged", ignore_errors=True)
    merged = merge_to_folder(model, tokenizer, adapters, ["demo"], out / "merged", dtype=stored_dtype("embedded"),
                             stop_ids=Renderer(tokenizer).stop_ids)
    rows = [(name, f"{before[name].value:.3f}", f"{after[name].value:.3f}",
             "{:.3f} to {:.3f}".format(*after[name].interval), after[name].n, text) for name, text in TASKS.items()]
    samples = [(tests[name][0], before[name].answers[0], after[name].answers[0]) for name in list(TASKS)[:3]]
    text = [table(("task", "before", "after", "95 % interval", "n", "what"), rows), ""]
    for c, was, now in samples:
        text += [c.prompt_text, f"  before:   {' '.join(was.split())[:110]}", f"  after:    {now.strip()}",
                 f"  expected: {c.reference.strip()}", ""]
    error = f"reloaded logits within {merged['relative_error']:.2%} of the adapter's effect"
    text += [f"merged   {merged['out']}  check passed: {error}",
             f"adapter  {result.saved}", f"report   {result.out / 'report.html'}", "",
             f"talk to it:  tsugiki chat --adapter {result.saved}"]
    passed = {name: improved(before[name], after[name]) for name in TASKS}
    emit(args, {"before": {n: s.plain() for n, s in before.items()}, "after": {n: s.plain() for n, s in after.items()},
                "merge": merged, "report": str(result.out / "report.html"), "improved": passed}, "\n".join(text))
    return 0 if all(passed.values()) else 1
