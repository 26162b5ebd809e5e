"""Where a training step's time goes: base products, adapter products, head, attention, everything else.

    python benchmarks/step_profile.py [--shape smollm2-135m] [--method lora] [--documents 16] [--length 174] [--compile]

One packed step on random weights and rows, through the library's own step, under torch's profiler. The share of each kind, and
the rate that its products reach beside the rate of a large product alone: what is left over is what could still be won. The
result is kept in benchmarks/results/step_profile.json, from which docs/benchmarks.md has it.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch.profiler import profile
from transformers import AutoConfig, AutoModelForCausalLM

import tsugiki as tg
from tsugiki.config import TrainConfig
from tsugiki.data.batch import collate, micro_batches
from tsugiki.data.render import Example
from tsugiki.memory import keep_freed_memory
from tsugiki.methods import make
from tsugiki.train.compiled import Layers
from tsugiki.train.layout import arranged
from tsugiki.train.optim import adamw
from tsugiki.train.step import train_step

sys.path.insert(0, str(Path(__file__).resolve().parent))
from speed.report import cpu_name  # noqa: E402
from speed.shapes import SHAPES  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "step_profile.json"
THIN = 64                                             # a product with a side up to this is an adapter's


def kind_of(shapes: list, vocabulary: int) -> str:
    """Whose product it is, by the sides of its matrices."""
    sides = [n for s in shapes if len(s) == 2 for n in s]
    if vocabulary in sides:
        return "head products"
    return "adapter products" if min(sides) <= THIN else "base products"


def measure(step, vocabulary: int) -> dict[str, float]:
    """Seconds by kind; attention with all that happens inside of it."""
    with profile(record_shapes=True) as p:
        began = time.perf_counter()
        step()
        whole = time.perf_counter() - began
    found: dict[str, float] = {}
    for e in p.key_averages(group_by_input_shape=True):
        if e.key.startswith("tsugiki::documents"):
            found["attention"] = found.get("attention", 0.0) + e.cpu_time_total / 1e6
        elif e.key in ("Added", "AddedBackward"):     # kernels.low_rank, without the frozen product in it
            found["adapter products"] = found.get("adapter products", 0.0) + e.self_cpu_time_total / 1e6
        elif e.key in ("aten::mm", "aten::addmm"):
            kind = kind_of(e.input_shapes, vocabulary)
            found[kind] = found.get(kind, 0.0) + e.self_cpu_time_total / 1e6
    return found | {"everything else": whole - sum(found.values())}


def matrix_rate(k: int, n: int, m: int) -> float:
    """FLOP/s of F.linear in bf16 on random numbers."""
    x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    times = []
    for _ in range(7):
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - began)
    return 2 * m * k * n / sorted(times)[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--length", type=int, default=174, help="tokens of a document on average; they vary by half of it")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()                               # as a run does
    family, values = SHAPES[args.shape]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values), dtype=torch.bfloat16).eval()
    params = tg.attach(model).add("a", make(args.method)).parameters()
    model.requires_grad_(False)
    for p in params.values():
        p.requires_grad_(True)
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(args.length // 2, args.length * 3 // 2, (args.documents,), generator=g).tolist()
    vocabulary = values["vocab_size"]
    rows = [Example(torch.randint(5, vocabulary, (n,), generator=g).tolist(), [i >= n // 3 for i in range(n)], "row")
            for n in lengths]
    optimizer, cfg = adamw(params, 1e-4, 0.0, 0.999), TrainConfig()
    with arranged(model, rows, cfg, virtual=False) as layout:
        Layers(model.model.layers, on=args.compile)
        cuts = micro_batches(lengths, range(len(rows)), layout, cfg.forward_tokens)
        batches = [collate(rows, cut, 0) for cut in cuts]

        def step():
            train_step(model, batches, params, optimizer, clip=1.0, step=2, where=str, route=lambda b: {"adapter_ids": "a"})
        step(), step()
        found = measure(step, vocabulary)
    total, tokens = sum(found.values()), sum(lengths)
    layers = sum(p.numel() for layer in model.model.layers for n, p in layer.named_parameters() if p.dim() == 2 and "taps" not in n)
    rate = matrix_rate(values["hidden_size"], values["intermediate_size"], tokens)
    print(f"{args.shape}, {args.method}, {tokens} tokens in {len(batches)} forwards, {'compiled' if args.compile else 'eager'}: "
          f"{total:.2f} s, {tokens / total:.0f} tokens/s under the profiler; {torch.get_num_threads()} threads, "
          f"LD_PRELOAD {os.environ.get('LD_PRELOAD') or 'not set'}")
    for name, seconds in sorted(found.items(), key=lambda item: -item[1]):
        print(f"  {name:18} {seconds:6.2f} s  {seconds / total:4.0%}")
    reached = 4 * layers * tokens / found["base products"]
    print(f"base products run at {reached / 1e12:.3f} TFLOP/s, one large product alone at {rate / 1e12:.3f}; "
          f"without all the rest a step would take {found['base products'] + found['head products']:.2f} s")
    there = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    key = "/".join((args.shape, args.method, "compiled" if args.compile else "eager", cpu_name()))
    there[key] = {"tokens": tokens, "seconds": {k: round(v, 3) for k, v in found.items()}, "reached": round(reached / 1e12, 3),
                  "rate": round(rate / 1e12, 3), "threads": torch.get_num_threads(), "preload": os.environ.get("LD_PRELOAD", "")}
    RESULTS.write_text(json.dumps(dict(sorted(there.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
