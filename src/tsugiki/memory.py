"""The machine's memory: what is free, what an allocation that failed looks like, and an allocator that keeps what is freed."""
from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

MAPPED = 32 << 20             # bytes from which glibc maps and unmaps a tensor each time, whatever it learns
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4          # malloc.h


def keep_freed_memory() -> bool:
    """Ask glibc to reuse freed memory instead of giving it back; whether it was asked.

    Training allocates the same large tensors at every step. By default glibc maps and unmaps those of MAPPED bytes and more,
    which costs page faults. On batches of small, ever-changing shapes it gains nothing, so call it only where tensors are
    that large. benchmarks/malloc.py measures both loads, and tcmalloc beside them.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 256 << 20)])


def available(device: torch.device) -> int:
    """Bytes free on `device`; of a CPU's, what this process may use at most (its control group may have less than the machine)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_meminfo("MemAvailable")]
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        found += [_number(f"/sys/fs/cgroup/{limit}", 1 << 62) - _number(f"/sys/fs/cgroup/{used}", 0)]
    return max(0, min(found))


def _meminfo(key: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))
    except (OSError, StopIteration, ValueError):      # no Linux: half of what the machine has, or 4 GiB where none says
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 4 << 30


def _number(path: str, otherwise: int) -> int:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):                     # no such group, or "max"
        return otherwise


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory for a tensor."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text)


def allocator() -> str:
    """Which allocator a CPU's tensors come from, as far as can be told."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "the system's allocator"
    return next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in maps), "the system's allocator")
