"""Rows of files: read as meant, warned of, or refused in one line.

Each table is extended by a line: a name, the input, and what is expected of it. What is expected is a part of the
refusal (a string), or what is read (a list); with a warning, the pair of what is read and a part of the warning.
"""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from helpers import NAMED, REAL, check_outcome, names_of, outcome, own_task

from dse.data.processors import labelled_test, read_examples
from dse.data.tasks import Task, get_task
from dse.system.errors import InputError

NUMBERED = {**NAMED, "text_a": 0, "text_b": 1, "label": -1}


BARE = {**NUMBERED, "header": False}


SCORED = {"kind": "regression", "text_a": 1, "text_b": 2, "label": 0}


ALONE = {**BARE, "text_b": None}


HEADER, WNLI = "q\ta\tgood\n", "index\tsentence1\tsentence2\tlabel\n"


TWO = [("how", "so", 1), ("who", "me", 0)]


QUOTED = '"how"\t"so"\tyes\n"who"\t"me"\tno\n'


# (name, task, train.tsv, expected)
FILES = [
    # cells: as many as in line 1
    ("a sound file", NAMED, HEADER + "how\tso\tyes\nwho\tme\tno\n", TWO),
    ("a tab within a text", NAMED, HEADER + "how\tso\tyes\nwho\tm\te\tno\n",
     "train.tsv, line 3: 3 cells expected, as in line 1, found 4 (is a tab within a text"),
    ("a tab within a text, the label last", NUMBERED, HEADER + "h\tow\tso\tyes\n", "line 2: 3 cells expected"),
    ("a tab within quotes", NAMED, HEADER + '"h\tow"\tso\tyes\n', "line 2: 3 cells expected, as in line 1, found 4"),
    ("a tab at the end", NUMBERED, HEADER + "how\tso\tyes\t\n", "line 2: 3 cells expected, as in line 1, found 4"),
    ("row names without a header cell", SCORED, "score\tq\ta\n1\t4.5\thow\tso\n2\t0.5\twho\tme\n",
     "line 2: 3 cells expected, as in line 1, found 4 (is a tab within a text, or is the column of row names not"),
    ("row names with a header cell", {**SCORED, "label": 1, "text_a": 2, "text_b": 3},
     "\tscore\tq\ta\n1\t4.5\thow\tso\n", [("how", "so", 4.5)]),
    ("a cell too few, the label last", NUMBERED, "q\ta\tnote\tgood\nhow\tso\tyes\n", "line 2: 4 cells expected"),
    ("no header, a row with more cells", BARE, "how\tso\tyes\nwho\tm\te\tno\n", "line 2: 3 cells expected"),
    ("no header, a spilled cell that is a label", BARE, "how\tso\tyes\nwho\tme\tno\tyes\n", "line 2: 3 cells expected"),
    ("short rows that may be skipped", {**NAMED, "skip_short_rows": True},
     HEADER + "how\tso\tyes\nx\nwho\tme\tno\n", TWO),
    ("rows with more cells are not skipped", {**NAMED, "skip_short_rows": True}, HEADER + "h\tow\tso\tyes\n",
     "line 2: 3 cells expected, as in line 1, found 4"),
    ("GLUE: more cells", "wnli", WNLI + "0\ta\tb\t1\n1\tc\td\tx\t0\n2\te\tf\t1\ty\t0\n",
     ([("a", "b", 1), ("c", "d", 0), ("e", "f", 0)],
      "train.tsv: 2 of 3 rows have more or fewer cells than line 1, which has 4")),
    ("GLUE: too few cells", "wnli", WNLI + "0\ta\t1\n", "line 2: at least 4 columns expected, found 3"),
    # columns
    ("a name twice", NAMED, "q\ta\tq\tgood\nhow\tso\tx\tyes\n", "line 1: 2 columns 'q' in the header"),
    ("another name twice", NAMED, "q\ta\tx\tx\tgood\nhow\tso\t1\t2\tyes\n", [("how", "so", 1)]),
    ("one column for both texts", {**NUMBERED, "text_b": 0}, HEADER + "how\tso\tyes\n",
     "line 1: column 0 (from 0) is used twice"),
    ("one column by name and number", {**NAMED, "text_b": 0}, HEADER + "how\tso\tyes\n",
     "line 1: column 0 (from 0) is used twice"),
    ("a text that is the label", {**NUMBERED, "text_b": 2}, HEADER + "how\tso\tyes\n",
     "line 1: column 2 (from 0) is used twice"),
    ("a column that is not there", {**NUMBERED, "text_b": 3}, HEADER + "how\tso\tyes\n",
     "line 1: column 3 (from 0) is needed, but there are only 3"),
    # the header
    ("no header, by the label", NUMBERED, "how\tso\tyes\nwho\tme\tno\n",
     "line 1: a header is expected, but its label cell 'yes' is a label of mine"),
    ("no header, by the score", SCORED, "4.5\thow\tso\n0.5\twho\tme\n", "its label cell '4.5' is a number"),
    ("no header, by a text", {**SCORED, "label": 3}, "0\thow\tso\tn/a\n1\thow\tme\t1.5\n",
     "line 1: a header is expected, but its cell 'how' is also the text of a row"),
    ("no header, by the second text", {**SCORED, "label": 3}, "0\thow\tso\tn/a\n1\twho\tso\t1.5\n", "its cell 'so' is"),
    ("a text that is a column's name, by name", NAMED, HEADER + "q\ta\tyes\n", [("q", "a", 1)]),
    ("empty names and texts", NUMBERED, "\t\t\n\t\tyes\n", [("", "", 1)]),
    ("a column of the name of a label", {**NAMED, "label": "yes"}, "q\ta\tyes\nhow\tso\tyes\n", [("how", "so", 1)]),
    ("GLUE without its header", "wnli", "0\ta\tb\t1\n1\tc\td\t0\n",
     ([("c", "d", 0)], "line 1: a header is expected, but its label cell '1' is a label of wnli")),
    # quoting
    ("all texts quoted", NAMED, HEADER + QUOTED,
     ([('"how"', '"so"', 1), ('"who"', '"me"', 0)], "train.tsv: nearly all texts begin and end with a quotation mark")),
    ("half of the texts quoted", NAMED, HEADER + '"how"\tso\tyes\n', [('"how"', "so", 1)]),
    ("a text that is one quotation mark", NAMED, HEADER + '"\t"\tyes\n', [('"', '"', 1)]),
    # ends
    ("a blank last line", NAMED, HEADER + "how\tso\tyes\nwho\tme\tno\n\n", TWO),
    ("blank lines at the end, Windows'", NAMED, HEADER + "how\tso\tyes\r\nwho\tme\tno\r\n\r\n\r\n", TWO),
    ("a blank line in the middle", NAMED, HEADER + "how\tso\tyes\n\nwho\tme\tno\n", "line 3: 3 cells expected"),
    ("nothing but blank lines", NAMED, "\n\n", "train.tsv: is empty"),
    ("a header and blank lines", NAMED, HEADER + "\n\n", "train.tsv: has no rows of data"),
    ("rows are counted past blank lines", ALONE, "how\tyes\n\t\n", "line 2: all cells are empty; remove the line"),
    ("rows without label", NAMED, HEADER + "how\tso\t\nwho\tme\tno\n", [("how", "so", -1), ("who", "me", 0)]),
    ("an empty label of the task's", {**NAMED, "labels": ["", "yes"]}, HEADER + "how\tso\t\n", [("how", "so", 0)]),
    ("GLUE: no label", "wnli", WNLI + "0\ta\tb\t\n", "line 2: label '' is not one of wnli's: 0, 1"),
    ("GLUE: a blank last line", "wnli", WNLI + "0\ta\tb\t1\n\n", [("a", "b", 1)]),
    ("a byte-order mark", NAMED, "\ufeff" + HEADER + "how\tso\tyes\nwho\tme\tno\n", TWO),
]  # fmt: skip


@pytest.fixture
def rows_of(tmp_path, caplog):
    """A function that writes files and reads a split of them: [(text a, text b, label)], or the refusal."""

    def read(task: str | dict, split: str = "train", **files: str) -> object:
        for name, content in files.items():
            (tmp_path / f"{name}.tsv").write_text(content, newline="")
        if isinstance(task, dict):
            (tmp_path / "mine.json").write_text(json.dumps(task))
            task = str(tmp_path / "mine.json")

        def rows():
            examples = read_examples(get_task(task), tmp_path, split)
            columns = [examples.first, examples.second, examples.labels]
            return list(zip(*(column for column in columns if column is not None), strict=True))

        return outcome(rows, caplog)

    return read


@pytest.mark.parametrize(("name", "task", "train", "expected"), FILES, ids=names_of(FILES))
def test_files(name, task, train, expected, rows_of):
    check_outcome(rows_of(task, train=train), expected)


TRAIN = HEADER + "how\tso\tyes\n"


# (name, task, another split, its file, expected)
SPLITS = [
    ("the same header", NUMBERED, "dev", HEADER + "who\tme\tno\n", [("who", "me", 0)]),
    ("columns that change places", NUMBERED, "dev", "a\tq\tgood\nme\twho\tno\n",
     ([("me", "who", 0)], "dev.tsv, line 1: the header is 'a | q | good', but in ")),
    ("columns that change places, by name", NAMED, "dev", "a\tq\tgood\nme\twho\tno\n", [("who", "me", 0)]),
    ("a column more, by name", NAMED, "dev", "id\tq\ta\tgood\n7\twho\tme\tno\n", [("who", "me", 0)]),
    ("a test file without labels", NUMBERED, "test", "q\ta\nwho\tme\n", [("who", "me")]),
    ("a test file without a header", NUMBERED, "test", "who\tme\nwhy\tnot\n",
     ([("why", "not")], "train.tsv it is 'q | a | good': does each file have a header")),
    ("a test file without a header, by a text", NUMBERED, "test", "who\tme\nwho\tnot\n",
     "test.tsv, line 1: a header is expected, but its cell 'who' is also the text of a row"),
    ("a test file with columns of its own", {**NUMBERED, "test_text_a": 1, "test_text_b": 2}, "test",
     "id\tq\ta\n0\twho\tme\n", [("who", "me")]),
    ("a test file with other columns of its own", {**NUMBERED, "test_text_a": 2, "test_text_b": 1}, "test",
     "id\tq\ta\n0\twho\tme\n", ([("me", "who")], "test.tsv, line 1: the header is 'id | q | a', but in ")),
    ("a test file with other names of its own", {**NAMED, "test_text_a": "Q1", "test_text_b": "A1"}, "test",
     "Q1\tA1\nwho\tme\n", [("who", "me")]),
    ("no headers at all", {**BARE, "label": 2}, "dev", "who\tme\tno\n", [("who", "me", 0)]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "task", "split", "content", "expected"), SPLITS, ids=names_of(SPLITS))
def test_splits(name, task, split, content, expected, rows_of):
    train = TRAIN if task.get("header", True) else TRAIN.removeprefix(HEADER)
    check_outcome(rows_of({**task, "test": "test.tsv"}, split, train=train, **{split: content}), expected)


def test_a_test_file_alone(rows_of):
    check_outcome(rows_of({**NUMBERED, "test": "test.tsv"}, "test", test="q\ta\nwho\tme\n"), [("who", "me")])


# Rows of each file of the real data at hand: none gives a warning or refusal
REAL_FILES = {
    "mrpc": (3668, 408, 1725), "sts-b": (5749, 1500, 1379), "wnli": (635, 71, 146), "snli": (4500, 1000, 3927),
    "diagnostic": (None, None, 1104),
}  # fmt: skip


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data is not here")
@pytest.mark.parametrize("name", REAL_FILES)
def test_sound_files_are_read_without_a_word(name, caplog):
    task = get_task(name)
    for split, rows in zip(("train", "dev", "test"), REAL_FILES[name], strict=True):
        if rows is not None:
            assert outcome(lambda split=split: len(read_examples(task, REAL / task.folder, split)), caplog) == rows


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
    ("text", "message"),
    [
        ("header\n0\t1\t2\ta\n", "line 2: at least 5 columns expected, found 4"),
        ("header\n0\t1\t2\ta\tb\n\n0\t1\t2\ta\tb\n", "line 3: at least 5 columns expected, found 1"),
        ("header\n7\t1\t2\ta\tb\n", "line 2: label '7' is not one of mrpc's: 0, 1"),
        (b"header\n0\t1\t2\ta\tb\r0\t1\t2\t\xff\tb\n", "line 3: byte 0xff is not valid UTF-8"),
        ("header\n", "has no rows of data"),
        ("", "is empty; expected one pair per line"),
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


CSV = {**NAMED, "train": "t.csv"}
JSONL = {**NAMED, "train": "t.jsonl"}
# (name, task, content of its training file, expected)
FORMS = [
    ("CSV", CSV, 'q,a,good\r\nhow,so,yes\r\nwho,me,no\r\n', TWO),
    ("CSV: commas, quotation marks and line ends in texts", CSV, 'a,good,q\n"so, ""so""\nso",yes,how\n',
     [("how", 'so, "so"\nso', 1)]),
    ("CSV: blank lines", CSV, "q,a,good\n\nhow,so,yes\n\nwho,me,no\n\n", TWO),
    ("CSV: tabs are text", CSV, "q,a,good\nhow\tto,so,yes\n", [("how\tto", "so", 1)]),
    ("CSV: semicolons", CSV, "q;a;good\nhow;so;yes\n", "line 1: no column 'q' in the header, which has q;a;good"),
    ("CSV: an open quote", CSV, 'q,a,good\nhow,"so,yes\n', "t.csv, line 2: is not CSV (unexpected end of data)"),
    ("CSV: text after a quote", CSV, 'q,a,good\nhow,"so" so,yes\n', "t.csv, line 2: is not CSV ("),
    ("CSV: a cell too many", CSV, "q,a,good\nhow,so, so,yes\n", "line 2: 3 cells expected, as in line 1, found 4"),
    ("CSV: a mark", CSV, "\ufeffq,a,good\nhow,so,yes\n", [("how", "so", 1)]),
    ("CSV without a header", {**BARE, "train": "t.csv"}, "how,so,yes\nwho,me,no\n", TWO),
    ("JSONL", JSONL, '{"q": "how", "a": "so", "good": "yes"}\n{"good": "no", "q": "who", "more": 1, "a": "me"}\n', TWO),
    ("JSONL: labels that are numbers", {**JSONL, "labels": [0, 1]}, '{"q": "how", "a": "so", "good": 1}\n',
     [("how", "so", 1)]),
    ("JSONL: labels that are truth values", {**JSONL, "labels": ["false", "true"]},
     '{"q": "how", "a": "so", "good": true}\n', [("how", "so", 1)]),
    ("JSONL: scores", {**JSONL, "kind": "regression", "labels": []},
     '{"q": "how", "a": "so", "good": 4.5}\n{"q": "how", "a": "so", "good": 1e-3}\n',
     [("how", "so", 4.5), ("how", "so", 0.001)]),
    ("JSONL: no label", JSONL, '{"q": "how", "a": "so", "good": null}\n{"q": "who", "a": "me"}\n',
     [("how", "so", -1), ("who", "me", -1)]),
    ("JSONL: no text", JSONL, '{"q": "how", "a": "so", "good": "no"}\n{"q": "how", "good": "no"}\n',
     "t.jsonl, line 2: 'a' is missing or null; expected a text"),
    ("JSONL: no key", JSONL, '{"q": "how", "good": "no"}\n', "t.jsonl, line 1: no column 'a' in the header"),
    ("JSONL: a list", JSONL, '{"q": ["how"], "a": "so", "good": "no"}\n', "line 1: 'q': expected a string, a number"),
    ("JSONL: not an object", JSONL, '["how", "so", "yes"]\n', "line 1: expected a JSON object, found"),
    ("JSONL: not JSON", JSONL, "{'q': 'how'}\n", "t.jsonl, line 1: is not JSON ("),
    ("JSONL: half a character", JSONL, '{"q": "\\ud800", "a": "so", "good": "no"}\n', "line 1: 'q': half of a"),
    ("JSONL by numbers", {**JSONL, "text_a": 0, "text_b": 1, "label": 2}, '{"q": "how", "a": "so", "good": "yes"}\n',
     [("how", "so", 1)]),
]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "task", "content", "expected"), FORMS, ids=names_of(FORMS))
def test_forms_of_files(name, task, content, expected, packed, tmp_path, caplog):
    """By the name's ending, which .gz may follow."""
    file = task["train"] + (".gz" if packed else "")
    (tmp_path / file).write_bytes(gzip.compress(content.encode()) if packed else content.encode())

    def rows():
        examples = read_examples(get_task(str(own_task(tmp_path, **{**task, "train": file}))), tmp_path, "train")
        return list(zip(examples.first, examples.second, examples.labels, strict=True))

    expected = (
        expected.replace("t.csv", "t.csv.gz").replace("t.jsonl", "t.jsonl.gz")
        if packed and isinstance(expected, str)
        else expected
    )
    check_outcome(outcome(rows, caplog), expected)


@pytest.mark.parametrize(
    "content",
    [b"q\ta\tgood\n", gzip.compress(b"q\ta\tgood\n" + b"how\tso\tno\n" * 99)[:-9], b"\x1f\x8b\x08"],
    ids=["plain", "cut", "shorter"],  # compressed bytes tell the time, and both processes must name tests alike
)
def test_what_is_not_gzip(content, tmp_path):
    (tmp_path / "t.tsv.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.tsv\.gz: is not a whole gzip file; pack it again"):
        read_examples(get_task(str(own_task(tmp_path, **NAMED, train="t.tsv.gz"))), tmp_path, "train")


def split_task(tmp_path, rows: list[tuple[str, str, str]], **line) -> Task:
    lines = ["q\ta\tgood", *("\t".join(row) for row in rows)]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    return get_task(str(own_task(tmp_path, **{**NAMED, **line})))


def test_a_share_of_train_serves_as_dev(tmp_path, caplog):
    """The same share of each label, 67 rows each; equal pairs stay together; rows without label stay in train."""
    rows = [(f"q{i % 150}", f"a{i % 150}", ["no", "yes", ""][(i % 150) % 3]) for i in range(200)]
    task = split_task(tmp_path, rows)
    with caplog.at_level("INFO", "dse"):
        train, dev = (read_examples(task, tmp_path, split) for split in ("train", "dev"))
    pairs = [set(zip(part.first, part.second, strict=True)) for part in (train, dev)]
    assert not pairs[0] & pairs[1]
    assert [sum(int(q[1:]) % 3 == place for q in dev.first) for place in range(3)] == [7, 7, 0]
    assert len(train) + len(dev) == 200
    chosen = dev.files[0]["rows"]
    assert [rows[row][0] for row in chosen] == dev.first
    assert train.files[0]["without"] == chosen
    assert f"{len(chosen)} of 200 rows serve as dev: {', '.join(map(str, chosen))} (from 0)" in caplog.text
    split_task(tmp_path, rows[::-1])
    assert sorted(read_examples(task, tmp_path, "dev").first) == sorted(dev.first)
    half = get_task(str(own_task(tmp_path, **NAMED)), dev_share=0.5)
    assert 68 <= len(read_examples(half, tmp_path, "dev")) <= 70
    (tmp_path / "dev.tsv").write_text("q\ta\tgood\nhow\tso\tyes\n")
    assert read_examples(task, tmp_path, "dev").first == ["how"]
    assert len(read_examples(task, tmp_path, "train")) == 200


def test_first_texts_of_dev_are_not_in_train(tmp_path):
    """100 questions, each with one right answer of five."""
    task = split_task(tmp_path, [(f"q{i // 5}", f"a{i}", ["no", "yes"][i % 5 == 0]) for i in range(500)])
    train, dev = (read_examples(task, tmp_path, split) for split in ("train", "dev"))
    assert not set(train.first) & set(dev.first)
    assert len(dev) == 5 * sum(dev.labels)
    assert 50 <= len(dev) <= 100


@pytest.mark.parametrize("reverse", [False, True])
def test_a_pair_and_its_reverse_stay_together(tmp_path, reverse):
    """Also where one first text has most of the rows."""
    pairs = [("q", f"a{i}", ["no", "yes"][i % 2]) for i in range(100)]
    rows = [*pairs, *((b, a, label) for a, b, label in pairs)] if reverse else pairs
    task = split_task(tmp_path, rows)
    parts = [read_examples(task, tmp_path, split) for split in ("train", "dev")]
    train, dev = ({frozenset(pair) for pair in zip(*part.sides, strict=True)} for part in parts)
    assert not train & dev
    assert (len(dev), sum(parts[1].labels)) == (10, 5 * (1 + reverse))


def test_dev_has_scores_of_every_size(tmp_path):
    rows = [(f"q{i}", f"a{i}", str(i / 40)) for i in range(200)]
    task = split_task(tmp_path, rows, kind="regression", labels=[])
    scores = sorted(read_examples(task, tmp_path, "dev").labels)
    assert [int(score / 0.5) for score in scores] == [tenth for tenth in range(10) for _ in range(2)]


def test_too_few_pairs_for_a_dev_set(tmp_path):
    task = split_task(tmp_path, [("q", "a", "no"), ("r", "b", "yes"), ("s", "c", "")])
    assert len(read_examples(task, tmp_path, "train")) == 3
    with pytest.raises(InputError, match=r"train\.tsv: too few labelled pairs to split a dev set off"):
        read_examples(task, tmp_path, "dev")


def test_rows_of_dev_without_label_are_left_out(tmp_path, caplog):
    task = split_task(tmp_path, [("q", "a", "no")])
    (tmp_path / "dev.tsv").write_text("q\ta\tgood\nhow\tso\tyes\nwho\tme\t\n")
    assert read_examples(task, tmp_path, "dev").first == ["how"]
    assert "dev.tsv: 1 of 2 rows have no label, and are left out" in caplog.text
    (tmp_path / "dev.tsv").write_text("q\ta\tgood\nwho\tme\t\n")
    with pytest.raises(InputError, match=r"dev\.tsv: no row has a label"):
        read_examples(task, tmp_path, "dev")


def test_rows_of_a_labelled_test_set_without_label_are_left_out(tmp_path):
    task = split_task(tmp_path, [("q", "a", "no")], test="test.tsv", test_label="good")
    (tmp_path / "test.tsv").write_text("q\ta\tgood\nhow\tso\tyes\nwho\tme\t\n")
    assert labelled_test(task, tmp_path).labels == [1]
    assert read_examples(task, tmp_path, "test").labels == [1, -1]
