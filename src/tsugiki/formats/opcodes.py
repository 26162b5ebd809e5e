"""A checkpoint's opcodes as data: a stack machine that knows the few a tensor needs, and refuses every other one.

`pickletools.genops` splits the bytes into opcodes and executes nothing. A global is a word of the table below, never an
import; what it stands for is built by this file's own code.
"""
from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

MAX_STEPS = 4_000_000                                 # opcodes; a tensor takes about 30
MAX_SIZE = 1 << 40                                    # one size, stride or offset

ORDERED, SIZE = "collections.OrderedDict", "torch.Size"
REBUILD, REBUILD_DTYPE, PARAMETER = (f"torch._utils._rebuild_{n}" for n in ("tensor_v2", "tensor_v3", "parameter"))
TYPED = {"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
         "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
         "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128}
DTYPES = {*TYPED.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2}


class Refused(Exception):
    """Why a file is not read, without its name."""


@dataclass(frozen=True)
class Global:
    """A name that a file may use, and what it stands for here."""
    name: str
    dtype: torch.dtype | None = None                  # of a storage's class


@dataclass
class Storage:
    """A run of numbers in the file; `data` is filled in when the opcodes are done."""
    dtype: torch.dtype
    count: int
    data: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A tensor to be: where in which storage."""
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


GLOBALS: dict[str, Global | torch.dtype] = {n: Global(n) for n in (ORDERED, SIZE, REBUILD, REBUILD_DTYPE, PARAMETER)}
GLOBALS |= {f"torch.{n}Storage": Global(n, dtype) for n, dtype in TYPED.items()}
GLOBALS |= {f"{m}.UntypedStorage": Global("Untyped", torch.uint8) for m in ("torch", "torch.storage")}
GLOBALS |= {str(dtype): dtype for dtype in DTYPES}

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
ARGUMENT = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}   # push their argument
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
SILENT = {"PROTO", "FRAME", "STOP"}


def _opcodes(data: BinaryIO) -> Iterator[tuple[str, Any]]:
    ops = pickletools.genops(data)
    for _ in range(MAX_STEPS):
        try:
            op, argument, _ = next(ops)
        except StopIteration:
            return
        except (ValueError, OverflowError, AssertionError) as e:      # what its argument readers raise on damage
            raise damaged(e) from None
        yield op.name, argument
    raise Refused(f"has more than {MAX_STEPS} steps")


class Machine:
    """The stack and memo that opcodes work on. Every value is plain data or one of this file's own small classes."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []                    # heights of the stack
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, data: bytes) -> tuple[Any, int]:
        """The value that the opcodes build, and how many bytes they take."""
        stream = io.BytesIO(data)
        for name, argument in _opcodes(stream):
            self.step(name, argument)
        if len(self.stack) != 1 or self.marks:
            raise Refused("not a whole PyTorch checkpoint: its opcodes leave more or less than one value")
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
                raise Refused("not a whole PyTorch checkpoint: it uses a value it has not made")
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
            asked = f" {show(argument)}" if argument is not None else ""       # INST names what it would call
            raise Refused(f"asks for {name}{asked}: refused; nothing was run")

    def pop(self, n: int) -> list[Any]:
        if len(self.stack) - n < (self.marks[-1] if self.marks else 0):
            raise Refused("not a whole PyTorch checkpoint: an opcode lacks its values")
        taken = self.stack[-n:]
        del self.stack[-n:]
        return taken

    def top(self) -> Any:
        self.stack += (taken := self.pop(1))
        return taken[0]

    def to_mark(self) -> list[Any]:
        if not self.marks:
            raise Refused("not a whole PyTorch checkpoint: an opcode lacks its mark")
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def extend(self, values: list[Any]) -> None:
        if type(target := self.top()) is not list:
            raise Refused(f"appends to a {type(target).__name__}: refused; nothing was run")
        target += values

    def set_items(self, values: list[Any]) -> None:
        if not isinstance(target := self.top(), dict) or len(values) % 2:
            raise Refused(f"sets items of a {type(target).__name__}: refused; nothing was run")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):           # hashing a nest of tuples can take forever
                raise Refused(f"has a key that is a {type(key).__name__}, not a text or a whole number")
            if key in target:
                raise Refused(f"has the key {show(key)} twice")
            target[key] = value

    def named(self, argument: str | None) -> Any:
        module, name = self.pop(2) if argument is None else argument.split(" ", 1)
        full = f"{module}.{name}" if type(module) is type(name) is str else "a name that is no text"
        if full not in GLOBALS:
            raise Refused(f"asks for {show(full)[1:-1]}: refused; nothing was run")
        return GLOBALS[full]

    def storage(self, ident: Any) -> Storage:
        """("storage", class, key, device, count), and in the older form a None: no view of another storage."""
        known = type(ident) is tuple and len(ident) in (5, 6) and ident[0] == "storage" and ident[5:] in ((), (None,))
        if not known or not isinstance(ident[1], Global) or ident[1].dtype is None:
            raise Refused("asks for an object that is not a storage of numbers: refused; nothing was run")
        _, cls, key, device, count = ident[:5]
        if not type(key) is type(device) is str or type(count) is not int or not 0 <= count <= MAX_SIZE:
            raise Refused(f"storage {show(key)} has the length {show(count)}, which cannot be")
        made = self.storages.setdefault(key, Storage(cls.dtype, count))
        if (made.dtype, made.count) != (cls.dtype, count):
            raise Refused(f"storage {show(key)} is asked for in two types or lengths")
        return made

    def call(self, target: Any, args: Any) -> Any:
        """The handful of constructions that a checkpoint needs, by our own code."""
        name, args = target.name if isinstance(target, Global) else "", args if type(args) is tuple else (None,)
        if name == ORDERED and args == ():
            return _Ordered()
        if name == SIZE and len(args) == 1:
            return _sizes(args[0])
        if name == REBUILD and len(args) in (6, 7):
            return _view(args[:6], args[0].dtype if isinstance(args[0], Storage) else None, args[6:])
        if name == REBUILD_DTYPE and len(args) in (7, 8):
            return _view(args[:6], args[6], args[7:])
        if name == PARAMETER and len(args) == 3 and isinstance(args[0], View) and args[2] == {}:
            return args[0]
        raise Refused(f"calls {show(name or type(target).__name__)} in a way that torch.save does not: refused; nothing was run")

    def build(self, state: Any) -> None:
        """`state_dict()` carries its layers' versions as an attribute, which say nothing about the tensors."""
        if type(self.top()) is not _Ordered or type(state) is not dict or state.keys() != {"_metadata"}:
            raise Refused(f"sets the state of a {type(self.top()).__name__}: refused; nothing was run")


class _Ordered(dict):
    """An OrderedDict of the file."""


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or not all(type(v) is int and 0 <= v <= MAX_SIZE for v in value) or len(value) > 32:
        raise Refused("has a tensor whose sizes or strides are not a tuple of whole numbers from 0 up")
    return value


def _view(args: tuple, dtype: Any, metadata: tuple) -> View:
    """(storage, offset, size, stride, requires_grad, hooks): checked against what the storage holds."""
    storage, offset, size, stride, grad, hooks = args
    if not isinstance(storage, Storage) or not (isinstance(dtype, torch.dtype) and dtype in DTYPES) or type(grad) is not bool:
        raise Refused("has a tensor without a storage or a type")
    if not isinstance(hooks, dict) or hooks or metadata not in ((), (None,)):
        raise Refused("has a tensor with hooks or marks of its own: refused; nothing was run")
    _sizes((offset,))
    if len(_sizes(size)) != len(_sizes(stride)):
        raise Refused(f"has a tensor with {len(size)} sizes and {len(stride)} strides")
    if storage.nbytes % dtype.itemsize or (dtype != storage.dtype and storage.dtype != torch.uint8):
        raise Refused(f"has a tensor of {str(dtype)[6:]} in a storage of {storage.nbytes} bytes of {str(storage.dtype)[6:]}")
    count, wanted = storage.nbytes // dtype.itemsize, math.prod(size)
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if wanted else offset
    if last > count or wanted > count or math.prod(max(n, 1) for n in size) > MAX_SIZE:
        raise Refused(f"has a tensor of size {show(size)} at {offset} with strides {show(stride)}, "
                       f"which do not fit its storage of {count} numbers")
    return View(storage, offset, size, stride, dtype)


def show(value: Any) -> str:
    """A short printable form of a value from the file; only tuples of numbers are walked."""
    if type(value) is tuple and len(value) <= 32 and all(type(v) is int for v in value):
        return str(value)
    if value is None or type(value) in (float, bool) or type(value) is int and value.bit_length() <= 128:
        return repr(value)
    return ascii(value[:80]) if type(value) is str else f"a {type(value).__name__}"


def damaged(e: Exception) -> Refused:
    line = str(e).splitlines()[0] if str(e) else type(e).__name__
    return Refused(f"not a whole PyTorch checkpoint: {ascii(line)[1:-1][:160]}")
