"""The transfer command: the table and the JSON, and what is refused."""

import json
import re
from pathlib import Path

import pytest
from helpers import MRPC, SST_2, write_task

from dse import __main__ as entry
from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.experiments import transfer
from dse.models import DSESiameseClassifier


@pytest.fixture
def glue(tmp_path):
    """STS-B, MRPC with Microsoft's labelled test file, and single sentences, each of 24 rows a file.

    In MRPC, one word is in second sentences alone.
    """
    for name in ("sts-b", "mrpc", "sst-2"):
        write_task(tmp_path / "glue" / get_task(name).folder, get_task(name))
    for file in ("train.tsv", "dev.tsv"):
        path = tmp_path / "glue" / "MRPC" / file
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        path.write_text("".join("\t".join([*row[:4], f"{row[4]} indeed", *row[5:]]) + "\n" for row in rows))
    lines = (tmp_path / "glue" / "MRPC" / "dev.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "glue" / "MRPC" / "msr_paraphrase_test.txt").write_text("".join(lines[:10]))
    return tmp_path / "glue"


@pytest.fixture
def saved(student, bert, tmp_path):
    """A student's folder, which tells that its training began with `bert`, and its teacher with something else."""
    model = student()
    commands = [["finetune_bert.py", {"bert_model": "./nowhere"}], ["dse_train_runner.py", {"bert_model": str(bert)}]]
    model.origin = {"epoch": 1, "commands": commands, "logits_sha256": "of them"}
    model.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def table_of(output: str) -> dict[tuple[str, str], dict[str, str]]:
    """The printed Markdown table's cells by (task, metric) and kind."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    header, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == ["task", "metric", "DSE", "encoder as downloaded", "bag of words"]
    assert rule == ["---"] * 5
    return {(task, metric): dict(zip(header[2:], cells, strict=True)) for task, metric, *cells in rows}


def rows_of(path: Path, columns: tuple[int, ...], start: int = 1, stop: int | None = None) -> list[list[str]]:
    """Columns of a file's lines, the header being line 0."""
    lines = [line.split("\t") for line in path.read_text().splitlines()[start:stop]]
    return [[line[column] for line in lines] for column in columns]


def assert_close(found: dict, expected: dict) -> None:
    """Numbers by task, kind, split and metric, in this order of tasks and kinds."""
    assert list(found) == list(expected)
    for task, by_kind in expected.items():
        assert list(found[task]) == ["DSE", "encoder as downloaded", "bag of words"]
        for kind, by_split in by_kind.items():
            assert found[task][kind].keys() == by_split.keys()
            for split, metrics in by_split.items():
                assert found[task][kind][split] == pytest.approx(metrics, abs=1e-4)


def as_shown(found: dict) -> dict[tuple[str, str], dict[str, str]]:
    """The cells that the table should have."""
    cells: dict = {}
    for task, by_kind in found.items():
        for kind, by_split in by_kind.items():
            for split, metrics in by_split.items():
                for metric, value in metrics.items():
                    cells.setdefault((task, f"{split} {metric}"), {})[kind] = f"{value:.3f}"
    return cells


def test_the_command_prints_and_writes_what_the_functions_give(
    glue, saved, bert, tmp_path, monkeypatch, capsys, caplog
):
    batch_sizes, encode = set(), DSESiameseClassifier.encode

    def seen(model, texts, batch_size=32, **options):
        batch_sizes.add(batch_size)
        return encode(model, texts, batch_size, **options)

    monkeypatch.setattr(DSESiameseClassifier, "encode", seen)
    flags = ["transfer", "--model", str(saved), "--data_dir", str(glue), "--output", str(tmp_path / "out" / "t.json")]
    entry.main([*flags, "--max_rows", "20", "--batch_size", "5"])
    table, written = table_of(capsys.readouterr().out), json.loads((tmp_path / "out" / "t.json").read_text())
    assert batch_sizes == {5}

    # The data by hand: columns as GLUE has them, the first 20 rows for training.
    def mrpc(file: str, stop: int | None = None) -> Examples:
        labels, first, second = rows_of(glue / "MRPC" / file, (0, 3, 4), stop=stop)
        return Examples(first, second, [int(label) for label in labels])

    def sst(file: str, stop: int | None = None) -> Examples:
        first, labels = rows_of(glue / "SST-2" / file, (0, 1), stop=stop)
        return Examples(first, None, [int(label) for label in labels])

    similar = Examples(*rows_of(glue / "STS-B" / "dev.tsv", (7, 8, -1)))
    similar.labels = [float(score) for score in similar.labels]
    pairs, sentences = mrpc("train.tsv", 21), sst("train.tsv", 21)
    sets = {"dev": mrpc("dev.tsv"), "test": mrpc("msr_paraphrase_test.txt")}
    assert (len(pairs), len(sentences), len(sets["dev"]), len(sets["test"])) == (20, 20, 24, 9)

    words = {word for text in pairs.first + pairs.second for word in re.findall(r"\w+", text)}
    assert f"mrpc, {2 * len(words)} features: C " in caplog.text
    assert "mrpc: train 20, dev 24, test 9" in caplog.text

    model = DSESiameseClassifier.from_pretrained(saved)
    kinds = {"DSE": model.encode, "encoder as downloaded": transfer.encoder_embedder(bert, model)}
    expected: dict = {"STS-B": {}, "MRPC": {}, "SST-2": {}}
    for kind in table["STS-B", "dev pearson"]:
        of_sts, of_pairs, of_sentences = (
            kinds.get(kind) or transfer.bag_of_words(texts)
            for texts in (similar.first + similar.second, pairs.first + pairs.second, sentences.first)
        )
        expected["STS-B"][kind] = {"dev": transfer.cosine_correlations(of_sts, similar)}
        expected["MRPC"][kind] = transfer.probe(of_pairs, MRPC, pairs, sets)
        expected["SST-2"][kind] = transfer.probe(of_sentences, SST_2, sentences, {"dev": sst("dev.tsv")})

    assert written["model"] == str(saved)
    assert (written["task"], written["max_rows"]) == ("mrpc", 20)
    assert written.keys() == {"model", "task", "max_rows", "results"}
    assert_close(written["results"], expected)
    assert table == as_shown(written["results"])
    assert list(table) == [
        ("STS-B", "dev pearson"), ("STS-B", "dev spearman"), ("MRPC", "dev accuracy"), ("MRPC", "dev f1"),
        ("MRPC", "test accuracy"), ("MRPC", "test f1"), ("SST-2", "dev accuracy"), ("SST-2", "dev f1"),
    ]  # fmt: skip
    for cells in (table["STS-B", "dev pearson"], table["MRPC", "dev accuracy"]):
        assert len(set(cells.values())) > 1, "columns that are all the same would prove little"


def test_what_has_no_correlation_is_null_in_json(student, bert, tmp_path, capsys):
    """Pairs without a common word all have cosine 0 as bags of words; JSON has no NaN."""
    sts = tmp_path / "glue" / "STS-B"
    sts.mkdir(parents=True)
    rows = [("doctor", "lamp", 1.5), ("teacher", "house", 4.0), ("the thief", "a boat", 0.5)]
    lines = ["\t".join(["x"] * 7 + [first, second, str(score)]) for first, second, score in rows]
    (sts / "dev.tsv").write_text("\n".join(["\t".join("0123456789"), *lines]) + "\n")
    student().save_pretrained(tmp_path / "student")
    entry.main(["transfer", "--model", str(tmp_path / "student"), "--data_dir", str(sts.parent),
                "--bert_model", str(bert), "--output", str(tmp_path / "t.json")])  # fmt: skip
    table = table_of(capsys.readouterr().out)
    written = json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)["results"]
    assert written.keys() == {"STS-B"}
    assert written["STS-B"]["bag of words"] == {"dev": {"pearson": None, "spearman": None}}
    assert table["STS-B", "dev pearson"]["bag of words"] == "nan"
    assert -1 <= written["STS-B"]["DSE"]["dev"]["pearson"] <= 1


def test_refusals(glue, saved, student, bert, tmp_path, refused):
    student().save_pretrained(tmp_path / "silent")

    def line(**changes: object) -> str:
        flags = {"model": saved, "data_dir": glue, **changes}
        argv = ["transfer", *(word for flag, value in flags.items() for word in (f"--{flag}", value))]
        found = refused(entry.main, argv)
        assert found.startswith("python -m dse transfer: error: ")
        return found

    (tmp_path / "empty").mkdir()
    assert "--data_dir: nowhere is not a folder" in line(data_dir="nowhere")
    assert "empty has no task's train and dev files" in line(data_dir=tmp_path / "empty")
    assert "holds no student of this project" in line(model=bert)
    assert "no student: config.json is missing" in line(model=tmp_path / "empty")
    assert "is not a local folder, and the hub did not provide a student" in line(model="./nowhere")
    assert "--bert_model: the student does not say which encoder it started from; give that encoder" in line(
        model=tmp_path / "silent"
    )
    assert "--bert_model: there is no folder ./nowhere" in line(bert_model="./nowhere")
    assert "not a model folder: no config.json in it" in line(bert_model=tmp_path / "empty")
    assert "9 is below 10" in line(max_rows=9)
    assert "is a folder; give a file" in line(output=tmp_path)


def test_bad_data_of_any_task_is_refused_before_a_model_is_loaded(glue, tmp_path, refused):
    """Not after the tasks before it were done, whose numbers would be lost."""

    def line(*flags: str) -> str:
        return refused(entry.main, ["transfer", "--model", "./nowhere", "--data_dir", glue, *flags])

    sst = glue / "SST-2" / "train.tsv"
    header, *rows = sst.read_text().splitlines()
    rows = sorted(rows, key=lambda row: row.split("\t")[1])
    negative = sum(row.split("\t")[1] == "0" for row in rows)
    sst.write_text("\n".join([header, *rows]))
    assert negative >= 10
    assert (
        "--max_rows: the first 10 rows of SST-2's train.tsv have too few labels (10 of 0): a regression needs two"
        in line("--max_rows", "10")
    )
    assert "is not a local folder, and the hub did not provide a student" in line("--max_rows", str(negative + 1))
    sst.write_text("\n".join([header, *rows, "the ship\tgood"]))
    assert "train.tsv, line 26: label 'good' is not one of sst-2's: 0, 1" in line()
