"""The task table.

A column is a number from 0, -1 being the last, or a name in the header. A user's own task has the same entries in a
JSON file. This module uses neither torch nor tokenizers, so that bad data is refused before either is loaded.

    >>> task = get_task("MRPC")
    >>> task.kind, task.labels, task.text_a, task.text_b, task.label
    ('binary', ('0', '1'), 3, 4, 0)
"""

import contextlib
import json
import logging
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dse.system.errors import InputError
from dse.system.files import read_json
from dse.system.text_files import read_table

logger = logging.getLogger(__name__)
BINARY, MULTICLASS, REGRESSION = KINDS = ("binary", "multiclass", "regression")
ENTAILMENT = "entailment"
DEFAULT_METRICS = {  # of fine-tuning
    BINARY: ("acc", "f1", "acc_and_f1"),
    MULTICLASS: ("acc",),
    REGRESSION: ("pearson", "spearmanr", "corr"),
}
SCORES = {BINARY: "f1", MULTICLASS: "accuracy", REGRESSION: "pearson"}  # the student's, by which checkpoints are ranked
DEFAULT_DEV_SHARE = 0.1
_LABEL_NAMES = ("label", "labels", "score", "similarity")  # of columns
_ID_NAMES = re.compile(r"(.*[ _-])?(id|idx|index|uid|guid|uuid)")  # of columns that are neither text nor label
_NEGATIVE = ("0", "no", "false", "negative", "different", "f", "n")  # labels
_MOST_CLASSES, _MOST_LABELS = 3, 50  # numbers that count as classes, not as scores; labels at all
DEFAULT_THRESHOLD = 0.5  # of the second label's probability, in binary tasks


@dataclass(frozen=True)
class Task:
    """One line of the task table; most fields are also the keys of a user's JSON file (`_JSON_TYPES`)."""

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
    dev_share: float | None = None  # of the training pairs, for dev, if there is no dev file

    def __post_init__(self) -> None:
        if not self.metrics:
            object.__setattr__(self, "metrics", DEFAULT_METRICS.get(self.kind, ()))

    @property
    def num_logits(self) -> int:
        """Width of the teacher's logits."""
        return 1 if self.kind == REGRESSION else len(self.labels)

    @property
    def num_student_outputs(self) -> int:
        """Width of the student's outputs: a binary task has one."""
        return len(self.labels) if self.kind == MULTICLASS else 1


_BITS, _ENTAILED, _NLI = ("0", "1"), (ENTAILMENT, "not_entailment"), ("contradiction", ENTAILMENT, "neutral")
_MATCHED, _MISMATCHED = ({"dev": f"dev_{name}.tsv", "test": f"test_{name}.tsv"} for name in ("matched", "mismatched"))
_ACC = {"metrics": ("acc",)}

_LINES: tuple[tuple[str, str, tuple[str, ...], int, int | None, int, dict[str, Any]], ...] = (
    ("mrpc", "MRPC", _BITS, 3, 4, 0, {}),
    ("qqp", "QQP", _BITS, 3, 4, 5, {"test_text_a": 1, "test_text_b": 2, "skip_short_rows": True}),
    ("qnli", "QNLI", _ENTAILED, 1, 2, -1, _ACC),
    ("rte", "RTE", _ENTAILED, 1, 2, -1, _ACC),
    ("wnli", "WNLI", _BITS, 1, 2, -1, _ACC),
    ("sts-b", "STS-B", (), 7, 8, -1, {}),
    ("mnli", "MNLI", _NLI, 8, 9, -1, {**_MATCHED, "also_validate": (("mm", _MISMATCHED["dev"]),)}),
    ("mnli-mm", "MNLI", _NLI, 8, 9, -1, _MISMATCHED),
    ("snli", "SNLI", _NLI, 7, 8, -1, {"test_label": -1, "also_validate": (("test", "test.tsv"),)}),
    ("allnli", "", _NLI, 0, 0, -1, {"test": None, "parts": ("snli", "mnli")}),
    ("diagnostic", "diagnostic", _NLI, 1, 2, -1, {"train": None, "dev": None, "test": "diagnostic.tsv"}),
    ("cola", "CoLA", _BITS, 3, None, 1, {"header": False, "test_text_a": 1, "metrics": ("mcc",)}),
    ("sst-2", "SST-2", _BITS, 0, None, 1, {"test_text_a": 1, **_ACC}),
)
TASKS = {
    name: Task(name, {0: REGRESSION, 2: BINARY, 3: MULTICLASS}[len(labels)], labels, folder=folder, text_a=text_a,
               text_b=text_b, label=label, **{"test": "test.tsv", **others})
    for name, folder, labels, text_a, text_b, label, others in _LINES
}  # fmt: skip


def get_task(name: str, dev_share: float | None = None) -> Task:
    """The task of that name (any case), or of the JSON file at that path, with that --dev_share. Raises InputError."""
    if name.lower() in TASKS:
        if dev_share is not None:
            raise InputError(f"--dev_share: {name} has a dev file; leave the flag out")
        return TASKS[name.lower()]
    if name.lower().endswith(".json"):
        task = _task_from_json(Path(name))
        if dev_share is not None and task.dev is not None:
            raise InputError(f"--dev_share: {name} names a dev file, {task.dev}; leave the flag or the file out")
        return task if dev_share is None else replace(task, dev_share=dev_share)
    known = ", ".join(TASKS)
    raise InputError(f"--task_name: unknown task {name!r}; known: {known}, or a JSON file that describes your own")


def ranked_label(task: Task, asked: str | None = None) -> str | None:
    """The label whose probability ranks candidates; None for a regression, whose score does.

    It is the one `asked` for, else the task's own, else `entailment`, else the second label of a binary task.
    Raises InputError for a label that the task does not have, and if nothing says which label it is.

    >>> [ranked_label(TASKS[name]) for name in ("mrpc", "rte", "snli", "sts-b")]
    ['1', 'entailment', 'entailment', None]
    """
    if task.kind == REGRESSION:
        if asked is not None:
            raise InputError(f"--rank_label: {task.name} is a regression, which ranks by its score; leave the flag out")
        return None
    usual = ENTAILMENT if ENTAILMENT in task.labels else task.labels[1] if task.kind == BINARY else None
    label = next((one for one in (asked, task.rank_label) if one is not None), usual)
    mend = f"give one of {', '.join(task.labels)}"
    if label is None:
        mend += ', or name it in the task\'s JSON ("rank_label")'
        raise InputError(f"--rank_label: nothing says which label of {task.name} ranks candidates: {mend}")
    if label not in task.labels:
        raise InputError(f"--rank_label: {label!r} is not a label of {task.name}: {mend}")
    return label


def task_to_dict(task: Task, ranks: bool = False) -> dict[str, Any]:
    """The task's line as JSON values, with its rank label only for a student that `ranks` by one."""
    line = json.loads(json.dumps(asdict(task)))
    if not ranks or task.rank_label is None:
        del line["rank_label"]
    if task.dev_share is None:
        del line["dev_share"]  # so that the line is what it was before there was one
    return line


def task_from_dict(line: dict[str, Any]) -> Task:
    """The task that `task_to_dict` wrote. Raises TypeError for unknown entries."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in line.items()}
    return Task(**{**values, "also_validate": tuple(map(tuple, values.get("also_validate", ())))})


def check_sentence_pairs(task: Task) -> None:
    """Raise InputError for a task that a Siamese student cannot learn."""
    if task.text_b is None:
        why = "has one sentence per row, but DSE scores pairs: only finetune_bert.py (the teacher) takes it"
        raise InputError(f"--task_name: {task.name} {why}")


def check_threshold(task: Task, threshold: float | None) -> None:
    """Raise InputError for the --threshold of a task that has none."""
    if threshold is not None and task.kind != BINARY:
        raise InputError(f"--threshold: is for binary tasks, and {task.name} is {task.kind}; leave it out")


_COLUMNS = {
    "text_a": int | str, "text_b": int | str | None, "label": int | str, "test_text_a": int | str | None,
    "test_text_b": int | str | None, "test_label": int | str | None,
}  # fmt: skip
_JSON_TYPES: dict[str, Any] = {
    "name": str, "kind": str, "labels": list, "train": str, "dev": str | None, "dev_share": float,
    "test": str | None, **_COLUMNS, "header": bool, "metrics": list, "skip_short_rows": bool,
    "rank_label": int | str | None,
}  # fmt: skip


def _is(value: Any, types: Any) -> bool:  # True and False are not whole numbers
    return isinstance(value, types) and (types is bool or not isinstance(value, bool))


def _task_from_json(path: Path) -> Task:
    line = {"name": path.stem, **read_json(path, "the task description")}
    for key, value in line.items():
        if key not in _JSON_TYPES:
            raise InputError(f"{path}: unknown key {key!r}; known: {', '.join(_JSON_TYPES)}")
        if not _is(value, types := _JSON_TYPES[key]):
            expected = getattr(types, "__name__", str(types)).replace(" | ", " or ").replace("None", "null")
            raise InputError(f"{path}: {key!r} must be {expected}, found {value!r}")
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise InputError(f"{path}: {key!r} has a character that files cannot hold: {value!r}")
    if missing := [key for key in ("kind", "text_a", "label") if key not in line]:
        raise InputError(f"{path}: {', '.join(missing)} missing; a task needs kind, text_a, label (pairs: text_b)")
    for key, types, what in (("labels", int | str, "strings or whole numbers"), ("metrics", str, "strings")):
        if not all(_is(entry, types) for entry in line.get(key, ())):
            raise InputError(f"{path}: {key!r} must be a list of {what}, found {line[key]!r}")
        line[key] = tuple(map(str, line.get(key, ())))
    if line.get("rank_label") is not None:
        line["rank_label"] = str(line["rank_label"])
    share = DEFAULT_DEV_SHARE if line.get("dev") is None else None
    task = Task(**{"dev": None, "dev_share": share, **line})
    _check_own_task(path, task)
    return task


def _check_own_task(path: Path, task: Task) -> None:
    """Raise InputError for values of a user's JSON file that do not fit together."""
    kind, labels = task.kind, list(task.labels)
    if kind not in KINDS:
        raise InputError(f"{path}: kind {kind!r} is not one of {', '.join(KINDS)}")
    least, wanted = {BINARY: (2, "two labels, the negative first"), MULTICLASS: (2, "two or more labels"),
                     REGRESSION: (0, "no labels")}[kind]  # fmt: skip
    if len(set(labels)) != len(labels) or len(labels) < least or (kind != MULTICLASS and len(labels) > least):
        raise InputError(f"{path}: a {kind} task needs {wanted}, found {labels}")
    if task.rank_label not in (None, *labels):
        raise InputError(f"{path}: rank_label {task.rank_label!r} is not one of the labels {labels}")
    if task.dev_share is not None and (task.dev is not None or not 0 < task.dev_share < 1):
        raise InputError(f"{path}: dev_share {task.dev_share} must be above 0 and below 1, in a task without dev")
    known = DEFAULT_METRICS[kind] + ("mcc",) * (kind == BINARY)
    if not set(task.metrics) <= set(known):
        raise InputError(f"{path}: metrics {list(task.metrics)}: a {kind} task can have {', '.join(known)}")
    if not re.fullmatch(r"[\w.-]+", task.name) or task.name.lower() in TASKS:
        what = f"name {task.name!r} must consist of letters, digits, '_', '.' and '-', and not be a known task's"
        raise InputError(f"{path}: {what}")
    columns = [getattr(task, key) for key in _COLUMNS]
    if not task.header and any(isinstance(column, str) for column in columns):
        raise InputError(f'{path}: columns by name need a header line; give numbers from 0, or "header": true')
    if any(isinstance(column, int) and column < -1 for column in columns):
        raise InputError(f"{path}: column numbers start at 0, and -1 is the last; found {columns}")


def describe(
    path: Path, text_a: str | None, text_b: str | None, label: str | None, kind: str | None = None,
    labels: list[str] | None = None, matching: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The JSON task of a file with a header: what is not given is found from the file, and said in the log.

    Columns: of two or three, the texts in their order, and the label, which is the one named label or score, else the
    last; columns of ids do not count. Without a label column, or for pairs that all match (`matching`), there are no
    `labels` and no `kind`. Raises InputError if nothing says which is which, and for one label in two spellings.
    """
    rows = read_table(path, "the pairs", "--data")
    names = [str(name) for name in next(rows, (0, []))[1]]
    found = _named_columns(path, names, text_a, text_b, label)
    task: dict[str, Any] = dict(zip(("text_a", "text_b", "label"), found, strict=False))
    told = f"{path}: pairs of {task['text_a']!r} and {task['text_b']!r}"
    if "label" not in task:
        logger.info("%s, without labels", told)
        return task
    place = names.index(task["label"])
    values = Counter(cell for _, cells in rows if len(cells) > place and (cell := cells[place] or "").strip())
    if matching:
        if len(values) > 1:
            mend = "leave the flag out or, if these are not labels, give --text_a and --text_b"
            raise InputError(f"--negatives: {path} has {len(values)} labels in {names[place]!r}; {mend}")
        del task["label"]
        logger.info("%s, which all match", told)
        return task
    if names[place] in values:
        raise InputError(f"{path}, line 1: a header is expected, but its label cell {names[place]!r} is a label, too")
    task["kind"] = kind or _kind_of(path, values)
    if task["kind"] != REGRESSION:
        task["labels"] = labels or _ordered_labels(path, sorted(values, key=lambda value: (len(value), value)))
    shown = ", ".join(f"{value} ({values[value]})" for value in task.get("labels", []))
    logger.info("%s; %s: %s%s", told, task["label"], task["kind"], f", in this order: {shown}" if shown else "")
    return task


def _named_columns(path: Path, names: list[str], *given: str | None) -> list[str]:
    flags = ("--text_a", "--text_b", "--label")
    for flag, name in zip(flags, given, strict=True):
        if name is not None and names.count(name) != 1:
            raise InputError(f"{flag}: {path} has no column {name!r}, or two; its columns are {', '.join(names)}")
    left = [name for name in names if name not in given and not _ID_NAMES.fullmatch(name.lower())]
    usual = next((name for name in left if name.lower() in _LABEL_NAMES), None)
    texts_given = sum(name is not None for name in given[:2])
    third = left[-1] if texts_given < 2 and texts_given + len(left) == 3 else None
    label = given[2] or usual or third
    texts = [name for name in left if name != label]
    chosen = [name or (texts.pop(0) if texts else "") for name in given[:2]]
    if "" in chosen or (texts and None in given[:2]):
        mend = f"give {', '.join(flag for flag, name in zip(flags, given, strict=True) if name is None)}"
        raise InputError(f"{path}: nothing says which of its columns are the texts; {mend}; it has {', '.join(names)}")
    return [*chosen, *([label] if label else [])]


def _kind_of(path: Path, values: Counter[str]) -> str:
    if len(values) < 2:
        one = f"all labels are {next(iter(values))!r}" if values else "no row has a label"
        raise InputError(f"{path}: {one}; for pairs that all match, give --negatives 4, which makes others")
    numbers: set[float] = set()
    with contextlib.suppress(ValueError):
        numbers = {float(value) for value in values}
    if numbers and (len(numbers) > _MOST_CLASSES or not all(map(float.is_integer, numbers))):
        return REGRESSION
    seen: dict[object, str] = {}
    for value in values:
        if (other := seen.setdefault(float(value) if numbers else value.strip().casefold(), value)) != value:
            raise InputError(f"{path}: the labels {other!r} and {value!r} look like one label: use one spelling")
    if len(values) > _MOST_LABELS:
        raise InputError(
            f"{path}: {len(values)} different labels, such as {next(iter(values))!r}; is it the label's column?"
        )
    return BINARY if len(values) == 2 else MULTICLASS


def _ordered_labels(path: Path, values: list[Any]) -> list[str]:
    """The labels; of two the negative first: no before yes, not_x before x, of whole numbers the lower one."""
    if len(values) != 2:
        return sorted(values)
    for negative, positive in (values, values[::-1]):
        opposite = re.fullmatch(rf"(no|not|non|un|in|ir|dis)[ _-]?{re.escape(positive)}", negative, re.IGNORECASE)
        if opposite or (negative.lower() in _NEGATIVE and positive.lower() not in _NEGATIVE):
            return [negative, positive]
    if all(re.fullmatch(r"-?\d+", value) for value in values):
        return sorted(values, key=int)
    mend = f"give --labels {' '.join(values)} if the first one is the negative one, else the other way round"
    raise InputError(f"{path}: nothing says which of the labels means that a pair matches; {mend}")


def winning_threshold(metrics: dict[str, float]) -> float | None:
    """The threshold with the best f1, among equals the one nearest to 0.5; None for metrics without thresholds.

    >>> winning_threshold({"loss": 0.3, "f1_0.1": 0.9, "f1_0.4": 0.9, "f1_0.5": 0.8})
    0.4
    """
    found = {float(name.removeprefix("f1_")): f1 for name, f1 in metrics.items() if name.startswith("f1_")}
    return max(found, key=lambda threshold: (found[threshold], -abs(threshold - 0.5)), default=None)


def at_threshold(metrics: dict[str, Any], threshold: float | None = None) -> dict[str, Any]:
    """The metrics at one threshold (None: the winning one), and those that have no threshold.

    >>> at_threshold({"loss": 0.3, "accuracy_0.4": 0.7, "f1_0.4": 0.8, "accuracy_0.5": 0.6, "f1_0.5": 0.9})
    {'loss': 0.3, 'accuracy_0.5': 0.6, 'f1_0.5': 0.9}
    """
    kept = str(winning_threshold(metrics) if threshold is None else threshold)
    others = {name.removeprefix("f1_") for name in metrics if name.startswith("f1_")} - {kept}
    return {name: value for name, value in metrics.items() if name.rpartition("_")[2] not in others}
