"""What a study will take, before it starts: runs, trained parameters, memory and time, from one rehearsed step a method."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from tsugiki.compare.rows import Parts
from tsugiki.compare.schedule import Lengths, expected
from tsugiki.compare.sizes import count
from tsugiki.compare.study import ALONE, Cell, Study, Variant, steps_of
from tsugiki.config import RunConfig, build
from tsugiki.data import Conversation, Renderer
from tsugiki.errors import UserError
from tsugiki.load import compute_dtype, device_of, load_tokenizer
from tsugiki.methods import make
from tsugiki.plan import Plan, plan

LOOK = 200                                            # rows whose length is taken for that of all
FORWARD = 4096                                        # tokens of a forward, at most
START = 4.0                                           # seconds to load the base and the rows; corrected by the first runs


@dataclass(frozen=True)
class Load:
    """A data set's size: steps, tokens of a step, tokens that are scored along a run and at its end."""
    steps: int
    step_tokens: float
    row_tokens: float
    along: float
    end: float


@dataclass(frozen=True)
class Planned:
    """The plan of a study. `plans` lacks a method that the base cannot take: `refused` says why."""
    study: Study
    lengths: Lengths
    loads: Mapping[str, Load]
    plans: Mapping[str, Plan]
    refused: Mapping[str, str]
    cells: tuple[Cell, ...]                           # still to run, as far as can be told

    def seconds(self, cell: Cell, seen: Mapping[str, dict]) -> float:
        """Of one cell: what the runs of this method took, else what the rehearsed step says, corrected by the runs there are."""
        if cell.variant.method == ALONE:
            return START + self._scoring(cell, 1.0)
        same = [r["wall"] / r["steps"] for r in seen.values() if "wall" in r and r.get("steps")
                and r["cell"]["variant"] == cell.plain()["variant"] and r["cell"]["data"] == cell.data]
        if same:
            return sum(same) / len(same) * cell.steps
        return self.ratio(seen) * self._rehearsed(cell)

    def ratio(self, seen: Mapping[str, dict]) -> float:
        """Seconds that runs took, by what had been expected of them."""
        pairs = [(r["wall"], self._rehearsed(Cell.of(r["cell"]))) for r in seen.values() if "wall" in r and r.get("steps")]
        return sum(took for took, _ in pairs) / sum(said for _, said in pairs) if pairs else 1.0

    def _rehearsed(self, cell: Cell) -> float:
        found, size = self.plans.get(cell.variant.label), self.loads[cell.data]
        rate = found.step_seconds / found.tokens if found else self.typical
        return START + rate * size.step_tokens * cell.steps + self._scoring(cell, rate / self.typical)

    def _scoring(self, cell: Cell, slow: float) -> float:
        size = self.loads[cell.data]
        return slow * self.typical / 3 * (size.along + (size.end if cell.test else 0.0))

    @cached_property
    def typical(self) -> float:
        """Seconds a trained token, the mean of the methods."""
        rates = [p.step_seconds / p.tokens for p in self.plans.values()]
        return sum(rates) / len(rates) if rates else 1e-3

    def left(self, cells: list[Cell] | tuple[Cell, ...], seen: Mapping[str, dict]) -> float:
        """Seconds of all these cells."""
        return sum(self.seconds(c, seen) for c in cells)

    def plain(self, seen: Mapping[str, dict] | None = None) -> dict:
        return {"runs": len(self.cells), "seconds": round(self.left(self.cells, seen or {})),
                "methods": {label: {"trainable": p.trainable, "share": p.trainable / p.total, "memory_bytes": p.memory,
                                    "seconds_a_step": p.step_seconds} for label, p in self.plans.items()},
                "refused": dict(self.refused),
                "data": {name: {"steps": size.steps, "tokens_of_a_row": round(size.row_tokens, 1)}
                         for name, size in self.loads.items()}}


def planned(study: Study, parts: Mapping[str, Parts], results: Mapping[str, dict], rehearse: bool = True) -> Planned:
    """Lengths, loads and, unless nobody will look, a rehearsed step of every method. Raises UserError where no method fits."""
    cfg = {name: build(RunConfig, study.values(name)) for name in study.names()}
    first = next(iter(cfg.values()))
    tokenizer = load_tokenizer(first.base, first.trust_remote_code)
    loads = {name: _load_of(study, name, cfg[name], parts[name], tokenizer) for name in study.names()}
    lengths = Lengths(count(study.run, Variant("full"))[2], {name: size.steps for name, size in loads.items()})
    device = device_of(first.device)
    length = max(2, round(sum(size.row_tokens for size in loads.values()) / len(loads)))
    tokens = min(FORWARD, max(length, round(sum(size.step_tokens for size in loads.values()) / len(loads))))
    plans, refused = {}, {}
    for variant in study.variants() if rehearse else []:
        try:
            plans[variant.label] = plan(first.base, make(variant.method, **variant.fields), tokens=tokens, length=length,
                                        trained=0.3, dtype=compute_dtype(first.train.dtype, device), device=str(device),
                                        trust_remote_code=first.trust_remote_code)
        except UserError as e:
            refused[variant.label] = str(e)
    if refused and not plans:
        raise UserError(next(iter(refused.values())))
    return Planned(study, lengths, loads, plans, refused, tuple(expected(study, results, lengths)))


def _load_of(study: Study, name: str, cfg: RunConfig, parts: Parts, tokenizer) -> Load:
    renderer = Renderer(tokenizer, template=parts.template, train_on=cfg.data.train_on, stop=cfg.data.stop)

    def mean(rows: list[Conversation]) -> float:
        looked = rows[::max(1, len(rows) // LOOK)][:LOOK]
        examples, _ = renderer.examples(looked, cfg.train.max_length)
        return sum(len(e.ids) for e in examples) / max(1, len(looked))
    row, steps = mean(parts.train), steps_of(cfg, len(parts.train))
    share = float(sum(a.share for a in parts.sources.added))
    watched = sum(mean(rows) * len(rows) for rows in parts.sources.watched.values())
    along = (mean(parts.validation) * len(parts.validation) + watched) * (study.curve_points + 2)
    answers = len(cfg.eval.choices) or 2
    end = mean(parts.test) * len(parts.test) * answers + (study.general_tokens if study.general else 0)
    return Load(steps, row * min(cfg.train.batch_size, len(parts.train)) / (1 - share), row, along, end)
