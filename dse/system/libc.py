"""Every call of glibc and of the Linux kernel for which Python has no public function.

Each function says why it is there, what it gains, and what happens where the system lacks the call. Tests force that
public fallback with `monkeypatch.setattr(libc, "PRIVATE", False)`.
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


def _function(name: str) -> Callable[..., int] | None:
    """A function of the C library, or None where there is none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name) if PRIVATE else None
    except (OSError, AttributeError, TypeError):
        return None


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next tensor, and take no tensor's memory directly from the system.

    By default each big tensor's memory is mapped anew, and the kernel clears its pages as they are touched, which takes
    longer than most of what is computed on it. Without mallopt nothing changes but the speed.
    """
    if mallopt := _function("mallopt"):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 << 20)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step, so that a kill never leaves either name empty.

    False where the system cannot; two renames do it then.
    """
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    return bool(rename := _function("renameat2")) and rename(*names, _RENAME_EXCHANGE) == 0


def forget_peak_memory() -> None:
    """Give freed memory back and restart the count of `peak_memory`, so that it measures one piece of work.

    Where that cannot be done, the peak is the highest since the process started.
    """
    gc.collect()
    if malloc_trim := _function("malloc_trim"):
        malloc_trim(0)
    if PRIVATE:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Peak resident memory of the process since `forget_peak_memory`, in MiB; without /proc since its start."""
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
