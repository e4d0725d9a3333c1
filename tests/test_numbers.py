"""Losses, metrics, optimizer and schedule, each worked out by hand or in a second way."""

import math

import numpy as np
import pytest
import torch

from dse.training.kinds import KINDS, teacher_metrics
from dse.training.optimization import BertAdam, clip_each, make_optimizer, scheduled_rate


def sigmoid_cross_entropy(z: float, y: int) -> float:
    p = 1 / (1 + math.exp(-z))
    return -math.log(p if y else 1 - p)


def test_binary_student_loss_by_hand():
    outputs, labels = torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 1])
    targets = KINDS["binary"].targets(torch.tensor([[1.0, 4.0], [0.5, 0.0]]))
    assert targets.tolist() == [[3.0], [-0.5]]
    hard = (sigmoid_cross_entropy(2.0, 1) + sigmoid_cross_entropy(-1.0, 1)) / 2
    soft = ((2 - 3) ** 2 + (-1 + 0.5) ** 2) / 2
    for a in (0.0, 0.25, 1.0):
        loss = KINDS["binary"].student_loss(outputs, labels, targets, a)
        assert loss.item() == pytest.approx((1 - a) * hard + a * soft, rel=1e-6)


def test_multiclass_student_loss_sums_over_outputs():
    outputs, targets = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 2.0, 3.0]])
    hard = -math.log(math.exp(2) / (math.exp(1) + math.exp(2) + 1))
    loss = KINDS["multiclass"].student_loss(outputs, torch.tensor([1]), targets, 0.5)
    assert loss.item() == pytest.approx(0.5 * hard + 0.5 * (1 + 0 + 9), rel=1e-6)


def test_regression_losses():
    outputs, labels = torch.tensor([[1.0], [4.0]]), torch.tensor([2.0, 2.0])
    assert KINDS["regression"].teacher_loss(outputs, labels).item() == 2.5
    loss = KINDS["regression"].student_loss(outputs, labels, torch.tensor([[1.0], [1.0]]), 0.5)
    assert loss.item() == 0.5 * 2.5 + 0.5 * 4.5


def test_a_coefficient_of_0_leaves_the_teacher_out():
    loss = KINDS["regression"].student_loss(torch.ones(1, 1), torch.ones(1), torch.full((1, 1), math.inf), 0.0)
    assert loss.item() == 0.0


def test_binary_metrics_by_hand():
    """sigmoid(0) is 0.5, which is not above 0.5. Positive: rows 0, 1, 2; of them right: 0, 1; labels 1: 0, 1, 4."""
    outputs = np.array([[3.0], [1.0], [0.5], [0.0], [-2.0]], dtype=np.float32)
    labels = np.array([1, 1, 0, 0, 1])
    metrics = KINDS["binary"].metrics(outputs, labels, (0.5, 0.9))
    assert metrics == pytest.approx(
        {
            "accuracy_0.5": 3 / 5, "precision_0.5": 2 / 3, "recall_0.5": 2 / 3, "f1_0.5": 2 / 3,
            "accuracy_0.9": 3 / 5, "precision_0.9": 1.0, "recall_0.9": 1 / 3, "f1_0.9": 0.5,
        }
    )  # fmt: skip
    assert KINDS["binary"].score(metrics) == ("f1", pytest.approx(2 / 3))


def test_f1_is_0_where_nothing_is_positive():
    metrics = KINDS["binary"].metrics(np.full((3, 1), -9.0), np.array([1, 0, 0]), (0.5,))
    assert (metrics["f1_0.5"], metrics["precision_0.5"], metrics["accuracy_0.5"]) == (0.0, 0.0, pytest.approx(2 / 3))


def test_multiclass_and_regression_metrics():
    outputs = np.array([[0.1, 0.9, 0], [2, 1, 0], [0, 0, 1]])
    assert KINDS["multiclass"].metrics(outputs, np.array([1, 1, 2])) == {"accuracy": pytest.approx(2 / 3)}
    # Deviations from the mean: -1.25 -.25 -.25 1.75 (squares sum to 4.75) and -1 -1 1 1 (to 4); products to 3.
    scores = KINDS["regression"].metrics(np.array([[1.0], [2.0], [2.0], [4.0]]), np.array([1.0, 1.0, 3.0, 3.0]))
    assert scores["pearson"] == pytest.approx(3 / math.sqrt(4.75 * 4))
    # Ranks 1, 2.5, 2.5, 4 and 1.5, 1.5, 3.5, 3.5: squares sum to 4.5 and 4, products to 3.
    assert scores["spearman"] == pytest.approx(3 / math.sqrt(4.5 * 4))
    assert KINDS["regression"].score(scores) == ("pearson", scores["pearson"])


def test_constant_outputs_have_no_correlation():
    assert math.isnan(KINDS["regression"].metrics(np.ones((3, 1)), np.array([1.0, 2.0, 3.0]))["pearson"])


def test_teacher_metrics_by_hand():
    logits = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # predicts 1 0 1 1
    labels = np.array([1, 0, 0, 1])
    metrics = teacher_metrics(("acc", "f1", "acc_and_f1", "mcc"), logits, labels)
    # true positives 2, false positives 1, true negatives 1, false negatives 0
    assert metrics["acc"] == 0.75
    assert metrics["f1"] == pytest.approx(0.8)
    assert metrics["acc_and_f1"] == pytest.approx(0.775)
    assert metrics["mcc"] == pytest.approx((2 * 1 - 1 * 0) / math.sqrt(3 * 2 * 2 * 1))
    scores = teacher_metrics(
        ("pearson", "spearmanr", "corr"), np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0])
    )
    assert teacher_metrics(("corr",), np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0])).keys() == {"corr"}
    assert scores["corr"] == pytest.approx((scores["pearson"] + 1.0) / 2)


@pytest.mark.parametrize(
    ("updates", "warmup", "rate"),
    [
        *((0, 0.1, 0.0), (1, 0.1, 1.0), (2, 0.4, 0.5), (5, 0.1, 5 / 9), (10, 0.1, 0.0), (11, 0.1, 0.0)),
        *((0, 0.0, 1.0), (5, 0.0, 0.5), (5, 1.0, 0.5), (10, 1.0, 0.0)),
    ],
)
def test_schedule(updates, warmup, rate):
    assert scheduled_rate(1.0, updates, 10, warmup) == pytest.approx(rate)


def test_two_updates_of_bert_adam_by_hand():
    """A tensor (3, 4) with gradient (30, 40), which clipping makes (.6, .8); rate 1 for the first update, .5 then."""
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = BertAdam([parameter], lr=1.0, t_total=2, warmup=0.0)
    expected, m, v = np.array([3.0, 4.0]), 0.0, 0.0
    for rate, gradient in ((1.0, np.array([30.0, 40.0])), (0.5, np.array([0.06, -0.08]))):
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        g = gradient / max(1.0, float(np.hypot(*gradient)) + 1e-6)  # torch's clip adds 1e-6 to the norm
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected = expected - rate * (m / (np.sqrt(v) + 1e-6) + 0.01 * expected)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-6)
    assert optimizer.next_rate == 0.0


def test_no_gradient_no_decay():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "unused": torch.nn.Linear(2, 1)})
    before = model["unused"].weight.clone()
    optimizer = make_optimizer(model, 1.0, 10, 0.0)
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model["unused"].weight, before)


def test_biases_and_layer_norms_are_not_decayed():
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2), "LayerNorm": torch.nn.LayerNorm(2)})
    model["dense"].requires_grad_(True)
    model["frozen"] = torch.nn.Linear(2, 2).requires_grad_(False)
    decayed, spared = make_optimizer(model, 1.0, 10, 0.0).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model["dense"].weight)]
    wanted = {id(model["dense"].bias), id(model["LayerNorm"].weight), id(model["LayerNorm"].bias)}
    assert {id(p) for p in spared["params"]} == wanted


def test_a_rate_of_its_own_for_the_head():
    model = torch.nn.ModuleDict({"siamese_head": torch.nn.Linear(1, 1), "bert": torch.nn.Linear(1, 1)}).double()
    optimizer = make_optimizer(model, 0.1, 4, 0.0, head_lr=0.4, head="siamese_head.")
    before = {name: parameter.item() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    step = 0.1 * 0.5 / (math.sqrt(0.001 * 0.25) + 1e-6)  # m / (sqrt(v) + e), the same for all
    for name, parameter in model.named_parameters():
        rate = 0.4 if name.startswith("siamese_head.") else 0.1
        decay = 0.01 * before[name] if name.endswith("weight") else 0.0
        assert parameter.item() == pytest.approx(before[name] - rate * (step + decay), rel=1e-6)
    assert optimizer.next_rate == pytest.approx(0.075)  # the encoder's; the schedule is the same for both


def test_an_update_counts_where_a_group_has_no_gradient():
    still, moved = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = BertAdam([{"params": [still]}, {"params": [moved]}], lr=1.0, t_total=4, warmup=0.0)
    moved.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.updates == 1
    assert optimizer.next_rate == 0.75
    assert still.tolist() == [1, 1]


def test_clipping_by_hand():
    """Each tensor by itself; NaN spreads over its tensor, so that a loss gone wrong is seen in all of it."""
    long, barely, short, spoiled = (
        torch.tensor(x, dtype=torch.float64) for x in ([3.0, 4.0], [0.60006, 0.80008], [0.6, -0.6], [math.nan, 1.0])
    )
    clip_each([long, barely, short, spoiled])
    np.testing.assert_allclose(long, [3 / 5.000001, 4 / 5.000001], rtol=1e-12)
    np.testing.assert_allclose(barely, [0.60006 / 1.000101, 0.80008 / 1.000101], rtol=1e-12)
    assert short.tolist() == [0.6, -0.6]
    assert spoiled.isnan().all()
