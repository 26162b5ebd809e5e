"""Greedy answers to many prompts: batches of like length, left-padded, each stopping at the trained stop token."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from tsugiki.data.conversation import Conversation
from tsugiki.data.render import Renderer


@torch.no_grad()
def generate_answers(model: nn.Module, renderer: Renderer, conversations: Sequence[Conversation], max_new_tokens: int,
                     batch_size: int, pad_id: int, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """One greedy answer a conversation, in order; rows that ask the same prompt are answered once."""
    prompts = [tuple(renderer.prompt(c)) for c in conversations]
    distinct = sorted(set(prompts), key=lambda p: (len(p), p))
    device = model.get_input_embeddings().weight.device
    answers: dict[tuple[int, ...], str] = {}
    for start in range(0, len(distinct), batch_size):
        rows = distinct[start:start + batch_size]
        width = max(map(len, rows))
        ids = torch.tensor([[pad_id] * (width - len(r)) + list(r) for r in rows], device=device)            # (B, T)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                             eos_token_id=list(renderer.stop_ids), pad_token_id=pad_id)
        for row, new in zip(rows, out[:, width:].tolist(), strict=True):
            answers[row] = renderer.answer(new)
        if progress:
            progress(len(answers), len(distinct))
    return [answers[p] for p in prompts]
