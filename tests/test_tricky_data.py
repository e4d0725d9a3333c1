"""Tricky data files and JSON: read as meant, warned of, or refused in one line.

Each table is extended by a line: a name, the input, and what is expected of it. What is expected is a part of the
refusal (a string), or what is read (a list); with a warning, the pair of what is read and a part of the warning.
"""

import json
import logging

import numpy as np
import pytest
from conftest import as_flags
from safetensors.numpy import save_file
from test_processors import REAL

import download_glue_data
import finetune_bert
from dse import __main__ as commands
from dse import cli
from dse.data import download
from dse.data.cache import check_cache_path
from dse.data.features import Ragged, cached_features
from dse.data.processors import Examples, read_examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.experiments.predictions import student_scorer
from dse.system.errors import InputError
from dse.system.files import read_json

# Tasks of the tables: GLUE's by name, own ones by their JSON
NAMED = {"kind": "binary", "labels": ["no", "yes"], "text_a": "q", "text_b": "a", "label": "good"}
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
     "line 2: 3 cells expected, as in line 1, found 4 (is a tab within a text, or does the header lack a name"),
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
     "line 1: column 0 (from 0) serves"),
    ("one column by name and number", {**NAMED, "text_b": 0}, HEADER + "how\tso\tyes\n",
     "line 1: column 0 (from 0) serves"),
    ("a text that is the label", {**NUMBERED, "text_b": 2}, HEADER + "how\tso\tyes\n",
     "line 1: column 2 (from 0) serves"),
    ("a column that is not there", {**NUMBERED, "text_b": 3}, HEADER + "how\tso\tyes\n",
     "line 1: column 3 (from 0) is needed, but only 3 are there"),
    # the header
    ("no header, by the label", NUMBERED, "how\tso\tyes\nwho\tme\tno\n",
     "line 1: a header is expected, but its label cell 'yes' is a label of mine"),
    ("no header, by the score", SCORED, "4.5\thow\tso\n0.5\twho\tme\n", "its label cell '4.5' is a number"),
    ("no header, by a text", {**SCORED, "label": 3}, "0\thow\tso\tn/a\n1\thow\tme\t1.5\n",
     "line 1: a header is expected, but its cell 'how' is a text of a row too"),
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
    ("nothing but blank lines", NAMED, "\n\n", "no rows of data in it"),
    ("a header and blank lines", NAMED, HEADER + "\n\n", "no rows of data in it"),
    ("rows are counted past blank lines", ALONE, "how\tyes\n\t\n", "line 2: label '' is not one of"),
    ("GLUE: a blank last line", "wnli", WNLI + "0\ta\tb\t1\n\n", [("a", "b", 1)]),
    ("a byte-order mark", NAMED, "\ufeff" + HEADER + "how\tso\tyes\nwho\tme\tno\n", TWO),
]  # fmt: skip


def outcome(work, caplog) -> object:
    """What `work` gives, with the warnings if there are any, or how it is refused."""
    with caplog.at_level(logging.WARNING, "dse"):
        try:
            value = work()
        except InputError as error:
            assert "\n" not in str(error)
            return str(error)
    return (value, caplog.text) if caplog.text else value


def check(found: object, expected: object) -> None:
    if isinstance(expected, str):
        assert isinstance(found, str), found
        assert expected in found
    elif isinstance(expected, tuple):
        assert found[0] == expected[0]
        assert expected[1] in found[1]
        assert found[1].count("WARNING") == 1
    else:
        assert found == expected


def ids_of(table) -> list[str]:
    return [line[0] for line in table]


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


@pytest.mark.parametrize(("name", "task", "train", "expected"), FILES, ids=ids_of(FILES))
def test_files(name, task, train, expected, rows_of):
    check(rows_of(task, train=train), expected)


TRAIN = HEADER + "how\tso\tyes\n"
# (name, task, another split, its file, expected)
SPLITS = [
    ("the same header", NUMBERED, "dev", HEADER + "who\tme\tno\n", [("who", "me", 0)]),
    ("columns that change places", NUMBERED, "dev", "a\tq\tgood\nme\twho\tno\n",
     ([("me", "who", 0)], "dev.tsv, line 1: the header 'a | q | good', and ")),
    ("columns that change places, by name", NAMED, "dev", "a\tq\tgood\nme\twho\tno\n", [("who", "me", 0)]),
    ("a column more, by name", NAMED, "dev", "id\tq\ta\tgood\n7\twho\tme\tno\n", [("who", "me", 0)]),
    ("a test file without labels", NUMBERED, "test", "q\ta\nwho\tme\n", [("who", "me")]),
    ("a test file without a header", NUMBERED, "test", "who\tme\nwhy\tnot\n",
     ([("why", "not")], "train.tsv has 'q | a | good': does each file have a header")),
    ("a test file without a header, by a text", NUMBERED, "test", "who\tme\nwho\tnot\n",
     "test.tsv, line 1: a header is expected, but its cell 'who' is a text of a row too"),
    ("a test file with columns of its own", {**NUMBERED, "test_text_a": 1, "test_text_b": 2}, "test",
     "id\tq\ta\n0\twho\tme\n", [("who", "me")]),
    ("a test file with other columns of its own", {**NUMBERED, "test_text_a": 2, "test_text_b": 1}, "test",
     "id\tq\ta\n0\twho\tme\n", ([("me", "who")], "test.tsv, line 1: the header 'id | q | a', and ")),
    ("a test file with other names of its own", {**NAMED, "test_text_a": "Q1", "test_text_b": "A1"}, "test",
     "Q1\tA1\nwho\tme\n", [("who", "me")]),
    ("no headers at all", {**BARE, "label": 2}, "dev", "who\tme\tno\n", [("who", "me", 0)]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "task", "split", "content", "expected"), SPLITS, ids=ids_of(SPLITS))
def test_splits(name, task, split, content, expected, rows_of):
    train = TRAIN if task.get("header", True) else TRAIN.removeprefix(HEADER)
    check(rows_of({**task, "test": "test.tsv"}, split, train=train, **{split: content}), expected)


def test_a_test_file_alone(rows_of):
    check(rows_of({**NUMBERED, "test": "test.tsv"}, "test", test="q\ta\nwho\tme\n"), [("who", "me")])


DEEP = "[" * 100_000
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
     r"'test' has a character that no file can have: 'a\x00b.tsv'"),
    ("half a character in a file's name", r'{"dev": "a\ud800b.tsv"}', "'dev' has a character that no file can have"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "line", "expected"), JSON, ids=ids_of(JSON))
def test_json(name, line, expected, tmp_path, caplog):
    path = tmp_path / "mine.json"
    line = line if isinstance(line, bytes) else line.encode()
    others = b'"kind": "binary", "text_a": 0, "label": -1, "labels": ["no", "yes"], '
    path.write_bytes(line.replace(b"{", b"{" + others, 1))
    check(outcome(lambda: list(get_task(str(path)).labels), caplog), expected)


def test_deep_json_anywhere(tmp_path):
    """In what `read_json` reads, a cache's header, and the note beside a download."""
    deep = tmp_path / "deep.json"
    deep.write_text(DEEP)
    with pytest.raises(InputError, match=r"deep\.json: what it is is not valid JSON"):
        read_json(deep, "what it is")
    save_file({"ids": np.zeros(1, np.int32)}, tmp_path / "cache", metadata={"dse_features": DEEP})
    with pytest.raises(InputError, match="cache: is not a feature cache of this project"):
        check_cache_path(tmp_path / "cache", "joint")
    (tmp_path / "deep.part").write_bytes(b"x")
    assert download.Download("http://host/deep", tmp_path / "deep", most=9, size=9).progress() == (0, "")


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


# What is cut and what is unknown. The words of the tiny vocabulary are a piece each, any other one is [UNK].

# (name, form, max_seq_length, text a, text b, cut, share of [UNK] in %)
TEXTS = [
    ("joint, to the last piece", "joint", 6, ["a car", "a"], ["town", "ship car"], "0 of 2 rows", 0.0),
    ("joint, one piece too many", "joint", 6, ["a car", "a"], ["town", "ship car a"], "1 of 2 rows", 0.0),
    ("joint, without a second text", "joint", 6, ["a car a car", "a car a car a"], ["", ""], "1 of 2 rows", 0.0),
    ("separate", "separate", 4, ["a car", "a car a"], ["a car", "a town ship"], "2 of 3 distinct texts", 0.0),
    ("5 % exactly", "separate", 12, ["a car " * 5], ["zzz " + "a " * 9], "0 of 2 distinct texts", 5.0),
    ("more", "joint", 64, ["a car " * 5], ["zzz " + "a " * 8], "0 of 1 rows", 100 / 19),
    ("unknown beyond the cut", "separate", 4, ["a car zzz"], ["a ship zzz"], "2 of 2 distinct texts", 0.0),
    ("no pieces at all", "joint", 8, [""], [""], "0 of 1 rows", 0.0),
]


@pytest.fixture(scope="module")
def tokenizer(bert):
    return load_tokenizer(bert, True, "--bert_model")


@pytest.fixture
def told(caplog):
    """A function that does some work and gives the lines that were logged of dev.tsv, with their levels."""

    def lines(work) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "dse"):
            work()
        records = [(record.levelname, record.getMessage()) for record in caplog.records]
        return [f"{level} {line}" for level, line in records if line.startswith("dev.tsv: ")]

    return lines


@pytest.mark.parametrize(("name", "form", "length", "first", "second", "cut", "share"), TEXTS, ids=ids_of(TEXTS))
def test_what_is_cut_or_unknown_is_told(
    name, form, length, first, second, cut, share, tokenizer, tmp_path, told, monkeypatch
):
    """Of features as they are made, from the cache, and from a cache of before it held the count."""
    examples = Examples(first, second, [0] * len(first), [{"file": "dev.tsv", "sha256": "1" * 64}])
    expected = [f"INFO dev.tsv: {cut} are cut at --max_seq_length {length}; {share:.1f} % of the pieces are [UNK]"]
    if share > 5:
        expected += [f"WARNING dev.tsv: {share:.0f} % of the pieces are [UNK], all alike to the model: "
                     "its tokenizer does not fit these texts"]  # fmt: skip

    def make(path):
        return cached_features(form, get_task("mrpc"), examples, tokenizer, length, tmp_path / path, False)

    assert told(lambda: make("cache")) == expected
    assert told(lambda: make("cache")) == expected
    with monkeypatch.context() as patch:
        patch.setattr(Ragged, "arrays", lambda rows: {"ids": rows.ids, "offsets": rows.offsets})
        make("older")
    older = told(lambda: make("older"))
    at_most = int(older[0].split()[4])
    assert older == [expected[0].replace(f" {cut[0]} ", f" at most {at_most} ", 1), *expected[1:]]
    assert at_most >= int(cut[0])


def test_predict_tells_of_the_texts(student, told):
    rows = Examples(["a car " * 20, "zzz"], ["town", "ship"], None, [{"file": "dev.tsv", "sha256": "1" * 64}])
    score = student_scorer(student("mrpc"), get_task("mrpc"))
    # 30 pieces are left of the first text
    assert told(lambda: score(rows)) == [
        "INFO dev.tsv: 1 of 4 distinct texts are cut at --max_seq_length 32; 3.0 % of the pieces are [UNK]"
    ]


def test_texts_from_python_are_warned_of_once(student, caplog):
    model = student("mrpc")
    with caplog.at_level(logging.WARNING, "dse"):
        model.encode(["a car in the town"] * 9)
        assert caplog.text == ""
        model.encode("what car")  # one query tells nothing of a tokenizer
        assert caplog.text == ""
        for _ in range(2):
            model.encode(["zzz a car " * 9, "a car " * 12])  # 27 pieces and 24
    assert caplog.text.count("texts: 18 % of the pieces are [UNK]") == 1


# What reaches the terminal

# (name, script, flags, header of train.tsv, part of the line); MINE is the own task above, DATA its folder
MINE, DATA = "mine.json", "."
LINES = [
    (
        "a header",
        finetune_bert,
        ["--task_name", MINE],
        "q\x1b[2J\ta",
        r"no column 'q' in the header, which has q\x1b[2J, a",
    ),
    ("a column of the JSON", finetune_bert, ["--task_name", MINE], "\x9b1m\tq", r"which has \x9b1m, q"),
    ("a path", finetune_bert, ["--task_name", "no\x07\u202e.json"], "", r"no\x07\u202e.json: cannot read the task"),
    ("an unknown flag", finetune_bert, ["--\x1b]0;x\x07"], "", r"unrecognized arguments: --\x1b]0;x\x07"),
    ("NUL in a path", finetune_bert, ["--data_dir", "a\0b"], "", r"'a\x00b' has a NUL character"),
    ("NUL in a task", finetune_bert, ["--task_name=a\0b.json"], "", r"'--task_name=a\x00b.json' has a NUL character"),
    ("NUL in a folder", download_glue_data, ["--path_to_mrpc", "a\0b"], "", "has a NUL character"),
    ("NUL of a command", commands, ["index", "--model", "a\0b"], "", r"'a\x00b' has a NUL character"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "script", "flags", "header", "expected"), LINES, ids=ids_of(LINES))
def test_lines_for_the_terminal(name, script, flags, header, expected, refused, tmp_path, monkeypatch, bert):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MINE).write_text(json.dumps(NAMED))
    (tmp_path / "train.tsv").write_text(f"{header}\nx\ty\n")
    if script is finetune_bert:
        common = {"task_name": MINE, "data_dir": DATA, "bert_model": bert, "do_train": True, "output_dir": "out"}
        flags = [*as_flags(common), *flags]
    line = refused(script.main, flags)
    assert expected in line
    assert line.isprintable()


def test_the_log_on_the_terminal(capsys):
    cli.set_up_logging()
    logging.getLogger("dse.test").warning("caf\u00e9 %s", "\x1b[2J\r\nforged")
    assert capsys.readouterr().err.endswith(" WARNING caf\u00e9 \\x1b[2J\\r\\nforged\n")
