"""A training step of several methods beside LoRA's: the same model, the same rows, in turns.

    python benchmarks/method_speed.py [--shape smollm2-135m] [--methods lora series parallel prefix] [--rows 16] [--length 160]

Random weights in bfloat16, random rows of unlike lengths, each method with its defaults (LoRA of rank 8) through the library's own
step, in the layout a run would choose. Medians; the results are merged into benchmarks/results/method_speed.json.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import tsugiki as tg
from tsugiki.config import TrainConfig
from tsugiki.data.batch import collate, micro_batches
from tsugiki.data.render import Example
from tsugiki.memory import keep_freed_memory
from tsugiki.methods import make
from tsugiki.train.layout import quick
from tsugiki.train.optim import adamw
from tsugiki.train.step import train_step

sys.path.insert(0, str(Path(__file__).resolve().parent))
from speed.report import cpu_name  # noqa: E402
from speed.shapes import SHAPES  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "method_speed.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=["lora", "series", "parallel", "prefix"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=160, help="tokens of a row on average; they vary by half of it")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    keep_freed_memory()
    family, values = SHAPES[args.shape]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values), dtype=torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(args.length // 2, args.length * 3 // 2, (args.rows,), generator=g).tolist()
    rows = [Example(torch.randint(5, values["vocab_size"], (n,), generator=g).tolist(), [i >= n // 3 for i in range(n)], "row")
            for n in lengths]
    steps = {name: stepper(model, name, rows, lengths) for name in dict.fromkeys(["lora", *args.methods])}
    took: dict[str, list[float]] = {name: [] for name in steps}
    with quick(model, True) as packs:
        assert packs
        for n in range(args.warmup + args.steps):
            for name, step in steps.items():
                began = time.perf_counter()
                result = step()
                assert result.norm > 0 and result.tokens == sum(lengths)
                took[name] += [time.perf_counter() - began] * (n >= args.warmup)
    report(args, {name: [statistics.median(ts), min(ts), max(ts)] for name, ts in took.items()}, sum(lengths))


def stepper(model: nn.Module, name: str, rows: list[Example], lengths: list[int]):
    """A function that takes one optimizer step of a new adapter of this method."""
    adapter = tg.attach(model).add(name.replace("+", "_"), make(name))
    params, cfg = adapter.parameters(), TrainConfig()
    model.requires_grad_(False)
    whole = [n + adapter.virtual for n in lengths]
    batches = [collate(rows, cut, 0, virtual=adapter.virtual)
               for cut in micro_batches(whole, range(len(rows)), "pack", cfg.forward_tokens)]
    optimizer = adamw(params, 1e-4, 0.0, 0.999)

    def step():
        for p in params.values():
            p.requires_grad_(True)
        try:
            return train_step(model, batches, params, optimizer, clip=1.0, step=2, where=str,
                              route=lambda batch: {"adapter_ids": adapter.name})
        finally:
            model.requires_grad_(False)
    return step


def report(args: argparse.Namespace, found: dict[str, list[float]], tokens: int) -> None:
    print(f"{args.shape}, {tokens} tokens in {args.rows} rows, {torch.get_num_threads()} threads; seconds a step, "
          f"median of {args.steps}")
    print("| method | seconds (min-max) | of LoRA's |\n| --- | --- | --- |")
    for name, (middle, least, most) in found.items():
        print(f"| {name} | {middle:.2f} ({least:.2f}-{most:.2f}) | {middle / found['lora'][0]:.2f} |")
    there = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    there[f"{args.shape}/{cpu_name()}"] = {
        "tokens": tokens, "rows": args.rows, "steps": args.steps, "threads": torch.get_num_threads(),
        "seconds": {n: [round(t, 3) for t in ts] for n, ts in found.items()}}
    RESULTS.write_text(json.dumps(dict(sorted(there.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
