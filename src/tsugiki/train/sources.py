"""What is mixed into a run beside its data: replay and other files by their share of the tokens, and held-out text of each."""
from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path

from tsugiki.config import DataConfig, RunConfig
from tsugiki.data import Conversation, Renderer, load_conversations, split
from tsugiki.data import tokens as on_disk
from tsugiki.data.batch import lengths_of
from tsugiki.data.mixture import Mixture, mixed
from tsugiki.data.render import Example, Report
from tsugiki.data.stream import Files
from tsugiki.errors import UserError

SOURCE = "source"                                     # the name of the replayed text, and of its held-out part
LARGE = 256 << 20                                     # bytes of data files from which they are streamed
PACKED = (".gz", ".parquet")                          # they grow when they are read, about fourfold
TOKENS = "tokens"                                     # the folder beside the run's other files


@dataclass(frozen=True)
class Added:
    """Rows that give `share` of each step's tokens."""
    name: str
    share: Fraction
    rows: Sequence[Conversation] | Files


@dataclass(frozen=True)
class Sources:
    """What a run reads beside its data. watched: held-out rows by the name of their source."""
    added: tuple[Added, ...] = ()
    watched: dict[str, list[Conversation]] = field(default_factory=dict)

    def digest(self) -> str:
        """Of all rows with their names; nothing where there are none."""
        hashes = [(a.name, digest(a.rows)) for a in self.added] + [(name, digest(rows)) for name, rows in self.watched.items()]
        return json.dumps(hashes) if hashes else ""


def streams(data: DataConfig) -> bool:
    """Whether the data are read a piece at a time: a function of the files' sizes, so a run that goes on decides the same."""
    if data.streaming != "auto":
        return data.streaming == "on"
    paths = [Path(f) for f in (*data.files, *data.replay, *data.mix)]
    size = sum(p.stat().st_size * (4 if p.suffix.lower() in PACKED else 1) for p in paths if p.is_file())
    return size > LARGE and not (data.holdout or data.max_rows or data.source_holdout)


def read_sources(cfg: RunConfig, say: Callable[[str], None]) -> Sources:
    """Read and check what is mixed in and what is watched. Rows may be of any shape; each file's is told from its fields."""
    data, added, watched = cfg.data, [], {}
    shares = [(SOURCE, data.replay, data.replay_ratio)] if data.replay else []
    shares += [(name, [name], share) for name, share in data.mix.items()]
    for name, files, share in shares:
        rows = Files(tuple(files)) if streams(data) else load_conversations(files)
        if data.source_holdout and not (name == SOURCE and data.source_eval):
            rows, watched[name] = split(rows, data.source_holdout, cfg.train.seed)
        added.append(Added(name, Fraction(str(share)), rows))
    if data.source_eval:
        watched[SOURCE] = load_conversations(data.source_eval)
    for a in added:
        count = "" if isinstance(a.rows, Files) else f", {len(a.rows):,} rows"
        say(f"{'replay' if a.name == SOURCE else a.name}: {float(a.share):.4g} of the tokens{count}")
    for name, rows in watched.items():
        say(f"{len(rows):,} held-out rows of {name}: their loss shows what is forgotten")
    return Sources(tuple(added), watched)


def digest(rows: Iterable[Conversation]) -> str:
    """SHA-256 of what the rows say."""
    found = hashlib.sha256()
    for c in rows:
        found.update(f"{said(c)}\0".encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def said(c: Conversation) -> str:
    """What a row says, in one text."""
    return f"{c.kind}{[(m.role, m.content) if m.trained else (m.role, m.content, 0) for m in c.messages]}"


def tokenised(renderer: Renderer, rows: Sequence[Conversation] | Files, sources: Sources, limit: int, cfg: RunConfig,
              fingerprint: str, say: Callable[[str], None]) -> tuple[Sequence[Example], Report, Mixture]:
    """All token rows, the data's first and each added source's after it, what was cut, and which rows a step takes."""
    parts = [rows, *(a.rows for a in sources.added)]
    if isinstance(rows, Files):
        examples, report, counts = _on_disk(renderer, parts, limit, Path(cfg.out), fingerprint, say)
    else:
        made = [renderer.examples(part, limit) for part in parts]
        examples, counts = [e for part, _ in made for e in part], [len(part) for part, _ in made]
        report = Report(*(sum(getattr(r, f.name) for _, r in made) for f in fields(Report)))
    train = cfg.train
    if not sources.added:
        return examples, report, Mixture.alone(len(examples), train.batch_size, train.seed)
    names, shares = ["data", *(a.name for a in sources.added)], [a.share for a in sources.added]
    return examples, report, mixed(counts, names, shares, train.batch_size, train.seed, lengths_of(examples))


def _on_disk(renderer: Renderer, parts: Sequence[Files], limit: int, out: Path, fingerprint: str,
             say: Callable[[str], None]) -> tuple[on_disk.Tokens, Report, list[int]]:
    """The token rows in a folder beside the run: those that lie there, or written now."""
    key = hashlib.sha256(json.dumps([fingerprint, limit, renderer.train_on, renderer.template, renderer.stop_ids,
                                     renderer.text_end, tokenizer_digest(renderer.tokenizer)]).encode()).hexdigest()
    found = on_disk.found(out / TOKENS, key)
    if found is None:
        counts, note = Counter(), {}

        def rows() -> Iterator[Example]:
            for part in parts:
                made = 0
                for e in part.examples(renderer, limit, counts):
                    made += 1
                    yield e
                if not made:
                    raise UserError(f"max_length: {limit} leaves no answer token in any row of {', '.join(part.files)}")
                note.setdefault("examples", []).append(made)
            note["report"] = dict(counts)
        say(f"tokenising into {out / TOKENS}")
        found = on_disk.write(out / TOKENS, key, rows(), note)
    say(f"{int(found.lengths.sum()):,} tokens in {len(found):,} rows on disk")
    return found, Report(**found.note["report"]), found.note["examples"]


def tokenizer_digest(tokenizer) -> str:
    """SHA-256 of everything that a tokenizer does, as far as it says."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    text = json.dumps(known) if backend is None else backend.to_str()
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
