"""Losses, metrics and thresholds of each kind of task, by hand or in a second way."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score

from dse.data.processors import has_label
from dse.data.tasks import get_task
from dse.training.kinds import (
    KINDS,
    best_threshold,
    fit_cosines,
    measure_student,
    teacher_metrics,
    tell_agreement,
)


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


# (kind, outputs, labels, targets, rows with a label)
PARTLY = [
    ("binary", [[2.0], [-1.0], [3.0]], [1, -1, 0], [[1.0], [0.5], [0.0]]),
    ("multiclass", [[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [2.0, 0.0, 1.0]], [2, -1, 0],
     [[0.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
    ("regression", [[1.0], [4.0], [2.0]], [2.0, math.nan, 2.5], [[1.0], [1.0], [0.0]]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "outputs", "labels", "targets"), PARTLY, ids=[row[0] for row in PARTLY])
def test_pairs_without_label_count_in_the_distillation_term_alone(kind, outputs, labels, targets):
    z, y, t = map(torch.tensor, (outputs, labels, targets))
    known = torch.tensor([True, False, True])
    assert has_label(y).equal(known)
    z.requires_grad_()
    hard = KINDS[kind].hard_loss(z[known], y[known]) * 2 / 3  # of two pairs in three
    soft = ((z - t) ** 2).sum() / 3
    loss = KINDS[kind].student_loss(z, y, t, 0.25, partly=True)
    assert loss.item() == pytest.approx(0.75 * hard.item() + 0.25 * soft.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient[1], 0.25 * 2 * (z - t)[1].detach() / 3)
    assert gradient.isfinite().all()
    every = torch.where(known, y, 0).to(y)
    assert KINDS[kind].student_loss(z, every, t, 0.25, partly=True).item() == pytest.approx(
        KINDS[kind].student_loss(z, every, t, 0.25).item(), rel=1e-6
    )


def test_metrics_are_of_pairs_with_label(caplog):
    task, outputs = get_task("mrpc"), np.array([[2.0], [9.0], [-1.0], [1.0]], np.float32)
    labels, targets = np.array([1, -1, 0, 0]), torch.tensor([[1.0], [-9.0], [-1.0], [2.0]])
    found = measure_student(task, [0.5], outputs, labels, targets, 0.5)
    known = labels >= 0
    alone = measure_student(task, [0.5], outputs[known], labels[known])
    assert {name: found[name] for name in alone} == alone
    assert found["distillation_loss"] == pytest.approx((1 + 18**2 + 0 + 1) / 4)
    assert found["teacher_agreement"] == 0.75
    assert found["total_loss"] == pytest.approx(0.5 * alone["loss"] * 3 / 4 + 0.5 * found["distillation_loss"])
    none = measure_student(task, [0.5], outputs, np.full(4, -1), targets, 1.0)
    assert set(none) == {"distillation_loss", "total_loss", "teacher_agreement"}
    with caplog.at_level("INFO", "dse"):
        tell_agreement(task, outputs, labels, "the teacher", "the labels")
        tell_agreement(task, outputs, np.full(4, -1), "the teacher", "the labels")
    assert [record.getMessage() for record in caplog.records] == [
        "the teacher agrees with the labels in 66.7 % of 3 rows"
    ]


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


def test_the_fit_of_cosines():
    """Against scikit-learn's regressions, whose penalties are 500 * 1e-4 and 1 / (2 * 500 * 1e-4)."""
    random = np.random.default_rng(0)
    cosines = random.uniform(0.2, 1.0, 500).astype(np.float32)
    scores = (4 * cosines + random.normal(size=500)).astype(np.float32)
    scale, offset = fit_cosines(get_task("sts-b"), cosines, scores)
    regression = Ridge(0.05).fit(cosines[:, None], scores)
    assert [scale.item(), offset.item()] == pytest.approx([regression.coef_[0], regression.intercept_], rel=1e-3)
    labels = (random.uniform(size=500) * scores.max() < scores).astype(np.int64)
    scale, offset = fit_cosines(get_task("mrpc"), cosines, labels)
    regression = LogisticRegression(C=10).fit(cosines[:, None], labels)
    assert [scale.item(), offset.item()] == pytest.approx([regression.coef_[0, 0], regression.intercept_[0]], rel=1e-2)
    labels += random.integers(0, 2, 500)
    scale, offset = fit_cosines(get_task("snli"), cosines, labels)
    regression = LogisticRegression(C=10).fit(cosines[:, None], labels)
    for found, expected in ((scale, regression.coef_[:, 0]), (offset, regression.intercept_)):
        np.testing.assert_allclose(found - found.mean(), expected - expected.mean(), atol=2e-2)


@pytest.mark.parametrize("cosines", [[0.5] * 4, [0.1, 0.2, 0.8, 0.9]], ids=["alike", "parting"])
def test_a_fit_of_cosines_stays_finite(cosines):
    """Of cosines that are all alike, that part the labels, and of a label without a row."""
    cosines = np.array(cosines, np.float32)
    for name in ("mrpc", "snli"):
        scale, offset = fit_cosines(get_task(name), cosines, np.array([0, 0, 1, 1]))
        assert bool((scale.isfinite() & offset.isfinite()).all())
        ranked = (scale[-1 if name == "mrpc" else 1] * torch.from_numpy(cosines)).tolist()
        assert ranked == sorted(ranked)


def test_constant_outputs_have_no_correlation():
    assert math.isnan(KINDS["regression"].metrics(np.ones((3, 1)), np.array([1.0, 2.0, 3.0]))["pearson"])


def test_losses_and_agreement_by_hand():
    """Two outputs, a = 0.25: hard = mean of -ln sigmoid(±z), distillation = ((1 - 2)^2 + (3 - -1)^2) / 2 = 8.5."""
    outputs, labels, targets = np.array([[1.0], [3.0]], np.float32), np.array([1, 0]), torch.tensor([[2.0], [-1.0]])
    metrics = measure_student(get_task("mrpc"), [0.5], outputs, labels, targets, 0.25)
    hard = (np.log(1 + np.exp(-1.0)) + np.log(1 + np.exp(3.0))) / 2
    assert metrics["loss"] == pytest.approx(hard, rel=1e-6)
    assert metrics["distillation_loss"] == pytest.approx(8.5)
    assert metrics["total_loss"] == pytest.approx(0.75 * hard + 0.25 * 8.5, rel=1e-6)
    assert metrics["teacher_agreement"] == 0.5
    outputs, targets = np.array([[3.0, 1, 1], [0, 2, 1], [5, 0, 0]], np.float32), torch.eye(3)
    metrics = measure_student(get_task("snli"), [], outputs, np.array([0, 1, 2]), targets, 0.0)
    assert metrics["teacher_agreement"] == pytest.approx(2 / 3)
    assert metrics["distillation_loss"] == pytest.approx((4 + 1 + 1 + 0 + 1 + 1 + 25 + 0 + 1) / 3)
    assert metrics["total_loss"] == pytest.approx(metrics["loss"])
    outputs, labels = np.array([[-1.0], [-2.0], [-3.0]], np.float32), np.array([1.0, 2.0, 3.0], np.float32)
    metrics = measure_student(get_task("sts-b"), [], outputs, labels, torch.tensor([[1.0], [2.0], [3.0]]), 0.5)
    assert metrics["teacher_agreement"] == pytest.approx(-1)


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


def test_best_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for round_ in range(20):
        labels = rng.integers(0, 2, 30)
        scores = np.round(rng.normal(size=30) + labels, 1 if round_ % 2 else 6)  # with ties and without
        cuts = [scores.min() - 1, *scores]
        f1 = max(f1_score(labels, scores > cut, zero_division=0.0) for cut in cuts)
        accuracy = max(((scores > cut) == labels).mean() for cut in cuts)
        of_f1, of_accuracy = (best_threshold(name, scores, labels) for name in ("f1", "accuracy"))
        assert f1_score(labels, scores > of_f1) == pytest.approx(f1)
        assert ((scores > of_accuracy) == labels).mean() == pytest.approx(accuracy)
