"""Compiled attention by document: documents.c, built once for this machine, where gcc is and the processor multiplies bfloat16.

Nothing needs it: attention.py computes the same without. TSUGIKI_NATIVE=off turns it off; TSUGIKI_CACHE is where what was built
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
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("documents.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")     # OpenMP: torch's own threads, by the library's name
LONGEST, WIDEST = 8192, 256                           # tokens of a document, numbers of a head: beyond, the cache is too small
CLOSE = 0.02                                          # of the plain twin, relatively, in bfloat16


def takes(query: Tensor, value: Tensor, lengths: Sequence[int], scale: float) -> bool:
    """Whether the compiled kernel computes this. query (tokens, H, D), value (tokens, K, D)."""
    return scale > 0 and query.dtype == value.dtype == torch.bfloat16 and query.device.type == "cpu" \
        and query.shape[2] == value.shape[2] <= WIDEST and max(lengths) <= LONGEST and library() is not None


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lengths: Sequence[int], scale: float) -> None:
    """Attention of documents into out. q, out (tokens, H, D), k, v (tokens, K, D), all bfloat16."""
    _run(library(), 0, (q, k, v, out), lengths, scale)


def backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, found: Sequence[Tensor], lengths: Sequence[int], scale: float) -> None:
    """Its gradients into `found`: those by q, k and v; grad is (tokens, H, D)."""
    _run(library(), 1, (q, k, v, grad, *found), lengths, scale)


def _run(lib: ctypes.CDLL, back: int, tensors: Sequence[Tensor], lengths: Sequence[int], scale: float) -> None:
    tensors = [t if t.stride(2) == 1 else t.contiguous() for t in tensors]
    at = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    strides = (ctypes.c_long * (2 * len(tensors)))(*(n for t in tensors for n in t.stride()[:2]))
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    heads, kv = tensors[0].shape[1], tensors[1].shape[1]
    failed = lib.documents_run(back, at, strides, (ctypes.c_long * len(starts))(*starts), len(lengths), kv, heads // kv,
                               tensors[0].shape[2], ctypes.c_float(scale), torch.get_num_threads())
    if failed:
        raise MemoryError("not enough memory for attention by document")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, built if it was not; None where it cannot be, or does not agree with plain products here."""
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
    return lib if lib.documents_init() and _agrees(lib) else None


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
    key = hashlib.sha256("\0".join((SOURCE.read_text(encoding="utf-8"), version, flags, *FLAGS)).encode()).hexdigest()[:24]
    name = f"documents-{key}.so"
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
            subprocess.run([gcc, *FLAGS, "-o", str(made), str(SOURCE), "-lm"], capture_output=True, timeout=120, check=True)
            os.replace(made, path)
        finally:
            made.unlink(missing_ok=True)
    return path


def _agrees(lib: ctypes.CDLL) -> bool:
    """Whether a small document, forward and backward, is as in float32."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(40, 2, 32, generator=g).bfloat16() for _ in range(4))
    made = [torch.empty_like(q) for _ in range(4)]
    _run(lib, 0, (q, k, v, made[0]), (40,), 0.2)
    _run(lib, 1, (q, k, v, grad, *made[1:]), (40,), 0.2)
    q, k, v, grad = (t.float().transpose(0, 1) for t in (q, k, v, grad))                      # (H, T, D)
    p = (q @ k.mT * 0.2).masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf")).softmax(-1)
    dp = grad @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * 0.2
    wanted = p @ v, ds @ k, ds.mT @ q, p.mT @ grad
    return all(bool((a.float().transpose(0, 1) - b).norm() <= CLOSE * b.norm()) for a, b in zip(made, wanted, strict=True))
