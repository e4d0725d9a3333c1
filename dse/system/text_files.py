"""Lines of UTF-8 files, of pipes and of standard input; texts that Python code passes."""

import codecs
import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dse.system.errors import InputError

logger = logging.getLogger(__name__)
_TEXTS = "the texts, a UTF-8 file with one per line, or - for standard input"


def read_lines(path: str | Path, what: str, keep_mark: bool = False, flag: str = "--data_dir") -> Iterator[str]:
    r"""The lines of a UTF-8 file, of a pipe or, for `-`, of standard input, without \n, \r\n or \r at their ends.

    Raises InputError, which names the file's role, `what`, and its `flag`. `keep_mark` keeps a byte-order mark.
    """
    name, number = (f"{flag}: standard input" if path == "-" else path), 0
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as stream:
            for raw in stream:
                if not (number or keep_mark):
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                for row in raw.splitlines():  # of bytes, which ends lines at these three alone
                    number += 1
                    yield row.decode()
    except OSError as error:
        raise InputError(f"{name}: cannot read {what} ({error.strerror}); see {flag}") from error
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x}"
        raise InputError(f"{name}, line {number}: byte {byte} is not valid UTF-8; save the text as UTF-8") from error


def check_texts(path: str, flag: str) -> None:
    """Raise InputError unless `path` is a pipe, `-` or a readable UTF-8 file, which is read once to find out."""
    if path != "-" and not (Path(path).is_fifo() or Path(path).is_char_device()):  # these can be read only once
        for _ in read_lines(path, _TEXTS, flag=flag):
            pass


def texts_of(path: str, flag: str) -> Iterator[str]:
    """The lines as `read_lines` gives them; empty ones too, with a warning."""
    empty = 0
    for line in read_lines(path, _TEXTS, flag=flag):
        empty += not line.strip()
        yield line
    if empty:
        logger.warning("%s: %d of the lines are empty; each counts as an empty text", flag, empty)


def elements(value: Any, what: str, of: str) -> Iterator[Any]:
    """The elements of a value in order. Raises TypeError, which names the value (`what`) and what is expected (`of`).

    Refused are strings, bytes, mappings, sets, tables (they give their columns' names), and whatever is not iterable.
    """
    refused = isinstance(value, str | bytes | bytearray | Mapping | set | frozenset) or hasattr(value, "columns")
    with contextlib.suppress(TypeError):  # of what cannot be iterated
        if not refused:
            return iter(value)
    raise TypeError(f"{what}: got {type(value).__name__}, expected {of}")


def checked_texts(texts: Iterable[Any], what: str) -> Iterator[str]:
    """The texts, one by one.

    Raises TypeError as `elements` does and for a text that is not a string; ValueError for one that UTF-8 cannot hold.
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
