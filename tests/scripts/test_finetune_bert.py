"""finetune_bert.py: every task, its files, what repeats and what changes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import PAIR_TASKS, as_flags, command_main, results_of
from safetensors.torch import load_file

import dse_train_runner
import finetune_bert
import run_distillation_logits_creator
from dse.data.features import joint_features
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.experiments.synthetic import write_pairs
from dse.networks.batches import Batches
from dse.networks.config import PADDINGS
from dse.networks.teacher import load_teacher
from dse.storage.checkpoint import Checkpoint


@pytest.mark.parametrize("name", [*PAIR_TASKS, "cola", "sst-2"])
def test_every_task_fine_tunes(name, teacher_flags, tmp_path):
    finetune_bert.main(teacher_flags(name))
    task = get_task(name)
    assert set(results_of(tmp_path / "teacher")) == {*task.metrics, "eval_loss", "global_step", "loss"}
    assert (tmp_path / "teacher-MM").exists() == (name == "mnli")


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


def test_own_task_from_a_json_file(teacher_flags, bert, tmp_path, checkpoints):

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


def test_a_teacher_in_the_working_folder(teacher_flags, refused, tmp_path, monkeypatch):
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    finetune_bert.main(teacher_flags("mnli", output_dir=".", eval_batch_size=128))
    assert {"training.json", "eval_results.txt"} <= {path.name for path in Path().iterdir()}
    assert (tmp_path / "place-MM" / "eval_results.txt").exists()
    assert "holds other files" in refused(command_main("export"), ["--trainer_checkpoint", __file__, "--output", "."])
    benchmark = ["training", "--task_name", "mrpc", "--data_dir", "x", "--output", "."]
    assert "--output: . is a folder; give a file" in refused(command_main("benchmark"), benchmark)
