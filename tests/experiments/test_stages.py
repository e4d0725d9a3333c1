"""Stages of a reproduction: what they measure, where a student is."""

import numpy as np
import pytest

from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.experiments import stages
from dse.system.errors import InputError


def test_thresholds_come_from_dev():
    sets = {
        "dev": Examples(["a"] * 4, ["b"] * 4, [0, 0, 1, 1]),
        "test": Examples(["a"] * 4, ["b"] * 4, [1, 0, 0, 1]),
    }
    found = stages.measure(get_task("mrpc"), sets, lambda rows: np.array([[1.0], [2.0], [3.0], [4.0]], np.float32))
    assert found["dev"] == {"f1": pytest.approx(2 / 3), "tuned_f1": 1.0, "accuracy": 0.5, "tuned_accuracy": 1.0}
    # above 2.5: two taken, one of them rightly, of two positives
    assert found["test"]["tuned_f1"] == pytest.approx(0.5)
    assert found["test"]["tuned_accuracy"] == 0.5


def test_the_best_epoch_may_stand_beside_best(student, tmp_path):
    """The newest run's latest best epoch counts, not an older epoch's `best`, nor a folder of the user's."""
    for place, epoch in (("dse_1/best", 99), ("dse_2/best", 1), ("dse_2/best_epoch_10", 10), ("dse_2/best_epoch_3", 3)):
        model = student()
        model.origin = {"epoch": epoch}
        model.save_pretrained(tmp_path / "dse" / place)
    model.origin = {"epoch": 11}
    model.save_pretrained(tmp_path / "dse" / "dse_2" / "best_of_mine")
    (tmp_path / "dse" / "dse_2" / "best.txt").write_text("mine")
    assert stages.student_folder(tmp_path, "dse") == tmp_path / "dse" / "dse_2" / "best_epoch_10"
    with pytest.raises(InputError, match="holds no student"):
        stages.student_folder(tmp_path, "labels_only")
