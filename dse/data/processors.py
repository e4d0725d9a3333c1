"""The one reader of the tasks' files. It uses neither torch nor tokenizers, so that bad data is refused early."""

import contextlib
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dse.data.tasks import DEFAULT_DEV_SHARE, REGRESSION, TASKS, Task
from dse.system.errors import InputError
from dse.system.files import sha256_file
from dse.system.text_files import Row, form_of, read_table

logger = logging.getLogger(__name__)
_Columns = tuple[int | str | None, ...]  # numbers or names of the columns of text a, text b and the label
NO_LABEL, NO_SCORE = -1, math.nan  # of rows of a user's own task whose label is empty
_USUAL_DEV, _ROWS_SHOWN = "dev.tsv", 50
_HEADER_HINT = 'put the names of the columns there (or, in a task of your own, give "header": false)'


@dataclass
class Examples:
    """The rows of a split, in file order.

    `second` is None for single sentences. `labels` holds positions in `task.labels`, or scores for regression; None
    without labels. Rows of a user's training file may lack theirs: NO_LABEL, or NO_SCORE. `files` says what was read:
    {"file": name below data_dir, "sha256": of its bytes}, and of which rows, if not of all. `places` are the numbers
    of the rows in the file, from 0; None: 0, 1, and so on.
    """

    first: list[str] = field(default_factory=list)
    second: list[str] | None = None
    labels: list[Any] | None = None
    files: list[dict[str, Any]] = field(default_factory=list)
    places: list[int] | None = None

    def __len__(self) -> int:
        return len(self.first)

    @property
    def sides(self) -> list[list[str]]:
        """The first texts and, of pairs, the second ones."""
        return [self.first] if self.second is None else [self.first, self.second]

    @property
    def labelled(self) -> np.ndarray:
        """Whether each row has a label, bool, (n,); without labels, of no row."""
        return np.zeros(len(self), bool) if self.labels is None else has_label(np.array(self.labels))

    def of_rows(self, rows: list[int], about: dict[str, Any]) -> "Examples":
        """The given rows alone; `about` is what `files` says of them."""
        first, second, labels = (
            column and [column[row] for row in rows] for column in (self.first, self.second, self.labels)
        )
        places = rows if self.places is None else [self.places[row] for row in rows]
        return Examples(first or [], second, labels, [{**entry, **about} for entry in self.files], places)


def split_files(task: Task) -> dict[str, str | None]:
    """The names of a task's files by split; a user's own task may have a dev file that it does not name."""
    dev = task.dev or (None if task.name in TASKS else _USUAL_DEV)
    return {"train": task.train, "dev": dev, "test": task.test, **dict(task.also_validate)}


def read_examples(task: Task, data_dir: str | Path, split: str) -> Examples:
    """Read a split in file order: "train", "dev", "test", or a prefix of the task's `also_validate`, such as "mm".

    `data_dir` is the folder of the task's files; for allnli the parent of SNLI and MNLI. In a user's own task, all rows
    must have as many cells as line 1; without a dev file, a share of train serves as dev. Raises InputError, naming
    file and line, for a missing or empty file, a row with too few columns, a wrong label or score, bytes that are not
    UTF-8, and a header that is a row of data.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise InputError(f"--data_dir: {data_dir} is not a folder; expected the folder of {task.name}'s files")
    own, name = task.name not in TASKS, split_files(task).get(split)
    if own and task.dev is None and split in ("train", "dev") and not (data_dir / _USUAL_DEV).is_file():
        return _without_dev_file(task, _read_file(task, data_dir, "train", str(task.train)), split)
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
    rows = _read_file(task, data_dir, split, name)
    return rows if not own or split in ("train", "test") else with_labels(rows)


def has_label(labels: Any) -> Any:
    """Whether each of an array's or a tensor's labels is one, and not NO_LABEL or NO_SCORE; bool, of the same shape."""
    return labels != NO_LABEL if "int" in str(labels.dtype) else labels == labels


def with_labels(examples: Examples) -> Examples:
    """The rows that have a label. Warns that the others are left out. Raises InputError if no row has one."""
    kept = np.flatnonzero(examples.labelled).tolist()
    if len(kept) == len(examples):
        return examples
    name = ", ".join(entry["file"] for entry in examples.files)
    if not kept:
        raise InputError(f"{name}: no row has a label; only a student with --distillation_coeff 1 needs none")
    logger.warning("%s: %d of %d rows have no label, and are left out", name, len(examples) - len(kept), len(examples))
    return examples.of_rows(kept, {"labelled": len(kept)})


def _dev_rows(task: Task, examples: Examples) -> list[int]:
    """The rows that serve as dev: about a share of the labelled pairs, of each label or tenth of the scores alike.

    Rows with the same first text stay together, so that none of dev's first texts was learned from. Where this would
    take too many rows, or part a pair from its reverse, only the rows of a pair and its reverse stay together. Hashes
    of the texts decide, so that the order of the file does not matter.
    """
    pairs, share = list(zip(*examples.sides, strict=True)), task.dev_share or DEFAULT_DEV_SHARE
    alike = ["\0".join(sorted(pair)) for pair in pairs]  # of a pair and its reverse
    dev = _rows_of_share(task, examples, share, [pair[0] for pair in pairs])
    train = sorted(set(range(len(pairs))) - set(dev))
    labels = examples.labels or []
    kept = task.kind == REGRESSION or {labels[row] for row in train} >= set(labels)
    parted = {alike[row] for row in train} & {alike[row] for row in dev}
    if not dev or not kept or parted or len(dev) > min(2 * share, (1 + share) / 2) * len(pairs):
        dev = _rows_of_share(task, examples, share, alike)
    return dev


def _rows_of_share(task: Task, examples: Examples, share: float, keys: list[str]) -> list[int]:
    """About a share of the labelled rows, of each stratum alike; rows with the same key all or none.

    Keys of which a row has no label are left out.
    """
    labels, known = examples.labels or [], examples.labelled
    partly = {key for key, has in zip(keys, known, strict=True) if not has}
    rows = [row for row, key in enumerate(keys) if key not in partly]
    strata: dict[Any, list[str]] = {}
    tenths = max(1, min(10, round(share * len(rows))))
    for place, row in enumerate(sorted(rows, key=lambda row: (labels[row], keys[row]))):
        strata.setdefault(tenths * place // len(rows) if task.kind == REGRESSION else labels[row], []).append(keys[row])
    chosen: set[str] = set()
    for of_stratum in strata.values():
        counts = Counter(of_stratum)
        wanted, some = max(1, round(share * len(of_stratum))), list[str]()
        for key in sorted(counts, key=lambda key: hashlib.sha256(key.encode()).digest()):
            if wanted <= 0:
                break
            some.append(key)
            wanted -= counts[key]
        if len(some) < len(counts):  # else there is nothing left to learn from
            chosen.update(some)
    return [row for row in rows if keys[row] in chosen]


def _without_dev_file(task: Task, examples: Examples, split: str) -> Examples:
    """Train or dev of a training file, a part of which serves as dev."""
    dev, name = _dev_rows(task, examples), examples.files[0]["file"]
    if split == "train":
        rest = sorted(set(range(len(examples))) - set(dev))
        logger.info("%s: %d of %d rows serve as dev, and are left out of train", name, len(dev), len(examples))
        return examples.of_rows(rest, {"without": dev})
    if not dev:
        raise InputError(f"{name}: too few labelled pairs to split a dev set off; give more, or a dev file")
    shown = ", ".join(map(str, dev[:_ROWS_SHOWN])) + ", ..." * (len(dev) > _ROWS_SHOWN)
    logger.info("%s: %d of %d rows serve as dev: %s (from 0)", name, len(dev), len(examples), shown)
    return examples.of_rows(dev, {"rows": dev})


def _read_file(task: Task, data_dir: Path, split: str, name: str) -> Examples:
    columns: _Columns = (task.text_a, task.text_b, task.label)
    header, own = task.header, task.name not in TASKS
    if split == "test":
        text_a = task.text_a if task.test_text_a is None else task.test_text_a
        columns = text_a, task.text_b if task.test_text_b is None else task.test_text_b, task.test_label
        header = header or not own  # GLUE's test sets have one, CoLA's too
    rows = _read_rows(data_dir / name, task, columns, header)
    if header and own and split != "train":
        _compare_headers(task, data_dir / (task.train or ""), data_dir / name, columns)
    return rows


def labelled_test(task: Task, data_dir: Path) -> Examples | None:
    """The test set with its labels, if they are at hand: SNLI's file has them, MRPC's are in Microsoft's file."""
    if task.test and task.test_label is not None and (data_dir / task.test).is_file():
        return with_labels(read_examples(task, data_dir, "test"))
    if task.name == "mrpc" and (data_dir / "msr_paraphrase_test.txt").is_file():  # in the layout of train.tsv
        line = replace(task, also_validate=(("labelled_test", "msr_paraphrase_test.txt"),))
        return read_examples(line, data_dir, "labelled_test")
    return None


def _read_rows(path: Path, task: Task, columns: _Columns, header: bool) -> Examples:
    own, header = task.name not in TASKS, header or form_of(path) == "jsonl"
    rows = read_table(path, f"the data of {task.name}")
    if (line_1 := next(rows, None)) is None:
        raise InputError(f"{path}: is empty; expected one pair per line")
    names = [str(name) for name in line_1[1]]
    places = _find_columns(path, names, columns, own)
    if header and isinstance(columns[2], int):  # a column that is found by its name is in a header
        _check_header_label(task, path, names, places[2])
    examples, uneven = _read_cells(path, task, rows if header else chain([line_1], rows), names, places)
    if uneven:
        what = (
            "%s: %d of %d rows have more or fewer cells than line 1, which has %d; columns are counted from the left, "
        )
        logger.warning(what + "and the last one from the right", path, uneven, len(examples), len(names))
    examples.files = [{"file": path.name, "sha256": sha256_file(path)}]
    checked = header and own and not any(isinstance(column, str) for column in columns)  # names are found, or refused
    _check_texts(path, examples, [names[place] for place in places[:2] if checked and place is not None])
    return examples


def _read_cells(
    path: Path, task: Task, rows: Iterable[Row], names: list[str], places: list[Any]
) -> tuple[Examples, int]:
    """The rows, without `files`, and how many have other numbers of cells than line 1, which has `names`."""
    width, own, used = len(names), task.name not in TASKS, [place for place in places if place is not None]
    # in GLUE's files, a last column must not be one of those before it
    needed = width if own else max(used) + (2 if -1 in used else 1)
    first, second, labels = list[str](), list[str](), list[Any]()
    kept, skipped, uneven, text = list[int](), 0, 0, ""
    for row, (number, cells) in enumerate(rows):
        if len(cells) < needed and task.skip_short_rows:
            skipped += 1
            continue
        kept.append(row)
        if len(cells) != needed and (own or len(cells) < needed):
            expected = f"{needed} cells expected, as in line 1" if own else f"at least {needed} columns expected"
            hint = " (is a tab within a text, or is the column of row names not in the header?)" * (len(cells) > needed)
            shown = "\t".join(map(str, cells))[:80]
            raise InputError(f"{path}, line {number}: {expected}, found {len(cells)}{hint}: {shown!r}")
        uneven += len(cells) != width
        texts = [cells[place] for place in places[:2] if place is not None]
        if own and places[2] is not None and not any(cells):  # with no label, it would be a row
            raise InputError(f"{path}, line {number}: all cells are empty; remove the line")
        if None in texts:
            raise InputError(
                f"{path}, line {number}: {names[places[texts.index(None)]]!r} is missing or null; expected a text"
            )
        if texts[0] != text:  # NLI repeats its premises: one string serves all
            text = texts[0]
        first.append(text)
        second += texts[1:]
        if places[2] is not None:
            labels.append(_known_label(path, number, task, cells[places[2]]))
    if skipped:
        logger.info("%s: %d rows with fewer than %d columns skipped", path, skipped, needed)
    if not first:
        found = f"no row has the {needed} columns that {task.name} needs" if skipped else "has no rows of data"
        raise InputError(f"{path}: {found}; expected one pair per line")
    sides = first, None if places[1] is None else second
    return Examples(*sides, None if places[2] is None else labels, places=kept if skipped else None), uneven


def _known_label(path: Path, number: int, task: Task, cell: str | None) -> int | float:
    """A label; NO_LABEL or NO_SCORE for an empty cell of a user's own task. Raises InputError for any other text."""
    if not cell and task.name not in TASKS and cell not in task.labels:
        return NO_SCORE if task.kind == REGRESSION else NO_LABEL
    if (label := _label(task, str(cell))) is None:
        wanted = f"one of {task.name}'s: {', '.join(task.labels)}" if task.labels else "a number"
        found = f"{'label' if task.labels else 'score'} {cell!r}"
        raise InputError(f"{path}, line {number}: {found} is not {wanted}")
    return label


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
        ours, theirs = (next(read_table(path, "the header"), (0, []))[1] for path in (other, train))
    except InputError:  # where there is no train file
        return
    both = zip(columns, (task.text_a, task.text_b, task.label), strict=True)
    numbers = [(own, trained) for own, trained in both if isinstance(own, int) and isinstance(trained, int)]
    if any(ours[own : own + 1 or None] != theirs[trained : trained + 1 or None] for own, trained in numbers):
        shown, in_train = (" | ".join(map(str, names))[:200] for names in (ours, theirs))
        logger.warning("%s, line 1: the header is %r, but in %s it is %r: does each file have a header, and are the "
                       "columns the same?", other, shown, train, in_train)  # fmt: skip


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


def read_pairs(path: Path, text_a: str, text_b: str, flag: str) -> list[tuple[str, str]]:
    """The pairs of a table with a header, by the names of their columns. Raises InputError for one without a text."""
    rows = read_table(path, "the pairs", flag)
    places = _find_columns(path, [str(name) for name in next(rows, (0, []))[1]], (text_a, text_b), own=True)
    pairs = []
    for number, cells in rows:
        texts = [cells[place] if place < len(cells) else None for place in places]
        if not all(texts):
            raise InputError(f"{path}, line {number}: {text_a!r} or {text_b!r} is empty; expected two texts")
        pairs.append((str(texts[0]), str(texts[1])))
    if not pairs:
        raise InputError(f"{path}: has no rows of data; expected one pair per line")
    return pairs


def column_of(path: Path, name: str, flag: str) -> list[str]:
    """A column of a table with a header, in file order. Raises InputError if it, or a cell of it, is not there."""
    rows = read_table(path, "the rows", flag)
    (place,) = _find_columns(path, [str(cell) for cell in next(rows, (0, []))[1]], (name,), own=True)
    found = []
    for number, cells in rows:
        if not (cell := cells[place] if place < len(cells) else None):
            raise InputError(f"{path}, line {number}: {name!r} is empty; give each row one, or leave {flag} out")
        found.append(cell)
    return found


def in_share(text: str, share: float) -> bool:
    """Is a text in the share of texts that serves as dev? Its hash says so."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < share * 2**64
