"""One schema for flags, YAML files and `--set a.b=c`: plain dataclasses, checked by one reader."""
from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tsugiki.data.batch import LAYOUTS
from tsugiki.errors import UserError, nearest

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
SWITCH = ("auto", "on", "off")
SCHEDULES = ("cosine", "linear", "constant")
METRICS = ("auto", "exact", "number", "choice", "contains", "regex", "bleu", "rouge_l", "perplexity", "loss")
CHOICE_BY = ("auto", "likelihood", "likelihood-norm", "generation")


def option(default, help: str, choices: tuple = (), low: float | None = None, high: float | None = None):
    """A field with its help text and its allowed values."""
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, and how they are read."""
    files: list[str] = option(list, "training files (.jsonl .json .csv .tsv .parquet .txt, also .gz)")
    eval: list[str] = option(list, "held-out files; without them, the share data.holdout of the rows")
    format: str = option("auto", "shape of the rows", ("auto", "alpaca", "messages", "sharegpt", "prompt-completion", "text"))
    prompt: str | None = option(None, "prompt template over the table's columns, as 'Review: {sentence}'")
    completion: str | None = option(None, "completion template over the table's columns, as ' {label}'")
    labels: dict[str, str] = option(dict, "words for the values of a column, as {'0': 'negative', '1': 'positive'}")
    holdout: float = option(0.0, "share of the rows held out for evaluation when no eval file is given", low=0.0, high=0.9)
    max_rows: int | None = option(None, "use only this many rows, drawn by the seed", low=1)
    train_on: str = option("all", "which assistant turns are trained", ("all", "last"))
    template: str | None = option(None, "a Jinja chat template file, instead of the model's own")
    stop: str | None = option(None, "the stop token, where the tokenizer has none")
    replay: list[str] = option(list, "files like what the base was trained on, read again beside the data (docs/unsupervised.md)")
    replay_ratio: float = option(0.1, "share of the tokens of each step that the replay files give", low=0.0, high=0.9)
    mix: dict[str, float] = option(dict, "more files and the share of the tokens of each step that each gives, as "
                                         "{'chat.jsonl': 0.2}; data.files give the rest")
    source_eval: list[str] = option(list, "held-out text like what the base was trained on: its loss shows what is forgotten")
    source_holdout: float = option(0.0, "share of the rows of the replay and of each mixed file held out", low=0.0, high=0.9)
    streaming: str = option("auto", "tokens in a file beside the run, read as they are needed; auto: for data of more than 256 MB",
                            SWITCH)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization."""
    epochs: float = option(1.0, "passes over the rows", low=0.001)
    steps: int | None = option(None, "optimizer steps, instead of epochs", low=1)
    lr: float | None = option(None, "peak learning rate (default: the method's, for a base of this width)", low=0.0)
    batch_size: int = option(16, "rows of one optimizer step", low=1)
    max_length: int = option(512, "longest row in tokens; longer rows are cut (text is split)", low=2)
    max_tokens: int | None = option(None, "tokens of one forward; a step of more is cut into several (default: what memory "
                                          "holds, up to 4,096, on a GPU 16,384)", low=2)
    layout: str = option("auto", "pad: buckets of like lengths; pack: isolated documents end to end; same result", LAYOUTS)
    schedule: str = option("cosine", "learning rate after warm-up", SCHEDULES)
    warmup: float = option(0.03, "share of the steps in which the learning rate rises", low=0.0, high=1.0)
    weight_decay: float = option(0.0, "decoupled weight decay of matrices", low=0.0)
    beta2: float = option(0.999, "AdamW's second moment decay", low=0.0, high=0.99999)
    clip: float = option(1.0, "largest gradient norm, 0 for none", low=0.0)
    dtype: str = option("auto", "compute in bf16 or fp32; trained weights are always float32", ("auto", "bf16", "fp32"))
    seed: int = option(0, "everything random is drawn from it", low=0)
    log_steps: int = option(10, "a line in metrics.jsonl every so many steps", low=1)
    save_steps: int = option(0, "a checkpoint every so many steps, 0: every minute", low=0)
    save_keep: int = option(2, "checkpoints kept", low=1)
    eval_steps: int = option(0, "evaluate every so many steps, 0: only before and after", low=0)
    keep: str = option("last", "which weights are the result", ("last", "best"))
    forgetting: str = option("warn", "what to do when the loss on held-out source text rises beyond the limit; stop keeps the last "
                                     "evaluated weights within it", ("warn", "stop", "off"))
    forgetting_limit: float = option(0.05, "how far it may rise, relative to what it was before training", low=0.0)
    patience: int = option(0, "stop after so many evaluations without improvement, with the best weights; 0: never", low=0)
    float8: str = option("off", "products of the frozen base in float8 (e4m3), on a GPU that multiplies it; its copies of the "
                         "weights take as much memory as they do, which plan does not count", ("on", "off"))
    compile: str = option("auto", "torch.compile each decoder layer (needs a C++ compiler); auto: in runs so long that it pays",
                          SWITCH)
    checkpointing: str = option("auto", "keep only the layers' inputs and compute them again in backward; auto: in as many layers "
                                        "as memory demands; offload: on a GPU they wait in the machine's memory",
                                (*SWITCH, "offload"))

    @property
    def forward_tokens(self) -> int:
        """max_tokens, or what is usual before memory is measured; never less than a row."""
        return max(self.max_tokens or 4096, self.max_length)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How answers are scored."""
    metric: str = option("auto", "exact: the answer equals; number: its number does; choice: one of the choices; contains: the "
                         "expected is in it; regex: what eval.pattern finds equals; bleu, rouge_l; perplexity, loss", METRICS)
    choices: list[str] = option(list, "the allowed answers of metric choice (default: the distinct answers seen)")
    choice_by: str = option("auto", "metric choice by the choices' likelihood, that a token, or by what is generated "
                            "(default: the task's own, else likelihood)", CHOICE_BY)
    pattern: str | None = option(None, "of metric regex: the answer is its last match (first group); without it the expected "
                                 "answer is the pattern")
    tolerance: float | None = option(None, "of metric number: how far an answer may be off (default: the task's, else 0.001)",
                                     low=0.0)
    until: list[str] = option(list, "texts that end a generated answer, beside the stop token")
    max_rows: int | None = option(None, "score at most this many held-out rows", low=1)
    max_new_tokens: int | None = option(None, "longest generated answer (default: the task's, else 64)", low=1)
    batch_size: int = option(32, "rows generated at once", low=1)
    task: str | None = option(None, "a task that is scored instead of held-out rows: a name, or a folder with test.json")
    task_data: str | None = option(None, "where the rows of eval.task are: its folder, or the one above it, or a file")

    @property
    def new_tokens(self) -> int:
        return self.max_new_tokens or 64


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything `tsugiki train` needs."""
    base: str = option("embedded", "model folder, hub id, or 'embedded'")
    out: str | None = option(None, "folder of the run; a run found there goes on")
    adapter: str = option("default", "name of the adapter")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    device: str = option("auto", "cpu, cuda, or auto")
    bits: int = option(0, "store the base's linears in 4 (NF4) or 8 bits, with the extra [quant]; 0: in train.dtype", (0, 4, 8))
    data: DataConfig = field(default_factory=DataConfig)
    method: dict = field(default_factory=lambda: {"name": "lora"})
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        """What one key asks of another."""
        data, train, name = self.data, self.train, self.method.get("name")
        if not isinstance(name, str):
            raise UserError(f"method.name: expected the name of a method, found {_shown(name)}")
        if self.bits and name == "full":
            raise UserError(f"bits: weights in {self.bits} bits cannot be trained; give another method than full, or bits 0")
        if data.labels and not (data.prompt or data.completion):
            raise UserError("data.labels: they are words for a table's columns; give data.prompt and data.completion too")
        if self.eval.task_data and not self.eval.task:
            raise UserError("eval.task_data: the rows of which task? give eval.task (--task) too")
        _check_sources(data, train)
        watched = bool(data.source_eval or data.source_holdout)
        if not (data.eval or data.holdout or self.eval.task):
            for key, on in (("keep: best", train.keep == "best"), ("patience", train.patience),
                            ("eval_steps", train.eval_steps and not watched)):
                if on:
                    raise UserError(f"train.{key} needs held-out rows or a task; give data.eval (--eval-data), data.holdout or "
                                    "eval.task (--task)")
        if train.patience and not train.eval_steps:
            raise UserError("train.patience: counts evaluations, so it needs train.eval_steps")


def _check_sources(data: DataConfig, train: TrainConfig) -> None:
    """What the keys of replay, mixing, streaming and the guard ask of one another."""
    for name, share in data.mix.items():
        if not 0 < share < 1:
            raise UserError(f"data.mix: {_shown(name)}: {share:g} is out of range; a share of the tokens is above 0 and below 1")
    if (total := sum(data.mix.values()) + (data.replay_ratio if data.replay else 0)) >= 0.999:
        raise UserError(f"data.mix: the shares (with data.replay_ratio) sum to {total:g}; data.files give what is left of 1")
    if data.source_holdout and not (data.replay or data.mix):
        raise UserError("data.source_holdout: holds out rows of data.replay and data.mix; give one of them, or data.source_eval")
    if data.source_holdout and data.source_eval and not data.mix:
        raise UserError("data.source_holdout: data.source_eval is held-out source text already; give one of the two")
    if data.streaming == "on":
        for key in ("holdout", "max_rows", "source_holdout"):
            if getattr(data, key):
                raise UserError(f"data.{key}: not with data.streaming on, which does not count the rows first; "
                                "give files of held-out rows")
    if train.forgetting == "stop":
        if not (data.source_eval or data.source_holdout and data.replay):
            raise UserError("train.forgetting: stop needs held-out source text; give data.source_eval (--source-eval), "
                            "or data.source_holdout with data.replay")
        if not train.eval_steps:
            raise UserError("train.forgetting: stop looks at the source loss every train.eval_steps steps; give that too")


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
            choices = fields[key].metadata.get("choices") or ()
            if isinstance(value, bool) and (word := "on" if value else "off") in choices:     # YAML's on and off
                value = word
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
            raise UserError(f"{name}: expected keys and values, found {_shown(value)}")
        if typing.get_args(hint) == (str, float):
            return {_typed(k, str, name): _typed(v, float, name) for k, v in value.items()}
        if typing.get_args(hint) != (str, str):
            return {str(k): v for k, v in value.items()}
        for part in (part for pair in value.items() for part in pair):
            if isinstance(part, bool) or not isinstance(part, (str, int, float)):
                raise UserError(f"{name}: expected texts, found {_shown(part)}; "
                                "quote it (YAML reads yes, no, on, off as true, false)")
        return {str(k): str(v) for k, v in value.items()}
    if origin is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if origin in (int, float):
        number = None if isinstance(value, bool) else _number(value, origin)
        if number is not None:
            return number
    elif isinstance(value, origin):
        return value
    raise UserError(f"{name}: expected {wanted}, found {_shown(value)}")


def _number(value, kind: type) -> int | float | None:
    """A finite number from a number or its text (YAML reads 1e-4 as text); None for anything else."""
    if kind is int:
        try:
            return int(value) if isinstance(value, (int, str)) else int(value) if value == int(value) else None
        except (ValueError, OverflowError, TypeError):
            pass                                          # "2e3" is a whole number too
    try:
        number = float(value) if isinstance(value, (int, float, str)) else None
    except (ValueError, OverflowError):
        return None
    if number is None or number != number or abs(number) == float("inf"):
        return None
    return number if kind is float else int(number) if number == int(number) else None


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _in_range(value, metadata, name: str) -> None:
    if value is None or not metadata:
        return
    choices, low, high = metadata["choices"], metadata["low"], metadata["high"]
    if choices and value not in choices:
        raise UserError(f"{name}: {_shown(value)} is not one of {', '.join(map(str, choices))}{nearest(value, choices)}")
    if low is not None and value < low or high is not None and value > high:
        allowed = f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
        raise UserError(f"{name}: {value:g} is out of range, allowed: {allowed}")


class _Once(yaml.SafeLoader):
    """The safe loader, but a key given twice is an error: YAML would let the last one win in silence."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _yaml(text: str):
    """The value of a YAML text. Raises yaml.YAMLError; ValueError for a date there never was, RecursionError for a nest."""
    loader = _Once(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: str) -> dict:
    """A YAML file's keys and values (safe loader); UserError names file and line."""
    try:
        values = _yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        raise UserError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {getattr(e, 'problem', None) or 'unreadable'}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not YAML: {(str(e).splitlines() or [''])[0][:120]}") from None
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
            # YAML 1.1 takes 1e-3 for a text: it wants a dot
            value = float(text) if EXPONENT.fullmatch(text.strip()) else _yaml(text) if text.strip() else text
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
        put(values, key.strip(), value)
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
