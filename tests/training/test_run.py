"""A run's identity and folder: the flags that must agree, the logs; states that are written while it goes on."""

import json
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import SHORT_RUN, assert_same_run, stop_at, stopped
from processes import LONG, start

import dse_train_runner
import finetune_bert
from dse.storage import states
from dse.storage.checkpoint import Checkpoint
from dse.system import files
from dse.system.errors import InputError, RunError
from dse.training import reporting, run, trainer
from dse.training.kinds import Kind
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


def count_updates(monkeypatch, after: Callable[[int, trainer.Trainer], None]) -> None:
    """Call `after` with the number of each update from here on, once it is made, and the trainer."""
    update, made = trainer.Trainer.update, []

    def counted(self, *of_update):
        update(self, *of_update)
        made.append(1)
        after(len(made), self)

    monkeypatch.setattr(trainer.Trainer, "update", counted)


def write_with(monkeypatch, before: Callable[[Path, dict], None]) -> None:
    """Call `before` with each state that is to be written."""
    save = states.save_tensors
    monkeypatch.setattr(states, "save_tensors", lambda path, entries: [before(path, entries), save(path, entries)])


def test_a_state_is_that_of_its_moment_though_the_training_goes_on(student_flags, checkpoints, tmp_path, monkeypatch):
    """That of update 2 is not written before update 3 is made; a run that continues from it ends with the same bits."""
    third, kept, saved = threading.Event(), tmp_path / "kept.pt", []

    def hold(path: Path, entries: dict) -> None:
        if path.name.endswith("_state_epoch_0_update_2.pt"):
            assert third.wait(60), "the training waits for the write"
            files.save_tensors(kept, entries)

    def after(number: int, trainer: trainer.Trainer) -> None:
        saved.append(trainer.saved)
        if number == 3:
            third.set()

    with monkeypatch.context() as patched:
        count_updates(patched, after)
        write_with(patched, hold)
        dse_train_runner.main(student_flags(**SHORT_RUN))
    assert saved[:3] == [None] * 3  # it names a state that is complete
    assert saved[3].name.endswith("_epoch_0.pt")
    found = Checkpoint.read(kept).trainer
    assert (found["history"], found["partial"]["updates"], found["optimizer"]["param_groups"][0]["updates"]) == (
        [],
        2,
        2,
    )
    again = tmp_path / "again" / checkpoints()[0].parent.name
    again.mkdir(parents=True)
    shutil.copy(kept, again / "bert_distillation_state_epoch_0_update_2.pt")
    dse_train_runner.main([*student_flags(**SHORT_RUN, checkpoint_dir=tmp_path / "again"), "--resume"])
    assert_same_run(checkpoints("again")[-1], checkpoints()[-1])


def test_there_is_never_more_than_one_copy(student_flags, monkeypatch):
    copies, taken_or_written, save = [], [], states.save_tensors

    def written(*args):
        time.sleep(0.05)
        save(*args)
        taken_or_written.append("written")

    def copied(*args):
        taken_or_written.append("taken")
        deadline = time.monotonic() + 5  # the writing thread lets go of one just after it has said that it is done
        while any(copy() is not None for copy in copies):
            assert time.monotonic() < deadline, "the copy before is still there"
        taken = states.snapshot(*args)
        copies.extend(map(weakref.ref, taken["model"].values()))
        return taken

    monkeypatch.setattr(run, "snapshot", copied)
    monkeypatch.setattr(states, "save_tensors", written)
    dse_train_runner.main(student_flags(gradient_accumulation_steps=1, save_every=1))
    assert taken_or_written == ["taken", "written"] * 8  # 6 updates, 2 epochs


@pytest.mark.parametrize(("flags", "signal_at", "updates"), [({"save_every": 1}, 9, 2), ({}, 9, 3), ({}, 2, 2)])
def test_a_state_that_cannot_be_written_ends_the_run(
    flags, signal_at, updates, teacher_flags, tmp_path, monkeypatch, capsys
):
    """At the next state's save, after the last epoch, or in a stop; no teacher is left then."""
    made = []

    def full(*_):
        raise RunError("the state cannot be written")

    monkeypatch.setattr(states, "save_tensors", full)
    count_updates(monkeypatch, lambda number, _: made.append(number))
    stop_at(monkeypatch, signal_at)
    code, line = stopped(finetune_bert.main, teacher_flags(**flags), capsys)
    assert (code, line) == (1, "finetune_bert.py: error: the state cannot be written")
    assert made[-1] == updates
    assert not (tmp_path / "teacher" / "model.safetensors").exists()


@pytest.mark.parametrize("by", ["signal", "error"])
def test_the_end_of_a_run_waits_for_its_state(by, student_flags, tmp_path, monkeypatch, capsys):
    """A slow write of update 1's; at update 2 a signal comes, or the loss is NaN."""
    write_with(monkeypatch, lambda *_: time.sleep(0.5))
    if by == "signal":
        stop_at(monkeypatch, 2)
    else:
        loss, calls = Kind.student_loss, []

        def broken(*args):
            calls.append(1)
            return loss(*args) * (float("nan") if len(calls) == 2 else 1.0)

        monkeypatch.setattr(Kind, "student_loss", broken)
    flags = student_flags(gradient_accumulation_steps=1, save_every=1)
    code, _ = stopped(dse_train_runner.main, flags, capsys)
    found = sorted(tmp_path.glob("checkpoints/*/*"))
    names = {143: ["_update_1.pt", "_update_2.pt"], 1: ["_update_1.pt"]}[code]
    assert [path.name[-12:] for path in found] == names
    assert [Checkpoint.read(path).trainer["partial"]["updates"] for path in found] == [1, 2][: len(found)]


def hang_in_the_second_state(argv: list[str], begun: Path) -> None:
    """Train; of the second state only the beginning is ever written, while the training goes on."""
    save, calls = states.save_tensors, []

    def half(path, entries):
        calls.append(1)
        if len(calls) == 2:
            with files.atomic_write(path) as beside:
                beside.write_bytes(b"PK")
                begun.touch()
                time.sleep(LONG)
        save(path, entries)

    states.save_tensors = half
    dse_train_runner.main(argv)


def test_a_kill_while_a_state_is_written_leaves_the_one_before(student_flags, checkpoints, tmp_path):
    """States of updates 1 and 2; what was begun of the second is removed when the run goes on."""
    flags = {"gradient_accumulation_steps": 1, "save_every": 1}
    dse_train_runner.main(student_flags(**flags, checkpoint_dir=tmp_path / "unbroken"))
    argv, begun = student_flags(**flags), tmp_path / "begun"
    process = start(hang_in_the_second_state, argv, begun, log=tmp_path / "log")
    deadline = time.monotonic() + LONG
    while not begun.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert begun.exists(), (tmp_path / "log").read_text()
    (whole,) = checkpoints()
    assert Checkpoint.read(whole).trainer["partial"]["updates"] == 1
    assert len(list(whole.parent.glob(".*_update_2.pt.*.part"))) == 1
    dse_train_runner.main([*argv, "--resume"])
    assert_same_run(checkpoints()[-1], checkpoints("unbroken")[-1])
    assert not list(whole.parent.glob(".*.part"))
