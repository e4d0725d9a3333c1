"""The task table and the one reader of its TSV files.

A task is a line of the table: its files, the columns of the two texts and of the label, its labels in
the order of the logits, its kind and its metrics. Columns are numbers from 0, -1 being the last, or
names of the header. A user's own task is the same line in a JSON file (see the README).

    >>> task = get_task("MRPC")
    >>> task.kind, task.labels, task.text_a, task.text_b, task.label
    ('binary', ('0', '1'), 3, 4, 0)

This module knows neither torch nor tokenizers, so that bad data is refused before either is loaded.
"""

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from dse.files import InputError, read_json, sha256_file

logger = logging.getLogger(__name__)

BINARY, MULTICLASS, REGRESSION = KINDS = ("binary", "multiclass", "regression")
_HEADER_HINT = 'put the names of the columns there (in a task of your own, or give "header": false)'
NLI_LABELS = ("contradiction", "entailment", "neutral")
ENTAILMENT = "entailment"
DEFAULT_METRICS = {
    BINARY: ("acc", "f1", "acc_and_f1"),
    MULTICLASS: ("acc",),
    REGRESSION: ("pearson", "spearmanr", "corr"),
}


@dataclass(frozen=True)
class Task:
    """One line of the task table; the fields are also the keys of a user's JSON file."""

    name: str
    kind: str
    labels: tuple[str, ...] = ()  # in the order of the logits; empty for regression
    train: str | None = "train.tsv"
    dev: str | None = "dev.tsv"
    test: str | None = None
    text_a: int | str = 0
    text_b: int | str | None = None  # None: a single-sentence task
    label: int | str | None = -1
    header: bool = True  # do its files begin with a header line? (GLUE's test files always do)
    metrics: tuple[str, ...] = ()  # of fine-tuning; empty: the usual ones of the kind
    folder: str = ""  # GLUE's name of the data's folder
    test_text_a: int | str | None = None  # None: as text_a
    test_text_b: int | str | None = None  # None: as text_b
    test_label: int | str | None = None  # None: the test file has no labels
    also_validate: tuple[tuple[str, str], ...] = ()  # (prefix of the metrics, file), student only
    skip_short_rows: bool = False
    parts: tuple[str, ...] = ()  # made of these tasks, each in its folder below data_dir
    rank_label: str | None = None  # whose probability ranks candidates; None: the usual one (`ranked_label`)

    @property
    def num_logits(self) -> int:
        """Width of the teacher's logits."""
        return 1 if self.kind == REGRESSION else len(self.labels)

    @property
    def num_student_outputs(self) -> int:
        """Width of the student's outputs: a binary task has one."""
        return len(self.labels) if self.kind == MULTICLASS else 1


def _nli(name: str, folder: str, text_a: int, text_b: int, **others: Any) -> Task:
    return Task(name, MULTICLASS, NLI_LABELS, folder=folder, text_a=text_a, text_b=text_b, metrics=("acc",), **others)


_MATCHED = {"dev": "dev_matched.tsv", "test": "test_matched.tsv"}
_MISMATCHED = {"dev": "dev_mismatched.tsv", "test": "test_mismatched.tsv"}
_ENTAILED = ("entailment", "not_entailment")
_GLUE: dict[str, Any] = {"test": "test.tsv"}
_F1, _ACC = ("acc", "f1", "acc_and_f1"), ("acc",)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("mrpc", BINARY, ("0", "1"), folder="MRPC", text_a=3, text_b=4, label=0, metrics=_F1, **_GLUE),
        Task("qqp", BINARY, ("0", "1"), folder="QQP", text_a=3, text_b=4, label=5, metrics=_F1,
             test_text_a=1, test_text_b=2, skip_short_rows=True, **_GLUE),
        Task("qnli", BINARY, _ENTAILED, folder="QNLI", text_a=1, text_b=2, metrics=_ACC, **_GLUE),
        Task("rte", BINARY, _ENTAILED, folder="RTE", text_a=1, text_b=2, metrics=_ACC, **_GLUE),
        Task("wnli", BINARY, ("0", "1"), folder="WNLI", text_a=1, text_b=2, metrics=_ACC, **_GLUE),
        Task("sts-b", REGRESSION, folder="STS-B", text_a=7, text_b=8, metrics=DEFAULT_METRICS[REGRESSION], **_GLUE),
        _nli("mnli", "MNLI", 8, 9, also_validate=(("mm", _MISMATCHED["dev"]),), **_MATCHED),
        _nli("mnli-mm", "MNLI", 8, 9, **_MISMATCHED),
        _nli("snli", "SNLI", 7, 8, test_label=-1, also_validate=(("test", "test.tsv"),), **_GLUE),
        _nli("allnli", "", 0, 0, parts=("snli", "mnli")),
        _nli("diagnostic", "diagnostic", 1, 2, train=None, dev=None, test="diagnostic.tsv"),
        Task("cola", BINARY, ("0", "1"), folder="CoLA", text_a=3, label=1, header=False, test_text_a=1,
             metrics=("mcc",), **_GLUE),
        Task("sst-2", BINARY, ("0", "1"), folder="SST-2", text_a=0, label=1, test_text_a=1, metrics=_ACC, **_GLUE),
    )
}  # fmt: skip


@dataclass
class Examples:
    """The rows of a split, in file order.

    `labels` holds the label's place in `task.labels`, or the score for regression; None without labels.
    `files` tells what the rows were read from: {"file": name below data_dir, "sha256": of its bytes}.
    """

    first: list[str] = field(default_factory=list)
    second: list[str] | None = None
    labels: list[int] | list[float] | None = None
    files: list[dict[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.first)

    def extend(self, other: "Examples") -> None:
        """Append the rows of another split with the same columns."""
        self.first += other.first
        self.second = None if self.second is None else self.second + other.second
        self.labels = None if self.labels is None else self.labels + other.labels
        self.files += other.files


def get_task(name: str) -> Task:
    """The task of that name (any case), or of the JSON file at that path. Raises InputError."""
    if name.lower() in TASKS:
        return TASKS[name.lower()]
    if name.lower().endswith(".json"):
        return _task_from_json(Path(name))
    raise InputError(
        f"--task_name: unknown task {name!r}; known: {', '.join(TASKS)}, or a JSON file that describes your own"
    )


def ranked_label(task: Task, asked: str | None = None) -> str | None:
    """The label whose probability ranks candidates; None for a regression, whose score does.

    It is the one that is `asked` for, else the task's own, else `entailment`, else the second one of a binary task.
    Raises InputError for a label that the task does not have, and where nothing says which one it is.

    >>> [ranked_label(TASKS[name]) for name in ("mrpc", "rte", "snli", "sts-b")]
    ['1', 'entailment', 'entailment', None]
    """
    if task.kind == REGRESSION:
        if asked is not None:
            raise InputError(f"--rank_label: {task.name} is a regression, whose score ranks; leave it out")
        return None
    usual = ENTAILMENT if ENTAILMENT in task.labels else task.labels[1] if task.kind == BINARY else None
    label = asked if asked is not None else task.rank_label if task.rank_label is not None else usual
    if label is None:
        raise InputError(
            f"--rank_label: nothing says which label of {task.name} ranks candidates: give one of "
            f'{", ".join(task.labels)}, or name it in the task\'s JSON ("rank_label")'
        )
    if label not in task.labels:
        raise InputError(f"--rank_label: {label!r} is not a label of {task.name}: give one of {', '.join(task.labels)}")
    return label


def task_to_dict(task: Task, ranks: bool = False) -> dict[str, Any]:
    """The task's line as JSON values, for files that must know which task they belong to.

    Args:
        ranks: the rank label too, which decides how a student is used, and nothing that is read or learned.
    """
    line = asdict(task)
    if not ranks or task.rank_label is None:
        del line["rank_label"]
    line["also_validate"] = [list(pair) for pair in task.also_validate]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in line.items()}


def task_from_dict(line: dict[str, Any]) -> Task:
    """The task that `task_to_dict` wrote. Raises TypeError for other entries."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in line.items()}
    return Task(**{**values, "also_validate": tuple(tuple(pair) for pair in values.get("also_validate", ()))})


def check_sentence_pairs(task: Task) -> None:
    """Raise InputError for a task that a Siamese student cannot learn."""
    if task.text_b is None:
        raise InputError(
            f"--task_name: {task.name} has one sentence per row, and DSE scores pairs: "
            "only finetune_bert.py (the teacher) takes it"
        )


_COLUMN = (int, str)
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,), "kind": (str,), "labels": (list,), "train": (str,), "dev": (str,), "test": (str, type(None)),
    "text_a": _COLUMN, "text_b": (*_COLUMN, type(None)), "label": _COLUMN, "header": (bool,), "metrics": (list,),
    "test_text_a": (*_COLUMN, type(None)), "test_text_b": (*_COLUMN, type(None)),
    "test_label": (*_COLUMN, type(None)), "skip_short_rows": (bool,), "rank_label": (str, int, type(None)),
}  # fmt: skip


def _task_from_json(path: Path) -> Task:
    line = {"name": path.stem, **read_json(path, "the task description")}
    for key, value in line.items():
        if key not in _JSON_TYPES:
            raise InputError(f"{path}: unknown key {key!r}; known: {', '.join(_JSON_TYPES)}")
        if not isinstance(value, _JSON_TYPES[key]) or (isinstance(value, bool) and bool not in _JSON_TYPES[key]):
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in _JSON_TYPES[key])
            raise InputError(f"{path}: {key!r} must be {expected}, found {value!r}")
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise InputError(f"{path}: {key!r} has a character that no file can have: {value!r}")
    missing = [key for key in ("kind", "text_a", "label") if key not in line]
    if missing:
        raise InputError(f"{path}: {', '.join(missing)} missing; a task needs kind, text_a, label and text_b for pairs")
    for key, types, what in (("labels", (str, int), "strings or whole numbers"), ("metrics", (str,), "strings")):
        if not all(isinstance(entry, types) and not isinstance(entry, bool) for entry in line.get(key, ())):
            raise InputError(f"{path}: {key!r} must be a list of {what}, found {line[key]!r}")
        line[key] = tuple(map(str, line.get(key, ())))
    if line.get("rank_label") is not None:
        line["rank_label"] = str(line["rank_label"])
    task = Task(**line)
    _check_own_task(path, task)
    return task if task.metrics else replace(task, metrics=DEFAULT_METRICS[task.kind])


def _check_own_task(path: Path, task: Task) -> None:
    if task.kind not in KINDS:
        raise InputError(f"{path}: kind {task.kind!r} is none of {', '.join(KINDS)}")
    count, least = len(set(task.labels)), {BINARY: 2, MULTICLASS: 2, REGRESSION: 0}[task.kind]
    if count != len(task.labels) or count < least or (task.kind != MULTICLASS and count > least):
        wanted = {BINARY: "two labels, the negative first", MULTICLASS: "two or more labels", REGRESSION: "no labels"}
        raise InputError(f"{path}: a {task.kind} task needs {wanted[task.kind]}, found {list(task.labels)}")
    if task.rank_label is not None and task.rank_label not in task.labels:
        raise InputError(f"{path}: rank_label {task.rank_label!r} is not one of the labels {list(task.labels)}")
    known = (*DEFAULT_METRICS[task.kind], "mcc") if task.kind == BINARY else DEFAULT_METRICS[task.kind]
    if not set(task.metrics) <= set(known):
        raise InputError(f"{path}: metrics {list(task.metrics)}: a {task.kind} task knows {', '.join(known)}")
    if not re.fullmatch(r"[\w.-]+", task.name) or task.name.lower() in TASKS:
        raise InputError(f"{path}: name {task.name!r} must be letters, digits, '_', '.', '-' and no name of the table")
    columns = [getattr(task, key) for key, types in _JSON_TYPES.items() if int in types and key != "rank_label"]
    if not task.header and any(isinstance(column, str) for column in columns):
        raise InputError(f'{path}: columns by name need a header line; give numbers from 0, or "header": true')
    if any(isinstance(column, int) and column < -1 for column in columns):
        raise InputError(f"{path}: column numbers start at 0, and -1 is the last; found {columns}")


def read_examples(task: Task, data_dir: str | Path, split: str) -> Examples:
    """Read a split in file order.

    Args:
        task: a line of the task table.
        data_dir: the folder of the task's files; for allnli the parent of SNLI and MNLI.
        split: "train", "dev", "test", or a prefix of the task's `also_validate`, such as "mm".

    A blank line at the end is not a row. The rows of an own task have as many cells as its header (without a header:
    as the first row); those of GLUE's files need not, which is warned of.

    Raises InputError, naming file and line, for a missing or empty file, a row with too few columns (an own task's:
    with more, too), a label that is none of the task's, a score that is no number, bytes that are no UTF-8, and a
    header that is a row of data.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise InputError(f"--data_dir: {data_dir} is no folder; expected the folder of {task.name}'s files")
    if task.parts:
        return _read_parts(task, data_dir, split)
    name = dict(task.also_validate).get(split) or getattr(task, split)
    if name is None:
        raise InputError(f"--task_name: {task.name} has no {split} file, so it cannot be used here")
    if split == "test":
        text_a, text_b = (
            own if test is None else test
            for test, own in ((task.test_text_a, task.text_a), (task.test_text_b, task.text_b))
        )
        columns = text_a, text_b, task.test_label
        header = task.header or task.name in TASKS  # GLUE's test sets have one, CoLA's too
    else:
        columns, header = (task.text_a, task.text_b, task.label), task.header
    rows = _read_tsv(data_dir / name, task, columns, header)
    if header and task.name not in TASKS and split != "train":
        _compare_headers(task, data_dir / task.train, data_dir / name, columns)
    return rows


def labelled_test(task: Task, data_dir: Path) -> Examples | None:
    """The test set with its labels, where they are at hand: SNLI's file has them, MRPC's are in Microsoft's file."""
    if task.test_label is not None and (data_dir / task.test).is_file():
        return read_examples(task, data_dir, "test")
    if task.name == "mrpc" and (data_dir / "msr_paraphrase_test.txt").is_file():  # in the layout of train.tsv
        with_labels = replace(task, also_validate=(("labelled_test", "msr_paraphrase_test.txt"),))
        return read_examples(with_labels, data_dir, "labelled_test")
    return None


def _read_parts(task: Task, data_dir: Path, split: str) -> Examples:
    """allnli: the corpora one after the other."""
    if split not in ("train", "dev"):
        raise InputError(f"--task_name: {task.name} has no {split} file, so it cannot be used here")
    whole = Examples(second=[], labels=[])
    for part in (TASKS[name] for name in task.parts):
        rows = read_examples(part, data_dir / part.folder, split)
        for entry in rows.files:
            entry["file"] = f"{part.folder}/{entry['file']}"
        whole.extend(rows)
    return whole


def _read_tsv(path: Path, task: Task, columns: tuple[int | str | None, ...], header: bool) -> Examples:
    """The rows of a file, of which `columns` holds the places or names of text a, text b and the label."""
    own = task.name not in TASKS
    lines = _without_blank_end(read_lines(path, f"the data of {task.name}"))
    first = next(lines, None)
    if first is None:
        raise InputError(f"{path}: no rows of data in it, nor a header; expected one pair per line")
    names = first.split("\t")
    place_a, place_b, place_label = places = _find_columns(path, names, columns, own)
    if header and isinstance(columns[2], int):  # a column that is found by its name is in a header
        _check_header_label(task, path, names, place_label)
    used = [place for place in places if place is not None]
    numbered = own and not any(isinstance(column, str) for column in columns)  # by a name, a header is sure to be one
    # in GLUE's files, a last column must be one of its own
    needed = len(names) if own else max(used) + (2 if -1 in used else 1)
    rows = Examples(second=None if place_b is None else [], labels=None if place_label is None else [])
    skipped, uneven, text = 0, 0, ""
    for number, line in enumerate(lines if header else chain([first], lines), 2 if header else 1):
        cells = line.split("\t")
        if len(cells) != len(names) or len(cells) < needed:
            if len(cells) < needed and task.skip_short_rows:
                skipped += 1
                continue
            if own or len(cells) < needed:
                raise _wrong_count(path, number, line, needed, exact=own)
            uneven += 1
        if cells[place_a] != text:  # NLI repeats its premises: one string serves all
            text = cells[place_a]
        rows.first.append(text)
        if place_b is not None:
            rows.second.append(cells[place_b])
        if place_label is not None:
            rows.labels.append(_parse_label(task, cells[place_label], path, number))
    if not len(rows) and not skipped:
        raise InputError(f"{path}: no rows of data in it; expected one pair per line")
    if skipped:
        logger.info("%s: %d rows with fewer than %d columns skipped", path, skipped, needed)
    if not len(rows):
        raise InputError(f"{path}: no row has the {needed} columns that {task.name} needs")
    if uneven:
        logger.warning("%s: %d of %d rows have more or fewer cells than line 1, which has %d; columns are counted from "
                       "the left (the last: from the right)", path, uneven, len(rows), len(names))  # fmt: skip
    _check_texts(path, rows, [names[place] for place in places[:2] if place is not None] if header and numbered else [])
    rows.files = [{"file": path.name, "sha256": sha256_file(path)}]
    return rows


def _without_blank_end(lines: Iterator[str]) -> Iterator[str]:
    """The lines but for blank ones at the end."""
    blank = 0
    for line in lines:
        if line:
            yield from repeat("", blank)
            yield line
            blank = 0
        else:
            blank += 1


def _wrong_count(path: Path, number: int, line: str, needed: int, exact: bool) -> InputError:
    found = line.count("\t") + 1
    expected = f"{needed} cells expected, as in line 1," if exact else f"at least {needed} columns expected,"
    hint = " (is a tab within a text, or does the header lack a name for row names?)" if found > needed else ""
    return InputError(f"{path}, line {number}: {expected} found {found}{hint}: {line[:80]!r}")


def _check_header_label(task: Task, path: Path, names: list[str], place: int) -> None:
    """Refuse a header that is a row of data by its label; of GLUE's files, warn of it."""
    name = names[place] if place < len(names) else ""
    if name in task.labels or (task.kind == REGRESSION and math.isfinite(_number(name))):
        what = "a number" if task.kind == REGRESSION else f"a label of {task.name}"
        why = f"{path}, line 1: a header is expected, but its label cell {name!r} is {what}; {_HEADER_HINT}"
        if task.name not in TASKS:
            raise InputError(why)
        logger.warning("%s", why)


def _check_texts(path: Path, rows: Examples, names: list[str]) -> None:
    """Warn of quoting; raise InputError where `names`, the texts' cells of a header, are texts of rows too."""
    columns = [rows.first] if rows.second is None else [rows.first, rows.second]
    for name, texts in zip(names, columns, strict=False):
        if name and name in texts:
            raise InputError(
                f"{path}, line 1: a header is expected, but its cell {name!r} is a text of a row too; {_HEADER_HINT}"
            )
    texts = chain.from_iterable(columns)
    quoted = sum(len(text) > 1 and text[0] == text[-1] == '"' for text in texts)
    if quoted > 0.9 * len(columns) * len(rows):
        logger.warning("%s: nearly all texts begin and end with a quotation mark, which counts as part of the text; "
                       "if the file was written with CSV quoting, write it again without", path)  # fmt: skip


def _compare_headers(task: Task, train: Path, other: Path, columns: tuple[int | str | None, ...]) -> None:
    """Warn where the columns that are read have other names in `other` than in the train file."""
    try:
        ours, theirs = (next(read_lines(path, "the header"), "").split("\t") for path in (other, train))
    except InputError:  # no train file, say
        return

    both = zip(columns, (task.text_a, task.text_b, task.label), strict=True)
    numbers = [pair for pair in both if all(isinstance(column, int) for column in pair)]  # names are found, or refused
    if any(ours[own : own + 1 or None] != theirs[trained : trained + 1 or None] for own, trained in numbers):
        logger.warning("%s, line 1: the header %r, and %s has %r: does each file have a header, and are the columns "
                       "the same?", other, " | ".join(ours)[:200], train, " | ".join(theirs)[:200])  # fmt: skip


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


def _find_columns(path: Path, names: list[str], columns: tuple[int | str | None, ...], own: bool) -> list[int | None]:
    """Numbers of the columns; names are looked up in the header. Those of an own task are checked, and -1 replaced."""
    places: list[int | None] = []
    for column in columns:
        if isinstance(column, str):
            if names.count(column) != 1:
                often = f"{names.count(column)} columns" if column in names else "no column"
                raise InputError(f"{path}, line 1: {often} {column!r} in the header, which has {', '.join(names)}")
            column = names.index(column)
        elif own and column is not None:
            if column >= len(names):
                raise InputError(f"{path}, line 1: column {column} (from 0) is needed, but only {len(names)} are there")
            column = column % len(names)  # -1 is the last
        if own and column is not None and column in places:
            raise InputError(f"{path}, line 1: column {column} (from 0) serves twice; text_a, text_b and label differ")
        places.append(column)
    return places


def _parse_label(task: Task, text: str, path: Path, number: int) -> int | float:
    if task.kind != REGRESSION:
        if text not in task.labels:
            raise InputError(
                f"{path}, line {number}: label {text!r} is none of {task.name}'s: {', '.join(task.labels)}"
            )
        return task.labels.index(text)
    score = _number(text)
    if not math.isfinite(score):
        raise InputError(f"{path}, line {number}: score {text!r} is no number")
    return score


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
