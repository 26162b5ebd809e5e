"""The forwards of one step of several jobs: their rows cut together, and each token's adapter and draws."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tsugiki.data.batch import Batch, collate, micro_batches
from tsugiki.route import Spans
from tsugiki.train.loop import MULTIPLE, Job


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
