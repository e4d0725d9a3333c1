"""run_distillation_logits_creator.py: logits in file order that go on where they stopped."""

import json
import os
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import STAMP, as_flags, flip, results_of, stopped
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import dse_train_runner
import finetune_bert
import run_distillation_logits_creator
from dse.data.features import joint_features
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.models import DSESiameseClassifier
from dse.networks.batches import Batches
from dse.networks.teacher import Teacher, load_teacher


def test_a_foreign_training_json_beside_a_teacher_is_nothing_to_the_logits(creator, tmp_path):
    (tmp_path / "teacher" / "training.json").write_text('{"sha256": ["mine"]}')
    run_distillation_logits_creator.main(creator)
    commands = json.loads((tmp_path / "teacher_logits.json").read_text())["commands"]
    assert [script for script, _ in commands] == ["run_distillation_logits_creator.py"]


@pytest.fixture
def creator(data, teacher_flags, tmp_path):
    """Flags of run_distillation_logits_creator.py over a teacher made for the test; several steps for 24 pairs."""
    finetune_bert.main(teacher_flags(do_eval=False))
    values = {"task_name": "mrpc", "data_dir": data("mrpc"), "do_lower_case": True, "max_seq_length": 48}
    values |= {"train_features_path": tmp_path / "features", "bert_checkpoint_dir": tmp_path / "teacher"}
    return as_flags({**values, "output_dir": tmp_path, "batch_size": 1, "save_every": 3})


def stop_forward(monkeypatch, number: int) -> list[int]:
    """Send SIGTERM within the teacher's n-th step; the list grows with each step."""
    original, calls = Teacher.forward, []

    def counted(*args, **inputs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **inputs)

    monkeypatch.setattr(Teacher, "forward", counted)
    return calls


def test_logits_go_on_where_they_stopped(creator, tmp_path, monkeypatch, capsys):
    run_distillation_logits_creator.main(creator)
    unbroken = (tmp_path / "teacher_logits.pt").read_bytes()
    (tmp_path / "teacher_logits.pt").unlink()
    with monkeypatch.context() as patched:
        before = stop_forward(patched, 5)
        code, line = stopped(run_distillation_logits_creator.main, creator, capsys)
    assert (code, len(before)) == (143, 5)
    assert "outputs so far are in" in line
    assert not (tmp_path / "teacher_logits.pt").exists()
    with monkeypatch.context() as patched:
        after = stop_forward(patched, 0)
        run_distillation_logits_creator.main(creator)
    in_all = stop_forward(monkeypatch, 0)
    assert (tmp_path / "teacher_logits.pt").read_bytes() == unbroken
    assert not (tmp_path / "teacher_logits.partial").exists()
    run_distillation_logits_creator.main(creator)
    assert len(after) == len(in_all) - 5 > 0


def test_logits_that_go_on_with_another_length(creator, tmp_path, monkeypatch, capsys):
    """The ids are the same at both lengths, and the steps are not: no row may be left out between them."""
    path = tmp_path / "teacher_logits.pt"
    run_distillation_logits_creator.main([*creator, "--max_seq_length", "64"])
    unbroken = path.read_bytes()
    path.unlink()
    with monkeypatch.context() as patched:
        stop_forward(patched, 5)
        stopped(run_distillation_logits_creator.main, creator, capsys)
    partial = torch.load(tmp_path / "teacher_logits.partial", weights_only=True)
    assert 0 < partial["done"].sum() < len(partial["done"])
    assert partial["outputs"][~partial["done"]].isnan().all()
    assert partial["outputs"][partial["done"]].isfinite().all()
    run_distillation_logits_creator.main([*creator, "--max_seq_length", "64"])
    assert torch.load(path, weights_only=True).abs().sum(dim=1).min() > 0
    assert path.read_bytes() == unbroken


def test_logits_of_other_work_or_spoiled_ones_are_begun_anew(creator, tmp_path, monkeypatch, capsys, caplog):
    with monkeypatch.context() as patched:
        stop_forward(patched, 4)
        stopped(run_distillation_logits_creator.main, creator, capsys)
    partial = (tmp_path / "teacher_logits.partial").read_bytes()
    run_distillation_logits_creator.main([*creator, "--batch_size", "2"])
    assert "is of other work (data, model or flags): starting over" in caplog.text
    (tmp_path / "teacher_logits.partial").write_bytes(partial)
    flip(tmp_path / "teacher_logits.partial")
    run_distillation_logits_creator.main(creator)
    assert "teacher_logits.partial is corrupt: starting over" in caplog.text


def test_a_spoiled_teacher_is_refused(creator, tmp_path, refused):
    flip(tmp_path / "teacher" / "model.safetensors", 0.9)
    line = refused(run_distillation_logits_creator.main, creator)
    assert "model.safetensors is corrupt or changed: its SHA-256 in training.json is" in line


def test_the_teachers_folder_logits_and_their_identity(teacher_flags, data, tmp_path):
    # 24 pairs, 8 per update by 2 batches of 4: 3 updates an epoch.
    finetune_bert.main(teacher_flags(gradient_accumulation_steps=2, num_train_epochs=2, file_log=True, seed=7))
    results = results_of(tmp_path / "teacher")
    assert results["global_step"] == "6"
    (log,) = (tmp_path / "logs").glob("*.log")
    assert re.fullmatch(rf"run_classifier_mrpc_{STAMP}\.log", log.name)
    records = [json.loads(line) for line in log.with_suffix(".jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    assert float(results["loss"]) == records[-1]["train"]["loss"]
    assert float(results["acc"]) == records[-1]["validation"]["acc"]

    argv = ["--task_name", "mrpc", "--data_dir", data("mrpc"), "--do_lower_case", "--max_seq_length", 48]
    argv += ["--train_features_path", data("mrpc") / "train_tiny_bert_48_mrpc", "--batch_size", 5]
    argv += ["--bert_checkpoint_dir", tmp_path / "teacher", "--output_dir", tmp_path / "logits"]
    run_distillation_logits_creator.main([str(flag) for flag in argv])
    logits = torch.load(tmp_path / "logits" / "teacher_logits.pt", weights_only=True)
    assert (logits.dtype, logits.shape) == (torch.float32, (24, 2))
    about = json.loads((tmp_path / "logits" / "teacher_logits.json").read_text())
    assert (about["task"], about["rows"], about["labels"], about["max_seq_length"]) == ("mrpc", 24, ["0", "1"], 48)

    # The second way: one pair at a time, in file order.
    task = get_task("mrpc")
    teacher = load_teacher(tmp_path / "teacher", task, fine_tuned=True).eval()
    tokenizer = load_tokenizer(tmp_path / "teacher", True, "--bert_model")
    features = joint_features(task, read_examples(task, data("mrpc"), "train"), tokenizer, 48)
    batches = Batches(features)
    with torch.inference_mode():
        singly = torch.cat([teacher(**batches.of_pairs(np.array([i]))) for i in range(24)])
    torch.testing.assert_close(logits, singly, atol=1e-5, rtol=0)


def test_the_finetune_cache_serves_the_logits_stage(teacher_flags, data, tmp_path, caplog):
    finetune_bert.main(teacher_flags())
    argv = ["--task_name", "mrpc", "--data_dir", data("mrpc"), "--do_lower_case", "--max_seq_length", 48]
    argv += ["--train_features_path", data("mrpc") / "train_tiny_bert_48_mrpc", "--output_dir", tmp_path / "logits"]
    caplog.clear()
    run_distillation_logits_creator.main([str(f) for f in [*argv, "--bert_checkpoint_dir", tmp_path / "teacher"]])
    assert "joint features of 24 rows from the cache" in caplog.text


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
        assert "does not name its labels: check that their order is ['entailment', 'not_entailment']" in caplog.text
    logits = torch.load(tmp_path / "teacher_logits.pt", weights_only=True)
    labels = np.array(read_examples(get_task(kind), data(kind), "train").labels)
    if kind == "rte":
        assert (logits.argmax(dim=1).numpy() == labels).mean() < 0.5
    else:
        assert np.corrcoef(logits[:, 0].numpy(), labels)[0, 1] < 0


def test_casing_length_and_cache_are_the_teachers(data, teacher_flags, copied, tmp_path, caplog):
    """Without flags for them, the file is the same as with them; another length is warned of."""
    folder = copied(data("mrpc"), "mine")
    head, *rows = (folder / "train.tsv").read_text().splitlines()
    (folder / "train.tsv").write_text("\n".join([head, *map(str.upper, rows)]) + "\n")
    finetune_bert.main(teacher_flags(data_dir=folder, do_eval=False))
    flags = {"task_name": "mrpc", "data_dir": folder, "bert_checkpoint_dir": tmp_path / "teacher"}
    with caplog.at_level("INFO", "dse"):
        run_distillation_logits_creator.main(as_flags({**flags, "output_dir": tmp_path / "short"}))
    assert f"from the cache {folder / 'train_tiny_bert_48_mrpc'}" in caplog.text
    given = {"do_lower_case": True, "max_seq_length": 48, "train_features_path": tmp_path / "features"}
    run_distillation_logits_creator.main(as_flags({**flags, **given, "output_dir": tmp_path / "long"}))
    files = [(tmp_path / name / "teacher_logits.pt").read_bytes() for name in ("short", "long")]
    assert files[0] == files[1]
    assert json.loads((tmp_path / "short" / "teacher_logits.json").read_text())["max_seq_length"] == 48
    assert "--max_seq_length:" not in caplog.text
    run_distillation_logits_creator.main(as_flags({**flags, "max_seq_length": 24, "output_dir": tmp_path / "other"}))
    assert "--max_seq_length: 24, but the teacher was trained with 48" in caplog.text


@pytest.mark.parametrize(("name", "logits"), [("mrpc", 1), ("mrpc", 2), ("qnli", 1)])
def test_a_teacher_that_was_made_elsewhere(name, logits, bert, data, tmp_path, caplog):
    """A cross-encoder of transformers, or of sentence-transformers, which has one logit for a binary task.

    The logit is that of the label that ranks: the first one of qnli, the second one of mrpc.
    """
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(bert, num_labels=logits).eval()
    torch.nn.init.normal_(model.classifier.weight)
    tokenizer = load_tokenizer(bert, True, "bert")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "elsewhere")
    flags = {"task_name": name, "data_dir": data(name), "bert_checkpoint_dir": tmp_path / "elsewhere"}
    flags |= {"do_lower_case": True, "max_seq_length": 48, "train_features_path": tmp_path / "features"}
    with caplog.at_level("INFO", "dse"):
        run_distillation_logits_creator.main(as_flags({**flags, "output_dir": tmp_path}))
    written = torch.load(tmp_path / "elsewhere_logits.pt", weights_only=True)
    rows = read_examples(get_task(name), data(name), "train")
    inputs = tokenizer(rows.first, rows.second, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits
    if logits == 1:
        zero, label = torch.zeros_like(expected), {"mrpc": "1", "qnli": "entailment"}[name]
        expected = torch.cat([expected, zero] if name == "qnli" else [zero, expected], dim=1)
        assert f"gives one logit, which is taken for that of '{label}'" in caplog.text
    torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-4)
    assert written[:, int(name == "mrpc")].std() > 0.01


def test_each_stage_tells_the_command_that_takes_what_it_wrote(data, teacher_flags, tmp_path, caplog):
    """Pasted as they are, but for the sizes of a tiny BERT, they lead from the teacher to a student."""
    mains = {
        "run_distillation_logits_creator.py": run_distillation_logits_creator,
        "dse_train_runner.py": dse_train_runner,
    }
    with caplog.at_level("INFO", "dse"):
        finetune_bert.main(teacher_flags("snli"))
        tiny = ["--checkpoint_dir", tmp_path / "runs", "--pooler_num_top_hidden_layers", 2, "--max_seq_length", 48]
        more = {"run_distillation_logits_creator.py": ["--output_dir", tmp_path], "dse_train_runner.py": tiny}
        for script, flags in more.items():
            what, _, command = caplog.records[-1].getMessage().partition("; next: python ")
            assert Path(what.partition(": ")[2]).exists()
            words = shlex.split(command)
            assert words[0] == script
            mains[script].main([*words[1:], *map(str, flags)])
    what, _, command = caplog.records[-1].getMessage().partition("; next: ")
    folder = what.removeprefix("student: ")
    assert command == f"python -m dse score --model {folder} --queries QUERIES --candidates CANDIDATES"
    assert DSESiameseClassifier.from_pretrained(folder).task.name == "snli"
