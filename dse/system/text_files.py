"""Lines and tables of UTF-8 files, of pipes and of standard input; texts that Python code passes.

A table's form follows from its name: .csv (RFC 4180: commas, quotation marks around cells that need them), .jsonl (a
JSON object per line), and TSV without quoting for all other names. A name that ends in .gz is unpacked as it is read.
"""

import codecs
import contextlib
import csv
import gzip
import itertools
import json
import logging
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dse.system.errors import InputError

logger = logging.getLogger(__name__)
Row = tuple[int, list[str | None]]  # the number of its line, or of its last one, and its cells; None: a JSON null
_TEXTS = "the texts, a UTF-8 file with one per line, or - for standard input"


def read_lines(path: str | Path, what: str, keep_mark: bool = False, flag: str = "--data_dir") -> Iterator[str]:
    r"""The lines of a UTF-8 file, of a pipe or, for `-`, of standard input, without \n, \r\n or \r at their ends.

    Raises InputError, which names the file's role, `what`, and its `flag`. `keep_mark` keeps a byte-order mark.
    """
    name, number = (f"{flag}: standard input" if path == "-" else path), 0
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else _opened(path) as stream:
            for raw in stream:
                if not (number or keep_mark):
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                for row in raw.splitlines():  # of bytes, which ends lines at these three alone
                    number += 1
                    yield row.decode()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{name}: is not a whole gzip file; pack it again, or drop .gz from its name") from error
    except OSError as error:
        raise InputError(f"{name}: cannot read {what} ({error.strerror}); see {flag}") from error
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x}"
        raise InputError(f"{name}, line {number}: byte {byte} is not valid UTF-8; save the text as UTF-8") from error


def _opened(path: str | Path) -> Any:
    return gzip.open(path, "rb") if str(path).lower().endswith(".gz") else open(path, "rb")


def form_of(path: str | Path) -> str:
    """The form of a table: "csv", "jsonl" or "tsv".

    >>> [form_of(name) for name in ("pairs.CSV.gz", "pairs.jsonl", "pairs.ndjson", "pairs.txt")]
    ['csv', 'jsonl', 'jsonl', 'tsv']
    """
    ending = Path(str(path).lower().removesuffix(".gz")).suffix[1:]
    return {"csv": "csv", "jsonl": "jsonl", "ndjson": "jsonl"}.get(ending, "tsv")


def read_table(path: str | Path, what: str, flag: str = "--data_dir") -> Iterator[Row]:
    """The rows of a table, as `read_lines` gives its lines; the first one is its header, if it has one.

    JSON lines have one: the keys of the first object; the cells of each row are in their order, numbers and truth
    values as JSON writes them. Blank lines are left out, in TSV at the end alone. Raises InputError, with the line, for
    what is not CSV, or not JSON of that kind.
    """
    lines = read_lines(path, what, flag=flag)
    if (form := form_of(path)) == "tsv":
        for number, line in enumerate(_without_blank_end(lines), 1):
            yield number, [*line.split("\t")]
    else:
        yield from (_csv_rows if form == "csv" else _json_rows)(path, lines)


def _without_blank_end(lines: Iterator[str]) -> Iterator[str]:
    """The lines except for blank ones at the end."""
    blank = 0
    for line in lines:
        if line:
            yield from itertools.repeat("", blank)
            yield line
        blank = 0 if line else blank + 1


def _csv_rows(path: str | Path, lines: Iterator[str]) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # texts may be long
    rows = csv.reader((line + "\n" for line in lines), strict=True)
    try:
        for cells in rows:
            if cells:
                yield rows.line_num, [*cells]
    except csv.Error as error:
        mend = 'quote cells with commas or quotation marks, and write "" for a quotation mark in them'
        raise InputError(f"{path}, line {rows.line_num}: is not CSV ({error}); {mend}") from error


def _json_rows(path: str | Path, lines: Iterator[str]) -> Iterator[Row]:
    keys: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entries = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: is not JSON ({error}); expected an object per line") from error
        if not isinstance(entries, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object, found {line[:80]!r}")
        if not keys:
            keys = dict.fromkeys(entries)
            yield number, [*keys]
        yield number, [_json_cell(entries.get(key), f"{path}, line {number}: {key!r}") for key in keys]


def _json_cell(value: Any, place: str) -> str | None:
    if isinstance(value, dict | list):
        raise InputError(f"{place}: expected a string, a number, true, false or null, found {str(value)[:80]}")
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise InputError(f"{place}: half of a surrogate pair, which UTF-8 cannot hold: {value[:80]!a}")
    return value if value is None or isinstance(value, str) else json.dumps(value)


def tsv_line(values: Iterable[Any]) -> str:
    r"""Values as a line of TSV without quoting: None is empty, and tabs and ends of lines become spaces.

    >>> tsv_line([1, "a\tb", None])
    '1\ta b\t\n'
    """
    return "\t".join(re.sub(r"[\t\r\n]", " ", "" if value is None else str(value)) for value in values) + "\n"


def check_texts(path: str, flag: str, column: str | None = None, id_column: str | None = None) -> None:
    """Raise InputError unless `path` is a pipe, `-` or a file of texts, which is read once to find out."""
    if path != "-" and not (Path(path).is_fifo() or Path(path).is_char_device()):  # these can be read only once
        for _ in _columns(path, flag, column, id_column)[0]:
            pass


def texts_of(
    path: str, flag: str, column: str | None = None, id_column: str | None = None
) -> tuple[Iterator[str], Iterator[str] | None]:
    """The texts of a file, and their ids, if they have some.

    They are the lines as `read_lines` gives them, or columns of a table, if one is given or the file's name ends as
    that of a table; the usual columns are text and id. Empty texts count, with a warning.
    """
    if column is None and id_column is None and path.lower().removesuffix(".gz").endswith(".tsv"):
        logger.warning("%s: each line of %s is one text; a table needs --text_column", flag, path)
    cells, width = _columns(path, flag, column, id_column)
    if width == 1:
        return _warned_of((text for (text,) in cells), flag), None
    for_texts, for_ids = itertools.tee(cells)
    return _warned_of((text for text, _ in for_texts), flag), (own for _, own in for_ids)


def _columns(path: str, flag: str, column: str | None, id_column: str | None) -> tuple[Iterator[list[str]], int]:
    """The texts as `texts_of` finds them, each with its id if they have some, and how many cells that makes."""
    if column is None and id_column is None and form_of(path) == "tsv":
        return ([line] for line in read_lines(path, _TEXTS, flag=flag)), 1
    rows = read_table(path, _TEXTS, flag)
    names = next(rows, (0, list[str | None]()))[1]
    wanted = [column or "text", *([id_column or "id"] if id_column or "id" in names else [])]
    for name in wanted:
        if names.count(name) != 1:
            mend = "rename one, or for candidates give --text_column and --id_column"
            raise InputError(f"{flag}: {path} has no column {name!r}, or two: {', '.join(map(str, names))}; {mend}")
    return _cells_of(path, rows, [names.index(name) for name in wanted]), len(wanted)


def _cells_of(path: str, rows: Iterator[Row], places: list[int]) -> Iterator[list[str]]:
    for number, cells in rows:
        found = [cells[place] if place < len(cells) else None for place in places]
        if None in found:
            raise InputError(f"{path}, line {number}: a text or an id is missing")
        yield [str(cell) for cell in found]


def _warned_of(texts: Iterator[str], flag: str) -> Iterator[str]:
    """The texts as they come; after the last one, warns of empty ones."""
    empty = 0
    for text in texts:
        empty += not text.strip()
        yield text
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
