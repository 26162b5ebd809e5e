"""Token rows on disk: written once, read a row at a time, so a corpus may be larger than memory."""
from __future__ import annotations

import json
import os
import shutil
import sys
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from tsugiki.data.render import Example
from tsugiki.errors import RunError, UserError

TRAINED = 1 << 31                                     # the bit of an id that says: this token is a target
FILES = ("ids.u32", "rows.i64")                       # ids with their bit, end to end; (end, file, line) of each row
FULL = 1 << 20                                        # tokens that wait in memory to be written


class Tokens(Sequence[Example]):
    """The rows of a folder made by `write`, as a list of Examples would be. `key` is what was asked for when it was made.

    lengths: (N,) int64. Rows are read with `pread`, not mapped: what was read once does not stay in the process.
    """

    def __init__(self, folder: Path):
        note = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
        for name in FILES:
            if (folder / name).stat().st_size != note["bytes"][name]:
                raise RunError(f"{folder / name}: is damaged; delete {folder}, it is made again")
        self.note, self.key, self.files = note["note"], note["key"], note["files"]
        size = note["bytes"]["rows.i64"] // 8
        self.rows = torch.from_file(str(folder / "rows.i64"), shared=False, size=size, dtype=torch.int64).view(-1, 3)
        self.lengths = torch.diff(self.rows[:, 0], prepend=torch.zeros(1, dtype=torch.int64))
        self.ids = open(folder / "ids.u32", "rb", buffering=0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        end, file, line = self.rows[i].tolist()
        length = int(self.lengths[i])
        got = array("I")
        got.frombytes(os.pread(self.ids.fileno(), 4 * length, 4 * (end - length)))
        return Example([v & ~TRAINED for v in got], [v >= TRAINED for v in got], f"{self.files[file]}:{line}")


def write(folder: Path, key: str, rows: Iterable[Example], note: dict) -> Tokens:
    """Write rows into `folder`, whole or not at all: under a temporary name, fsynced, its manifest last.

    `note` is kept with them, as it is when the last row has come. Raises OSError (disk full) with nothing left behind, UserError
    where the folder holds other things.
    """
    assert array("I").itemsize == 4 and sys.byteorder == "little"
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - {*FILES, "MANIFEST.json"}):
        raise UserError(f"{folder}: is not a run's tokens, which would be written there; choose another --out")
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}")
    for old in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files, end = {}, 0
        with open(temporary / FILES[0], "wb") as ids, open(temporary / FILES[1], "wb") as places:
            waiting, index = array("I"), array("q")
            for e in rows:
                end += len(e.ids)
                waiting.extend([i | TRAINED if on else i for i, on in zip(e.ids, e.trained, strict=True)])
                file, _, line = e.where.rpartition(":")
                index.extend((end, files.setdefault(file, len(files)), int(line)))
                if len(waiting) >= FULL:
                    waiting.tofile(ids)
                    index.tofile(places)
                    waiting, index = array("I"), array("q")
            waiting.tofile(ids)
            index.tofile(places)
            for f in (ids, places):
                f.flush()
                os.fsync(f.fileno())
        manifest = {"key": key, "files": list(files), "note": note,
                    "bytes": {name: (temporary / name).stat().st_size for name in FILES}}
        with open(temporary / "MANIFEST.json", "w", encoding="utf-8") as f:
            json.dump(manifest, f)
            f.flush()
            os.fsync(f.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Tokens(folder)


def found(folder: Path, key: str) -> Tokens | None:
    """The rows that lie in `folder`, if they are whole and were made for `key`."""
    try:
        there = Tokens(folder)
    except (OSError, ValueError, KeyError, TypeError, RunError):
        return None
    return there if there.key == key else None
