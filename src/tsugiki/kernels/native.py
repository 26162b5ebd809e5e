"""The C sources beside this file, built once for this machine into one library, where gcc is and the processor multiplies bfloat16.

Nothing needs it: who uses it computes the same without. TSUGIKI_NATIVE=off turns it off; TSUGIKI_CACHE is where what was built
is kept (default: the user's cache folder).
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FOLDER = Path(__file__).parent
SOURCES = ("documents.c", "low_rank.c", "passes.c", "rows.c", "layer.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")     # OpenMP: torch's own threads, by the library's name
CLOSE = 0.02                                          # how near to its plain twin a kernel must be in bfloat16, relatively


def run(name: str, *args: Any) -> int:
    """Call a kernel; tensors go as addresses. With tensors that have no numbers (a rehearsal's) nothing is to be done."""
    numbers = [a.data_ptr() if isinstance(a, Tensor) and not isinstance(a, FakeTensor) else a for a in args]
    if any(isinstance(a, FakeTensor) for a in numbers):
        return 0
    return (_kernels.get(name) or _kernel(name, args))(*numbers)


_kernels: dict[str, Callable[..., int]] = {}


def _kernel(name: str, args: Sequence[Any]) -> Callable[..., int]:
    """The function, which takes numbers of the kinds of these in every call; a tensor, None or an array is an address."""
    kernel = getattr(library(), name)
    kinds = ((float, ctypes.c_float), (int, ctypes.c_long), (object, ctypes.c_void_p))
    kernel.argtypes = [next(c for kind, c in kinds if isinstance(a, kind)) for a in args]
    return _kernels.setdefault(name, kernel)


def close(made: Tensor, wanted: Tensor, within: float | None = None) -> bool:
    return bool((made.float() - wanted.float()).norm() <= (within or CLOSE) * wanted.float().norm())


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built if they were not; None where they cannot be."""
    gcc = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("gcc")
    if os.environ.get("TSUGIKI_NATIVE") == "off" or platform.system() != "Linux" or gcc is None:
        return None
    flags = processor()
    if not {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"} <= set(flags.split()):
        return None
    try:
        lib = _loaded(gcc, flags)
    except (OSError, subprocess.SubprocessError):
        return None
    return lib if lib.documents_init() else None


def processor() -> str:
    """The names of what this machine's processor can do."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return next((line.partition(":")[2] for line in f if line.startswith("flags")), "")
    except OSError:
        return ""


def _loaded(gcc: str, flags: str) -> ctypes.CDLL:
    """The library of this source, compiler and processor: the kept one, else a new one; for this process alone where none can be
    kept."""
    version = subprocess.run([gcc, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    texts = [p.read_text(encoding="utf-8") for p in sorted(FOLDER.glob("*.[ch]"))]
    key = hashlib.sha256("\0".join((*texts, version, flags, *FLAGS)).encode()).hexdigest()[:24]
    name = f"kernels-{key}.so"
    try:
        return ctypes.CDLL(str(_build(gcc, _kept() / name)))
    except OSError:
        with tempfile.TemporaryDirectory(prefix="tsugiki-") as folder:
            return ctypes.CDLL(str(_build(gcc, Path(folder) / name)))         # it stays loaded without its file


def _kept() -> Path:
    """The cache folder. Raises OSError if others can write there."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(os.environ.get("TSUGIKI_CACHE") or Path(home) / "tsugiki")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = path.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        raise OSError(f"{path} can be written by others")
    return path


def _build(gcc: str, path: Path) -> Path:
    """The file, built if it is not there; a new one appears whole or not at all."""
    if not path.exists():
        made = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            subprocess.run([gcc, *FLAGS, "-o", str(made), *(str(FOLDER / name) for name in SOURCES), "-lm"], capture_output=True,
                           timeout=120, check=True)
            os.replace(made, path)
        finally:
            made.unlink(missing_ok=True)
    return path

