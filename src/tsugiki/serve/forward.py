"""The engine's two forwards: pieces of prompts, and one token of every row that runs."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tsugiki.adapters import attach
from tsugiki.errors import UserError
from tsugiki.evaluate.packed import packed
from tsugiki.load import max_positions
from tsugiki.serve.arena import Arena, past_of
from tsugiki.serve.rows import Row

PADDED = 1.5                                          # columns that a forward of several prompts may take, over their tokens


class Forward:
    """A base, ready to serve. Raises UserError for one that cannot be: its keys and values must be in transformers' cache,
    and its positions must not depend on what else is in the batch."""

    def __init__(self, model: nn.Module, steps: int):
        self.model, self.home, self.body = model, attach(model), packed(model, steps)
        self.device = model.get_input_embeddings().weight.device
        self.counts = "position_ids" in self.home.arguments and not self.home.family.positions_from_mask
        self.arena = Arena()
        self.column_bytes = self._probe()

    def renew(self) -> None:
        """An empty cache for those that run."""
        self.arena = Arena(self.arena.limit)

    def longest(self) -> int | None:
        """Positions a row may take."""
        limit, rope = max_positions(self.model), getattr(self.model.config, "rope_parameters", None) or {}
        for part in (rope, *(p for p in rope.values() if isinstance(p, dict))):
            if part.get("rope_type") == "longrope":       # beyond it, the longest row would change the rotation of all
                limit = part.get("original_max_position_embeddings") or limit
        return limit

    @torch.no_grad()
    def _probe(self) -> int:
        """Two steps of two tokens; the bytes of a column of the cache."""
        arena, ids = past_of([None, None], 2), torch.zeros(2, 2, dtype=torch.long, device=self.device)
        ones = torch.ones_like(ids)
        whole = self._run(self.model, arena, ids, ones, None, [None, None]).logits
        if not arena.layers or any(layer.buffers is None for layer in arena.layers):
            raise UserError(f"serve: {type(self.model).__name__} keeps its keys and values elsewhere than in transformers' cache")
        first = past_of([None, None], 1)
        self._run(self.model, first, ids[:, :1], ones[:, :1], None, [None, None])
        first.lengths, first.end = [1, 1], 1
        again = past_of([first.row(0, 0, 1), first.row(1, 0, 1)], 1)
        step = self._run(self.body, again, ids[:, 1:], ones, ones[:, 1:], [None, None]).logits
        gap = (step[:, -1].float() - whole[:, -1].float()).abs().max()
        if not gap <= 0.05 * whole[:, -1].float().abs().max():
            raise UserError(f"serve: {type(self.model).__name__} does not give with its cache what it gives without")
        return sum(b[0, :, 0].numel() * b.element_size() for layer in arena.layers for b in layer.buffers)

    def _run(self, run: nn.Module, cache: Arena, ids: Tensor, mask: Tensor, positions: Tensor | None, who: list[str | None],
             **options: Any) -> Any:
        if self.counts and positions is not None:
            options["position_ids"] = positions
        return run(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=True, adapter_ids=who,
                   **options)

    # Prompts.

    def group(self, rows: Sequence[Row], budget: int) -> list[tuple[Row, int]]:
        """Who goes into the next forward, with how many prompt tokens: the first one, and others of like length."""
        chosen: list[tuple[Row, int]] = []
        for row in rows:
            size = min(len(row.prompt) - row.done, budget)
            sizes = [n for _, n in chosen] + [size]
            padded = len(sizes) * max(sizes)
            alike = not chosen or (row.kv is None) == (chosen[0][0].kv is None)
            if not chosen or alike and padded <= budget and padded <= PADDED * sum(sizes):
                chosen.append((row, size))
        return chosen

    def prompt(self, group: Sequence[tuple[Row, int]]) -> list[Tensor | None]:
        """Go on with these rows' prompts: their `kv` and `done` grow; (V,) scores of each that is at its end.

        All of them have a past, or none has. New tokens are filled up at the right, after what they may see.
        """
        rows, sizes = [row for row, _ in group], [size for _, size in group]
        fresh, width, count = rows[0].kv is None, max(sizes), len(rows)
        room = max(row.virtual for row in rows) if fresh else 0
        arena = past_of([row.kv for row in rows], room + width)
        past = max(arena.lengths)
        ids, mask = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, past + width, dtype=torch.long)
        positions, places = torch.zeros(count, width, dtype=torch.long), torch.full((2, count, width), -1)
        for i, (row, size) in enumerate(group):
            ids[i, :size] = torch.tensor(row.prompt[row.done:row.done + size])
            mask[i, past - arena.lengths[i]:past + size] = 1
            at = torch.arange(size)
            positions[i, :size] = arena.lengths[i] + at
            positions[i, size:] = arena.lengths[i] + size - 1         # a place that the base has
            places[:, i, :size] = torch.stack([row.done + at, len(row.prompt) - 1 - row.done - at])
        ends = sorted({size - 1 for row, size in group if row.done + size == len(row.prompt)}) or [width - 1]
        out = self._run(self.model, arena, *(t.to(self.device) for t in (ids, mask, positions)), [row.key for row in rows],
                        logits_to_keep=torch.tensor(ends, device=self.device), virtual_cached=not fresh,
                        token_places=places.to(self.device) if any(row.placed for row in rows) else None)
        found = []
        for i, (row, size) in enumerate(group):
            start, end = past - arena.lengths[i], past + size
            if fresh:
                start, end = room - row.virtual, room + size
            row.kv, row.done = arena.row(i, start, end), row.done + size
            found.append(out.logits[i, ends.index(size - 1)].float() if row.done == len(row.prompt) else None)
        return found

    # Answers.

    def step(self, rows: Sequence[Row]) -> Tensor:
        """(B, V) scores after the newest token of every row in the arena, in its order; the arena has it then."""
        self.arena.room(len(rows), 0, 1)
        scores = self._step(self.body, self.arena, rows)
        self.arena.advance()
        return scores

    def alone(self, row: int, who: Row) -> Tensor:
        """(V,) the same for one row by itself, after a step of all failed: the arena has its new column, but does not advance."""
        arena, end = self.arena, self.arena.end
        own = past_of([arena.row(row, end - arena.lengths[row], end)], 1)
        scores = self._step(self.model, own, [who])[0]
        arena.put(row, own.row(0, own.end, own.end + 1), end + 1)
        return scores

    def _step(self, run: nn.Module, arena: Arena, rows: Sequence[Row]) -> Tensor:
        ids = torch.tensor([[row.answer[-1]] for row in rows], device=self.device)
        positions = torch.tensor([[n] for n in arena.lengths], device=self.device)
        places = None
        if any(row.placed for row in rows):
            places = torch.stack([positions, torch.full_like(positions, -1)])
        return self._run(run, arena, ids, arena.mask(), positions, [row.key for row in rows], virtual_cached=True,
                         token_places=places).logits[:, -1].float()
