"""How fast fine-tuning is beside what a user would take instead: one command, sides in turns, the same rows and seed.

    python benchmarks/train_speed.py [--shape smollm2-135m] [--method lora] [--data gsm8k --data-dir DIR] [--sides ...]

Each side is a process of its own that does one optimizer step when it is its turn, so all see the same machine. DIR holds
gsm8k/train.jsonl and tokenizers/gpt2/tokenizer.json; without it, random rows of like lengths. Rows are never zeros. A run
fails when a gradient norm is not above zero, when sides that see the same rows do not count the same tokens, or when their
losses are apart. Results are merged into a JSON file; --write-docs makes docs/benchmarks.md from it.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from speed import report  # noqa: E402
from speed.link import Side  # noqa: E402
from speed.shapes import SHAPES, SOURCES, flops, linears, make_rows, write_base  # noqa: E402
from speed.sides import LR, SAME_ROWS, SIDES, offers  # noqa: E402

APART = 0.02                                          # largest relative difference of the mean losses


def environment(threads: int) -> dict[str, str]:
    """The variables of every process that measures, beside what is set anyway. Idle ones wait for a pipe: none spins."""
    path = os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path}


def fits(args, rows: list) -> bool:
    """Whether all sides can live at once, by a rough count: each holds weights and Python, one also a padded batch's tensors."""
    c = SHAPES[args.shape][1]
    weights = sum(n * k * times for _, n, k, times in linears(args.shape)) * (16 if args.method == "full" else 3)
    batch = args.batch_size * min(args.max_length, 1.5 * sum(len(p) + len(q) for p, q in rows) / len(rows))
    working = batch * (12 * c["vocab_size"] + 80 * c["num_hidden_layers"] * c["hidden_size"])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return False
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    return len(args.sides) * (weights + 5e8) + 2 * working < 0.8 * free


def start(name: str, job: dict, env: dict) -> Side:
    shutil.rmtree(Path(job["work"]) / f"run-{name}", ignore_errors=True)    # else Tsugiki would go on with the run there
    path = Path(job["work"]) / "job.json"
    path.write_text(json.dumps(job))
    return Side(name, [sys.executable, "-m", "speed.sides", str(path), name], Path(job["work"]) / f"{name}.log", env)


def alternate(names: list[str], job: dict, warmup: int, env: dict, say) -> dict[str, dict]:
    """Start the sides, warm each up, then let them step in turns. Returns by name: steps, first step, memory; or an error."""
    sides: dict[str, Side] = {}
    found: dict[str, dict] = {}

    def attempt(name: str, work) -> None:
        if "error" in found.setdefault(name, {"steps": [], "warm": []}):
            return
        try:
            work()
        except (RuntimeError, OSError, ValueError) as e:
            found[name]["error"] = str(e)
            say(f"  {e}")
            if name in sides:
                sides[name].kill()

    def begin(name: str) -> None:
        say(f"  {SIDES[name]}: starting")
        sides[name] = start(name, job, env)
        found[name]["warm"] = [sides[name].step() for _ in range(warmup)]
        found[name]["first"] = sides[name].load + found[name]["warm"][0]["seconds"]
        sides[name].forget()

    try:
        for name in names:
            attempt(name, lambda name=name: begin(name))
        for n in range(job["steps"] - warmup):
            for name in names if n % 2 == 0 else names[::-1]:
                attempt(name, lambda name=name: found[name]["steps"].append(sides[name].step()))
        for name in names:
            attempt(name, lambda name=name: found[name].update(sides[name].stop()))
    finally:
        for side in sides.values():
            side.kill()
    return found


def blocks(names: list[str], job: dict, warmup: int, env: dict, say) -> dict[str, dict]:
    """For sides that do not fit in memory at once: one process at a time, each side twice, half of the steps each time."""
    found: dict[str, dict] = {}
    job = job | {"steps": warmup + -(-(job["steps"] - warmup) // 2)}
    for turn in (names, names[::-1]):
        for name in turn:
            one = alternate([name], job, warmup, env, say)[name]
            there = found.setdefault(name, one)
            if there is not one:
                there["steps"] = there["steps"] + one["steps"]
                there.update({k: max(there.get(k, 0), one[k]) for k in ("steps_gb", "peak_gb") if k in one})
                there.update({k: v for k, v in one.items() if k == "error"})
    return found


def check(found: dict[str, dict]) -> list[str]:
    """What is wrong with a run, a line each: nothing trained, other tokens, another loss."""
    wrong = [f"{name}: {side['error']}" for name, side in found.items() if "error" in side]
    good = {name: side["warm"] + side["steps"] for name, side in found.items() if "error" not in side}
    for name, steps in good.items():
        wrong += [f"{name}: the gradient norm of step {n + 1} is {s['norm']}: nothing is trained" for n, s in enumerate(steps)
                  if not s["norm"] > 0]
        wrong += [f"{name}: the loss of step {n + 1} is {s['loss']}" for n, s in enumerate(steps) if not 0 < s["loss"] < 100]
    ours, theirs = (good.get(name) for name in SAME_ROWS)
    if ours and theirs:
        for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if (a["tokens"], a["supervised"]) != (b["tokens"], b["supervised"]):
                wrong.append(f"step {n + 1}: Tsugiki saw {a['tokens']} tokens and trained {a['supervised']}, "
                             f"Trainer {b['tokens']} and {b['supervised']}")
        if (apart := difference(found)) > APART:
            wrong.append(f"the mean losses of Tsugiki and Trainer are {apart:.2%} apart, allowed are {APART:.0%}")
    return wrong


def difference(found: dict[str, dict]) -> float:
    """How far the mean losses of the two sides with the same rows are apart, relative to the second."""
    means = [sum(s["loss"] for s in both) / len(both) for name in SAME_ROWS if (both := found[name]["warm"] + found[name]["steps"])]
    return abs(means[0] - means[1]) / means[1]


def measure(args, say) -> dict:
    """One run: everything that goes into the results under its key."""
    folder = Path(args.work).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    base = write_base(args.shape, folder)
    count = (args.warmup + args.steps) * args.batch_size
    data, rows = make_rows(args.shape, args.data, args.data_dir and Path(args.data_dir), count, args.max_length, args.seed)
    if data != args.data:
        say(f"no --data-dir, so {args.data} is not to be had: {SOURCES[data]}")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": " ".join(map(str, p)), "completion": " " + " ".join(map(str, c))}) + "\n"
                            for p, c in rows))
    env = environment(args.threads)
    job = {"base": str(base), "rows": str(path), "work": str(folder), "method": args.method, "device": args.device,
           "compile": "on" if args.compile else "auto",
           "seed": args.seed, "batch_size": args.batch_size, "max_length": args.max_length, "steps": args.warmup + args.steps}
    turns = args.turns if args.turns != "auto" else "step" if args.device == "cpu" and fits(args, rows) else "block"
    say(f"{args.shape}, {args.method}, {data}: {args.warmup} + {args.steps} steps of {args.batch_size} rows, "
        f"turns by {turns}")
    found = (alternate if turns == "step" else blocks)(args.sides, job, args.warmup, env, say)
    tokens = sum(len(p) + len(c) + 1 for p, c in rows)
    trained = sum(len(c) + 1 for _, c in rows)
    per_step = count // args.batch_size
    shapes = [args.shape, str(min(4096, tokens // per_step)), str(trained // per_step), args.method, args.device]
    done = subprocess.run([sys.executable, "-m", "speed.rate", *shapes], check=True, stdout=subprocess.PIPE, text=True, env=env)
    return report.result(args, data, turns, found, json.loads(done.stdout), flops(args.shape, rows, args.method == "full") / tokens,
                         {"tokens": tokens, "trained": trained, "rows": count}, check(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--method", choices=LR, default="lora")
    parser.add_argument("--data", choices=("gsm8k", "full"), default="gsm8k", help="mixed lengths, or rows that are full")
    parser.add_argument("--data-dir", help="folder with gsm8k/train.jsonl and tokenizers/gpt2/tokenizer.json")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=[s for s in SIDES if s != "unsloth"])
    parser.add_argument("--steps", type=int, default=5, help="timed steps a side (%(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, not timed (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="Tsugiki's layers compiled, as in runs so long that it pays")
    parser.add_argument("--turns", choices=("auto", "step", "block"), default="auto",
                        help="step: all sides live at once; block: one at a time; auto: by the memory at hand")
    parser.add_argument("--work", default=str(Path(tempfile.gettempdir()) / "tsugiki-speed"), help="folder of models and logs")
    parser.add_argument("--json", default=str(HERE / "results" / "train_speed.json"), help="results are merged into it")
    parser.add_argument("--write-docs", action="store_true", help="write docs/benchmarks.md from the results and measure nothing")
    args = parser.parse_args()
    if args.write_docs:
        (HERE.parent / "docs" / "benchmarks.md").write_text(report.page(json.loads(Path(args.json).read_text())), encoding="utf-8")
        return
    for name in [s for s in args.sides if not offers(s, args.method)]:
        print(f"{SIDES[name]}: does not train {args.method} here, left out", file=sys.stderr)
        args.sides.remove(name)
    if args.warmup < 1 or args.steps < 1:
        parser.error("--steps and --warmup must be at least 1")
    found = measure(args, lambda line: print(line, file=sys.stderr, flush=True))
    print("\n".join(report.table(found)))
    if found["wrong"]:
        raise SystemExit("\n".join(["", *(f"FAILED: {line}" for line in found["wrong"])]))
    report.merge(Path(args.json), found)


if __name__ == "__main__":
    main()
