"""Fine-tune the embedded base on TinyStories with none, a little and more of its own novels replayed; print both losses.

    python benchmarks/replay_study.py --data DIR [--work runs/replay] [--steps 12] [--seeds 0 1 2]

DIR holds tinystories-sample/ and novels/. Runs of one seed read the same stories in the same order, so the target tokens are
equal; replayed novels come on top of them. The source loss is on passages of the two novels that the base has never seen.
Runs that are in the results file are not made again, and a run that was stopped goes on, so the command can be given again.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import random
from pathlib import Path
from statistics import mean, stdev

import torch
import transformers

import tsugiki as tg
from tsugiki.compare.stats import quantile
from tsugiki.train.guard import rise

RESULTS = Path(__file__).parent / "results" / "replay_study.json"
RATIOS, METHODS = (0.0, 0.05, 0.2), ("full", "lora")
HELD, REPLAYED = 32, 400                              # held-out passages of each side; passages of novels that may be replayed


def pretraining():
    """scripts/pretrain_base.py: how the base's own text was cut, and what it never saw."""
    spec = importlib.util.spec_from_file_location("pretrain_base", Path(__file__).parents[1] / "scripts" / "pretrain_base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, rows: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


def prepare(data: Path, work: Path) -> None:
    """Stories to train on and held out, novels to replay (the base has read them) and held out (it has not)."""
    work.mkdir(parents=True, exist_ok=True)
    base = pretraining()
    stories = base.passages((data / "tinystories-sample" / "tinystories.txt").read_text(encoding="utf-8"))
    write(work / "stories.jsonl", stories[:-HELD])
    write(work / "stories-held.jsonl", stories[-HELD:])
    read, unread = [], []
    for path in sorted((data / "novels").glob("*.txt")):
        rows = base.passages(path.read_text(encoding="utf-8", errors="replace"))
        (unread if path.stem in base.HELD_OUT else read).extend(rows)
    write(work / "novels.jsonl", random.Random(0).sample(read, REPLAYED))
    write(work / "novels-held.jsonl", random.Random(0).sample(unread, HELD))


def run(work: Path, name: str, method: str, ratio: float, seed: int, steps: int, **train) -> dict:
    """One run at the method's own learning rate; what it measured."""
    data = {name: str(work / f"{name}.jsonl") for name in ("stories", "stories-held", "novels", "novels-held")}
    cfg = tg.RunConfig(
        base="embedded", out=str(work / name.replace("/", "-")), method={"name": method},
        data=tg.DataConfig(files=[data["stories"]], eval=[data["stories-held"]], format="text", replay=[data["novels"]],
                           replay_ratio=ratio, source_eval=[data["novels-held"]]),
        train=tg.TrainConfig(**{"steps": steps, "batch_size": 8, "max_length": 256, "seed": seed, "log_steps": 1, "dtype": "bf16",
                                "forgetting": "off"} | train))
    result = tg.train_run(cfg, quiet=True)
    values = result.plain()
    lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    tokens = {name: s["tokens"] for name, s in last["sources"].items()} if ratio else {"data": last["tokens"], "source": 0}
    return {"target_before": values["before"]["loss"], "target": values["after"]["loss"],
            "source_before": values["sources"]["source"]["before"]["loss"], "source": values["sources"]["source"]["after"]["loss"],
            "target_tokens": tokens["data"], "source_tokens": tokens["source"], "steps": values["steps"],
            "stopped": values["stopped"], "seconds": values["seconds"],
            "looks": [(line["step"], round(line["eval_sources"]["source"]["loss"], 4)) for line in lines if "eval_sources" in line]}


def spread(values: list[float]) -> str:
    """Mean and half-width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ± {quantile(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values)):.3f}"


def table(runs: dict) -> str:
    lines = ["| method | replay | seeds | target loss | source loss | change of it | target tokens | replayed tokens |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for method in METHODS:
        for ratio in RATIOS:
            found = [r for key, r in runs.items() if key.startswith(f"{method}/{ratio:g}/")]
            if found:
                changes = [r["source"] - r["source_before"] for r in found]
                tokens = [f"{mean(r[k] for r in found):,.0f}" for k in ("target_tokens", "source_tokens")]
                lines.append(" | ".join(["| " + method, f"{ratio:g}", str(len(found)), spread([r["target"] for r in found]),
                                         spread([r["source"] for r in found]), spread(changes), *tokens]) + " |")
    return "\n".join(lines)


def save(path: Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=Path("runs/replay"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if not (args.work / "novels-held.jsonl").exists():
        prepare(args.data, args.work)
    found = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {"runs": {}}
    if found.setdefault("steps", args.steps) != args.steps:
        parser.error(f"{args.results} holds runs of {found['steps']} steps; give another --results")
    found["environment"] = {"torch": torch.__version__, "transformers": transformers.__version__,
                            "python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}
    for seed in args.seeds:
        for method in METHODS:
            for ratio in RATIOS:
                key = f"{method}/{ratio:g}/{seed}"
                if key not in found["runs"]:
                    found["runs"][key] = run(args.work, key, method, ratio, seed, args.steps)
                    save(args.results, found)
        if "guard" not in found:                      # the same run as full/0/0, but it may not forget more than a little
            rises = [found["runs"][f"full/0/{args.seeds[0]}"][k] for k in ("source_before", "source")]
            limit = round(rise({"source": {"loss": rises[0]}}, {"source": {"loss": rises[1]}}) / 3, 4)
            found["guard"] = {"limit": limit} | run(args.work, "guard", "full", 0.0, args.seeds[0], args.steps, eval_steps=2,
                                                    forgetting="stop", forgetting_limit=max(limit, 0.0))
            save(args.results, found)
    guard = found["guard"]
    print(table(found["runs"]))
    print(f"\nguard, limit {guard['limit']:.2%}: {guard['stopped'] or 'not stopped'}; source loss {guard['source_before']:.3f} -> "
          f"{guard['source']:.3f}, target loss {guard['target_before']:.3f} -> {guard['target']:.3f}; looks {guard['looks']}")


if __name__ == "__main__":
    main()
