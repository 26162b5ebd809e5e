"""Generation, one token a step: what `model.generate` gives, with a cache that grows in place and rows that leave when they end.

transformers prepares everything (the generation config, logits processors, stopping criteria, masks, positions, streamers) and
hands over to `_Loop` where it would enter its own loop. What that loop does not know is left to transformers' own.
"""
from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from tsugiki.evaluate.cache import grown
from tsugiki.evaluate.packed import packed
from tsugiki.kernels.passes import rotating
from tsugiki.route import UNSET, stacks, wanted

BLOCK = 256                                           # scores that are compared at once
SPARSER = 0.75                                        # rows are dropped when at most this share of the batch still runs
KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}      # arguments of a forward
# Processors and criteria that treat each row by itself and keep nothing from step to step: rows may leave between steps.
ROWWISE = {"RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "SuppressTokensLogitsProcessor",
           "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "NoBadWordsLogitsProcessor",
           "EosTokenCriteria", "MaxLengthCriteria", "StopStringCriteria"}


class _Unknown(Exception):
    """This model or setting is not for the loop here; nothing was produced yet, or it is thrown away."""


class Decoder:
    """Generates with one model, as often as called, until the weights change. The model is left as it is.

    steps: tokens that will be decoded with it in all, as far as known: whether packing its weights pays (`packed`). The
    packed copy takes as much memory as the weights, and lives as long as this object.
    """

    def __init__(self, model: nn.Module, steps: int):
        self.model = model
        self.body = packed(model, steps)

    def generate(self, input_ids: Tensor, streamer: Any = None, **options: Any) -> Tensor:
        """`model.generate` of the same arguments: (B, T + new) int64, rows that ended filled with the pad token.

        Greedy tokens, and sampled ones after the same `torch.manual_seed`, are those of transformers. `adapter_ids`
        goes with the rows.
        """
        kept = _Kept(streamer) if streamer is not None else None
        draws = torch.get_rng_state()
        try:
            with rotating(self.model):
                return self.model.generate(input_ids=input_ids, streamer=kept, custom_generate=partial(_loop, self.body, kept),
                                           **options)
        except _Unknown:
            torch.set_rng_state(draws)
            if kept is not None and kept.shown:       # begun, and only then found to be unknown: do not say it twice
                streamer = _Silent(streamer, kept.shown)
            return self.model.generate(input_ids=input_ids, streamer=streamer, **options)


class _Kept:
    """A streamer that counts what it passed on."""

    def __init__(self, streamer: Any):
        self.streamer, self.shown = streamer, 0

    def put(self, value: Tensor) -> None:
        self.shown += 1
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()


class _Silent(_Kept):
    """A streamer that passes on nothing of what was shown before."""

    def __init__(self, streamer: Any, shown: int):
        self.streamer, self.shown = streamer, -shown

    def put(self, value: Tensor) -> None:
        self.shown += 1
        if self.shown > 0:
            self.streamer.put(value)


def _loop(body: nn.Module, streamer: Any, model: nn.Module, input_ids: Tensor, logits_processor: LogitsProcessorList,
          stopping_criteria: StoppingCriteriaList, generation_config: Any, **kwargs: Any) -> Tensor:
    """transformers' `_sample`, called by its `generate` after all is prepared. input_ids: (B, T)."""
    _check(generation_config, kwargs, model)
    rows = _Rows(body, model, input_ids, kwargs)
    sample = generation_config.do_sample
    pad = generation_config._pad_token_tensor
    may_drop = not sample and {type(part).__name__ for part in (*logits_processor, *stopping_criteria)} <= ROWWISE
    logits = rows.prefill()
    while True:
        scores = logits[:, -1].to(torch.float32, copy=True)                   # (B, V)
        scores = logits_processor(rows.ids, scores)
        new = torch.multinomial(torch.softmax(scores, -1), 1)[:, 0] if sample else _largest(scores)
        if rows.ended.any():                          # without stop tokens no row ends before the last step
            new = torch.where(rows.ended, pad, new)
        rows.append(new)
        if streamer is not None:
            streamer.put(new.cpu())
        rows.ended |= stopping_criteria(rows.ids, None)
        if bool(rows.ended.all()):
            break
        if may_drop and int((~rows.ended).sum()) <= SPARSER * len(rows.ended):
            rows.drop()
        logits = rows.step()
    if streamer is not None:
        streamer.end()
    return rows.result(pad)


def _largest(scores: Tensor) -> Tensor:
    """scores.argmax(-1) of (B, V): first which block of them, then which of it, since argmax is slow on a CPU, and amax is not."""
    whole = scores.shape[1] - scores.shape[1] % BLOCK
    if scores.device.type != "cpu" or not whole:
        return scores.argmax(-1)
    tops, rest = scores[:, :whole].unflatten(1, (-1, BLOCK)).amax(-1), scores[:, whole:]
    if rest.shape[1]:
        tops = torch.cat([tops, rest.amax(-1, keepdim=True)], 1)
    at = tops.argmax(-1, keepdim=True) * BLOCK + torch.arange(BLOCK)
    at = at.clamp_max_(scores.shape[1] - 1)
    return at.gather(1, scores.gather(1, at).argmax(-1, keepdim=True))[:, 0]


def _check(config: Any, kwargs: dict[str, Any], model: nn.Module) -> None:
    """Raise _Unknown for what only transformers' own loop does."""
    sharded = any(hasattr(p, "full_tensor") for p in model.parameters())      # every process must make the same steps
    plain = config.num_beams == 1 and config.use_cache and not (
        sharded or config.return_dict_in_generate or config.output_scores or config.output_logits
        or config.output_attentions or config.output_hidden_states or config.cache_implementation
        or config.prefill_chunk_size or config.prompt_lookup_num_tokens or config.is_assistant)
    cache = kwargs.get("past_key_values")
    fresh = type(cache) is DynamicCache and not cache.get_seq_length() and not cache.offloading
    if not plain or not fresh or kwargs.keys() - KNOWN:
        raise _Unknown


class _Rows:
    """The rows that still run, and all that belongs to each."""

    def __init__(self, body: nn.Module, model: nn.Module, input_ids: Tensor, kwargs: dict[str, Any]):
        self.body, self.model, self.kwargs = body, model, kwargs
        self.cache = kwargs["past_key_values"] = grown()
        self.ids = input_ids                                                  # (B, T + n) of the rows that run
        self.ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.index = torch.arange(len(input_ids), device=input_ids.device)    # which row of the whole batch each is
        self.done: list[tuple[Tensor, Tensor]] = []                           # (index, ids) of rows that left
        home = model.__dict__.get("adapters")
        ids = UNSET if home is None else wanted(home)
        self.who = None if ids is UNSET else [dict(row) for row in stacks(ids, len(input_ids))]

    def prefill(self) -> Tensor:
        """(B, 1 or T, V)"""
        return self._forward(is_first_iteration=True, next_sequence_length=self.ids.shape[1])

    def step(self) -> Tensor:
        return self._forward(next_sequence_length=1)

    def _forward(self, **options: Any) -> Tensor:
        inputs = self.model.prepare_inputs_for_generation(self.ids, **options, **self.kwargs)
        if self.who is not None:
            inputs["adapter_ids"] = self.who if any(row != self.who[0] for row in self.who) else self.who[:1]
        out = self.body(**inputs, return_dict=True)
        if out.get("past_key_values") is not self.cache or not self.cache.get_seq_length():
            raise _Unknown                            # the model keeps its state elsewhere
        return out.logits

    def append(self, new: Tensor) -> None:
        """One token a row, (B,): ids, mask and positions grow by it."""
        self.ids = torch.cat([self.ids, new[:, None]], 1)
        if (mask := self.kwargs.get("attention_mask")) is not None:
            self.kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if (positions := self.kwargs.get("position_ids")) is not None:
            self.kwargs["position_ids"] = torch.cat([positions, positions[..., -1:] + 1], -1)

    def drop(self) -> None:
        """Take the ended rows out of everything."""
        self.done.append((self.index[self.ended], self.ids[self.ended]))
        stay = (~self.ended).nonzero()[:, 0]
        size, room = len(self.ended), self._virtual()
        self.ids, self.index, self.ended = self.ids[stay], self.index[stay], self.ended[stay]
        for name in ("attention_mask", "position_ids"):
            value = self.kwargs.get(name)
            if value is not None and len(value) == size:
                self.kwargs[name] = value[stay]
        if self.who is not None:
            self.who = [self.who[i] for i in stay.tolist()]
        self.cache.select(stay, room - self._virtual())

    def _virtual(self) -> int:
        """Positions that virtual tokens take at the left: as many as the row with the most has."""
        counts = self.model.adapters.virtual if self.who else {}
        return max((counts[name][0] for row in self.who or () for name in row if name in counts), default=0)

    def result(self, pad: Tensor | None) -> Tensor:
        """All rows in their first order, (B, T + new)."""
        if not self.done:
            return self.ids
        index, ids = zip(*self.done, (self.index, self.ids), strict=True)
        out = self.ids.new_full((sum(map(len, index)), self.ids.shape[1]), int(pad))
        for at, rows in zip(index, ids, strict=True):
            out[at, :rows.shape[1]] = rows
        return out
