"""A student's run: stops of every kind, the best epoch, states and checkpoints; it goes on to the same bits."""

import json
import logging
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHORT_RUN, assert_same_run, contents, cut, flip, moved, stop_at, stopped

import dse_train_runner
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.models import DSESiameseClassifier
from dse.networks import inference
from dse.storage import states
from dse.storage.checkpoint import Checkpoint
from dse.storage.logits import save_logits
from dse.storage.states import States
from dse.storage.student_folder import read_config
from dse.system import files
from dse.system.errors import RunError
from dse.training import trainer
from dse.training.kinds import Kind


@pytest.fixture
def unbroken(student_flags, tmp_path, checkpoints):
    """The last checkpoint of a run of 2 epochs of 3 updates that was left alone."""
    dse_train_runner.main(student_flags(checkpoint_dir=tmp_path / "unbroken", gradient_accumulation_steps=1))
    return checkpoints("unbroken")[-1]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("update", [1, 3, 5])
def test_a_signal_ends_a_student_in_order(update, sent, unbroken, student_flags, checkpoints, monkeypatch, capsys):
    """It finishes the update, writes a state, says how to go on; and so it does, to the same bits."""
    with monkeypatch.context() as patched:
        stop_at(patched, update, sent=sent)
        code, line = stopped(dse_train_runner.main, student_flags(**SHORT_RUN), capsys)
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    where = f"_state_epoch_{(update - 1) // 3}_update_{(update - 1) % 3 + 1}.pt"
    assert where in line
    assert "run the same command with --resume to continue" in line
    torch.manual_seed(999)
    dse_train_runner.main([*student_flags(**SHORT_RUN), "--resume"])
    assert_same_run(checkpoints()[-1], unbroken)
    assert all("_state_" not in path.name for path in checkpoints()[-1].parent.iterdir())


def test_a_signal_while_a_state_is_written_waits(unbroken, student_flags, checkpoints, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_at(patched, 2, "write")
        code, line = stopped(dse_train_runner.main, student_flags(**SHORT_RUN), capsys)
    assert (code, "_epoch_0.pt;" in line) == (143, True)
    assert not list(tmp_path.glob("checkpoints/*/*_state_epoch_1_*.pt"))
    assert Checkpoint.read(line.split("state saved in ")[1].split(";")[0])  # whole
    dse_train_runner.main([*student_flags(**SHORT_RUN), "--resume"])
    assert_same_run(checkpoints()[-1], unbroken)


def test_a_signal_cuts_a_validation_off(unbroken, student_flags, checkpoints, monkeypatch, capsys):
    infer_pairs = inference.infer_pairs

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return infer_pairs(*args)

    with monkeypatch.context() as patched:
        patched.setattr(inference, "infer_pairs", interrupted)
        code, line = stopped(dse_train_runner.main, student_flags(**SHORT_RUN), capsys)
    assert (code, "_state_epoch_0_update_3.pt" in line) == (143, True)
    dse_train_runner.main([*student_flags(**SHORT_RUN), "--resume"])
    assert_same_run(checkpoints()[-1], unbroken)


@pytest.mark.parametrize("update", [2, 3])
def test_a_half_made_update_is_not_saved(update, unbroken, student_flags, checkpoints, tmp_path, monkeypatch, capsys):
    """Ctrl-C twice within the second update, before any state, or the third: that of the second is the last."""
    original, calls = trainer.Trainer.update, []

    def impatient(self, *of_update):
        calls.append(1)
        if len(calls) == update:
            next(iter(self.model.parameters())).data.zero_()  # half of something
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        original(self, *of_update)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "update", impatient)
        code, line = stopped(dse_train_runner.main, student_flags(**SHORT_RUN), capsys)
    assert (code, "_state_epoch_0_update_2.pt; run the same command" in line) == (130, update == 3)
    assert len(list(tmp_path.glob("checkpoints/*/*.pt"))) == (update == 3)
    dse_train_runner.main([*student_flags(**SHORT_RUN), "--resume"])
    assert_same_run(checkpoints()[-1], unbroken)


def test_states_without_checkpoints_go_when_the_run_ends(student_flags, tmp_path, monkeypatch, capsys):
    """The best epoch's student stays, the same as beside checkpoints."""
    dse_train_runner.main(student_flags(**SHORT_RUN, checkpoint_dir=tmp_path / "stored"))
    flags = {**SHORT_RUN, "store_checkpoints": False}
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        stopped(dse_train_runner.main, student_flags(**flags), capsys)
    (run,) = (tmp_path / "checkpoints").iterdir()
    names = sorted(path.name.partition("_state_")[2] or path.name for path in run.iterdir())
    assert names == ["best", "epoch_1_update_1.pt", "epoch_1_update_2.pt"]
    dse_train_runner.main([*student_flags(**flags), "--resume"])
    assert [path.name for path in run.iterdir()] == ["best"]
    (stored,) = (tmp_path / "stored").glob("*/best")
    ours, theirs = (DSESiameseClassifier.from_pretrained(folder) for folder in (run, stored))
    assert ours.origin["epoch"] == theirs.origin["epoch"]
    assert (ours.encode("A sentence.") == theirs.encode("A sentence.")).all()


def test_a_run_without_checkpoints_that_was_killed_before_its_students_folder(student_flags, tmp_path, monkeypatch):
    """The state of the best epoch gives the student when the run continues, even if no later epoch is better."""
    flags = {**SHORT_RUN, "store_checkpoints": False, "epochs": 3}

    def killed(student, run):
        raise RunError("as if killed")

    monkeypatch.setattr(Kind, "score", lambda self, metrics: ("f1", -metrics["loss"]))  # the first is the best
    monkeypatch.setattr("dse.training.kinds.Binary.score", Kind.score)
    rising = iter([0.1, 0.2, 0.3])
    validate = dse_train_runner.validate
    monkeypatch.setattr(dse_train_runner, "validate", lambda *args: {**validate(*args), "loss": next(rising)})
    with monkeypatch.context() as patched:
        patched.setattr("dse.training.student_run.save_best", killed)
        with pytest.raises(SystemExit):
            dse_train_runner.main(student_flags(**flags))
    (run,) = (tmp_path / "checkpoints").iterdir()
    assert not (run / "best").exists()
    dse_train_runner.main([*student_flags(**flags), "--resume"])
    assert DSESiameseClassifier.from_pretrained(run / "best").origin["epoch"] == 0


@pytest.mark.parametrize("store", [True, False])
def test_fewer_epochs_than_are_done_remove_nothing(store, student_flags, tmp_path, monkeypatch, capsys, caplog):
    flags = {**SHORT_RUN, "epochs": 4, "store_checkpoints": store}
    with monkeypatch.context() as patched:
        stop_at(patched, 8)
        stopped(dse_train_runner.main, student_flags(**flags), capsys)
    before = sorted((tmp_path / "checkpoints").rglob("*.pt"))
    assert len(before) >= 2
    dse_train_runner.main([*student_flags(**{**flags, "epochs": 2}), "--resume"])
    assert "nothing to train: 2 epochs are done, --epochs is 2" in caplog.text
    assert sorted((tmp_path / "checkpoints").rglob("*.pt")) == before


def test_a_users_own_copy_of_a_checkpoint_stays(student_flags, checkpoints, tmp_path, monkeypatch, capsys):
    flags = {**SHORT_RUN, "store_checkpoints": False}
    with monkeypatch.context() as patched:
        stop_at(patched, 4)
        line = stopped(dse_train_runner.main, student_flags(**flags), capsys)[1]
    (tmp_path / "keep").mkdir()
    mine = tmp_path / "keep" / "mine.pt"
    shutil.copyfile(line.split("state saved in ")[1].split(";")[0], mine)
    dse_train_runner.main(student_flags(**flags, trainer_checkpoint=mine))
    assert [path.name for path in mine.parent.iterdir()] == ["mine.pt"]


def test_a_run_killed_before_its_first_state_leaves_no_folder(student_flags, tmp_path):
    (tmp_path / "checkpoints" / "bert_distillation_2020_01_01-00_00_00").mkdir(parents=True)
    dse_train_runner.main([*student_flags(epochs=1), "--resume"])
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_names_of_experiments_that_look_like_states(student_flags, checkpoints):
    dse_train_runner.main(student_flags(experiment_name="x_state_epoch_1"))
    assert [path.name[-10:] for path in checkpoints()][-1] == "epoch_1.pt"


def test_resume_takes_the_run_of_these_flags_and_starts_anew_where_there_is_none(
    student_flags, checkpoints, tmp_path, caplog
):
    dse_train_runner.main([*student_flags(epochs=1), "--resume"])
    assert "no state of bert_distillation" in caplog.text
    first = checkpoints()[0]
    shutil.copytree(first.parent, first.parent.with_name("bert_distillation_2099_01_01-00_00_00"))
    for path in first.parent.with_name("bert_distillation_2099_01_01-00_00_00").glob("*.pt"):
        entries = vars(Checkpoint.read(path))
        files.save_tensors(path, {**entries, "run": {**entries["run"], "lr": 0.5}})
    dse_train_runner.main([*student_flags(epochs=2), "--resume"])
    assert [path.name[-10:] for path in sorted(first.parent.glob("*_epoch_1.pt"))] == ["epoch_1.pt"]


@pytest.mark.parametrize("spoil", [cut, flip])
def test_a_spoiled_newest_state_costs_the_work_since_the_one_before(
    spoil, unbroken, student_flags, checkpoints, tmp_path, monkeypatch, capsys, caplog
):
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        stopped(dse_train_runner.main, student_flags(**SHORT_RUN), capsys)
    (run,) = (tmp_path / "checkpoints").iterdir()
    newest = next(run.glob("*_state_epoch_1_update_2.pt"))
    spoil(newest)
    caplog.clear()
    dse_train_runner.main([*student_flags(**SHORT_RUN), "--resume"])
    assert f"{newest} is truncated or not a checkpoint" in caplog.text
    assert "continuing after 1 epochs and 1 updates of the next" in caplog.text
    assert_same_run(checkpoints()[-1], unbroken)
    assert not newest.exists()


def test_when_all_states_are_spoiled_nothing_is_begun(student_flags, refused, checkpoints):
    dse_train_runner.main(student_flags())
    for path in checkpoints():
        cut(path)
    assert "none of the states in" in refused(dse_train_runner.main, [*student_flags(), "--resume"])


def test_a_missing_or_older_best_folder_is_made_again(student_flags, checkpoints, monkeypatch):
    give_scores(monkeypatch, [0.2, 0.7, 0.4])
    dse_train_runner.main(student_flags(epochs=3))
    folder, (best, newest) = checkpoints()[0].parent / "best", checkpoints()
    weights = (folder / "model.safetensors").read_bytes()
    for spoil in (shutil.rmtree, DSESiameseClassifier.from_checkpoint(newest).save_pretrained):
        spoil(folder)
        dse_train_runner.main([*student_flags(epochs=3), "--resume"])
        assert (folder / "model.safetensors").read_bytes() == weights
        student = DSESiameseClassifier.from_pretrained(folder)
        assert student.origin["epoch"] == Checkpoint.read(newest).best["epoch"] == 1
        for name, tensor in Checkpoint.read(best).model.items():
            assert torch.equal(student.network.state_dict()[name], tensor), name


def give_scores(monkeypatch, scores: list[float]) -> None:
    """Have the validation of the n-th epoch from here on give the n-th f1."""
    given = iter(scores)
    metrics = {f"{name}_0.5": 0.5 for name in ("accuracy", "precision", "recall")}
    monkeypatch.setattr(dse_train_runner, "validate", lambda *_: {"loss": 1.0, **metrics, "f1_0.5": next(given)})


def test_the_best_folder_follows_the_best_epoch_while_the_run_is_under_way(
    student_flags, checkpoints, tmp_path, monkeypatch
):
    """After each epoch, and not only at the end of the run, which a kill may keep from coming."""
    seen, save = [], States.save

    def saved(self, *args):  # an epoch's checkpoint is written before its `best`
        seen.append(epochs_of(self.folder))
        return save(self, *args)

    give_scores(monkeypatch, [0.2, 0.1, 0.7, 0.7])
    monkeypatch.setattr(States, "save", saved)
    monkeypatch.setattr("dse.training.student_run.mend_best", lambda *_: None)
    dse_train_runner.main(student_flags(epochs=4))
    assert seen == [{}, {"best": 0}, {"best": 0}, {"best": 2}]
    student = DSESiameseClassifier.from_pretrained(checkpoints()[0].parent / "best")
    assert checkpoints()[0].name.endswith("_epoch_2.pt")
    for name, tensor in Checkpoint.read(checkpoints()[0]).model.items():
        assert torch.equal(student.network.state_dict()[name], tensor), name


def test_other_logits_are_another_run(student_flags, checkpoints, logits, tmp_path, refused):
    """At the same path, of the same data, as another teacher of the same name gives them."""
    path, about = tmp_path / "logits.pt", logits("mrpc").with_suffix(".json")
    shutil.copyfile(logits("mrpc"), path)
    shutil.copyfile(about, path.with_suffix(".json"))
    values = torch.load(path, weights_only=True)
    dse_train_runner.main(student_flags(distillation_logits_path=path, epochs=1))
    newest = checkpoints()[-1]
    then = files.sha256_file(path)
    save_logits(path, values + torch.tensor([0.0, 0.5]), json.loads(about.read_text()))
    now = files.sha256_file(path)
    for going_on in ({"resume": True}, {"trainer_checkpoint": newest}):
        line = refused(dse_train_runner.main, student_flags(distillation_logits_path=path, **going_on))
        assert f"--distillation_logits_path: SHA-256 is {now} now, and was {then} in the run" in line
    assert checkpoints() == [newest]


def test_a_loss_that_is_not_finite_ends_the_run(student_flags, tmp_path, monkeypatch, capsys):
    """In the second epoch's second batch of three; the state of the epoch before stays, and is whole."""
    original, calls = Kind.student_loss, []

    def broken(*args):
        calls.extend([1] * args[1].requires_grad)  # not those of whole epochs
        return original(*args) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(Kind, "student_loss", broken)
    code, line = stopped(dse_train_runner.main, student_flags(gradient_accumulation_steps=1), capsys)
    assert code == 1
    assert "epoch 1, batch 2: the loss is nan: the training has diverged; last good state: " in line
    path = line.split("last good state: ")[1].split(". Start")[0]
    assert path.endswith("_epoch_0.pt")
    assert all(tensor.isfinite().all() for tensor in Checkpoint.read(path).model.values())


def test_a_cache_that_is_deleted_under_a_running_job(student_flags, checkpoints, unbroken, data, monkeypatch):
    original = trainer.Trainer.update

    def update(self, *of_update):
        for path in data("mrpc").glob("*_separate"):
            path.unlink()
        original(self, *of_update)

    monkeypatch.setattr(trainer.Trainer, "update", update)
    dse_train_runner.main(student_flags(gradient_accumulation_steps=1))
    assert_same_run(checkpoints()[-1], unbroken)


def epochs_of(run: Path) -> dict[str, int]:
    """The students' folders of a run, and the epochs that they tell."""
    return {path.parent.name: json.loads(path.read_text())["origin"]["epoch"] for path in run.glob("best*/config.json")}


def better_each_epoch(monkeypatch) -> None:
    """Have every epoch be better than those before it."""
    monkeypatch.setattr("dse.training.student_run.StudentRun.best", lambda run: (run.trainer.history or [None])[-1])


def test_a_foreign_file_in_best_costs_no_work(
    unbroken, student_flags, checkpoints, tmp_path, monkeypatch, capsys, caplog
):
    """It stays, the training ends, and the only student that the run leaves is its best epoch's."""
    better_each_epoch(monkeypatch)
    flags = {"gradient_accumulation_steps": 1}
    with monkeypatch.context() as patched:
        stop_at(patched, 4)
        stopped(dse_train_runner.main, student_flags(**flags), capsys)
    (run,) = (tmp_path / "checkpoints").iterdir()
    assert epochs_of(run) == {"best": 0}
    (run / "best" / ".DS_Store").write_text("mine")
    dse_train_runner.main([*student_flags(**flags), "--resume"])
    assert "the student of the best epoch so far, 1, is saved elsewhere: " in caplog.text
    assert_same_run(checkpoints()[-1], unbroken)
    assert epochs_of(run) == {"best_epoch_1": 1}
    assert [path.name for path in (run / "best").iterdir()] == [".DS_Store"]
    assert DSESiameseClassifier.from_pretrained(run / "best_epoch_1").origin["epoch"] == 1
    dse_train_runner.main([*student_flags(**{**flags, "epochs": 3}), "--resume"])
    assert epochs_of(run) == {"best_epoch_2": 2}
    (run / "best" / ".DS_Store").unlink()
    dse_train_runner.main([*student_flags(**{**flags, "epochs": 4}), "--resume"])
    assert epochs_of(run) == {"best": 3}


def test_the_checkpoint_comes_before_the_best_folder(student_flags, tmp_path, monkeypatch):
    """A kill while `best` is written costs no work, and the next end of the run mends it."""

    def killed(*_):
        raise SystemExit(9)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("dse.storage.student_folder.write_student", killed)
        dse_train_runner.main(student_flags())
    (run,) = (tmp_path / "checkpoints").iterdir()
    assert [path.name[-10:] for path in run.glob("*.pt")] == ["epoch_0.pt"]
    dse_train_runner.main([*student_flags(epochs=1), "--resume"])  # of 2 that are wanted: nothing to train
    assert epochs_of(run) == {"best": 0}


def test_a_student_that_the_run_did_not_write_stays_in_best(student_flags, tmp_path, caplog):
    """One that tells nothing of its training (item 26), and one that tells of another command without a stamp."""
    dse_train_runner.main(student_flags(epochs=1))
    (run,) = (tmp_path / "checkpoints").iterdir()
    mine = DSESiameseClassifier.from_pretrained(run / "best")
    own = {key: value for key, value in mine.origin.items() if key != "stamp"}  # as before there were stamps
    for origin in ({}, {**own, "commands": [["dse_train_runner.py", {"lr": 1}]]}):
        mine.origin = origin
        mine.save_pretrained(run / "best")
        before = contents(run / "best")
        dse_train_runner.main([*student_flags(epochs=1), "--resume"])
        assert "holds another run's student, which is kept" in caplog.text
        assert contents(run / "best") == before
        assert json.loads((run / "best_epoch_0" / "config.json").read_text())["origin"]["epoch"] == 0
        shutil.rmtree(run / "best_epoch_0")
    mine.origin = {**own, "epoch": 9}
    mine.save_pretrained(run / "best")
    dse_train_runner.main([*student_flags(epochs=1), "--resume"])
    assert epochs_of(run) == {"best": 0}


def test_another_runs_files_in_the_same_folder_stay(unbroken, student_flags, tmp_path, monkeypatch, capsys):
    """Same experiment name, in every position that the run itself will have: checkpoints, states and `best`."""
    flags = {**SHORT_RUN, "checkpoint_dir": tmp_path / "other"}
    with monkeypatch.context() as patched:
        for place in ("dse_train_runner", "dse.training.student_run"):
            patched.setattr(f"{place}.utc_stamp", lambda: "2020_01_01-00_00_00")
        stop_at(patched, 5)  # leaves checkpoint 0, its `best` and states of epoch 1
        stopped(dse_train_runner.main, student_flags(**flags), capsys)
    (other,) = (tmp_path / "other").iterdir()
    before = contents(other)
    assert {"bert_distillation_state_epoch_1_update_1.pt", "best/model.safetensors"} <= set(before)
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        stopped(dse_train_runner.main, student_flags(**SHORT_RUN), capsys)
    (start,) = (tmp_path / "checkpoints").glob("*/*_state_epoch_0_update_2.pt")
    mine = Path(shutil.copyfile(start, other / start.name))
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        line = stopped(dse_train_runner.main, student_flags(**SHORT_RUN, trainer_checkpoint=mine), capsys)[1]
    assert {name: contents(other).get(name) for name in before} == before
    state = line.split("state saved in ")[1].split(";")[0]  # of the position that the other run has a state of, too
    assert state.endswith("_state_epoch_1_update_2.pt")
    dse_train_runner.main(student_flags(**SHORT_RUN, trainer_checkpoint=state))
    after = contents(other)
    assert {name: after.get(name) for name in before} == before
    assert not mine.exists()
    new = [path for path in other.glob("*.pt") if path.name not in before]
    assert {Checkpoint.read(path).stamp for path in new} == {Checkpoint.read(start).stamp}
    assert_same_run(max(new, key=lambda path: path.stat().st_mtime_ns), unbroken)
    assert epochs_of(other) == {"best": 0, "best_epoch_0": 0}


def test_a_spoiled_run_does_not_block_a_sound_one(student_flags, checkpoints, caplog):
    """The spoiled one is newer; it stays as it is."""
    dse_train_runner.main(student_flags(epochs=1))
    (sound,) = checkpoints()
    spoiled = sound.parent.with_name("bert_distillation_2099_01_01-00_00_00")
    shutil.copytree(sound.parent, spoiled)
    cut(spoiled / sound.name)
    before = contents(spoiled)
    dse_train_runner.main([*student_flags(epochs=2), "--resume"])
    assert f"{spoiled}: none of its states can be read; looking for another run" in caplog.text
    assert contents(spoiled) == before
    assert {path.name[-10:] for path in sound.parent.glob("*.pt")} >= {"epoch_1.pt"}


def test_a_student_goes_on_where_its_inputs_have_other_names(
    unbroken, student_flags, bert, data, logits, copied, checkpoints, tmp_path, monkeypatch, capsys, refused, caplog
):
    """Data, logits, encoder and the run's folder elsewhere: hashes tell that they are the same, or another."""
    argv = [*student_flags(**SHORT_RUN), "--resume"]
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        stopped(dse_train_runner.main, argv, capsys)
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    changes = {
        "data_dir": copied(data("mrpc"), "data"), "bert_model": copied(bert, "bert"),
        "distillation_logits_path": copied(logits("mrpc").parent, "logits") / "mrpc_logits.pt",
        "checkpoint_dir": tmp_path / "elsewhere", "log_dir": tmp_path / "other_logs",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    other = copied(bert, "other")
    flip(other / "model.safetensors", 0.9)
    line = refused(dse_train_runner.main, moved(argv, {**changes, "bert_model": other}))
    assert f"--bert_model: {other} now, {bert} in the run, which differ in the SHA-256" in line
    line = refused(dse_train_runner.main, moved(argv, {**changes, "bert_model": "./gone"}))
    assert "--bert_model: there is no folder ./gone" in line
    dse_train_runner.main(moved(argv, {**changes, "data_dir": "data"}))
    assert_same_run(checkpoints("elsewhere")[-1], unbroken)


def test_a_student_needs_its_encoder_no_more(unbroken, student_flags, bert, copied, checkpoints, monkeypatch, capsys):
    """Its folder is gone, and the name is the same; and so where the state does not know the encoder's hashes."""
    model = copied(bert, "gone")
    for known in (True, False):
        argv = [*student_flags(**SHORT_RUN, bert_model=model), "--resume"]
        with monkeypatch.context() as patched:
            stop_at(patched, 5)
            stopped(dse_train_runner.main, argv, capsys)
        (run,) = (checkpoints()[0].parent.parent).iterdir()
        if not known:
            for path in run.glob("*.pt"):
                entries = vars(Checkpoint.read(path))
                del entries["data"]["bert"]
                files.save_tensors(path, entries)
        shutil.rmtree(model)
        dse_train_runner.main(argv)
        assert_same_run(checkpoints()[-1], unbroken)
        shutil.rmtree(run)
        copied(bert, "gone")


def test_an_older_state_knows_its_encoder_by_name(student_flags, bert, copied, checkpoints, refused):
    dse_train_runner.main(student_flags(epochs=1))
    (path,) = checkpoints()
    entries = vars(Checkpoint.read(path))
    del entries["data"]["bert"]
    files.save_tensors(path, entries)
    line = refused(dse_train_runner.main, [*student_flags(bert_model=copied(bert)), "--resume"])
    assert "in the run: continuing needs the same encoder" in line
    dse_train_runner.main([*student_flags(), "--resume"])
    assert checkpoints()[-1].name.endswith("epoch_1.pt")


class Stopped(Exception):
    """Stands for the process's death."""


def train_and_stop(argv: list[str], after_epoch: int, monkeypatch) -> None:
    save = states.save_tensors

    def save_and_stop(path, entries):
        save(path, entries)
        if path.name.endswith(f"_epoch_{after_epoch}.pt"):
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(states, "save_tensors", save_and_stop)
        with pytest.raises(Stopped):
            dse_train_runner.main(argv)


@pytest.mark.parametrize("head", ["concat", "residual"])
def test_a_stopped_run_goes_on_to_the_same_bits(student_flags, checkpoints, monkeypatch, caplog, head):
    flags = {"epochs": 4, "gradient_accumulation_steps": 2, "batch_size": 5, "siamese_head_type": head}
    dse_train_runner.main(student_flags(**flags))
    unbroken = checkpoints()[-1].rename(checkpoints()[-1].parents[2] / "unbroken.pt")
    for old in checkpoints():
        old.unlink()

    train_and_stop(student_flags(**flags), 1, monkeypatch)
    stopped = checkpoints()[-1]
    torch.manual_seed(999)  # going on must not depend on what the process did before
    caplog.clear()
    dse_train_runner.main(student_flags(**flags, trainer_checkpoint=stopped))
    assert "the head begins with" not in caplog.text
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
    assert "`predict` gives `1` if its probability is above 0.3" in card
    assert "| f1_0.3 | 1.0000 |" in card
    assert "f1_0.2" not in card.split("## Commands")[0]

    assert Checkpoint.read(checkpoints()[-1]).student().threshold == 0.3


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


def test_a_training_tells_them_by_epoch(student_flags, tmp_path):
    dse_train_runner.main(student_flags(file_log=True, distillation_coeff=0.25, epochs=1))
    (lines,) = (tmp_path / "logs").glob("*.jsonl")
    record = json.loads(lines.read_text())
    train = record["train"]
    assert train["total_loss"] == pytest.approx(0.75 * train["loss"] + 0.25 * train["distillation_loss"], rel=1e-5)
    assert 0 <= train["teacher_agreement"] <= 1
    assert "distillation_loss" not in record["validation"], "there are no logits of dev"


def test_a_checkpoint_whose_weights_do_not_fit_is_refused(student_flags, checkpoints, tmp_path, refused):
    dse_train_runner.main(student_flags(epochs=1))
    entries = torch.load(checkpoints()[-1], weights_only=True)
    del entries["model"]["siamese_head.fc_layers.0.weight"]
    (tmp_path / "odd").mkdir()
    odd = tmp_path / "odd" / checkpoints()[-1].name
    files.save_tensors(odd, entries)
    line = refused(dse_train_runner.main, student_flags(epochs=2, trainer_checkpoint=odd))
    assert f"{odd}: its weights do not fit the model (RuntimeError: " in line
