"""Many jobs trained together beside the same jobs one after another: optimizer steps of all of them, on one base.

    python benchmarks/joint_speed.py [--jobs 8] [--rows 1 2 4] [--methods lora] [--shapes embedded smollm2-135m] [--rounds 7]

Each side has adapters of its own with the same start. In every round each job takes its next step on the same rows of random
tokens, on both sides, which begin in turns; the losses are compared. A step is what the library does: cut, forward, backward,
clip, AdamW. The ratio is the median of the rounds'. Kept in benchmarks/results/joint_speed.json.
"""
from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import tsugiki as tg
from tsugiki.config import RunConfig, TrainConfig
from tsugiki.data.mixture import Mixture
from tsugiki.data.render import Example
from tsugiki.memory import keep_freed_memory
from tsugiki.methods import make
from tsugiki.train.fitting import overhead
from tsugiki.train.layout import quick
from tsugiki.train.loop import Job
from tsugiki.train.optim import adamw
from tsugiki.train.run import freeze_but, layers_of, route_of
from tsugiki.train.step import Part, gradients
from tsugiki.train.together import forwards, route

sys.path.insert(0, str(Path(__file__).resolve().parent))
from speed.report import cpu_name  # noqa: E402
from speed.shapes import COMMON, SHAPES  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "joint_speed.json"
MOST, TOLERANCE = 4096, 0.02                          # tokens of a forward; relative difference of a step's losses in bfloat16


def model_of(shape: str, dtype: torch.dtype) -> nn.Module:
    """The embedded base, or random weights at a real model's shape."""
    if shape == "embedded":
        return tg.load("embedded", dtype={torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype])[0]
    torch.manual_seed(0)
    kind, values = SHAPES[shape]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | values)).to(dtype).eval()


class Side:
    """All jobs with adapters of their own on a model of their own."""

    def __init__(self, model: nn.Module, args: argparse.Namespace, rows: int):
        adapters, draw, vocabulary = tg.attach(model), random.Random(1), model.get_input_embeddings().weight.shape[0]
        self.model, self.jobs, self.optimizers = model, [], []
        device = model.get_input_embeddings().weight.device
        for n in range(args.jobs):
            method = args.methods[n % len(args.methods)]
            adapter = adapters.add(f"job{n}", make(method, **({"rank": args.rank} if method == "lora" else {})), seed=n)
            trained = [t >= args.length * (1 - args.trained) for t in range(args.length)]
            made = [Example([draw.randrange(3, vocabulary) for _ in trained], trained, f"row {i}") for i in range(4 * rows)]
            cfg = RunConfig(adapter=adapter.name, train=TrainConfig(batch_size=rows, max_tokens=MOST))
            self.jobs.append(Job(model, adapter.parameters(), made, cfg.train, 1e-3, 0, "pad" if adapter.virtual else "pack",
                                 Mixture.alone(len(made), rows, n), route=route_of(cfg, adapter), adapter=adapter,
                                 overhead=overhead(layers_of(model), device)))
        self.optimizers = [adamw(job.params, job.lr, 0.0, 0.999) for job in self.jobs]
        freeze_but(model, {f"{n}/{k}": p for n, job in enumerate(self.jobs) for k, p in job.params.items()})

    def step(self, chosen: list[int], step: int) -> list[float]:
        """The next optimizer step of some jobs, in forwards they share; their losses."""
        jobs = [self.jobs[n] for n in chosen]
        parts = [Part(params=self.jobs[n].params, optimizer=self.optimizers[n], clip=1.0, step=step + 1, where=str) for n in chosen]
        batches = forwards(jobs, [job.mixture.rows(step) for job in jobs], MOST)
        gradients(self.model, batches, parts, route=lambda batch: route(jobs, [step] * len(jobs), batch))
        return [part.update().loss for part in parts]


@contextmanager
def timed(took: list[float]) -> Iterator[None]:
    began = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    took.append(time.perf_counter() - began)


def measure(shape: str, rows: int, args: argparse.Namespace) -> dict:
    """Seconds of a step of all jobs, together and one after another, and their ratio."""
    dtype = torch.float32 if args.fp32 else torch.bfloat16
    base = model_of(shape, dtype).to(args.device)
    one, many = Side(copy.deepcopy(base), args, rows), Side(base, args, rows)
    everyone, alone, together, worst = list(range(args.jobs)), [], [], 0.0
    with quick(one.model, True), quick(many.model, True):
        for step in range(args.warmup + args.rounds):
            losses: dict[bool, list[float]] = {}
            for joint in (step % 2 == 0, step % 2 == 1):
                with timed(together if joint else alone):
                    losses[joint] = many.step(everyone, step) if joint else [one.step([n], step)[0] for n in everyone]
            worst = max(worst, *(abs(a - b) / b for a, b in zip(losses[True], losses[False], strict=True)))
            assert worst <= TOLERANCE, f"{shape}: the losses differ by {worst:.2%} in step {step + 1}"
    alone, together = alone[args.warmup:], together[args.warmup:]
    ratios = [a / b for a, b in zip(alone, together, strict=True)]
    return {"shape": shape, "rows": rows, "one_after_another": statistics.median(alone), "together": statistics.median(together),
            "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios), "losses_differ_by": worst}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--shapes", nargs="+", default=["embedded", "smollm2-135m"], choices=["embedded", *SHAPES])
    p.add_argument("--jobs", type=int, default=8)
    p.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4], help="rows of a job's step")
    p.add_argument("--methods", nargs="+", default=["lora"], help="of the jobs, in turn")
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--length", type=int, default=128, help="tokens of a row")
    p.add_argument("--trained", type=float, default=0.25, help="share of a row's tokens that is trained, at its end")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--warmup", type=int, default=2)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--fp32", action="store_true")
    p.add_argument("--out", type=Path, default=RESULTS)
    args = p.parse_args()
    keep_freed_memory()
    found = []
    for shape in args.shapes:
        for rows in args.rows:
            found.append(r := measure(shape, rows, args))
            print(f"{shape:>14}  {args.jobs} jobs x {rows} rows of {args.length}: {r['ratio']:.2f}x ({r['least']:.2f} to "
                  f"{r['most']:.2f}), {r['one_after_another']:.3f} s one after another, {r['together']:.3f} s together", flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "shapes")}
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu_name()
    args.out.write_text(json.dumps({"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
                                    "settings": settings, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
