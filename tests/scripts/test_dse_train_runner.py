"""dse_train_runner.py: every task of pairs, outputs, and what repeats bit for bit."""

import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NAMED, PAIR_TASKS, STAMP, assert_same_run, own_task
from safetensors.torch import load_file

import dse_train_runner
from dse.data.features import separate_features
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.experiments.synthetic import make_pair
from dse.models import DSESiameseClassifier
from dse.networks.batches import Batches
from dse.networks.inference import infer, infer_pairs
from dse.storage.checkpoint import Checkpoint
from dse.storage.logits import logits_identity, save_logits
from dse.training.epoch_plan import epoch_order
from dse.training.kinds import fit_cosines, measure_student
from dse.training.trainer import Trainer


@pytest.mark.parametrize("name", PAIR_TASKS)
def test_every_pair_task_trains_a_student(name, student_flags, checkpoints):
    dse_train_runner.main(student_flags(name))
    task = get_task(name)
    checkpoint = vars(Checkpoint.read(checkpoints()[-1]))
    validation = checkpoint["trainer"]["history"][-1]["validation"]
    own = {
        "binary": {"loss", "accuracy_0.5", "precision_0.5", "recall_0.5", "f1_0.5"},
        "multiclass": {"loss", "accuracy"},
        "regression": {"loss", "pearson", "spearman"},
    }[task.kind]
    prefixes = {"mnli": ["mm_"], "snli": ["test_"]}.get(name, [])
    assert set(validation) == own | {prefix + metric for prefix in prefixes for metric in own}
    score = {"binary": "f1", "multiclass": "accuracy", "regression": "pearson"}[task.kind]
    assert re.fullmatch(rf"bert_distillation_{STAMP}_{score}_-?\d\.\d{{3}}_epoch_1\.pt", checkpoints()[-1].name)
    assert re.fullmatch(rf"bert_distillation_{STAMP}", checkpoints()[-1].parent.name)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.read(path).model


def test_two_runs_with_one_seed_are_the_same_and_two_seeds_are_not(student_flags, checkpoints, tmp_path):
    for folder, seed in (("one", 3), ("two", 3), ("other", 4)):
        dse_train_runner.main(student_flags(random_seed=seed, checkpoint_dir=tmp_path / folder))
    one, two, other = (checkpoints(folder)[-1] for folder in ("one", "two", "other"))
    assert_same_run(one, two)
    assert not torch.equal(*(weights_of(path)["siamese_head.fc_layers.0.weight"] for path in (one, other)))


def test_a_frozen_encoder_stays_as_it_was(student_flags, checkpoints, bert):
    dse_train_runner.main(student_flags(freeze_bert=True, pooler_type="cls", additional_embedding_layer_size=6))
    trained, start = weights_of(checkpoints()[-1]), load_file(bert / "model.safetensors")
    frozen = {name: tensor for name, tensor in trained.items() if name.startswith("dse_model.bert.bert.")}
    assert len(frozen) == len(start)
    assert all(torch.equal(tensor, start[name.removeprefix("dse_model.bert.bert.")]) for name, tensor in frozen.items())
    moments = Checkpoint.read(checkpoints()[-1]).trainer["optimizer"]["state"]
    assert len(moments) == len(trained) - len(frozen)
    dse_train_runner.main(
        student_flags(freeze_bert=True, pooler_type="cls", additional_embedding_layer_size=6, epochs=3,
                      trainer_checkpoint=checkpoints()[-1])
    )  # fmt: skip
    again = weights_of(checkpoints()[-1])
    assert all(torch.equal(again[name], frozen[name]) for name in frozen)
    assert not torch.equal(again["siamese_head.fc_layers.0.weight"], trained["siamese_head.fc_layers.0.weight"])


@pytest.mark.parametrize(("name", "pooler"), [("sts-b", "concat_top_mean"), ("mrpc", "mean_top_mean"), ("snli", "cls")])
def test_a_residual_head_begins_as_the_encoders_cosine(
    name, pooler, student_flags, checkpoints, student, data, monkeypatch, caplog
):
    """Its outputs before the first update are the cosines of the pre-trained encoder, fitted to the labels.

    The cosine is that of the top layer alone, of two that are side by side. The first update has rate 0.
    """
    before = []
    monkeypatch.setattr(Trainer, "update", lambda self, *_: before.append(infer_of(self)) or sys.exit())
    monkeypatch.setattr(dse_train_runner, "_PAIRS_FITTED", 16)
    task, rows = get_task(name), read_examples(get_task(name), data(name), "train")

    def infer_of(trainer):
        return infer_pairs(trainer.model, trainer.plan.batches, 8, trainer.device, "now")

    with pytest.raises(SystemExit):
        dse_train_runner.main(student_flags(name, siamese_head_type="residual", pooler_type=pooler, random_seed=5))
    size = 1 if pooler.startswith("concat") else 2
    encoder = student(name, pooler_type=pooler, pooler_num_top_hidden_layers=size)
    u, v = (torch.from_numpy(encoder.encode(texts)) for texts in rows.sides)
    cosines = torch.cosine_similarity(u, v)
    fitted = epoch_order(len(rows), 5, 0)[:16]
    scale, offset = fit_cosines(task, cosines.numpy()[fitted], np.array(rows.labels)[fitted])
    np.testing.assert_allclose(before[0], cosines[:, None] * scale + offset, rtol=1e-3, atol=1e-3)
    (line,) = [line for line in caplog.messages if line.startswith("the head begins with")]
    assert line.endswith("which fits the labels of 16 training pairs best")
    assert f"{scale[0]:.2f}"[:-1] in line


def test_early_stopping(student_flags, checkpoints, monkeypatch, caplog):
    scores = iter([0.5, 0.9, 0.8, 0.7, 0.99])
    monkeypatch.setattr("dse.training.kinds.Binary.score", lambda self, metrics: ("f1", metrics["given"]))
    monkeypatch.setattr(dse_train_runner, "validate", lambda *_: {"given": next(scores)})
    dse_train_runner.main(student_flags(epochs=9, patience=2))
    assert len(Checkpoint.read(checkpoints()[-1]).trainer["history"]) == 4
    dse_train_runner.main(student_flags(epochs=9, patience=2, trainer_checkpoint=checkpoints()[-1]))
    assert next(scores) == 0.99, "a run that had stopped early was trained on"


def test_the_checkpoint_alone_gives_the_validation_metrics_again(student_flags, checkpoints, data):
    dse_train_runner.main(student_flags(additional_embedding_layer_size=6, tune_positive_thresholds=[0.4, 0.5]))
    whole = Checkpoint.read(checkpoints()[-1])
    student, checkpoint = whole.student(), vars(whole)
    task = get_task("mrpc")
    features = separate_features(task, read_examples(task, data("mrpc"), "dev"), student.tokenizer, 32)
    batches = Batches(features, "max", 32)  # the run's own were packed
    outputs = infer(student.network, batches, 7, torch.device("cpu"), "again")
    again = measure_student(task, (0.4, 0.5), outputs, features.labels)
    assert again == pytest.approx(checkpoint["trainer"]["history"][-1]["validation"], abs=1e-5)


def test_schedule_in_updates(student_flags, checkpoints, tmp_path):
    """24 pairs, batches of 8 by 2: 2 updates an epoch, 4 in all; the original's schedule counts 3 * 2 batches."""
    flags = {"lr": 1.0e-4, "warmup_proportion": 0.0}
    dse_train_runner.main(student_flags(**flags))
    rates = [record["rate"] for record in Checkpoint.read(checkpoints()[-1]).trainer["history"]]
    assert rates == pytest.approx([1e-4 * (1 - 2 / 6), 1e-4 * (1 - 4 / 6)])
    dse_train_runner.main(student_flags(**flags, schedule_in_updates=True, checkpoint_dir=tmp_path / "updates"))
    rates = [record["rate"] for record in Checkpoint.read(checkpoints("updates")[-1]).trainer["history"]]
    assert rates == pytest.approx([1e-4 * (1 - 2 / 4), 0.0])


def test_logs_plots_and_evaluation_before_training(student_flags, tmp_path, caplog):
    flags = {"file_log": True, "plot_metrics": True, "plots_dir": tmp_path / "plots", "experiment_name": "mine"}
    dse_train_runner.main(student_flags(**flags, run_evaluation_before_fine_tune=True))
    (log,) = (tmp_path / "logs").glob("*.log")
    assert re.fullmatch(rf"mine_{STAMP}\.log", log.name)
    assert "before training: loss" in log.read_text()
    records = [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    plots = {path.name for path in (tmp_path / "plots" / log.stem).iterdir()}
    assert plots == {f"mine_{name}.png" for name in records[0]["train"]}


def test_a_bare_tensor_of_logits_is_taken_with_a_warning(student_flags, copied, logits, caplog):
    folder = copied(logits("mrpc").parent)
    (folder / "mrpc_logits.json").unlink()
    dse_train_runner.main(student_flags(distillation_logits_path=folder / "mrpc_logits.pt", epochs=1))
    assert "no mrpc_logits.json beside it" in caplog.text


@pytest.mark.parametrize("head", ["concat", "residual"])
def test_a_symmetric_student(head, student_flags, checkpoints, data, caplog):
    """Its scores are the means of both orders', and the log has the difference."""
    with caplog.at_level("INFO", "dse"):
        dse_train_runner.main(student_flags(symmetric=True, siamese_head_type=head, head_lr=0.01))
    model = DSESiameseClassifier.from_pretrained(checkpoints()[-1])
    dev = read_examples(get_task("mrpc"), data("mrpc"), "dev")
    u, v = (model.encode(side, convert_to="tensor") for side in dev.sides)
    layers = model.network.siamese_head
    with torch.no_grad():
        mean = layers(u, v)
        layers.symmetric = False
        one, other = layers(u, v), layers(v, u)
    torch.testing.assert_close(mean, (one + other) / 2)
    assert (one - other).abs().max() > 1e-4
    difference = (one - other).abs().mean()
    assert f"two orders differ by {difference:.3f} on average" in caplog.text


def test_labels_alone_need_no_logits(student_flags, checkpoints, tmp_path):
    """The same student as with logits, which then only give two more metrics."""
    flags = {"distillation_coeff": 0, "siamese_head_type": "residual"}
    dse_train_runner.main(student_flags(**flags, checkpoint_dir=tmp_path / "with"))
    argv = student_flags(**flags, checkpoint_dir=tmp_path / "without")
    place = argv.index("--distillation_logits_path")
    del argv[place : place + 2]
    dse_train_runner.main(argv)
    one, two = (checkpoints(folder)[-1] for folder in ("with", "without"))
    assert all(torch.equal(weights, weights_of(two)[name]) for name, weights in weights_of(one).items())
    assert Checkpoint.read(two).data["logits"] is None
    assert "SHA-256 of the logits" not in (two.parent / "best" / "README.md").read_text()
    train = Checkpoint.read(two).trainer["history"][-1]["train"]
    assert "loss" in train
    assert "teacher_agreement" not in train
    dse_train_runner.main([*argv, "--trainer_checkpoint", str(two), "--epochs", "3"])
    assert len(Checkpoint.read(checkpoints("without")[-1]).trainer["history"]) == 3


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_rows_without_label(kind, student_flags, checkpoints, tmp_path, caplog, refused):
    """They count in the distillation term alone; a share of those with a label serves as dev."""
    rng, lines = random.Random(0), ["q\ta\tgood"]
    for row in range(60):
        positive, *pair = make_pair(rng)
        label = "" if row % 3 == 0 else ["no", "yes"][positive] if kind == "binary" else str(positive + row / 100)
        lines.append("\t".join([*pair, label]))
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    task = get_task(
        str(own_task(tmp_path, **{**NAMED, "kind": kind, "labels": ["no", "yes"][: 2 * (kind == "binary")]}))
    )
    rows = read_examples(task, tmp_path, "train")
    assert len(rows) == 56
    values = torch.randn(56, task.num_logits, generator=torch.Generator().manual_seed(0))
    save_logits(tmp_path / "logits.pt", values, logits_identity(task, rows.files, 56))
    flags = {"task_name": tmp_path / "mine.json", "data_dir": tmp_path, "fc_dims": [8, 1]}
    flags |= {"distillation_logits_path": tmp_path / "logits.pt", "siamese_head_type": "residual"}
    with caplog.at_level("INFO", "dse"):
        dse_train_runner.main(student_flags("mrpc", **flags))
    assert "20 of 56 training rows have no label, and count in the distillation term alone" in caplog.text
    assert "which fits the labels of 36 training pairs best" in caplog.text
    assert "4 of 60 rows serve as dev" in caplog.text
    checkpoint = Checkpoint.read(checkpoints()[-1])
    assert len(checkpoint.data["files"]["dev"][0]["rows"]) == 4
    assert all(np.isfinite(value) for value in checkpoint.trainer["history"][-1]["train"].values())
    lines[1:] = [line.rpartition("\t")[0] + "\t" for line in lines[1:]]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "dev.tsv").write_text("q\ta\tgood\nhow\tso\t" + ("yes" if kind == "binary" else "1") + "\n")
    rows = read_examples(task, tmp_path, "train")
    save_logits(tmp_path / "logits.pt", torch.randn(60, task.num_logits), logits_identity(task, rows.files, 60))
    line = refused(dse_train_runner.main, student_flags("mrpc", **flags))
    assert "train.tsv: no row has a label; only a student with --distillation_coeff 1 needs none" in line
    with caplog.at_level("INFO", "dse"):
        dse_train_runner.main(student_flags("mrpc", **flags, distillation_coeff=1))
    assert "the head begins with the cosine, as there are no labels to fit it to" in caplog.text
