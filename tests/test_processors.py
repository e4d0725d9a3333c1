"""The task table and its reader."""

import hashlib
import json
from pathlib import Path

import pytest

from dse.data.processors import read_examples
from dse.data.tasks import TASKS, get_task
from dse.system.errors import InputError

REAL = Path(__file__).parents[2] / "shared" / "data" / "glue_data"

# Rows of train / dev of the copies at hand.
REAL_ROWS = {"mrpc": (3668, 408), "sts-b": (5749, 1500), "wnli": (635, 71), "snli": (4500, 1000)}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
@pytest.mark.parametrize("name", REAL_ROWS)
def test_real_files_have_the_known_number_of_rows(name):
    task = get_task(name)
    for split, rows in zip(("train", "dev"), REAL_ROWS[name], strict=True):
        examples = read_examples(task, REAL / task.folder, split)
        assert len(examples) == len(examples.second) == len(examples.labels) == rows


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
def test_test_files_without_labels():
    for name, rows in {"mrpc": 1725, "sts-b": 1379, "wnli": 146, "diagnostic": 1104}.items():
        task = get_task(name)
        examples = read_examples(task, REAL / task.folder, "test")
        assert (len(examples), examples.labels) == (rows, None)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_row_by_hand(tmp_path):
    raw = b"\xef\xbb\xbfQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n" + '1\t7\t8\t"a" b\tc \u2028\u0085 d\r'.encode()
    raw += b"0\t9\t9\t\t x\n"
    write(tmp_path / "train.tsv", raw)
    examples = read_examples(get_task("MRPC"), tmp_path, "train")
    assert examples.first == ['"a" b', ""]  # a quote is a character
    assert examples.second == ["c \u2028\u0085 d", " x"]  # neither ends a row
    assert examples.labels == [1, 0]
    assert examples.files == [{"file": "train.tsv", "sha256": hashlib.sha256(raw).hexdigest()}]


def test_labels_are_places_in_the_tasks_order(tmp_path):
    cells = ["0"] * 7 + ["a", "b"]
    rows = ["\t".join([*cells, label]) for label in ("neutral", "contradiction", "entailment")]
    write(tmp_path / "train.tsv", "\n".join(["header", *rows]))  # no newline at the end
    assert read_examples(get_task("snli"), tmp_path, "train").labels == [2, 0, 1]


def test_cola_has_no_header_in_train_but_in_test(tmp_path):
    write(tmp_path / "train.tsv", "gj04\t1\t\tA sentence.\ngj04\t0\t*\tSentence a.\n")
    write(tmp_path / "test.tsv", "index\tsentence\n0\tThe first.\n")
    cola = get_task("cola")
    train, test = (read_examples(cola, tmp_path, split) for split in ("train", "test"))
    assert (train.first, train.second, train.labels) == (["A sentence.", "Sentence a."], None, [1, 0])
    assert (test.first, test.labels) == (["The first."], None)


def test_qqp_skips_short_rows_and_its_test_file_has_other_columns(tmp_path):
    write(tmp_path / "train.tsv", "id\tqid1\tqid2\tq1\tq2\tdup\n0\t1\t2\ta\tb\t1\n1\t1\t2\tbroken\n2\t1\t2\tc\td\t0\n")
    write(tmp_path / "test.tsv", "id\tq1\tq2\n0\te\tf\n")
    train, test = (read_examples(get_task("qqp"), tmp_path, split) for split in ("train", "test"))
    assert (train.first, train.labels) == (["a", "c"], [1, 0])
    assert (test.first, test.second, test.labels) == (["e"], ["f"], None)


def test_allnli_is_snli_then_mnli(tmp_path):
    snli, mnli = (["x"] * 7 + ["s1", "s2", "neutral"], ["x"] * 8 + ["m1", "m2", "entailment"])
    write(tmp_path / "SNLI" / "dev.tsv", "header\n" + "\t".join(snli))
    write(tmp_path / "MNLI" / "dev_matched.tsv", "header\n" + "\t".join(mnli))
    examples = read_examples(get_task("allnli"), tmp_path, "dev")
    assert (examples.first, examples.second, examples.labels) == (["s1", "m1"], ["s2", "m2"], [2, 1])
    assert [entry["file"] for entry in examples.files] == ["SNLI/dev.tsv", "MNLI/dev_matched.tsv"]


def test_other_validation_sets(data):
    assert read_examples(get_task("mnli"), data("mnli"), "mm").files[0]["file"] == "dev_mismatched.tsv"
    assert read_examples(get_task("snli"), data("snli"), "test").files[0]["file"] == "test.tsv"


def test_the_table_is_the_papers():
    """Kind, width of logits and of the student's outputs, by hand."""
    widths = {name: (task.kind, task.num_logits, task.num_student_outputs) for name, task in TASKS.items()}
    binary, multiclass = ("binary", 2, 1), ("multiclass", 3, 3)
    assert widths == {
        **dict.fromkeys(("mrpc", "qqp", "qnli", "rte", "wnli", "cola", "sst-2"), binary),
        **dict.fromkeys(("mnli", "mnli-mm", "snli", "allnli", "diagnostic"), multiclass),
        "sts-b": ("regression", 1, 1),
    }


def own_task(tmp_path, **line) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"kind": "binary", "labels": ["no", "yes"], "text_a": 0, "label": -1, **line}))
    return path


def test_own_task_by_column_names(tmp_path):
    path = own_task(tmp_path, text_a="question", text_b="answer", label="good", train="t.tsv")
    write(tmp_path / "t.tsv", "good\tanswer\tquestion\nyes\ta1\tq1\nno\ta2\tq2\n")
    task = get_task(str(path))
    examples = read_examples(task, tmp_path, "train")
    assert (task.name, task.metrics) == ("mine", ("acc", "f1", "acc_and_f1"))
    assert (examples.first, examples.second, examples.labels) == (["q1", "q2"], ["a1", "a2"], [1, 0])


@pytest.mark.parametrize(("header", "label", "rows"), [(True, "good", ["s"]), (False, "yes", ["q", "s"])])
def test_own_files_have_headers_or_none_the_test_file_too(tmp_path, header, label, rows):
    path = own_task(tmp_path, text_b=1, train="t.tsv", test="test.tsv", header=header)
    write(tmp_path / "t.tsv", f"q\tr\t{label}\ns\tt\tno\n")
    write(tmp_path / "test.tsv", "q\tr\ns\tt\n")
    task = get_task(str(path))
    assert [read_examples(task, tmp_path, split).first for split in ("train", "test")] == [rows, rows]


def test_own_task_whose_dev_file_is_its_test_file_too(tmp_path):
    path = own_task(tmp_path, text_b=1, dev="dev.tsv", test="dev.tsv")
    write(tmp_path / "dev.tsv", "a\tb\tlabel\nq\tr\tyes\n")
    task = get_task(str(path))
    assert read_examples(task, tmp_path, "dev").labels == [1]
    assert read_examples(task, tmp_path, "test").labels is None


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
        ({"metrics": ["bleu"]}, "knows acc, f1, acc_and_f1, mcc"),
        ({"metrics": [["acc"]]}, "'metrics' must be a list of strings"),
        ({"name": "mrpc"}, "and not one of the table"),
        ({"name": "a/b"}, "and not one of the table"),
    ],
)
def test_own_task_refused(tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        get_task(str(own_task(tmp_path, **line)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("header\n0\t1\t2\ta\n", "line 2: at least 5 columns expected, found 4"),
        ("header\n0\t1\t2\ta\tb\n\n0\t1\t2\ta\tb\n", "line 3: at least 5 columns expected, found 1"),
        ("header\n7\t1\t2\ta\tb\n", "line 2: label '7' is not one of mrpc's: 0, 1"),
        (b"header\n0\t1\t2\ta\tb\r0\t1\t2\t\xff\tb\n", "line 3: byte 0xff is not valid UTF-8"),
        ("header\n", "no rows of data"),
        ("", "no rows of data"),
    ],
)
def test_bad_files_are_refused_with_their_line(tmp_path, text, message):
    path = write(tmp_path / "train.tsv", text)
    with pytest.raises(InputError, match=message) as error:
        read_examples(get_task("mrpc"), tmp_path, "train")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("score", ["high", "nan", "inf", ""])
def test_a_score_that_is_no_number(tmp_path, score):
    write(tmp_path / "train.tsv", "header\n" + "\t".join(["x"] * 9 + [score]))
    with pytest.raises(InputError, match=f"line 2: score {score!r} is not a number"):
        read_examples(get_task("sts-b"), tmp_path, "train")


def test_a_label_in_the_last_column_is_not_one_of_the_texts(tmp_path):
    write(tmp_path / "train.tsv", "index\tq\ts\tlabel\n0\tq\tentailment\n")
    with pytest.raises(InputError, match="at least 4 columns expected, found 3"):
        read_examples(get_task("rte"), tmp_path, "train")
