"""Scores, probabilities, labels and metrics mean what their reader thinks."""

import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_flags

import dse_train_runner
import finetune_bert
import load_dse_checkpoint_example
import run_distillation_logits_creator
from dse import __main__ as entry
from dse.data.processors import read_examples
from dse.data.tasks import Task, get_task, ranked_label, task_from_dict, task_to_dict, winning_threshold
from dse.experiments.synthetic import make_pair
from dse.index import CandidateIndex, rank_scores
from dse.models import DSESiameseClassifier
from dse.storage.checkpoint import Checkpoint
from dse.storage.logits import logits_identity, save_logits
from dse.system.errors import InputError
from dse.system.files import json_text
from dse.training.kinds import measure_student
from dse.training.reporting import format_metrics

OWN = {  # the label of what is wanted comes first
    "kind": "binary", "labels": ["match", "other"], "rank_label": "match",
    "text_a": "left", "text_b": "right", "label": "verdict", "test": "test.tsv",
}  # fmt: skip
TEXTS = ["the doctor sold a car .", "a physician traded a vehicle .", "soon"]


def write_rows(path: Path, labels: tuple[str, str], rows: int, seed: int) -> None:
    """Made-up pairs; the first label stands for pairs of one meaning."""
    rng = random.Random(seed)
    lines = ["index\tleft\tright\tverdict"]
    for i in range(rows):
        same, first, second = make_pair(rng)
        lines.append(f"{i}\t{first}\t{second}\t{labels[1 - same]}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module", params=["rte", "own"])
def first_label_wanted(request, tmp_path_factory, bert):
    """The `best` of a student that has learned a task whose first label is the wanted one: entailment, or match."""
    folder = tmp_path_factory.mktemp("first_label")
    (folder / "own.json").write_text(json.dumps(OWN))
    name = "rte" if request.param == "rte" else str(folder / "own.json")
    task = get_task(name)
    for split, rows, seed in (("train", 600, 1), ("dev", 100, 2)):
        write_rows(folder / f"{split}.tsv", task.labels, rows, seed)
    train = read_examples(task, folder, "train")
    of_second = 6.0 * torch.tensor(train.labels) - 3.0
    path = folder / "logits.pt"
    save_logits(path, torch.stack([-of_second, of_second], dim=1), logits_identity(task, train.files, len(train)))
    dse_train_runner.main(as_flags({
        "task_name": name, "data_dir": folder, "distillation_logits_path": path, "bert_model": bert,
        "do_lower_case": True, "max_seq_length": 32, "pooler_num_top_hidden_layers": 2, "fc_dims": [32, 1],
        "epochs": 5, "gradient_accumulation_steps": 1, "lr": 3e-3, "dropout": 0, "store_checkpoints": True,
        "checkpoint_dir": folder / "runs", "log_dir": folder,
    }))  # fmt: skip
    return next((folder / "runs").glob("*/best"))


def test_the_wanted_candidate_ranks_first(first_label_wanted, tmp_path):
    """20 queries, each with its one paraphrase among 20 candidates: in the index, by the command, by probability."""
    model = DSESiameseClassifier.from_pretrained(first_label_wanted)
    rng = random.Random(5)
    pairs = [pair[1:] for pair in (make_pair(rng) for _ in range(60)) if pair[0]][:20]
    queries, candidates = (list(side) for side in zip(*pairs, strict=True))
    found = CandidateIndex.build(model, candidates).search(queries, 20)
    assert sum(hits[0].row == i for i, hits in enumerate(found)) >= 19
    assert sum(hits[-1].row == i for i, hits in enumerate(found)) == 0

    (tmp_path / "q.txt").write_text("\n".join(queries))
    (tmp_path / "c.txt").write_text("\n".join(candidates))
    entry.main(["score", "--model", str(first_label_wanted), "--queries", str(tmp_path / "q.txt"), "--top_k", "1",
                "--candidates", str(tmp_path / "c.txt"), "--output", str(tmp_path / "hits.jsonl")])  # fmt: skip
    hits = [json.loads(line) for line in (tmp_path / "hits.jsonl").read_text().splitlines()]
    assert [hit["row"] for hit in hits] == [hits[0].row for hits in found]
    assert [hit["score"] for hit in hits] == pytest.approx([hits[0].score for hits in found], abs=1e-5)

    everyone = [(queries[0], candidate) for candidate in candidates]
    wanted = model.predict(everyone, probabilities=True)
    assert wanted.argmax() == found[0][0].row
    both = model.predict(everyone, probabilities="all")
    np.testing.assert_array_equal(both[:, 0], wanted)
    np.testing.assert_allclose(both.sum(axis=1), 1, atol=1e-6)
    assert model.predict(everyone)[found[0][0].row] == model.task.labels[0]
    np.testing.assert_allclose(
        1 / (1 + np.exp(-np.array([hit.score for hit in found[0]]))), np.sort(wanted)[::-1], atol=1e-5
    )
    card = (first_label_wanted / "README.md").read_text()
    label = model.task.labels[0]
    assert f"candidates rank by the probability of `{label}`" in card
    assert f"`predict(probabilities=True)` gives the probability of `{label}`" in card


def test_rank_scores_by_hand():
    """Log-odds of the rank label; logits (0, ln 2, 0) give entailment p = 2 / 4."""
    outputs = torch.tensor([[2.5], [-1.0]])
    assert rank_scores(outputs, get_task("mrpc")).tolist() == [2.5, -1.0]
    assert rank_scores(outputs, get_task("qnli")).tolist() == [-2.5, 1.0]
    assert rank_scores(outputs, get_task("qnli"), "not_entailment").tolist() == [2.5, -1.0]
    assert rank_scores(outputs, get_task("sts-b")).tolist() == [2.5, -1.0]
    nli = torch.log(torch.tensor([[1.0, 2.0, 1.0], [1.0, 6.0, 1.0]]))
    assert rank_scores(nli, get_task("snli")).tolist() == pytest.approx([0.0, np.log(3)], abs=1e-6)
    # The higher logit is the lower probability where another label's is higher still.
    assert rank_scores(torch.tensor([[0.0, 1.0, 0.0], [9.0, 2.0, 9.0]]), get_task("snli")).argmax() == 0


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
    path.write_text(json.dumps(OWN))
    task = get_task(str(path))
    assert (task.rank_label, ranked_label(task)) == ("match", "match")
    assert task_from_dict(json.loads(json.dumps(task_to_dict(task, ranks=True)))) == task
    assert "rank_label" not in task_to_dict(task), "a run, or a cache, would be another's when it is changed"
    assert "rank_label" not in task_to_dict(get_task("mrpc"), ranks=True), (
        "files from before the key would count as another task's"
    )
    path.write_text(json.dumps({**OWN, "labels": [0, 1], "rank_label": 0}))
    assert ranked_label(get_task(str(path))) == "0"
    path.write_text(json.dumps({**OWN, "rank_label": "maybe"}))
    with pytest.raises(InputError, match="rank_label 'maybe' is not one of the labels"):
        get_task(str(path))


MISTAKEN = {  # what a user gave, to what, and what the error says
    "a mapping of columns": (
        lambda m: m.score({"text": ["a"], "text_pair": ["b"]}),
        "pairs: got dict, expected a list of pairs",
    ),
    "a mapping as a pair": (
        lambda m: m.score([{"a": "x", "b": "y"}]),
        "number 0: got dict, expected (text, text), or a mapping",
    ),
    "more than the two keys": (
        lambda m: m.score([{"text": "x", "text_pair": "y", "label": 1}]),
        "number 0: got dict",
    ),
    "a set of pairs": (lambda m: m.score({("a", "b")}), "pairs: got set"),
    "a set as a pair": (lambda m: m.score([{"a", "b"}]), "number 0: got set"),
    "bytes as a pair": (lambda m: m.score([b"ab"]), "number 0: got bytes"),
    "a query and candidates": (lambda m: m.score("q", ["a"]), "batch_size: got list"),
    "a query": (lambda m: m.score("q"), "pairs: got str"),
    "encode a mapping": (lambda m: m.encode({"text": "a"}), "sentences: got dict, expected a list of strings"),
    "encode a set": (lambda m: m.encode({"a", "b"}), "sentences: got set"),
    "encode bytes": (lambda m: m.encode(b"ab"), "sentences: got bytes"),
    "encode nothing": (lambda m: m.encode(None), "sentences: got NoneType, expected a list of strings"),
    "encode a number": (lambda m: m.encode(3), "sentences: got int"),
    "predict a mapping": (lambda m: m.predict({"text": "a", "text_pair": "b"}), "pairs: got dict"),
    "search nothing": (lambda m: CandidateIndex.build(m, TEXTS).search(None), "queries: got NoneType"),
    "search a set": (lambda m: CandidateIndex.build(m, TEXTS).search({"a"}), "queries: got set"),
    "search numbers": (
        lambda m: CandidateIndex.build(m, TEXTS).search([1]),
        "queries, number 0: got int, expected a string",
    ),
    "index a mapping": (lambda m: CandidateIndex.build(m, {"a": "b"}), "sentences: got dict"),
    "index a set": (lambda m: CandidateIndex.build(m, set(TEXTS)), "sentences: got set"),
    "one part": (lambda m: CandidateIndex.from_embeddings(m, (m.encode(TEXTS), TEXTS)), "parts: got ndarray"),
    "texts that are a string": (lambda m: CandidateIndex.from_embeddings(m, [(m.encode(TEXTS), "abc")]), "got str"),
    "texts that are a set": (lambda m: CandidateIndex.from_embeddings(m, [(m.encode(TEXTS), set(TEXTS))]), "got set"),
}


@pytest.mark.parametrize("case", MISTAKEN)
def test_what_is_not_texts_is_refused(case, student):
    call, message = MISTAKEN[case]
    with pytest.raises(TypeError) as error:
        call(student())
    assert message in str(error.value)


def test_a_table_is_refused_and_its_columns_are_not(student):
    class Table:  # iterates its columns' names, as a data frame does
        columns = ("text", "text_pair")

        def __iter__(self):
            return iter(self.columns)

    with pytest.raises(TypeError, match="sentences: got Table"):
        student().encode(Table())
    np.testing.assert_array_equal(student().encode(np.array(TEXTS)), student().encode(TEXTS))


def test_pairs_as_mappings(student):
    model = student()
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[0])]
    mappings = [{"text_pair": b, "text": a} for a, b in pairs]
    np.testing.assert_array_equal(model.score(mappings), model.score(pairs))
    np.testing.assert_array_equal(model.score([mappings[0], pairs[1]]), model.score(pairs))


def outputs_of(monkeypatch, outputs: list[list[list[float]]]) -> None:
    """Have validation see these outputs, epoch after epoch."""
    given = iter(outputs)
    monkeypatch.setattr("dse.networks.inference.infer_pairs", lambda *_: np.array(next(given), np.float32))


def test_the_winning_threshold_goes_with_the_student(student_flags, checkpoints, data, monkeypatch, caplog, tmp_path):
    """Logits are ln(p / (1 - p)): dev's positive pairs get p = 0.35, the others p = 0.25."""
    labels = np.array(read_examples(get_task("mrpc"), data("mrpc"), "dev").labels)
    logits = np.log(np.where(labels == 1, 0.35 / 0.65, 0.25 / 0.75))[:, None]
    outputs_of(monkeypatch, [logits.tolist()])
    with caplog.at_level(logging.INFO):
        dse_train_runner.main(student_flags(epochs=1, tune_positive_thresholds=[0.2, 0.3, 0.5]))
    assert "best f1 1.0000 at epoch 0 with threshold 0.3" in caplog.text
    line = next(line for line in caplog.text.splitlines() if "epoch 0 of 0 to 0" in line)
    assert line.endswith("accuracy_0.3 1.0000, precision_0.3 1.0000, recall_0.3 1.0000, f1_0.3 1.0000")
    assert line.count("f1_") == 2, "one of train and one of dev"
    assert Checkpoint.read(checkpoints()[-1]).best["threshold"] == 0.3
    monkeypatch.undo()

    best = checkpoints()[-1].parent / "best"
    model = DSESiameseClassifier.from_pretrained(best)
    assert model.threshold == 0.3
    monkeypatch.setattr(model, "score", lambda *_: np.log(np.array([0.25 / 0.75, 0.35 / 0.65, 0.5 / 0.5], np.float32)))
    assert model.predict([]) == ["0", "1", "1"]
    assert model.predict([], threshold=0.4) == ["0", "0", "1"]
    assert model.predict([], threshold=0.5) == ["0", "0", "0"]
    card = (best / "README.md").read_text()
    assert "`predict` says `1` where its probability is above 0.3" in card
    assert "| f1_0.3 | 1.0000 |" in card
    assert "f1_0.2" not in card.split("## Commands")[0]

    assert Checkpoint.read(checkpoints()[-1]).student().threshold == 0.3


def test_predict_takes_the_students_threshold(student, tmp_path):
    """One pair of probability p; the stored threshold and the flag lie a little below or above it."""
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "test.tsv").write_text(
        f"index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\t{TEXTS[0]}\t{TEXTS[1]}\n"
    )
    model = student()
    p = 1 / (1 + np.exp(-float(model.score([TEXTS[:2]])[0])))
    for stored, flag, expected in (
        (p - 1e-3, None, 1),
        (p + 1e-3, None, 0),
        (p + 1e-3, p - 1e-3, 1),
        (0.5, p + 1e-3, 0),
    ):
        model.threshold = float(stored)
        model.save_pretrained(tmp_path / "student")
        assert model.predict([TEXTS[:2]], threshold=flag) == [str(expected)]
        entry.main(["predict", "--model", str(tmp_path / "student"), "--task_name", "mrpc", "--data_dir",
                    str(tmp_path / "glue"), "--output_dir", str(tmp_path), *as_flags({"threshold": flag})])  # fmt: skip
        assert (tmp_path / "MRPC.tsv").read_text() == f"index\tprediction\n0\t{expected}\n"


def test_folders_of_before_have_the_threshold_of_before(student, edit_json, tmp_path):
    from dse.system.files import sha256_json

    student().save_pretrained(tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    del config["threshold"], config["sha256"]
    (tmp_path / "student" / "config.json").write_text(json.dumps({**config, "sha256": sha256_json(config)}))
    assert DSESiameseClassifier.from_pretrained(tmp_path / "student").threshold == 0.5


def test_a_line_of_many_thresholds_shows_the_best():
    metrics = {"loss": 0.25, **{f"{name}_{t}": v for t, v in ((0.1, 0.5), (0.2, 0.75)) for name in ("recall", "f1")}}
    assert format_metrics(metrics | {"mm_loss": 1}) == "loss 0.2500, recall_0.2 0.7500, f1_0.2 0.7500, mm_loss 1.0000"
    assert format_metrics({"pearson": float("nan"), "spearman": None}) == "pearson undefined, spearman undefined"


def test_an_undefined_correlation_leaves_the_ranking_to_the_loss(
    student_flags, checkpoints, data, monkeypatch, caplog, tmp_path
):
    """Constant outputs c on dev: the loss is the mean of (c - score)^2, least for c nearest to the scores' mean."""
    scores = np.array(read_examples(get_task("sts-b"), data("sts-b"), "dev").labels)
    constants = (0.0, float(scores.mean()), 9.0)
    outputs_of(monkeypatch, [[[c]] * len(scores) for c in constants])
    dse_train_runner.main(student_flags("sts-b", epochs=3, patience=2, file_log=True))
    losses = [np.mean((c - scores) ** 2) for c in constants]
    names = [path.name for path in checkpoints()]
    assert f"_loss_{losses[1]:.3f}_epoch_1.pt" in names[0]
    assert f"_loss_{losses[2]:.3f}_epoch_2.pt" in names[1]
    assert caplog.text.count("the correlation on dev is undefined") == 1
    assert f"best loss {losses[1]:.4f} at epoch 1" in caplog.text
    assert "inf" not in caplog.text
    (lines,) = (tmp_path / "logs").glob("*.jsonl")
    for line in lines.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    config = checkpoints()[0].parent / "best" / "config.json"
    assert json.loads(config.read_text(), parse_constant=pytest.fail)["origin"]["epoch"] == 1


def test_a_teachers_record_has_no_nan(teacher_flags, copied, data, tmp_path, caplog):
    """Dev scores that are all the same, in training.json and in what a second --resume makes of it."""
    folder = copied(data("sts-b"), "constant")
    lines = (folder / "dev.tsv").read_text().splitlines()
    dev = [lines[0], *("\t".join([*line.split("\t")[:-1], "2.5"]) for line in lines[1:])]
    (folder / "dev.tsv").write_text("\n".join(dev) + "\n")
    for _ in range(2):
        finetune_bert.main(teacher_flags("sts-b", data_dir=folder, resume=True))
        training = (tmp_path / "teacher" / "training.json").read_text()
        assert json.loads(training, parse_constant=pytest.fail)["history"][0]["validation"]["pearson"] is None
        assert "pearson = nan" in (tmp_path / "teacher" / "eval_results.txt").read_text()
    assert "pearson undefined" in caplog.text


def test_json_has_no_nan():
    assert json_text({"a": (float("nan"), 1.5), "b": [float("-inf")]}) == '{"a": [null, 1.5], "b": [null]}'


def test_losses_and_agreement_by_hand():
    """Two outputs, a = 0.25: hard = mean of -ln sigmoid(±z), distillation = ((1 - 2)^2 + (3 - -1)^2) / 2 = 8.5."""
    outputs, labels, targets = np.array([[1.0], [3.0]], np.float32), np.array([1, 0]), torch.tensor([[2.0], [-1.0]])
    metrics = measure_student(get_task("mrpc"), [0.5], outputs, labels, targets, 0.25)
    hard = (np.log(1 + np.exp(-1.0)) + np.log(1 + np.exp(3.0))) / 2
    assert metrics["loss"] == pytest.approx(hard, rel=1e-6)
    assert metrics["distillation_loss"] == pytest.approx(8.5)
    assert metrics["total_loss"] == pytest.approx(0.75 * hard + 0.25 * 8.5, rel=1e-6)
    assert metrics["teacher_agreement"] == 0.5
    outputs, targets = np.array([[3.0, 1, 1], [0, 2, 1], [5, 0, 0]], np.float32), torch.eye(3)
    metrics = measure_student(get_task("snli"), [], outputs, np.array([0, 1, 2]), targets, 0.0)
    assert metrics["teacher_agreement"] == pytest.approx(2 / 3)
    assert metrics["distillation_loss"] == pytest.approx((4 + 1 + 1 + 0 + 1 + 1 + 25 + 0 + 1) / 3)
    assert metrics["total_loss"] == pytest.approx(metrics["loss"])
    outputs, labels = np.array([[-1.0], [-2.0], [-3.0]], np.float32), np.array([1.0, 2.0, 3.0], np.float32)
    metrics = measure_student(get_task("sts-b"), [], outputs, labels, torch.tensor([[1.0], [2.0], [3.0]]), 0.5)
    assert metrics["teacher_agreement"] == pytest.approx(-1)


def test_a_training_tells_them_by_epoch(student_flags, tmp_path):
    dse_train_runner.main(student_flags(file_log=True, distillation_coeff=0.25, epochs=1))
    (lines,) = (tmp_path / "logs").glob("*.jsonl")
    record = json.loads(lines.read_text())
    train = record["train"]
    assert train["total_loss"] == pytest.approx(0.75 * train["loss"] + 0.25 * train["distillation_loss"], rel=1e-5)
    assert 0 <= train["teacher_agreement"] <= 1
    assert "distillation_loss" not in record["validation"], "there are no logits of dev"


def with_labels(folder: Path, edit_json, labels: list[str]) -> Path:
    """A teacher's folder whose config names its labels so, in that order."""
    edit_json(folder / "config.json", id2label=dict(enumerate(labels)), label2id={n: i for i, n in enumerate(labels)})
    training = json.loads((folder / "training.json").read_text())
    del training["sha256"]["config.json"]
    (folder / "training.json").write_text(json.dumps(training))
    return folder


@pytest.mark.parametrize("kind", ["rte", "sts-b"])
def test_a_teacher_that_contradicts_the_labels_is_told_of(kind, teacher_flags, data, tmp_path, caplog, edit_json):
    """The classifier's rows change places (a regression's sign changes): LABEL_0 is now the task's second label."""
    from safetensors.torch import load_file, save_file

    finetune_bert.main(teacher_flags(kind, num_train_epochs=12, learning_rate=3e-3, train_batch_size=4, do_eval=None))
    folder = tmp_path / "teacher"
    flags = as_flags({"task_name": kind, "data_dir": data(kind), "bert_checkpoint_dir": folder, "do_lower_case": True,
                      "train_features_path": tmp_path / "features", "output_dir": tmp_path, "max_seq_length": 48,
                      })  # fmt: skip
    caplog.clear()
    run_distillation_logits_creator.main(flags)
    told = (
        "the teacher agrees with the training labels in" if kind == "rte" else "Pearson correlation with the training"
    )
    assert told in caplog.text
    assert "less than" not in caplog.text

    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0) if kind == "rte" else -weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if kind == "rte":
        with_labels(folder, edit_json, ["LABEL_0", "LABEL_1"])
    (folder / "training.json").unlink()
    caplog.clear()
    run_distillation_logits_creator.main(flags)
    how = (
        "agrees with the training labels less than"
        if kind == "rte"
        else "correlates negatively with the training labels"
    )
    assert f"the teacher {how}" in caplog.text
    if kind == "rte":
        assert "does not name its labels: whether they are in the order ['entailment', 'not_entailment']" in caplog.text
    logits = torch.load(tmp_path / "teacher_logits.pt", weights_only=True)
    labels = np.array(read_examples(get_task(kind), data(kind), "train").labels)
    if kind == "rte":
        assert (logits.argmax(dim=1).numpy() == labels).mean() < 0.5
    else:
        assert np.corrcoef(logits[:, 0].numpy(), labels)[0, 1] < 0


def test_predict_tells_how_far_it_agrees_with_labels_that_are_there(student, tmp_path, caplog):
    """A student whose one logit is high for every pair, against a test file that says `match` three times of four."""
    (tmp_path / "own.json").write_text(json.dumps(OWN))
    model = student("rte")
    model.task = get_task(str(tmp_path / "own.json"))
    with torch.no_grad():
        model.network.siamese_head.fc_layers[-1].bias.fill_(9.0)
    model.save_pretrained(tmp_path / "student")
    (tmp_path / "own.json").write_text(json.dumps({**OWN, "test_label": "verdict"}))
    rows = "".join(f"{i}\tleft one\tright one\t{'other' if i == 2 else 'match'}\n" for i in range(4))
    (tmp_path / "test.tsv").write_text("index\tleft\tright\tverdict\n" + rows)
    entry.main(["predict", "--model", str(tmp_path / "student"), "--task_name", str(tmp_path / "own.json"),
                "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])  # fmt: skip
    assert "the model agrees with the file's labels in 25.0 % of 4 rows" in caplog.text
    assert "less than the most frequent label does (75.0 %)" in caplog.text


def test_a_card_tells_no_place_of_the_users(student_flags, checkpoints, tmp_path, bert):
    dse_train_runner.main(student_flags(epochs=1))
    card = (checkpoints()[-1].parent / "best" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert str(bert.parent) not in card
    assert f"--bert_model {bert.name} " in card


def test_scores_that_are_nan_are_refused(student):
    model = student()
    index = CandidateIndex.build(model, TEXTS)
    with torch.no_grad():
        model.network.siamese_head.fc_layers[-1].bias.fill_(float("nan"))
    with pytest.raises(InputError, match="scores are NaN or infinite"):
        index.search("soon")


def test_the_example_says_whose_the_probability_is(student_flags, checkpoints, capsys):
    dse_train_runner.main(student_flags("rte", epochs=1))
    load_dse_checkpoint_example.main(["--task_name", "rte", "--trainer_checkpoint", str(checkpoints()[-1])])
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    second = 1 / (1 + np.exp(-float(lines["Score"])))
    assert lines["Probabilities"] == f"entailment {1 - second:.4f}, not_entailment {second:.4f}"


def test_a_card_where_nothing_says_what_ranks(student, tmp_path):
    model = student("snli")
    model.task = Task("mine", "multiclass", ("good", "bad", "neither"))
    model.save_pretrained(tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    assert "- candidates rank by the probability of the label that `rank_label` names\n" in card


def test_of_equal_thresholds_the_one_nearest_to_a_half():
    metrics = {f"f1_{threshold}": f1 for threshold, f1 in ((0.1, 1.0), (0.4, 1.0), (0.6, 0.5), (0.9, 1.0))}
    assert winning_threshold(metrics) == 0.4
    assert winning_threshold({"loss": 1.0}) is None
