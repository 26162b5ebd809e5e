"""The serving engine: 16 adapters in one batch beside one adapter and beside Hugging Face PEFT, and 200 adapters on 16 slots.

    python benchmarks/serve_speed.py [--base 135m embedded] [--only batch many]

"batch": 16 rows of prompts of mixed lengths, 16 LoRAs (rank 8, every linear, bfloat16 base), one a row: here; here with the
same LoRA on every row; and PEFT's `generate(adapter_names=[...])` on left-padded rows. Sides alternate; medians. A step is
(all - the first token) / (tokens - 1). Tokens are compared. "many": requests for adapters drawn evenly from 200, and from 5 of
them, 16 slots, all waiting from the start; tokens a second of the whole. Bases: "135m" (that shape, random weights) or
"embedded". Writes benchmarks/results/serve_speed.json.
"""
from __future__ import annotations

import argparse
import copy
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
from speed.shapes import write_base
from torch import nn

import tsugiki as tg
from tsugiki.serve.engine import Engine, Request, Sampling

RESULTS = Path(__file__).parent / "results" / "serve_speed.json"
ROWS = 16


def base(name: str, folder: Path) -> tuple[nn.Module, object]:
    where = "embedded" if name == "embedded" else str(write_base("smollm2-135m", folder))
    return tg.load(where, dtype="bf16")


def make_adapters(model: nn.Module, count: int, folder: Path) -> list[Path]:
    """Adapter folders in PEFT's form, each with random weights of its own."""
    adapters = tg.attach(model)
    adapter = adapters.add("made", tg.LoRA(rank=8))
    found = []
    for n in range(count):
        draw = torch.Generator().manual_seed(n)
        for p in adapter.parameters().values():
            p.data.copy_(torch.randn(p.shape, generator=draw) * 0.02)
        found.append(adapters.save("made", folder / f"a{n}"))
    adapters.remove("made")
    return found


def prompts(count: int, longest: int, vocabulary: int, seed: int = 0) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(3, vocabulary) for _ in range(draw.randint(longest // 3, longest))) for _ in range(count)]


def answered(engine: Engine, asked: list[tuple[tuple[int, ...], str | None]], tokens: int) -> list[list[int]]:
    how = Sampling(max_tokens=tokens, temperature=0.0, ignore_stop_ids=True)
    streams = [engine.submit(Request(ids, name, how)) for ids, name in asked]
    found = []
    for stream in streams:
        result = stream.result()
        assert result.finish == "length" and len(result.ids) == tokens, result
        found.append(list(result.ids))
    return found


def theirs(model: nn.Module, folders: list[Path]) -> Callable[..., list[list[int]]]:
    """PEFT with every adapter loaded; generate() of left-padded rows."""
    wrapped = peft.PeftModel.from_pretrained(model, str(folders[0]), adapter_name="a0").eval()
    for n, folder in enumerate(folders[1:], 1):
        wrapped.load_adapter(str(folder), adapter_name=f"a{n}")

    @torch.no_grad()
    def generate(asked: list[tuple[tuple[int, ...], str | None]], tokens: int) -> list[list[int]]:
        width = max(len(ids) for ids, _ in asked)
        ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids, _ in asked])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in asked])
        out = wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                               pad_token_id=0, adapter_names=[name for _, name in asked])
        return out[:, width:].tolist()
    return generate


def batch(model: nn.Module, tokenizer: object, folders: list[Path], args: argparse.Namespace) -> dict:
    """Step times of each side, and how many rows say the same as PEFT's."""
    peft_generate = theirs(copy.deepcopy(model), folders[:ROWS])
    engine = Engine(model, tokenizer, slots=ROWS, batch=ROWS, prefix_tokens=0, chunk=4096)
    for n in range(ROWS):
        engine.add(f"a{n}", folders[n])
    engine.start()
    rows = prompts(ROWS, args.longest, model.config.vocab_size)
    mixed, same = ([(ids, f"a{n * each}") for n, ids in enumerate(rows)] for each in (1, 0))
    run = {"16 adapters": lambda n: answered(engine, mixed, n), "one adapter": lambda n: answered(engine, same, n),
           "PEFT, 16 adapters": lambda n: peft_generate(mixed, n)}
    first, whole, out = {name: [] for name in run}, {name: [] for name in run}, {}
    for round_ in range(args.rounds + 1):             # one more, to warm up
        for name, generate in run.items():
            for times, tokens in ((first, 1), (whole, args.tokens)):
                began = time.perf_counter()
                out[name] = generate(tokens)
                times[name] += [time.perf_counter() - began] * (round_ > 0)
    engine.stop()
    found = {}
    for name in run:
        step = (statistics.median(whole[name]) - statistics.median(first[name])) / (args.tokens - 1)
        found[name] = {"step_ms": step * 1e3, "tokens_per_second": ROWS / step,
                       "first_token_seconds": statistics.median(first[name]), "all_seconds": whole[name],
                       "all_first_seconds": first[name]}
    mine, peers = out["16 adapters"], out["PEFT, 16 adapters"]
    agree = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), args.tokens)
             for x, y in zip(mine, peers, strict=True)]
    step = {name: f["step_ms"] for name, f in found.items()}
    return {"sides": found, "times_peft": step["PEFT, 16 adapters"] / step["16 adapters"],
            "share_of_one_adapter": step["one adapter"] / step["16 adapters"], "equal_first_tokens": agree}


def many(model: nn.Module, tokenizer: object, folders: list[Path], args: argparse.Namespace) -> dict:
    """Throughput over all adapters and over five."""
    engine = Engine(model, tokenizer, slots=ROWS, batch=ROWS, prefix_tokens=0, queue=1 << 20)
    began = time.perf_counter()
    for n, folder in enumerate(folders):
        engine.add(f"a{n}", folder)
    added = time.perf_counter() - began
    engine.start()
    rows, draw = prompts(args.requests, args.longest, model.config.vocab_size, 1), random.Random(2)
    names = {f"{count} adapters": [f"a{draw.randrange(count)}" for _ in rows] for count in (len(folders), 5)}
    seconds = {name: [] for name in names}
    for round_ in range(args.rounds + 1):
        for name, who in names.items():
            asked = list(zip(rows, who, strict=True))
            began = time.perf_counter()
            answered(engine, asked if round_ else asked[:ROWS], args.answer)
            seconds[name] += [time.perf_counter() - began] * (round_ > 0)
    stats = engine.stats()
    engine.stop()
    found = {name: {"tokens_per_second": len(rows) * args.answer / statistics.median(s), "all_seconds": s}
             for name, s in seconds.items()}
    rates = [f["tokens_per_second"] for f in found.values()]
    return {"sides": found, "share_of_five": rates[0] / rates[1], "seconds_to_add": added, "evictions": stats.evictions,
            "loads": stats.loads, "load_seconds": stats.load_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", nargs="+", default=["embedded", "135m"], choices=("embedded", "135m"))
    parser.add_argument("--only", nargs="+", default=["batch", "many"], choices=("batch", "many"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest prompt (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a row of \"batch\" (%(default)s)")
    parser.add_argument("--answer", type=int, default=32, help="new tokens a request of \"many\" (%(default)s)")
    parser.add_argument("--requests", type=int, default=160, help="of a round of \"many\" (%(default)s)")
    parser.add_argument("--adapters", type=int, default=200, help="registered in \"many\" (%(default)s)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    setting = vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__,
                            "transformers": transformers.__version__, "peft": peft.__version__}
    with tempfile.TemporaryDirectory() as room:
        for name in args.base:
            model, tokenizer = base(name, Path(room))
            folders = make_adapters(model, args.adapters if "many" in args.only else ROWS, Path(room) / name)
            for part in args.only:
                found = {"batch": batch, "many": many}[part](model, tokenizer, folders, args)
                results[f"{name} {part}"] = {"setting": setting} | found
                print(f"\n{name}, {part}:")
                for side, f in found["sides"].items():
                    print(f"  {side}: {f['tokens_per_second']:.0f} tokens/s" + (f", step {f['step_ms']:.1f} ms" if "step_ms" in f
                                                                                else ""))
                print("  " + json.dumps({k: v for k, v in found.items() if k != "sides"}), flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
