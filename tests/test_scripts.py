"""The stages through their scripts' main: outputs and their names, all tasks, going on, seeds."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_flags
from safetensors.torch import load_file

import dse_train_runner
import finetune_bert
import load_dse_checkpoint_example
import run_distillation_logits_creator
from dse.data.features import joint_features, separate_features
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.networks.batches import Batches
from dse.networks.config import PADDINGS
from dse.networks.inference import infer
from dse.networks.teacher import load_teacher
from dse.storage.checkpoint import Checkpoint
from dse.storage.student_folder import read_config
from dse.training.kinds import measure_student

PAIR_TASKS = ("mrpc", "qqp", "qnli", "rte", "wnli", "sts-b", "mnli", "mnli-mm", "snli", "allnli")
STAMP = r"\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d"


def results_of(folder: Path) -> dict[str, str]:
    lines = (folder / "eval_results.txt").read_text().splitlines()
    assert lines == sorted(lines)
    return dict(line.split(" = ") for line in lines)


@pytest.mark.parametrize("name", [*PAIR_TASKS, "cola", "sst-2"])
def test_every_task_fine_tunes(name, teacher_flags, tmp_path):
    finetune_bert.main(teacher_flags(name))
    task = get_task(name)
    assert set(results_of(tmp_path / "teacher")) == {*task.metrics, "eval_loss", "global_step", "loss"}
    assert (tmp_path / "teacher-MM").exists() == (name == "mnli")


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


def test_every_padding_gives_the_same_run_without_dropout(
    teacher_flags, student_flags, checkpoints, bert, copied, edit_json, data, tmp_path, logits
):
    """Teacher, its logits and the student, through the flags alone."""
    plain = copied(bert, "plain")
    edit_json(plain / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    results, of_teacher, outputs = {}, {}, {}
    for padding in PADDINGS:
        teacher = tmp_path / f"teacher_{padding}"
        finetune_bert.main(teacher_flags(bert_model=plain, padding=padding, output_dir=teacher))
        results[padding] = {key: float(value) for key, value in results_of(teacher).items()}
        argv = {"task_name": "mrpc", "data_dir": data("mrpc"), "do_lower_case": True, "max_seq_length": 48,
                "train_features_path": tmp_path / "cache", "padding": padding, "output_dir": tmp_path,
                "bert_checkpoint_dir": tmp_path / "teacher_packed"}  # fmt: skip
        run_distillation_logits_creator.main(as_flags(argv))
        of_teacher[padding] = torch.load(tmp_path / "teacher_packed_logits.pt", weights_only=True)
        folder = tmp_path / f"student_{padding}"
        dse_train_runner.main(student_flags(bert_model=plain, padding=padding, checkpoint_dir=folder))
        outputs[padding] = Checkpoint.read(checkpoints(folder.name)[-1]).trainer["history"][-1]["validation"]
    for padding in PADDINGS:
        assert results[padding] == pytest.approx(results["batch"], abs=1e-4)
        torch.testing.assert_close(of_teacher[padding], of_teacher["batch"], rtol=0, atol=1e-5)
        assert outputs[padding] == pytest.approx(outputs["batch"], abs=1e-4)


def test_bf16_trains_teacher_and_student(teacher_flags, student_flags, checkpoints, tmp_path):
    """Near the float32 run, and not equal to it."""
    finetune_bert.main(teacher_flags(bf16=True))
    for name, flags in (("half", {"bf16": True}), ("whole", {})):
        dse_train_runner.main(student_flags(**flags, checkpoint_dir=tmp_path / name))
    half, whole = (
        Checkpoint.read(checkpoints(name)[-1]).trainer["history"][-1]["train"]["loss"] for name in ("half", "whole")
    )
    assert half != whole
    assert half == pytest.approx(whole, rel=0.1)


def test_results_of_a_replaced_teacher_do_not_stay(teacher_flags, tmp_path):
    finetune_bert.main(teacher_flags("mnli", output_dir=f"{tmp_path}/teacher/"))
    places = [tmp_path / name / "eval_results.txt" for name in ("teacher", "teacher-MM")]
    assert all(path.exists() for path in places)
    finetune_bert.main(teacher_flags("mnli", do_eval=False, overwrite_output_dir=True))
    assert not any(path.exists() for path in places)


def test_mnlis_results_are_each_of_its_own_set(teacher_flags, tmp_path, data, copied):
    """Worked out again from the saved teacher, pair by pair; labels of the mismatched set are shifted by one."""
    folder, task = copied(data("mnli")), get_task("mnli")
    rows = [line.split("\t") for line in (folder / "dev_matched.tsv").read_text().splitlines()]
    shifted = dict(zip(task.labels, task.labels[1:] + task.labels[:1], strict=True))
    lines = ["\t".join([*cells[:-1], shifted.get(cells[-1], cells[-1])]) for cells in rows[:-5]]
    (folder / "dev_mismatched.tsv").write_text("\n".join(lines) + "\n")
    finetune_bert.main(teacher_flags("mnli", data_dir=folder))
    teacher = load_teacher(tmp_path / "teacher", task, fine_tuned=True).eval()
    tokenizer = load_tokenizer(tmp_path / "teacher", True, "--bert_model")
    found = {}
    for split, place in (("dev", "teacher"), ("mm", "teacher-MM")):
        features = joint_features(task, read_examples(task, folder, split), tokenizer, 48)
        with torch.inference_mode():
            logits = torch.cat([teacher(**Batches(features).of_pairs(np.array([i]))) for i in range(len(features))])
        labels = torch.from_numpy(features.labels)
        found[split] = {key: float(results_of(tmp_path / place)[key]) for key in ("acc", "eval_loss")}
        assert found[split] == {
            "acc": (logits.argmax(1) == labels).double().mean().item(),
            "eval_loss": pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5),
        }
    assert abs(found["dev"]["eval_loss"] - found["mm"]["eval_loss"]) > 1e-3
    assert abs(found["dev"]["acc"] - found["mm"]["acc"]) > 0.1


def test_training_without_evaluation_saves_and_evaluation_alone_works(teacher_flags, tmp_path):
    finetune_bert.main(teacher_flags(do_eval=False))
    assert not (tmp_path / "teacher" / "eval_results.txt").exists()
    finetune_bert.main(teacher_flags(do_train=False, bert_model=tmp_path / "teacher", output_dir=tmp_path / "alone"))
    alone = results_of(tmp_path / "alone")
    assert (alone["loss"], alone["global_step"]) == ("None", "0")
    finetune_bert.main(teacher_flags(output_dir=tmp_path / "both"))
    both = results_of(tmp_path / "both")
    assert all(both[name] == alone[name] for name in ("acc", "f1", "eval_loss"))


def test_the_teacher_is_refreshed_every_epoch(teacher_flags, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("dse.training.teacher_run.TeacherRun.write_teacher", lambda _: saved.append(1))
    finetune_bert.main(teacher_flags(num_train_epochs=3, save_checkpoint_every_epoch=True))
    assert len(saved) == 3


def test_overwriting_keeps_other_files(teacher_flags, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "notes.txt").write_text("mine")
    finetune_bert.main(teacher_flags(overwrite_output_dir=True))
    assert {path.name for path in (tmp_path / "teacher").iterdir()} == {
        "notes.txt", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json",
        "eval_results.txt",
    }  # fmt: skip


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.read(path).model


def assert_same_run(first: Path, second: Path) -> None:
    """Bit for bit the same weights, optimizer, random state and metrics; other times may have passed."""
    a, b = (vars(Checkpoint.read(path)) for path in (first, second))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    moments = [
        [tensor for state in c["trainer"]["optimizer"]["state"].values() for tensor in state.values()] for c in (a, b)
    ]
    assert len(moments[0]) == 2 * len(a["model"])
    assert all(torch.equal(x, y) for x, y in zip(*moments, strict=True))
    assert torch.equal(*(c["trainer"]["rng"]["cpu"][0] for c in (a, b)))
    for x, y in zip(a["trainer"]["history"], b["trainer"]["history"], strict=True):
        assert {**x, "seconds": 0} == {**y, "seconds": 0}


class Stopped(Exception):
    """Stands for the process's death."""


def train_and_stop(argv: list[str], after_epoch: int, monkeypatch) -> None:
    from dse.storage import states

    save = states.save_tensors

    def save_and_stop(path, entries):
        save(path, entries)
        if path.name.endswith(f"_epoch_{after_epoch}.pt"):
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(states, "save_tensors", save_and_stop)
        with pytest.raises(Stopped):
            dse_train_runner.main(argv)


def test_a_stopped_run_goes_on_to_the_same_bits(student_flags, checkpoints, monkeypatch):
    flags = {"epochs": 4, "gradient_accumulation_steps": 2, "batch_size": 5}
    dse_train_runner.main(student_flags(**flags))
    unbroken = checkpoints()[-1].rename(checkpoints()[-1].parents[2] / "unbroken.pt")
    for old in checkpoints():
        old.unlink()

    train_and_stop(student_flags(**flags), 1, monkeypatch)
    stopped = checkpoints()[-1]
    torch.manual_seed(999)  # going on must not depend on what the process did before
    dse_train_runner.main(student_flags(**flags, trainer_checkpoint=stopped))
    assert checkpoints()[-1].parent == stopped.parent
    assert len(checkpoints()) <= 2
    assert_same_run(checkpoints()[-1], unbroken)


def test_going_on_needs_no_pretrained_weights(student_flags, checkpoints, copied, bert):
    model = copied(bert, "moved")
    dse_train_runner.main(student_flags(epochs=1, bert_model=model))
    for path in model.iterdir():
        path.unlink()
    dse_train_runner.main(student_flags(epochs=3, bert_model=model, trainer_checkpoint=checkpoints()[-1]))
    assert len(Checkpoint.read(checkpoints()[-1]).trainer["history"]) == 3


def test_two_runs_with_one_seed_are_the_same_and_two_seeds_are_not(student_flags, checkpoints, tmp_path):
    for folder, seed in (("one", 3), ("two", 3), ("other", 4)):
        dse_train_runner.main(student_flags(random_seed=seed, checkpoint_dir=tmp_path / folder))
    one, two, other = (checkpoints(folder)[-1] for folder in ("one", "two", "other"))
    assert_same_run(one, two)
    assert not torch.equal(*(weights_of(path)["siamese_head.fc_layers.0.weight"] for path in (one, other)))


def test_two_teachers_with_one_seed_are_the_same(teacher_flags, tmp_path):
    for folder in ("one", "two"):
        finetune_bert.main(teacher_flags(output_dir=tmp_path / folder))
    one, two = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_gradient_checkpointing_trains_the_same_teacher(teacher_flags, tmp_path):
    for folder in ("plain", "checkpointing"):
        finetune_bert.main(
            teacher_flags(output_dir=tmp_path / folder, gradient_checkpointing=folder == "checkpointing")
        )
    plain, checkpointing = (load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "checkpointing"))
    for name in plain:
        torch.testing.assert_close(checkpointing[name], plain[name], atol=1e-5, rtol=0)


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


def test_a_drawn_seed_is_kept_for_going_on(student_flags, checkpoints, monkeypatch):
    train_and_stop(student_flags(random_seed=-1, epochs=2), 0, monkeypatch)
    seed = Checkpoint.read(checkpoints()[-1]).trainer["seed"]
    dse_train_runner.main(student_flags(random_seed=-1, epochs=2, trainer_checkpoint=checkpoints()[-1]))
    assert Checkpoint.read(checkpoints()[-1]).trainer["seed"] == seed


def test_best_and_newest_are_kept_and_reported(student_flags, checkpoints, monkeypatch, caplog):
    scores = iter([0.2, 0.9, 0.5, 0.9])
    monkeypatch.setattr("dse.training.kinds.Binary.score", lambda self, metrics: ("f1", metrics["given"]))
    monkeypatch.setattr("dse.training.kinds.Binary.metrics", lambda *_: {"given": 0.0})
    monkeypatch.setattr(dse_train_runner, "validate", lambda *_: {"given": next(scores)})
    dse_train_runner.main(student_flags(epochs=3))
    names = [re.search(r"f1_0\.\d+_epoch_\d", path.name).group() for path in checkpoints()]
    assert names == ["f1_0.900_epoch_1", "f1_0.500_epoch_2"]
    assert Checkpoint.read(checkpoints()[-1]).best == {"epoch": 1, "file": checkpoints()[0].name, "threshold": None}
    assert "best f1 0.9000 at epoch 1" in caplog.text
    dse_train_runner.main(student_flags(epochs=4, trainer_checkpoint=checkpoints()[-1]))
    assert [path.name[-10:] for path in checkpoints()] == ["epoch_1.pt", "epoch_3.pt"]  # the first of equals


def test_an_undefined_score_is_never_the_best(student_flags, checkpoints, monkeypatch, caplog):
    """Constant outputs have no Pearson: a low one is still better, whatever the loss, before and after."""
    validations = iter([(math.nan, 0.1), (-0.7, 3.0), (-0.5, 2.0), (math.nan, 0.1)])

    def validate():
        pearson, loss = next(validations)
        return {"loss": loss, "pearson": pearson, "spearman": pearson}

    monkeypatch.setattr(dse_train_runner, "validate", lambda *_: validate())
    dse_train_runner.main(student_flags("sts-b", epochs=4))
    assert [path.name.rsplit("_", 1)[1] for path in checkpoints()] == ["2.pt", "3.pt"]
    assert Checkpoint.read(checkpoints()[-1]).best == {"epoch": 2, "file": checkpoints()[0].name, "threshold": None}
    assert read_config(checkpoints()[0].parent / "best")["origin"]["epoch"] == 2
    assert "best pearson -0.5000 at epoch 2" in caplog.text


def test_two_runs_of_one_second_do_not_share_a_folder(student_flags, monkeypatch, tmp_path):
    stamps = iter(["2026_01_01-00_00_00"] * 4 + ["2026_01_01-00_00_01"] * 9)
    monkeypatch.setattr(dse_train_runner, "utc_stamp", lambda: "2026_01_01-00_00_00")
    monkeypatch.setattr("dse.training.student_run.utc_stamp", lambda: next(stamps))
    for _ in range(2):
        dse_train_runner.main(student_flags(epochs=1))
    folders = sorted((tmp_path / "checkpoints").iterdir())
    assert [folder.name[-2:] for folder in folders] == ["00", "01"]
    assert [len(list(folder.glob("*.pt"))) for folder in folders] == [1, 1]


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


def test_own_task_from_a_json_file(teacher_flags, bert, tmp_path, checkpoints):

    from dse.experiments.synthetic import write_pairs

    for split, seed in (("train", 1), ("dev", 2)):
        write_pairs(tmp_path / "own" / f"{split}.tsv", 20, seed)
    task = {"kind": "binary", "labels": ["0", "1"], "label": "Quality", "text_a": "#1 String", "text_b": "#2 String"}
    (tmp_path / "mine.json").write_text(json.dumps(task))
    own = {"task_name": tmp_path / "mine.json", "data_dir": tmp_path / "own", "do_lower_case": True}
    own |= {"max_seq_length": 32}
    shared = {"bert_model": bert, "output_dir": tmp_path / "teacher"}
    finetune_bert.main(as_flags({**own, **shared, "do_train": True, "num_train_epochs": 1}))
    features = tmp_path / "own" / "train_tiny_bert_32_mine"
    assert features.exists()
    run_distillation_logits_creator.main(
        as_flags({**own, "train_features_path": features, "bert_checkpoint_dir": tmp_path / "teacher",
                  "output_dir": tmp_path})
    )  # fmt: skip
    dse_train_runner.main(
        as_flags({**own, "bert_model": bert, "distillation_logits_path": tmp_path / "teacher_logits.pt", "epochs": 1,
                  "pooler_num_top_hidden_layers": 2, "store_checkpoints": True,
                  "checkpoint_dir": tmp_path / "checkpoints"})
    )  # fmt: skip
    assert Checkpoint.read(checkpoints()[0]).task["name"] == "mine"


def test_the_example_needs_no_architecture_flags(student_flags, checkpoints, copied, bert, capsys):
    model = copied(bert, "moved")
    dse_train_runner.main(student_flags(epochs=1, bert_model=model, additional_embedding_layer_size=6))
    for path in model.iterdir():
        path.unlink()
    capsys.readouterr()
    load_dse_checkpoint_example.main(["--task_name", "MRPC", "--trainer_checkpoint", str(checkpoints()[-1])])
    output = capsys.readouterr().out
    assert output.count("Sentence: ") == output.count("Embedding: ") == 2
    assert len(re.findall(r"-?\d+\.\d+", output.split("Embedding: ")[1])) == 6
    agreeing = ["--fc_dims", "8", "1", "--do_lower_case", "--max_seq_length", "32"]
    load_dse_checkpoint_example.main(["--task_name", "mrpc", "--trainer_checkpoint", str(checkpoints()[-1]), *agreeing])


def test_the_example_without_a_checkpoint_says_that_the_head_is_untrained(bert, caplog, capsys):
    argv = ["--task_name", "mrpc", "--bert_model", str(bert), "--pooler_num_top_hidden_layers", "2", "--do_lower_case"]
    argv += ["--max_seq_length", "32"]
    load_dse_checkpoint_example.main(argv)
    assert "UNTRAINED" in caplog.text
    assert capsys.readouterr().out.count("Embedding: ") == 2
