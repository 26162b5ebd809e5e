"""How much a training step gains from `tsugiki.memory.keep_freed_memory`: the same step with and without it, in turn.

    python benchmarks/malloc.py [--runs 5] [--steps 8]

A setting of the C library cannot be taken back, so each run is a process of its own. The two kinds alternate, so that a
machine that slows down in the middle slows both. Prints the median of each and their ratio.
"""
from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

HIDDEN, LAYERS, VOCABULARY, ROWS, LENGTH = 256, 8, 6144, 16, 256
WARM_UP = 2


def measure(keep: bool, steps: int) -> float:
    """Median seconds of a full fine-tuning step of a small Llama, on random tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tsugiki.data.batch import collate
    from tsugiki.data.render import Example
    from tsugiki.memory import keep_freed_memory
    from tsugiki.train.optim import adamw
    from tsugiki.train.step import train_step
    if keep and not keep_freed_memory():
        raise SystemExit("keep_freed_memory does nothing here: it needs Linux with glibc")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=704, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True))
    params = dict(model.named_parameters())
    optimizer = adamw(params.values(), 1e-4, 0.0, 0.999)
    examples = [Example(torch.randint(3, VOCABULARY, (LENGTH,)).tolist(), [False] + [True] * (LENGTH - 1), f"random:{i}")
                for i in range(ROWS)]
    batch, times = collate(examples, [[i] for i in range(ROWS)], 0), []
    for step in range(WARM_UP + steps):
        began = time.perf_counter()
        train_step(model, [batch], params, optimizer, clip=1.0, step=step + 1, where=lambda i: examples[i].where)
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps a process (%(default)s)")
    parser.add_argument("--measure", choices=("kept", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure == "kept", args.steps))
        return
    print(f"a step of {ROWS * LENGTH:,} tokens, Llama of {LAYERS} layers of width {HIDDEN}, float32; seconds")
    times: dict[str, list[float]] = {"plain": [], "kept": []}
    for run in range(args.runs):
        for kind, found in times.items():
            command = [sys.executable, __file__, "--measure", kind, "--steps", str(args.steps)]
            found.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
        print(f"  run {run + 1} of {args.runs}: plain {times['plain'][-1]:.3f}, kept {times['kept'][-1]:.3f}", flush=True)
    plain, kept = (statistics.median(times[kind]) for kind in ("plain", "kept"))
    print(f"median: plain {plain:.3f}, freed memory kept {kept:.3f}, ratio {plain / kept:.2f}")


if __name__ == "__main__":
    main()
