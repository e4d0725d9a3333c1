"""Checkpoints that are spoiled, or within an epoch."""

from helpers import SHORT_RUN, flip, stop_at, stopped

import dse.__main__
import dse_train_runner
import load_dse_checkpoint_example
from dse.models import DSESiameseClassifier


def test_a_spoiled_checkpoint_is_refused_for_use(student_flags, checkpoints, refused):
    dse_train_runner.main(student_flags(epochs=1))
    flip(checkpoints()[0], 0.4)
    argv = ["--task_name", "mrpc", "--trainer_checkpoint", checkpoints()[0]]
    assert "is truncated or not a checkpoint" in refused(load_dse_checkpoint_example.main, argv)


def test_a_state_within_an_epoch_is_exported_without_metrics(student_flags, tmp_path, monkeypatch, capsys, caplog):
    """Those of the epoch before are of other weights."""
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        stopped(dse_train_runner.main, student_flags(**SHORT_RUN), capsys)
    for state in (tmp_path / "checkpoints").glob("*/*_state_*.pt"):
        caplog.set_level("INFO")
        dse.__main__.main(["export", "--trainer_checkpoint", str(state), "--output", str(tmp_path / "out")])
        assert "student of mrpc, from within an epoch, so without metrics: " in caplog.text
        origin = DSESiameseClassifier.from_pretrained(tmp_path / "out").origin
        assert (origin["epoch"], origin["metrics"]) == (None, {})
    assert "Metrics" not in (tmp_path / "out" / "README.md").read_text()
