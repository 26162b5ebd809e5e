"""The files of a study: results.csv (a line a run), results.md (the rankings), report.html."""
from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from tsugiki.compare.page import digits, render
from tsugiki.compare.rows import Parts
from tsugiki.compare.stats import METHOD
from tsugiki.compare.store import Store
from tsugiki.compare.study import Study
from tsugiki.compare.table import DataTable, Row, Table


def write_all(store: Store, table: Table, study: Study, parts: Mapping[str, Parts]) -> None:
    """Write the three files, each whole or not at all."""
    about = {"protocol": protocol(study, parts), "environment": environment(), "study": study.plain() | {"out": None},
             "samples": {name: p.samples(study.samples) for name, p in parts.items()}}
    store.write(store.out / "results.csv", csv_text(table))
    store.write(store.out / "results.md", markdown(table, about["protocol"]))
    store.write(store.out / "report.html", render(table, about))


def csv_text(table: Table) -> str:
    """Every run, one line; the last two columns are measured, all others are the same whenever the study is made."""
    out = io.StringIO()
    if table.runs:
        writer = csv.DictWriter(out, list(table.runs[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in table.runs)
    return out.getvalue()


def protocol(study: Study, parts: Mapping[str, Parts]) -> list[str]:
    """How the numbers were made, a sentence each."""
    rates = (f"of {', '.join(f'{r:g}' for r in study.rates)}" if study.rates else
             f"of the method's recommended rate times {', '.join(f'{f:g}' for f in study.factors)}"
             + (f", and up to {study.extend} beyond the edge while the best is there" if study.extend else ""))
    how = ("short runs first, the better half goes on with twice the steps" if study.search == "halving" else "each in full length")
    found = [f"{name}: {len(p.train):,} rows to train on, {len(p.validation):,} of validation, {len(p.test):,} of test."
             for name, p in parts.items()]
    searched = len(study.rates) != 1
    if searched:
        found.append(f"Each method's learning rate is the one, {rates}, with the best {study.select} on the validation rows, "
                     f"which are held out of the training rows: seed {study.seeds[0]}, {how}.")
    else:
        found.append(f"All methods are trained at the rate {study.rates[0]:g}, which was given.")
    found.append("Test rows are scored only after that, with the final runs: "
                 f"{'the chosen' if searched else 'that'} rate, seeds {', '.join(map(str, study.seeds))}. "
                 "A seed draws the adapter's start and the order of the rows; the rows themselves are the same for all.")
    if study.parameters:
        found.append(f"Ranks and sizes are chosen so that a method trains as nearly {study.parameters:,} numbers as it can; "
                     "methods of one size stay as they are.")
    if study.general:
        found.append(f"Forgetting is the rise of the loss, in nats a token, on the first {study.general_tokens:,} tokens of "
                     f"{', '.join(Path(f).name for f in study.general)}; its interval is over seeds.")
    return [*found, METHOD, "Seconds are of the training steps alone; memory is the most that the run's process held, its "
            "libraries and the base included (on a GPU: the most that tensors held)."]


def environment() -> dict:
    """What speed, and the last digits, depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__, "cpu": cpu,
            "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def markdown(table: Table, about: list[str]) -> str:
    """The rankings as Markdown."""
    parts = ["# Which method?", ""]
    if len(table.data) > 1 and (overall := table.overall()):
        head = ("method", "mean place", *(d.name for d in table.data))
        parts += ["## Over all data sets", "", *_table(head, [(f"`{label}`", f"{place:.2f}", *(digits(v) for v in values))
                                                              for label, place, values in overall]), ""]
    for data in table.data:
        parts += [f"## {data.name}", "", *_data_section(data), ""]
    if table.failures:
        parts += ["## Runs that failed", "", *(f"- {line}" for line in table.failures), ""]
    if table.open:
        parts += [f"{table.open} methods on a data set are not finished; the same command goes on.", ""]
    return "\n".join([*parts, "## How this was made", "", *(f"- {line}" for line in about), ""])


def _data_section(data: DataTable) -> list[str]:
    forgot = any(r.forgetting for r in data.rows)
    head = ["place", "method", data.metric, "95 % interval", "rate", "trained", *(["forgetting"] if forgot else []), "seeds",
            "s", "peak MB"]
    lines = _table(head, [[place(r), f"`{r.label}`", *(cells(r, forgot))] for r in data.rows])
    if data.base and data.base["score"] is not None:
        lines = [f"The base alone: {data.metric} {digits(data.base['score'])}. n {data.n}.", "", *lines]
    if ties := [f"`{r.label}`" for r in data.rows if r.tie]:
        lines += ["", f"Tied with `{data.rows[0].label}`: {', '.join(ties)}."]
    if data.equal_parameters:
        lines += ["", f"Nearest to {data.budget:,} trained parameters, the best first: "
                  + ", ".join(f"`{x}`" for x in data.equal_parameters) + "."]
    if data.seconds and len(data.equal_time) > 1:
        then = sorted(data.equal_time.items(), key=lambda item: item[1])
        lines += ["", f"Validation loss after {data.seconds:.3g} s of training: "
                  + ", ".join(f"`{label}` {digits(v)}" for label, v in then) + "."]
    return lines


def place(row: Row) -> str:
    """`1`, `2–4` (statistical ties), or a dash."""
    if row.score is None:
        return "–"
    low, high = row.rank
    return f"{low}" if low == high else f"{low}–{high}"


def cells(row: Row, forgot: bool) -> list[str]:
    if row.score is None:
        return ["failed", row.failed[0] if row.failed else "", *[""] * (6 + forgot)]
    low_high = row.score.interval
    return [digits(row.score.value), f"{digits(low_high[0])} to {digits(low_high[1])}" if low_high else "unknown",
            f"{row.lr:g}" + (f" ({row.edge} tried)" if row.edge else ""), f"{row.trainable:,}",
            *([f"{row.forgetting.value:+.3f}" if row.forgetting else ""] if forgot else []),
            f"{row.seeds}" + (f", {len(row.failed)} failed" if row.failed else ""),
            f"{row.measured['seconds']:.3g}", f"{row.measured['memory_bytes'] / 2**20:,.0f}"]


def _table(head, rows) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines]
