"""Figures to tables: the result of a run, its table in the terminal, and docs/benchmarks.md from all of them."""
from __future__ import annotations

import json
import os
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from speed.shapes import SOURCES
from speed.sides import SAME_ROWS, SIDES
from tsugiki.kernels import native

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "unsloth")
SAME = ("native", "threads", "batch_size", "max_length", "warmup", "steps", "seed", "versions", "rows")   # conditions of a run
ROW = "| {side} | {speed} | {ratio} | {rate} | {share} | {peak} | {first} | {loss} | {norm} |"
HEAD = ROW.format(side="side", speed="real tokens/s (min-max)", ratio="Tsugiki is", rate="matrix TFLOP/s", share="share of it",
                  peak="peak GB", first="first step s", loss="mean loss", norm="gradient norm")


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def cpu_name() -> str:
    """The processor as Linux names it, with the bf16 instructions that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = dict((part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    flags = known.get("flags", "").split()
    return known.get("model name", platform.machine()) + "".join(f", {f}" for f in ("amx_bf16", "avx512_bf16") if f in flags)


def device_name(device: str) -> str:
    if device == "cpu":
        return "cpu"
    import torch
    return torch.cuda.get_device_name()


def result(args, data: str, turns: str, found: dict, rate: dict, flops: float, rows: dict, wrong: list[str]) -> dict:
    """One run as plain values. flops: needed for a token, in the mean of the rows."""
    sides = {}
    for name, side in found.items():
        if "error" in side:
            sides[name] = {"error": side["error"]}
            continue
        speeds = [s["tokens"] / s["seconds"] for s in side["steps"]]
        steps = side["warm"] + side["steps"]
        sides[name] = {
            "tokens_per_second": statistics.median(speeds), "min": min(speeds), "max": max(speeds),
            "tokens": sum(s["tokens"] for s in side["steps"]), "seconds": [s["seconds"] for s in side["steps"]],
            "share": statistics.median(speeds) * flops / 1e12 / rate["tflops"], "first": side["first"],
            "loss": statistics.mean(s["loss"] for s in steps), "losses": [s["loss"] for s in steps],
            "norm": statistics.median(s["norm"] for s in steps)} | {k: side[k] for k in side if k.endswith("_gb")}
    for side in sides.values():
        if "error" in side:
            continue
        side["matrix"] = rate["tflops"]
        if "tokens_per_second" in sides.get("tsugiki", {}):
            side["ratio"] = sides["tsugiki"]["tokens_per_second"] / side["tokens_per_second"]
    preload = os.environ.get("LD_PRELOAD", "")
    return {"shape": args.shape, "method": args.method, "data": data, "device": device_name(args.device), "cpu": cpu_name(),
            "cores": os.cpu_count(), "threads": args.threads, "preload": Path(preload).name if preload else "", "turns": turns,
            "batch_size": args.batch_size, "max_length": args.max_length, "warmup": args.warmup, "steps": args.steps,
            "seed": args.seed, "python": platform.python_version(), "versions": _versions(), "rows": rows, "rate": rate,
            "compiled": args.compile, "native": native.library() is not None,
            "flops_per_token": flops, "sides": sides, "wrong": wrong}


def merge(path: Path, found: dict) -> None:
    """Put a run into the file of results, in place of an older one of the same key. Sides that only the older one has stay,
    if it ran under the same conditions: each keeps its ratio to Tsugiki in its own run."""
    there = json.loads(path.read_text()) if path.exists() else {}
    key = "/".join(found[k] for k in ("shape", "method", "data", "device", "cpu")) + (f"/{p}" if (p := found["preload"]) else "")
    key += "/compiled" if found.get("compiled") else ""
    if (old := there.get(key)) and all(_short(old.get(k)) == _short(found.get(k)) for k in SAME):
        found = found | {"sides": {name: s for name in SIDES if (s := (old["sides"] | found["sides"]).get(name))}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted((there | {key: _short(found)}).items())), indent=1) + "\n")


def _short(value):
    """Floats to five digits."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(found: dict) -> list[str]:
    """The lines of one run."""
    sides = found["sides"]
    lines = [HEAD, "|" + " --- |" * HEAD.count(" | ") + " --- |"]
    for name, s in sides.items():
        if "error" in s:
            lines.append(f"| {SIDES[name]} | {s['error']} |")
            continue
        ratio = f"{s['ratio']:.2f}x" if "ratio" in s and name != "tsugiki" else ""
        peak = f"{s['peak_gb']:.2f}" + (f", GPU {s['device_gb']:.2f}" if "device_gb" in s else "")
        speed = f"{s['tokens_per_second']:.0f} ({s['min']:.0f}-{s['max']:.0f})"
        lines.append(ROW.format(side=SIDES[name], speed=speed, ratio=ratio,
                                rate=f"{s['matrix']:.3f}",
                                share=f"{s['share']:.0%}", peak=peak, first=f"{s['first']:.1f}", loss=f"{s['loss']:.4f}",
                                norm=f"{s['norm']:.3g}"))
    matrix = found["rate"]
    lines += ["", f"Matrix rate at these shapes: {matrix['tflops']:.3f} TFLOP/s in bf16 "
                  f"({'; '.join(f'{k}: {v:.3f}' for k, v in matrix['each'].items())}); "
                  f"{found['flops_per_token'] / 1e9:.3f} GFLOP are needed a token."]
    if all("losses" in sides.get(name, {}) for name in SAME_ROWS):
        a, b = (sides[name]["losses"] for name in SAME_ROWS)
        lines.append(f"Losses of Tsugiki and Trainer at the same steps: the means are {abs(sum(a) - sum(b)) / sum(b):.3%} apart, "
                     f"the farthest step {max(abs(x - y) / y for x, y in zip(a, b, strict=True)):.3%}.")
    return lines


def _losing(results: dict) -> list[str]:
    """Every figure in which a peer is better."""
    lines = []
    for found in results.values():
        ours = found["sides"].get("tsugiki", {})
        where = ", ".join(filter(None, (found[k] for k in ("shape", "method", "data", "cpu", "preload"))))
        for name, s in found["sides"].items():
            if s.get("ratio", 1.0) < 1:
                lines.append(f"- {where}: {SIDES[name]} is {1 / s['ratio']:.2f} times as fast.")
            for key, what in (("peak_gb", "GB at the peak"), ("first", "s to the first step")):
                if key in s and key in ours and s[key] < ours[key]:
                    lines.append(f"- {where}: {SIDES[name]} needs {s[key]:.3g} {what}, Tsugiki {ours[key]:.3g}.")
    for case, run in _results("generate_speed").items():
        lines += [f"- Generation, {case}: {name} is {1 / side['here_is_faster']:.2f} times as fast."
                  for name, side in run["sides"].items() if side["here_is_faster"] < 1]
    return lines or ["- In nothing that is measured so far."]


def _results(name: str) -> dict:
    """What another benchmark has left."""
    path = Path(__file__).resolve().parents[1] / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


TEXT = """# Benchmarks

Written by `python benchmarks/train_speed.py --write-docs` from `benchmarks/results/train_speed.json`. To measure:
`make speed` (some minutes), or `python benchmarks/train_speed.py --help`.

## How it is measured

- Sides take turns step by step in one run, each in a process of its own with the same threads; the others sleep meanwhile.
  Where they do not fit in memory at once, one process at a time, each side twice. The figure is the median of the timed steps;
  "Tsugiki is" compares with Tsugiki's median in the very run of that side, and the matrix rate is of that run too: a machine
  may be half as fast an hour later, so compare ratios, not tokens/s of two runs.
- A step is all of a side's own loop from one update to the next: batching, forward, backward, clipping, optimizer, logging.
- Weights are random from a fixed seed, in bf16, at the real shapes; ids are never zeros. Only real tokens count, no padding.
- Same supervised tokens everywhere: completions alone (`full`: all). Same learning rate, constant, AdamW, clipping at 1.
- Tsugiki and Trainer as shipped see the same rows in the same order; a run fails when their token counts differ at any step,
  when their mean losses are more than 2 % apart, or when any side's gradient norm is not above zero.
- Trainer + PEFT as shipped: `from_pretrained` (bf16), `get_peft_model` (adapters in float32), padded batches, no autocast; the
  order of rows is given to it. Tuned: adapters in bf16, `group_by_length`. Full fine-tuning as shipped trains the bf16 weights;
  tuned keeps float32 weights with bf16 autocast, as Tsugiki does.
- TRL: `SFTTrainer(packing=True)` with its defaults (bf16 autocast, activation checkpointing), and without checkpointing; its
  packed rows of the longest length, as many a step as hold about a batch's tokens.
- Peak GB is the resident peak of the whole process, loading included.
- The share is FLOPs needed / seconds / matrix rate. Needed: 4 a weight and token (6 in full fine-tuning), the head on trained
  tokens alone, causal attention 6 T^2 d a layer; an adapter's own work is not counted. The matrix rate is F.linear in bf16,
  forward and backward, at the model's own shapes, measured in the same run.
"""


BOUNDS = """`python benchmarks/step_profile.py [--shape ...] [--compile]` prints it. The frozen weights' products take the most of a
step and run at the rate of a product alone, so the gain over a peer is bounded by what the peer wastes: padding, logits of every
token, quadratic masks, float32 adapters, and, with AMX, where products are cheap, passes over activations. There attention, norms,
gates, rotary embeddings, losses and LoRA's thin products are compiled (`python benchmarks/attention.py`, `benchmarks/passes.py`);
before that they were two thirds of an eager step, and compiled layers made it a tenth quicker. Now they change nothing."""
GENERATION = """`python benchmarks/generate_speed.py` measures it: greedy, the same prompts and as many new tokens, in turns.
Two cores with AMX. Packing the weights is part of our time. A step of 32 rows reads all weights and the cache once, at what
memory gives, in a call a layer; that bounds it. Where rows end early ours leave the batch, theirs go on being
computed. With frozen weights, as PEFT's are, torch takes seconds for the head's product with a slice of the prompt's hidden
states, which ours avoids: they are in their time to the first token. In bfloat16 two sides round differently, so rows may part
where two logits tie, which random weights do often."""
METHODS = """`python benchmarks/method_speed.py` measures it: the same model and rows, each method with its defaults, in turns.
Prefix tuning's virtual tokens are positions before every document."""


def _profiles() -> list[str]:
    """Where a step's time goes, from benchmarks/step_profile.py."""
    lines = []
    for key, found in _results("step_profile").items():
        whole = sum(found["seconds"].values())
        parts = ", ".join(f"{k} {v / whole:.0%}" for k, v in sorted(found["seconds"].items(), key=lambda item: -item[1]))
        lines.append(f"- {key.replace('/', ', ')}: a step of {found['tokens']:,} tokens takes {whole:.2f} s: {parts}. Base "
                     f"products run at {found['reached']:.2f} TFLOP/s; one such product alone, at {found['rate']:.2f}.")
    return lines


def _generation() -> list[str]:
    """Generation beside its peers, from benchmarks/generate_speed.py."""
    found = _results("generate_speed")
    lines = ["| case | side | new tokens | tokens/s | Tsugiki is | ms a token step |", "| --- | --- | --- | --- | --- | --- |"]
    for case, run in found.items():
        for name, side in run["sides"].items():
            ratio = "" if name == "here" else f"{side['here_is_faster']:.2f}x"
            lines.append(f"| {case} | {'Tsugiki' if name == 'here' else name} | {side['tokens']:,} | "
                         f"{side['tokens_per_second']:.0f} | {ratio} | {side['step_ms']:.1f} |")
    return lines if found else []


def _methods() -> list[str]:
    """Steps of several methods beside LoRA's, from benchmarks/method_speed.py."""
    lines = []
    for key, found in _results("method_speed").items():
        shape, cpu = key.split("/", 1)
        of = {name: times[0] / found["seconds"]["lora"][0] for name, times in found["seconds"].items() if name != "lora"}
        lines.append(f"- {shape}, {cpu}: a step of {found['tokens']:,} tokens takes LoRA {found['seconds']['lora'][0]:.2f} s; "
                     + ", ".join(f"{name} {share:.2f} times that" for name, share in of.items()) + ".")
    return lines


def page(results: dict) -> str:
    """docs/benchmarks.md."""
    lines = [TEXT, "## Where Tsugiki loses", "", *_losing(results)]
    if profiles := _profiles():
        lines += ["", "## What bounds a step", "", BOUNDS, "", *profiles]
    if methods := _methods():
        lines += ["", "## Methods", "", METHODS, "", *methods]
    if generation := _generation():
        lines += ["", "## Generation", "", GENERATION, "", *generation]
    for found in results.values():
        v, r = found["versions"], found["rows"]
        title = ", ".join(filter(None, (found[k] for k in ("shape", "method", "data", "preload"))))
        title += ", layers compiled" if found.get("compiled") else ""
        kernels = "compiled" if found.get("native") else "torch's"
        lines += ["", f"## {title}", "",
                  f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {found['device']}; Python "
                  f"{found['python']}, {', '.join(f'{k} {n}' for k, n in v.items())}; LD_PRELOAD {found['preload'] or 'not set'}.",
                  f"{SOURCES[found['data']]}: {r['rows']} rows, {r['tokens']:,} tokens, {r['trained']:,} trained; batches of "
                  f"{found['batch_size']}, at most {found['max_length']} tokens a row, {found['warmup']} + {found['steps']} steps, "
                  f"turns by {found['turns']}. Tsugiki's passes and attention: {kernels}.", "", *table(found)]
    return "\n".join(lines) + "\n"
