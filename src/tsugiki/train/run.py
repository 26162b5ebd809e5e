"""A whole run: data checked before the model loads, one folder that resumes itself, a result that is saved and reported."""
from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
import yaml
from torch import nn

from tsugiki import formats
from tsugiki.adapters import attach
from tsugiki.config import DataConfig, RunConfig, TrainConfig, merge
from tsugiki.data import Columns, Conversation, Renderer, duplicates, load_conversations, split
from tsugiki.data.batch import FORWARD_OVERHEAD, Batch, collate, lengths_of, stream_key
from tsugiki.data.mixture import Mixture
from tsugiki.data.render import Example
from tsugiki.data.stream import Files
from tsugiki.edit import Config
from tsugiki.errors import UserError
from tsugiki.evaluate.answers import generate_answers, room
from tsugiki.evaluate.tasks import Task
from tsugiki.formats.export import export_model
from tsugiki.kernels.attention import active
from tsugiki.load import compute_dtype, pad_id, stored_dtype
from tsugiki.memory import MAPPED, allocator, keep_freed_memory
from tsugiki.methods import Full, make
from tsugiki.route import token_keys
from tsugiki.sites import decoder_layers, width
from tsugiki.train import scoring
from tsugiki.train.compiled import compiling
from tsugiki.train.fitting import Fit, made_again, measured, overhead
from tsugiki.train.layout import arranged, largest_tensor
from tsugiki.train.log import MetricsFile, console
from tsugiki.train.loop import Job, Progress, fit
from tsugiki.train.loss import token_losses
from tsugiki.train.report import curves_of, table_of, write_report
from tsugiki.train.sources import TOKENS, Sources, digest, read_sources, said, streams, tokenised
from tsugiki.weights import few_bits, numel

# Keys that may differ between a run and its resumption: they change what is kept or shown, never the weights; the files'
# contents are compared, not their names.
INERT = ("out", "device", "data.files", "data.eval", "data.template", "data.replay", "data.source_eval", "eval.task_data",
         "train.log_steps", "train.save_steps", "train.save_keep")
TEMPORARY = "run.yaml.tmp"                            # left by a kill in the run's first moments


@dataclass(frozen=True)
class Rows:
    """The conversations of a run: what is trained on and what is held out. Large files are named, not read (Files)."""
    train: list[Conversation] | Files
    held_out: list[Conversation]
    fingerprint: str
    template: str | None = None                       # text of data.template
    sources: Sources = Sources()                      # what is mixed in, and held-out text of it
    task: Task | None = None                          # what is scored beside or instead of held-out rows

    @property
    def kind(self) -> str:
        """Of the first row."""
        return next(iter(self.train)).kind


@dataclass(frozen=True)
class Result:
    """What a finished run hands back: its folder, the trained adapter or model folder, scores before and after."""
    out: Path
    saved: Path
    progress: Progress
    steps: int
    trainable: int
    total: int

    def plain(self) -> dict:
        return {"out": str(self.out), "saved": str(self.saved), "steps": self.progress.step, "tokens": self.progress.tokens,
                "seconds": round(self.progress.seconds, 1), "trainable": self.trainable, "total": self.total,
                "before": self.progress.before, "after": self.progress.after, "stopped": self.progress.stopped,
                "sources": {name: {"before": self.progress.sources_before[name], "after": after}
                            for name, after in self.progress.sources_after.items()},
                "report": str(self.out / "report.html")}


def columns_of(cfg: RunConfig) -> Columns | None:
    """The table templates of data.prompt and data.completion; UserError when only one is given."""
    data = cfg.data
    if not data.prompt and not data.completion:
        return None
    if not (data.prompt and data.completion):
        raise UserError(f"data.{'completion' if data.prompt else 'prompt'}: missing; data.prompt and data.completion go together")
    return Columns(prompt=data.prompt, completion=data.completion, labels=data.labels or None)


def read_rows(cfg: RunConfig, say: Callable[[str], None]) -> Rows:
    """Read, check and split the data of a run; says how many rows, and what stands on both sides of the split."""
    if not cfg.data.files:
        raise UserError("data.files: no training data; give --data FILE")
    columns, data, template = columns_of(cfg), cfg.data, _template(cfg.data.template)
    large = streams(data)
    rows = Files(tuple(data.files), data.format, columns) if large else load_conversations(data.files, data.format, columns)
    if data.max_rows and data.max_rows < len(rows):
        generator = torch.Generator().manual_seed(stream_key(cfg.train.seed, "max_rows"))
        rows = [rows[i] for i in sorted(torch.randperm(len(rows), generator=generator)[:data.max_rows].tolist())]
    if data.eval:
        train, held = rows, load_conversations(data.eval, data.format, columns)
    elif data.holdout:
        train, held = split(rows, data.holdout, cfg.train.seed)
    else:
        train, held = rows, []
    count = f"{', '.join(data.files)} read as it is needed" if large else f"{len(train):,} rows to train on"
    say(count + (f", {len(held):,} held out" if held else ", none held out"))
    sources = read_sources(cfg, say)
    if held and (both := duplicates(train, held)):
        say(f"the held-out score is too good: {both}")
    task = scoring.task_of(cfg, train, say)
    asked = [f"{i.conversation.messages}{i.gold}{i.options}" for i in (task.items if task else ())]
    shown = [digest(train)] if large else list(map(said, train))
    text = "\0".join([*shown, *map(said, held), *filter(None, (template, sources.digest())), *asked])
    count = len(shown)
    fingerprint = hashlib.sha256(f"{count}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()
    return Rows(train, held, fingerprint, template, sources, task)


def _template(path: str | None) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8") if path else None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"data.template: {path}: {getattr(e, 'strerror', None) or 'is not UTF-8 text'}") from None


def check_folder(out: Path, cfg: RunConfig, fingerprint: str) -> bool:
    """Whether `out` holds this very run already; UserError when it holds another (naming the first difference) or other things."""
    path = out / "run.yaml"
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(p.name not in (TEMPORARY, TOKENS) and not p.name.startswith(f".{TOKENS}-")
                                                     for p in out.iterdir())):
            raise UserError(f"{out}: is not empty and holds no run; choose another --out")
        return False
    try:
        old = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        old = None
    if not isinstance(old, dict):
        raise UserError(f"{path}: is damaged, so what this run was is not known; choose another --out or delete the folder")
    defaults = {"data": dataclasses.asdict(DataConfig()), "train": dataclasses.asdict(TrainConfig())}    # of keys that are new
    for key, was, now in _differences(merge(defaults, old), dataclasses.asdict(cfg) | {"data_sha256": fingerprint}):
        if key not in INERT:
            what = "the rows are others than there" if key == "data_sha256" else f"{key} is {was!r} there, {now!r} here"
            raise UserError(f"{out}: holds another run ({what}); choose another --out or delete it")
    return True


def claim(out: Path, cfg: RunConfig, fingerprint: str) -> None:
    """Write run.yaml, everything resolved, unless the folder holds this run already."""
    if check_folder(out, cfg, fingerprint):
        return
    path, values = out / "run.yaml", dataclasses.asdict(cfg) | {"data_sha256": fingerprint}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / TEMPORARY, "w", encoding="utf-8") as f:
        f.write(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        f.flush()
        os.fsync(f.fileno())
    os.replace(out / TEMPORARY, path)


def _differences(old: dict, new: dict, prefix: str = ""):
    for key in [*new, *(k for k in old if k not in new)]:
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{prefix}{key}.")
        elif was != now:
            yield f"{prefix}{key}", was, now


def run(model: nn.Module, tokenizer, cfg: RunConfig, rows: Rows, *, quiet: bool = False,
        say: Callable[[str], None] | None = None) -> Result:
    """Train `model` on `rows` as `cfg` says, into cfg.out; the model is left trained, the adapter attached and active."""
    say = say or (lambda line: None if quiet else console().print(line, markup=False))
    out, train = Path(cfg.out), cfg.train
    check_folder(out, cfg, rows.fingerprint)          # before anything is written there
    method = make(**cfg.method)
    model.eval()                                      # a base's own dropout would draw from the global generator
    params, adapter = _trainable(model, tokenizer, method, cfg)
    full = adapter is None
    limit = min(train.max_length, room(model) or train.max_length)
    renderer = Renderer(tokenizer, template=rows.template, train_on=cfg.data.train_on, stop=cfg.data.stop)
    examples, report, mixture = tokenised(renderer, rows.train, rows.sources, limit, cfg, rows.fingerprint, say)
    _say_report(report, limit, say)
    if largest_tensor(model, examples, train) >= MAPPED:
        keep_freed_memory()
    if adapter is not None:
        method.prepare(adapter, partial(look, model, examples, train, pad_id(tokenizer), cfg.adapter, mixture=mixture))
        params = adapter.parameters()                 # a start made from data may have changed their shapes
    freeze_but(model, params)
    how = (cfg.eval, pad_id(tokenizer), limit)
    with ExitStack() as stack:
        job, fit_ = _prepare(stack, model, tokenizer, cfg, method, params, adapter, examples, mixture, say)
        job = dataclasses.replace(job, evaluate=scoring.scored_by(model, renderer, rows.held_out, rows.task, *how),
                                  watched=scoring.losses(model, renderer, rows.sources.watched, *how))
        trainable, total = sum(p.numel() for p in params.values()), _count(model, params, full)
        _say_start(job, fit_, model, method, trainable, total, say)
        picked, longest = scoring.samples(model, renderer, rows.held_out, rows.task, cfg.eval)
        answers = partial(generate_answers, model, renderer, picked, longest, 8, pad_id(tokenizer))
        claim(out, cfg, rows.fingerprint)             # from here on the folder is this run's
        progress = fit(job, out, quiet=quiet, say=say, samples=(lambda: [{"before": a} for a in answers()]) if picked else None)
        saved = _save(model, tokenizer, adapter, cfg, renderer, rows.kind)
        shown = [s | {"prompt": c.prompt_text, "expected": c.reference, "after": a}
                 for s, c, a in zip(progress.samples, picked, answers() if picked else [], strict=False)]
    result = Result(out, saved, progress, job.steps, trainable, total)
    write_report(out / "report.html", _report(result, cfg, params, shown, type(method).name))
    return result


def _prepare(stack: ExitStack, model: nn.Module, tokenizer, cfg: RunConfig, method, params: dict, adapter, examples,
             mixture: Mixture, say: Callable[[str], None]) -> tuple[Job, Fit]:
    """The job, and how its forwards fit into memory; what is changed about the model for it is undone when `stack` closes."""
    train, full, pad = cfg.train, adapter is None, pad_id(tokenizer)
    device = next(iter(params.values())).device
    mixed = full and compute_dtype(train.dtype, device) == torch.bfloat16
    autocast = partial(torch.autocast, device.type, torch.bfloat16) if mixed else nullcontext
    route, layers = route_of(cfg, adapter), _layers(model)
    layout = stack.enter_context(arranged(model, examples, train, bool(adapter and adapter.virtual), mixture))

    def losses(batch: Batch) -> torch.Tensor:
        with autocast():
            return token_losses(model, batch, **route(batch, 0))[0].sum()
    trained = sum(p.numel() for p in params.values())
    fit_ = measured(model, examples, train, len(layers), trained, losses)
    stack.enter_context(made_again(layers, fit_.again, fit_.offload))
    steps = train.steps or train.epochs * mixture.pace
    first = lengths_of(examples)[:mixture.sources[0].count]
    work = steps * train.batch_size * int(first.sum()) / len(first) / (1 - float(sum(s.share for s in mixture.sources)))
    work *= (6 if full else 4) * sum(p.numel() for layer in layers for p in layer.parameters())
    wish = "off" if train.compile == "auto" and fit_.again else train.compile
    compiled = stack.enter_context(compiling(layers, wish, work, device, say))
    return Job(model, params, examples, dataclasses.replace(train, max_tokens=fit_.tokens),
               method.rate(width(model)) if train.lr is None else train.lr, pad, layout, mixture, route=route,
               untrained=nullcontext if full else partial(attach(model).use, None), adapter=adapter, autocast=autocast,
               overhead=overhead(layers, device) if layers else FORWARD_OVERHEAD, layers=compiled), fit_


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers; none of a model whose family is not known, which can be trained full."""
    try:
        return list(decoder_layers(model))
    except UserError:
        return []


def _say_start(job: Job, fit_: Fit, model: nn.Module, method: Config, trainable: int, total: int,
               say: Callable[[str], None]) -> None:
    """What is trained, and what was chosen for this machine, a line each."""
    device = next(iter(job.params.values())).device
    mixed = "bf16" if job.autocast is not nullcontext else str(model.dtype)[6:]
    bits = f"base in {b} bits, " if (b := few_bits(model)) else ""
    whose = f" ({method.name}'s for a base {width(model)} wide)" if job.cfg.lr is None else ""
    say(f"{method.name}: {trainable:,} of {total:,} parameters trained ({trainable / total:.2%}), {job.steps} steps, "
        f"{mixed} on {device.type}, {bits}layout {job.layout}, learning rate {job.lr:g}{whose}")
    again = f", {fit_.again} of {len(job.layers.layers)} layers computed again in backward" if fit_.again else ""
    again += ", their inputs kept in the machine's memory" if fit_.offload else ""
    where = f"{torch.get_num_threads()} threads, {allocator()}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    say(f"forwards of at most {fit_.tokens:,} tokens{again}, attention {'by document' if active(model) else 'of the model'}, "
        f"{'compiled' if job.layers.on else 'eager'}; {where}")


def _say_report(report, limit: int, say: Callable[[str], None]) -> None:
    """What tokenising changed, a line each."""
    if report.chunks:
        say(f"long texts were split: {report.chunks:,} more rows of at most {limit} tokens")
    if report.cut:
        say(f"{report.cut:,} of {report.rows:,} rows were longer than {limit} tokens and were cut (train.max_length)")
    if report.dropped:
        say(f"{report.dropped:,} of {report.rows:,} rows were dropped: nothing to train on within {limit} tokens")
    if report.split:
        say(f"{report.split:,} conversations were split into one row a turn: their turns do not continue each other's tokens")


@torch.no_grad()
def look(model: nn.Module, examples: Sequence[Example], train: TrainConfig, pad: int, adapter: str, batches: int = 8,
         mixture: Mixture | None = None) -> None:
    """The model's forward over the rows of the first steps, for a method that starts from data."""
    mixture = mixture or Mixture.alone(len(examples), train.batch_size, train.seed)
    for step in range(min(batches, mixture.pace)):
        rows = mixture.rows(step)
        batch = collate(examples, [[i] for i in rows], pad).to(next(model.parameters()).device)
        model(input_ids=batch.ids, attention_mask=(batch.samples >= 0).long(), use_cache=False, adapter_ids=adapter)


def _trainable(model: nn.Module, tokenizer, method, cfg: RunConfig):
    """(parameters by name, the adapter or None): full fine-tuning trains the base's own, in float32."""
    if isinstance(method, Full):
        if bits := few_bits(model):
            raise UserError(f"method.name: weights in {bits} bits cannot be trained; give another method than full, "
                            "or a base in 16 bits")
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
            model.float()
        return method.select(model), None
    adapters = attach(model)
    there = cfg.adapter in adapters.names()
    adapter = adapters.get(cfg.adapter) if there else adapters.add(cfg.adapter, method, seed=cfg.train.seed, tokenizer=tokenizer)
    if not adapter.parameters():
        raise UserError(f"method.name: {method.name} with these settings has nothing to train on this model")
    adapters.active = (cfg.adapter,)
    return adapter.parameters(), adapter


def freeze_but(model: nn.Module, params: dict[str, nn.Parameter]) -> None:
    chosen = {id(p) for p in params.values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in chosen)


def route_of(cfg: RunConfig, adapter):
    """Per batch: which adapter, and dropout keys that are a function of (seed, step, row, position)."""
    if adapter is None:
        return lambda batch, step: {}
    if not any(getattr(part, "dropout", 0.0) for part in adapter.cfg.parts):
        return lambda batch, step: {"adapter_ids": cfg.adapter}
    return lambda batch, step: {"adapter_ids": cfg.adapter,
                                "token_keys": token_keys(cfg.train.seed, step, batch.samples, batch.positions)}


def _count(model: nn.Module, params: dict, full: bool) -> int:
    seen = {id(p): numel(p) for p in model.parameters()} | {id(p): p.numel() for p in params.values()}
    return sum(seen.values())


def _save(model, tokenizer, adapter, cfg: RunConfig, renderer: Renderer, kind: str) -> Path:
    out = Path(cfg.out)
    if adapter is not None:
        note = {"kind": kind} | ({"template": renderer.template} if cfg.data.template else {})
        note |= {"stop": cfg.data.stop} if cfg.data.stop else {}
        formats.save(adapter, out / "adapter", stop_ids=renderer.stop_ids, base=cfg.base, extra=note)
        return out / "adapter"
    dtype = stored_dtype(cfg.base) if cfg.base else torch.float32
    return export_model(model, tokenizer, out / "model", dtype=dtype, stop_ids=renderer.stop_ids,
                        template=renderer.template if kind == "chat" else None)


def _report(result: Result, cfg: RunConfig, params: dict[str, nn.Parameter], samples: Sequence[dict], method: str) -> dict:
    progress = result.progress
    curves = curves_of(MetricsFile(result.out / "metrics.jsonl", progress.offset).read(), scoring.curve_names(cfg.eval))
    table = table_of(progress.before, progress.after, progress.sources_before, progress.sources_after)
    return {"title": f"{method} on {cfg.base}", "config": dataclasses.asdict(cfg), "curves": curves, "samples": list(samples),
            "before_after": table,
            "summary": ({"task": cfg.eval.task} if cfg.eval.task else {}) | (
                {"best at step": progress.best_step} if cfg.train.keep == "best" or progress.stopped else {}) | {
                        "steps": progress.step, "tokens": progress.tokens, "minutes": round(progress.seconds / 60, 2),
                        "stopped early": progress.stopped or "no", "saved to": str(result.saved)},
            "parameters": {"total": result.total, "trainable": result.trainable, "share": result.trainable / result.total,
                           "rows": [{"site": n, "count": p.numel()} for n, p in params.items()]},
            "environment": {"python": platform.python_version(), "torch": torch.__version__,
                            "transformers": transformers.__version__, "threads": torch.get_num_threads(),
                            "machine": platform.machine()}}
