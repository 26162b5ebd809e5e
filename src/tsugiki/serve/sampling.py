"""The next token of each row: a pure function of its scores, its sampling, its own tokens, its seed and the token's number."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsugiki.serve.request import Sampling


@dataclass(frozen=True)
class Draw:
    """What decides a row's next token, beside its scores."""
    sampling: Sampling
    seed: int
    number: int                                       # how many tokens were answered before
    seen: Sequence[int] = ()                          # prompt and answer so far; read only with a repetition penalty


def uniform(seed: int, number: int) -> float:
    """A number in [0, 1) that belongs to (seed, number)."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def choose(scores: Tensor, draws: Sequence[Draw]) -> list[int]:
    """One token a row of scores (n, V), float32. As transformers: repetition penalty, temperature, top-k, top-p.

    No row's token depends on another row.
    """
    if any(d.sampling.repetition_penalty != 1.0 for d in draws):
        scores = scores.clone()
        for row, draw in zip(scores, draws, strict=True):
            _penalise(row, draw)
    chosen = scores.argmax(-1)
    sampled = [i for i, d in enumerate(draws) if d.sampling.temperature > 0]
    if sampled:
        some = scores[sampled] if len(sampled) < len(scores) else scores
        chosen[sampled] = _sample(some, [draws[i] for i in sampled])
    return chosen.tolist()


def _penalise(row: Tensor, draw: Draw) -> None:
    if draw.sampling.repetition_penalty == 1.0:
        return
    seen = torch.tensor(sorted(set(draw.seen)), device=row.device)
    had, penalty = row[seen], draw.sampling.repetition_penalty
    row[seen] = torch.where(had < 0, had * penalty, had / penalty)


def _sample(scores: Tensor, draws: Sequence[Draw]) -> Tensor:
    """(n,) int64: the token whose share of [0, 1), in the order of ids, holds the row's draw."""
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=scores.device)[:, None]
    scores = scores / column([d.sampling.temperature for d in draws]).to(scores.dtype)
    for i, k in enumerate(d.sampling.top_k for d in draws):
        if 0 < k < scores.shape[1]:
            scores[i].masked_fill_(scores[i] < scores[i].topk(k).values[-1], -torch.inf)
    for i, p in enumerate(d.sampling.top_p for d in draws):
        if p < 1:
            ordered, ids = scores[i].sort()
            unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - p
            unlikely[-1] = False                      # the likeliest stays, whatever p is
            scores[i, ids[unlikely]] = -torch.inf
    shares = torch.softmax(scores, -1, dtype=torch.float64).cumsum(-1)
    draw = column([uniform(d.seed, d.number) for d in draws]) * shares[:, -1:]
    return torch.searchsorted(shares, draw, right=True)[:, 0].clamp(max=scores.shape[1] - 1)


def logprobs(scores: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """(logprob of the token, the `count` likeliest with theirs) of one row of the model's own scores (V,)."""
    logs = torch.log_softmax(scores, -1)
    best = logs.topk(min(count, len(logs)))
    return float(logs[token]), list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
