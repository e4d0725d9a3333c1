"""The quickstart on made-up data."""

import re

import pytest

from dse import __main__ as entry
from dse.commands import quickstart
from dse.data.processors import read_examples
from dse.data.tasks import get_task


def test_quickstart_runs_every_stage_and_says_that_the_data_is_synthetic(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "TRAIN_PAIRS", 64)  # whether it learns is the command's own affair, at full size
    monkeypatch.setattr(quickstart, "DEV_PAIRS", 40)
    entry.main(["quickstart", "--output_dir", str(tmp_path)])
    output = capsys.readouterr().out
    table = {line[:16].strip(): line[16:].split() for line in output.splitlines() if line[16:].strip()}
    labels = read_examples(get_task("mrpc"), tmp_path / "data", "dev").labels
    share = sum(labels) / len(labels)
    assert float(table["majority class"][0]) == pytest.approx(max(share, 1 - share), abs=6e-4)
    assert {"teacher", "student"} <= table.keys()
    assert "made up" in output
    ranks = re.findall(r"^  (\d\.\d{3})  (.*)$", output, re.MULTILINE)
    assert len(ranks) == 3
    assert sorted(ranks, key=lambda rank: -float(rank[0])) == ranks
    assert {text for _, text in ranks} <= set(read_examples(get_task("mrpc"), tmp_path / "data", "dev").second)
    assert len(re.findall(r"^  python ", output, re.MULTILINE)) == 3
    for name in ("teacher/model.safetensors", "logits/teacher_logits.pt", "data/train.tsv"):
        assert (tmp_path / name).is_file()
