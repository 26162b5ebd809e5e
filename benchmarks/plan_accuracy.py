"""How well `tsugiki plan` foretells: its estimate of memory, time and files beside what real steps of a real model take.

    python benchmarks/plan_accuracy.py [--kinds llama gpt2] [--methods lora full] [--dtype fp32] [--rows 2] [--length 512]

Each method trains a few steps on random weights in a process of its own (a fork of one that has imported everything).
Memory is the growth of the process's resident set from before the model was built to its highest (VmHWM, Linux), once with
glibc giving every freed block back, so that the figure is what tensors hold, and once with glibc as it is. Time is the
fastest step's with glibc as it is; the estimate is made just before, on the same machine under the same load.
"""
from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MMAP_THRESHOLD, TRIM_THRESHOLD, TOP_PAD = -3, -1, -2          # malloc.h
DTYPES = ("fp32", "bf16")
KINDS = ("llama", "gpt2")


def base(kind: str, small: bool = False):
    """A model's config: about 17 million parameters, or two layers to warm up with."""
    from transformers import GPT2Config, LlamaConfig
    layers = 2 if small else 6
    if kind == "llama":
        return LlamaConfig(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=layers,
                           num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=1024)
    return GPT2Config(vocab_size=8192, n_embd=384, n_layer=layers, n_head=6, n_positions=1024, bos_token_id=0, eos_token_id=0)


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) << 10


def steps(config, method, rows: int, length: int, dtype, count: int, folder: Path | None = None) -> dict:
    """Train `count` steps; seconds of each, and the bytes of what is saved."""
    from contextlib import nullcontext
    from functools import partial

    import torch
    from transformers import AutoModelForCausalLM

    import tsugiki as tg
    from tsugiki.data.batch import collate
    from tsugiki.data.render import Example
    from tsugiki.formats import save
    from tsugiki.train import checkpoint
    from tsugiki.train.layout import quick
    from tsugiki.train.optim import adamw
    from tsugiki.train.step import train_step
    full = not method.parts
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if full else dtype).eval()
    adapter = None if full else tg.attach(model).add("a", method)
    params = method.select(model) if full else adapter.parameters()
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in params.values()))
    autocast = partial(torch.autocast, "cpu", torch.bfloat16) if full and dtype == torch.bfloat16 else nullcontext
    optimizer, draw = adamw(params, 1e-3, 0.0, 0.999), torch.Generator().manual_seed(0)
    examples = [Example(torch.randint(0, 8192, (length,), generator=draw).tolist(), [False] + [True] * (length - 1), "")
                for _ in range(rows)]
    batch, took = collate(examples, [[i] for i in range(rows)], 0), []
    with quick(model, packed=False):                  # as in a run
        for step in range(count):
            began = time.perf_counter()
            train_step(model, [batch], params, optimizer, clip=1.0, step=step + 1, where=str,
                       route=lambda b: {} if full else {"adapter_ids": "a"}, autocast=autocast,
                       **({} if full else {"penalty": lambda: method.penalty(adapter),
                                           "after": lambda: method.after_step(adapter, step + 1, count)}))  # noqa: B023
            took.append(time.perf_counter() - began)
    found = {"seconds": min(took), "peak": resident("VmHWM")}
    if folder is not None:
        path = checkpoint.save(folder / "checkpoints", count, params, optimizer, {}, 1, None, {} if full else adapter.buffers())
        found |= {"checkpoint": sum(f.stat().st_size for f in path.glob("*.safetensors")), "saving": resident("VmHWM")}
        if adapter is not None:
            found["saved"] = sum(f.stat().st_size for f in save(adapter, folder / "adapter").glob("*.safetensors"))
    return found


def measure(kind: str, name: str, dtype: str, rows: int, length: int, count: int) -> dict:
    """One method's figures, in a fork of this process."""
    import torch

    from tsugiki.methods import make
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            kind_of = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
            steps(base(kind, small=True), make(name), 1, 16, kind_of, 1)      # libraries, buffers and caches are there
            gc.collect()
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")                     # VmHWM starts anew
            with tempfile.TemporaryDirectory() as folder:
                found = steps(base(kind), make(name), rows, length, kind_of, count, Path(folder))
            found = found | {key: found[key] - before for key in ("peak", "saving")}
        except BaseException as e:
            found = {"error": f"{type(e).__name__}: {e}"}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as f:
        text = f.read()
    os.waitpid(child, 0)
    return json.loads(text or '{"error": "the process died"}')


def serve() -> None:
    """For each line of stdin, a list of what `measure` takes, a line of JSON on stdout."""
    from tsugiki import methods, plan  # noqa: F401  imported once, before the forks
    for line in sys.stdin:
        print(json.dumps(measure(*json.loads(line))), flush=True)


class Measurer:
    """A process whose forks measure; calm: with glibc giving every freed block back."""

    def __init__(self, calm: bool = True):
        env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", "calm" if calm else "as it is"], env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, *case) -> dict:
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline() or '{"error": "the measuring process died"}')

    def close(self) -> None:
        """The process ends when it has nothing more to read."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def estimated(folder: Path, kind: str, name: str, dtype: str, rows: int, length: int, timed: bool):
    import torch

    from tsugiki.methods import make
    from tsugiki.plan import plan
    base(kind).save_pretrained(folder)
    return plan(str(folder), make(name), tokens=rows * length, length=length, timed=timed,
                dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


def main() -> None:
    from tsugiki.cli.tables import table
    from tsugiki.methods import METHODS
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="real steps a method (%(default)s)")
    args = parser.parse_args()
    import torch
    torch.set_num_threads(1)
    rows, measurers = [], (Measurer(calm=True), Measurer(calm=False))
    for kind in args.kinds:
        for name in args.methods:
            case = [kind, name, args.dtype, args.rows, args.length]
            with tempfile.TemporaryDirectory() as folder:
                plan = estimated(Path(folder), *case, timed=True)
            calm, plain = (measurer(*case, args.steps) for measurer in measurers)
            if error := calm.get("error") or plain.get("error"):
                rows.append((kind, name, error[:40], *["-"] * 7))
                continue
            tokens = args.rows * args.length
            took = plain["seconds"] * 1000 / tokens
            memory = [f"{b / 2**20:.0f}" for b in (plan.memory, calm["peak"], plain["peak"], calm["saving"])]
            rows.append((kind, name, *memory, f"{plan.memory / calm['peak']:.3f}", f"{plan.seconds:.2f}", f"{took:.2f}",
                         f"{plan.seconds / took:.2f}"))
            print(" ".join(map(str, rows[-1])), file=sys.stderr, flush=True)
    for measurer in measurers:
        measurer.close()
    head = ("base", "method", "plan MB", "peak MB", "as is MB", "with save MB", "plan/peak", "plan s/1k", "real s/1k", "ratio")
    print(table(head, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        if sys.argv[2] == "calm":                     # every tensor of a page or more is mapped alone, and unmapped when it dies
            for option, value in ((MMAP_THRESHOLD, 1 << 16), (TRIM_THRESHOLD, 1 << 16), (TOP_PAD, 0)):
                ctypes.CDLL(None).mallopt(option, value)
        serve()
    else:
        main()
