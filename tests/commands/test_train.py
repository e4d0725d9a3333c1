"""The command that makes a student of a file of pairs."""

import csv
import json
import random
import re

import pytest
from helpers import command_main

from dse.commands import train
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.experiments import presets, stages
from dse.experiments.synthetic import make_pair
from dse.models import DSESiameseClassifier

TINY = presets.Preset(
    {}, teacher={"learning_rate": "1e-3", "num_train_epochs": 1, "train_batch_size": 8},
    student={"siamese_head_type": "residual", "lr": "1e-3", "epochs": 1, "pooler_num_top_hidden_layers": 2},
    max_seq_length=48,
)  # fmt: skip
main = command_main("train")


@pytest.fixture
def flags(bert, tmp_path, monkeypatch):
    """A function that writes a table of the pairs and gives the flags to train on it, in seconds."""
    monkeypatch.setitem(train.RECIPES, "recommended", TINY)

    def write(name: str, rows: list[dict[str, object]], *more: object) -> list[str]:
        with (tmp_path / name).open("w", newline="") as file:
            if name.endswith(".csv"):
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        words = ["--data", tmp_path / name, "--bert_model", bert, "--max_seq_length", 48, "--output", tmp_path / "run"]
        return [str(word) for word in (*words, *more)]

    return write


def pairs_of(count: int, matching: bool = False) -> list[tuple[int, str, str]]:
    rng = random.Random(0)
    pairs = (make_pair(rng) for _ in range(8 * count))
    return [pair for pair in pairs if pair[0] or not matching][:count]


def test_questions_and_answers_that_all_match(flags, tmp_path, capsys, monkeypatch, refused):
    """From CSV with quotes and commas to a line that ranks answers; the same command again has nothing to do."""
    rows = [{"question": f'{a} "please"', "answer": f"well, {b}"} for _, a, b in pairs_of(40, matching=True)]
    argv = flags("faq.csv", rows, "--negatives", 3, "--dev_share", 0.3)
    main(argv)
    shown, data = capsys.readouterr().out, tmp_path / "run" / "data"
    assert re.search(r"on dev +tuned_f1 +tuned_accuracy +mrr.*\nteacher +\d\.\d{4} .*\nstudent +\d\.\d{4} ", shown)
    task = get_task(str(data / "task.json"))
    parts = [read_examples(task, data, split) for split in ("train", "dev")]
    texts = {row["question"]: row["answer"] for row in rows}
    for part in parts:
        pairs = list(zip(*part.sides, part.labels, strict=True))
        assert all((texts[a] == b) is (label == 1) for a, b, label in pairs)
        assert {pairs.count(pair) for pair in pairs} == {1}
        assert sum(part.labels) == len(pairs) / 4
    assert not set(parts[0].first) & set(parts[1].first)
    assert set(parts[0].first) | set(parts[1].first) == set(texts)
    command = shown.rstrip().splitlines()[-1]
    found = re.fullmatch(r"  echo '(.*)' \| python -m (dse score .*)", command)
    (tmp_path / "query").write_text(found[1])
    command_main("score")(found[2].replace("--queries -", f"--queries {tmp_path / 'query'}").split()[2:])
    hits = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [hit[2] for hit in hits] == ["rank", "1", "2", "3"]
    assert {hit[5] for hit in hits[1:]} < set(texts.values())
    assert len((data / "candidates.jsonl").read_text().splitlines()) == len(set(texts.values()))
    assert DSESiameseClassifier.from_pretrained(tmp_path / "run" / "student").task.labels == ("0", "1")
    monkeypatch.setattr(stages, "do", None)
    main(argv)
    assert capsys.readouterr().out == shown
    assert "was made with another --max_seq_length" in refused(main, [*argv, "--max_seq_length", "32"])


def test_a_correlation_that_dev_does_not_define(flags, capsys):
    """One row, which such a small file leaves for dev, has none."""
    main(flags("few.csv", [{"a": a, "b": b, "score": row + 0.5} for row, (_, a, b) in enumerate(pairs_of(5))]))
    assert re.search(r"\nteacher +undefined .*\nstudent +undefined ", capsys.readouterr().out)


def test_json_lines_with_labels_in_words(flags, tmp_path, caplog):
    rows = [{"label": ["not_same", "same"][label], "a": a, "b": b} for label, a, b in pairs_of(40)]
    with caplog.at_level("INFO", "dse"):
        main(flags("pairs.jsonl", rows))
    assert "pairs of 'a' and 'b'; label: binary, in this order: not_same (" in caplog.text
    assert "of 40 rows serve as dev: " in caplog.text
    task = DSESiameseClassifier.from_pretrained(tmp_path / "run" / "student").task
    assert (task.labels, task.text_a, task.text_b, task.dev_share) == (("not_same", "same"), "a", "b", 0.1)


@pytest.mark.parametrize(
    ("rows", "more", "line"),
    [
        ([{"q": "how", "a": "so"}], (), "has no column of labels; name it with --label, or give --negatives 4"),
        ([{"q": "how", "a": "so", "l": "1"}], (), "all labels are '1'; for pairs that all match, give --negatives 4"),
        ([{"q": "how", "a": "so"}], ("--negatives", 2), "has too few pairs to make negatives for train"),
        ([{"q": "how", "a": "so"}], ("--negatives", 2, "--kind", "regression"), "--negatives: makes a binary task"),
        ([{"q": "how", "a": "so"}], ("--label", "x"), "--label: .* has no column 'x', or two; its columns are q, a"),
        ([{"q": "how", "a": "so", "x": "1", "y": "2"}], (), "nothing says which of its columns are the texts; give"),
    ],
)
def test_files_that_do_not_say_enough(rows, more, line, flags, refused, tmp_path):
    assert re.search(line, refused(main, flags("pairs.csv", rows, *more)))
    assert not (tmp_path / "run" / "data").exists()


def test_another_files_output_is_not_touched(flags, refused, tmp_path):
    rows = [{"a": a, "b": b, "label": label} for label, a, b in pairs_of(40)]
    main(flags("pairs.csv", rows))
    before = (tmp_path / "run" / "data" / "train.csv").read_bytes()
    line = refused(main, flags("pairs.csv", rows[:30]))
    assert f"--output: {tmp_path / 'run'} was made with another --data; name another folder" in line
    assert "teacher was made with max_seq_length 48" in refused(main, flags("pairs.csv", rows, "--max_seq_length", 32))
    assert "was made with another --dev_share" in refused(main, flags("pairs.csv", rows, "--dev_share", 0.2))
    assert (tmp_path / "run" / "data" / "train.csv").read_bytes() == before


@pytest.mark.parametrize("name", ["data", "student"])
def test_a_users_folder_in_the_output_is_kept(name, flags, refused, tmp_path):
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "mine.txt").write_text("mine")
    rows = [{"a": a, "b": b, "label": label} for label, a, b in pairs_of(40)]
    line = refused(main, flags("pairs.csv", rows))
    assert "--output: " in line
    assert f"run/{name}" in line
    assert [path.name for path in (tmp_path / "run").rglob("*")] == [name, "mine.txt"]
