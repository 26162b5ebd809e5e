"""Tensors out of a PyTorch checkpoint without unpickling it: its opcodes are read as data, and only a few are known.

Both forms: the zip of torch >= 1.6 and the older stream. `pickletools.genops` splits the bytes into opcodes and executes
nothing; what follows keeps a stack of plain values. A global is a word of the table below, never an import.
"""
from __future__ import annotations

import io
import math
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import UserError

MAX_PICKLE = 32 << 20                                 # bytes of opcodes; a thousand tensors take about 150 KB
MAX_STEPS = 4_000_000                                 # opcodes; a tensor takes about 30
MAX_DEPTH = 32                                        # containers in containers; a structure that holds itself ends here
MAX_VALUES = 500_000                                  # in the result, each counted where it stands
MAX_SIZE = 1 << 40                                    # one size, stride or offset
MAX_SHARING = 8                                       # all tensors, written out, against the file's bytes
MAGIC, STREAM_VERSION = 0x1950A86A20F9469CFC6C, 1001  # torch.serialization's, first in the older form
WRAPPERS = ("model_state_dict", "state_dict", "model")   # where trainers put the tensors beside an optimizer's

ORDERED, SIZE = "collections.OrderedDict", "torch.Size"
REBUILD, REBUILD_DTYPE, PARAMETER = (f"torch._utils._rebuild_{n}" for n in ("tensor_v2", "tensor_v3", "parameter"))
TYPED = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
         "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
         "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}
DTYPES = {*TYPED.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2}


class _Refused(Exception):
    """Why a file is not read, without its name."""


@dataclass(frozen=True)
class _Global:
    """A name that a file may use, and what it stands for here."""
    name: str
    dtype: torch.dtype | None = None                  # of a storage's class


@dataclass
class _Storage:
    """A run of numbers in the file; `data` is filled in when the opcodes are done."""
    dtype: torch.dtype
    count: int
    data: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class _View:
    """A tensor to be: where in which storage."""
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


GLOBALS: dict[str, _Global | torch.dtype] = {n: _Global(n) for n in (ORDERED, SIZE, REBUILD, REBUILD_DTYPE, PARAMETER)}
GLOBALS |= {f"torch.{n}Storage": _Global(n, dtype) for n, dtype in TYPED.items()}
GLOBALS |= {f"{m}.UntypedStorage": _Global("Untyped", torch.uint8) for m in ("torch", "torch.storage")}
GLOBALS |= {str(dtype): dtype for dtype in DTYPES}

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
ARGUMENT = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}   # push their argument
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
SILENT = {"PROTO", "FRAME", "STOP"}


def state_dict(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint: the file's own dict, or the one a trainer put under "model_state_dict",
    "state_dict" or "model". Raises UserError as `read` does, and for a file that is no such dict.
    """
    value = read(path)
    inner = [value[key] for key in WRAPPERS if isinstance(value.get(key), dict)]
    found = inner[0] if len(inner) == 1 else value
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {_show(name)} holds a {type(tensor).__name__}, not a tensor: not a dict of named tensors")
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
    except _Refused as e:
        raise UserError(f"{path}: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not a dict of tensors")
    return value


def _from_zip(f: BinaryIO, total: int) -> Any:
    try:
        archive = zipfile.ZipFile(f)
        entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError) as e:
        raise _damaged(e) from None
    named = {e.filename: e for e in entries}
    if len(named) != len(entries) or sum(e.file_size for e in entries) > total:
        raise _Refused("not a whole PyTorch checkpoint: its parts are named twice or overlap")
    roots = [n.removesuffix("/data.pkl") for n in named if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(roots) != 1:
        raise _Refused("a zip file without one data.pkl, so not a PyTorch checkpoint")
    if f"{roots[0]}/constants.pkl" in named:
        raise _Refused("a TorchScript program, not a checkpoint; save its state_dict() with torch.save")

    def part(name: str, size: int | None = None) -> bytes:
        entry = named.get(f"{roots[0]}/{name}")
        if entry is None:
            raise _Refused(f"not a whole PyTorch checkpoint: its part {_show(name)} is missing")
        if size is None and entry.file_size > MAX_PICKLE:
            raise _Refused(f"{name} is larger than {MAX_PICKLE >> 20} MB")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise _Refused(f"its part {_show(name)} is compressed, which torch.save does not do")
        if size is not None and entry.file_size != size:
            raise _Refused(f"storage {_show(name)} has {entry.file_size} bytes, its tensors say {size}")
        try:
            return archive.read(entry)                # checks the part's CRC-32
        except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, OSError, EOFError, zlib.error) as e:
            raise _damaged(e) from None

    if f"{roots[0]}/byteorder" in named and part("byteorder") != b"little":
        raise _Refused("was saved on a big-endian machine, which is not supported")
    machine = _Machine()
    value, _ = machine.run(part("data.pkl"))
    for key, storage in machine.storages.items():
        storage.data = _numbers(part(f"data/{key}", storage.nbytes), storage.dtype)
    return _Plain(total).value(value)


def _from_stream(f: BinaryIO, total: int) -> Any:
    """Five pickles (magic number, version, machine, the value, its storages' keys), then each storage with its length."""
    at = 0

    def pickled(machine: _Machine) -> Any:
        nonlocal at
        f.seek(at)
        value, length = machine.run(f.read(MAX_PICKLE))
        at += length
        return value

    if pickled(_Machine()) != MAGIC or pickled(_Machine()) != STREAM_VERSION:
        raise _Refused("not a PyTorch checkpoint: it does not begin as torch.save begins")
    info = pickled(_Machine())
    if not isinstance(info, dict) or info.get("little_endian") is not True:
        raise _Refused("was saved on a big-endian machine, which is not supported")
    machine = _Machine()
    value, keys = pickled(machine), pickled(_Machine())
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or sorted(keys) != sorted(machine.storages):
        raise _Refused("not a whole PyTorch checkpoint: its list of storages is not what its tensors ask for")
    f.seek(at)
    for key in keys:
        storage, count = machine.storages[key], int.from_bytes(f.read(8), "little")
        if count != storage.count:
            raise _Refused(f"storage {_show(key)} has {count} numbers, its tensors say {storage.count}")
        if storage.nbytes > total - f.tell():
            raise _Refused(f"not a whole PyTorch checkpoint: it ends inside storage {_show(key)}")
        storage.data = _numbers(f.read(storage.nbytes), storage.dtype)
    if f.tell() != total:
        raise _Refused(f"not a whole PyTorch checkpoint: {total - f.tell()} bytes follow its end")
    return _Plain(total).value(value)


def _opcodes(data: BinaryIO) -> Iterator[tuple[str, Any]]:
    ops = pickletools.genops(data)
    for _ in range(MAX_STEPS):
        try:
            op, argument, _ = next(ops)
        except StopIteration:
            return
        except (ValueError, OverflowError, AssertionError) as e:      # what its argument readers raise on damage
            raise _damaged(e) from None
        yield op.name, argument
    raise _Refused(f"has more than {MAX_STEPS} steps")


class _Machine:
    """The stack and memo that opcodes work on. Every value is plain data or one of this file's own small classes."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []                    # heights of the stack
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, data: bytes) -> tuple[Any, int]:
        """The value that the opcodes build, and how many bytes they take."""
        stream = io.BytesIO(data)
        for name, argument in _opcodes(stream):
            self.step(name, argument)
        if len(self.stack) != 1 or self.marks:
            raise _Refused("not a whole PyTorch checkpoint: its opcodes leave more or less than one value")
        return self.stack.pop(), stream.tell()

    def step(self, name: str, argument: Any) -> None:
        if name in ARGUMENT:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in TUPLES:
            self.stack.append(tuple(self.pop(TUPLES[name])))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise _Refused("not a whole PyTorch checkpoint: it uses a value it has not made")
            self.stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name == "TUPLE":
            self.stack.append(tuple(self.to_mark()))
        elif name in ("APPEND", "APPENDS"):
            self.extend(self.pop(1) if name == "APPEND" else self.to_mark())
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(self.pop(2) if name == "SETITEM" else self.to_mark())
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.stack.append(self.named(argument))
        elif name == "BINPERSID":
            self.stack.append(self.storage(*self.pop(1)))
        elif name == "REDUCE":
            self.stack.append(self.call(*self.pop(2)))
        elif name == "BUILD":
            self.build(*self.pop(1))
        elif name not in SILENT:
            asked = f" {_show(argument)}" if argument is not None else ""       # INST names what it would call
            raise _Refused(f"asks for {name}{asked}: refused; nothing was run")

    def pop(self, n: int) -> list[Any]:
        if len(self.stack) - n < (self.marks[-1] if self.marks else 0):
            raise _Refused("not a whole PyTorch checkpoint: an opcode lacks its values")
        taken = self.stack[-n:]
        del self.stack[-n:]
        return taken

    def top(self) -> Any:
        self.stack += (taken := self.pop(1))
        return taken[0]

    def to_mark(self) -> list[Any]:
        if not self.marks:
            raise _Refused("not a whole PyTorch checkpoint: an opcode lacks its mark")
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def extend(self, values: list[Any]) -> None:
        if type(target := self.top()) is not list:
            raise _Refused(f"appends to a {type(target).__name__}: refused; nothing was run")
        target += values

    def set_items(self, values: list[Any]) -> None:
        if not isinstance(target := self.top(), dict) or len(values) % 2:
            raise _Refused(f"sets items of a {type(target).__name__}: refused; nothing was run")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):           # hashing a nest of tuples can take forever
                raise _Refused(f"has a key that is a {type(key).__name__}, not a text or a whole number")
            if key in target:
                raise _Refused(f"has the key {_show(key)} twice")
            target[key] = value

    def named(self, argument: str | None) -> Any:
        module, name = self.pop(2) if argument is None else argument.split(" ", 1)
        full = f"{module}.{name}" if type(module) is type(name) is str else "a name that is no text"
        if full not in GLOBALS:
            raise _Refused(f"asks for {_show(full)[1:-1]}: refused; nothing was run")
        return GLOBALS[full]

    def storage(self, ident: Any) -> _Storage:
        """("storage", class, key, device, count), and in the older form a None: no view of another storage."""
        known = type(ident) is tuple and len(ident) in (5, 6) and ident[0] == "storage" and ident[5:] in ((), (None,))
        if not known or not isinstance(ident[1], _Global) or ident[1].dtype is None:
            raise _Refused("asks for an object that is not a storage of numbers: refused; nothing was run")
        _, cls, key, device, count = ident[:5]
        if not type(key) is type(device) is str or type(count) is not int or not 0 <= count <= MAX_SIZE:
            raise _Refused(f"storage {_show(key)} has the length {_show(count)}, which cannot be")
        made = self.storages.setdefault(key, _Storage(cls.dtype, count))
        if (made.dtype, made.count) != (cls.dtype, count):
            raise _Refused(f"storage {_show(key)} is asked for in two types or lengths")
        return made

    def call(self, target: Any, args: Any) -> Any:
        """The handful of constructions that a checkpoint needs, by our own code."""
        name, args = target.name if isinstance(target, _Global) else "", args if type(args) is tuple else (None,)
        if name == ORDERED and args == ():
            return _Ordered()
        if name == SIZE and len(args) == 1:
            return _sizes(args[0])
        if name == REBUILD and len(args) in (6, 7):
            return _view(args[:6], args[0].dtype if isinstance(args[0], _Storage) else None, args[6:])
        if name == REBUILD_DTYPE and len(args) in (7, 8):
            return _view(args[:6], args[6], args[7:])
        if name == PARAMETER and len(args) == 3 and isinstance(args[0], _View) and args[2] == {}:
            return args[0]
        raise _Refused(f"calls {_show(name or type(target).__name__)} in a way that torch.save does not: refused; nothing was run")

    def build(self, state: Any) -> None:
        """`state_dict()` carries its layers' versions as an attribute, which say nothing about the tensors."""
        if type(self.top()) is not _Ordered or type(state) is not dict or state.keys() != {"_metadata"}:
            raise _Refused(f"sets the state of a {type(self.top()).__name__}: refused; nothing was run")


class _Ordered(dict):
    """An OrderedDict of the file."""


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or not all(type(v) is int and 0 <= v <= MAX_SIZE for v in value) or len(value) > 32:
        raise _Refused("has a tensor whose sizes or strides are not a tuple of whole numbers from 0 up")
    return value


def _view(args: tuple, dtype: Any, metadata: tuple) -> _View:
    """(storage, offset, size, stride, requires_grad, hooks): checked against what the storage holds."""
    storage, offset, size, stride, grad, hooks = args
    if not isinstance(storage, _Storage) or not (isinstance(dtype, torch.dtype) and dtype in DTYPES) or type(grad) is not bool:
        raise _Refused("has a tensor without a storage or a type")
    if not isinstance(hooks, dict) or hooks or metadata not in ((), (None,)):
        raise _Refused("has a tensor with hooks or marks of its own: refused; nothing was run")
    _sizes((offset,))
    if len(_sizes(size)) != len(_sizes(stride)):
        raise _Refused(f"has a tensor with {len(size)} sizes and {len(stride)} strides")
    if storage.nbytes % dtype.itemsize or (dtype != storage.dtype and storage.dtype != torch.uint8):
        raise _Refused(f"has a tensor of {str(dtype)[6:]} in a storage of {storage.nbytes} bytes of {str(storage.dtype)[6:]}")
    count, wanted = storage.nbytes // dtype.itemsize, math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if wanted else offset
    if last > count or wanted > count or math.prod(max(n, 1) for n in size) > MAX_SIZE:
        raise _Refused(f"has a tensor of size {_show(size)} at {offset} with strides {_show(stride)}, "
                       f"which do not fit its storage of {count} numbers")
    return _View(storage, offset, size, stride, dtype)


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
            raise _Refused(f"is nested deeper than {MAX_DEPTH} levels, or in itself" if depth > MAX_DEPTH
                           else f"holds more than {MAX_VALUES} values")
        if isinstance(v, dict):
            return {key: self.value(inner, depth + 1) for key, inner in v.items()}
        if type(v) in (list, tuple):
            return type(v)([self.value(inner, depth + 1) for inner in v])
        if isinstance(v, _View):
            return self.tensor(v)
        if isinstance(v, (_Global, _Storage)):
            raise _Refused("holds a class or a storage where a value is expected")
        return v

    def tensor(self, v: _View) -> Tensor:
        self.room -= math.prod(v.size) * v.dtype.itemsize
        if self.room < 0:
            raise _Refused(f"its tensors would take more than {MAX_SHARING} times its own size")
        if id(v) not in self.made:
            flat = v.storage.data.view(v.dtype)
            self.made[id(v)] = flat.as_strided(v.size, v.stride, v.offset) if math.prod(v.size) else flat.new_empty(v.size)
        return self.made[id(v)]


def _show(value: Any) -> str:
    """A short printable form of a value from the file; only tuples of numbers are walked."""
    if type(value) is tuple and len(value) <= 32 and all(type(v) is int for v in value):
        return str(value)
    if value is None or type(value) in (float, bool) or type(value) is int and value.bit_length() <= 128:
        return repr(value)
    return ascii(value[:80]) if type(value) is str else f"a {type(value).__name__}"


def _damaged(e: Exception) -> _Refused:
    line = str(e).splitlines()[0] if str(e) else type(e).__name__
    return _Refused(f"not a whole PyTorch checkpoint: {ascii(line)[1:-1][:160]}")
