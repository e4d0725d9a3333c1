"""Metrics of teachers, students and thresholds, by hand or in a second way."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from dse.data.tasks import get_task
from dse.training.metrics import best_threshold, measure_student, teacher_metrics


def test_losses_and_agreement_by_hand():
    """Two outputs, a = 0.25: hard = mean of -ln sigmoid(±z), distillation = ((1 - 2)^2 + (3 - -1)^2) / 2 = 8.5."""
    measure = measure_student(get_task("mrpc"), [0.5], torch.tensor([[2.0], [-1.0]]), 0.25)
    metrics = measure(np.array([[1.0], [3.0]], np.float32), np.array([1, 0]))
    hard = (np.log(1 + np.exp(-1.0)) + np.log(1 + np.exp(3.0))) / 2
    assert metrics["loss"] == pytest.approx(hard, rel=1e-6)
    assert metrics["distillation_loss"] == pytest.approx(8.5)
    assert metrics["total_loss"] == pytest.approx(0.75 * hard + 0.25 * 8.5, rel=1e-6)
    assert metrics["teacher_agreement"] == 0.5
    nli = measure_student(get_task("snli"), [], torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]), 0.0)
    metrics = nli(np.array([[3.0, 1, 1], [0, 2, 1], [5, 0, 0]], np.float32), np.array([0, 1, 2]))
    assert metrics["teacher_agreement"] == pytest.approx(2 / 3)
    assert metrics["distillation_loss"] == pytest.approx((4 + 1 + 1 + 0 + 1 + 1 + 25 + 0 + 1) / 3)
    assert metrics["total_loss"] == pytest.approx(metrics["loss"])
    sts = measure_student(get_task("sts-b"), [], torch.tensor([[1.0], [2.0], [3.0]]), 0.5)
    metrics = sts(np.array([[-1.0], [-2.0], [-3.0]], np.float32), np.array([1.0, 2.0, 3.0], np.float32))
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
