"""The rows of a data set: trained on, chosen on, reported on. One drawing for all runs, so that they compare row by row."""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from tsugiki.compare.study import Study
from tsugiki.config import RunConfig, build, merge
from tsugiki.data import Conversation, load_conversations, split
from tsugiki.evaluate.tasks import Task
from tsugiki.train.rows import Rows, columns_of, read_rows
from tsugiki.train.sources import Sources


@dataclass(frozen=True)
class Parts:
    """Three lists of which no row is in two, if the files have none twice."""
    train: list[Conversation]
    validation: list[Conversation]
    test: list[Conversation]
    template: str | None
    fingerprint: str
    sources: Sources = Sources()                      # what is mixed into every run, and held-out text of it
    task: Task | None = None                          # where the test rows are a task's, asked in the shape of the training rows

    def rows(self) -> Rows:
        """What a run is given: the test rows are not in it."""
        return Rows(self.train, self.validation, self.fingerprint, self.template, self.sources)

    def shown(self, count: int) -> list[tuple[int, Conversation]]:
        """The first test rows that ask different things, each with its place."""
        asked: dict[str, tuple[int, Conversation]] = {}
        for n, c in enumerate(self.test):
            asked.setdefault(c.prompt_text, (n, c))
        return list(asked.values())[:count]

    def samples(self, count: int) -> list[tuple[str, str]]:
        """(prompt, expected answer) of those."""
        return [(c.prompt_text, self.task.items[n].gold if self.task else c.reference) for n, c in self.shown(count)]


def read_parts(study: Study, data: str, say: Callable[[str], None] = lambda line: None) -> Parts:
    """Read and check the files of a data set, and hold out what rates are chosen on. Raises UserError for bad rows."""
    cfg = build(RunConfig, merge(study.values(data), {"train": {"seed": study.data_seed}, "data": {"streaming": "off"}}))
    found = read_rows(cfg, say)
    if files := study.validation_files(data):
        train, validation = found.train, load_conversations(files, cfg.data.format, columns_of(cfg))
        validation = validation[:study.validation_rows]
    else:
        share = min(study.validation, study.validation_rows / max(1, len(found.train)))
        train, validation = split(found.train, share, study.data_seed)
    test = found.task.conversations if found.task else found.held_out[:cfg.eval.max_rows]
    texts = "\0".join("\0".join(m.content for m in c.messages) for c in validation)
    sizes = f"{len(train)} {len(validation)} {len(test)}"
    digest = hashlib.sha256(f"{found.fingerprint}\0{sizes}\0{texts}".encode("utf-8", "surrogatepass")).hexdigest()
    return Parts(train, validation, test, found.template, digest, found.sources, found.task)
