"""Metrics of a whole set at once: arrays in, plain dictionaries out."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef, precision_recall_fscore_support

from dse.processors import BINARY, MULTICLASS, REGRESSION

DEFAULT_THRESHOLD = 0.5  # of the second label's probability, in binary tasks
SCORES = {BINARY: "f1", MULTICLASS: "accuracy", REGRESSION: "pearson"}  # what ranks checkpoints


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


def student_metrics(
    kind: str, outputs: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] = (DEFAULT_THRESHOLD,)
) -> dict[str, float]:
    """Metrics of a student.

    Args:
        kind: binary, multiclass or regression.
        outputs: (n, 1), or (n, labels) for multiclass.
        labels: (n,), places of the labels, or scores.
        thresholds: for binary tasks; a pair is positive where sigmoid(output) > threshold, strictly.

    Returns:
        binary: accuracy_T, precision_T, recall_T, f1_T per threshold T, 0 where nothing is positive;
        multiclass: accuracy; regression: pearson, spearman (NaN where the outputs are constant).
    """
    if kind == REGRESSION:
        pearson, spearman = correlations(outputs[:, 0], labels)
        return {"pearson": pearson, "spearman": spearman}
    if kind == MULTICLASS:
        return {"accuracy": float((outputs.argmax(axis=1) == labels).mean())}
    probability = sigmoid(outputs[:, 0])
    metrics = {}
    for threshold in thresholds:
        predicted = (probability > threshold).astype(np.int64)
        precision, recall, f1, _ = precision_recall_fscore_support(
            labels, predicted, average="binary", zero_division=0.0
        )
        metrics[f"accuracy_{threshold}"] = float((predicted == labels).mean())
        metrics |= {f"precision_{threshold}": float(precision), f"recall_{threshold}": float(recall)}
        metrics[f"f1_{threshold}"] = float(f1)
    return metrics


def decisions(kind: str, outputs: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> np.ndarray:
    """A student's outputs, or a teacher's in the same form, to what they say: (n,) places of labels, or scores."""
    if kind == REGRESSION:
        return outputs[:, 0]
    return (sigmoid(outputs[:, 0]) > threshold).astype(np.int64) if kind == BINARY else outputs.argmax(axis=1)


def agreement(kind: str, outputs: np.ndarray, labels: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> float:
    """The share of pairs whose label the outputs give; of a regression the Pearson correlation with the scores."""
    said = decisions(kind, outputs, threshold)
    return correlations(said, labels)[0] if kind == REGRESSION else float((said == labels).mean())


def sigmoid(outputs: np.ndarray) -> np.ndarray:
    """Logits to probabilities, float64, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * outputs.astype(np.float64)))


def best_score(kind: str, metrics: dict[str, float]) -> tuple[str, float]:
    """Name and value of the score that ranks checkpoints: the best f1 over thresholds, accuracy, or Pearson.

    Where the correlation is undefined, "loss" and the loss, of which less is better.
    """
    name = SCORES[kind]
    if kind == BINARY:
        return name, max(value for key, value in metrics.items() if key.startswith("f1_"))
    return ("loss", metrics["loss"]) if math.isnan(metrics[name]) else (name, metrics[name])


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


def correlations(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Pearson and Spearman; NaN for both where either side is constant, which has no correlation."""
    if len(labels) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return math.nan, math.nan
    predicted, labels = predicted.astype(np.float64), labels.astype(np.float64)
    return float(pearsonr(predicted, labels)[0]), float(spearmanr(predicted, labels)[0])
