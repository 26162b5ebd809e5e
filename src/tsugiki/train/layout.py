"""Padded or packed: the same result, so the cheaper one is chosen, and packing only where a probe proves it isolated."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tsugiki.config import TrainConfig
from tsugiki.data.batch import micro_batches, step_rows
from tsugiki.data.render import Example
from tsugiki.errors import UserError
from tsugiki.train.loss import takes_positions

# Packing pays where padding would waste more than this share of the tokens: a dense block mask costs about as much.
WASTE = 0.3


@torch.no_grad()
def packs(model: nn.Module) -> bool:
    """Whether packed documents are isolated in this model: editing one changes no bit of the other's logits,
    and a document's logits are those it has alone. Proved by running it, not by a list of names."""
    if not takes_positions(model):
        return False
    device = model.get_input_embeddings().weight.device
    first, other, second = (torch.arange(a, a + 6, device=device)[None] for a in (3, 23, 43))
    positions = torch.arange(6, device=device)[None].repeat(1, 2)
    was_training = model.training
    model.eval()
    try:
        def tail(head):
            return model(input_ids=torch.cat([head, second], 1), position_ids=positions, use_cache=False).logits[0, 6:].float()
        packed, edited = tail(first), tail(other)
        alone = model(input_ids=second, use_cache=False).logits[0].float()
        shifted = model(input_ids=torch.cat([first, second], 1), use_cache=False).logits[0, 6:].float()
    finally:
        model.train(was_training)
    return torch.equal(packed, edited) and bool((packed - alone).norm() <= 0.1 * (shifted - alone).norm())


def choose_layout(model: nn.Module, examples: Sequence[Example], cfg: TrainConfig, virtual: bool) -> str:
    """The layout of a run; UserError when packing is asked for where it would not be exact."""
    if cfg.layout == "pad":
        return "pad"
    if virtual or not packs(model):
        if cfg.layout == "pack":
            why = "the method adds virtual tokens to each row" if virtual else "this model does not isolate packed documents"
            raise UserError(f"train.layout: pack is not exact here ({why}); use pad or auto")
        return "pad"
    if cfg.layout == "pack":
        return "pack"
    real = area = 0
    for step in range(8):
        rows = step_rows(len(examples), cfg.batch_size, cfg.seed, step)
        lengths = {i: len(examples[i].ids) for i in rows}
        for forward in micro_batches(lengths, rows, "pad", max(cfg.max_tokens, cfg.max_length)):
            real += sum(lengths[row[0]] for row in forward)
            area += len(forward) * max(lengths[row[0]] for row in forward)
    return "pack" if 1 - real / area > WASTE else "pad"


def largest_tensor(model: nn.Module, examples: Sequence[Example], cfg: TrainConfig) -> int:
    """About how many bytes one forward's largest tensor has: its logits in float32."""
    sample = examples[:1000]
    tokens, trained = sum(len(e.ids) for e in sample), sum(sum(e.trained) for e in sample)
    forward = min(max(cfg.max_tokens, cfg.max_length), cfg.batch_size * tokens / len(sample))
    return int(forward * trained / tokens * model.get_input_embeddings().weight.shape[0] * 4)
