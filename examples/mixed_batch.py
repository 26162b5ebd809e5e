"""Two adapters of different methods trained in one step and used in one batch:  python examples/mixed_batch.py BASE

Each row names its adapter. The base runs once for the whole batch, and each row comes out as if it were alone.
"""
import sys

import torch

import tsugiki as tg


def main(base: str) -> None:
    model, tokenizer = tg.load(base, dtype="fp32")
    adapters = tg.attach(model)
    adapters.add("cats", tg.LoRA(rank=8))
    adapters.add("dogs", tg.BitFit())
    ids = torch.stack([torch.tensor(tokenizer.encode("The little animal says " + sound)[-5:]) for sound in ("miaow", "woof")])
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2)
    for _ in range(10):                               # one forward, one backward, two adapters, each with its own row
        loss = model(input_ids=ids, labels=ids, adapter_ids=["cats", "dogs"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss after ten steps: {loss:.3f}")

    prompt = ids[:1, :3]
    with torch.no_grad():
        together = model(input_ids=prompt.repeat(3, 1), adapter_ids=["cats", "dogs", None]).logits
        for row, name in enumerate(["cats", "dogs", None]):
            with adapters.use(name):
                alone = model(input_ids=prompt).logits[0]
            print(f"{name or 'base'}: differs from its own batch of one by {(together[row] - alone).abs().max():.1e}")
    out = model.generate(prompt.repeat(3, 1), adapter_ids=["cats", "dogs", None], max_new_tokens=5, do_sample=False)
    print(tokenizer.batch_decode(out, skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
