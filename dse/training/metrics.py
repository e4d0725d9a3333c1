"""Metrics of a whole set at once: arrays in, plain dictionaries out."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor

from dse.data.tasks import DEFAULT_THRESHOLD, REGRESSION, Task
from dse.training.kinds import correlations, distillation_loss, kind_of
from dse.training.reporting import show_number

logger = logging.getLogger(__name__)


Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def measure_teacher(task: Task) -> Measure:
    """A function from (n, labels) logits and (n,) labels to the task's fine-tuning metrics and `loss`, a mean."""

    def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        loss = kind_of(task).teacher_loss(torch.from_numpy(logits), torch.from_numpy(labels))
        return {**teacher_metrics(task.metrics, logits, labels), "loss": loss.item()}

    return measure


def measure_student(
    task: Task, thresholds: Sequence[float], targets: Tensor | None = None, coefficient: float = 0.0
) -> Measure:
    """A function from the student's outputs and labels to the hard `loss`, a mean, and the student's metrics.

    Args:
        thresholds: of binary tasks.
        targets: the teacher's logits for the same rows, as `Kind.targets` gives them. With them there are
            `distillation_loss` and `total_loss`, means over pairs, and `teacher_agreement` too: the share of pairs with
            the teacher's label, or the Pearson correlation with the teacher's scores.
        coefficient: weight of the teacher in `total_loss`.
    """

    def measure(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        kind, z, y = kind_of(task), torch.from_numpy(outputs), torch.from_numpy(labels)
        metrics = {"loss": kind.hard_loss(z, y).item()}
        if targets is not None:
            metrics["distillation_loss"] = distillation_loss(z, targets).item()
            metrics["total_loss"] = kind.student_loss(z, y, targets, coefficient).item()
            metrics["teacher_agreement"] = kind.agreement(outputs, kind.decisions(targets.numpy()))
        return metrics | kind.metrics(outputs, labels, thresholds)

    return measure


def tell_agreement(
    task: Task, outputs: np.ndarray, labels: np.ndarray, who: str, whose: str, threshold: float = DEFAULT_THRESHOLD
) -> None:
    """Log how far outputs agree with labels; warn where they agree less than a guess would.

    Args:
        outputs: (n, 1), or (n, labels) for multiclass, in a student's form.
        labels: (n,), places of the labels, or scores.
        who, whose: name the model and the labels.
        threshold: of binary tasks.
    """
    value = kind_of(task).agreement(outputs, labels, threshold)
    if task.kind == REGRESSION:
        logger.info("%s: Pearson correlation with %s %s", who, whose, show_number(value))
        if value < 0:
            logger.warning("%s correlates negatively with %s: its scores may run the other way", who, whose)
        return
    logger.info("%s agrees with %s in %.1f %% of %d rows", who, whose, 100 * value, len(labels))
    guess = np.bincount(labels).max() / len(labels)
    if value < guess:
        logger.warning(
            "%s agrees with %s less than the most frequent label does (%.1f %%): check the order of its labels, which "
            "should be %s, and the data", who, whose, 100 * guess, ", ".join(task.labels),
        )  # fmt: skip


def teacher_metrics(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of fine-tuning that a task names.

    Args:
        names: of acc, f1, acc_and_f1, mcc, pearson, spearmanr, corr.
        logits: (n, labels), or (n, 1) for regression.
        labels: (n,), places of the labels, or scores.
    """
    if set(names) & {"pearson", "spearmanr", "corr"}:
        pearson, spearman = correlations(logits[:, 0], labels)
        values = {"pearson": pearson, "spearmanr": spearman, "corr": (pearson + spearman) / 2}
        return {name: values[name] for name in names}
    predicted = logits.argmax(axis=1)
    accuracy = float((predicted == labels).mean())
    values = {"acc": accuracy}
    if "f1" in names or "acc_and_f1" in names:
        values["f1"] = float(f1_score(labels, predicted, zero_division=0.0))
        values["acc_and_f1"] = (accuracy + values["f1"]) / 2
    if "mcc" in names:
        values["mcc"] = float(matthews_corrcoef(labels, predicted))
    return {name: values[name] for name in names}


def best_threshold(name: str, scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold above which, strictly, scores are taken as positive, with the best f1 or accuracy of all.

    Args:
        name: "f1" or "accuracy".
        scores: (n,), higher for positive pairs.
        labels: (n,), 0 or 1.

    Returns:
        Half-way between two scores that follow each other, or 1 below the lowest; of equals the highest.

    >>> best_threshold("accuracy", np.array([0.1, 0.4, 0.5, 0.9]), np.array([0, 1, 0, 1]))
    0.7
    """
    order = np.argsort(-scores, kind="stable")
    ranked, positive = scores[order].astype(np.float64), labels[order].astype(np.int64)
    taken = np.arange(1, len(ranked) + 1)  # the k highest are positive
    hits = positive.cumsum()
    if name == "f1":
        values = 2 * hits / (taken + positive.sum())
    else:
        values = (hits + (1 - positive).sum() - (taken - hits)) / len(ranked)
    below = np.append(ranked[1:], ranked[-1] - 2)
    values[ranked == below] = -1.0  # no threshold parts equal scores
    best = int(values.argmax())
    return float((ranked[best] + below[best]) / 2)
