"""The library's verbs: train, evaluate, generate. Each is what the command of the same name does."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from tsugiki.adapters import attach
from tsugiki.config import DataConfig, EvalConfig, RunConfig, TrainConfig, build
from tsugiki.data import Conversation, Message, Renderer, load_conversations
from tsugiki.errors import UserError
from tsugiki.evaluate import tasks
from tsugiki.evaluate.answers import generate_answers, room
from tsugiki.evaluate.score import Score
from tsugiki.evaluate.score import evaluate as score
from tsugiki.load import base_path, compute_dtype, device_of, load, pad_id
from tsugiki.methods import Full, make
from tsugiki.train.failure import Failure
from tsugiki.train.jobs import JobConfig, Jobs, jobs_of
from tsugiki.train.joint import Joint
from tsugiki.train.log import console
from tsugiki.train.rows import read_rows
from tsugiki.train.run import Result, check_folder, run
from tsugiki.weights import few_bits


def train(model: nn.Module, tokenizer, data: str | Path | Sequence[str | Path], out: str | Path, *, adapter: str = "default",
          method=None, held_out: str | Path | None = None, task: str | Path | None = None, task_data: str | Path | None = None,
          quiet: bool = False, **settings) -> Result:
    """Train an adapter of `model` (added before under the name `adapter`, else made from `method`, default LoRA) on data files.

    task, task_data: a task that is the run's metric, and where its rows are (`tsugiki.evaluate.tasks.load`).
    settings: keys of TrainConfig, as lr=1e-3, epochs=2, batch_size=32, and of DataConfig, as replay=["old.txt"],
    replay_ratio=0.1, source_eval=["held.txt"]. A run found in `out` goes on.
    Raises UserError for bad data or settings before anything is trained, RunError for a run that cannot go on.
    """
    attached = attach(model) if not isinstance(method, Full) else None
    if attached is not None and adapter in attached.names():
        there = attached.get(adapter).cfg
        if method is not None and method != there:
            raise UserError(f"adapter {adapter!r} is attached and was made from {there}; leave method out, or remove the adapter")
        method = there
    chosen = method if method is not None else make("lora")
    fields = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen)}
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    files = [data] if isinstance(data, (str, Path)) else list(data)
    rows = {"files": [str(f) for f in files], "eval": [str(held_out)] if held_out else []}
    for key in [k for k in settings if k in {f.name for f in dataclasses.fields(DataConfig)} - rows.keys()]:
        value = settings.pop(key)
        value = str(value) if isinstance(value, Path) else value
        rows[key] = [str(v) for v in value] if isinstance(value, (list, tuple)) else value
    cfg = RunConfig(base=str(getattr(model.config, "_name_or_path", "") or ""), out=str(out), adapter=adapter,
                    bits=few_bits(model) or 0,
                    method={"name": type(chosen).name} | fields,
                    data=build(DataConfig, rows, "data."),
                    train=build(TrainConfig, settings, "train."),
                    eval=EvalConfig(task=str(task) if task else None, task_data=str(task_data) if task_data else None))
    say = (lambda line: None) if quiet else (lambda line: console().print(line, markup=False))
    return run(model, tokenizer, cfg, read_rows(cfg, say), quiet=quiet, say=say)


def train_run(cfg: RunConfig, *, quiet: bool = False) -> Result:
    """A run from a config alone: data is read and checked first, then the base is loaded, then it trains."""
    say = (lambda line: None) if quiet else (lambda line: console().print(line, markup=False))
    if not cfg.out:
        raise UserError("out: missing; give --out DIR, the folder of this run")
    method, device = make(**cfg.method), device_of(cfg.device)
    base_path(cfg.base)                               # a base that is not there is told before the data is read
    rows = read_rows(cfg, say)
    check_folder(Path(cfg.out), cfg, rows.fingerprint)
    dtype = compute_dtype(cfg.train.dtype, device)
    dtype = torch.float32 if isinstance(method, Full) else dtype         # trained weights are float32, computed under autocast
    model, tokenizer = load(cfg.base, bits=cfg.bits or None, dtype=dtype, device=cfg.device,
                            trust_remote_code=cfg.trust_remote_code)
    return run(model, tokenizer, cfg, rows, quiet=quiet, say=say)


def train_many(model: nn.Module, tokenizer, jobs: Sequence[Mapping | JobConfig] | Mapping[str, Mapping], out: str | Path, *,
               tokens: int | None = None, quiet: bool = False) -> dict[str, Result | Failure]:
    """Train many adapters on one base, each as it would be alone; their results, or why they failed, by name.

    jobs: of each its keys of a run (as in RunConfig, `data` and `method` also in short), its name, and its weight, as
    {"name": "math", "data": "math.jsonl", "method": tg.LoRA(rank=8), "train": {"lr": 1e-3}, "weight": 2}. out: the folder that
    each job's folder of its name goes into; what is found there goes on. tokens: of the jobs' steps together that are taken at
    once. What is wrong with one job stops that job alone. Raises UserError for jobs that are no list of jobs, or share a name.
    """
    shared = {"base": str(getattr(model.config, "_name_or_path", "") or ""), "bits": few_bits(model) or 0}
    found, wrong, names = jobs_of(jobs, out, shared=shared)
    with Joint(model, tokenizer, out, tokens=tokens, quiet=quiet) as joint:
        for name, why in wrong.items():
            joint.refuse(name, why)
        for job in found:
            joint.admit(job)
        results = joint.run()
    return {name: results[name] for name in names}


def train_jobs(jobs: Jobs, *, quiet: bool = False) -> dict[str, Result | Failure]:
    """A jobs file: data is read and checked first, then the base is loaded, then all train."""
    say = (lambda line: None) if quiet else (lambda line: console().print(line, markup=False))
    device = device_of(jobs.device)
    base_path(jobs.base)
    rows, wrong, dtypes = {}, dict(jobs.wrong), {job.name: compute_dtype(job.run.train.dtype, device) for job in jobs.jobs}
    for job in jobs.jobs:
        try:
            if dtypes[job.name] != dtypes[jobs.jobs[0].name]:
                raise UserError(f"train.dtype: {job.run.train.dtype} is not {jobs.jobs[0].name}'s "
                                f"{jobs.jobs[0].run.train.dtype}; there is one base")
            rows[job.name] = read_rows(job.run, lambda line, name=job.name: say(f"{name}: {line}"))
        except (UserError, OSError) as e:
            wrong[job.name] = str(e)
    if not rows:
        return {name: Failure(Path(jobs.out) / name, why) for name, why in wrong.items()}
    model, tokenizer = load(jobs.base, bits=jobs.bits or None, dtype=dtypes[next(iter(rows))], device=jobs.device,
                            trust_remote_code=jobs.trust_remote_code)
    with Joint(model, tokenizer, jobs.out, tokens=jobs.tokens, quiet=quiet) as joint:
        for name, why in wrong.items():
            joint.refuse(name, why)
        for job in jobs.jobs:
            if job.name in rows:
                joint.admit(job, rows[job.name])
        results = joint.run()
    return {name: results[name] for name in jobs.names}


def evaluate(model: nn.Module, tokenizer, data: str | Path | Sequence[Conversation] | None = None, *, adapter: str | None = None,
             max_length: int = 1024, stop: str | None = None, chat: bool = False,
             progress: Callable[[int, int], None] | None = None, **settings) -> Score:
    """Score rows, or a task (task="boolq", task_data=DIR), with the base (adapter=None) or one adapter.

    chat: ask a task as chat messages, through the model's template. settings: keys of EvalConfig.
    """
    cfg, task = build(EvalConfig, settings, "eval."), None
    if (data is None) == (cfg.task is None):
        raise UserError("evaluate: give data or task, one of them")
    if cfg.task is not None:
        task = tasks.load(cfg.task, cfg.task_data, cfg.max_rows, chat)
    rows = None if data is None else load_conversations([data]) if isinstance(data, (str, Path)) else list(data)
    with _using(model, adapter):
        how = cfg, pad_id(tokenizer), min(max_length, room(model) or max_length), progress
        renderer = Renderer(tokenizer, stop=stop)
        return tasks.score(model, renderer, task, *how) if task else score(model, renderer, rows, *how)


def _using(model: nn.Module, adapter: str | None) -> AbstractContextManager:
    """One adapter, or the base alone; a model without adapters stays without."""
    return attach(model).use(adapter) if adapter is not None or hasattr(model, "adapters") else nullcontext()


def generate(model: nn.Module, tokenizer, prompt: str | Sequence[Message], *, adapter: str | None = None,
             max_new_tokens: int = 128, stop: str | None = None) -> str:
    """The greedy answer to a prompt (plain text) or to messages (rendered with the chat template)."""
    if isinstance(prompt, str):
        conversation = Conversation("plain", (Message("user", prompt), Message("assistant", "")), "prompt")
    else:
        conversation = Conversation("chat", (*prompt, Message("assistant", "")), "prompt")
    with _using(model, adapter):
        return generate_answers(model, Renderer(tokenizer, stop=stop), [conversation], max_new_tokens, 1, pad_id(tokenizer))[0]
