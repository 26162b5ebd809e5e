"""How many tokens a forward takes: as many as memory holds; where one row would not fit, layers are made again in backward,
and on a GPU their inputs wait in the machine's own memory."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from tsugiki.config import TrainConfig
from tsugiki.data.batch import Batch, collate, lengths_of
from tsugiki.data.render import Example
from tsugiki.kernels.float8 import copies
from tsugiki.kernels.head import LOGITS
from tsugiki.memory import available, out_of_memory
from tsugiki.route import pinned

# Beyond this a forward should be no quicker by the token. What is said of a GPU here is an estimate: none was at hand.
MOST = {"cpu": 4096, "cuda": 16384}
LAUNCHES = {"cpu": 1.5e8, "cuda": 1e11}               # weights whose products of one token take as long as a layer's launches
SHARE = 0.7                                           # of the memory that is free: what is measured is not all there will be
PROBE = 128                                           # tokens that the measurement runs


def overhead(layers: Sequence[nn.Module], device: torch.device) -> int:
    """Tokens that cost as much as beginning another forward: a layer's launches beside its products of one token."""
    weights = max(1, sum(p.numel() for layer in layers for p in layer.parameters()))
    return int(min(512, max(8, len(layers) * LAUNCHES.get(device.type, LAUNCHES["cpu"]) / weights)))


@dataclass(frozen=True)
class Fit:
    """Tokens of one forward, how many layers keep only their input, and whether that leaves the GPU until backward."""
    tokens: int
    again: int = 0
    offload: bool = False


def measured(model: nn.Module, examples: Sequence[Example], cfg: TrainConfig, layers: int, trained: int,
             losses: Callable[[Batch], Tensor]) -> Fit:
    """What fits, from what two small forwards over real rows leave for backward. trained: parameters that will have gradients
    and moments."""
    if cfg.max_tokens and cfg.checkpointing == "off":
        return Fit(cfg.forward_tokens)
    weights, device = [*model.parameters(), *copies(model)], model.get_input_embeddings().weight.device
    longest = int(lengths_of(examples).max())
    many = min(PROBE, longest)
    few, many = _probe(examples, max(1, many // 2)), _probe(examples, many)
    try:
        a, b = (saved_bytes(lambda e=e: losses(collate([e], [[0]], 0).to(device)), weights) for e in (few, many))
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        return Fit(longest, 0 if cfg.checkpointing == "off" else layers, _may_offload(device, cfg.checkpointing))
    per_token = max(1.0, (b - a) / max(1, len(many.ids) - len(few.ids)))
    reserved = 12 * trained + 12 * LOGITS + max(0, int(a - per_token * len(few.ids)))
    width = model.get_input_embeddings().weight.shape[1] * model.dtype.itemsize
    return fitting(per_token, layers, width, longest, device, reserved, cfg.max_tokens, cfg.checkpointing)


def _probe(examples: Sequence[Example], tokens: int) -> Example:
    """So many tokens of real rows as one row, all trained."""
    ids = [i for e in examples[:tokens] for i in e.ids][:tokens]
    return Example(ids, [True] * len(ids), "probe")


def saved_bytes(forward: Callable[[], Tensor], weights: Sequence[Tensor]) -> int:
    """Bytes that `forward` leaves for backward, each storage once, without the weights."""
    known = {w.untyped_storage().data_ptr() for w in weights}
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t
    kept = []                                         # alive, so that no storage is counted under another's address
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), note(t))[1], lambda t: t):
        out = forward()
    del out
    return sum(found.values())


def fitting(per_token: float, layers: int, width: float, longest: int, device: torch.device, reserved: int,
            asked: int | None, checkpointing: str) -> Fit:
    """What fits into the memory that is free.

    per_token: bytes that one token leaves for backward, all layers together; width: bytes of a layer's input, a token;
    longest: tokens of the longest row; reserved: bytes that are still to be allocated for gradients and moments; asked:
    train.max_tokens, or None; checkpointing: "on", "offload", "off" or "auto".
    """
    free = max(0.0, SHARE * available(device) - reserved)
    most = max(asked or MOST.get(device.type, MOST["cpu"]), longest)
    if checkpointing in ("on", "offload"):
        away = checkpointing == "offload" and _may_offload(device, checkpointing)
        fits = _tokens(free, per_token, layers, 0.0 if away else width, layers)
        return Fit(most if asked else max(longest, min(most, fits)), layers, away)
    wanted = most if asked else longest
    if checkpointing == "auto" and _tokens(free, per_token, layers, width, 0) < wanted:
        again = next((n for n in range(layers + 1) if _tokens(free, per_token, layers, width, n) >= wanted), layers + 1)
        return Fit(wanted, min(again, layers), again > layers and _may_offload(device, checkpointing))
    return Fit(most if asked else max(longest, min(most, _tokens(free, per_token, layers, width, 0))))


def _may_offload(device: torch.device, checkpointing: str) -> bool:
    """Whether there is another memory to move to."""
    return device.type == "cuda" and checkpointing in ("auto", "offload")


def _tokens(free: float, per_token: float, layers: int, width: float, again: int) -> int:
    """Tokens that fit when `again` layers keep their input alone; one of them at a time is there whole, in backward."""
    layer = per_token / max(layers, 1)
    return int(free / max(1e-9, layer * (layers - again) + (width * again + layer if again else 0.0)))


@contextmanager
def made_again(layers: Sequence[nn.Module], count: int, offload: bool = False) -> Iterator[None]:
    """Inside: the first `count` layers keep their inputs alone, and are computed again in backward (arXiv:1604.06174);
    with `offload` the inputs wait for that in the machine's own memory, pinned."""
    chosen, again = layers[:count], pinned(checkpoint)
    for layer in chosen:
        layer.forward = _Again(layer, again, partial(save_on_cpu, torch.cuda.is_available()) if offload else nullcontext)
    try:
        yield
    finally:
        for layer in chosen:
            layer.forward.put_back(layer)


class _Again:
    """A layer's forward through checkpointing. Without gradients it is the forward itself."""

    def __init__(self, layer: nn.Module, again: Callable, kept: Callable):
        self.plain, self.again, self.kept, self.before = layer.forward, again, kept, layer.__dict__.get("forward")

    def put_back(self, layer: nn.Module) -> None:
        del layer.forward
        if self.before is not None:
            layer.forward = self.before

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        with self.kept():
            return self.again(self.plain, *args, use_reentrant=False, **kwargs)
