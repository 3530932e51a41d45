"""How this process takes memory from the system: large pages, and freed memory kept for what comes next."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT = 2**30


def keep_memory() -> None:
    """Let large tensors reuse memory; called before torch allocates anything, without effect but on Linux.

    A step makes and frees tensors of the same sizes over and over. By default each of more than 32 MiB is a fresh
    mapping, whose pages the system zeroes and maps one by one as they are touched: a third of a step's time on a
    small model (docs/performance.md). Up to 1 GiB is kept for the next tensor instead, and torch asks for huge pages.
    What the environment says stays as it is.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, variable in (
        (_M_MMAP_THRESHOLD, "MALLOC_MMAP_THRESHOLD_"),
        (_M_TRIM_THRESHOLD, "MALLOC_TRIM_THRESHOLD_"),
    ):
        if variable not in os.environ:
            mallopt(option, _KEPT)
