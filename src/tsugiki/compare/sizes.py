"""How much a method trains, and the rank or size at which that is nearest to a budget. Counted on shapes, not by formula."""
from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from functools import cache

from tsugiki.compare.study import Study, Variant
from tsugiki.errors import UserError
from tsugiki.methods import METHODS, make
from tsugiki.plan import counted

MOST = 1 << 14                                        # no size beyond it is tried


@cache
def _counted(base: str, trust: bool, method: str, fields: tuple) -> tuple[int, int, int]:
    return counted(base, make(method, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields}), trust)


def count(run: dict, variant: Variant) -> tuple[int, int, int]:
    """(all parameters, the trained ones, the base's width) of a method on the base of a run's values."""
    fields = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in variant.fields.items())
    return _counted(run.get("base", "embedded"), bool(run.get("trust_remote_code")), variant.method, fields)


def size_field(method: str) -> str | None:
    """The field that makes a method larger: its first whole number that must be above 0; None for a method of one size."""
    cls = METHODS[method]
    hints = typing.get_type_hints(cls)
    return next((f.name for f in dataclasses.fields(cls) if hints[f.name] is int and (f.metadata.get("low") or 0) >= 1), None)


def smallest(method: str, field: str) -> int:
    """The least value of a field."""
    return next(f.metadata["low"] for f in dataclasses.fields(METHODS[method]) if f.name == field)


def nearest(run: dict, variant: Variant, budget: int) -> Variant:
    """The same method in the size that trains as nearly `budget` numbers as it can; itself, if it has no size."""
    field = size_field(variant.method)
    if field is None or field in variant.fields:
        return variant
    seen: dict[int, int] = {}

    def trains(size: int) -> int:
        """More than any budget for a size that cannot be made."""
        if size not in seen:
            try:
                seen[size] = count(run, Variant(variant.method, variant.fields | {field: size}))[1]
            except UserError:
                seen[size] = 1 << 62
        return seen[size]
    low = high = smallest(variant.method, field)
    while high < MOST and (trains(high) == 1 << 62 or trains(high) < budget):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if trains(middle) < budget else (low, middle)
    made = {size: n for size, n in seen.items() if n < 1 << 62}
    if not made:
        return variant
    best = min(made, key=lambda size: (abs(made[size] - budget), size))
    return Variant(variant.method, variant.fields | {field: best})


def in_budget(study: Study) -> Study:
    """The study with sizes for its budget of trained parameters, where it has one; sizes that are given stay."""
    if study.parameters is None:
        return study
    found = [nearest(study.run, v, study.parameters) for v in study.variants()]
    return dataclasses.replace(study, methods=[{"name": v.method} | v.fields for v in found])


def equal_parameters(counts: Sequence[tuple[Variant, int]], budget: int) -> dict[str, Variant]:
    """Of each method the variant whose count is nearest to the budget."""
    found: dict[str, tuple[int, Variant]] = {}
    for variant, n in counts:
        off = abs(n - budget)
        if variant.method not in found or off < found[variant.method][0]:
            found[variant.method] = (off, variant)
    return {method: variant for method, (_, variant) in found.items()}
