"""`python -m dse`, the quickstart and the made-up data."""

import random

import pytest

from dse import __main__ as entry
from dse.commands import quickstart
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.experiments import synthetic


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main(["-h"])
    assert stop.value.code == 0
    assert "quickstart  Run stages 2 to 5 on made-up data" in capsys.readouterr().out


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
    for name in ("teacher/model.safetensors", "logits/teacher_logits.pt", "data/train.tsv"):
        assert (tmp_path / name).is_file()


def test_made_up_pairs_are_what_their_labels_say():
    """The second way: look every word up and compare concepts."""
    concept_of = {
        word: (s, c) for s, slot in enumerate(synthetic.SLOTS) for c, concept in enumerate(slot) for word in concept
    }
    assert len(concept_of) == sum(len(concept) for slot in synthetic.SLOTS for concept in slot), (
        "a word in two concepts"
    )
    rng, seen = random.Random(0), set()
    for _ in range(200):
        label, *sentences = synthetic.make_pair(rng)
        first, second = ({concept_of[word] for word in text.split() if word in concept_of} for text in sentences)
        assert len(first) == len(second) == 5
        assert len(first - second) == (0 if label else 2)
        seen.add(label)
    assert seen == {0, 1}
