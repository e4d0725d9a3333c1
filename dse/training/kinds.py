"""The kinds of tasks: what is learned, what outputs mean, and how they are measured.

    binary        a student has one output z, the logit of the second label; a teacher has two logits
    multiclass    a logit per label
    regression    a score

The student's loss is (1 - a) * hard(z, y) + a * mean over pairs of sum over outputs of (z - t)^2, with its outputs z,
the labels y, the teacher's logits t and a = --distillation_coeff. In binary tasks the teacher's two logits become one,
t = logit[1] - logit[0].

Shapes: outputs are (n, 1), or (n, labels) for multiclass; labels are (n,), int64 positions in task.labels, or scores.
"""

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef, precision_recall_fscore_support
from torch import Tensor
from torch.nn import functional

from dse.data.processors import has_label
from dse.data.tasks import BINARY, DEFAULT_THRESHOLD, MULTICLASS, REGRESSION, SCORES, Task
from dse.training.reporting import show_number

logger = logging.getLogger(__name__)
Metrics = dict[str, float]
_HALF = (DEFAULT_THRESHOLD,)


class Kind:
    """What the kinds share. What a subclass does not override is classification with a logit per label."""

    name = MULTICLASS

    def teacher_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of (n, labels) logits; of a regression, mean squared error of (n, 1) scores."""
        return Kind.hard_loss(self, logits, labels)

    def hard_loss(self, outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """The student's loss against the labels, mean over pairs, or as torch's losses reduce it."""
        return functional.cross_entropy(outputs.float(), labels, reduction=reduction)

    def partly_labelled_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """As `hard_loss`, with 0 for pairs without label, which count in the mean."""
        known = has_label(labels)
        return (self.hard_loss(outputs, torch.where(known, labels, 0), "none") * known).mean()

    def student_loss(
        self, outputs: Tensor, labels: Tensor, targets: Tensor | None, coefficient: float, partly: bool = False
    ) -> Tensor:
        """The distillation loss of a batch; `targets` are as outputs. With a coefficient of 0 they are not used.

        `partly`: some pairs have no label, and count in the distillation term alone.
        """
        hard = (self.partly_labelled_loss if partly else self.hard_loss)(outputs, labels)
        if targets is None or not coefficient:
            return hard
        return (1 - coefficient) * hard + coefficient * distillation_loss(outputs, targets)

    def targets(self, logits: Tensor) -> Tensor:
        """What the student's outputs are pulled towards: the teacher's logits in the form of outputs."""
        return logits

    def metrics(self, outputs: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] = _HALF) -> Metrics:
        """A student's metrics.

        binary: accuracy_T, precision_T, recall_T, f1_T for each threshold T. A pair is positive if the second label's
        probability is strictly above T; undefined metrics are 0. multiclass: accuracy. regression: pearson, spearman
        (NaN if the outputs are constant).
        """
        return {"accuracy": self.agreement(outputs, labels)}

    def score(self, metrics: Metrics) -> tuple[str, float]:
        """Name and value of the score that ranks checkpoints: the best f1 over thresholds, accuracy, or Pearson.

        If the correlation is undefined: "loss" and the loss, of which less is better.
        """
        name = SCORES[self.name]
        return ("loss", metrics["loss"]) if math.isnan(metrics[name]) else (name, metrics[name])

    def decisions(self, outputs: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> np.ndarray:
        """What the outputs say: (n,) positions in the task's labels, or scores."""
        return outputs.argmax(axis=1)

    def agreement(self, outputs: np.ndarray, labels: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> float:
        """The share of pairs whose outputs give their label; for regression, Pearson's correlation with the scores."""
        return float((self.decisions(outputs, threshold) == labels).mean())

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Probabilities of the labels in their order, (n, labels), float32."""
        return torch.from_numpy(outputs).softmax(dim=-1).numpy()

    def rank_scores(self, outputs: Tensor, place: int | None) -> Tensor:
        """What ranks candidates: (..., outputs) to (...).

        A regression's score; else the log-odds log(p / (1 - p)) of the probability p of the label at that place, which
        rank as p does and still differ if p rounds to 1.
        """
        others = [i for i in range(outputs.shape[-1]) if i != place]
        return outputs[..., place] - outputs[..., others].logsumexp(dim=-1)


class Binary(Kind):
    """Two labels, the negative first."""

    name = BINARY

    def hard_loss(self, outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        targets = labels.float()
        return functional.binary_cross_entropy_with_logits(outputs[:, 0].float(), targets, reduction=reduction)

    def targets(self, logits: Tensor) -> Tensor:
        return logits[:, 1:] - logits[:, :1]

    def metrics(self, outputs: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] = _HALF) -> Metrics:
        metrics: Metrics = {}
        for threshold in thresholds:
            predicted = self.decisions(outputs, threshold)
            found = precision_recall_fscore_support(labels, predicted, average="binary", zero_division=0.0)
            values = ((predicted == labels).mean(), *found[:3])
            names = (f"{name}_{threshold}" for name in ("accuracy", "precision", "recall", "f1"))
            metrics |= zip(names, map(float, values), strict=True)
        return metrics

    def score(self, metrics: Metrics) -> tuple[str, float]:
        return SCORES[BINARY], max(value for key, value in metrics.items() if key.startswith("f1_"))

    def decisions(self, outputs: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> np.ndarray:
        return (sigmoid(outputs[:, 0]) > threshold).astype(np.int64)

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        return np.concatenate([sigmoid(-outputs), sigmoid(outputs)], axis=1).astype(np.float32)

    def rank_scores(self, outputs: Tensor, place: int | None) -> Tensor:
        return outputs[..., 0] if place else -outputs[..., 0]


class Regression(Kind):
    """A score."""

    name = REGRESSION

    def hard_loss(self, outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        return functional.mse_loss(outputs[:, 0].float(), labels, reduction=reduction)

    def teacher_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.hard_loss(logits, labels)

    def metrics(self, outputs: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] = _HALF) -> Metrics:
        return dict(zip(("pearson", "spearman"), correlations(outputs[:, 0], labels), strict=True))

    def decisions(self, outputs: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> np.ndarray:
        return outputs[:, 0]

    def agreement(self, outputs: np.ndarray, labels: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> float:
        return correlations(outputs[:, 0], labels)[0]

    def rank_scores(self, outputs: Tensor, place: int | None) -> Tensor:
        return outputs[..., 0]


KINDS = {kind.name: kind for kind in (Binary(), Kind(), Regression())}


def kind_of(task: Task) -> Kind:
    """The kind of a task."""
    return KINDS[task.kind]


def distillation_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over pairs of the sum over outputs of (z - t)^2."""
    return ((outputs.float() - targets) ** 2).sum(dim=1).mean()


def fit_cosines(task: Task, cosines: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Scale and offset, (outputs,) each: the labels' hard loss of scale * cosine + offset is least.

    That is a fit by least squares for a regression, else by (multinomial) logistic regression. Cosines are (n,). A
    small penalty, 1e-4 * scale^2, keeps the scale low where cosines hardly differ, so that the outputs do not explode
    once training moves them apart.
    """
    mean, spread = float(cosines.mean()), max(float(cosines.std()), 1e-6)
    x = torch.from_numpy((cosines - mean) / spread).float()[:, None]
    weights = torch.zeros(2, task.num_student_outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = kind_of(task).hard_loss(x * weights[0] + weights[1], torch.from_numpy(labels))
        value = value + 1e-4 * (weights[0] / spread).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    scale = weights[0].detach() / spread
    return scale, weights[1].detach() - scale * mean


def sigmoid(outputs: np.ndarray) -> np.ndarray:
    """Logits to probabilities, float64, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * outputs.astype(np.float64)))


def correlations(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Pearson and Spearman; NaN for both if either side is constant, since there is no correlation then."""
    if len(labels) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return math.nan, math.nan
    predicted, labels = predicted.astype(np.float64), labels.astype(np.float64)
    return float(pearsonr(predicted, labels)[0]), float(spearmanr(predicted, labels)[0])


def measure_teacher(task: Task, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The task's fine-tuning metrics of (n, labels) logits against (n,) labels, and `loss`, a mean."""
    loss = kind_of(task).teacher_loss(torch.from_numpy(logits), torch.from_numpy(labels))
    return {**teacher_metrics(task.metrics, logits, labels), "loss": loss.item()}


def measure_student(
    task: Task, thresholds: Sequence[float], outputs: np.ndarray, labels: np.ndarray, targets: Tensor | None = None,
    coefficient: float = 0.0,
) -> dict[str, float]:  # fmt: skip
    """The student's metrics (`Kind.metrics`) and the hard `loss`, a mean.

    With `targets`, the teacher's logits of the same rows as `Kind.targets` gives them, there are `distillation_loss`
    and `total_loss`, means over pairs, and `teacher_agreement` too: the share of pairs with the teacher's label, or the
    Pearson correlation with the teacher's scores. Rows without label count in these alone.
    """
    kind, z, y, known = kind_of(task), torch.from_numpy(outputs), torch.from_numpy(labels), has_label(labels)
    metrics: Metrics = {}
    if known.any():
        metrics["loss"] = kind.hard_loss(torch.from_numpy(outputs[known]), torch.from_numpy(labels[known])).item()
    if targets is not None:
        metrics["distillation_loss"] = distillation_loss(z, targets).item()
        metrics["total_loss"] = kind.student_loss(z, y, targets, coefficient, not known.all()).item()
        metrics["teacher_agreement"] = kind.agreement(outputs, kind.decisions(targets.numpy()))
    return metrics | kind.metrics(outputs[known], labels[known], thresholds) if known.any() else metrics


def tell_agreement(
    task: Task, outputs: np.ndarray, labels: np.ndarray, who: str, whose: str, threshold: float = DEFAULT_THRESHOLD
) -> None:
    """Log how far outputs agree with labels; warn if they agree less than a guess would.

    Outputs and labels are as in kinds.py, in a student's form; `who` and `whose` name the model and the labels. Rows
    without label do not count.
    """
    known = has_label(labels)
    if not known.any():
        return
    outputs, labels = outputs[known], labels[known]
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
    """The metrics of fine-tuning that a task names: of acc, f1, acc_and_f1, mcc, pearson, spearmanr, corr.

    Logits are (n, labels), or (n, 1) for regression; labels are (n,), positions in the task's labels, or scores.
    """
    if set(names) & {"pearson", "spearmanr", "corr"}:
        pearson, spearman = correlations(logits[:, 0], labels)
        values = {"pearson": pearson, "spearmanr": spearman, "corr": (pearson + spearman) / 2}
        return {name: values[name] for name in names}
    predicted = logits.argmax(axis=1)
    values = {"acc": float((predicted == labels).mean())}
    if "f1" in names or "acc_and_f1" in names:
        values["f1"] = float(f1_score(labels, predicted, zero_division=0.0))
        values["acc_and_f1"] = (values["acc"] + values["f1"]) / 2
    if "mcc" in names:
        values["mcc"] = float(matthews_corrcoef(labels, predicted))
    return {name: values[name] for name in names}


def best_threshold(name: str, scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the best "f1" or "accuracy", if scores strictly above it are taken as positive.

    It is half-way between two neighbouring scores, or 1 below the lowest; among equals the highest. Scores are
    (n,), higher for positive pairs; labels are (n,), 0 or 1.

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
