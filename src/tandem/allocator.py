"""How this process takes memory from the system: large pages, and freed memory kept; and how much it took at most."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_ONE_GIB, _NEVER, _ONE_HEAP = 2**30, -1, 1


def keep_memory() -> None:
    """Let large tensors reuse memory; called before torch allocates anything, without effect but on Linux.

    A step makes and frees tensors of the same sizes over and over. By default each of more than 32 MiB is a fresh
    mapping, and what a backward pass leaves free is given back, so the system zeroes and maps the same pages again in
    every step: a fifth of a small model's step (docs/decisions/0010-speed.md). Here tensors of up to 1 GiB come out of
    memory that is never given back, and torch asks for huge pages. All threads have one heap: by default what one of
    them frees is not there for another, and a process that trains with others held up to 1 GiB more, now and then. What
    the environment says stays as it is.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, variable, value in (
        (_M_MMAP_THRESHOLD, "MALLOC_MMAP_THRESHOLD_", _ONE_GIB),
        (_M_TRIM_THRESHOLD, "MALLOC_TRIM_THRESHOLD_", _NEVER),
        (_M_ARENA_MAX, "MALLOC_ARENA_MAX", _ONE_HEAP),
    ):
        if variable not in os.environ:
            mallopt(option, value)


def peak_memory() -> float:
    """The most bytes of main memory that this process has held.

    Linux's resource usage will not do: what a process starts with there is the peak of the one that started it.
    """
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
