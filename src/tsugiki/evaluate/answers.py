"""Greedy answers to many prompts: batches of like length, left-padded, each stopping at the trained stop token."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from tsugiki.data.conversation import Conversation
from tsugiki.data.render import Renderer
from tsugiki.errors import UserError
from tsugiki.evaluate.decode import Decoder
from tsugiki.load import max_positions

_counted: ContextVar[str | None] = ContextVar("counted", default=None)    # the one adapter whose virtual tokens take room


@torch.no_grad()
def generate_answers(model: nn.Module, renderer: Renderer, conversations: Sequence[Conversation], max_new_tokens: int,
                     batch_size: int, pad_id: int, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """One greedy answer a conversation, in order; rows that ask the same prompt are answered once.

    Near the end of the model's positions an answer is shorter, whatever batch it is in. Raises UserError for a prompt
    that leaves no room at all, and for one without a single token.
    """
    prompts = [tuple(ids) for ids in renderer.prompts(conversations)]
    limit = room(model)
    for prompt, c in zip(prompts, conversations, strict=True):
        if not prompt:
            raise UserError(f"{c.where}: the prompt is empty and the tokenizer adds no beginning: there is nothing to continue")
        if limit and len(prompt) >= limit:
            raise UserError(f"{c.where}: the prompt has {len(prompt)} tokens, the model takes {limit} with its answer")
    answers = generate_ids(model, prompts, renderer.stop_ids, max_new_tokens, batch_size, pad_id, progress)
    return [renderer.answer(new) for new in answers]


@torch.no_grad()
def generate_ids(model: nn.Module, prompts: Sequence[tuple[int, ...]], stop_ids: Sequence[int], max_new_tokens: int,
                 batch_size: int, pad_id: int, progress: Callable[[int, int], None] | None = None) -> list[list[int]]:
    """The greedy continuation of each prompt, in order, stop token and padding included; equal prompts are continued once."""
    distinct, limit = sorted(set(prompts), key=lambda p: (len(p), p)), room(model)
    device = model.get_input_embeddings().weight.device
    answers: dict[tuple[int, ...], list[int]] = {}
    batches = list(_batches(distinct, batch_size, (limit or 1 << 60) - max_new_tokens))
    decoder = Decoder(model, steps=len(batches) * max_new_tokens)
    for rows in batches:
        width = max(map(len, rows))
        new_tokens = min(max_new_tokens, (limit or 1 << 60) - width)
        ids = torch.tensor([[pad_id] * (width - len(r)) + list(r) for r in rows], device=device)            # (B, T)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        out = decoder.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False,
                               eos_token_id=list(stop_ids), pad_token_id=pad_id)
        answers |= dict(zip(rows, out[:, width:].tolist(), strict=True))
        if progress:
            progress(len(answers), len(distinct))
    return [answers[p] for p in prompts]


def room(model: nn.Module) -> int | None:
    """Positions for a prompt and its answer: the model's, less the most virtual tokens an attached adapter puts before them."""
    limit, adapters, only = max_positions(model), getattr(model, "adapters", None), _counted.get()
    virtual = max((n for name, (n, _) in getattr(adapters, "virtual", {}).items() if only in (None, name)), default=0)
    return limit - virtual if limit else None


@contextmanager
def room_beside(adapter: str) -> Iterator[None]:
    """Inside, `room` counts this adapter's virtual tokens alone: that others are attached changes nothing."""
    token = _counted.set(adapter)
    try:
        yield
    finally:
        _counted.reset(token)


def _batches(prompts: Sequence[tuple[int, ...]], size: int, fits: int) -> Iterator[Sequence[tuple[int, ...]]]:
    """Batches of sorted prompts; those longer than `fits`, whose answers may be cut short, only with their equals in length."""
    start = 0
    while start < len(prompts):
        end = min(start + size, len(prompts))
        if len(prompts[end - 1]) > fits:
            longer = max(len(prompts[start]), fits)
            end = next(n for n in range(end, start, -1) if len(prompts[n - 1]) <= longer)
        yield prompts[start:end]
        start = end
