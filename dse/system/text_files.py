"""Lines of UTF-8 files, of standard input and of pipes."""

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dse.system.errors import InputError

logger = logging.getLogger(__name__)


def check_texts(path: str, flag: str) -> None:
    """Raise InputError unless `path` is a readable UTF-8 file, which is read once for that, or a pipe, or `-`."""
    if path != "-" and not Path(path).exists():
        raise InputError(f"{flag}: there is no file {path}; expected a UTF-8 file with a text per line, or -")
    if Path(path).is_dir():
        raise InputError(f"{flag}: {path} is a folder; expected a UTF-8 file with a text per line, or -")
    if Path(path).is_file():
        for _ in read_lines(Path(path), "the texts", flag=flag):
            pass


def texts_of(path: str, flag: str) -> Iterator[str]:
    """The lines of a UTF-8 file or, for `-`, of standard input, empty ones too, of which is warned.

    Raises InputError for what is no UTF-8.
    """
    lines = read_lines(Path(path), "the texts", flag=flag) if Path(path).is_file() else _lines_of_pipe(path, flag)
    empty = 0
    for line in lines:
        empty += not line.strip()
        yield line
    if empty:
        logger.warning("%s: %d of the lines are empty; each counts as an empty text", flag, empty)


def _lines_of_pipe(path: str, flag: str) -> Iterator[str]:
    """The lines of standard input or of a named pipe, which can be read but once."""
    number, what = 0, "standard input" if path == "-" else path
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as stream:
        for raw in stream:
            for row in raw.splitlines():
                number += 1
                try:
                    yield row.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise InputError(
                        f"{flag}: {what}, line {number}: byte 0x{row[error.start]:02x} is no valid UTF-8"
                    ) from error


def read_lines(path: Path, what: str, keep_mark: bool = False, flag: str = "--data_dir") -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; only \\n, \\r\\n and \\r end a line.

    Args:
        what: names the file's role in errors.
        keep_mark: keep a byte-order mark at the start, which is dropped otherwise.
        flag: the one that named the file or its folder.

    Raises InputError where it cannot be read or is no UTF-8.
    """
    read = 0
    try:
        # text mode ends lines at the three, whatever the platform
        with open(path, encoding="utf-8" if keep_mark else "utf-8-sig") as file:
            for line in file:
                yield line.removesuffix("\n")
                read += 1
    except OSError as error:
        raise InputError(f"{path}: cannot read {what} ({error.strerror}); see {flag}") from error
    except UnicodeDecodeError as error:
        raise _no_utf8(path, read) from error


def _no_utf8(path: Path, read: int) -> InputError:
    """The error for a file of which `read` lines could be read, and one of those after them not."""
    with open(path, "rb") as file:
        rows = (row for line in file for row in line.splitlines())
        for number, row in enumerate(rows, 1):
            if number > read:
                try:
                    row.decode("utf-8")
                except UnicodeDecodeError as error:
                    byte = row[error.start]
                    return InputError(
                        f"{path}, line {number}: byte 0x{byte:02x} is no valid UTF-8; save the file as UTF-8"
                    )
    return InputError(f"{path}: no valid UTF-8; save the file as UTF-8")


def elements(value: Any, what: str, of: str) -> Iterator[Any]:
    """The elements of `value`, if they are what a caller means, in the order that a caller means.

    A string would give its letters, bytes numbers, a mapping its keys, a table its columns' names, a set any order.

    Args:
        what: names the value in the error; of: what was expected.

    Raises TypeError for these, and for what cannot be iterated.
    """
    refused = isinstance(value, str | bytes | bytearray | Mapping | set | frozenset) or hasattr(value, "columns")
    try:
        if not refused:
            return iter(value)
    except TypeError:  # what cannot be iterated
        pass
    raise TypeError(f"{what}: got {type(value).__name__}, expected {of}")


def checked_texts(texts: Iterable[Any], what: str) -> Iterator[str]:
    """The texts, one by one. Raises TypeError as `elements` does and for what is not a string, ValueError for one that
    UTF-8 cannot hold.
    """
    for i, text in enumerate(elements(texts, what, "a list of strings")):
        if not isinstance(text, str):
            raise TypeError(f"{what}, number {i}: got {type(text).__name__}, expected a string")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{what}, number {i}: UTF-8 cannot hold it ({error.reason})") from error
        yield text
