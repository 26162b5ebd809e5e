"""Several jobs on one model: how it is arranged for them, and their rows cut together into forwards they share."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from tsugiki.adapters import attach
from tsugiki.data.batch import FORWARD_OVERHEAD, Batch, collate, lengths_of, micro_batches
from tsugiki.errors import UserError
from tsugiki.route import Spans
from tsugiki.train.checkpoint import Held
from tsugiki.train.failure import bare
from tsugiki.train.fitting import Fit, made_again, overhead
from tsugiki.train.jobs import JobConfig
from tsugiki.train.layout import layout_of, packs, quick
from tsugiki.train.loop import MULTIPLE, Job, Steps
from tsugiki.train.run import Ready, freeze_but, layers_of


@dataclass(eq=False)
class Running:
    """A job in memory."""
    cfg: JobConfig
    it: Ready
    found: tuple[dict, Held] | None       # of the joint checkpoint, to go on from
    begun: bool = False                               # scored as it was before training
    steps: Steps | None = None                        # since its forwards are arranged
    _next: tuple[int, list[int], int] = field(default=(-1, [], 0))

    @property
    def name(self) -> str:
        return self.cfg.name

    @property
    def rows(self) -> list[int]:
        """The rows of its next step."""
        step = self.steps.progress.step
        if self._next[0] != step:
            rows = self.it.mixture.rows(step)
            self._next = step, rows, sum(len(self.it.examples[i].ids) for i in rows)
        return self._next[1]

    @property
    def finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.it.params.values())

    @property
    def cost(self) -> int:
        """Tokens of its next step."""
        return self.rows and self._next[2]


def forwards(jobs: Sequence[Job], rows: Sequence[Sequence[int]], max_tokens: int, apart: bool = False) -> list[Batch]:
    """Every row of every job exactly once, in forwards of at most max_tokens (or one row); `owners` are places in `jobs`.

    A forward holds rows of several jobs, each job's next to one another, in the order of `jobs`; only padded and packed rows, and
    rows with and without virtual tokens, go into forwards of their own. apart: each job has its own forwards.
    """
    batches = []
    kinds = [(job.layout, bool(job.adapter.virtual), n * apart) for n, job in enumerate(jobs)]
    for kind in sorted(set(kinds)):
        documents = [(n, i) for n in range(len(jobs)) if kinds[n] == kind for i in sorted(rows[n])]
        examples = [jobs[n].examples[i] for n, i in documents]
        owners, samples = torch.tensor(documents).unbind(1)
        first = jobs[documents[0][0]]
        device = next(iter(first.params.values())).device
        cuts = micro_batches([len(e.ids) for e in examples], range(len(examples)), kind[0], max_tokens, first.overhead)
        for cut in cuts:
            batch = collate(examples, sorted(sorted(row) for row in cut), first.pad_id, MULTIPLE.get(device.type, 1))
            real, at = batch.samples >= 0, batch.samples.clamp_min(0)
            batch = replace(batch, samples=torch.where(real, samples[at], -1), owners=torch.where(real, owners[at], -1))
            batches.append(batch.to(device))
    return batches


def route(jobs: Sequence[Job], steps: Sequence[int], batch: Batch) -> dict:
    """What the forward is told of each token: its job's adapter, and its job's keys for random draws, as if it were alone.
    steps: of each job, the step it takes (from 0)."""
    here = sorted({int(n) for n in batch.owners.unique() if n >= 0})
    routes = {n: jobs[n].route(batch, steps[n]) for n in here}
    found = {"adapter_ids": _ids({n: r["adapter_ids"] for n, r in routes.items()}, batch)}
    for n, r in routes.items():
        if "token_keys" in r:
            found["token_keys"] = torch.where(batch.owners == n, r["token_keys"], found.get("token_keys", r["token_keys"]))
    return found


def _ids(names: dict[int, str], batch: Batch) -> object:
    """The adapters of a batch, as `adapter_ids` takes them."""
    if len(names) == 1:
        return next(iter(names.values()))
    if not batch.packed:
        return [names[n] for n in batch.owners[:, 0].tolist()]
    owners = batch.owners[0]
    ends = [*((owners.diff() != 0).nonzero().flatten() + 1).tolist(), len(owners)]
    return Spans(tuple(names.get(n) for n in owners[[end - 1 for end in ends]].tolist()), tuple(ends))


@dataclass(frozen=True)
class Arrangement:
    """How the forwards of several jobs are made. refused: jobs whose layout cannot be, by name, and why."""
    layouts: dict[str, str]
    refused: dict[str, Exception]
    tokens: int                                       # of a forward
    overhead: int


def arranged(stack: ExitStack, model: nn.Module, jobs: Mapping[str, Ready], tokens: int = 0) -> Arrangement:
    """Until `stack` closes, the model is arranged for the training of these jobs, of which there is at least one.

    tokens: of a forward, as found before (0: measured now); never less than the longest row.
    """
    layers, layouts, refused = layers_of(model), {}, {}
    freeze_but(model, {f"{name}/{n}": p for name, it in jobs.items() for n, p in it.params.items()})
    with attach(model).use(None):
        fast = stack.enter_context(quick(model, True))
        isolates = fast or packs(model)
    for name, it in jobs.items():
        try:
            layouts[name] = layout_of(it.examples, it.cfg.train, it.virtual, it.mixture, fast, isolates and not it.virtual)
        except UserError as e:
            refused[name] = e
    fit = _measured(jobs, len(layers), refused)
    stack.enter_context(made_again(layers, fit.again, fit.offload))
    longest = max(int(lengths_of(it.examples).max()) for it in jobs.values())
    device = next(iter(jobs.values())).device
    return Arrangement(layouts, refused, max(tokens or fit.tokens, longest),
                       overhead(layers, device) if layers else FORWARD_OVERHEAD)


def _measured(jobs: Mapping[str, Ready], layers: int, refused: dict[str, Exception]) -> Fit:
    """What fits of the job that takes most; those of one method take the same for a token. A job whose forward fails is refused."""
    trained, fits = sum(it.trainable for it in jobs.values()), {}
    for name, it in jobs.items():
        kind = repr((it.method, it.cfg.train.max_tokens, it.cfg.train.checkpointing))
        if kind not in fits and name not in refused:
            try:
                fits[kind] = it.measured(layers, trained)
            except Exception as e:
                refused[name] = bare(e)
    found = list(fits.values()) or [Fit(1)]
    return Fit(min(f.tokens for f in found), max(f.again for f in found), any(f.offload for f in found))
