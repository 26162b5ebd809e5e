"""Train every method on the same rows of SST-2, at its recommended rate for this base, with three seeds; print the scores.

    python benchmarks/methods_sst2.py --data DIR [--methods lora full ...] [--seeds 0 1 2]

DIR holds train_full.tsv and dev.tsv. Every run is the library's own: the embedded base, the same rows, the same number of
steps, the method's defaults. Scores are on the 872 rows of dev.tsv, by the likelier of the two words. A run that is finished
is in the results file and is not made again; a run that was stopped goes on; several processes may share the work. With
--search FACTOR ... the first seed is trained, on fewer phrases, at multiples of each method's recommended rate and scored on
sentences held out of train_full.tsv: no label of dev.tsv is looked at. Its results have a file of their own; the rate with the
least loss there is what a method's `small_lr` should be.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import tsugiki as tg
from tsugiki.compare.store import locked
from tsugiki.config import DataConfig, RunConfig, TrainConfig
from tsugiki.data import Columns, Conversation, load_conversations
from tsugiki.evaluate.score import wilson
from tsugiki.methods import METHODS, make
from tsugiki.sites import width
from tsugiki.train.loop import Interrupted
from tsugiki.train.rows import Rows
from tsugiki.train.run import run

RESULTS = Path(__file__).parent / "results" / "methods_sst2.json"
SEARCH = RESULTS.with_name("methods_sst2_search.json")
ROWS, SEARCH_ROWS = 16000, 10000
COLUMNS = Columns(prompt="{sentence}\nThis was", completion=" {label}", labels={"0": "bad", "1": "good"})
WORDS = range(3, 9)                                   # length of the phrases trained on: short ones teach most for their tokens
HELD_OUT = 300                                        # sentences of train_full.tsv that a search scores on
LAST = 100                                            # steps whose mean is the training loss that is reported
PASS = 0.70                                           # what every method should reach; those that do not need a reason:
LARGE = "prompts want a large base: in Lester et al. 2021 (arXiv:2104.08691, figure 1) the gap closes at 10 billion parameters"
WHY = {
    "prompt": f"does not fit: its training loss is above that of guessing; {LARGE}",
    "ptuning": f"does not fit: its training loss is above that of guessing; {LARGE}",
    "prefix": "hardly fits: its training loss is about that of guessing; fixed keys and values add to what the frozen attention "
              "computes, and change none of it",
    "llama_adapter": "hardly fits: its training loss is about that of guessing; fixed prompts add to what the frozen attention "
                     "computes, and change none of it",
    "bitfit": "hardly fits: its training loss is little below that of guessing; the same vector is added at every token, so what "
              "tells two phrases apart is left to the frozen weights",
    "ia3": "fits less than those above 0.70 (training loss): it trains few numbers, a factor a feature",
    "ln_tuning": "fits less than those above 0.70 (training loss): it trains few numbers, a factor a feature of the norms",
    "reft": "fits less than those above 0.70 (training loss): it changes a subspace of 8 dimensions a layer, at some tokens",
}


@dataclass(frozen=True)
class Setup:
    """What all runs of a results file share."""
    rows: int
    epochs: float
    batch_size: int
    dtype: str

    def train(self, lr: float, seed: int) -> TrainConfig:
        return TrainConfig(epochs=self.epochs, batch_size=self.batch_size, dtype=self.dtype, lr=lr, seed=seed,
                           log_steps=1)


@dataclass(frozen=True)
class Sentences:
    """What is trained on, what rates are chosen on, what is reported. No phrase trained on is a piece of a sentence scored."""
    train: list[Conversation]
    held_out: list[Conversation]
    dev: list[Conversation]


def read(data: str, count: int) -> Sentences:
    """The first `count` phrases of WORDS words, and HELD_OUT whole sentences, of train_full.tsv in an order drawn once; dev.tsv."""
    rows = load_conversations([f"{data}/train_full.tsv"], "auto", COLUMNS)
    dev = load_conversations([f"{data}/dev.tsv"], "auto", COLUMNS)
    random.Random(0).shuffle(rows)
    held_out = [c for c in rows if _text(c).endswith(" .") and len(_text(c).split()) >= 10][:HELD_OUT]
    whole = "\n".join(_text(c) for c in (*held_out, *dev))
    return Sentences([c for c in rows if len(_text(c).split()) in WORDS and _text(c) not in whole][:count], held_out, dev)


def _text(c: Conversation) -> str:
    return " ".join(c.messages[0].content.removesuffix("\nThis was").split())


class Bench:
    """The base, loaded once, and one run after another on it."""

    def __init__(self, setup: Setup, rows: Sequence[Conversation], scored: Sequence[Conversation]):
        self.setup, self.rows, self.scored = setup, Rows(list(rows), [], f"{len(rows)} phrases of SST-2"), scored
        self.model, self.tokenizer = tg.load(dtype=setup.dtype)

    def score(self, model: torch.nn.Module, adapter: str | None) -> dict:
        found = tg.evaluate(model, self.tokenizer, self.scored, adapter=adapter, metric="choice").plain()
        return {"accuracy": round(found["accuracy"], 4), "loss": round(found["loss"], 4)}

    def one(self, name: str, seed: int, lr: float, out: Path) -> dict:
        """One run, from a fresh adapter (or, for full fine-tuning, a fresh copy of the base) to its score."""
        full = name == "full"
        model = tg.load(dtype="fp32")[0] if full else self.model
        cfg = RunConfig(out=str(out), adapter=name, method={"name": name}, data=DataConfig(), train=self.setup.train(lr, seed))
        try:
            done = run(model, self.tokenizer, cfg, self.rows, quiet=True, say=lambda line: None)
            return {"trained": done.trainable, "steps": done.steps, "tokens": done.progress.tokens, "train_loss": train_loss(out),
                    "seconds": round(done.progress.seconds, 1)} | self.score(model, None if full else name)
        except Interrupted:
            raise
        except (tg.RunError, tg.UserError) as e:      # a rate at which it diverges is a result, too
            return {"failed": str(e)[:200]}
        finally:
            if not full:
                attached = tg.attach(model)
                for there in attached.names():
                    attached.remove(there)


def train_loss(out: Path) -> float:
    """Mean loss of a run's last steps, in nats a trained token."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    last = [line["loss"] for line in lines if "loss" in line][-LAST:]
    return round(sum(last) / len(last), 4)


def earlier(path: Path) -> dict:
    """The results so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record(results: Path, work: Path, change: Callable[[dict], None]) -> None:
    """Read, change, write under a temporary name, rename: another process may be writing as well."""
    with locked(work / "results.lock", wait=True):
        found = earlier(results)
        change(found)
        results.parent.mkdir(parents=True, exist_ok=True)
        temporary = results.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, results)


def environment() -> dict:
    """What speed, and the last digits, depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(), "cpu": cpu,
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "LD_PRELOAD": os.environ.get("LD_PRELOAD", "")}


def make_all(args: argparse.Namespace, bench: Bench, place: str, wanted: Sequence[tuple[str, int, float]]) -> None:
    """Each (method, seed, rate) whose result is not there yet; results go under `place`, by method, seed and rate."""
    for name, seed, lr in wanted:
        key, out = f"{name}/{seed}/{lr:g}", args.work / f"{name}-{seed}-{lr:g}"
        with locked(args.work / f"{out.name}.lock") as mine:
            if not mine or key in earlier(args.results).get(place, {}):
                continue
            try:
                result = bench.one(name, seed, lr, out)
            except Interrupted as e:
                raise SystemExit(f"{key}: {e}") from None
            record(args.results, args.work, lambda found, k=key, r=result: found.setdefault(place, {}).update({k: r}))
        print(place, key, json.dumps(result), flush=True)


def study(args: argparse.Namespace, setup: Setup) -> None:
    """A search on sentences held out, or every method and seed on dev.tsv."""
    there = earlier(args.results).get("setup", vars(setup))
    if there != vars(setup):
        raise SystemExit(f"{args.results}: was made with {there}, not {vars(setup)}; choose another --results")
    rows = read(args.data, setup.rows)
    bench = Bench(setup, rows.train, rows.held_out if args.search else rows.dev)
    base = "base_held_out" if args.search else "base"
    score = earlier(args.results).get(base) or bench.score(bench.model, None)
    about = {"setup": vars(setup), "words": f"{WORDS.start} to {WORDS.stop - 1}", base: score, "environment": environment(),
             "width": width(bench.model)}
    record(args.results, args.work, lambda found: found.update(about))
    rates = {name: METHODS[name].rate(about["width"]) if args.lr is None else args.lr for name in args.methods}
    if args.search:
        return make_all(args, bench, "search", [(name, args.seeds[0], float(f"{rate * factor:.2g}"))
                                                for factor in args.search for name, rate in rates.items()])
    make_all(args, bench, "runs", [(name, seed, rates[name]) for seed in args.seeds for name in args.methods])
    show(earlier(args.results), rates)


def reason(name: str, accuracy: float, scored: int = 872) -> str:
    """Why a method's mean accuracy is below PASS, or "" where it is not. SystemExit for one that nobody has looked into."""
    if accuracy >= PASS:
        return ""
    low, high = wilson(accuracy * scored, scored)
    near = f"{PASS:.2f} is within the score's 95 % interval, {low:.3f} to {high:.3f}" if high >= PASS else ""
    if not near and name not in WHY:
        raise SystemExit(f"{name}: {accuracy:.3f} is below {PASS:.2f} and WHY in benchmarks/{Path(__file__).name} gives no reason")
    return "; ".join(filter(None, (near, WHY.get(name))))


def of_method(found: dict, name: str, lr: float) -> list[dict]:
    """The runs of a method at a rate, by seed."""
    return [r for key, r in sorted(found.get("runs", {}).items()) if key.startswith(f"{name}/") and key.endswith(f"/{lr:g}")]


def show(found: dict, rates: dict[str, float]) -> None:
    """A line a method: mean, least and most of its seeds."""
    print(f"base alone {found['base']['accuracy']:.3f}; {found['environment']}")
    print(f"{'method':16} {'accuracy':>8}  {'least':>5}  {'most':>5}  seeds  {'rate':>7}  {'trained':>9}  seconds")
    for name, lr in rates.items():
        of = of_method(found, name, lr)
        if good := [r for r in of if "failed" not in r]:
            a = [r["accuracy"] for r in good]
            print(f"{name:16} {sum(a) / len(a):8.3f}  {min(a):.3f}  {max(a):.3f}  {len(a):5}  {lr:7g}  "
                  f"{good[0]['trained']:9,}  {sum(r['seconds'] for r in good) / len(good):7.0f}")
        for r in of:
            if "failed" in r:
                print(f"{name:16} failed at {lr:g}: {r['failed']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of train_full.tsv and dev.tsv")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, help=f"rows of the training file ({ROWS}; of a search {SEARCH_ROWS})")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--lr", type=float, help="one rate for all, instead of each method's own")
    parser.add_argument("--search", nargs="+", type=float, metavar="FACTOR",
                        help="try these multiples of the recommended rates, scored on held-out training sentences")
    parser.add_argument("--work", type=Path, default=Path("runs/methods"))
    parser.add_argument("--results", type=Path, help=f"{RESULTS.name}, of a search {SEARCH.name}, beside this file's")
    args = parser.parse_args()
    for name in args.methods:
        make(name)                                    # a method that cannot be made without settings is told at once
    args.results = args.results or (SEARCH if args.search else RESULTS)
    study(args, Setup(args.rows or (SEARCH_ROWS if args.search else ROWS), args.epochs, args.batch_size, args.dtype))


if __name__ == "__main__":
    main()
