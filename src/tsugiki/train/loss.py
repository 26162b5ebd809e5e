"""Token losses of a batch: the head runs only where there is a target."""
from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from tsugiki.data.batch import IGNORE, Batch
from tsugiki.route import before_first


@contextmanager
def _head_sees_only(model: nn.Module, rows: torch.Tensor, columns: torch.Tensor, width: int) -> Iterator[bool]:
    """Give the output head just the hidden states at (rows, columns), as (N, 1, D); yields whether it does.

    Columns count from the right end, so virtual tokens at the left change nothing; one position a row, since outputs
    longer than the text are taken for text with virtual tokens. A head that adapters edit sees every position, since
    their rows are told by their place in the batch.
    """
    head = model.get_output_embeddings()
    if head is None or any(tap.posts or tap.pres for tap in getattr(head, "taps_out", [])):
        yield False
        return

    def select(module, args):
        hidden = args[0]                                                        # (B, P + T, D)
        return (hidden[rows, columns + (hidden.shape[1] - width)].unsqueeze(1), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield True
    finally:
        handle.remove()


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward takes `position_ids` (BLOOM does not: its distances come from ALiBi)."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _prompts(batch: Batch) -> torch.Tensor:
    """(B, T) bool: the tokens before the first trained one of their document."""
    trained, starts = torch.zeros_like(batch.ids, dtype=torch.bool), torch.zeros_like(batch.ids, dtype=torch.bool)
    trained[:, 1:] = batch.targets[:, :-1] != IGNORE
    starts[:, 1:] = batch.positions[:, 1:] <= batch.positions[:, :-1]
    return before_first(trained, starts)


def token_losses(model: nn.Module, batch: Batch, **route: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy (nats) of every target of the batch.

    Returns (losses (N,) in float32, or float64 for a float64 model; rows (N,) the data-set row each belongs to).
    `route` is passed on to the forward: adapter_ids, token_keys.
    """
    rows, columns = (batch.targets != IGNORE).nonzero(as_tuple=True)            # (N,), (N,)
    inputs = {"input_ids": batch.ids, "use_cache": False} | route
    if batch.packed:
        inputs["position_ids"] = batch.positions
    if getattr(getattr(model, "adapters", None), "placed", None):                # some adapter must know where prompts end
        inputs["prompt_mask"] = _prompts(batch)
    with _head_sees_only(model, rows, columns, batch.ids.shape[1]) as selected:
        logits = model(**inputs).logits
    logits = logits[:, 0] if selected else logits[rows, columns]                   # (N, V)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, batch.targets[rows, columns], reduction="none"), batch.samples[rows, columns]
