"""What every program does: the log, the terminal, lack of memory."""

import errno
import importlib
import logging
import os
import sys

import pytest
import torch
from tqdm import tqdm

import dse_train_runner
import finetune_bert
from dse import cli
from dse.networks.poolers import POOLERS
from dse.system.errors import lack_of_memory


@pytest.mark.parametrize("how", ["full", "gone", "closed"])
def test_a_console_that_cannot_be_written_ends_nothing(how, teacher_flags, tmp_path, monkeypatch):
    """The log's lines and the progress bar, of a stage that ends as if nothing had been."""
    if how == "full":
        console = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        console = os.fdopen(writer, "w", buffering=1)
        if how == "closed":
            console.close()
    bars, original = [], tqdm.__init__

    def shown(self, *args, **options):
        bars.append(self)
        original(self, *args, **{**options, "disable": False, "mininterval": 0, "miniters": 1})

    monkeypatch.setattr(tqdm, "__init__", shown)
    monkeypatch.setattr(sys, "stderr", console)
    finetune_bert.main(teacher_flags())
    assert (tmp_path / "teacher" / "eval_results.txt").exists()
    assert any(bar.n == 3 for bar in bars), "no bar of a training was shown"
    with pytest.raises(SystemExit) as stop:
        finetune_bert.main(teacher_flags())  # whose one line is lost, its exit code is not
    assert stop.value.code == 2


def no_memory(error: Exception):
    def raised(*_, **__):
        raise error

    return raised


OF_CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free"
)
CPU_ONLY = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "OSError: [Errno 12] Cannot allocate memory"),
        (torch.OutOfMemoryError(f"{OF_CUDA}. Including non-PyTorch memory, this"), f"OutOfMemoryError: {OF_CUDA}"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
         "RuntimeError: CUDA error: out of memory; GPU 3 has 40.00 GiB, of which 0.50 GiB is free"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
         "RuntimeError: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`; GPU 3 has 40.00 GiB, of which "
         "0.50 GiB is free"),
        (RuntimeError(CPU_ONLY), f"RuntimeError: {CPU_ONLY}"),
    ],
)  # fmt: skip
def test_lack_of_memory_is_one_line_that_names_what_helps(
    error, what, teacher_flags, student_flags, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**29, 40 * 2**30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for script, argv in (("finetune_bert", teacher_flags()), ("dse_train_runner", student_flags())):
        module = importlib.import_module(script)
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
            patched.setattr(module, "get_task", no_memory(error))
            module.main(argv)
        assert stop.value.code == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        ways = ("--batch_size", "--train_batch_size", "--gradient_accumulation_steps", "--precision bf16",
                "--gradient_checkpointing", "--max_seq_length")  # fmt: skip
        assert all(text in told for text in [f"{script}.py: error: out of memory ({what}): ", *ways])


def test_memory_that_runs_out_in_a_training_is_the_last_line(student_flags, monkeypatch, capsys):
    monkeypatch.setattr("dse.training.trainer.Trainer.backward", no_memory(torch.OutOfMemoryError(f"{OF_CUDA}.")))
    with pytest.raises(SystemExit) as stop:
        dse_train_runner.main(student_flags())
    assert stop.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert errors[0].startswith(f"dse_train_runner.py: error: out of memory (OutOfMemoryError: {OF_CUDA}): of these")
    assert len(errors) == 1


def test_a_gpu_that_does_not_answer_keeps_no_error_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", no_memory(RuntimeError("CUDA error: out of memory")))
    assert lack_of_memory(RuntimeError("CUDA error: out of memory")) == "RuntimeError: CUDA error: out of memory"
    assert lack_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered")) is None


def test_a_head_beyond_memory(student_flags, refused, capsys):
    for changes in ({"fc_dims": [2**63, 1]}, {"additional_embedding_layer_size": 2**63}):
        assert "is above 9223372036854775807" in refused(dse_train_runner.main, student_flags(**changes))
    for sizes in ([2**40, 1], [2**62, 1]):
        with pytest.raises(SystemExit) as stop:
            dse_train_runner.main(student_flags(fc_dims=sizes))
        assert stop.value.code == 1
        assert "use smaller layers" in capsys.readouterr().err.splitlines()[-1]


def test_other_errors_are_not_hidden(monkeypatch, teacher_flags):
    monkeypatch.setattr(finetune_bert, "get_task", no_memory(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        finetune_bert.main(teacher_flags())


def test_the_log_on_the_terminal(capsys):
    cli.set_up_logging()
    logging.getLogger("dse.test").warning("caf\u00e9 %s", "\x1b[2J\r\nforged")
    assert capsys.readouterr().err.endswith(" WARNING caf\u00e9 \\x1b[2J\\r\\nforged\n")


def test_the_help_shows_defaults_that_mean_something(capsys):
    """Lists as they are typed, 0 too, words for what is worked out; nothing for switches and required flags."""
    with pytest.raises(SystemExit):
        dse_train_runner.main(["-h"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"(default: {value})" in shown for value in ("512 1", "0", "0.5", "--lr", "concat_top_mean"))
    assert not any(f"(default: {value})" in shown for value in ("None", "False", "", "[512, 1]"))
    assert ") (default" not in shown.replace("(max) (default", "").replace("u.v (dot) (default", "")


def test_the_help_is_in_groups_with_an_example_and_all_poolers(capsys):
    with pytest.raises(SystemExit):
        dse_train_runner.main(["-h"])
    shown = capsys.readouterr().out
    titles = ["options:", "data:", "model:", "training:", "output:", "long runs:", "hardware:"]
    lines = shown.splitlines()
    assert [line for line in lines if line in titles] == titles
    places = {title: lines.index(title) for title in titles}
    of = {flag: next(i for i, line in enumerate(lines) if i > 30 and line.startswith(f"  --{flag} ")) for flag in
          ("data_dir", "fc_dims", "lr", "log_dir", "save_every", "gpu_id")}  # fmt: skip
    assert [*of.values()] == sorted(of.values())
    assert all(places[title] < line for title, line in zip(titles[1:], of.values(), strict=True))
    assert all(name in " ".join(shown.split()) for name in POOLERS)
    assert "\n    python dse_train_runner.py --task_name mrpc " in shown
