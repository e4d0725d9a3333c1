"""What the student learns: the loss, and the file of teacher logits with proof of what it belongs to.

    loss = (1 - a) * hard(z, y) + a * mean over pairs of sum over outputs of (z - t)^2

with the student's outputs z, labels y, the teacher's logits t and a = --distillation_coeff. In binary
tasks the teacher's two logits become one, t = logit[1] - logit[0], the logit of the positive class.

The logits file is a bare float32 tensor (rows in the order of the training file, as wide as the labels);
the JSON beside it says which task, data, labels and teacher it came from.
"""

import logging

from torch import Tensor
from torch.nn import functional as F

from dse.data.tasks import BINARY, REGRESSION

logger = logging.getLogger(__name__)


def teacher_loss(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of (n, labels) logits, or mean squared error of (n, 1) scores; labels are (n,)."""
    if kind == REGRESSION:
        return F.mse_loss(logits[:, 0].float(), labels)
    return F.cross_entropy(logits.float(), labels)


def hard_loss(kind: str, outputs: Tensor, labels: Tensor) -> Tensor:
    """The student's loss against the labels, mean over examples.

    Binary cross entropy with logits for (n, 1) outputs, cross entropy for (n, labels), or mean squared error.
    """
    if kind == BINARY:
        return F.binary_cross_entropy_with_logits(outputs[:, 0].float(), labels.float())
    return teacher_loss(kind, outputs, labels)


def student_loss(kind: str, outputs: Tensor, labels: Tensor, targets: Tensor, coefficient: float) -> Tensor:
    """The distillation loss of a batch.

    Args:
        kind: binary, multiclass or regression.
        outputs: (n, 1), or (n, labels) for multiclass.
        labels: (n,), int64 or, for regression, float32.
        targets: as outputs: the teacher's logits, in binary tasks made one by `distillation_targets`.
        coefficient: weight of the teacher; 0 leaves its term out.
    """
    hard = hard_loss(kind, outputs, labels)
    if coefficient == 0:
        return hard
    return (1 - coefficient) * hard + coefficient * distillation_loss(outputs, targets)


def distillation_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over pairs of the sum over outputs of (z - t)^2; both (n, outputs)."""
    return ((outputs.float() - targets) ** 2).sum(dim=1).mean()


def distillation_targets(kind: str, logits: Tensor) -> Tensor:
    """What the student's outputs are pulled towards: (n, 2) binary logits become (n, 1); others stay."""
    return logits[:, 1:] - logits[:, :1] if kind == BINARY else logits
