"""A run's identity and folder: the flags that must agree, the logs."""

import pytest

import dse_train_runner
import finetune_bert
from dse.system.errors import InputError
from dse.training.run import Identity


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


def test_logs_that_cannot_be_written_do_not_end_a_run(student_flags, tmp_path, monkeypatch, caplog):
    from dse.training import reporting

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "open", full, raising=False)
    monkeypatch.setattr(reporting, "_plot", full)
    dse_train_runner.main(student_flags(file_log=True, plot_metrics=True, plots_dir=tmp_path / "plots"))
    assert caplog.text.count(".jsonl: cannot be written (No space left on device)") == 2
    assert caplog.text.count("no plots (No space left on device)") == 2
