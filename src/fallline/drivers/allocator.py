"""glibc's memory allocator, which serves torch on a CPU.

It keeps what is freed for what comes next, and between blocks of many sizes and ages gaps are left: a run may take
twice the memory of its tensors. Told to give back every block of `LARGE` bytes and more as soon as it is freed, it
takes what its tensors take, but each new block costs page faults: see docs/plan.md for both. Elsewhere than on Linux
with glibc nothing happens here.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

LARGE = 1 << 16
M_MMAP_THRESHOLD = -3


def thrift() -> bool:
    """From now on give large blocks back at once; whether the allocator can."""
    with suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE))
    return False


def trim() -> None:
    """Give back what is free now."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
