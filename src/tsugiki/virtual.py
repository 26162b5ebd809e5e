"""The model's own hooks: the adapter choice in, room for virtual tokens at the left, outputs without them on the way out.

A prompt is a post edit of the embedding at virtual positions, a prefix one of keys and values there. Rotary position 0 is
the identity, so a prefix's raw keys sit at position 0; tokens after n virtual ones count from n, as in Hugging Face PEFT.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .route import UNSET, Context, Spans, Stack, before_first, cell, levels, pinned, places, stack_of, stacks, wanted

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")            # arguments that describe packed rows


def chosen(home: Any, ids: Any, size: int) -> list[Stack]:
    """One stack a row: from the call, else the innermost `use` of this thread, else the default. Merged ones drop out."""
    if ids is None:
        ids = wanted(home)
        if ids is UNSET:
            return [tuple((name, 1.0) for name in home.default)] * size
    if isinstance(ids, Spans) and size != 1:
        raise UserError(f"adapter_ids: Spans are of one packed row, the batch has {size}")
    rows = [stack_of(entry) for entry in ids.ids] if isinstance(ids, Spans) else stacks(ids, size)
    for row in set(rows):
        for name, weight in row:
            home.get(name)                                       # raises for a name that is not attached
            if weight != 1.0 and name in home.virtual:
                raise UserError(f"adapter {name!r} has virtual tokens: it is used whole or not at all, not with weight {weight}")
        if missing := [name for name in home.merged if (name, 1.0) not in row]:
            raise UserError(f"adapter {missing[0]!r} is merged into the base, so a row without it cannot be computed; "
                            f"add it to every row of adapter_ids, or unmerge({missing[0]!r})")
    return [tuple(entry for entry in row if entry[0] not in home.merged) for row in rows]


def enter(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the model: make this forward's Context.

    Who packs documents into one row, on an attention that is told where they end, and leaves room for the virtual tokens of one
    adapter before each, all in their order, says virtual_slots (1, T): which of them each position is, or -1;
    position_ids are as without them.

    Who keeps the cache himself, row by row, says virtual_cached=True once the virtual tokens are in it, with mask and positions
    that count them, and token_places (2, B, T), as `Context.places`, for prompts that come in pieces.
    """
    home, kwargs = model.adapters, dict(kwargs)
    if args:
        kwargs = dict(zip(home.arguments, args, strict=False)) | kwargs
    ids, keys, prompt = (kwargs.pop(name, None) for name in ("adapter_ids", "token_keys", "prompt_mask"))
    cached, given = kwargs.pop("virtual_cached", False), kwargs.pop("token_places", None)
    slots = kwargs.pop("virtual_slots", None)
    main = _main(kwargs)
    rows = chosen(home, ids, len(main))
    if keys is not None and keys.shape != main.shape[:2]:
        raise UserError(f"token_keys has shape {tuple(keys.shape)}, the batch {tuple(main.shape[:2])}")
    spans = ids.ends if isinstance(ids, Spans) else None
    if spans and spans[-1] != main.shape[1]:
        raise UserError(f"adapter_ids: the last span ends at {spans[-1]}, the row at {main.shape[1]}")
    ctx = Context(levels(rows, main.device, spans), tuple(rows), *main.shape[:2], axis=int(spans is not None),
                  mask=kwargs.get("attention_mask"), keys=keys, home=home)
    if any(name in home.placed for row in set(rows) for name, _ in row):
        ctx = replace(ctx, places=_places(kwargs, ctx, main, prompt) if given is None else given)
    tokens = [[home.virtual[name] for name, _ in row if name in home.virtual] for row in rows]
    if slots is not None:
        ctx = _take_room(kwargs, ctx, slots, tokens)
    elif any(tokens) and not cached:
        if spans:
            raise UserError("virtual tokens (prefix, prompt) cannot be added to packed rows: adapter_ids are spans of one")
        for row, found in zip(rows, tokens, strict=True):
            if len(found) > 1:
                names = tuple(name for name, _ in row)
                raise UserError(f"adapters {names}: a row can hold the virtual tokens of one adapter, not of {len(found)}")
        counts = torch.tensor([found[0][0] if found else 0 for found in tokens], device=main.device)
        at_zero = torch.tensor([bool(found) and found[0][1] == "zero" for found in tokens], device=main.device)
        ctx = _make_room(home, kwargs, ctx, counts, at_zero)
    _push(model, home, ctx)
    return (), kwargs


def enter_part(part: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of the model inside (model.model), for callers that go around the head."""
    home = part.adapters_of[0].adapters
    if cell.ctx is not None and cell.ctx.home is home and cell.ctx.of is not part:
        return
    main = args[0] if args else _main(kwargs)
    rows = chosen(home, None, len(main))
    for name in {name for row in rows for name, _ in row}:
        if name in home.virtual or name in home.placed:
            raise UserError(f"adapter {name!r} needs the whole sequence: call the model itself, not {type(part).__name__}")
    _push(part, home, Context(levels(rows, main.device), tuple(rows), *main.shape[:2], mask=kwargs.get("attention_mask"),
                              home=home))


def leave(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
    """Forward hook of both, called also when the forward raised: the context around this one is back, outputs are trimmed."""
    ctx = cell.ctx
    if ctx is None or ctx.of is not module:
        return out
    cell.ctx = ctx.outer
    return _trim(out, ctx) if ctx.virtual and out is not None else out


def _places(kw: dict, ctx: Context, main: Tensor, prompt: Tensor | None) -> Tensor:
    """Context.places. The prompt is what `prompt_mask` says; else, with labels, what stands before the first of them; inside
    generate its input; else every token given before there is a cache."""
    size, length, device = ctx.size, ctx.length, main.device
    mask, positions, past, labels = (kw.get(n) for n in ("attention_mask", "position_ids", "past_key_values", "labels"))
    seen = past.get_seq_length() if past is not None else 0
    real = torch.ones(size, length, dtype=torch.bool, device=device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        seen = mask.shape[1] - length if seen else 0             # the cache may hold virtual tokens of other rows too
        real = mask[:, -length:].bool()
    starts = torch.zeros_like(real)
    if mask is None and positions is not None and not seen:      # packed rows: positions start again
        positions = positions.expand(size, -1)
        starts[:, 1:] = positions[:, 1:] <= positions[:, :-1]
    if prompt is None and labels is not None:
        prompt = before_first(labels != -100, starts)
    if prompt is None:
        columns = seen + torch.arange(length, device=device)
        prompt = (columns < cell.prompt if cell.prompt is not None else torch.full_like(columns, not seen)).expand(size, -1)
    found = places(real, starts, prompt.bool())
    if seen:                                                     # counting from the left goes on where the cache ends
        before = mask[:, :seen].sum(1, keepdim=True) if isinstance(mask, Tensor) else seen
        found[0] = torch.where(real, found[0] + before, found[0])
    return found


def _main(kwargs: dict) -> Tensor:
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    raise UserError("a forward needs input_ids or inputs_embeds")


def _push(module: nn.Module, home: Any, ctx: Context) -> None:
    outer = walk = cell.ctx
    while walk is not None:                            # an interrupted forward never left: drop it and what it contained
        outer = walk.outer if walk.of is module else outer
        walk = walk.outer
    if module.training:
        for part in home.checkpointed:
            function = part.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not getattr(function, "pinned", False):
                part._gradient_checkpointing_func = pinned(function)
    cell.ctx = replace(ctx, of=module, outer=outer)


def _make_room(home: Any, kw: dict, ctx: Context, counts: Tensor, at_zero: Tensor) -> Context:
    """Add P = max(counts) positions at the left of every row; a row with fewer virtual tokens has the rest masked."""
    size, length, device = ctx.size, ctx.length, counts.device
    room = int(counts.max())
    mask, positions, past = kw.get("attention_mask"), kw.get("position_ids"), kw.get("past_key_values")
    seen = past.get_seq_length() if past is not None else 0
    _refuse_packed(kw, mask, positions)
    if mask is None:
        mask = torch.ones(size, length + max(seen - room, 0), dtype=torch.long, device=device)
    slot = torch.arange(room, device=device) - (room - counts[:, None])          # (B, P): < 0 where a row has no token
    kw["attention_mask"] = mask = torch.cat([(slot >= 0).to(mask.dtype), mask], 1)
    if positions is None and "position_ids" in home.arguments and not home.family.positions_from_mask:
        positions = torch.arange(length, device=device)[None] + max(seen - room, 0)
    if positions is not None:
        positions = positions.expand(size, -1) + counts[:, None]
        if not seen:
            positions = torch.cat([(slot * ~at_zero[:, None]).clamp_min(0), positions], 1)
        kw["position_ids"] = positions
    if kw.get("cache_position") is not None:
        at = kw["cache_position"]
        kw["cache_position"] = torch.cat([torch.arange(room, device=device), at + room]) if not seen else at + room
    if seen:
        return replace(ctx, mask=mask)
    if kw.get("labels") is not None:                   # a row's first token is no target: not without virtual tokens either
        kw["labels"] = torch.cat([torch.full_like(kw["labels"][:, :1], -100), kw["labels"][:, 1:]], 1)
    for name, filler in (("input_ids", 0), ("inputs_embeds", 0), ("token_type_ids", 0), ("labels", -100),
                         ("shift_labels", -100)):
        value = kw.get(name)
        if value is not None:
            kw[name] = torch.cat([value.new_full((size, room, *value.shape[2:]), filler), value], 1)
    keep = kw.get("logits_to_keep")
    if isinstance(keep, Tensor):
        kw["logits_to_keep"] = keep + room
    keys = ctx.keys
    if keys is not None:                               # virtual tokens draw from keys of their own, per row
        keys = torch.cat([~keys[:, :1] - torch.arange(room, 0, -1, device=keys.device), keys], 1)
    at = None if ctx.places is None else F.pad(ctx.places, (room, 0), value=-1)
    ctx = replace(ctx, virtual=room, length=length + room, mask=mask, keys=keys, places=at)
    if kw.get("inputs_embeds") is not None:            # the embedding will not run, so a prompt's edit of it runs here
        kw["inputs_embeds"] = home.embed_tap.post(kw["inputs_embeds"], kw["inputs_embeds"], ctx)
    return ctx


def _take_room(kw: dict, ctx: Context, slots: Tensor, tokens: list[list[tuple[int, str]]]) -> Context:
    """Virtual tokens stand where `slots` says: positions of the others count from theirs, and so do their random draws."""
    count = int(slots.max()) + 1
    if len(slots) != 1 or [found[0] for found in tokens[0]] != [count] or ctx.axis or ctx.places is not None:
        raise UserError("virtual_slots: of one packed row, whose only adapter with virtual tokens has as many, and none that must "
                        "know where prompts end")
    there = slots >= 0
    own = torch.zeros_like(slots) if tokens[0][0][1] == "zero" else slots
    kw["position_ids"] = torch.where(there, own, kw["position_ids"] + count)
    keys = ctx.keys
    if keys is not None:                               # as in _make_room, from the key of the document's first token
        back = torch.where(there, count - slots, 0)
        keys = torch.where(there, ~keys.gather(1, torch.arange(slots.shape[1], device=slots.device)[None] + back) - back, keys)
    return replace(ctx, slots=there[0].nonzero()[:, 0], keys=keys)


def _refuse_packed(kw: dict, mask: Any, positions: Tensor | None) -> None:
    packed = next((name for name in PACKED if kw.get(name) is not None), None)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        packed = "an attention_mask that is not (rows, positions)"
    elif mask is None and positions is not None and bool((positions[:, 1:] <= positions[:, :-1]).any()):
        packed = "position_ids that start again"
    if packed:
        raise UserError(f"virtual tokens (prompt, prefix) cannot be added to packed rows: the forward got {packed}")


def _trim(out: Any, ctx: Context) -> Any:
    """The outputs of the real positions only: logits, hidden states, and the queries of attention weights."""
    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(v) for v in value)
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] > ctx.length - ctx.virtual:
            return value[:, -(ctx.length - ctx.virtual):]
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] == ctx.length:
            return value[:, :, ctx.virtual:]
        return value
    if isinstance(out, tuple):
        return tuple(cut(v) for v in out)
    for name in ("logits", "hidden_states", "attentions", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            setattr(out, name, cut(getattr(out, name)))
    return out
