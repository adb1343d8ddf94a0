"""The process's memory: what it held at most, and the C library's allocator, told what training is like."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees for the next step, instead of giving it back and faulting every page in again.

    A step is 1.2 times as fast on a CPU (`tools/bench/malloc.py`). Elsewhere than on glibc nothing happens.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
    mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(_TOP_PAD, 256 << 20)


def peak_memory_bytes() -> int:
    """The most that this process has held resident, in bytes.

    On Linux from `VmHWM`, which starts anew with the program: `ru_maxrss` keeps what the parent held when it started
    us, so that a run below a large launcher would report the launcher's memory.
    """
    try:
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):  # macOS, or a /proc that says less; macOS counts in bytes
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
