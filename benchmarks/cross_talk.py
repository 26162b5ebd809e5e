"""Sixteen adapters trained to answer with their own number, 64 clients at once: how many answers are another adapter's.

    python benchmarks/cross_talk.py [--requests 5000]

On the embedded base, with adapters of eight methods, fewer slots than adapters, evictions, prefix cache, and adapters that are
replaced under traffic by others with another number. Prints one JSON object; exit status 1 if any answer is wrong.
"""
from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import tsugiki as tg
from tsugiki.data import Conversation, Message, Renderer
from tsugiki.errors import UserError
from tsugiki.methods import make
from tsugiki.serve.engine import Engine, Request, Sampling

METHODS = ("lora", "dora", "series", "parallel", "prefix", "ia3", "bitfit", "oft")
ADAPTERS = 16
QUESTIONS = ("Which number are you?", "Say your number.", "Your number, please:", "What is it?")


def train(model, tokenizer, number: int, folder: Path) -> Path:
    """An adapter that answers every question with `number`."""
    data = folder / f"{number}.jsonl"
    data.write_text("".join(json.dumps({"prompt": q, "completion": f" {number}"}) + "\n" for q in QUESTIONS * 8))
    name, adapters = f"n{number}", tg.attach(model)
    tg.train(model, tokenizer, str(data), str(folder / name), adapter=name, method=make(METHODS[number % len(METHODS)]), quiet=True,
             steps=40, batch_size=8, lr=make(METHODS[number % len(METHODS)]).rate(256), seed=number)
    adapters.remove(name)
    return folder / name / "adapter"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=6)
    args = parser.parse_args()
    model, tokenizer = tg.load()
    renderer = Renderer(tokenizer)
    prompts = [tuple(renderer.prompt(Conversation("plain", (Message("user", q), Message("assistant", "")), "q")))
               for q in QUESTIONS]
    with tempfile.TemporaryDirectory() as room:
        began = time.perf_counter()
        folders = {n: train(model, tokenizer, n, Path(room)) for n in range(ADAPTERS + 1)}
        print(f"trained in {time.perf_counter() - began:.0f} s", file=sys.stderr)
        engine = Engine(model, tokenizer, slots=args.slots, batch=16)
        for n in range(ADAPTERS):
            engine.add(f"n{n}", folders[n])
        engine.start()
        means, lock = {n: {n} for n in range(ADAPTERS)}, threading.Lock()
        numbers, counts = iter(range(args.requests)), Counter()

        def replace(n: int) -> None:
            """Now and then n0 means the seventeenth, and then the first again."""
            if n and n % 250 == 0:
                now = ADAPTERS if n // 250 % 2 else 0
                means[0] = {0, ADAPTERS}                  # while it happens, either is right
                engine.replace("n0", folders[now])
                means[0] = {now} if n // 250 % 4 < 2 else {0, ADAPTERS}

        def client(seed: int) -> None:
            draw = random.Random(seed)
            while True:
                with lock:
                    if (n := next(numbers, None)) is None:
                        return
                asked = draw.randrange(ADAPTERS)
                allowed = set(means[asked])
                result = engine.submit(Request(draw.choice(prompts), f"n{asked}", Sampling(max_tokens=6, temperature=0.0))).result()
                said = result.text.strip()
                right = {str(m) for m in allowed | means[asked]}
                counts["right" if said in right else "another's" if said.isdigit() and int(said) <= ADAPTERS else "no number"] += 1
                replace(n)
        threads = [threading.Thread(target=client, args=(n,)) for n in range(args.clients)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()
        engine.stop()
    print(json.dumps({"requests": args.requests, "clients": args.clients, "adapters": ADAPTERS, "slots": args.slots} | counts
                     | {"evictions": stats.evictions, "cached_tokens": stats.tokens_cached,
                        "seconds": round(time.perf_counter() - began, 1)}))
    return int(counts["right"] != args.requests)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        sys.exit(str(e))
