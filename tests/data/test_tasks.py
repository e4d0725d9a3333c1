"""The task table, and own tasks in JSON."""

import json

import pytest
from helpers import DEEP, OWN_TASK, check_outcome, names_of, outcome, own_task

from dse.data.tasks import (
    TASKS,
    Task,
    describe,
    get_task,
    ranked_label,
    task_from_dict,
    task_to_dict,
    winning_threshold,
)
from dse.system.errors import InputError


def test_which_label_ranks():
    three = Task("mine", "multiclass", ("good", "bad", "neither"))
    with pytest.raises(InputError, match="which label of mine ranks candidates: give one of good, bad, neither"):
        ranked_label(three)
    assert ranked_label(three, "bad") == "bad"
    assert ranked_label(Task("mine", "binary", ("yes", "no"))) == "no"
    assert ranked_label(Task("mine", "binary", ("entailment", "other"))) == "entailment"
    with pytest.raises(InputError, match="'maybe' is not a label of rte"):
        ranked_label(get_task("rte"), "maybe")
    with pytest.raises(InputError, match="sts-b is a regression"):
        ranked_label(get_task("sts-b"), "1")


def test_rank_label_in_a_tasks_json(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(OWN_TASK))
    task = get_task(str(path))
    assert (task.rank_label, ranked_label(task)) == ("match", "match")
    assert task_from_dict(json.loads(json.dumps(task_to_dict(task, ranks=True)))) == task
    assert "rank_label" not in task_to_dict(task), "a run, or a cache, would be another's when it is changed"
    assert "rank_label" not in task_to_dict(get_task("mrpc"), ranks=True), (
        "files from before the key would count as another task's"
    )
    path.write_text(json.dumps({**OWN_TASK, "labels": [0, 1], "rank_label": 0}))
    assert ranked_label(get_task(str(path))) == "0"
    path.write_text(json.dumps({**OWN_TASK, "rank_label": "maybe"}))
    with pytest.raises(InputError, match="rank_label 'maybe' is not one of the labels"):
        get_task(str(path))


def test_of_equal_thresholds_the_one_nearest_to_a_half():
    metrics = {f"f1_{threshold}": f1 for threshold, f1 in ((0.1, 1.0), (0.4, 1.0), (0.6, 0.5), (0.9, 1.0))}
    assert winning_threshold(metrics) == 0.4
    assert winning_threshold({"loss": 1.0}) is None


def test_the_table_is_the_papers():
    """Kind, width of logits and of the student's outputs, by hand."""
    widths = {name: (task.kind, task.num_logits, task.num_student_outputs) for name, task in TASKS.items()}
    binary, multiclass = ("binary", 2, 1), ("multiclass", 3, 3)
    assert widths == {
        **dict.fromkeys(("mrpc", "qqp", "qnli", "rte", "wnli", "cola", "sst-2"), binary),
        **dict.fromkeys(("mnli", "mnli-mm", "snli", "allnli", "diagnostic"), multiclass),
        "sts-b": ("regression", 1, 1),
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"kind": "ranking"}, "kind 'ranking' is not one of"),
        ({"labels": ["yes"]}, "needs two labels"),
        ({"kind": "regression"}, "needs no labels"),
        ({"txt_b": 1}, "unknown key 'txt_b'"),
        ({"text_b": 1.5}, "'text_b' must be int or str or null"),
        ({"text_b": True}, "'text_b' must be int or str or null"),
        ({"text_b": -2}, "column numbers start at 0"),
        ({"text_b": "answer", "header": False}, "need a header line"),
        ({"metrics": ["bleu"]}, "can have acc, f1, acc_and_f1, mcc"),
        ({"metrics": [["acc"]]}, "'metrics' must be a list of strings"),
        ({"name": "mrpc"}, "and not be a known task's"),
        ({"name": "a/b"}, "and not be a known task's"),
    ],
)
def test_own_task_refused(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        get_task(str(own_task(tmp_path, **line)))


# (name, a task's JSON, expected: a part of the refusal, or its labels)
JSON = [
    ("a byte-order mark", b'\xef\xbb\xbf{"labels": ["no", "yes"]}', ["no", "yes"]),
    ("labels that are integers", '{"labels": [0, 1]}', ["0", "1"]),
    ("labels that are decimals", '{"labels": [0.0, 1.50]}', "strings or whole numbers, found [0.0, 1.5]"),
    ("numbers and strings", '{"labels": ["no", 1]}', ["no", "1"]),
    ("a number and its string", '{"labels": ["1", 1]}', "needs two labels"),
    ("booleans", '{"labels": [false, true]}', "must be a list of strings or whole numbers, found [False, True]"),
    ("nothing", '{"labels": [null, "yes"]}', "'labels' must be a list of strings or whole numbers"),
    ("no number", '{"labels": [NaN, 1]}', "'labels' must be a list of strings or whole numbers"),
    ("a decimal as a column", '{"text_b": 1.0}', "'text_b' must be int or str or null, found 1.0"),
    ("metrics that are numbers", '{"metrics": [1]}', "'metrics' must be a list of strings, found [1]"),
    ("deep", '{"labels": ' + DEEP, "is not valid JSON (maximum recursion depth exceeded"),
    ("NUL in a file's name", r'{"test": "a\u0000b.tsv"}',
     r"'test' has a character that files cannot hold: 'a\x00b.tsv'"),
    ("half a character in a file's name", r'{"dev": "a\ud800b.tsv"}', "'dev' has a character that files cannot hold"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "line", "expected"), JSON, ids=names_of(JSON))
def test_json(name, line, expected, tmp_path, caplog):
    path = tmp_path / "mine.json"
    line = line if isinstance(line, bytes) else line.encode()
    others = b'"kind": "binary", "text_a": 0, "label": -1, "labels": ["no", "yes"], '
    path.write_bytes(line.replace(b"{", b"{" + others, 1))
    check_outcome(outcome(lambda: list(get_task(str(path)).labels), caplog), expected)


# (name, header and rows of a TSV, flags, expected: the task's line or the refusal)
DESCRIBED = [
    ("three columns", "q\ta\tl\nx\ty\t1\nx\tz\t0\n", {},
     {"text_a": "q", "text_b": "a", "label": "l", "kind": "binary", "labels": ["0", "1"]}),
    ("the label first, by its name", "Label\tq\ta\nyes\tx\ty\nno\tx\tz\n", {},
     {"text_a": "q", "text_b": "a", "label": "Label", "kind": "binary", "labels": ["no", "yes"]}),
    ("columns by flags", "id\ta\tl\tq\n1\tx\ty\t5\n1\tz\tu\t4\n", {"text_a": "q", "text_b": "a", "label": "l"},
     {"text_a": "q", "text_b": "a", "label": "l", "kind": "binary", "labels": "refused"}),
    ("an opposite", "q\ta\tl\nx\ty\trelevant\nx\tz\tirrelevant\n", {},
     {"text_a": "q", "text_b": "a", "label": "l", "kind": "binary", "labels": ["irrelevant", "relevant"]}),
    ("no opposites", "q\ta\tl\nx\ty\tcat\nx\tz\tdog\n", {},
     "nothing says which of the labels means that a pair matches; give --labels cat dog if"),
    ("labels by flags", "q\ta\tl\nx\ty\tcat\nx\tz\tdog\n", {"labels": ["dog", "cat"]},
     {"text_a": "q", "text_b": "a", "label": "l", "kind": "binary", "labels": ["dog", "cat"]}),
    ("whole numbers", "q\ta\tl\nx\ty\t2\nx\tz\t1\n", {},
     {"text_a": "q", "text_b": "a", "label": "l", "kind": "binary", "labels": ["1", "2"]}),
    ("scores", "q\ta\tscore\nx\ty\t0.5\nx\tz\t1\n", {},
     {"text_a": "q", "text_b": "a", "label": "score", "kind": "regression"}),
    ("many whole numbers", "q\ta\tl\n" + "".join(f"x\ty{i}\t{i}\n" for i in range(4)), {},
     {"text_a": "q", "text_b": "a", "label": "l", "kind": "regression"}),
    ("whole numbers that are classes", "q\ta\tl\n" + "".join(f"x\ty{i}\t{i}\n" for i in range(4)),
     {"kind": "multiclass"},
     {"text_a": "q", "text_b": "a", "label": "l", "kind": "multiclass", "labels": ["0", "1", "2", "3"]}),
    ("classes", "q\ta\tl\nx\ty\tB\nx\tz\tA\nx\tu\tC\n", {},
     {"text_a": "q", "text_b": "a", "label": "l", "kind": "multiclass", "labels": ["A", "B", "C"]}),
    ("too many classes", "q\ta\tl\n" + "".join(f"x\ty{i}\tl{i}\n" for i in range(60)), {},
     "60 different labels, such as 'l0'; is it the label's column?"),
    ("no header", "x\ty\tyes\nx\tz\tno\nu\tv\tyes\n", {}, "its label cell 'yes' is a label, too"),
    ("empty labels", "q\ta\tl\nx\ty\t1\nx\tz\t\nu\tv\t0\n", {},
     {"text_a": "q", "text_b": "a", "label": "l", "kind": "binary", "labels": ["0", "1"]}),
    ("a column twice", "q\tq\tl\nx\ty\t1\n", {"text_a": "q"}, "--text_a: "),
    ("ids, which are no labels", "q\ta\tpair_id\nx\ty\t1\nx\tz\t2\n", {}, {"text_a": "q", "text_b": "a"}),
    ("ids first", "id\tq\ta\n1\tx\ty\n2\tx\tz\n", {"matching": True}, {"text_a": "q", "text_b": "a"}),
    ("texts by flags and another column", "q\ta\tnote\nx\ty\t1\nx\tz\t2\n", {"text_a": "q", "text_b": "a"},
     {"text_a": "q", "text_b": "a"}),
    ("a number in two spellings", "q\ta\tl\nx\ty\t1\nx\tz\t0\nu\tz\t1.0\n", {},
     "the labels '1' and '1.0' look like one label: use one spelling"),
    ("a word in two spellings", "q\ta\tl\nx\ty\tyes\nx\tz\tno\nu\tz\tYes \n", {},
     "the labels 'yes' and 'Yes ' look like one label: use one spelling"),
    ("a blank label", "q\ta\tl\nx\ty\t1\nx\tz\t \nu\tv\t0\n", {},
     {"text_a": "q", "text_b": "a", "label": "l", "kind": "binary", "labels": ["0", "1"]}),
    ("all match", "q\ta\tl\nx\ty\tyes\n", {"matching": True}, {"text_a": "q", "text_b": "a"}),
    ("not all match", "q\ta\tl\nx\ty\tyes\nx\tz\tno\n", {"matching": True}, "--negatives: "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "flags", "expected"), DESCRIBED, ids=names_of(DESCRIBED))
def test_what_is_found_in_a_file(name, content, flags, expected, tmp_path, caplog):
    (tmp_path / "t.tsv").write_text(content)
    columns = [flags.get(flag) for flag in ("text_a", "text_b", "label")]
    others = {flag: value for flag, value in flags.items() if flag in ("kind", "labels", "matching")}
    found = outcome(lambda: describe(tmp_path / "t.tsv", *columns, **others), caplog)
    if isinstance(expected, dict) and expected.get("labels") == "refused":
        expected = "nothing says which of the labels means that a pair matches"
    check_outcome(found, expected)
