"""A study as data: a run's values, the axes that vary, the data sets; and each of its runs as a cell with a RunConfig."""
from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

from tsugiki.config import EvalConfig, RunConfig, build, merge, option, put
from tsugiki.errors import UserError
from tsugiki.methods import make

HOLDOUT = 0.1                                         # share of the rows that are the test, where no test file is given
LOG_POINTS = 40                                       # lines of a run's training loss
ALONE = "base"                                        # the cell that scores the base as it is
# Keys of a run that a study sets itself, and what to give instead.
VARIED = {"method": "methods", "train.lr": "rates", "train.seed": "seeds", "train.eval_steps": "curve_points",
          "train.log_steps": ""}


@dataclass(frozen=True, kw_only=True)
class Study:
    """What `tsugiki compare` needs besides a run's own keys."""
    out: str | None = option(None, "folder of the study; what is there is not made again")
    methods: list[dict] = option(lambda: [{"name": n} for n in ("lora", "series", "prefix")],
                                 "names, or a name with fields; a list as a field's value is an axis: {name: lora, rank: [4, 8]}")
    rates: list[float] = option(list, "learning rates of every method (default, 'auto': each method's own times the factors)")
    factors: list[float] = option(lambda: [0.3, 1.0, 3.0], "the rates tried are a method's recommended rate times these")
    extend: int = option(2, "while the best rate is at the grid's edge, try one beyond it, at most so often (auto only)", low=0)
    search: str = option("grid", "grid: every rate in full length; halving: short runs first, the better half goes on, longer",
                         ("grid", "halving"))
    select: str = option("loss", "what a rate is chosen by, on the validation rows: their loss, or the metric", ("loss", "metric"))
    seeds: list[int] = option(lambda: [0, 1, 2], "seeds of the final runs; the first one also searches the rates")
    validation: float = option(0.1, "share of the training rows held out to choose rates on", low=0.0, high=0.9)
    validation_rows: int = option(500, "at most so many of them", low=1)
    data_seed: int = option(0, "the rows of train, validation and test are drawn by it; the runs' seeds do not move them", low=0)
    curve_points: int = option(8, "how often a run's validation loss is taken, for the learning curves", low=1)
    parameters: int | None = option(None, "choose each method's rank or size so that it trains as nearly so many numbers as it can",
                                    low=1)
    general: list[str] = option(list, "plain texts on which the loss is taken before and after: what a method forgets")
    general_tokens: int = option(20000, "tokens of them that are scored, from the start", low=16)
    samples: int = option(3, "test rows whose answers the report shows side by side", low=0)
    run: dict = option(dict, "values of a RunConfig, the same for all runs")
    datasets: dict = option(dict, "by name: values of a RunConfig laid over those (data, eval, train), and 'validation', files")

    def __post_init__(self) -> None:
        for key, values in (("methods", self.methods), ("seeds", self.seeds), ("factors", self.factors)):
            if not values:
                raise UserError(f"{key}: there must be at least one")
        if bad := [r for r in (*self.rates, *self.factors) if not r > 0]:
            raise UserError(f"rates: {bad[0]:g} is out of range, allowed: above 0")
        if bad := [s for s in self.seeds if s < 0]:
            raise UserError(f"seeds: {bad[0]} is out of range, allowed: at least 0")
        for key, values in (("seeds", self.seeds), ("rates", self.rates), ("factors", self.factors)):
            if len(set(values)) < len(values):
                raise UserError(f"{key}: one of them is there twice")
        for name in self.datasets:
            if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
                raise UserError(f"datasets.{name}: a name is made of letters, digits, '_', '-' and '.'")
        self.variants()                               # a method that cannot be made is told at once

    def variants(self) -> list[Variant]:
        """Every method with every combination of its listed fields, in the order given."""
        found: dict[str, Variant] = {}
        for entry in self.methods:
            axes = [[(key, v) for v in _axis(entry["name"], key, value)] for key, value in entry.items() if key != "name"]
            for fields in itertools.product(*axes):
                variant = Variant(entry["name"], dict(fields))
                make(entry["name"], **variant.fields)
                if variant.label in found:
                    raise UserError(f"methods: {variant.label} is there twice")
                if variant.label == ALONE:
                    raise UserError(f"methods: {ALONE!r} is the base alone, which is scored anyway")
                found[variant.label] = variant
        return list(found.values())

    def values(self, data: str) -> dict:
        """The RunConfig values of a data set, test rows included: without a file for them, a share of the rows."""
        found = merge(self.run, {k: v for k, v in self.datasets.get(data, {}).items() if k != "validation"})
        if found.get("data", {}).get("streaming") in ("on", True):
            raise UserError("data.streaming: on does not go with a study, whose runs share their rows in memory; leave it out, or "
                            "train one method at a time")
        put(found, "train.eval_steps", 1)             # patience and the guard need some; a run's own come from curve_points
        if not (found.get("data", {}).get("eval") or found.get("data", {}).get("holdout") or found.get("eval", {}).get("task")):
            put(found, "data.holdout", HOLDOUT)
        return found

    def names(self) -> list[str]:
        """The data sets' names."""
        return list(self.datasets) or ["data"]

    def validation_files(self, data: str) -> list[str]:
        found = self.datasets.get(data, {}).get("validation", [])
        return found if isinstance(found, list) else [found]

    def config(self, cell: Cell) -> RunConfig:
        """The run of a cell. On its way it takes the validation loss only; `scoring` is for the end."""
        values, lines = self.values(cell.data), max(1, cell.steps // LOG_POINTS)
        if not values.get("data", {}).get("eval"):    # a run that evaluates must name held-out rows; it is given them as they are
            put(values, "data.holdout", values.get("data", {}).get("holdout") or HOLDOUT)
        every = lines * max(1, round(cell.steps / self.curve_points / lines))
        return build(RunConfig, merge(values, {
            "out": str(Path(self.out or ".") / "runs" / cell.key), "method": {"name": cell.variant.method} | cell.variant.fields,
            "train": {"lr": cell.lr, "seed": cell.seed, "steps": cell.steps, "eval_steps": every, "log_steps": lines},
        }) | {"eval": {"metric": "loss", "max_new_tokens": self.scoring(cell.data).max_new_tokens}})

    def scoring(self, data: str) -> EvalConfig:
        """How a data set's test rows are scored."""
        return build(RunConfig, self.values(data)).eval

    def plain(self) -> dict:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Variant:
    """A method with the fields that were set."""
    method: str
    fields: dict = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join([self.method, *(k if v is True else f"{k}={_short(v)}" for k, v in self.fields.items())])


@dataclass(frozen=True)
class Cell:
    """One run of a study: a data set, a method, a rate, a seed, a length; `test`: it is also scored on the test rows.

    A cell without a method is the base alone. Cells of one base are plain configurations, so that those which fit together
    may be handed to one process as a list.
    """
    data: str
    variant: Variant
    lr: float = 0.0
    seed: int = 0
    steps: int = 0
    test: bool = False

    @property
    def key(self) -> str:
        """Its name on disk: what it trains, not whether it is scored on the test rows."""
        folder = f"{self.data}/{re.sub(r'[^A-Za-z0-9_.=-]+', '-', self.variant.label)}"
        return f"{folder}/lr-{self.lr:g}-seed-{self.seed}-steps-{self.steps}" if self.steps else folder

    def plain(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def of(values: dict) -> Cell:
        return Cell(**values | {"variant": Variant(**values["variant"])})


def alone(data: str) -> Cell:
    """The base as it is."""
    return Cell(data, Variant(ALONE), test=True)


def study_of(values: dict) -> Study:
    """A study from nested plain values: keys of `Study` and, beside them, keys of a run (base, data, train, eval, ...)."""
    own = {f.name for f in dataclasses.fields(Study)} - {"run"}
    mine, run = {}, {}
    for key, value in values.items():
        (mine if key in own else run)[key] = value
    for dotted, instead in VARIED.items():
        for where, place in [("", run), *((f"datasets.{n}.", d) for n, d in _sets(mine).items())]:
            if _there(place, dotted):
                raise UserError(f"{where}{dotted}: a study sets it itself" + (f"; give {instead}" if instead else ""))
    if isinstance(mine.get("methods"), (str, dict)):
        mine["methods"] = [mine["methods"]]
    if isinstance(mine.get("methods"), list):
        mine["methods"] = [{"name": m} if isinstance(m, str) else m for m in mine["methods"]]
        for m in mine["methods"]:
            if not isinstance(m, dict) or not isinstance(m.get("name"), str):
                raise UserError(f"methods: {m!r} is not the name of a method, or {{name: lora, rank: [4, 16]}}")
    if mine.get("rates") in ("auto", ["auto"], None):
        mine.pop("rates", None)
    study = build(Study, mine | {"run": run})
    for name in study.names():
        cfg = build(RunConfig, study.values(name))
        if not cfg.data.files:
            where = f"datasets.{name}.data.files" if study.datasets else "data.files"
            raise UserError(f"{where}: no training data; give --data FILE")
    return study


def _sets(mine: dict) -> dict:
    sets = mine.get("datasets") or {}
    if not isinstance(sets, dict) or not all(isinstance(s, dict) for s in sets.values()):
        raise UserError("datasets: expected names, each with the keys of a run, as {sst2: {data: {files: train.tsv}}}")
    return sets


def _there(values: dict, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _axis(name: str, key: str, value) -> list:
    """The values of one field of a method: those of a list, unless the field itself takes a list of texts."""
    if isinstance(value, list) and not all(isinstance(v, str) for v in value):
        return value
    return [value]


def _short(value) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def steps_of(cfg: RunConfig, rows: int) -> int:
    """Optimizer steps of a run in full length."""
    return cfg.train.steps or max(1, math.ceil(cfg.train.epochs * math.ceil(rows / cfg.train.batch_size)))
