"""Tokens a second of greedy generation: the decoding loop here, `transformers.generate`, and Hugging Face PEFT's.

    python benchmarks/generate_speed.py [--base 135m] [--only base-full base-stops adapter-full adapter-stops]

Bases: "135m" (that shape in bfloat16 with random weights), "embedded", or a folder. One batch of prompts of mixed lengths:
random tokens, or the lines of --prompts FILE. Cases: with and without a LoRA on every linear (the same weights for each
side); "full", where every row makes --tokens tokens, and "stops", where rows end at different times: at the base's own stop
tokens if that happens, else at ids drawn from what it says until the mean answer is under 40 % of --tokens. Sides alternate,
each round runs all; medians. A step is (all - the first token) / (tokens - 1). What follows a row's stop is not counted as
tokens. Memory is the peak of the process above what it held before.
"""
from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

import tsugiki as tg
from tsugiki.evaluate.decode import Decoder

RESULTS = Path(__file__).parent / "results" / "generate_speed.json"
CASES = ("base-full", "base-stops", "adapter-full", "adapter-stops")


def base(name: str) -> tuple[nn.Module, object | None]:
    if name != "135m":
        return tg.load(*([] if name == "embedded" else [name]))
    config = transformers.LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16), None


def prompts(args: argparse.Namespace, vocabulary: int, tokenizer: object) -> dict[str, Tensor]:
    """Left-padded ids and their mask, (B, T)."""
    draw = random.Random(0)
    if args.prompts:
        if tokenizer is None:
            raise SystemExit("--prompts needs a base with a tokenizer")
        lines = [line.strip() for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [tokenizer(draw.choice(lines)).input_ids[:args.longest] for _ in range(args.batch)]
    else:
        rows = [[draw.randrange(3, vocabulary) for _ in range(draw.randint(args.longest // 3, args.longest))]
                for _ in range(args.batch)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])}


def counts(new: Tensor, stops: list[int]) -> list[int]:
    """Tokens of each row, its stop token with it. new: (B, n)."""
    ends = torch.isin(new, torch.tensor(stops)) if stops else torch.zeros_like(new, dtype=torch.bool)
    return [int(row.nonzero()[0]) + 1 if row.any() else len(row) for row in ends]


def stop_ids(model: nn.Module, new: Tensor, tokens: int) -> list[int]:
    eos = model.generation_config.eos_token_id
    stops = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    said = sorted(set(new.flatten().tolist()))
    random.Random(1).shuffle(said)
    while sum(counts(new, stops)) > 0.4 * tokens * len(new):
        stops.append(said.pop())
    return stops


def peak(run: Callable[[], object]) -> float:
    """MiB that the process held at most while `run` ran, above before. Linux with glibc."""
    def read(key: str) -> float:
        return next(float(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)                  # freed memory that the process still holds would hide what a side takes
    Path("/proc/self/clear_refs").write_text("5")     # VmHWM starts again
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def sides(model: nn.Module, adapter: bool) -> dict[str, Callable[..., Tensor]]:
    """Name -> generate. Packing is part of what is measured here."""
    if not adapter:
        return {"here": lambda **kw: Decoder(model, kw["max_new_tokens"]).generate(**kw), "transformers": model.generate}
    theirs = copy.deepcopy(model)
    adapters = tg.attach(model)
    torch.manual_seed(1)
    for p in adapters.add("a", tg.LoRA(rank=8)).parameters().values():
        p.data.copy_(torch.randn_like(p) * 0.02)
    with tempfile.TemporaryDirectory() as room:
        adapters.save("a", room)
        wrapped = peft.PeftModel.from_pretrained(theirs, room).eval()
    return {"here": lambda **kw: Decoder(model, kw["max_new_tokens"]).generate(**kw),
            "PEFT": wrapped.generate, "transformers, adapters here": model.generate}


def measure(run: dict[str, Callable[..., Tensor]], given: dict, tokens: int, rounds: int, stops: list[int]) -> dict:
    """The figures of each side."""
    common = given | {"do_sample": False, "pad_token_id": 0, "eos_token_id": stops or None}
    width, first, whole, out = given["input_ids"].shape[1], {}, {}, {}
    for name, generate in run.items():
        generate(**common, max_new_tokens=3)
        first[name], whole[name] = [], []
    for _ in range(rounds):
        for name, generate in run.items():
            for times, n in ((first, 1), (whole, tokens)):
                began = time.perf_counter()
                out[name] = generate(**common, max_new_tokens=n)
                times[name].append(time.perf_counter() - began)
    found = {}
    for name, generate in run.items():
        new = out[name][:, width:]
        n, seconds, prefill = counts(new, stops), statistics.median(whole[name]), statistics.median(first[name])
        reference = out[list(run)[-1]][:, width:]
        same = reference.shape == new.shape and (reference == new).all(1).float().mean().item()
        found[name] = {"tokens": sum(n), "longest": max(n), "tokens_per_second": sum(n) / seconds, "seconds": seconds,
                       "prefill_seconds": prefill, "step_ms": (seconds - prefill) / max(max(n) - 1, 1) * 1e3,
                       "peak_mib": peak(lambda g=generate: g(**common, max_new_tokens=min(tokens, 16))),
                       "rows_like_the_last_side": float(same), "all_seconds": whole[name]}
    for f in found.values():
        f["here_is_faster"] = found["here"]["tokens_per_second"] / f["tokens_per_second"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="135m")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a row (%(default)s)")
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest prompt (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", help="a text file, one prompt a line")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in args.only:
        kind, _, ending = case.partition("-")
        model, tokenizer = base(args.base)
        given = prompts(args, model.config.vocab_size, tokenizer)
        run, stops = sides(model.eval(), kind == "adapter"), []
        if ending == "stops":
            out = run["here"](**given, do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=args.tokens)
            stops = stop_ids(model, out[:, given["input_ids"].shape[1]:], args.tokens)
        found = measure(run, given, args.tokens, args.rounds, stops)
        name = f"{Path(args.base).name} {case} batch {args.batch}"
        results[name] = {"setting": vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__,
                         "transformers": transformers.__version__, "peft": peft.__version__}, "sides": found}
        print(f"\n{name}: {args.tokens} new tokens at most, {args.rounds} rounds\n"
              "| side | tokens/s | here is faster | first token s | step ms | peak MiB | rows equal |\n" + "|---" * 7 + "|")
        for side, f in found.items():
            print(f"| {side} | {f['tokens_per_second']:.0f} | {f['here_is_faster']:.2f}x | {f['prefill_seconds']:.2f} | "
                  f"{f['step_ms']:.1f} | {f['peak_mib']:.0f} | {f['rows_like_the_last_side']:.0%} |", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
