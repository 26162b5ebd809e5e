"""What the allocator costs a training step: glibc as it is, with `tsugiki.memory.keep_freed_memory`, and under tcmalloc.

    python benchmarks/malloc.py [--runs 5] [--steps 8] [--only long short]

Two loads: "long" is full fine-tuning on full rows of 256 tokens, whose logits are a large tensor; "short" is LoRA on
batches of 6 to 50 tokens, a new shape at every step. An allocator cannot be changed back, so each run is a process of its
own; the kinds alternate, so that a machine that slows down in the middle slows all. Prints medians and ratios.
"""
from __future__ import annotations

import argparse
import ctypes.util
import os
import random
import statistics
import subprocess
import sys
import time

VOCABULARY, WARM_UP = 6144, {"long": 2, "short": 40}
TCMALLOC = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
KINDS = ("plain", "kept", "tcmalloc") if TCMALLOC else ("plain", "kept")


def batches(load: str, count: int) -> list:
    """Random rows: 16 x 256 tokens, all trained; or 7 to 40 short rows with two trained tokens each."""
    import torch

    from tsugiki.data.batch import collate
    from tsugiki.data.render import Example
    draw, found = random.Random(0), []
    for _ in range(1 if load == "long" else count):
        rows, length = (16, 256) if load == "long" else (draw.randint(7, 40), draw.randint(6, 50))
        trained = [False] + [True] * (length - 1) if load == "long" else [False] * (length - 2) + [True, True]
        examples = [Example(torch.randint(3, VOCABULARY, (length,)).tolist(), trained, f"random:{i}") for i in range(rows)]
        found.append(collate(examples, [[i] for i in range(rows)], 0))
    return found * count if load == "long" else found


def measure(load: str, kind: str, steps: int) -> float:
    """Mean seconds a step, after warming up, of a small Llama on random tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import tsugiki as tg
    from tsugiki.memory import keep_freed_memory
    from tsugiki.train.optim import adamw
    from tsugiki.train.step import train_step
    if kind == "kept" and not keep_freed_memory():
        raise SystemExit("keep_freed_memory does nothing here: it needs Linux with glibc")
    torch.manual_seed(0)
    steps = steps if load == "long" else steps * 10
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True))
    params = dict(model.named_parameters())
    if load == "short":
        params = tg.attach(model.to(torch.bfloat16)).add("a", tg.LoRA()).parameters()
    optimizer = adamw(params, 1e-4, 0.0, 0.999)
    work = batches(load, WARM_UP[load] + steps)
    for step, batch in enumerate(work):
        if step == WARM_UP[load]:
            began = time.perf_counter()
        train_step(model, [batch], params, optimizer, clip=1.0, step=step + 1, where=str)
    return (time.perf_counter() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps a process, ten times as many short ones (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=WARM_UP, default=list(WARM_UP))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(*args.measure, args.steps))
        return
    for load in args.only:
        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(args.runs):
            for kind, found in times.items():
                command = [sys.executable, __file__, "--measure", load, kind, "--steps", str(args.steps)]
                env = os.environ | ({"LD_PRELOAD": TCMALLOC} if kind == "tcmalloc" else {})
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
                found.append(float(done.stdout.split()[-1]))
        medians = {kind: statistics.median(found) for kind, found in times.items()}
        told = (f"  {kind} {median * 1e3:.0f} ms ({medians['plain'] / median:.2f}x)" for kind, median in medians.items())
        print(f"{load:6}{''.join(told)}", flush=True)


if __name__ == "__main__":
    main()
