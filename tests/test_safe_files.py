"""What a stop, a full console, a foreign file or another name of a folder must not do: wrong numbers, lost work."""

import numpy as np
import pytest
import torch

from dse import evaluation, files, parallel
from dse.files import RunError

CPU = torch.device("cpu")


def run_steps(progress: evaluation.Progress | None, computed: list[int], costs: list[int]) -> np.ndarray:
    """Outputs that are each row's number plus 1, in steps of at most 8 places; which rows were computed."""

    def batch(rows: np.ndarray) -> dict:
        computed.extend(rows.tolist())
        return {"rows": torch.from_numpy(rows)}

    def forward(inputs: dict) -> torch.Tensor:
        return inputs["rows"].unsqueeze(1).float() + 1

    return evaluation._by_batches(forward, batch, np.array(costs), 8, CPU, "x", False, progress)


def test_19_rows_that_are_done_are_stored_and_no_others(tmp_path):
    costs, steps = [3, 9, 4, 4], [np.array([1]), np.array([2, 3]), np.array([0])]
    progress = evaluation.Progress(tmp_path / "x.partial", {"of": "x"})
    assert progress.find(steps) is None
    done, outputs = np.array([False, False, True, True]), np.full((4, 1), np.nan, np.float32)
    outputs[[2, 3], 0] = [30, 40]
    entries = {"identity": progress._identity, "done": torch.from_numpy(done), "outputs": torch.from_numpy(outputs)}
    files.save_tensors(tmp_path / "x.partial", entries)
    computed: list[int] = []
    assert run_steps(progress, computed, costs)[:, 0].tolist() == [1, 2, 30, 40]
    assert computed == [1, 0]
    computed.clear()  # the same rows in other steps, and an older format, are begun anew
    assert run_steps(progress, computed, [3, 9, 5, 4])[:, 0].tolist() == [1, 2, 3, 4]
    files.save_tensors(tmp_path / "x.partial", {"work": progress._identity, "steps": 2, "outputs": torch.zeros(4, 1)})
    assert run_steps(progress, computed, costs)[:, 0].tolist() == [1, 2, 3, 4]
    assert len(computed) == 8


def test_19_a_row_that_no_process_computed_is_not_written(monkeypatch, tmp_path):
    """Two processes, this one the first: it has rows 0 and 2, the other row 1, and none row 3."""
    monkeypatch.setattr(parallel, "size", lambda: 2)
    others = iter([np.array([0, 1, 0, 0]), np.array([[0], [7], [0], [0]], np.float32)])
    monkeypatch.setattr(parallel, "summed", lambda values: values + next(others))
    outputs = np.array([[5], [np.nan], [6], [np.nan]], np.float32)
    rows, done = evaluation._of_all(outputs, np.array([True, False, True, False]))
    assert done.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(rows[:, 0], [5, 7, 6, np.nan])
    monkeypatch.undo()
    monkeypatch.setattr(evaluation, "by_length", lambda *_: [np.array([1]), np.array([0, 3])])  # row 2 forgotten
    with pytest.raises(RunError, match=r"x: rows \[2\] and so on were not computed"):
        run_steps(None, [], [1, 1, 1, 1])
