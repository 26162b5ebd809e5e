"""Write docs/configuration.md from the code: the run's dataclasses, the methods' configs, and the command line's flags.

    python scripts/make_docs.py            writes the page
    python scripts/make_docs.py --check    says whether the page is as the code (exit code 1 where it is not)
"""
from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from pathlib import Path

from tsugiki.cli.train import KEYS
from tsugiki.config import DataConfig, EvalConfig, RunConfig, TrainConfig
from tsugiki.methods import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

<!-- Written by `make docs` from the code; a test keeps it equal. Change the code, not this page. -->

A run is one nested configuration. A key can be set in three places; later ones win:

1. a YAML file: `tsugiki train --config run.yaml`,
2. flags, for the common keys: `--lr 1e-3`,
3. `--set`, for any key: `--set train.warmup=0.1 --set method.rank=16`. The value is read as YAML.

```yaml
base: ./my-model
out: runs/first
data:
  files: [rows.jsonl]
  holdout: 0.05
method:
  name: lora
  rank: 16
train:
  epochs: 3
  lr: 0.001
```

All three are checked by one schema before the model is loaded. An unknown key, a wrong type or a value out of range ends
the command with exit code 2 and a line that names the key. The run's folder keeps everything resolved in `run.yaml`.

In the library the same keys are the dataclasses `tsugiki.RunConfig`, `DataConfig`, `TrainConfig` and `EvalConfig`, and a
method's config is a class of `tsugiki.methods`, as `LoRA(rank=16)`. `tsugiki.train(...)` takes the keys of `train` as
keyword arguments.
"""


def table(head: typing.Sequence[str], rows: typing.Iterable[typing.Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def kind(hint: object) -> str:
    """A type in words: `int | None` is "whole number, or none"."""
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", dict: "keys and values", type(None): "none"}
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(kind(h) for h in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        return "list of texts"
    return names[typing.get_origin(hint) or hint]


def value(field: dataclasses.Field) -> str:
    """A default as YAML has it."""
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def allowed(metadata: typing.Mapping) -> str:
    """The values a field may have, as its schema says."""
    choices, low, high, below = (metadata.get(k) for k in ("choices", "low", "high", "below"))
    if choices:
        return ", ".join(f"`{c}`" for c in choices)
    bounds = [f"at least {low:g}"] if low is not None else []
    bounds += [f"at most {high:g}"] if high is not None else []
    return ", ".join(bounds + ([f"below {below:g}"] if below is not None else []))


def fields_table(cls: type, prefix: str) -> str:
    hints = typing.get_type_hints(cls)
    rows = [(f"`{prefix}{f.name}`", kind(hints[f.name]), value(f), allowed(f.metadata), f.metadata["help"])
            for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(hints[f.name]) and "help" in f.metadata]
    return table(("key", "type", "default", "allowed", "meaning"), rows)


def first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, cls, prefix in (("The run", RunConfig, ""), ("data", DataConfig, "data."), ("train", TrainConfig, "train."),
                               ("eval", EvalConfig, "eval.")):
        parts.append(f"## {title}\n\n{first_line(cls)}\n\n{fields_table(cls, prefix)}\n")
    parts.append("## method\n\n`method.name` chooses the method (default `lora`); its other keys are the method's own. "
                 "`train.lr`, when not set, is the method's.\n")
    for name, cls in METHODS.items():
        settings = fields_table(cls, "method.") if dataclasses.fields(cls) else "No settings."
        parts.append(f"### {name}\n\n{first_line(cls)} Default learning rate {cls.lr:g}. In the library: "
                     f"`tsugiki.methods.{cls.__name__}`.\n\n{settings}\n")
    flags = [(f"`--{flag.replace('_', '-')}`", f"`{key}`") for flag, key in KEYS.items()]
    parts.append("## Flags of `tsugiki train`\n\n" + table(("flag", "key"), [*flags, ("`--labels`", "`data.labels`")]) +
                 "\n\n`tsugiki COMMAND --help` describes the flags of every command.\n")
    return "\n".join(parts)


def main() -> int:
    if sys.argv[1:] == ["--check"]:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page()
        print("docs/configuration.md is as the code" if same else "docs/configuration.md is not as the code; run make docs")
        return 0 if same else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
