"""The one reader of the tasks' TSV files. It uses neither torch nor tokenizers, so that bad data is refused early."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from dse.data.tasks import REGRESSION, TASKS, Task
from dse.system.errors import InputError
from dse.system.files import sha256_file
from dse.system.text_files import read_lines

logger = logging.getLogger(__name__)
_Columns = tuple[int | str | None, ...]  # numbers or names of the columns of text a, text b and the label
_HEADER_HINT = 'put the names of the columns there (or, in a task of your own, give "header": false)'


@dataclass
class Examples:
    """The rows of a split, in file order.

    `second` is None for single sentences. `labels` holds positions in `task.labels`, or scores for regression; None
    without labels. `files` says what was read: {"file": name below data_dir, "sha256": of its bytes}.
    """

    first: list[str] = field(default_factory=list)
    second: list[str] | None = None
    labels: list[Any] | None = None
    files: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.first)

    @property
    def sides(self) -> list[list[str]]:
        """The first texts and, of pairs, the second ones."""
        return [self.first] if self.second is None else [self.first, self.second]


def read_examples(task: Task, data_dir: str | Path, split: str) -> Examples:
    """Read a split in file order: "train", "dev", "test", or a prefix of the task's `also_validate`, such as "mm".

    `data_dir` is the folder of the task's files; for allnli the parent of SNLI and MNLI. In a user's own task, all rows
    must have as many cells as line 1. Raises InputError, naming file and line, for a missing or empty file, a row with
    too few columns, a wrong label or score, bytes that are not UTF-8, and a header that is a row of data.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise InputError(f"--data_dir: {data_dir} is not a folder; expected the folder of {task.name}'s files")
    name = dict(task.also_validate).get(split) or getattr(task, split)
    if name is None:
        raise InputError(f"--task_name: {task.name} has no {split} file, so it cannot be used here")
    if task.parts:  # one after the other
        whole: list[list[Any]] = [[], [], [], []]
        for part in (TASKS[name] for name in task.parts):
            rows = read_examples(part, data_dir / part.folder, split)
            files = [{**entry, "file": f"{part.folder}/{entry['file']}"} for entry in rows.files]
            columns_of_part: list[list[Any]] = [rows.first, rows.second or [], rows.labels or [], files]
            for column, more in zip(whole, columns_of_part, strict=True):
                column += more
        return Examples(*whole)
    columns: _Columns = (task.text_a, task.text_b, task.label)
    header, own = task.header, task.name not in TASKS
    if split == "test":
        text_a = task.text_a if task.test_text_a is None else task.test_text_a
        columns = text_a, task.text_b if task.test_text_b is None else task.test_text_b, task.test_label
        header = header or not own  # GLUE's test sets have one, CoLA's too
    rows = _read_tsv(data_dir / name, task, columns, header)
    if header and own and split != "train":
        _compare_headers(task, data_dir / (task.train or ""), data_dir / name, columns)
    return rows


def labelled_test(task: Task, data_dir: Path) -> Examples | None:
    """The test set with its labels, if they are at hand: SNLI's file has them, MRPC's are in Microsoft's file."""
    if task.test and task.test_label is not None and (data_dir / task.test).is_file():
        return read_examples(task, data_dir, "test")
    if task.name == "mrpc" and (data_dir / "msr_paraphrase_test.txt").is_file():  # in the layout of train.tsv
        with_labels = replace(task, also_validate=(("labelled_test", "msr_paraphrase_test.txt"),))
        return read_examples(with_labels, data_dir, "labelled_test")
    return None


def _read_tsv(path: Path, task: Task, columns: _Columns, header: bool) -> Examples:
    own = task.name not in TASKS
    lines = _without_blank_end(read_lines(path, f"the data of {task.name}"))
    if (line_1 := next(lines, None)) is None:
        raise InputError(f"{path}: is empty; expected one pair per line")
    names = line_1.split("\t")
    place_a, place_b, place_label = places = _find_columns(path, names, columns, own)
    if header and isinstance(columns[2], int):  # a column that is found by its name is in a header
        _check_header_label(task, path, names, place_label)
    used = [place for place in places if place is not None]
    # in GLUE's files, a last column must not be one of those before it
    needed = len(names) if own else max(used) + (2 if -1 in used else 1)
    first, second, labels = [], [], []
    skipped, uneven, text = 0, 0, ""
    for number, line in enumerate(lines if header else chain([line_1], lines), 2 if header else 1):
        cells = line.split("\t")
        if len(cells) < needed and task.skip_short_rows:
            skipped += 1
            continue
        if len(cells) < needed or (own and len(cells) > needed):
            expected = f"{needed} cells expected, as in line 1" if own else f"at least {needed} columns expected"
            hint = " (is a tab within a text, or is the column of row names not in the header?)" * (len(cells) > needed)
            raise InputError(f"{path}, line {number}: {expected}, found {len(cells)}{hint}: {line[:80]!r}")
        uneven += len(cells) != len(names)
        if cells[place_a] != text:  # NLI repeats its premises: one string serves all
            text = cells[place_a]
        first.append(text)
        if place_b is not None:
            second.append(cells[place_b])
        if place_label is not None:
            if (label := _label(task, cell := cells[place_label])) is None:
                wanted = f"one of {task.name}'s: {', '.join(task.labels)}" if task.labels else "a number"
                found = f"{'label' if task.labels else 'score'} {cell!r}"
                raise InputError(f"{path}, line {number}: {found} is not {wanted}")
            labels.append(label)
    if skipped:
        logger.info("%s: %d rows with fewer than %d columns skipped", path, skipped, needed)
    if not first:
        found = f"no row has the {needed} columns that {task.name} needs" if skipped else "has no rows of data"
        raise InputError(f"{path}: {found}; expected one pair per line")
    if uneven:
        logger.warning("%s: %d of %d rows have more or fewer cells than line 1, which has %d; columns are counted from "
                       "the left, and the last one from the right", path, uneven, len(first), len(names))  # fmt: skip
    about = {"file": path.name, "sha256": sha256_file(path)}
    rows = Examples(first, None if place_b is None else second, None if place_label is None else labels, [about])
    checked = header and own and not any(isinstance(column, str) for column in columns)  # names are found, or refused
    _check_texts(path, rows, [names[place] for place in places[:2] if checked and place is not None])
    return rows


def _without_blank_end(lines: Iterator[str]) -> Iterator[str]:
    """The lines except for blank ones at the end."""
    blank = 0
    for line in lines:
        if line:
            yield from repeat("", blank)
            yield line
        blank = 0 if line else blank + 1


def _check_header_label(task: Task, path: Path, names: list[str], place: int) -> None:
    """Refuse a header whose label cell is a label, since it must be a row of data; for GLUE's files, only warn."""
    name = names[place] if place < len(names) else ""
    if _label(task, name) is not None:
        what = "a number" if task.kind == REGRESSION else f"a label of {task.name}"
        why = f"{path}, line 1: a header is expected, but its label cell {name!r} is {what}; {_HEADER_HINT}"
        if task.name not in TASKS:
            raise InputError(why)
        logger.warning("%s", why)


def _check_texts(path: Path, rows: Examples, names: list[str]) -> None:
    """Warn of quoting; raise InputError where `names`, the cells of a header above the texts, are texts of rows too."""
    for name, texts in zip(names, rows.sides, strict=False):
        if name and name in texts:
            found = f"its cell {name!r} is also the text of a row"
            raise InputError(f"{path}, line 1: a header is expected, but {found}; {_HEADER_HINT}")
    quoted = sum(len(text) > 1 and text[0] == text[-1] == '"' for text in chain(*rows.sides))
    if quoted > 0.9 * len(rows.sides) * len(rows):
        logger.warning("%s: nearly all texts begin and end with a quotation mark, which counts as part of the text; "
                       "if the file was written with CSV quoting, write it again without", path)  # fmt: skip


def _compare_headers(task: Task, train: Path, other: Path, columns: _Columns) -> None:
    """Warn where the columns that are read have other names in `other` than in the train file."""
    try:
        ours, theirs = (next(read_lines(path, "the header"), "").split("\t") for path in (other, train))
    except InputError:  # where there is no train file
        return
    both = zip(columns, (task.text_a, task.text_b, task.label), strict=True)
    numbers = [(own, trained) for own, trained in both if isinstance(own, int) and isinstance(trained, int)]
    if any(ours[own : own + 1 or None] != theirs[trained : trained + 1 or None] for own, trained in numbers):
        logger.warning("%s, line 1: the header is %r, but in %s it is %r: does each file have a header, and are the "
                       "columns the same?", other, " | ".join(ours)[:200], train, " | ".join(theirs)[:200])  # fmt: skip


def _find_columns(path: Path, names: list[str], columns: _Columns, own: bool) -> list[Any]:
    """The numbers of the columns, None for one that is not there; names are looked up in the header.

    Those of a user's own task are checked, and count from the left: -1 is replaced.
    """
    places: list[Any] = []
    for column in columns:
        if isinstance(column, str):
            if names.count(column) != 1:
                often = f"{names.count(column)} columns" if column in names else "no column"
                raise InputError(f"{path}, line 1: {often} {column!r} in the header, which has {', '.join(names)}")
            column = names.index(column)
        if own and column is not None:
            if column >= len(names):
                raise InputError(f"{path}, line 1: column {column} (from 0) is needed, but there are only {len(names)}")
            column %= len(names)
            if column in places:
                raise InputError(f"{path}, line 1: column {column} (from 0) is used twice; each needs its own")
        places.append(column)
    return places


def _label(task: Task, text: str) -> int | float | None:
    """A label's place or, in a regression, the score; None for a text that is neither."""
    if task.kind != REGRESSION:
        return task.labels.index(text) if text in task.labels else None
    with contextlib.suppress(ValueError):
        if math.isfinite(score := float(text)):
            return score
    return None
