"""The one inference loop, for teacher and student alike, and the metrics of what it gives."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dse.distillation import hard_loss, teacher_loss
from dse.features import Features, in_batches
from dse.metrics import student_metrics, teacher_metrics
from dse.processors import Task

Forward = Callable[[dict[str, Tensor]], Tensor]
Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def predict(
    model: nn.Module, forward: Forward, features: Features, batch_size: int, device: torch.device, what: str
) -> np.ndarray:
    """Outputs for all rows, in file order, without dropout.

    Args:
        model: put into evaluation mode for the while, and back after it.
        forward: a batch's inputs to its outputs (batch, width).
        what: name of the progress bar.

    Returns:
        (n, width), float32. Batches are made of rows of similar length, which changes no number but rounding.
    """
    was_training = model.training
    model.eval()
    outputs: np.ndarray | None = None
    longest_first = np.argsort(-features.costs, kind="stable")  # a batch too big for memory fails at once
    with torch.inference_mode(), tqdm(total=len(features), desc=what, unit="pair", disable=None, leave=False) as bar:
        for rows in in_batches(longest_first, batch_size):
            batch = forward({name: tensor.to(device) for name, tensor in features.batch(rows).items()}).float().cpu()
            if outputs is None:
                outputs = np.empty((len(features), batch.shape[1]), dtype=np.float32)
            outputs[rows] = batch.numpy()
            bar.update(len(rows))
    model.train(was_training)
    return outputs


def measure_teacher(task: Task) -> Measure:
    """A function from (n, labels) logits and (n,) labels to the task's fine-tuning metrics and `loss`, a mean."""

    def measure(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        loss = teacher_loss(task.kind, torch.from_numpy(logits), torch.from_numpy(labels))
        return {**teacher_metrics(task.metrics, logits, labels), "loss": loss.item()}

    return measure


def measure_student(task: Task, thresholds: Sequence[float]) -> Measure:
    """A function from the student's outputs and labels to the hard `loss`, a mean, and the student's metrics."""

    def measure(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        loss = hard_loss(task.kind, torch.from_numpy(outputs), torch.from_numpy(labels))
        return {"loss": loss.item(), **student_metrics(task.kind, outputs, labels, thresholds)}

    return measure
