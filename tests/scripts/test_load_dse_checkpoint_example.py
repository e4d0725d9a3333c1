"""load_dse_checkpoint_example.py: checkpoints alone are enough."""

import os
import re
import sys

import numpy as np
import pytest
import torch

import dse_train_runner
import load_dse_checkpoint_example
from dse.models import DSESiameseClassifier


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


def test_the_example_encodes_and_scores(student_flags, checkpoints, capsys):
    dse_train_runner.main(student_flags(epochs=1))
    capsys.readouterr()
    load_dse_checkpoint_example.main(["--task_name", "mrpc", "--trainer_checkpoint", str(checkpoints()[-1])])
    output = capsys.readouterr().out
    model = DSESiameseClassifier.from_checkpoint(checkpoints()[-1])
    sentences = load_dse_checkpoint_example.SENTENCES
    assert f"Embedding: {torch.from_numpy(model.encode(sentences))[0]}" in output
    assert f"Score: {model.score([sentences])[0]}" in output


def test_the_example_says_whose_the_probability_is(student_flags, checkpoints, capsys):
    dse_train_runner.main(student_flags("rte", epochs=1))
    load_dse_checkpoint_example.main(["--task_name", "rte", "--trainer_checkpoint", str(checkpoints()[-1])])
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    second = 1 / (1 + np.exp(-float(lines["Score"])))
    assert lines["Probabilities"] == f"entailment {1 - second:.4f}, not_entailment {second:.4f}"


@pytest.mark.parametrize(("how", "code"), [("full", 1), ("gone", 141)])
def test_an_output_that_cannot_be_written_ends_the_example(how, code, bert, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    output = os.fdopen(os.open("/dev/full", os.O_WRONLY) if how == "full" else writer, "w")
    monkeypatch.setattr(sys, "stdout", output)
    flags = ["--task_name", "mrpc", "--bert_model", str(bert), "--do_lower_case", "--max_seq_length", "32",
             "--pooler_num_top_hidden_layers", "2"]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        load_dse_checkpoint_example.main(flags)
    assert stop.value.code == code
    told = "error: the output cannot be written (No space left on device)" in capfd.readouterr().err
    assert told == (how == "full")
    output.close()  # what it still held goes nowhere
