"""Fine-tune on real data with the commands a user would give, and print what came out.

    python benchmarks/real_data.py --data DIR [--only sst2-lora sst2-full e2e-lora tiny-lora] [--work runs/real]

DIR holds glue/SST-2, e2e/original and models/tinystories-656k. Each run is `tsugiki train`, so it can be stopped and given again.
Results go to benchmarks/results/real_data.json with the environment they were made in.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

SST2 = ["--data", "{data}/glue/SST-2/train_full.tsv", "--eval-data", "{data}/glue/SST-2/dev.tsv",
        "--prompt", r"{{sentence}}\nThis was",
        "--completion", " {{label}}", "--labels", "0=bad,1=good", "--metric", "choice"]
E2E = ["--data", "{data}/e2e/original/devset.csv", "--eval-data", "{data}/e2e/original/testset_w_refs.csv",
       "--prompt", r"{{mr}}\nText:",
       "--completion", " {{ref}}", "--metric", "bleu"]
RUNS = {
    "sst2-lora": [*SST2, "--set", "method.rank=8", "--lr", "1.5e-3", "--epochs", "2", "--batch-size", "64"],
    "sst2-full": [*SST2, "--method", "full", "--lr", "5e-4", "--epochs", "2", "--batch-size", "64"],
    "tiny-lora": [*SST2, "--base", "{data}/models/tinystories-656k", "--set", "method.rank=8", "--lr", "4e-3", "--epochs", "2",
                  "--batch-size", "64", "--dtype", "fp32"],
    "e2e-lora": [*E2E, "--set", "method.rank=8", "--lr", "4e-3", "--epochs", "3", "--batch-size", "32"],
}


def earlier(path: Path) -> dict:
    """The results so far."""
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--work", type=Path, default=Path("runs/real"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "real_data.json")
    args = parser.parse_args()
    for name in args.only:
        flags = [f.format(data=args.data) for f in RUNS[name]]
        began = time.time()
        done = subprocess.run([sys.executable, "-m", "tsugiki.cli.main", "train", *flags, "--out", str(args.work / name), "--json"],
                              stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)
        result = json.loads(done.stdout)
        found = earlier(args.results)                 # read as late as possible: another process may have written meanwhile
        keep = ("steps", "tokens", "seconds", "trainable", "total", "before", "after")
        shown = " ".join(f if f.startswith("-") else repr(f) for f in RUNS[name])
        command = "tsugiki train " + shown.replace("{{", "{").replace("}}", "}")
        found[name] = {k: result[k] for k in keep} | {"command": command, "wall_seconds": round(time.time() - began, 1)}
        found[name]["environment"] = {
            "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
            "cores": os.cpu_count(), "machine": platform.machine(), "LD_PRELOAD": os.environ.get("LD_PRELOAD", "")}
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(found, indent=1) + "\n")
    found = earlier(args.results)
    for name in (n for n in RUNS if n in found):
        r = found[name]
        metric = r["after"]["metric"]
        print(f"{name:10}  {metric} {r['before'][metric]:.3f} -> {r['after'][metric]:.3f}  n {r['after']['n']}  "
              f"loss {r['before']['loss']:.3f} -> {r['after']['loss']:.3f}  {r['trainable']:,} trained  {r['seconds']:.0f} s")


if __name__ == "__main__":
    main()
