"""Padded or packed: the same result, so the cheaper one is chosen, and packing only where a probe proves it isolated."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from tsugiki.config import TrainConfig
from tsugiki.data.batch import micro_batches
from tsugiki.data.mixture import Mixture
from tsugiki.data.render import Example
from tsugiki.errors import UserError
from tsugiki.kernels.attention import Undivided, active, by_document
from tsugiki.kernels.head import LOGITS
from tsugiki.kernels.passes import single
from tsugiki.train.loss import takes_positions

# Packing pays where padding would waste more than this share of the tokens: a dense block mask costs about as much.
WASTE = 0.3


@contextmanager
def arranged(model: nn.Module, examples: Sequence[Example], cfg: TrainConfig, virtual: bool,
             mixture: Mixture | None = None, autocast: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[str]:
    """The layout of a run, whose forwards are under `autocast`. Inside, the model is `quick`.

    Raises UserError when packing is asked for where it would not be exact.
    """
    pad = cfg.layout == "pad"
    with quick(model, not (virtual or pad), autocast) as fast:
        isolates = pad or (fast and room_for_virtual(model) if virtual else fast or packs(model))
        yield layout_of(examples, cfg, virtual, mixture, fast, isolates)


@contextmanager
def quick(model: nn.Module, packed: bool, autocast: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[bool]:
    """Inside, the model's passes over activations are single ones and its attention goes by document, each where a probe shows
    that it does what it did, and attention, if rows are to be `packed`, that it isolates them; yields whether attention does."""
    with ExitStack() as stack:
        stack.enter_context(single(model))
        with by_document(model) as there, autocast():                         # a kernel may not take what the weights are in
            fast = there and _agrees(model) and (not packed or packs(model))
        if fast:
            stack.enter_context(by_document(model))
        yield fast


def layout_of(examples: Sequence[Example], cfg: TrainConfig, virtual: bool, mixture: Mixture | None, fast: bool,
              isolates: bool) -> str:
    """"pad" or "pack"; fast: the model's attention goes by document; isolates: it `packs`, or if the method has `virtual` tokens,
    there is `room_for_virtual` ones. Raises UserError as `arranged`."""
    pad, pack = cfg.layout == "pad", cfg.layout == "pack"
    if pad:
        return "pad"
    if isolates:
        return "pack" if pack or fast or _waste(examples, cfg, mixture) > WASTE else "pad"
    if pack:
        why = "the method adds virtual tokens to each row" if virtual else "this model does not isolate packed documents"
        raise UserError(f"train.layout: pack is not exact here ({why}); use pad or auto")
    return "pad"


def room_for_virtual(model: nn.Module) -> bool:
    """Whether packed rows may hold virtual tokens: only attention that is told where documents end, in every layer, since positions
    do not tell it; and no method may have to know where prompts end."""
    home, config = model.adapters, model.config
    windows = getattr(config, "sliding_window", None) or {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if windows or home.placed:
        return False
    with home.use(None):
        return packs(model)


@torch.no_grad()
def packs(model: nn.Module) -> bool:
    """Whether packed documents are isolated in this model: editing one changes no bit of the other's logits,
    and a document's logits are those it has alone. Proved by running it, not by a list of names."""
    if not takes_positions(model):
        return False
    first, other, second = (_row(model, a) for a in (3, 23, 43))
    packed = {"position_ids": torch.arange(6, device=first.device)[None].repeat(1, 2)}
    if active(model):
        packed["cu_seq_lens_q"] = torch.tensor([0, 6, 12], dtype=torch.int32, device=first.device)

    def tail(head: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return _logits(model, torch.cat([head, second], 1), **more)[6:]
    try:
        together, edited = tail(first, **packed), tail(other, **packed)
    except (TypeError, ValueError, Undivided):        # its forward does not take where documents end, or no kernel does
        return False
    alone, shifted = _logits(model, second), tail(first)
    return torch.equal(together, edited) and bool((together - alone).norm() <= 0.1 * (shifted - alone).norm())


@torch.no_grad()
def _agrees(model: nn.Module) -> bool:
    """Whether a row's logits are those of the attention that the model had before, to rounding: as near to them as eager
    attention is, whose scores are rounded likewise."""
    row, fast = _row(model, 3), model.config._attn_implementation
    found = {fast: _logits(model, row)}
    try:
        for other in ("sdpa", "eager"):
            model.set_attn_implementation(other)
            found[other] = _logits(model, row)
    finally:
        model.set_attn_implementation(fast)
    wanted = found["sdpa"]
    rounding = (found["eager"] - wanted).norm() if bool(found["eager"].isfinite().all()) else 0.0
    return bool((found[fast] - wanted).norm() <= max(1e-3 * wanted.norm(), 2 * rounding))


def _row(model: nn.Module, start: int) -> torch.Tensor:
    """Six tokens, (1, 6)."""
    return torch.arange(start, start + 6, device=model.get_input_embeddings().weight.device)[None]


def _logits(model: nn.Module, ids: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    """(T, V) float32, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        return model(input_ids=ids, use_cache=False, **more).logits[0].float()
    finally:
        model.train(was_training)


def _waste(examples: Sequence[Example], cfg: TrainConfig, mixture: Mixture | None) -> float:
    """Share of the tokens that would be padding, in the first steps."""
    real = area = 0
    mixture = mixture or Mixture.alone(len(examples), cfg.batch_size, cfg.seed)
    for step in range(8):
        rows = mixture.rows(step)
        lengths = {i: len(examples[i].ids) for i in rows}
        for forward in micro_batches(lengths, rows, "pad", cfg.forward_tokens):
            real += sum(lengths[row[0]] for row in forward)
            area += len(forward) * max(lengths[row[0]] for row in forward)
    return 1 - real / area


def largest_tensor(model: nn.Module, examples: Sequence[Example], cfg: TrainConfig) -> int:
    """About how many bytes one forward's largest tensor has: some logits in float32, or what a layer is widest at."""
    sample = examples[:1000]
    tokens, trained = sum(len(e.ids) for e in sample), sum(sum(e.trained) for e in sample)
    forward = min(cfg.forward_tokens, cfg.batch_size * tokens / len(sample))
    logits = min(LOGITS, int(forward * trained / tokens * model.get_input_embeddings().weight.shape[0]))
    widest = max((max(w.shape) for w in model.parameters() if w.dim() == 2 and w is not model.get_input_embeddings().weight),
                 default=0)
    return max(4 * logits, int(forward * widest) * model.dtype.itemsize)
