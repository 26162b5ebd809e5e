"""Tensors out of a PyTorch checkpoint without unpickling it: the zip of torch >= 1.6 and the older stream.

Nothing in the file is run: `opcodes` reads what it says as data. Sizes are checked against the file before memory is taken.
"""
from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import UserError
from .opcodes import Global, Machine, Refused, Storage, View, damaged, show

MAX_PICKLE = 32 << 20                                 # bytes of opcodes; a thousand tensors take about 150 KB
MAX_DEPTH = 32                                        # containers in containers; a structure that holds itself ends here
MAX_VALUES = 500_000                                  # in the result, each counted where it stands
MAX_SHARING = 8                                       # all tensors, written out, against the file's bytes
MAGIC, STREAM_VERSION = 0x1950A86A20F9469CFC6C, 1001  # torch.serialization's, first in the older form
WRAPPERS = ("model_state_dict", "state_dict", "model")   # where trainers put the tensors beside an optimizer's


def state_dict(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint: the file's own dict, or the one a trainer put under "model_state_dict",
    "state_dict" or "model". Raises UserError as `read` does, and for a file that is no such dict.
    """
    value = read(path)
    inner = [value[key] for key in WRAPPERS if isinstance(value.get(key), dict)]
    found = inner[0] if len(inner) == 1 else value
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {show(name)} holds a {type(tensor).__name__}, not a tensor: not a dict of named tensors")
    if not found:
        raise UserError(f"{path}: holds no tensor")
    return found


def read(path: str | Path) -> dict[Any, Any]:
    """What `torch.save` wrote, as dicts, lists and tuples of tensors, texts and numbers. Tensors are on the CPU, without
    gradients, and share memory where they shared a storage. Nothing in the file is run. Raises UserError, in one line,
    for a file that is damaged or asks for anything but tensors in containers.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with open(path, "rb") as f:
            total = f.seek(0, io.SEEK_END)
            f.seek(0)
            value = (_from_zip if f.read(4) == b"PK\x03\x04" else _from_stream)(f, total)
    except Refused as e:
        raise UserError(f"{path}: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a dict of tensors")
    return value


def _from_zip(f: BinaryIO, total: int) -> Any:
    try:
        archive = zipfile.ZipFile(f)
        entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError) as e:
        raise damaged(e) from None
    named = {e.filename: e for e in entries}
    if len(named) != len(entries) or sum(e.file_size for e in entries) > total:
        raise Refused("not a whole PyTorch checkpoint: its parts are named twice or overlap")
    roots = [n.removesuffix("/data.pkl") for n in named if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(roots) != 1:
        raise Refused("a zip file without one data.pkl, so not a PyTorch checkpoint")
    if f"{roots[0]}/constants.pkl" in named:
        raise Refused("a TorchScript program, not a checkpoint; save its state_dict() with torch.save")

    def part(name: str, size: int | None = None) -> bytes:
        entry = named.get(f"{roots[0]}/{name}")
        if entry is None:
            raise Refused(f"not a whole PyTorch checkpoint: its part {show(name)} is missing")
        if size is None and entry.file_size > MAX_PICKLE:
            raise Refused(f"{name} is larger than {MAX_PICKLE >> 20} MB")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Refused(f"its part {show(name)} is compressed, which torch.save does not do")
        if size is not None and entry.file_size != size:
            raise Refused(f"storage {show(name)} has {entry.file_size} bytes, its tensors say {size}")
        try:
            return archive.read(entry)                # checks the part's CRC-32
        except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, OSError, EOFError, zlib.error) as e:
            raise damaged(e) from None

    if f"{roots[0]}/byteorder" in named and part("byteorder") != b"little":
        raise Refused("was saved on a big-endian machine, which is not supported")
    machine = Machine()
    value, _ = machine.run(part("data.pkl"))
    for key, storage in machine.storages.items():
        storage.data = _numbers(part(f"data/{key}", storage.nbytes), storage.dtype)
    return _Plain(total).value(value)


def _from_stream(f: BinaryIO, total: int) -> Any:
    """Five pickles (magic number, version, machine, the value, its storages' keys), then each storage with its length."""
    at = 0

    def pickled(machine: Machine) -> Any:
        nonlocal at
        f.seek(at)
        value, length = machine.run(f.read(MAX_PICKLE))
        at += length
        return value

    if pickled(Machine()) != MAGIC or pickled(Machine()) != STREAM_VERSION:
        raise Refused("not a PyTorch checkpoint: it does not begin as torch.save begins")
    info = pickled(Machine())
    if not isinstance(info, dict) or info.get("little_endian") is not True:
        raise Refused("was saved on a big-endian machine, which is not supported")
    machine = Machine()
    value, keys = pickled(machine), pickled(Machine())
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or sorted(keys) != sorted(machine.storages):
        raise Refused("not a whole PyTorch checkpoint: its list of storages is not what its tensors ask for")
    f.seek(at)
    for key in keys:
        storage, count = machine.storages[key], int.from_bytes(f.read(8), "little")
        if count != storage.count:
            raise Refused(f"storage {show(key)} has {count} numbers, its tensors say {storage.count}")
        if storage.nbytes > total - f.tell():
            raise Refused(f"not a whole PyTorch checkpoint: it ends inside storage {show(key)}")
        storage.data = _numbers(f.read(storage.nbytes), storage.dtype)
    if f.tell() != total:
        raise Refused(f"not a whole PyTorch checkpoint: {total - f.tell()} bytes follow its end")
    return _Plain(total).value(value)


def _numbers(data: bytes, dtype: torch.dtype) -> Tensor:
    if not data:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)


class _Plain:
    """The result without this file's classes. Counts what it writes out: a value may stand in many places."""

    def __init__(self, total: int):
        self.values, self.room = MAX_VALUES, MAX_SHARING * total
        self.made: dict[int, Tensor] = {}             # one tensor a view: what was tied stays tied

    def value(self, v: Any, depth: int = 0) -> Any:
        self.values -= 1
        if depth > MAX_DEPTH or self.values < 0:
            raise Refused(f"is nested deeper than {MAX_DEPTH} levels, or in itself" if depth > MAX_DEPTH
                           else f"holds more than {MAX_VALUES} values")
        if isinstance(v, dict):
            return {key: self.value(inner, depth + 1) for key, inner in v.items()}
        if type(v) in (list, tuple):
            return type(v)([self.value(inner, depth + 1) for inner in v])
        if isinstance(v, View):
            return self.tensor(v)
        if isinstance(v, (Global, Storage)):
            raise Refused("holds a class or a storage where a value is expected")
        return v

    def tensor(self, v: View) -> Tensor:
        self.room -= math.prod(v.size) * v.dtype.itemsize
        if self.room < 0:
            raise Refused(f"its tensors would take more than {MAX_SHARING} times its own size")
        if id(v) not in self.made:
            flat = v.storage.data.view(v.dtype)
            # the stride of a size of 1 says nothing; an odd one there would break later views
            stride = [s if n > 1 else math.prod(v.size[i + 1:]) for i, (n, s) in enumerate(zip(v.size, v.stride, strict=True))]
            self.made[id(v)] = flat.as_strided(v.size, stride, v.offset) if math.prod(v.size) else flat.new_empty(v.size)
        return self.made[id(v)]
