"""Fine-tune a LoRA and ask it something:  python examples/train_lora.py BASE ROWS.jsonl OUT

BASE is a transformers model folder, a hub id or "embedded". Given again with the same OUT, it goes on or is done at once.
"""
import sys

import tsugiki as tg


def main(base: str, rows: str, out: str, prompt: str = "Hello.") -> None:
    model, tokenizer = tg.load(base)
    adapters = tg.attach(model)
    adapters.add("mine", tg.LoRA(rank=16))
    result = tg.train(model, tokenizer, data=rows, adapter="mine", out=out, epochs=1, lr=1e-3)
    print(f"{result.trainable:,} of {result.total:,} numbers trained in {result.steps} steps; saved in {result.saved}")
    print("base:   ", tg.generate(model, tokenizer, prompt, max_new_tokens=20))
    print("adapter:", tg.generate(model, tokenizer, prompt, adapter="mine", max_new_tokens=20))


if __name__ == "__main__":
    main(*sys.argv[1:])
