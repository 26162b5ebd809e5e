"""The jobs of a joint run: what a jobs file, or a list of plain values, says of each; one schema with a run's."""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsugiki.config import RunConfig, build, merge, option, read_yaml
from tsugiki.edit import Config
from tsugiki.errors import UserError, nearest, shown

SHARED = ("base", "device", "bits", "trust_remote_code")         # one for all jobs: they are about the base
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")           # of an adapter, and of a folder
TAKEN = ("checkpoints", "jobs.yaml")                             # beside the jobs' folders


@dataclass(frozen=True, kw_only=True)
class Turn:
    """When a job takes part."""
    weight: float = option(1.0, "its share of the tokens, beside the other jobs', where they do not all fit into a tick",
                           low=1e-3, high=1e6)
    start: int = option(0, "the tick at which it begins", low=0)


@dataclass(frozen=True)
class JobConfig:
    """One job: a run whose adapter is called like the job, and its turn."""
    name: str
    run: RunConfig
    turn: Turn = Turn()


@dataclass(frozen=True, kw_only=True)
class _Together:
    """The keys of a jobs file beside `defaults` and `jobs`."""
    base: str = RunConfig.base
    device: str = RunConfig.device
    bits: int = option(0, "", (0, 4, 8))
    trust_remote_code: bool = False
    out: str | None = None
    tokens: int | None = option(None, "", low=1)


@dataclass(frozen=True)
class Jobs:
    """A jobs file: what is one for all, and each job as far as it is right; what is wrong with the others, by name."""
    base: str
    device: str
    bits: int
    trust_remote_code: bool
    out: str
    tokens: int | None
    jobs: tuple[JobConfig, ...]
    names: tuple[str, ...]                            # of all, as they stand in the file
    wrong: dict[str, str] = field(default_factory=dict)


def read_jobs(path: str, over: Mapping | None = None) -> Jobs:
    """A jobs file; the nested keys of `over` win over its own, those of a run over every job's. UserError for a mistake that is
    not of one job alone."""
    values, over = read_yaml(path), dict(over or {})
    try:
        known = [f.name for f in dataclasses.fields(_Together)]
        for key in values:
            if key not in (*known, "defaults", "jobs"):
                raise UserError(f"{key}: unknown key{nearest(key, [*known, 'defaults', 'jobs'])}; allowed: {', '.join(known)}, "
                                "defaults (keys of a run for all jobs), jobs")
        given = {k: over.pop(k) for k in known if k in over}
        top = build(_Together, {k: v for k, v in values.items() if k in known} | given)
        if not top.out:
            raise UserError("out: missing; give --out DIR, the folder of the jobs' folders")
        shared = {k: getattr(top, k) for k in SHARED}
        found, wrong, names = jobs_of(values.get("jobs"), top.out, values.get("defaults"), shared, over)
        if not found:
            raise UserError(f"{next(iter(wrong.values()))} (no job is right)")
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    return Jobs(top.base, top.device, top.bits, top.trust_remote_code, top.out, top.tokens, tuple(found), names,
                {name: f"{path}: {why}" for name, why in wrong.items()})


def jobs_of(given: Any, out: str | Path, defaults: Any = None, shared: Mapping | None = None,
            over: Mapping | None = None) -> tuple[list[JobConfig], dict[str, str], tuple[str, ...]]:
    """(the jobs that are right, what is wrong with the others by name, all names in order) from a list, or a mapping by name:
    keys of a run, laid over `defaults` and under `over`.

    Raises UserError for what is no mistake of one job: no jobs at all, one without a name, two with one name or folder.
    """
    if isinstance(given, Mapping):
        for name, values in given.items():
            if isinstance(values, Mapping) and values.get("name", name) != name:
                raise UserError(f"jobs: {name}: name: is {shown(values['name'])} inside; leave it out")
        given = [{"name": name} | dict(values) if isinstance(values, Mapping) else values for name, values in given.items()]
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise UserError("jobs: expected a list of jobs, or jobs by name")
    if defaults is not None and not isinstance(defaults, Mapping):
        raise UserError(f"defaults: expected keys and values, found {shown(defaults)}")
    found, wrong, folders = [], {}, {}
    for n, values in enumerate(given, 1):
        name = _name(values, n)
        if name in wrong or name in (job.name for job in found):
            raise UserError(f"jobs: two are called {name}; a name is a job's own")
        own = values.run.out if isinstance(values, JobConfig) else values.get("out")
        folder = Path(str(own or Path(out) / name)).absolute()
        if (other := folders.setdefault(folder, name)) != name:
            raise UserError(f"jobs: {other} and {name} both have the folder {folder}; a folder is a job's own")
        try:
            found.append(job_of(values, out, defaults, shared, over))
        except UserError as e:
            wrong[name] = str(e)
    return found, wrong, tuple(folders.values())


def _name(values: Any, n: int) -> str:
    if isinstance(values, JobConfig):
        return values.name
    if not isinstance(values, Mapping) or "name" not in values:
        raise UserError(f"jobs: number {n} has no name; each job is keys and values, with a name")
    name = str(values["name"])
    if not NAME.fullmatch(name) or name in TAKEN:
        raise UserError(f"jobs: number {n}: name: {shown(name)} is not one; up to 100 letters, digits, '_', '-' and '.', not "
                        f"starting with '-' or '.', and not {' or '.join(TAKEN)}")
    return name


def job_of(values: Mapping | JobConfig, out: str | Path, defaults: Mapping | None = None,
           shared: Mapping | None = None, over: Mapping | None = None) -> JobConfig:
    """One job from its values laid over the defaults and under `over`; UserError begins with its name."""
    if isinstance(values, JobConfig):
        return values
    name = _name(values, 1)
    try:
        for key in (*SHARED, "adapter"):
            if any(key in (layer or ()) for layer in (values, defaults, over)):
                why = "the job's name is the adapter's" if key == "adapter" else "one for all jobs, since there is one base"
                raise UserError(f"{key}: {why}; it is no key of a job")
        laid: dict = {}
        for layer in (defaults, {k: v for k, v in values.items() if k != "name"}, over):
            layer = _plain(dict(layer or {}))
            if _name_of(layer) not in (None, _name_of(laid)):
                laid.pop("method", None)              # another method takes over no settings
            laid = merge(laid, layer)
        turn = build(Turn, {k: laid.pop(k) for k in [f.name for f in dataclasses.fields(Turn)] if k in laid})
        if isinstance(laid.get("method"), dict):
            laid["method"].setdefault("name", "lora")
        run = build(RunConfig, laid | {"out": str(laid.get("out") or Path(out) / name), "adapter": name} | dict(shared or {}))
        if run.method["name"] == "full":
            raise UserError("method.name: full fine-tuning changes the base, which all jobs share; give a method that adds an "
                            "adapter, or train it alone")
        if run.train.compile == "on":
            raise UserError("train.compile: on is not for a joint run; leave it out")
        if run.train.float8 == "on":
            raise UserError("train.float8: on is not for a joint run; leave it out")
    except UserError as e:
        raise UserError(f"{name}: {e}") from None
    return JobConfig(name, run, turn)


def _name_of(values: Mapping) -> Any:
    """Of the method, where there is one."""
    method = values.get("method")
    return method.get("name") if isinstance(method, Mapping) else None


def _plain(values: dict) -> dict:
    """Short forms spelt out: a method by its name or its config, data by their files."""
    method, data = values.get("method"), values.get("data")
    if isinstance(method, str):
        values["method"] = {"name": method}
    elif isinstance(method, Config):
        fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
        values["method"] = {"name": method.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    if isinstance(data, (str, Path)):
        values["data"] = {"files": [str(data)]}
    elif isinstance(data, (list, tuple)):
        values["data"] = {"files": [str(f) for f in data]}
    return values
