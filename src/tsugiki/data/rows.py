"""Rows out of files: JSON, JSON Lines, CSV, TSV, Parquet, plain text, each also gzipped; each defect with its line."""
from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tsugiki.data.strict import MAX_LINE, Broken, Strict, kind_of
from tsugiki.errors import UserError, nearest

MAX_WHOLE = 2 * 2**30     # bytes of a file that has to be read in one piece (.json .txt .parquet.gz)
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Row:
    """One record: its fields, and where it starts (line counts from 1; for Parquet it is the row's number)."""

    fields: dict
    file: str
    line: int


@dataclass(frozen=True)
class Problem:
    """One defect of the input. `line` 0 is the file as a whole; `field` is "row" or "file" when it is no one field."""

    file: str
    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: {self.field}" if self.line else self.file
        return "".join(c if c.isprintable() else "?" for c in f"{where}: {self.reason}")


class Bad(Exception):
    """A defect of the row at hand; the caller knows the file and the line."""

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


def raise_problems(problems: list[Problem]) -> None:
    """One UserError of at most three lines for any number of problems; nothing when there are none."""
    if not problems:
        return
    lines = [str(p) for p in problems[:2]]
    if len(problems) > 2:
        lines.append(f"... and {len(problems) - 2} more (tsugiki data check {problems[0].file} lists all)")
    raise UserError("\n".join(lines))


def read(path: str | Path, problems: list[Problem] | None = None) -> Iterator[Row]:
    """Rows of a file in order. Defects go to `problems`, and reading goes on where it can.

    Without a list for them the first defect raises UserError.
    """
    found = [] if problems is None else problems
    before, rows = len(found), 0
    for row in _read(Path(path), found):
        if problems is None:
            raise_problems(found)
        rows += 1
        yield row
    if not rows and len(found) == before:
        found.append(Problem(str(path), 1, "file", "holds no rows"))
    if problems is None:
        raise_problems(found)


def _read(path: Path, problems: list[Problem]) -> Iterator[Row]:
    zipped = path.suffix.lower() == ".gz"
    kind = Path(path.stem).suffix.lower() if zipped else path.suffix.lower()
    here = Source(path, zipped, problems)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        here.problem(0, "file", "is a folder, not a file" if path.is_dir() else f"no such file{near}")
    elif kind not in READERS:
        allowed = f"allowed: {' '.join(READERS)} (each also .gz){nearest(kind, READERS)}"
        here.problem(0, "file", f"unknown kind {kind or path.name!r}; {allowed}")
    else:
        try:
            yield from READERS[kind](here)
        except PermissionError:
            here.problem(0, "file", "may not be read (permission denied)")
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            here.problem(here.line + 1, "file", f"damaged gzip, cannot be read on from here ({_first(e)})")


@dataclass
class Source:
    """A file being read: its bytes, how far we are, and where its problems go."""

    path: Path
    zipped: bool
    problems: list[Problem]
    line: int = 0           # lines read so far

    def problem(self, line: int, field: str, reason: str) -> None:
        self.problems.append(Problem(str(self.path), line, str(field), reason))

    def row(self, fields: dict, line: int) -> Row:
        return Row(fields, str(self.path), line)

    def open(self) -> io.BufferedIOBase:
        return gzip.open(self.path, "rb") if self.zipped else open(self.path, "rb")

    def whole(self) -> bytes | None:
        """All bytes, or None (and a problem) when there are none or too many."""
        with self.open() as f:
            data = f.read(MAX_WHOLE + 1)
        if len(data) > MAX_WHOLE:
            return self.problem(1, "file", f"bigger than {MAX_WHOLE >> 20} MB in one piece; use .jsonl")
        if not data.removeprefix(codecs.BOM_UTF8).strip():
            return self.problem(1, "file", "is empty")
        return data

    def lines(self) -> Iterator[tuple[int, str | None]]:
        """(number, text without its line end); text is None for a line that was reported as a problem."""
        empty = True
        with self.open() as f:
            while data := f.readline(MAX_LINE + 1):
                number = self.line + 1
                if len(data) > MAX_LINE:
                    self.problem(number, "row", f"line longer than {MAX_LINE >> 20} MB")
                    while data and not data.endswith(b"\n"):
                        data = f.readline(MAX_LINE)
                    text, empty = None, False
                else:
                    text = self.decode(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data, number)
                    if text is None and number == 1 and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                        return
                    text = text if text is None else text.removesuffix("\n").removesuffix("\r")
                    empty = empty and text is not None and not text.strip()
                self.line = number
                yield number, text
        if empty:
            self.problem(1, "file", "is empty")

    def decode(self, data: bytes, line: int) -> str | None:
        """UTF-8 text of `data`, which starts at `line`; None, and a problem, when it is not, or holds NUL."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as e:
            start = data.rfind(b"\n", 0, e.start) + 1
            wide = "; the file looks like UTF-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
            reason = f"not UTF-8: byte 0x{data[e.start]:02x} at byte {e.start - start + 1} of the line{wide}"
            return self.problem(line + data.count(b"\n", 0, e.start), "row", reason)
        if "\0" in text:
            return self.problem(line + text.count("\n", 0, text.index("\0")), "row", "holds a NUL character")
        return text


def _first(e: BaseException) -> str:
    """The first line of an exception's message, short."""
    return (str(e).splitlines() or [type(e).__name__])[0][:120]


def _object(here: Source, strict: Strict, value: object, line: int) -> Iterator[Row]:
    """The row, or its problems."""
    if not isinstance(value, dict):
        here.problem(line, "row", f"is {kind_of(value)}, not an object")
    elif strict.defects:
        here.problem(line, *strict.defects[0])
    else:
        yield here.row(value, line)


def _jsonl(here: Source) -> Iterator[Row]:
    strict = Strict()
    for number, text in here.lines():
        if text is None or not text.strip():
            continue
        try:
            value, end = strict.decode(text, _SPACE.match(text).end())
            if rest := text[end:].strip():
                raise Broken(f"more after the object, from column {text.index(rest, end) + 1}; one object a line", end)
        except Broken as e:
            hint = "; one object a line, an array goes in a .json file" if number == 1 and text.strip() in "{[" else ""
            here.problem(number, "row", e.args[0] + hint)
            continue
        if number == 1 and isinstance(value, list):
            return here.problem(1, "row", "is a list, not an object; an array goes in a .json file")
        yield from _object(here, strict, value, number)


def _json(here: Source) -> Iterator[Row]:
    data = here.whole()
    text = None if data is None else here.decode(data.removeprefix(codecs.BOM_UTF8), 1)
    if text is None:
        return
    strict, line, counted = Strict(), 1, 0

    def line_at(position: int) -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, position), position
        return line

    at = _SPACE.match(text).end()
    many = text[at] == "["
    if not many and text[at] != "{":
        return here.problem(line_at(at), "file", "must hold an array of objects, or one object")
    at = _SPACE.match(text, at + 1).end() if many else at
    if many and text[at:at + 1] == "]":
        return here.problem(line_at(at), "file", "holds an empty array")
    while True:
        start = line_at(at)
        try:
            value, at = strict.decode(text, at)
        except Broken as e:
            return here.problem(line_at(e.args[1]), "row", e.args[0] + ("; nothing after it was read" if many else ""))
        yield from _object(here, strict, value, start)
        at = _SPACE.match(text, at).end()
        if many and text[at:at + 1] == ",":
            at = _SPACE.match(text, at + 1).end()
        else:
            break
    if many and text[at:at + 1] != "]":
        return here.problem(line_at(at), "row", "expected ',' or ']' after an object; nothing after it was read")
    at = _SPACE.match(text, at + many).end()
    if at < len(text):
        lines = "; one object a line is .jsonl" if not many and text[at] == "{" else ""
        here.problem(line_at(at), "file", f"more after the end of the {'array' if many else 'object'}{lines}")


def _header(here: Source, names: list[str]) -> bool:
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        here.problem(1, twice or "header", "column appears twice in the header")
    return twice is None


def _record(here: Source, names: list[str], values: list[str], line: int) -> Iterator[Row]:
    if len(values) == len(names):
        yield here.row(dict(zip(names, values, strict=True)), line)
    else:
        count = f"{len(values)} column{'s' * (len(values) != 1)}"
        here.problem(line, "row", f"{count} where the header has {len(names)} ({', '.join(names)[:80]})")


def _tsv(here: Source) -> Iterator[Row]:
    """GLUE's dialect: no quoting at all, a quote is a character."""
    yield from _table(here, ((n, None if t is None else t.split("\t") if t else []) for n, t in here.lines()))


def _csv(here: Source) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)
    poisoned: set[int] = set()

    def lines() -> Iterator[str]:
        for number, text in here.lines():
            if text is None:
                poisoned.add(number)
            yield (text or "") + "\n"

    def records() -> Iterator[tuple[int, list[str] | None]]:
        reader = csv.reader(lines(), strict=True)
        while True:
            line = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                reason = "a quote is opened and never closed" if "unexpected end" in str(e) else _first(e)
                here.problem(line, "row", f"not valid CSV: {reason}")
                values = None
            bad = not poisoned.isdisjoint(range(line, reader.line_num + 1))
            yield line, None if bad else values

    yield from _table(here, records())


def _table(here: Source, records: Iterator[tuple[int, list[str] | None]]) -> Iterator[Row]:
    """Header, then rows. Blank lines are let pass at the end only: elsewhere they may be a lost row."""
    names, blank, seen = None, [], False
    for line, values in records:
        if values == []:
            blank.append(line)
            continue
        for n in blank:
            here.problem(n, "row", "is blank")
        blank = []
        if names is None:
            if values is None or not _header(here, values):
                return
            names = values
        else:
            seen = True
            if values is not None:
                yield from _record(here, names, values, line)
    if names is not None and not seen:
        here.problem(1, "file", f"a header ({', '.join(names)[:80]}) without rows")


def _txt(here: Source) -> Iterator[Row]:
    data = here.whole()
    text = None if data is None else here.decode(data.removeprefix(codecs.BOM_UTF8), 1)
    if text is not None:
        yield here.row({"text": text.replace("\r\n", "\n")}, 1)


def _parquet(here: Source) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return here.problem(0, "file", "reading .parquet needs pyarrow (pip install pyarrow)")
    number = 0
    source = str(here.path) if not here.zipped else here.whole()
    if source is None:
        return
    try:
        with pq.ParquetFile(pa.BufferReader(source) if here.zipped else source) as table:
            if not _header(here, table.schema_arrow.names):
                return
            for batch in table.iter_batches(1000):
                for fields in batch.to_pylist():
                    number += 1
                    nul = next((k for k, v in fields.items() if isinstance(v, str) and "\0" in v), None)
                    if nul is not None:
                        here.problem(number, nul, "holds a NUL character")
                    else:
                        yield here.row(fields, number)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        here.problem(number + 1, "file", f"damaged parquet file ({_first(e)})")


READERS: dict[str, Callable[[Source], Iterator[Row]]] = {
    ".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet, ".txt": _txt,
}
