"""The two kinds of errors that users see, and any exception in one line; torch is not imported for it."""

import contextlib
import errno
import sys

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "Storage size calculation overflowed")


class InputError(Exception):
    """The user's input cannot be used. The message is one line: what is wrong, what was expected, how to mend it."""

    exit_code = 2


class RunError(Exception):
    """Work that began well cannot continue. The message is one line: what happened, what is safe, what to do."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    """An exception in one line: its class and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def lack_of_memory(error: BaseException) -> str | None:
    """What ran out of memory, where, and how much there is, in one line; None for an error that is another one."""
    known = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not known and not any(words in str(error) for words in _OUT_OF_MEMORY):
        return None
    told, free, _ = one_line(error).partition(" is free")  # torch adds how its own allocator stands
    told = told[:200] + free
    on_gpu = any(word in told.upper() for word in ("CUDA", "CUBLAS", "CUDNN"))
    if on_gpu and not free:
        with contextlib.suppress(Exception):  # a GPU that failed may not answer
            cuda = sys.modules["torch"].cuda
            left, total = (size / 2**30 for size in cuda.mem_get_info())
            told += f"; GPU {cuda.current_device()} has {total:.2f} GiB, of which {left:.2f} GiB is free"
    return told
