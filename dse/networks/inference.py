"""The one inference loop, for teacher and student alike, and the metrics of what it gives."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dse.data.features import Features, SeparateFeatures, in_batches
from dse.system import parallel, signals
from dse.system.errors import InputError, RunError
from dse.system.files import load_tensors, save_tensors, sha256_json

if TYPE_CHECKING:
    from dse.models import DSESiameseClassifier


logger = logging.getLogger(__name__)

_PAIRS_PER_STEP = 4096  # of the head
Forward = Callable[[dict[str, Any]], Tensor]


_SECONDS_BETWEEN_WRITES = 60
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


class PartialOutputs:
    """The outputs of a long inference so far, in a file from which another run goes on.

    Args:
        path: of the file; one that is there counts if it is whole and of the same work.
        work: all that decides the outputs; a value that JSON can hold. How rows are cut into steps is added.
        every: steps between two writes; None: a minute.
    """

    def __init__(self, path: Path, work: dict[str, Any], every: int | None = None) -> None:
        self.path, self.work, self.every = path, work, every
        self._identity, self._started = "", time.monotonic()

    def find(self, steps: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
        """What the file has of the work that is cut into these steps of rows; None where it has nothing.

        Returns:
            Which rows are done, (n,), bool, and the outputs, (n, width), float32, NaN where they are not.
        """
        self._identity = sha256_json([self.work, [rows.tolist() for rows in steps]])
        if not self.path.exists():
            return None
        try:
            there = load_tensors(self.path, f"{self.path} is spoiled")
        except InputError as error:
            logger.warning("%s: begun anew", error)
            return None
        if not isinstance(there, dict) or there.get("identity") != self._identity:
            logger.info("%s is of other work: begun anew", self.path)
            return None
        done, outputs = there["done"].numpy(), there["outputs"].numpy()
        logger.info("going on after %d of %d rows, as %s has them", done.sum(), len(done), self.path)
        return done, outputs

    def after(self, steps: int, outputs: np.ndarray | None, done: np.ndarray) -> None:
        """So many steps are done, and of the rows those that `done` (n,) names are this process's.

        Writes when it is time; raises Stopped, after writing, when a signal asks for it. All processes call it at each
        step.
        """
        if steps % parallel.size():  # some processes have a step more than others
            return
        signal = parallel.highest(signals.requested() or 0)
        late = parallel.of_first(time.monotonic() - self._started > _SECONDS_BETWEEN_WRITES)
        if signal or (late if self.every is None else steps % (self.every * parallel.size()) == 0):
            rows, done = _of_all(outputs, done)
            if parallel.is_first():
                arrays = {"done": torch.from_numpy(done), "outputs": torch.from_numpy(rows)}
                save_tensors(self.path, {"identity": self._identity, **arrays})
            self._started = time.monotonic()
        if signal:
            stop = signals.Stopped(signal)
            stop.advice = f"outputs so far in {self.path}; the same command goes on"
            raise stop

    def remove(self) -> None:
        """The work is done."""
        if parallel.is_first():
            self.path.unlink(missing_ok=True)


def infer(
    model: nn.Module,
    forward: Forward,
    features: Features,
    batch_size: int,
    device: torch.device,
    what: str,
    progress: PartialOutputs | None = None,
) -> np.ndarray:
    """Outputs for all rows, in file order, without dropout.

    Args:
        model: put into evaluation mode for the while, and back after it.
        forward: a batch's inputs to its outputs (batch, width).
        batch_size: rows of max_seq_length that a step may hold; of shorter rows it holds more.
        what: name of the progress bar.
        progress: where the outputs so far are written, and found.

    Returns:
        (n, width), float32. Batches are made of rows of similar length, which changes no number but rounding.
    """
    with _inference(model):
        tokens = _tokens_per_step(batch_size, features, device)
        return _by_batches(forward, features.batch, features.costs, tokens, device, what, progress=progress)


def infer_pairs(
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
        return score_stored(model, embeddings, features.first, features.second, device)


def score_stored(
    model: "DSESiameseClassifier", embeddings: np.ndarray, first: np.ndarray, second: np.ndarray, device: torch.device
) -> np.ndarray:
    """The head's outputs (n, fc_dims[-1]), float32, on embeddings (texts, size) of which `first` and `second` (n,) name
    each pair's rows.
    """
    outputs = []
    with torch.inference_mode():
        for pairs in in_batches(np.arange(len(first)), _PAIRS_PER_STEP):
            u, v = (torch.from_numpy(embeddings[rows[pairs]]).to(device) for rows in (first, second))
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
    progress: "PartialOutputs | None" = None,
) -> np.ndarray:
    steps = by_length(costs, tokens)
    found = None if progress is None else progress.find(steps)
    before = np.zeros(len(costs), dtype=bool) if found is None else found[0]
    outputs = None if found is None else found[1]
    done = before.copy() if parallel.is_first() else np.zeros_like(before)  # by this process
    disable = None if show is None else not show  # None: where there is no terminal
    with tqdm(
        total=len(costs), desc=what, unit="row", disable=disable if parallel.is_first() else True, leave=False
    ) as bar:
        for step, rows in enumerate(steps):
            if before[rows].all():
                bar.update(len(rows))
                continue
            with contextlib.nullcontext() if progress is None else signals.deferred():
                if step % parallel.size() == parallel.rank() % parallel.size():
                    inputs = {name: tensor.to(device) for name, tensor in batch(rows).items()}
                    some = forward(inputs).float().cpu().numpy()
                    if outputs is None:
                        outputs = np.full((len(costs), some.shape[1]), np.nan, dtype=np.float32)
                    outputs[rows], done[rows] = some, True
                bar.update(len(rows))
                if progress is not None:
                    progress.after(step + 1, outputs, done)
    if outputs is None:  # fewer steps than processes
        outputs = np.zeros((len(costs), 0), dtype=np.float32)
    width = parallel.highest(outputs.shape[1])
    outputs, done = _of_all(outputs if outputs.shape[1] == width else np.zeros((len(costs), width), np.float32), done)
    if not done.all():
        raise RunError(f"{what}: {(~done).sum()} rows were not computed, such as {done.argmin()}; run it again")
    return outputs


def _of_all(outputs: np.ndarray, done: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outputs (n, width) of all processes, of each the rows (n,) that it has done, and which rows those are.

    A row that none has done is NaN, so that no file has zeros for it.
    """
    if parallel.size() == 1:
        return outputs, done
    done_by = parallel.summed(done.astype(np.int64))
    rows = parallel.summed(np.where(done[:, None], outputs, np.float32(0)))
    return np.where((done_by > 0)[:, None], rows, np.float32(np.nan)), done_by > 0
