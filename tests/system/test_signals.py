"""Signals end a program in order."""

import os
import signal

import pytest
from helpers import stopped

import dse_train_runner
import finetune_bert
import run_distillation_logits_creator
from dse.system import signals


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
    monkeypatch.setattr(script, "get_task", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    argv = student_flags() if name == "dse_train_runner" else teacher_flags()
    if name.startswith("run_"):
        argv = ["--task_name", "mrpc", "--data_dir", "x", "--train_features_path", "x", "--bert_checkpoint_dir", "x"]
    code, line = stopped(script.main, argv, capsys)
    assert (code, line) == (
        130,
        f"{name}.py: stopped by Ctrl-C: no file is half-written; run the same command to start again",
    )


def test_a_signal_when_the_console_is_gone(monkeypatch):
    def gone(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", gone)
    with signals.caught(), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested() == signal.SIGTERM
