"""Token losses of a batch: the head runs only where there is a target."""
from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from tsugiki.data.batch import IGNORE, Batch
from tsugiki.kernels.attention import active
from tsugiki.kernels.head import head_losses
from tsugiki.route import before_first


@contextmanager
def _head_sees(model: nn.Module, rows: torch.Tensor, columns: torch.Tensor, width: int,
               whole: bool) -> Iterator[list[torch.Tensor]]:
    """Give the output head just the hidden states at (rows, columns), as (N, 1, D), or only the first of them unless `whole`.
    Yields a list that the forward leaves all of them in, (N, D).

    Columns count from the right end, so virtual tokens at the left change nothing; one position a row, since outputs
    longer than the text are taken for text with virtual tokens.
    """
    found: list[torch.Tensor] = []

    def select(module, args):
        hidden = args[0]                                                        # (B, P + T, D)
        found.append(hidden[rows, columns + (hidden.shape[1] - width)])
        return (found[0][:None if whole else 1].unsqueeze(1), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield found
    finally:
        handle.remove()


def _edited(head: nn.Module) -> bool:
    """Whether adapters edit the head: it then sees every position, since their rows are told by their place in the batch."""
    return any(tap.posts or tap.pres for tap in getattr(head, "taps_out", []))


# Models that do more with the head's output than give it back (soft caps, scales), found by their first batch.
_has_tail: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def takes_positions(model: nn.Module) -> bool:
    """Whether the model's forward takes `position_ids` (BLOOM does not: its distances come from ALiBi)."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _prompts(batch: Batch) -> torch.Tensor:
    """(B, T) bool: the tokens before the first trained one of their document."""
    trained, starts = torch.zeros_like(batch.ids, dtype=torch.bool), torch.zeros_like(batch.ids, dtype=torch.bool)
    trained[:, 1:] = batch.targets[:, :-1] != IGNORE
    starts[:, 1:] = batch.positions[:, 1:] <= batch.positions[:, :-1]
    return before_first(trained, starts)


def _inputs(model: nn.Module, batch: Batch) -> dict[str, object]:
    """The forward's arguments for a batch."""
    inputs: dict[str, object] = {"input_ids": batch.ids, "use_cache": False}
    if batch.packed:
        inputs["position_ids"] = batch.positions
        if active(model):
            inputs["cu_seq_lens_q"] = batch.ends()
    if batch.slots is not None:
        inputs["virtual_slots"] = batch.slots
    if getattr(getattr(model, "adapters", None), "placed", None):                # some adapter must know where prompts end
        inputs["prompt_mask"] = _prompts(batch)
    return inputs


def target_logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits (N, V) at the batch's targets, the targets (N,), the data-set rows (N,) they belong to); float32 or float64."""
    rows, columns = (batch.targets != IGNORE).nonzero(as_tuple=True)
    head, inputs = model.get_output_embeddings(), _inputs(model, batch)
    if head is None or _edited(head):
        logits = model(**inputs).logits[rows, columns]
    else:
        with _head_sees(model, rows, columns, batch.ids.shape[1], whole=True):
            logits = model(**inputs).logits[:, 0]
    return (logits if logits.dtype == torch.float64 else logits.float()), batch.targets[rows, columns], batch.samples[rows, columns]


def token_losses(model: nn.Module, batch: Batch, **route: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy (nats) of every target of the batch.

    Returns (losses (N,) in float32, or float64 for a float64 model; rows (N,) the data-set row each belongs to).
    `route` is passed on to the forward: adapter_ids, token_keys.
    """
    rows, columns = (batch.targets != IGNORE).nonzero(as_tuple=True)            # (N,), (N,)
    inputs = _inputs(model, batch) | route
    head, targets = model.get_output_embeddings(), batch.targets[rows, columns]
    if head is None or _edited(head) or not len(rows):
        logits = model(**inputs).logits[rows, columns]                          # (N, V)
    else:
        if type(head) is nn.Linear and model not in _has_tail:
            with _head_sees(model, rows, columns, batch.ids.shape[1], whole=False) as found:
                first = model(**inputs).logits[:, 0]                            # (1, V)
            with torch.no_grad():
                again = F.linear(found[0][:1].unsqueeze(1), head.weight, head.bias)[:, 0]
                plain = bool(torch.isclose(first, again, 0.0, 0.0, equal_nan=True).all())     # a NaN tells nothing
            if plain:
                return head_losses(found[0], head.weight, head.bias, targets), batch.samples[rows, columns]
            _has_tail[model] = True
        with _head_sees(model, rows, columns, batch.ids.shape[1], whole=True):
            logits = model(**inputs).logits[:, 0]                               # (N, V)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits, targets, reduction="none"), batch.samples[rows, columns]
