"""Files that are read a piece at a time, as often as they are asked for: checked, then tokenised, never held whole."""
from __future__ import annotations

import codecs
import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tsugiki.data.conversation import Columns, Conversation, Message, stream
from tsugiki.data.render import Example, Renderer, chunks, parts
from tsugiki.data.rows import Bad, Problem, Source, raise_problems, read
from tsugiki.data.strict import MAX_LINE

PIECE = 1 << 18                                       # characters of a text file that are tokenised at once
MANY = 1000                                           # bad rows after which reading stops


@dataclass(frozen=True)
class Files:
    """The rows of some files. A text file is one text, given in pieces that end with a line."""
    files: tuple[str, ...]
    format: str = "auto"
    columns: Columns | None = None

    def __iter__(self) -> Iterator[Conversation]:
        """Every row, a text file's in pieces; raises UserError for bad rows when all are read, or many of them."""
        problems: list[Problem] = []
        for file in self.files:
            source = _pieces(file, problems) if self._text(file) else stream(file, self.format, self.columns, problems, {})
            for row in source:
                yield row
                if len(problems) > MANY:
                    raise_problems(problems)
        raise_problems(problems)

    def examples(self, renderer: Renderer, max_length: int, counts: Counter) -> Iterator[Example]:
        """The token rows that `renderer.examples` gives for the same files, counted under Report's names; "rows" is theirs."""
        problems: list[Problem] = []
        for file in self.files:
            if self._text(file):
                yield from self._one_text(file, renderer, max_length, problems, counts)
                continue
            for part in parts(stream(file, self.format, self.columns, problems, {})):
                counts["rows"] += len(part)
                yield from renderer.part(part, max_length, problems, counts)
        raise_problems(problems)

    def _text(self, file: str) -> bool:
        suffixes = Path(file).suffixes
        return self.format in ("auto", "text") and self.columns is None and "".join(suffixes[-2:]).lower().endswith(
            (".txt", ".txt.gz"))

    def _one_text(self, file: str, renderer: Renderer, size: int, problems: list[Problem], counts: Counter) -> Iterator[Example]:
        """What `chunks` makes of the whole text, from a few pieces at a time."""
        ids, first, where, known = [], True, f"{file}:1", len(problems)
        counts.update(rows=1, chunks=-1)
        for piece in _pieces(file, problems):
            try:
                ids += renderer.text_ids(piece, first)
            except Bad as e:
                problems.append(Problem(file, int(piece.where.rpartition(":")[2]), e.field, e.reason))
            first, whole = False, max(0, len(ids) - 1) // (size - 1)                  # rows that are complete
            for start in range(0, whole * (size - 1), size - 1):
                counts["chunks"] += 1
                yield Example(ids[start:start + size], [False] + [True] * (size - 1), where)
            ids = ids[whole * (size - 1):]
        if len(problems) > known:
            return
        ids.append(renderer.text_end)
        for got, trained in chunks(ids, [True] * len(ids), size):
            counts["chunks"] += 1
            yield Example(got, trained, where)


def _pieces(file: str, problems: list[Problem]) -> Iterator[Conversation]:
    """A text file in pieces of about PIECE characters, each beginning with a character that is no white space, after a line's end:
    there no tokenizer joins what stands before and after."""
    path = Path(file)
    here = Source(path, path.suffix.lower() == ".gz", problems)
    if not path.is_file():
        problems += _said(path)
        return
    try:
        yield from _cut(here, file)
    except PermissionError:
        here.problem(0, "file", "may not be read (permission denied)")
    except (EOFError, zlib.error, gzip.BadGzipFile):
        here.problem(here.line + 1, "file", "damaged gzip, cannot be read on from here")


def _said(path: Path) -> list[Problem]:
    """What reading says of a file that is not there."""
    found: list[Problem] = []
    for _ in read(path, found):
        break
    return found


def _cut(here: Source, file: str) -> Iterator[Conversation]:
    held, size, start, some = [], 0, 1, False
    with here.open() as f:
        while data := f.readline(MAX_LINE + 1):
            here.line += 1
            if len(data) > MAX_LINE:
                return here.problem(here.line, "file", f"line longer than {MAX_LINE >> 20} MB")
            text = here.decode(data.removeprefix(codecs.BOM_UTF8) if here.line == 1 else data, here.line)
            if text is None:
                return None
            some = some or not text.isspace()
            if held and size + len(text) > PIECE and not text[0].isspace() and some:
                yield _piece(held, file, start)
                held, size, start = [], 0, here.line
            held.append(text.replace("\r\n", "\n"))
            size += len(text)
    if not some:
        return here.problem(1, "file", "is empty")
    yield _piece(held, file, start)


def _piece(lines: list[str], file: str, start: int) -> Conversation:
    return Conversation("text", (Message("assistant", "".join(lines)),), f"{file}:{start}")
