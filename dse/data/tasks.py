"""The task table.

A task is a line of the table: its files, the columns of the two texts and of the label, its labels in
the order of the logits, its kind and its metrics. Columns are numbers from 0, -1 being the last, or
names of the header. A user's own task is the same line in a JSON file (see the README).

    >>> task = get_task("MRPC")
    >>> task.kind, task.labels, task.text_a, task.text_b, task.label
    ('binary', ('0', '1'), 3, 4, 0)

This module knows neither torch nor tokenizers, so that bad data is refused before either is loaded.
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dse.system.errors import InputError
from dse.system.files import read_json

BINARY, MULTICLASS, REGRESSION = KINDS = ("binary", "multiclass", "regression")
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


DEFAULT_THRESHOLD = 0.5  # of the second label's probability, in binary tasks
SCORES = {BINARY: "f1", MULTICLASS: "accuracy", REGRESSION: "pearson"}  # what ranks checkpoints


def winning_threshold(metrics: dict[str, float]) -> float | None:
    """The threshold with the best f1, of equals the one nearest to 0.5; None for metrics without thresholds.

    >>> winning_threshold({"loss": 0.3, "f1_0.1": 0.9, "f1_0.4": 0.9, "f1_0.5": 0.8})
    0.4
    """
    found = {float(name.removeprefix("f1_")): f1 for name, f1 in metrics.items() if name.startswith("f1_")}
    return max(found, key=lambda threshold: (found[threshold], -abs(threshold - 0.5)), default=None)


def at_threshold(metrics: dict[str, Any], threshold: float | None = None) -> dict[str, Any]:
    """The metrics without those of all thresholds but one; None: the winning one.

    >>> at_threshold({"loss": 0.3, "accuracy_0.4": 0.7, "f1_0.4": 0.8, "accuracy_0.5": 0.6, "f1_0.5": 0.9})
    {'loss': 0.3, 'accuracy_0.5': 0.6, 'f1_0.5': 0.9}
    """
    kept = str(winning_threshold(metrics) if threshold is None else threshold)
    others = {name.removeprefix("f1_") for name in metrics if name.startswith("f1_")} - {kept}
    return {name: value for name, value in metrics.items() if name.rpartition("_")[2] not in others}
