"""The kinds of tasks: what is learned, and what outputs mean, of each.

    binary        a student has one output z, the logit of the second label; a teacher has two logits
    multiclass    a logit per label
    regression    a score

The student's loss is (1 - a) * hard(z, y) + a * mean over pairs of sum over outputs of (z - t)^2, with its outputs z,
the labels y, the teacher's logits t and a = --distillation_coeff. In binary tasks the teacher's two logits become one,
t = logit[1] - logit[0].

Shapes: outputs are (n, 1), or (n, labels) for multiclass; labels are (n,), places of the labels (int64), or scores.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor
from torch.nn import functional

from dse.data.tasks import BINARY, DEFAULT_THRESHOLD, MULTICLASS, REGRESSION, SCORES, Task

Metrics = dict[str, float]


class Kind:
    """What kinds share; classification with a logit per label, where a subclass says nothing else."""

    name = MULTICLASS

    def teacher_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of (n, labels) logits; of a regression, mean squared error of (n, 1) scores."""
        return functional.cross_entropy(logits.float(), labels)

    def hard_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The student's loss against the labels, mean over pairs."""
        return self.teacher_loss(outputs, labels)

    def student_loss(self, outputs: Tensor, labels: Tensor, targets: Tensor, coefficient: float) -> Tensor:
        """The distillation loss of a batch.

        Args:
            targets: as outputs: the teacher's logits as `targets` gives them.
            coefficient: weight of the teacher; 0 leaves its term out.
        """
        hard = self.hard_loss(outputs, labels)
        if coefficient == 0:
            return hard
        return (1 - coefficient) * hard + coefficient * distillation_loss(outputs, targets)

    def targets(self, logits: Tensor) -> Tensor:
        """What the student's outputs are pulled towards: the teacher's logits in the form of outputs."""
        return logits

    def metrics(
        self, outputs: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] = (DEFAULT_THRESHOLD,)
    ) -> Metrics:
        """A student's metrics.

        Returns:
            binary: accuracy_T, precision_T, recall_T, f1_T for each threshold T above which, strictly, the second
            label's probability counts, 0 where nothing is positive; multiclass: accuracy; regression: pearson,
            spearman (NaN where the outputs are constant).
        """
        return {"accuracy": self.agreement(outputs, labels)}

    def score(self, metrics: Metrics) -> tuple[str, float]:
        """Name and value of the score that ranks checkpoints: the best f1 over thresholds, accuracy, or Pearson.

        Where the correlation is undefined, "loss" and the loss, of which less is better.
        """
        name = SCORES[self.name]
        return ("loss", metrics["loss"]) if math.isnan(metrics[name]) else (name, metrics[name])

    def decisions(self, outputs: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> np.ndarray:
        """What outputs say: (n,) places of labels, or scores."""
        return outputs.argmax(axis=1)

    def agreement(self, outputs: np.ndarray, labels: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> float:
        """The share of pairs whose label the outputs give; of a regression the Pearson correlation with the scores."""
        return float((self.decisions(outputs, threshold) == labels).mean())

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Probabilities of the labels in their order, (n, labels), float32."""
        return torch.from_numpy(outputs).softmax(dim=-1).numpy()

    def rank_scores(self, outputs: Tensor, place: int | None) -> Tensor:
        """What ranks candidates: (..., outputs) to (...).

        A regression's score; else the log-odds log(p / (1 - p)) of the probability p of the label in that place, which
        rank as p does and still differ where p rounds to 1.
        """
        others = [i for i in range(outputs.shape[-1]) if i != place]
        return outputs[..., place] - outputs[..., others].logsumexp(dim=-1)


class Binary(Kind):
    """Two labels, the negative first."""

    name = BINARY

    def hard_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs[:, 0].float(), labels.float())

    def targets(self, logits: Tensor) -> Tensor:
        return logits[:, 1:] - logits[:, :1]

    def metrics(
        self, outputs: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] = (DEFAULT_THRESHOLD,)
    ) -> Metrics:
        metrics: Metrics = {}
        for threshold in thresholds:
            predicted = self.decisions(outputs, threshold)
            precision, recall, f1, _ = precision_recall_fscore_support(
                labels, predicted, average="binary", zero_division=0.0
            )
            metrics[f"accuracy_{threshold}"] = float((predicted == labels).mean())
            metrics |= {f"precision_{threshold}": float(precision), f"recall_{threshold}": float(recall)}
            metrics[f"f1_{threshold}"] = float(f1)
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

    def teacher_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.mse_loss(logits[:, 0].float(), labels)

    def metrics(
        self, outputs: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] = (DEFAULT_THRESHOLD,)
    ) -> Metrics:
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


def sigmoid(outputs: np.ndarray) -> np.ndarray:
    """Logits to probabilities, float64, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * outputs.astype(np.float64)))


def correlations(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Pearson and Spearman; NaN for both where either side is constant, which has no correlation."""
    if len(labels) < 2 or np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return math.nan, math.nan
    predicted, labels = predicted.astype(np.float64), labels.astype(np.float64)
    return float(pearsonr(predicted, labels)[0]), float(spearmanr(predicted, labels)[0])
