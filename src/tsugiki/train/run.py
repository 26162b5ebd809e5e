"""A whole run: data checked before the model loads, one folder that resumes itself, a result that is saved and reported."""
from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn

from tsugiki import formats
from tsugiki.adapters import Adapter, attach
from tsugiki.config import DataConfig, RunConfig, TrainConfig, merge
from tsugiki.data import Conversation, Renderer
from tsugiki.data.batch import FORWARD_OVERHEAD, Batch, collate, lengths_of
from tsugiki.data.mixture import Mixture
from tsugiki.data.render import Example
from tsugiki.edit import Config
from tsugiki.errors import UserError
from tsugiki.evaluate.answers import generate_answers, room
from tsugiki.formats.export import export_model
from tsugiki.kernels.attention import active
from tsugiki.kernels.float8 import in_float8, refusal
from tsugiki.load import compute_dtype, pad_id, stored_dtype
from tsugiki.memory import MAPPED, allocator, keep_freed_memory
from tsugiki.methods import Full, make
from tsugiki.route import token_keys
from tsugiki.sites import decoder_layers, width
from tsugiki.tap import base_parameters
from tsugiki.train import scoring
from tsugiki.train.compiled import Layers, compiling
from tsugiki.train.fitting import Fit, made_again, measured, overhead
from tsugiki.train.layout import arranged, largest_tensor
from tsugiki.train.log import MetricsFile, console
from tsugiki.train.loop import Job, Progress, fit
from tsugiki.train.loss import token_losses
from tsugiki.train.report import curves_of, table_of, write_report
from tsugiki.train.rows import Rows
from tsugiki.train.sources import TOKENS, tokenised
from tsugiki.weights import few_bits, numel

# Keys that may differ between a run and its resumption: they change what is kept or shown, never the weights; the files'
# contents are compared, not their names.
INERT = ("out", "device", "data.files", "data.eval", "data.template", "data.replay", "data.source_eval", "eval.task_data",
         "train.log_steps", "train.save_steps", "train.save_keep")
TEMPORARY = "run.yaml.tmp"                            # left by a kill in the run's first moments


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


@dataclass(frozen=True)
class Ready:
    """A run with its data as tokens and its adapter attached; how its forwards are made is not settled yet."""
    model: nn.Module
    tokenizer: Any
    cfg: RunConfig
    rows: Rows
    method: Config
    params: dict[str, nn.Parameter]
    adapter: Adapter | None                           # None: full fine-tuning
    renderer: Renderer
    limit: int                                        # tokens of a row
    examples: Sequence[Example]
    mixture: Mixture

    @property
    def device(self) -> torch.device:
        return next(iter(self.params.values())).device

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.params.values())

    @property
    def total(self) -> int:
        """Parameters of the base and of what is trained."""
        counts = {id(p): numel(p) for _, p in base_parameters(self.model)} | {id(p): p.numel() for p in self.params.values()}
        return sum(counts.values())

    @property
    def virtual(self) -> bool:
        return bool(self.adapter and self.adapter.virtual)

    def autocast(self) -> AbstractContextManager:
        """Full fine-tuning keeps float32 weights and may compute in bfloat16."""
        mixed = self.adapter is None and compute_dtype(self.cfg.train.dtype, self.device) == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext()

    def measured(self, layers: int, trained: int) -> Fit:
        """How its forwards fit into memory."""
        route = route_of(self.cfg, self.adapter)

        def losses(batch: Batch) -> torch.Tensor:
            with self.autocast():
                return token_losses(self.model, batch, **route(batch, 0))[0].sum()
        return measured(self.model, self.examples, self.cfg.train, layers, trained, losses)

    def job(self, layout: str, tokens: int, overhead: int, layers: Layers | None = None) -> Job:
        """The training job, in forwards of so many tokens."""
        model, cfg, train, rows = self.model, self.cfg, self.cfg.train, self.rows
        how = (cfg.eval, pad_id(self.tokenizer), self.limit)
        return Job(model, self.params, self.examples, dataclasses.replace(train, max_tokens=tokens),
                   self.method.rate(width(model)) if train.lr is None else train.lr, pad_id(self.tokenizer), layout, self.mixture,
                   route=route_of(cfg, self.adapter), adapter=self.adapter, autocast=self.autocast, overhead=overhead,
                   layers=layers, untrained=nullcontext if self.adapter is None else partial(attach(model).use, None),
                   evaluate=scoring.scored_by(model, self.renderer, rows.held_out, rows.task, *how),
                   watched=scoring.losses(model, self.renderer, rows.sources.watched, *how))

    def asked(self) -> tuple[list[Conversation], Callable[[], list[str]]]:
        """The rows that the report shows, and a function that answers them as the model is then."""
        picked, longest = scoring.samples(self.model, self.renderer, self.rows.held_out, self.rows.task, self.cfg.eval)
        return picked, partial(generate_answers, self.model, self.renderer, picked, longest, 8, pad_id(self.tokenizer))

    def described(self, job: Job) -> str:
        """What is trained, in one line."""
        mixed = "bf16" if not isinstance(self.autocast(), nullcontext) else str(self.model.dtype)[6:]
        bits = f"base in {b} bits, " if (b := few_bits(self.model)) else ""
        whose = f" ({self.method.name}'s for a base {width(self.model)} wide)" if job.cfg.lr is None else ""
        return (f"{self.method.name}: {self.trainable:,} of {self.total:,} parameters trained ({self.trainable / self.total:.2%}), "
                f"{job.steps} steps, {mixed} on {self.device.type}, {bits}layout {job.layout}, learning rate {job.lr:g}{whose}")

    def save(self) -> Path:
        """The adapter, or the model, into the run's folder."""
        return _save(self.model, self.tokenizer, self.adapter, self.cfg, self.renderer, self.rows.kind)

    def finish(self, progress: Progress, steps: int) -> Result:
        """Save what was trained, and write the report."""
        picked, answers = self.asked()
        saved = self.save()
        shown = [s | {"prompt": c.prompt_text, "expected": c.reference, "after": a}
                 for s, c, a in zip(progress.samples, picked, answers() if picked else [], strict=False)]
        result = Result(Path(self.cfg.out), saved, progress, steps, self.trainable, self.total)
        write_report(result.out / "report.html", _report(result, self.cfg, self.params, shown, type(self.method).name))
        return result


def ready(model: nn.Module, tokenizer, cfg: RunConfig, rows: Rows, say: Callable[[str], None]) -> Ready:
    """Attach the adapter, tokenise the rows, let the method start from them. The adapter is left active, trained or not."""
    train = cfg.train
    check_folder(Path(cfg.out), cfg, rows.fingerprint)          # before anything is written there
    method = make(**cfg.method)
    model.eval()                                      # a base's own dropout would draw from the global generator
    params, adapter = _trainable(model, tokenizer, method, cfg)
    limit = min(train.max_length, room(model) or train.max_length)
    renderer = Renderer(tokenizer, template=rows.template, train_on=cfg.data.train_on, stop=cfg.data.stop)
    examples, report, mixture = tokenised(renderer, rows.train, rows.sources, limit, cfg, rows.fingerprint, say)
    _say_report(report, limit, say)
    if largest_tensor(model, examples, train) >= MAPPED:
        keep_freed_memory()
    if adapter is not None:
        method.prepare(adapter, partial(look, model, examples, train, pad_id(tokenizer), cfg.adapter, mixture=mixture))
        params = adapter.parameters()                 # a start made from data may have changed their shapes
    return Ready(model, tokenizer, cfg, rows, method, params, adapter, renderer, limit, examples, mixture)


def run(model: nn.Module, tokenizer, cfg: RunConfig, rows: Rows, *, quiet: bool = False,
        say: Callable[[str], None] | None = None) -> Result:
    """Train `model` on `rows` as `cfg` says, into cfg.out; the model is left trained, the adapter attached and active."""
    say = say or (lambda line: None if quiet else console().print(line, markup=False))
    it = ready(model, tokenizer, cfg, rows, say)
    freeze_but(model, it.params)
    with ExitStack() as stack:
        job, fit_ = _prepare(stack, it, say)
        _say_start(job, fit_, it, say)
        picked, answers = it.asked()
        claim(Path(cfg.out), cfg, rows.fingerprint)   # from here on the folder is this run's
        progress = fit(job, Path(cfg.out), quiet=quiet, say=say, samples=before(answers) if picked else None)
        return it.finish(progress, job.steps)


def before(answers: Callable[[], list[str]]) -> Callable[[], list[dict]]:
    """The samples of a report, as they begin."""
    return lambda: [{"before": a} for a in answers()]


def _prepare(stack: ExitStack, it: Ready, say: Callable[[str], None]) -> tuple[Job, Fit]:
    """The job, and how its forwards fit into memory; what is changed about the model for it is undone when `stack` closes."""
    model, train, mixture, layers = it.model, it.cfg.train, it.mixture, layers_of(it.model)
    if train.float8 == "on":
        if (needs := refusal(layers, it.device)) is not None:
            raise UserError(f"train.float8: on needs {needs}")
        say(f"{stack.enter_context(in_float8(layers))} linears of the base multiply in float8")
    layout = stack.enter_context(arranged(model, it.examples, train, it.virtual, mixture, it.autocast))
    fit_ = it.measured(len(layers), it.trainable)
    stack.enter_context(made_again(layers, fit_.again, fit_.offload))
    steps = train.steps or train.epochs * mixture.pace
    first = lengths_of(it.examples)[:mixture.sources[0].count]
    work = steps * train.batch_size * int(first.sum()) / len(first) / (1 - float(sum(s.share for s in mixture.sources)))
    work *= (6 if it.adapter is None else 4) * sum(p.numel() for layer in layers for p in layer.parameters())
    wish = "off" if train.compile == "auto" and fit_.again else train.compile
    compiled = stack.enter_context(compiling(layers, wish, work, it.device, say))
    return it.job(layout, fit_.tokens, overhead(layers, it.device) if layers else FORWARD_OVERHEAD, compiled), fit_


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers; none of a model whose family is not known, which can be trained full."""
    try:
        return list(decoder_layers(model))
    except UserError:
        return []


def _say_start(job: Job, fit_: Fit, it: Ready, say: Callable[[str], None]) -> None:
    """What is trained, and what was chosen for this machine, a line each."""
    device = it.device
    say(it.described(job))
    again = f", {fit_.again} of {len(job.layers.layers)} layers computed again in backward" if fit_.again else ""
    again += ", their inputs kept in the machine's memory" if fit_.offload else ""
    where = f"{torch.get_num_threads()} threads, {allocator()}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    say(f"forwards of at most {fit_.tokens:,} tokens{again}, attention {'by document' if active(it.model) else 'of the model'}, "
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
