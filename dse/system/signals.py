"""Ctrl-C and SIGTERM, which end a run cleanly, and a lost console, which does not end it (`safe_console`).

Within `caught`, either signal raises Stopped at once, wherever the program is. Within `deferred`, which surrounds an
update of the weights or the writing of a state, it waits until the program calls `check`; a second Ctrl-C does not.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_LOST = (OSError, ValueError, AttributeError)  # a stream that cannot be written, is closed, or is None
_DEFAULT_ADVICE = "no file is half-written; run the same command to start again"
_received: int | None = None  # the signal that came
_holds = 0  # how many `deferred` blocks surround the program


class Stopped(KeyboardInterrupt):
    """A signal asked the program to end."""

    def __init__(self, number: int, anywhere: bool = False) -> None:
        super().__init__(number)
        self.number = number
        self.anywhere = anywhere  # was it raised within `deferred`, by a second Ctrl-C?
        self.advice = _DEFAULT_ADVICE

    def __str__(self) -> str:
        return f"stopped by {'Ctrl-C' if self.number == signal.SIGINT else signal.Signals(self.number).name}"

    @property
    def exit_code(self) -> int:
        """The code that a shell reports: 130 or 143."""
        return 128 + self.number


@contextlib.contextmanager
def advice(text: str) -> Iterator[None]:
    """Give the user this advice if the block is stopped, unless a block within it has given its own."""
    try:
        yield
    except Stopped as stop:
        if stop.advice == _DEFAULT_ADVICE:
            stop.advice = text
        raise


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise Stopped within the block; outside the main thread, do nothing."""
    global _received, _holds
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received, _holds = None, 0
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _received = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _received
    # torchrun passes the terminal's Ctrl-C on, though each process has had it already
    impatient = _received is not None and number == signal.SIGINT and "RANK" not in os.environ
    _received = number
    if impatient or not _holds:
        raise Stopped(number, anywhere=bool(_holds))
    if sys.__stderr__ is not None:  # else the number 2 may be another file's
        with contextlib.suppress(OSError):  # a console that is gone
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Make signals wait until `check`."""
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1


def requested() -> int | None:
    """The signal that is waiting, or None."""
    return _received


def check() -> None:
    """Raise Stopped if a signal waits and no `deferred` block surrounds the call."""
    if _received is not None and not _holds:
        raise Stopped(_received)


class _Console:
    """Standard error; a failure to write (a full device, a terminal or `| tee` that is gone) raises nothing."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(*_LOST):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(*_LOST):
            self._stream.flush()


@contextlib.contextmanager
def safe_console() -> Iterator[None]:
    """Keep writes to standard error from raising, in the block and when Python flushes the rest at its end."""
    stream = sys.stderr
    try:
        with contextlib.redirect_stderr(_Console(stream)):
            yield
    finally:
        flush_or_silence(stream)


def flush_or_silence(stream: Any) -> None:
    """Flush a standard stream; point it to /dev/null if that fails, or Python would fail when it exits."""
    try:
        stream.flush()
    except _LOST:
        with contextlib.suppress(*_LOST):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
