"""A run's identity and folder: the flags that must agree, the logs."""

import json
from pathlib import Path

import pytest
import torch

import dse_train_runner
import finetune_bert
from dse.system.errors import InputError
from dse.training import reporting
from dse.training.run import Identity


def test_going_on_with_other_flags_is_refused(teacher_flags, student_flags, refused, data):
    finetune_bert.main(teacher_flags())
    line = refused(finetune_bert.main, [*teacher_flags(learning_rate=0.5), "--resume"])
    assert "--learning_rate: 0.5 now, 0.001 in the run: continuing needs the same flags" in line
    line = refused(finetune_bert.main, [*teacher_flags("rte"), "--resume"])
    assert "--task_name: rte now, mrpc in the run" in line
    dse_train_runner.main(student_flags())
    line = refused(dse_train_runner.main, [*student_flags(lr=0.5), "--resume"])
    assert "--lr: 0.5 now, 0.001 in the run" in line
    assert "leave --resume out to start a new run" in line
    line = refused(dse_train_runner.main, [*student_flags(trainer_checkpoint=__file__), "--resume"])
    assert "--resume: finds the newest state itself" in line


def test_a_flag_that_a_run_did_not_know_counts_as_not_given():
    def identity(**flags: object) -> Identity:
        return Identity({}, {"bert_model": "x", "lr": 0.1, **flags}, {}, None)

    identity(dropout=None, schedule_in_updates=False).check(identity())
    for value in (0.0, 0.5):  # 0 is a rate, and another one than the encoder's
        with pytest.raises(InputError, match=f"--dropout: {value} now, None in the run"):
            identity(dropout=value).check(identity())


def test_logs_that_cannot_be_written_do_not_end_a_run(student_flags, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "open", full, raising=False)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    dse_train_runner.main(student_flags(file_log=True, plot_metrics=True, plots_dir=tmp_path / "plots"))
    assert caplog.text.count(".jsonl: cannot be written (No space left on device)") == 2
    assert caplog.text.count("plots cannot be written (No space left on device)") == 2


@pytest.fixture
def trained(student_flags, checkpoints) -> Path:
    dse_train_runner.main(student_flags(epochs=1))
    return checkpoints()[-1]


def test_going_on_with_harmless_spellings(trained, student_flags, data, checkpoints):
    spelled = {"data_dir": f"{data('mrpc')}/", "task_name": "MRPC"}
    dse_train_runner.main(student_flags(**spelled, epochs=2, trainer_checkpoint=trained))
    assert checkpoints()[-1].name.endswith("_epoch_1.pt")


def test_going_on_from_a_checkpoint_that_is_not_the_newest(trained, refused, student_flags, checkpoints):
    older = trained.rename(trained.with_name(trained.name.replace("epoch_0", "epoch_00")))
    newer = older.with_name(older.name.replace("epoch_00", "epoch_5"))
    newer.write_bytes(older.read_bytes())
    assert f"{older} is not the newest, {newer} is" in refused(
        dse_train_runner.main, student_flags(trainer_checkpoint=older, epochs=2)
    )


def test_going_on_with_nothing_to_do_says_so(trained, student_flags, caplog):
    dse_train_runner.main(student_flags(epochs=1, trainer_checkpoint=trained))
    assert "nothing to train: 1 epochs are done, --epochs is 1" in caplog.text


def test_an_own_task_whose_columns_changed(student_flags, refused, data, tmp_path, checkpoints):
    path = tmp_path / "mine.json"
    task = {"kind": "binary", "labels": ["0", "1"], "text_a": 3, "text_b": 4, "label": 0}
    path.write_text(json.dumps(task))
    bare = tmp_path / "bare.pt"
    torch.save(torch.zeros(24, 2), bare)
    flags = {"data_dir": data("mrpc"), "distillation_logits_path": bare, "epochs": 1}
    dse_train_runner.main(student_flags(str(path), **flags))
    path.write_text(json.dumps({**task, "text_a": 4, "text_b": 3}))
    line = refused(
        dse_train_runner.main, student_flags(str(path), **{**flags, "epochs": 2}, trainer_checkpoint=checkpoints()[-1])
    )
    assert "--task_name: text_a is 4 now, and was 3 in the run" in line


def test_going_on_with_changed_data(trained, refused, data, student_flags):
    dev = data("mrpc") / "dev.tsv"
    original = dev.read_bytes()
    try:
        dev.write_bytes(original.replace(b"doctor", b"medic"))
        assert "--data_dir: the dev data is [{" in refused(
            dse_train_runner.main, student_flags(trainer_checkpoint=trained)
        )
    finally:
        dev.write_bytes(original)
