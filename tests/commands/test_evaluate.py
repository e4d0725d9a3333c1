"""`python -m dse evaluate`: what it writes against scikit-learn's and scipy's numbers on the rows that it wrote."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import NAMED, as_flags, command_main, own_task
from scipy.stats import bootstrap, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

import finetune_bert
from dse.data.tasks import get_task
from dse.experiments.synthetic import make_pair
from dse.storage.student_folder import read_student, write_student

main = command_main("evaluate")
LABELS = {"binary": ["no", "yes"], "multiclass": ["c", "a", "b"], "regression": []}


@pytest.fixture
def world(student, tmp_path):
    """A function that makes a kind's student and a CSV of pairs, all but the last with a label, and gives flags."""

    def make(kind: str) -> list[str]:
        rng, names = random.Random(1), LABELS[kind]
        task = get_task(str(own_task(tmp_path, **{**NAMED, "kind": kind, "labels": names})))
        model = student({"binary": "mrpc", "multiclass": "snli", "regression": "sts-b"}[kind])
        model.task, model.threshold = task, 0.45
        with torch.no_grad():  # outputs that differ: around their mean, and further apart
            last, pairs = model.network.siamese_head.fc_layers[-1], [make_pair(rng)[1:] for _ in range(50)]
            last.bias -= torch.from_numpy(model.score(pairs)).reshape(50, -1).mean(0)
            last.weight *= 30
            last.bias *= 30
        model.save_pretrained(tmp_path / "student")
        lines, pairs = ["sku,q,a,good"], [[f"{text}, so" for text in make_pair(rng)[1:]] for _ in range(80)]
        scores = model.score(pairs)
        for row, pair in enumerate(pairs):  # scores that the student's follow in part
            score = scores[row] / scores.std() + rng.gauss(0, 1) if row else -1
            label = rng.choice(names) if names else f"{score:.3f}"
            lines.append(",".join([f"s{row}", *(f'"{text}"' for text in pair), label]))
        lines.append('s80,"a ""text""",another,')
        (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
        return as_flags({"model": tmp_path / "student", "data": tmp_path / "pairs.csv", "id_column": "sku",
                         "output": tmp_path / "found.json", "rows": tmp_path / "rows.jsonl"})  # fmt: skip

    return make


def rows_and_metrics(tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["row"], row["id"]) for row in rows] == [(i, f"s{i}") for i in range(81)]
    assert (rows[80]["text_a"], rows[80]["text_b"], rows[80]["label"]) == ('a "text"', "another", None)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"] == 80
    return rows, found


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_classes_are_measured_as_by_scikit_learn(kind, world, tmp_path, capsys):
    main(world(kind))
    rows, found = rows_and_metrics(tmp_path)
    labels, predicted = ([row[key] for row in rows[:80]] for key in ("label", "predicted"))
    assert len(set(predicted)) > 1
    expected = {"accuracy": accuracy_score(labels, predicted)}
    names = LABELS[kind]
    of_each = precision_recall_fscore_support(labels, predicted, labels=names, zero_division=0.0)
    if kind == "multiclass":
        expected["macro_f1"] = f1_score(labels, predicted, labels=names, average="macro")
    else:
        expected |= {name: values[1] for name, values in zip(("precision", "recall", "f1"), of_each, strict=False)}
    assert {name: values[0] for name, values in found["metrics"].items()} == pytest.approx(expected)
    for place, name in enumerate(names):
        of_one = [found["labels"][name][key] for key in ("precision", "recall", "f1", "rows")]
        assert of_one == pytest.approx([values[place] for values in of_each])
    assert found["confusions"] == confusion_matrix(labels, predicted, labels=names).tolist()

    def accuracy(some):
        return np.mean(some)

    right = (np.array(labels) == np.array(predicted)).astype(float)
    other = bootstrap((right,), accuracy, n_resamples=2000, method="percentile", rng=7).confidence_interval
    assert found["metrics"]["accuracy"][1:] == pytest.approx([other.low, other.high], abs=0.026)  # two rows of 80
    score_of = {row["id"]: row["score"] for row in rows}
    for row in rows:
        assert row["probability"] == pytest.approx(1 / (1 + np.exp(-score_of[row["id"]])))
        if kind == "binary":
            assert (row["predicted"] == "yes") is (row["probability"] > 0.45)
    shown = capsys.readouterr().out
    assert re.search(rf"accuracy +{expected['accuracy']:.4f} +0\.\d{{4}} to 0\.\d{{4}}", shown)


def test_scores_are_measured_as_by_scipy(world, tmp_path):
    main([*world("regression"), "--resamples", "600"])
    rows, found = rows_and_metrics(tmp_path)
    scores, labels = (np.array([row[key] for row in rows[:80]]) for key in ("score", "label"))
    assert "probability" not in rows[0]
    assert rows[0]["label"] == -1
    expected = [pearsonr(scores, labels)[0], spearmanr(scores, labels)[0], ((scores - labels) ** 2).mean()]
    assert [values[0] for values in found["metrics"].values()] == pytest.approx(expected, rel=1e-4)
    other = bootstrap((scores, labels), lambda x, y: pearsonr(x, y)[0], paired=True, vectorized=False,
                      n_resamples=600, method="percentile", rng=7).confidence_interval  # fmt: skip
    assert found["metrics"]["pearson"][1:] == pytest.approx([other.low, other.high], abs=0.05)
    assert 0.4 < other.low < other.high - 0.1
    errors = ((scores - labels) ** 2,)
    other = bootstrap(errors, np.mean, n_resamples=2000, method="percentile", rng=7).confidence_interval
    assert found["metrics"]["mean_squared_error"][1:] == pytest.approx([other.low, other.high], rel=0.06)


def test_a_regression_has_no_threshold(world, refused):
    assert "--threshold: is for binary tasks, and " in refused(main, [*world("regression"), "--threshold", "0.5"])


def test_a_tasks_split_a_teacher_and_tsv(student, data, teacher_flags, tmp_path, capsys):
    finetune_bert.main(teacher_flags())
    student().save_pretrained(tmp_path / "student")
    flags = {"task_name": "mrpc", "data_dir": data("mrpc"), "rows": tmp_path / "rows.tsv", "resamples": 100}
    capsys.readouterr()
    main(as_flags({**flags, "model": tmp_path / "teacher", "teacher": tmp_path / "teacher"}))
    assert re.search(r"teacher_agreement +1\.0000\n", capsys.readouterr().out)
    results = dict(line.split(" = ") for line in (tmp_path / "teacher" / "eval_results.txt").read_text().splitlines())
    main(as_flags({**flags, "model": tmp_path / "teacher"}))
    shown = capsys.readouterr().out
    assert float(re.search(r"accuracy +(\S+)", shown)[1]) == pytest.approx(float(results["acc"]), abs=1e-4)
    lines = [line.split("\t") for line in (tmp_path / "rows.tsv").read_text().splitlines()]
    assert lines[0] == ["row", "text_a", "text_b", "label", "predicted", "score", "probability"]
    assert len(lines) == 25


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data": None}, "--data: give either this flag, or --task_name and --data_dir"),
        ({"data_dir": "."}, "--data: give either this flag, or --task_name and --data_dir"),
        ({"data": None, "data_dir": ".", "id_column": None}, "--task_name: is needed with --data_dir"),
        ({"id_column": "x"}, "no column 'x' in the header, which has sku, q, a, good"),
        ({"data": "nowhere.csv"}, "--data: .*nowhere.csv"),
        ({"threshold": 1.5}, "--threshold"),
        ({"id_column": "good"}, "line 82: 'good' is empty; give each row one, or leave --id_column out"),
    ],
)
def test_what_cannot_be_measured(change, line, world, refused):
    flags = dict(zip((argv := world("binary"))[::2], argv[1::2], strict=True))
    flags |= {f"--{name}": value and str(value) for name, value in change.items()}
    words = [word for flag, value in flags.items() if value for word in (flag, value)]
    assert re.search(line, refused(main, words))


@pytest.mark.parametrize(("dev", "short"), [(None, False), ("in/dev.csv", False), ("in/dev.csv", True), (None, True)])
def test_rows_have_the_numbers_of_the_file(student, refused, tmp_path, dev, short):
    """Where a part of train serves as dev, where rows without a label are left out, and where short ones are."""
    rng = random.Random(2)
    (tmp_path / "in").mkdir()
    labels = [("", "no", "yes")[row % 3] if dev else ("no", "yes")[row % 2] for row in range(60)]
    pairs = [(f"{row} {make_pair(rng)[1]}", "so") for row in range(60)]
    lines = ["q,a,good", *(f'"{a}",{b},{label}' for (a, b), label in zip(pairs, labels, strict=True))]
    if short:
        lines[1], lines[4] = "too,short", "one"
    (tmp_path / (dev or "pairs.csv")).write_text("\n".join(lines) + "\n")
    changes = {"kind": "binary", "labels": ["no", "yes"], "train": "pairs.csv", "skip_short_rows": short}
    changes |= {"dev": dev} if dev else {}
    task, model = own_task(tmp_path, **{**NAMED, **changes}), student()
    model.task = get_task(str(task))
    model.save_pretrained(tmp_path / "student")
    flags = {"model": tmp_path / "student", "task_name": task, "data_dir": tmp_path, "resamples": 100}
    main(as_flags({**flags, "rows": tmp_path / "rows.jsonl"}))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["text_a"] for row in rows] == [pairs[row["row"]][0] for row in rows]
    assert len(rows) == 40 if dev else 2 <= len(rows) <= 20
    assert rows[-1]["row"] != len(rows) - 1
    same = as_flags({**flags, "rows": tmp_path / (dev or "dev.tsv")})
    assert "is an input of this command, or another" in refused(main, same)


def test_refused_before_anything_is_scored(world, data, refused, student, tmp_path):
    argv, other = world("binary"), tmp_path / "other"
    student("sts-b").save_pretrained(other)
    for flags, line in (
        (("--rows", tmp_path / "pairs.csv"), r"--rows: .*pairs\.csv is an input of this command, or another"),
        (("--rows", tmp_path / "found.json"), r"--rows: .*found\.json is an input of this command, or another"),
        (("--teacher", tmp_path), r"--teacher: .* is not a model folder"),
        (("--teacher", other), r"--teacher: this is a student of sts-b"),
    ):
        assert re.search(line, refused(main, [*argv, *map(str, flags)]))
    model = ["--model", str(tmp_path / "student"), "--task_name", "mrpc", "--data_dir", str(data("mrpc"))]
    for split in ("validation", "mm", "label", "name"):
        assert f"mrpc has no {split} file" in refused(main, [*model, "--split", split])


def test_pairs_without_labels(world, refused, tmp_path):
    argv = world("binary")
    (tmp_path / "pairs.csv").write_text("sku,q,a,good\ns,how,so,\n")
    assert "pairs.csv has no labels; `predict` or `score` needs none" in refused(main, argv)
    assert read_student(tmp_path / "student").task.name == "mine"


def test_a_short_row_is_refused_for_skipping_it_would_shift_the_ids(world, student, refused, tmp_path):
    argv = world("binary")
    model = read_student(tmp_path / "student")
    model.task = replace(model.task, skip_short_rows=True)
    write_student(model, tmp_path / "student")
    with (tmp_path / "pairs.csv").open("a") as file:
        file.write("s81,too short\n")
    assert re.search(r"pairs\.csv, line 83: 4 cells expected, as in line 1, found 2", refused(main, argv))


def test_a_task_of_several_parts_has_no_columns_of_its_own(student, refused, tmp_path):
    student("allnli").save_pretrained(tmp_path / "student")
    (tmp_path / "pairs.tsv").write_text("a\tb\tc\n")
    argv = as_flags({"model": tmp_path / "student", "data": tmp_path / "pairs.tsv"})
    assert "--data: allnli is made of several tasks; give --task_name with one of them" in refused(main, argv)
