"""The one inference loop, for teacher and student alike, and the metrics of what it gives."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dse.distillation import hard_loss, teacher_loss
from dse.features import Features, SeparateFeatures, in_batches
from dse.metrics import student_metrics, teacher_metrics
from dse.processors import Task

if TYPE_CHECKING:
    from dse.models import DSESiameseClassifier

_PAIRS_PER_STEP = 4096  # of the head
Forward = Callable[[dict[str, Any]], Tensor]
Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]


TOKENS_PER_STEP = {"cpu": 4096, "cuda": 65536}  # more gain nothing, and take memory


def by_length(costs: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Rows in batches of similar length, longest first, so that one too big for memory fails at once.

    A batch has at most `tokens` places when its rows are padded to the longest, unless a single row has more.

    >>> [batch.tolist() for batch in by_length(np.array([3, 9, 4, 4]), 8)]
    [[1], [2, 3], [0]]
    """
    order = np.argsort(-costs, kind="stable")
    batches, start = [], 0
    while start < len(order):
        rows = max(1, tokens // int(costs[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    return batches


def predict(
    model: nn.Module, forward: Forward, features: Features, batch_size: int, device: torch.device, what: str
) -> np.ndarray:
    """Outputs for all rows, in file order, without dropout.

    Args:
        model: put into evaluation mode for the while, and back after it.
        forward: a batch's inputs to its outputs (batch, width).
        batch_size: rows of max_seq_length that a step may hold; of shorter rows it holds more.
        what: name of the progress bar.

    Returns:
        (n, width), float32. Batches are made of rows of similar length, which changes no number but rounding.
    """
    with _inference(model):
        tokens = _tokens_per_step(batch_size, features, device)
        return _by_batches(forward, features.batch, features.costs, tokens, device, what)


def predict_pairs(
    model: "DSESiameseClassifier",
    features: SeparateFeatures,
    batch_size: int,
    device: torch.device,
    what: str,
    show: bool | None = None,
) -> np.ndarray:
    """The student's outputs for all pairs, in file order, without dropout; each distinct text is embedded once.

    Args:
        batch_size: pairs of texts of max_seq_length that a step may hold; of shorter texts it holds more.
        what, show: name of the progress bar; None: where the output is a terminal.

    Returns:
        (n, fc_dims[-1]), float32.
    """
    with _inference(model):
        embeddings = embed_texts(model, features, 2 * batch_size, device, what, show)
        outputs = []
        for rows in in_batches(np.arange(len(features)), _PAIRS_PER_STEP):
            u, v = (torch.from_numpy(embeddings[texts[rows]]).to(device) for texts in (features.first, features.second))
            outputs.append(model.siamese_head(u, v).float().cpu().numpy())
        return np.concatenate(outputs)


def embed_texts(
    model: "DSESiameseClassifier",
    features: SeparateFeatures,
    batch_size: int,
    device: torch.device,
    what: str,
    show: bool | None = None,
) -> np.ndarray:
    """Embeddings of all distinct texts, (texts, embedding_size), float32, without dropout."""
    lengths, tokens = features.texts.lengths, _tokens_per_step(batch_size, features, device)
    with _inference(model):
        return _by_batches(
            lambda inputs: model.embed(**inputs), features.text_batch, lengths, tokens, device, what, show
        )


def _tokens_per_step(batch_size: int, features: Features, device: torch.device) -> int:
    longest = features.max_seq_length or int(features.costs.max())
    return min(batch_size * longest, TOKENS_PER_STEP["cpu" if device.type == "cpu" else "cuda"])


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and the mode from before at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _by_batches(
    forward: Forward,
    batch: Callable[[np.ndarray], dict[str, Any]],
    costs: np.ndarray,
    tokens: int,
    device: torch.device,
    what: str,
    show: bool | None = None,
) -> np.ndarray:
    outputs: np.ndarray | None = None
    disable = None if show is None else not show  # None: where there is no terminal
    with tqdm(total=len(costs), desc=what, unit="row", disable=disable, leave=False) as bar:
        for rows in by_length(costs, tokens):
            some = forward({name: tensor.to(device) for name, tensor in batch(rows).items()}).float().cpu()
            if outputs is None:
                outputs = np.empty((len(costs), some.shape[1]), dtype=np.float32)
            outputs[rows] = some.numpy()
            bar.update(len(rows))
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
