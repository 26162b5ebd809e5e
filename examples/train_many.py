"""The demo's four tasks, each with an adapter and a method of its own, trained together:  python examples/train_many.py OUT [STEPS]

One base in memory, one forward for all. Each adapter is what it would be alone. Given again with the same OUT, it goes on or is
done at once.
"""
import sys
from importlib.resources import files
from pathlib import Path

import tsugiki as tg

DEMO = Path(str(files("tsugiki") / "assets" / "demo"))


def main(out: str, steps: int = 60) -> None:
    model, tokenizer = tg.load("embedded")

    def job(name: str, method: tg.LoRA | tg.Series | tg.IA3, **more) -> dict:
        return {"name": name, "method": method, "data": {"files": str(DEMO / name / "train.jsonl"), "holdout": 0.02},
                "train": {"steps": steps, "batch_size": 8}, "eval": {"metric": "loss", "max_new_tokens": 12}} | more

    results = tg.train_many(model, tokenizer, [
        job("arithmetic", tg.LoRA(rank=16), weight=2),               # where not all fit into a tick, twice the tokens
        job("intent", tg.Series()), job("past", tg.LoRA(rank=8)), job("record", tg.IA3(), start=5)], out=out)
    adapters = tg.attach(model)
    for name, result in results.items():
        if isinstance(result, tg.Failure):
            print(f"{name} failed: {result.reason}")
            continue
        adapters.load(name, result.saved)
        before, after = result.progress.before["loss"], result.progress.after["loss"]
        print(f"{name:>10}: loss {before:.2f} -> {after:.2f} in {result.progress.step} steps; {result.saved}")
    prompt = "Present: The young lady loses the money.\nPast:"
    print(prompt, tg.generate(model, tokenizer, prompt, adapter="past", max_new_tokens=12).strip())


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
