"""Keep freed memory: on Linux with glibc, every large tensor otherwise comes and goes as fresh pages of the kernel."""
from __future__ import annotations

import ctypes
import platform

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
