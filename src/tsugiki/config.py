"""One schema for flags, YAML files and `--set a.b=c`: plain dataclasses, checked by one reader."""
from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tsugiki.data.batch import LAYOUTS
from tsugiki.errors import UserError, nearest
from tsugiki.train.optim import SCHEDULES


def option(default, help: str, choices: tuple = (), low: float | None = None, high: float | None = None):
    """A field with its help text and its allowed values."""
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, and how they are read."""
    files: list[str] = option(list, "training files (.jsonl .json .csv .tsv .parquet .txt, also .gz)")
    eval: list[str] = option(list, "held-out files; without them a share of the training rows is held out")
    format: str = option("auto", "shape of the rows", ("auto", "alpaca", "messages", "sharegpt", "prompt-completion", "text"))
    prompt: str | None = option(None, "prompt template over the table's columns, as 'Review: {sentence}'")
    completion: str | None = option(None, "completion template over the table's columns, as ' {label}'")
    labels: dict[str, str] = option(dict, "words for the values of a column, as {'0': 'negative', '1': 'positive'}")
    holdout: float = option(0.0, "share of the rows held out for evaluation when no eval file is given", low=0.0, high=0.9)
    max_rows: int | None = option(None, "use only this many rows, drawn by the seed", low=1)
    train_on: str = option("all", "which assistant turns are trained", ("all", "last"))
    template: str | None = option(None, "a Jinja chat template file, instead of the model's own")
    stop: str | None = option(None, "the stop token, where the tokenizer has none")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization."""
    epochs: float = option(1.0, "passes over the rows", low=0.0)
    steps: int | None = option(None, "optimizer steps, instead of epochs", low=1)
    lr: float | None = option(None, "peak learning rate (default: the method's own)", low=0.0)
    batch_size: int = option(16, "rows of one optimizer step", low=1)
    max_length: int = option(512, "longest row in tokens; longer rows are cut (text is split)", low=2)
    max_tokens: int = option(4096, "tokens of one forward; a step of more tokens is cut into several", low=2)
    layout: str = option("auto", "pad: buckets of like lengths; pack: isolated documents end to end; same result", LAYOUTS)
    schedule: str = option("cosine", "learning rate after warm-up", SCHEDULES)
    warmup: float = option(0.03, "share of the steps in which the learning rate rises", low=0.0, high=1.0)
    weight_decay: float = option(0.0, "decoupled weight decay of matrices", low=0.0)
    beta2: float = option(0.999, "AdamW's second moment decay", low=0.0, high=1.0)
    clip: float = option(1.0, "largest gradient norm, 0 for none", low=0.0)
    dtype: str = option("auto", "compute in bf16 or fp32; trained weights are always float32", ("auto", "bf16", "fp32"))
    seed: int = option(0, "everything random is drawn from it", low=0)
    log_steps: int = option(10, "a line in metrics.jsonl every so many steps", low=1)
    save_steps: int = option(0, "a checkpoint every so many steps, 0: every minute", low=0)
    save_keep: int = option(2, "checkpoints kept", low=1)
    eval_steps: int = option(0, "evaluate every so many steps, 0: only before and after", low=0)
    keep: str = option("last", "which weights are the result", ("last", "best"))
    patience: int = option(0, "stop after so many evaluations without improvement, 0: never", low=0)
    compile: bool = option(False, "torch.compile each decoder layer (needs a C++ compiler)")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How answers are scored."""
    metric: str = option("auto", "exact: generated answer equals; choice: most likely of the choices; bleu; loss only",
                         ("auto", "exact", "choice", "bleu", "loss"))
    choices: list[str] = option(list, "the allowed answers of metric choice (default: the distinct answers seen)")
    max_rows: int | None = option(None, "score at most this many held-out rows", low=1)
    max_new_tokens: int = option(64, "longest generated answer", low=1)
    batch_size: int = option(32, "rows generated at once", low=1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything `tsugiki train` needs."""
    base: str = option("embedded", "model folder, hub id, or 'embedded'")
    out: str | None = option(None, "folder of the run; a run found there goes on")
    adapter: str = option("default", "name of the adapter")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    device: str = option("auto", "cpu, cuda, or auto")
    data: DataConfig = field(default_factory=DataConfig)
    method: dict = field(default_factory=lambda: {"name": "lora"})
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def build(cls: type, values: dict, where: str = ""):
    """A config dataclass from nested plain values; UserError names the key, the value, and what is allowed."""
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise UserError(f"{where.rstrip('.') or 'config'}: expected keys and values, found {values!r}")
    built = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}{key}: unknown key{nearest(key, fields)}; allowed: {', '.join(fields)}")
        if dataclasses.is_dataclass(hints[key]):
            built[key] = build(hints[key], value, f"{where}{key}.")
        else:
            built[key] = _typed(value, hints[key], f"{where}{key}")
            _in_range(built[key], fields[key].metadata, f"{where}{key}")
    return cls(**built)


def _typed(value, hint, name: str):
    """`value` as `hint`: str, int, float, bool, list[str], dict, or one of them | None."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    origin, wanted = typing.get_origin(hint) or hint, getattr(hint, "__name__", str(hint))
    if origin is list:
        items = value if isinstance(value, list) else [value]
        return [_typed(v, typing.get_args(hint)[0], name) for v in items]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{name}: expected keys and values, found {value!r}")
        return {str(k): str(v) for k, v in value.items()} if typing.get_args(hint) == (str, str) else dict(value)
    if origin is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if origin in (int, float) and not isinstance(value, bool):
        try:
            number = float(value) if isinstance(value, (str, int, float)) else None     # YAML reads 1e-4 as a string
            if number is not None and number == number and abs(number) != float("inf"):
                if origin is float:
                    return number
                if number == int(number):
                    return int(number)
        except ValueError:
            pass
    elif isinstance(value, origin):
        return value
    raise UserError(f"{name}: expected {wanted}, found {value!r}")


def _in_range(value, metadata, name: str) -> None:
    if value is None or not metadata:
        return
    choices, low, high = metadata["choices"], metadata["low"], metadata["high"]
    if choices and value not in choices:
        raise UserError(f"{name}: {value!r} is not one of {', '.join(choices)}{nearest(value, choices)}")
    if low is not None and value < low or high is not None and value > high:
        allowed = f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
        raise UserError(f"{name}: {value:g} is out of range, allowed: {allowed}")


def read_yaml(path: str) -> dict:
    """A YAML file's keys and values (safe loader); UserError names file and line."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {getattr(e, 'problem', None) or 'unreadable'}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: expected keys and values, found {type(values).__name__}")
    return values


def put(values: dict, dotted: str, value) -> None:
    """Set `a.b.c` in nested dicts."""
    *path, last = dotted.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError(f"{dotted}: {part} holds a value, not keys")
    values[last] = value


def assignments(pairs: list[str]) -> dict:
    """`["train.lr=1e-3", ...]` as nested values; each value is read as YAML."""
    values: dict = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key.strip():
            raise UserError(f"--set {pair}: expected KEY=VALUE, as train.lr=1e-3")
        try:
            put(values, key.strip(), yaml.safe_load(text) if text.strip() else text)
        except yaml.YAMLError:
            put(values, key.strip(), text)
    return values


def merge(*layers: dict) -> dict:
    """Nested dicts laid over one another, later ones winning."""
    result: dict = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, dict) and isinstance(result.get(key), dict):
                result[key] = merge(result[key], value)
            else:
                result[key] = merge(value) if isinstance(value, dict) else value
    return result
