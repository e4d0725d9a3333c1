"""The shared loop: groups, modes, metrics of the batches as they passed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dse.networks.inference import infer
from dse.training.epoch_plan import EpochPlan, count_updates, epoch_order
from dse.training.optimization import make_optimizer
from dse.training.run import Run
from dse.training.trainer import Trainer


class Line:
    """The features, and the batches, of a model w * x with w = 0: row i has x = i + 1."""

    padding = "batch"

    def __init__(self, rows: int) -> None:
        self.features = self
        self.labels = np.zeros(rows, dtype=np.int64)
        self.costs = np.arange(rows) + 1
        self.max_seq_length = rows

    def __len__(self) -> int:
        return len(self.labels)

    def of_pairs(self, rows: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
        return {"input": torch.from_numpy(rows + 1.0).float()[:, None]}


class Keeper(Run):
    """What a run keeps: each save, and each epoch's record; it ends the training after epoch `last`."""

    def __init__(self, trainer: Trainer, last: int | None = None) -> None:
        super().__init__(path=None)
        self.resume(trainer)
        self.last, self.saves, self.records = last, [], []

    def save(self, name: str = "") -> None:
        self.saves.append(len(self.records))
        self.trainer.saved = Path("state")

    def after_epoch(self, record: dict) -> bool:
        self.records.append(record)
        return record["epoch"] == self.last


def trainer_of(rows: int, batch_size: int, accumulation: int, padding: str = "batch") -> tuple[Trainer, list[float]]:
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    model.precision = "fp32"
    optimizer = make_optimizer(model, 1e-9, 100, 0.0)
    gradients: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: gradients.append(model.weight.grad.item()))
    batches = Line(rows)
    batches.padding = padding
    trainer = Trainer(
        model,
        EpochPlan(batches, batch_size, accumulation, seed=5),
        loss=lambda outputs, labels, rows: outputs.mean(),
        measure=lambda outputs, labels: {"rows": float(len(outputs))},
        optimizer=optimizer,
    )
    return trainer, gradients


@pytest.mark.parametrize("padding", ["batch", "packed"])
@pytest.mark.parametrize("rows", [9, 11])
def test_each_group_has_its_own_update_and_no_gradient_leaks(rows, padding):
    """The gradient of mean(w * x) is the mean of x, so each update's is the mean over its group's batch means.

    That of the last, shorter batch counts as much as the others of its group, in one pass with them or not.
    """
    trainer, gradients = trainer_of(rows, batch_size=2, accumulation=2, padding=padding)
    Keeper(trainer).fit(2)
    expected = []
    for epoch in (0, 1):
        x = epoch_order(rows, 5, epoch) + 1.0
        expected += [(x[0:2].mean() + x[2:4].mean()) / 2, (x[4:6].mean() + x[6:8].mean()) / 2]
        expected += [x[8]] if rows == 9 else [(x[8:10].mean() + x[10]) / 2]
    np.testing.assert_allclose(gradients, expected, rtol=1e-6)
    assert trainer.optimizer.updates == 6 == 2 * count_updates(rows, 2, 2)


def test_packed_batches_share_a_pass_while_one_padded_batch_has_the_places():
    """Rows 0 to 9 cost 1 to 10, and a padded batch of two has 20 places: 1+2+3+4 fit, 5+6 more are one too many."""
    trainer, _ = trainer_of(rows=10, batch_size=2, accumulation=5)
    plan, group = trainer.plan, [np.array([i, i + 1]) for i in (0, 2, 4, 6, 8)]

    def passes() -> list[list[int]]:
        return [[int(part.rows[0]) for part in together] for together in plan.passes(group)]

    assert passes() == [[0], [2], [4], [6], [8]]
    plan.batches.padding = "packed"
    assert passes() == [[0, 2], [4], [6], [8]]
    plan.batches.max_seq_length = 27  # 2 x 27 = 54 places; all ten cost 55
    assert passes() == [[0, 2, 4, 6], [8]]
    plan.batches.max_seq_length = 28  # 56
    assert passes() == [[0, 2, 4, 6, 8]]
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append(1))
    losses, outputs = trainer.backward(plan.passes(group)[0][:2], 5)
    assert len(calls) == 1
    assert (losses.shape, outputs.shape) == ((2,), (4, 1))


def test_batches_are_numbered_through_an_epoch():
    trainer, _ = trainer_of(rows=10, batch_size=2, accumulation=2)
    groups = trainer.plan.groups(0)
    numbers = [[part.number for (part,) in trainer.plan.passes(group, i)] for i, group in enumerate(groups)]
    assert numbers == [[1, 2], [3, 4], [5]]


def test_training_mode_returns_after_validation():
    trainer, _ = trainer_of(rows=4, batch_size=2, accumulation=1)
    trainer.model.eval()  # as from_pretrained leaves it
    modes = []
    trainer.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    Keeper(trainer).fit(2, lambda: {"n": float(len(infer(trainer.model, Line(3), 3, trainer.device, "v")))})
    assert modes == [True, True, False, True, True, False]
    assert trainer.model.training, "an evaluation left the model in evaluation mode"


def test_validation_every_second_epoch_and_after_the_last():
    trainer, _ = trainer_of(rows=4, batch_size=2, accumulation=1)
    Keeper(trainer).fit(5, lambda: {"n": 1.0}, validate_every=2)
    assert [record["epoch"] for record in trainer.history if "validation" in record] == [1, 3, 4]
    assert [record["updates"] for record in trainer.history] == [2, 4, 6, 8, 10]


def test_after_epoch_can_end_the_training():
    trainer, _ = trainer_of(rows=4, batch_size=2, accumulation=1)
    keeper = Keeper(trainer, last=1)
    keeper.fit(9)
    assert len(trainer.history) == 2
    assert [record["epoch"] for record in keeper.records] == [0, 1]
    assert keeper.saves == []  # without save_every


def test_a_state_is_kept_every_so_many_updates():
    """Five updates an epoch: the 3rd, the 6th and the 9th."""
    trainer, _ = trainer_of(rows=10, batch_size=2, accumulation=1)
    keeper = Keeper(trainer)
    keeper.fit(2, save_every=3)
    assert keeper.saves == [0, 1, 1]  # epochs done by then
    assert trainer.saved == Path("state")


def test_predictions_come_back_in_file_order():
    trainer, _ = trainer_of(rows=7, batch_size=2, accumulation=1)
    torch.nn.init.ones_(trainer.model.weight)
    outputs = infer(trainer.model, Line(7), 3, trainer.device, "p")
    assert outputs[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_what_a_run_goes_on_from_is_compared_between_processes(monkeypatch):
    compared = []
    monkeypatch.setattr("dse.system.parallel.agree", lambda numbers, _: compared.append(numbers))
    trainer, _ = trainer_of(rows=4, batch_size=2, accumulation=1)
    Keeper(trainer).fit(1)
    Keeper(trainer).fit(2)
    assert compared == [[0, 0, 0, 5, 4], [1, 0, 2, 5, 4]]


def test_a_step_that_the_scaler_skips_writes_no_second_state(monkeypatch):
    """Of five steps in fp16 the first and the third are skipped, as they are while the scale is too high."""
    trainer, _ = trainer_of(rows=10, batch_size=2, accumulation=1)
    step, calls = trainer.optimizer.step, []

    def skipped(*arguments, **options):
        calls.append(1)
        return None if len(calls) in (1, 3) else step(*arguments, **options)

    monkeypatch.setattr(trainer.optimizer, "step", skipped)
    keeper = Keeper(trainer)
    keeper.fit(1, save_every=1)
    assert (len(calls), trainer.optimizer.updates, len(keeper.saves)) == (5, 3, 3)
