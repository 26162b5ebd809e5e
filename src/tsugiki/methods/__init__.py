"""Fine-tuning methods, one file each. Importing the package finds them: METHODS maps a method's name to its config."""
from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields
from typing import Any

from ..edit import Config
from ..errors import UserError, nearest


def _found() -> dict[str, type[Config]]:
    methods: dict[str, type[Config]] = {}
    for file in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        module = importlib.import_module(f"{__name__}.{file}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Config) and "name" in vars(value):
                assert methods.setdefault(value.name, value) is value, f"two methods are called {value.name!r}"
    return methods


METHODS: dict[str, type[Config]] = _found()
globals().update({config.__name__: config for config in METHODS.values()})    # `from tsugiki.methods import LoRA`


def make(name: str, **values: Any) -> Config:
    """A config from plain values, as a YAML file or a command line has them. Raises UserError in one line."""
    if name not in METHODS:
        raise UserError(f"method.name: no method is called {name!r}{nearest(name, METHODS)} (there are: {' '.join(METHODS)})")
    known = [f.name for f in fields(METHODS[name])]
    for key in values:
        if key not in known:
            raise UserError(f"method.{key}: {name} has no such setting{nearest(key, known)} "
                            f"(it has: {' '.join(known) or 'none'})")
    return METHODS[name](**values)
