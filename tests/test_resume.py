"""Stops of every kind: a run goes on from its newest whole state to the same bits; spoiled files, full disks."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_flags
from soak_resume import soak
from test_scripts import assert_same_run, results_of

import dse.__main__
import dse_train_runner
import finetune_bert
import load_dse_checkpoint_example
import run_distillation_logits_creator
from dse.data.tokenizers import load_tokenizer, tokenizer_key
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier
from dse.networks import inference
from dse.storage import states
from dse.storage.checkpoint import Checkpoint
from dse.storage.logits import save_logits
from dse.storage.states import States
from dse.system import files, libc, signals
from dse.system.errors import InputError, RunError
from dse.training import trainer
from dse.training.kinds import Kind
from dse.training.run import Identity


def stop_at(monkeypatch, number: int, call: str = "update", sent: int = signal.SIGTERM) -> None:
    """Send this process a signal within the trainer's n-th update, or its n-th writing of a state, from here on."""
    owner, name = {"update": (trainer.Trainer, "update"), "write": (states, "save_tensors")}[call]
    original, calls = getattr(owner, name), []

    def counted(*args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), sent)
        return original(*args)

    monkeypatch.setattr(owner, name, counted)


def stopped(main, argv: list[str], capsys) -> tuple[int, str]:
    """The exit code and the one line of a script that a signal or an error ended."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if ".py: " in line]
    assert len(lines) == 1
    return stop.value.code, lines[0]


@pytest.fixture
def unbroken(student_flags, tmp_path, checkpoints):
    """The last checkpoint of a run of 2 epochs of 3 updates that was left alone."""
    dse_train_runner.main(student_flags(checkpoint_dir=tmp_path / "unbroken", gradient_accumulation_steps=1))
    return checkpoints("unbroken")[-1]


FLAGS = {"gradient_accumulation_steps": 1, "save_every": 2}


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("update", [1, 3, 5])
def test_a_signal_ends_a_student_in_order(update, sent, unbroken, student_flags, checkpoints, monkeypatch, capsys):
    """It finishes the update, writes a state, says how to go on; and so it does, to the same bits."""
    with monkeypatch.context() as patched:
        stop_at(patched, update, sent=sent)
        code, line = stopped(dse_train_runner.main, student_flags(**FLAGS), capsys)
    assert code == {signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
    where = f"_state_epoch_{(update - 1) // 3}_update_{(update - 1) % 3 + 1}.pt"
    assert where in line
    assert "the same command with --resume goes on" in line
    torch.manual_seed(999)
    dse_train_runner.main([*student_flags(**FLAGS), "--resume"])
    assert_same_run(checkpoints()[-1], unbroken)
    assert all("_state_" not in path.name for path in checkpoints()[-1].parent.iterdir())


def test_a_signal_while_a_state_is_written_waits(unbroken, student_flags, checkpoints, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_at(patched, 2, "write")
        code, line = stopped(dse_train_runner.main, student_flags(**FLAGS), capsys)
    assert (code, "_epoch_0.pt;" in line) == (143, True)
    assert not list(tmp_path.glob("checkpoints/*/*_state_epoch_1_*.pt"))
    assert Checkpoint.read(line.split("state in ")[1].split(";")[0])  # whole
    dse_train_runner.main([*student_flags(**FLAGS), "--resume"])
    assert_same_run(checkpoints()[-1], unbroken)


def test_a_signal_cuts_a_validation_off(unbroken, student_flags, checkpoints, monkeypatch, capsys):
    infer_pairs = inference.infer_pairs

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return infer_pairs(*args)

    with monkeypatch.context() as patched:
        patched.setattr(inference, "infer_pairs", interrupted)
        code, line = stopped(dse_train_runner.main, student_flags(**FLAGS), capsys)
    assert (code, "_state_epoch_0_update_3.pt" in line) == (143, True)
    dse_train_runner.main([*student_flags(**FLAGS), "--resume"])
    assert_same_run(checkpoints()[-1], unbroken)


@pytest.mark.parametrize("update", [2, 3])
def test_a_half_made_update_is_not_saved(update, unbroken, student_flags, checkpoints, tmp_path, monkeypatch, capsys):
    """Ctrl-C twice within the second update, before any state, or the third: that of the second is the last."""
    original, calls = trainer.Trainer.update, []

    def impatient(self):
        calls.append(1)
        if len(calls) == update:
            next(iter(self.model.parameters())).data.zero_()  # half of something
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        original(self)

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Trainer, "update", impatient)
        code, line = stopped(dse_train_runner.main, student_flags(**FLAGS), capsys)
    assert (code, "_state_epoch_0_update_2.pt; the same command" in line) == (130, update == 3)
    assert len(list(tmp_path.glob("checkpoints/*/*.pt"))) == (update == 3)
    dse_train_runner.main([*student_flags(**FLAGS), "--resume"])
    assert_same_run(checkpoints()[-1], unbroken)


def test_the_second_ctrl_c_waits_for_nothing():
    with pytest.raises(signals.Stopped) as stop, signals.caught(), signals.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")
    assert stop.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("name", ["finetune_bert", "run_distillation_logits_creator", "dse_train_runner"])
def test_signals_outside_of_training(name, teacher_flags, student_flags, monkeypatch, capsys):
    script = {"finetune_bert": finetune_bert, "dse_train_runner": dse_train_runner}.get(name)
    script = script or run_distillation_logits_creator
    monkeypatch.setattr(script, "get_task", lambda _: os.kill(os.getpid(), signal.SIGINT))
    argv = student_flags() if name == "dse_train_runner" else teacher_flags()
    if name.startswith("run_"):
        argv = ["--task_name", "mrpc", "--data_dir", "x", "--train_features_path", "x", "--bert_checkpoint_dir", "x"]
    code, line = stopped(script.main, argv, capsys)
    assert (code, line) == (
        130,
        f"{name}.py: stopped by Ctrl-C: nothing is half-written; the same command starts again",
    )


def test_states_without_checkpoints_go_when_the_run_ends(student_flags, tmp_path, monkeypatch, capsys):
    flags = {**FLAGS, "store_checkpoints": False}
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        stopped(dse_train_runner.main, student_flags(**flags), capsys)
    (run,) = (tmp_path / "checkpoints").iterdir()
    assert sorted(path.name[-17:] for path in run.iterdir()) == [
        "epoch_1_update_1.pt"[-17:],
        "epoch_1_update_2.pt"[-17:],
    ]
    dse_train_runner.main([*student_flags(**flags), "--resume"])
    assert not any((tmp_path / "checkpoints").iterdir())


def test_a_teacher_goes_on_to_the_same_bits(teacher_flags, tmp_path, monkeypatch, capsys):
    """Stopped in the first epoch, then in the second one's validation, then left alone."""
    flags = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "train_batch_size": 5, "save_every": 2}
    finetune_bert.main(teacher_flags(**flags, output_dir=tmp_path / "unbroken"))
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        code, line = stopped(finetune_bert.main, teacher_flags(**flags), capsys)
    assert (code, "training_state/teacher_state_epoch_0_update_2.pt" in line) == (143, True)
    assert "--resume to go on with the training in it" in stopped(finetune_bert.main, teacher_flags(**flags), capsys)[1]
    with monkeypatch.context() as patched:
        stop_at(patched, 6, sent=signal.SIGINT)
        assert stopped(finetune_bert.main, [*teacher_flags(**flags), "--resume"], capsys)[0] == 130
    finetune_bert.main([*teacher_flags(**flags), "--resume"])
    one, other = tmp_path / "teacher", tmp_path / "unbroken"
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert results_of(one) == results_of(other)
    histories = [json.loads((folder / "training.json").read_text())["history"] for folder in (one, other)]
    assert [{**record, "seconds": 0} for record in histories[0]] == [
        {**record, "seconds": 0} for record in histories[1]
    ]


def test_a_teacher_that_is_finished_is_not_trained_again(teacher_flags, tmp_path, caplog):
    finetune_bert.main(teacher_flags())
    before = (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns, results_of(tmp_path / "teacher")
    (tmp_path / "teacher" / "eval_results.txt").unlink()
    finetune_bert.main([*teacher_flags(), "--resume"])
    assert "nothing to train: the teacher in" in caplog.text
    assert ((tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns, results_of(tmp_path / "teacher")) == before


def test_going_on_with_other_flags_is_refused(teacher_flags, student_flags, refused, data):
    finetune_bert.main(teacher_flags())
    line = refused(finetune_bert.main, [*teacher_flags(learning_rate=0.5), "--resume"])
    assert "--learning_rate: 0.5 now, 0.001 in the run: going on needs the same flags" in line
    line = refused(finetune_bert.main, [*teacher_flags("rte"), "--resume"])
    assert "--task_name: rte now, mrpc in the run" in line
    dse_train_runner.main(student_flags())
    line = refused(dse_train_runner.main, [*student_flags(lr=0.5), "--resume"])
    assert "--lr: 0.5 now, 0.001 in the run" in line
    assert "leave --resume out for a new run" in line
    line = refused(dse_train_runner.main, [*student_flags(trainer_checkpoint=__file__), "--resume"])
    assert "--resume: finds the state to go on from by itself" in line


def test_a_flag_that_a_run_did_not_know_counts_as_not_given():
    def identity(**flags: object) -> Identity:
        return Identity({}, {"bert_model": "x", "lr": 0.1, **flags}, {}, None)

    identity(dropout=None, schedule_in_updates=False).check(identity())
    for value in (0.0, 0.5):  # 0 is a rate, and another one than the encoder's
        with pytest.raises(InputError, match=f"--dropout: {value} now, None in the run"):
            identity(dropout=value).check(identity())


def test_what_resume_finds_in_a_teachers_folder(teacher_flags, tmp_path, refused, caplog, edit_json):
    """Another training, a foreign model, a spoiled teacher: refused, and left as they are; overwritten when told to."""
    finetune_bert.main(teacher_flags())
    weights = tmp_path / "teacher" / "model.safetensors"
    before = weights.read_bytes()
    line = refused(finetune_bert.main, [*teacher_flags(num_train_epochs=2, learning_rate=0.5), "--resume"])
    assert "--learning_rate: 0.5 now, 0.001 in the run" in line
    flip(weights, 0.9)
    assert "model.safetensors is spoiled" in refused(finetune_bert.main, [*teacher_flags(), "--resume"])
    weights.write_bytes(before)
    edit_json(tmp_path / "teacher" / "training.json", history=3)
    assert "training.json is spoiled" in refused(finetune_bert.main, [*teacher_flags(), "--resume"])
    (tmp_path / "teacher" / "training.json").write_text('{"sha256": ["mine"]}')
    line = refused(finetune_bert.main, [*teacher_flags(), "--resume"])
    assert "holds other files and no training to go on with" in line
    assert weights.read_bytes() == before
    finetune_bert.main([*teacher_flags(seed=7), "--resume", "--overwrite_output_dir"])
    assert "starting anew" in caplog.text
    assert weights.read_bytes() != before
    finetune_bert.main([*teacher_flags(), "--resume", "--overwrite_output_dir"])
    assert weights.read_bytes() == before


def test_a_training_over_an_older_teacher_goes_on(teacher_flags, tmp_path, monkeypatch, capsys):
    finetune_bert.main(teacher_flags(seed=7))
    finetune_bert.main(teacher_flags(output_dir=tmp_path / "unbroken"))
    flags = [*teacher_flags(), "--overwrite_output_dir"]
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        assert stopped(finetune_bert.main, flags, capsys)[0] == 143
    finetune_bert.main([*flags, "--resume"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("teacher", "unbroken")]
    assert weights[0] == weights[1]


def test_a_teachers_tokenizer_may_not_change(teacher_flags, bert, copied, monkeypatch, capsys, refused):
    model = copied(bert, "changed")
    flags = teacher_flags(bert_model=model)
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        stopped(finetune_bert.main, flags, capsys)
    text = (model / "tokenizer.json").read_text().replace('"doctor"', '"x"').replace('"car"', '"doctor"')
    (model / "tokenizer.json").write_text(text.replace('"x"', '"car"'))
    assert "its tokenizer is not the one that the run began with" in refused(finetune_bert.main, [*flags, "--resume"])


def test_a_foreign_training_json_beside_a_teacher_is_nothing_to_the_logits(creator, tmp_path):
    (tmp_path / "teacher" / "training.json").write_text('{"sha256": ["mine"]}')
    run_distillation_logits_creator.main(creator)
    commands = json.loads((tmp_path / "teacher_logits.json").read_text())["commands"]
    assert [script for script, _ in commands] == ["run_distillation_logits_creator.py"]


@pytest.mark.parametrize("store", [True, False])
def test_fewer_epochs_than_are_done_remove_nothing(store, student_flags, tmp_path, monkeypatch, capsys, caplog):
    flags = {**FLAGS, "epochs": 4, "store_checkpoints": store}
    with monkeypatch.context() as patched:
        stop_at(patched, 8)
        stopped(dse_train_runner.main, student_flags(**flags), capsys)
    before = sorted((tmp_path / "checkpoints").rglob("*.pt"))
    assert len(before) >= 2
    dse_train_runner.main([*student_flags(**{**flags, "epochs": 2}), "--resume"])
    assert "nothing to train: 2 epochs are done, --epochs is 2" in caplog.text
    assert sorted((tmp_path / "checkpoints").rglob("*.pt")) == before


def test_a_users_own_copy_of_a_checkpoint_stays(student_flags, checkpoints, tmp_path, monkeypatch, capsys):
    flags = {**FLAGS, "store_checkpoints": False}
    with monkeypatch.context() as patched:
        stop_at(patched, 4)
        line = stopped(dse_train_runner.main, student_flags(**flags), capsys)[1]
    (tmp_path / "keep").mkdir()
    mine = tmp_path / "keep" / "mine.pt"
    shutil.copyfile(line.split("state in ")[1].split(";")[0], mine)
    dse_train_runner.main(student_flags(**flags, trainer_checkpoint=mine))
    assert [path.name for path in mine.parent.iterdir()] == ["mine.pt"]


def test_a_run_killed_before_its_first_state_leaves_no_folder(student_flags, tmp_path):
    (tmp_path / "checkpoints" / "bert_distillation_2020_01_01-00_00_00").mkdir(parents=True)
    dse_train_runner.main([*student_flags(epochs=1), "--resume"])
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_names_of_experiments_that_look_like_states(student_flags, checkpoints):
    dse_train_runner.main(student_flags(experiment_name="x_state_epoch_1"))
    assert [path.name[-10:] for path in checkpoints()][-1] == "epoch_1.pt"


def test_a_stop_after_the_training_says_how_to_end_it(teacher_flags, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(finetune_bert, "write_results", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        code, line = stopped(finetune_bert.main, teacher_flags(), capsys)
    assert (code, line) == (143, "finetune_bert.py: stopped by SIGTERM: the same command with --resume goes on")
    finetune_bert.main([*teacher_flags(), "--resume"])
    assert (tmp_path / "teacher" / "eval_results.txt").exists()
    assert not (tmp_path / "teacher" / "training_state").exists()


def test_logs_that_cannot_be_written_do_not_end_a_run(student_flags, tmp_path, monkeypatch, caplog):
    from dse.training import reporting

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "open", full, raising=False)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    dse_train_runner.main(student_flags(file_log=True, plot_metrics=True, plots_dir=tmp_path / "plots"))
    assert caplog.text.count(".jsonl: cannot be written (No space left on device)") == 2
    assert caplog.text.count("no plots (No space left on device)") == 2


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


def flip(path: Path, place: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize("spoil", [truncate, flip])
def test_a_spoiled_newest_state_costs_the_work_since_the_one_before(
    spoil, unbroken, student_flags, checkpoints, tmp_path, monkeypatch, capsys, caplog
):
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        stopped(dse_train_runner.main, student_flags(**FLAGS), capsys)
    (run,) = (tmp_path / "checkpoints").iterdir()
    newest = next(run.glob("*_state_epoch_1_update_2.pt"))
    spoil(newest)
    caplog.clear()
    dse_train_runner.main([*student_flags(**FLAGS), "--resume"])
    assert f"{newest} is truncated or not a checkpoint" in caplog.text
    assert "going on after 1 epochs and 1 updates of the next" in caplog.text
    assert_same_run(checkpoints()[-1], unbroken)
    assert not newest.exists()


def test_a_spoiled_state_of_a_teacher_is_written_again(teacher_flags, tmp_path, monkeypatch, capsys):
    flags = {"train_batch_size": 6, "save_every": 1}  # 4 updates
    finetune_bert.main(teacher_flags(**flags, output_dir=tmp_path / "unbroken"))
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        stopped(finetune_bert.main, teacher_flags(**flags), capsys)
    newest = tmp_path / "teacher" / "training_state" / "teacher_state_epoch_0_update_2.pt"
    flip(newest)
    with monkeypatch.context() as patched:
        stop_at(patched, 1)
        line = stopped(finetune_bert.main, [*teacher_flags(**flags), "--resume"], capsys)[1]
    assert str(newest) in line
    assert files.load_tensors(newest, "spoiled")["trainer"]["partial"]["updates"] == 2
    finetune_bert.main([*teacher_flags(**flags), "--resume"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("teacher", "unbroken")]
    assert weights[0] == weights[1]


def test_when_all_states_are_spoiled_nothing_is_begun(student_flags, refused, checkpoints):
    dse_train_runner.main(student_flags())
    for path in checkpoints():
        truncate(path)
    assert "none of the states in" in refused(dse_train_runner.main, [*student_flags(), "--resume"])


def test_no_flipped_bit_of_a_state_gives_other_values(tmp_path):
    files.save_tensors(tmp_path / "x.pt", {"weights": torch.arange(40.0), "name": "x"})
    whole = (tmp_path / "x.pt").read_bytes()
    for place in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        (tmp_path / "y.pt").write_bytes(changed)
        try:
            found = files.load_tensors(tmp_path / "y.pt", "spoiled")
        except InputError:
            continue
        assert torch.equal(found["weights"], torch.arange(40.0))
        assert found["name"] == "x"
    for place in (0, len(whole) // 2, len(whole) - 23):
        (tmp_path / "y.pt").write_bytes(whole[:place])
        with pytest.raises(InputError, match="spoiled"):
            files.load_tensors(tmp_path / "y.pt", "spoiled")


def test_a_tensor_of_another_program_is_compared_with_its_archives_sums(tmp_path):
    torch.save(torch.arange(40.0), tmp_path / "x.pt")
    assert torch.equal(files.load_tensors(tmp_path / "x.pt", "spoiled"), torch.arange(40.0))
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(np.float32(17).tobytes())] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    assert not torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), torch.arange(40.0))
    with pytest.raises(InputError, match="spoiled"):
        files.load_tensors(tmp_path / "x.pt", "spoiled")


def test_a_tensor_that_the_archives_directory_calls_a_folder_is_refused(tmp_path):
    """One bit that no sum of the archive covers; torch would load whatever its new memory holds."""
    torch.save(torch.arange(40.0), tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0"))
    content[entry + 38] ^= 0x10  # the lowest byte of its external attributes
    (tmp_path / "x.pt").write_bytes(content)
    assert torch.load(tmp_path / "x.pt", weights_only=True).shape == (40,)
    with pytest.raises(InputError, match="spoiled"):
        files.load_tensors(tmp_path / "x.pt", "spoiled")


@pytest.fixture
def creator(data, teacher_flags, tmp_path):
    """Flags of run_distillation_logits_creator.py over a teacher made for the test; several steps for 24 pairs."""
    finetune_bert.main(teacher_flags(do_eval=False))
    values = {"task_name": "mrpc", "data_dir": data("mrpc"), "do_lower_case": True, "max_seq_length": 48}
    values |= {"train_features_path": tmp_path / "features", "bert_checkpoint_dir": tmp_path / "teacher"}
    return as_flags({**values, "output_dir": tmp_path, "batch_size": 1, "save_every": 3})


def stop_forward(monkeypatch, number: int) -> list[int]:
    """Send SIGTERM within the teacher's n-th step; the list grows with each step."""
    from dse.networks.teacher import Teacher

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
    assert "outputs so far in" in line
    assert not (tmp_path / "teacher_logits.pt").exists()
    with monkeypatch.context() as patched:
        after = stop_forward(patched, 0)
        run_distillation_logits_creator.main(creator)
    in_all = stop_forward(monkeypatch, 0)
    assert (tmp_path / "teacher_logits.pt").read_bytes() == unbroken
    assert not (tmp_path / "teacher_logits.partial").exists()
    run_distillation_logits_creator.main(creator)
    assert len(after) == len(in_all) - 5 > 0


def test_19_logits_that_go_on_with_another_length(creator, tmp_path, monkeypatch, capsys):
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
    assert "is of other work: begun anew" in caplog.text
    (tmp_path / "teacher_logits.partial").write_bytes(partial)
    flip(tmp_path / "teacher_logits.partial")
    run_distillation_logits_creator.main(creator)
    assert "teacher_logits.partial is spoiled: begun anew" in caplog.text


def test_a_spoiled_teacher_is_refused(creator, tmp_path, refused):
    flip(tmp_path / "teacher" / "model.safetensors", 0.9)
    line = refused(run_distillation_logits_creator.main, creator)
    assert "model.safetensors is spoiled: its SHA-256 in training.json is" in line


def test_a_spoiled_checkpoint_is_refused_for_use(student_flags, checkpoints, refused):
    dse_train_runner.main(student_flags(epochs=1))
    flip(checkpoints()[0], 0.4)
    argv = ["--task_name", "mrpc", "--trainer_checkpoint", checkpoints()[0]]
    assert "is truncated or not a checkpoint" in refused(load_dse_checkpoint_example.main, argv)


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


def test_weights_that_are_not_finite_are_not_saved(teacher_flags, tmp_path, capsys, monkeypatch):
    def spoil(self):
        next(iter(self.model.parameters())).data[0] = float("inf")

    monkeypatch.setattr(trainer.Trainer, "update", spoil)
    code, line = stopped(finetune_bert.main, teacher_flags(train_batch_size=24, save_every=1), capsys)
    assert code == 1
    assert "are not finite after update" in line
    assert "last good state: none was written" in line
    assert not (tmp_path / "teacher").exists()


def test_states_keep_two_and_the_best(tmp_path):
    kept = States(tmp_path, "x", own=True)
    for position, name, best in (
        ((1, 0), "x_epoch_0.pt", 0),
        ((1, 5), "", 0),
        ((1, 10), "", 0),
        ((2, 0), "x_epoch_1.pt", 0),
        ((2, 5), "", 0),
    ):
        kept.save(position, {"at": position}, name, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x_epoch_0.pt", "x_epoch_1.pt", "x_state_epoch_2_update_5.pt",
    ]  # fmt: skip
    path, state = States(tmp_path, "x").newest(lambda path: files.load_tensors(path, "spoiled"))
    assert (path.name, state) == ("x_state_epoch_2_update_5.pt", {"at": (2, 5)})
    kept.finish(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_epoch_0.pt", "x_epoch_1.pt"]
    kept.finish()
    assert not tmp_path.exists()


def test_a_full_disk(student_flags, tmp_path, monkeypatch, capsys):
    """A real one: a small tmpfs, mounted by root alone, that fills between two checkpoints."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    save, calls = states.save_tensors, []

    def save_in_what_is_left(path, entries):
        calls.append(1)
        if len(calls) == 3:  # from here on there is room for nothing
            with contextlib.suppress(OSError), open(place / "filler", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        save(path, entries)

    try:
        monkeypatch.setattr(states, "save_tensors", save_in_what_is_left)
        code, line = stopped(
            dse_train_runner.main, student_flags(checkpoint_dir=place / "checkpoints", epochs=9), capsys
        )
        assert code == 1
        assert "cannot be written (No space left on device; 0 MiB are free there)" in line
        left = sorted((place / "checkpoints").glob("*/*.pt"))
        assert {path.name[-10:] for path in left} == {"epoch_0.pt", "epoch_1.pt"}
        assert all(Checkpoint.read(path).model for path in left)
        assert not list((place / "checkpoints").glob("*/.*.part"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("[enforce] PytorchStreamWriter")]
)
def test_a_write_that_the_disk_refuses(error, tmp_path):
    (tmp_path / "x").write_text("old")
    for write in (files.atomic_write, files.write_folder_whole, files.replace_folder):
        place = tmp_path / ("x" if write is files.atomic_write else "folder")
        with pytest.raises(RunError, match=r"cannot be written \((No space|\[enforce\])"), write(place):
            raise error
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*.part")] == []


def test_bytes_are_flushed_before_a_name_is_given(tmp_path, monkeypatch):
    events, replace = [], Path.replace
    monkeypatch.setattr(files, "_flush", lambda path: events.append(("flush", path.name)))
    monkeypatch.setattr(Path, "replace", lambda *paths: events.append(("rename", paths[0].name)) or replace(*paths))
    files.write_text(tmp_path / "x", "text")
    part = f".x.{os.getpid()}.part"
    assert events == [("flush", part), ("rename", part), ("flush", tmp_path.name)]
    events.clear()
    with files.write_folder_whole(tmp_path / "folder", last="a") as beside:
        for name in "abc":
            (beside / name).write_text(name)
    assert events == [*(("flush", name) for name in "bca"), *(("rename", name) for name in "bca"), ("flush", "folder")]


def test_parts_that_killed_processes_left_are_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    old, young, living, other = (
        tmp_path / f".{name}.{pid}.part"
        for name, pid in (("x", dead.pid), ("x", dead.pid + 2**22), ("x", os.getpid() + 0), ("y", dead.pid))
    )
    for path in (old, living, other):
        path.write_text("")
        os.utime(path, (0, 0))
    young.write_text("")
    files.remove_stale_parts(tmp_path, "x")
    assert [path.exists() for path in (old, young, living, other)] == [False, True, True, True]
    left = tmp_path / "states" / f".x_state_epoch_0_update_2.pt.{dead.pid}.part"
    left.parent.mkdir()
    left.write_text("")
    (left.parent / f".x_state_epoch_0_update_4.pt.{os.getpid()}.part").write_text("")  # of one with our number
    with files.write_folder_whole(tmp_path / "teacher") as beside:
        (beside / "a").write_text("")
        killed = shutil.copytree(beside, tmp_path / "killed")
    killed.rename(beside)  # as if the process before, with our number, had been killed in it
    with files.write_folder_whole(tmp_path / "teacher") as beside:
        assert not list(beside.iterdir())
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == ["a"]
    States(left.parent, "x", own=True).finish()
    assert not left.parent.exists()


def test_a_folder_changes_places_with_its_successor(tmp_path, monkeypatch):
    """In one step where the system can, in two where it cannot; a successor that cannot come leaves the old one."""
    for private in (True, False):
        monkeypatch.setattr(libc, "PRIVATE", private)
        for content in ("one", "two"):
            with files.replace_folder(tmp_path / "folder") as beside:
                (beside / "file").write_text(content)
        assert (tmp_path / "folder" / "file").read_text() == "two"
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
        shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    (tmp_path / "beside").mkdir()
    assert not libc.exchange(tmp_path / "folder", tmp_path / "beside")
    with pytest.raises(FileNotFoundError):
        files._rename_over(tmp_path / "nothing", tmp_path / "folder")
    assert (tmp_path / "folder" / "file").read_text() == "old"


def test_a_mount_point_is_refused_before_the_work(student, tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "mounted")
    with pytest.raises(InputError, match="is a mount point"):
        CandidateIndex.build(student(), iter(()), tmp_path / "mounted")


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with files.replace_folder(tmp_path / "link") as beside:
        (beside / "file").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_a_cache_that_is_deleted_under_a_running_job(student_flags, checkpoints, unbroken, data, monkeypatch):
    original = trainer.Trainer.update

    def update(self):
        for path in data("mrpc").glob("*_separate"):
            path.unlink()
        original(self)

    monkeypatch.setattr(trainer.Trainer, "update", update)
    dse_train_runner.main(student_flags(gradient_accumulation_steps=1))
    assert_same_run(checkpoints()[-1], unbroken)


def test_kills_in_short(tmp_path):
    """Two of tests/soak_resume.py's; the whole soak is run by hand."""
    assert soak(kills=2, seed=1, pairs=300, folder=tmp_path) == 2


def epochs_of(run: Path) -> dict[str, int]:
    """The students' folders of a run, and the epochs that they tell."""
    return {path.parent.name: json.loads(path.read_text())["origin"]["epoch"] for path in run.glob("best*/config.json")}


def better_each_epoch(monkeypatch) -> None:
    """Have every epoch be better than those before it."""
    monkeypatch.setattr("dse.training.student_run.StudentRun.best", lambda run: (run.trainer.history or [None])[-1])


def test_21_a_foreign_file_in_best_costs_no_work(
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
    assert "the best epoch so far, 1, goes elsewhere: " in caplog.text
    assert_same_run(checkpoints()[-1], unbroken)
    assert epochs_of(run) == {"best_epoch_1": 1}
    assert [path.name for path in (run / "best").iterdir()] == [".DS_Store"]
    assert DSESiameseClassifier.from_pretrained(run / "best_epoch_1").origin["epoch"] == 1
    dse_train_runner.main([*student_flags(**{**flags, "epochs": 3}), "--resume"])
    assert epochs_of(run) == {"best_epoch_2": 2}
    (run / "best" / ".DS_Store").unlink()
    dse_train_runner.main([*student_flags(**{**flags, "epochs": 4}), "--resume"])
    assert epochs_of(run) == {"best": 3}


def test_21_the_checkpoint_comes_before_the_best_folder(student_flags, tmp_path, monkeypatch):
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


def test_21_a_student_that_the_run_did_not_write_stays_in_best(student_flags, tmp_path, caplog):
    """One that tells nothing of its training (item 26), and one that tells of another command without a stamp."""
    dse_train_runner.main(student_flags(epochs=1))
    (run,) = (tmp_path / "checkpoints").iterdir()
    mine = DSESiameseClassifier.from_pretrained(run / "best")
    own = {key: value for key, value in mine.origin.items() if key != "stamp"}  # as before there were stamps
    for origin in (None, {**own, "commands": [["dse_train_runner.py", {"lr": 1}]]}):
        mine.origin = origin
        mine.save_pretrained(run / "best")
        before = contents(run / "best")
        dse_train_runner.main([*student_flags(epochs=1), "--resume"])
        assert "holds another run's student and stays" in caplog.text
        assert contents(run / "best") == before
        assert json.loads((run / "best_epoch_0" / "config.json").read_text())["origin"]["epoch"] == 0
        shutil.rmtree(run / "best_epoch_0")
    mine.origin = {**own, "epoch": 9}
    mine.save_pretrained(run / "best")
    dse_train_runner.main([*student_flags(epochs=1), "--resume"])
    assert epochs_of(run) == {"best": 0}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_23_another_runs_files_in_the_same_folder_stay(unbroken, student_flags, tmp_path, monkeypatch, capsys):
    """Same experiment name, in every position that the run itself will have: checkpoints, states and `best`."""
    flags = {**FLAGS, "checkpoint_dir": tmp_path / "other"}
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
        stopped(dse_train_runner.main, student_flags(**FLAGS), capsys)
    (start,) = (tmp_path / "checkpoints").glob("*/*_state_epoch_0_update_2.pt")
    mine = Path(shutil.copyfile(start, other / start.name))
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        line = stopped(dse_train_runner.main, student_flags(**FLAGS, trainer_checkpoint=mine), capsys)[1]
    assert {name: contents(other).get(name) for name in before} == before
    state = line.split("state in ")[1].split(";")[0]  # of the position that the other run has a state of, too
    assert state.endswith("_state_epoch_1_update_2.pt")
    dse_train_runner.main(student_flags(**FLAGS, trainer_checkpoint=state))
    after = contents(other)
    assert {name: after.get(name) for name in before} == before
    assert not mine.exists()
    new = [path for path in other.glob("*.pt") if path.name not in before]
    assert {Checkpoint.read(path).stamp for path in new} == {Checkpoint.read(start).stamp}
    assert_same_run(max(new, key=lambda path: path.stat().st_mtime_ns), unbroken)
    assert epochs_of(other) == {"best": 0, "best_epoch_0": 0}


@pytest.mark.parametrize("task", ["mrpc", "mnli"])
def test_23_only_a_task_with_a_mismatched_set_has_a_second_folder(task, teacher_flags, tmp_path):
    others = tmp_path / "teacher-MM" / "eval_results.txt"
    others.parent.mkdir()
    others.write_text("of another teacher")
    finetune_bert.main(teacher_flags(task, do_eval=False))
    assert others.exists() == (task == "mrpc")


def test_23_a_folder_beside_that_cannot_be_written_is_nothing_to_mrpc(teacher_flags, tmp_path):
    (tmp_path / "teacher-MM").write_text("a file")
    finetune_bert.main(teacher_flags())
    assert (tmp_path / "teacher" / "eval_results.txt").exists()


def test_24_a_spoiled_run_does_not_block_a_sound_one(student_flags, checkpoints, caplog):
    """The spoiled one is newer; it stays as it is."""
    dse_train_runner.main(student_flags(epochs=1))
    (sound,) = checkpoints()
    spoiled = sound.parent.with_name("bert_distillation_2099_01_01-00_00_00")
    shutil.copytree(sound.parent, spoiled)
    truncate(spoiled / sound.name)
    before = contents(spoiled)
    dse_train_runner.main([*student_flags(epochs=2), "--resume"])
    assert f"{spoiled}: none of its states can be read; looking for another run" in caplog.text
    assert contents(spoiled) == before
    assert {path.name[-10:] for path in sound.parent.glob("*.pt")} >= {"epoch_1.pt"}


def test_20_what_kills_left_of_states_goes_with_the_next_state(
    student_flags, teacher_flags, tmp_path, monkeypatch, capsys
):
    """Of the first save of a run that has no other file, and of later ones, though it was a minute ago."""
    number = 2**22 + 1
    first = tmp_path / "checkpoints" / "bert_distillation_2020_01_01-00_00_00"
    first.mkdir(parents=True)
    (first / f".bert_distillation_state_epoch_0_update_2.pt.{number}.part").write_bytes(bytes(1000))
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        stopped(dse_train_runner.main, [*student_flags(**FLAGS), "--resume"], capsys)
    assert not first.exists()
    (run,) = (tmp_path / "checkpoints").iterdir()
    left = run / f".bert_distillation_state_epoch_1_update_1.pt.{number}.part"
    (run / f".best.{number}.part").mkdir()
    left.write_bytes(bytes(1000))
    with monkeypatch.context() as patched:
        stop_at(patched, 1)
        stopped(dse_train_runner.main, [*student_flags(**FLAGS), "--resume"], capsys)
    assert not list(run.glob(".*.part"))
    with monkeypatch.context() as patched:
        stop_at(patched, 1)
        stopped(finetune_bert.main, teacher_flags(), capsys)
    left = tmp_path / "teacher" / "training_state" / f".teacher_state_epoch_0_update_2.pt.{number}.part"
    left.write_bytes(bytes(1000))
    with monkeypatch.context() as patched:
        stop_at(patched, 1)
        stopped(finetune_bert.main, [*teacher_flags(), "--resume"], capsys)
    assert not left.exists()


def test_26_a_state_within_an_epoch_is_exported_without_metrics(student_flags, tmp_path, monkeypatch, capsys, caplog):
    """Those of the epoch before are of other weights."""
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        stopped(dse_train_runner.main, student_flags(**FLAGS), capsys)
    for state in (tmp_path / "checkpoints").glob("*/*_state_*.pt"):
        caplog.set_level("INFO")
        dse.__main__.main(["export", "--trainer_checkpoint", str(state), "--output", str(tmp_path / "out")])
        assert "student of mrpc, within an epoch, without metrics: " in caplog.text
        origin = DSESiameseClassifier.from_pretrained(tmp_path / "out").origin
        assert (origin["epoch"], origin["metrics"]) == (None, {})
    assert "Metrics" not in (tmp_path / "out" / "README.md").read_text()


def moved(argv: list[str], changes: dict[str, object]) -> list[str]:
    """The flags with other values."""
    argv = list(argv)
    for flag, value in changes.items():
        argv[argv.index(f"--{flag}") + 1] = str(value)
    return argv


def test_30_a_student_goes_on_where_its_inputs_have_other_names(
    unbroken, student_flags, bert, data, logits, copied, checkpoints, tmp_path, monkeypatch, capsys, refused, caplog
):
    """Data, logits, encoder and the run's folder elsewhere: hashes tell that they are the same, or another."""
    argv = [*student_flags(**FLAGS), "--resume"]
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


def test_30_a_student_needs_its_encoder_no_more(
    unbroken, student_flags, bert, copied, checkpoints, monkeypatch, capsys
):
    """Its folder is gone, and the name is the same; and so where the state does not know the encoder's hashes."""
    model = copied(bert, "gone")
    for known in (True, False):
        argv = [*student_flags(**FLAGS, bert_model=model), "--resume"]
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


def test_30_an_older_state_knows_its_encoder_by_name(student_flags, bert, copied, checkpoints, refused):
    dse_train_runner.main(student_flags(epochs=1))
    (path,) = checkpoints()
    entries = vars(Checkpoint.read(path))
    del entries["data"]["bert"]
    files.save_tensors(path, entries)
    line = refused(dse_train_runner.main, [*student_flags(bert_model=copied(bert)), "--resume"])
    assert "in the run: going on needs the same encoder" in line
    dse_train_runner.main([*student_flags(), "--resume"])
    assert checkpoints()[-1].name.endswith("epoch_1.pt")


def test_30_a_teacher_goes_on_where_its_inputs_have_other_names(
    teacher_flags, bert, data, copied, tmp_path, monkeypatch, capsys, refused, edit_json, caplog
):
    flags = [*teacher_flags(), "--resume"]
    finetune_bert.main(teacher_flags(output_dir=tmp_path / "unbroken"))
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        stopped(finetune_bert.main, flags, capsys)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    changes = {"data_dir": copied(data("mrpc"), "data"), "bert_model": copied(bert, "bert"),
               "output_dir": tmp_path / "moved", "log_dir": "logs"}  # fmt: skip
    other = copied(bert, "other")
    flip(other / "model.safetensors", 0.9)
    line = refused(finetune_bert.main, moved(flags, {**changes, "bert_model": other}))
    assert f"--bert_model: {other} now, {bert} in the run, which differ in the SHA-256" in line
    finetune_bert.main(moved(flags, changes))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("moved", "unbroken")]
    assert weights[0] == weights[1]
    finetune_bert.main(moved(flags, {**changes, "data_dir": data("mrpc")}))
    assert "nothing to train: the teacher in" in caplog.text


def test_27_an_earlier_teachers_tokenizer_does_not_change_the_new_ones(
    teacher_flags, bert, tmp_path, monkeypatch, capsys, refused, edit_json
):
    """Files that the new one does not write: an earlier teacher's go, others' are refused, before the training."""
    folder, flags = tmp_path / "teacher", [*teacher_flags(), "--overwrite_output_dir"]
    stale = {"special_tokens_map.json": '{"unk_token": "doctor"}', "vocab.txt": "[PAD]\n[UNK]\n"}

    def put_back() -> None:
        for name, text in {**stale, "notes.txt": "mine"}.items():
            (folder / name).write_text(text)

    finetune_bert.main(flags)
    put_back()
    before = contents(folder)
    assert f"{folder} holds vocab.txt, special_tokens_map.json, which would change" in refused(
        finetune_bert.main, flags
    )
    assert contents(folder) == before
    training = json.loads(before["training.json"])
    edit_json(folder / "training.json", sha256={**training["sha256"], **dict.fromkeys(stale, "of an earlier teacher")})
    finetune_bert.main(flags)
    assert tokenizer_key(load_tokenizer(folder, True, "--output_dir")) == training["tokenizer"]
    assert {path.name for path in folder.iterdir()} & {*stale, "notes.txt"} == {"notes.txt"}
    put_back()
    monkeypatch.setattr(finetune_bert, "STALE", ())
    code, line = stopped(finetune_bert.main, flags, capsys)
    assert (code, "its tokenizer is not the one of the training" in line) == (1, True)
    (folder / "special_tokens_map.json").unlink()
    finetune_bert.main([*flags, "--resume"])
    assert (folder / "eval_results.txt").exists()
