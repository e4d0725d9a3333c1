"""Every call of glibc and of the Linux kernel for which Python has no public function.

Where the system lacks a call, a public fallback or nothing takes its place; tests force that by PRIVATE = False.
"""

import contextlib
import ctypes
import gc
import math
import os
from collections.abc import Callable
from pathlib import Path

PRIVATE = True  # use the calls of this module where the system has them
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # from Linux's fcntl.h and fs.h


def _function(name: str) -> Callable[..., int]:
    """A function of the C library; where there is none of that name, one that does nothing and fails."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        if PRIVATE:
            return getattr(ctypes.CDLL(None), name)
    return lambda *_: -1


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensor, and take no tensor's memory directly from the system.

    By default the system maps new memory for each big tensor, which takes longer than most computations on it.
    """
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
        _function("mallopt")(option, value)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that a kill never leaves either name empty. False if that is not possible."""
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return _function("renameat2")(*names, _RENAME_EXCHANGE) == 0


def forget_peak_memory() -> None:
    """Give freed memory back and restart the count of `peak_memory`, if possible."""
    gc.collect()
    _function("malloc_trim")(0)
    if PRIVATE:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Peak resident memory in MiB, since `forget_peak_memory` or, if that was not possible, since the start."""
    import resource  # Unix only

    peak = _from_status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if math.isnan(peak) else peak


def anonymous_memory() -> float:
    """The process's memory without mapped files, such as an index, in MiB; NaN without /proc."""
    return _from_status("RssAnon")


def _from_status(entry: str) -> float:
    """An entry of /proc/self/status, in MiB; NaN where there is none."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines() if PRIVATE else []
        return int(next(line for line in lines if line.startswith(entry)).split()[1]) / 1024
    return math.nan
