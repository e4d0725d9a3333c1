"""The one inference loop, for teacher and student alike."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dse.data.features import in_batches
from dse.networks.batches import Batches
from dse.networks.encoder import PooledBert, products
from dse.networks.student import SiameseNetwork
from dse.system import parallel, signals
from dse.system.errors import InputError, RunError
from dse.system.files import load_tensors, save_tensors, sha256_json

logger = logging.getLogger(__name__)

_PAIRS_PER_STEP = 4096  # of the head
_SECONDS_BETWEEN_WRITES = 60
_LAST_ROW, _MAGNITUDE = (1 << 32) - 1, (1 << 31) - 1  # the low half of a key; all bits of a float32 but its sign
_MODES = threading.Condition()  # held while modules change their mode
_TURNED: dict[nn.Module, threading.Thread] = {}  # modules that a thread has put into evaluation mode, for a while
TOKENS_PER_STEP = {"cpu": 4096, "cuda": 32768}  # more gain nothing, and take memory


def by_length(costs: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Rows in batches of similar length, longest first, so that one too big for memory fails at once.

    A batch has at most `tokens` places when its rows are padded to the longest, unless a single row has more.

    >>> [batch.tolist() for batch in by_length(np.array([3, 9, 4, 4]), 8)]
    [[1], [2, 3], [0]]
    """
    order = np.argsort(-costs, kind="stable")
    batches = []
    while len(order):
        rows = max(1, tokens // int(costs[order[0]]))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def rank_keys(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Scores (queries, candidates), float32, and the candidates' rows (candidates,) to int64 keys of the scores' shape.

    Keys order as scores do, and of equal scores the earlier row has the larger key: `topk` of keys is exact, which it
    is not for equal scores, and nothing waits for a GPU. The high 32 bits are those of the score, of which negative
    ones have all bits but the sign inverted, so that they order as integers; the low 32 bits are _LAST_ROW - row.
    Scores that are NaN or infinite become infinity, and so the largest, for who looks at the best to find them.
    """
    bits = (scores.nan_to_num(math.inf, math.inf, math.inf) + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & _MAGNITUDE)
    return (ordered.long() << 32) + (_LAST_ROW - rows)


def scores_and_rows(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rank_keys` made the keys from, each of their shape: float32 and int64."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & _MAGNITUDE)).view(torch.float32), _LAST_ROW - (keys & _LAST_ROW)


def to_host(tensor: torch.Tensor) -> Callable[[], np.ndarray]:
    """Start to copy a tensor to the CPU. Returns a function that waits for the copy and gives it."""
    if tensor.device.type != "cuda":
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return wait


@dataclass
class PartialOutputs:
    """The outputs so far of a long inference, in a file from which another run can continue."""

    path: Path  # an existing file counts if it is intact and of the same work
    work: dict[str, Any]  # all that decides the outputs, but for how rows are cut into steps; JSON values
    every: int | None = None  # steps between two writes; None: a minute
    _identity: str = ""
    _started: float = field(default_factory=time.monotonic)

    def find(self, steps: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
        """Which rows are done, (n,), bool, and the outputs, (n, width), float32, NaN where they are not.

        None if the file has nothing of this work, cut into these steps of rows.
        """
        self._identity = sha256_json([self.work, [rows.tolist() for rows in steps]])
        if not self.path.exists():
            return None
        try:
            there = load_tensors(self.path, f"{self.path} is corrupt")
        except InputError as error:
            logger.warning("%s: starting over", error)
            return None
        if not isinstance(there, dict) or there.get("identity") != self._identity:
            logger.info("%s is of other work (data, model or flags): starting over", self.path)
            return None
        done, outputs = there["done"].numpy(), there["outputs"].numpy()
        logger.info("continuing after %d of %d rows, which are in %s", done.sum(), len(done), self.path)
        return done, outputs

    def after(self, steps: int, outputs: Any, done: np.ndarray) -> None:
        """Write, when it is time, what is done after so many steps: the rows that `done`, (n,), marks in any process.

        All processes call it at each step. Raises Stopped, after writing, when a signal asks for it.
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
            stop.advice = f"outputs so far are in {self.path}; run the same command to continue"
            raise stop

    def remove(self) -> None:
        """Remove the file, since the work is done."""
        if parallel.is_first():
            self.path.unlink(missing_ok=True)


def infer(
    model: nn.Module,
    batches: Batches,
    batch_size: int,
    device: torch.device,
    what: str,
    partial: PartialOutputs | None = None,
    show: bool | None = None,
    texts: bool = False,
) -> np.ndarray:
    """Outputs for all rows, (n, width), float32, in file order, without dropout; each process computes some steps.

    Args:
        batch_size: rows of max_seq_length that a step may hold; of shorter rows it holds more, and on CUDA a step holds
            TOKENS_PER_STEP whatever this says, since fewer leave it idle.
        what, show: name of the progress bar, and whether to show it; None: if the output is a terminal.
        texts: are the rows a student's distinct texts, and not pairs?
    """
    costs = batches.features.texts.lengths if texts else batches.features.costs
    inputs_of = batches.of_texts if texts else batches.of_pairs
    places = TOKENS_PER_STEP["cuda"]
    if device.type == "cpu":
        places = min(batch_size * batches.max_seq_length, TOKENS_PER_STEP["cpu"])
    steps = by_length(costs, places)
    before, outputs = (partial and partial.find(steps)) or (np.zeros(len(costs), dtype=bool), None)
    # Of the rows from before, the first process speaks for all.
    found = _Outputs(before.copy() if parallel.is_first() else np.zeros_like(before), outputs)
    hidden = True if not parallel.is_first() else None if show is None else not show  # None: where there is no terminal
    with _inference(model), tqdm(total=len(costs), desc=what, unit="row", disable=hidden, leave=False) as bar:
        for step, rows in enumerate(steps):
            if not before[rows].all():
                with contextlib.nullcontext() if partial is None else signals.deferred():
                    if step % parallel.size() == parallel.rank() % parallel.size():
                        found.add(rows, model(**inputs_of(rows, device)).float())
                    if partial is not None:
                        partial.after(step + 1, found.outputs, found.done)
            bar.update(len(rows))
        found.finish()
    return found.of_all_processes(what)


@dataclass
class _Outputs:
    """Which rows of an inference are done in this process, (n,), bool, and what came out, (n, width) or None yet."""

    done: np.ndarray
    outputs: np.ndarray | None
    under_way: list[tuple[np.ndarray, Callable[[], np.ndarray]]] = field(default_factory=list)

    def add(self, rows: np.ndarray, some: torch.Tensor) -> None:
        """Take the outputs of some rows; those of a GPU are waited for when it has its next step to do."""
        arriving = rows, to_host(some)
        self.finish()
        self.under_way.append(arriving)
        if some.device.type == "cpu":
            self.finish()

    def finish(self) -> None:
        """Wait for what is under way."""
        for rows, wait in self.under_way:
            some = wait()
            if self.outputs is None:
                self.outputs = np.full((len(self.done), some.shape[1]), np.nan, dtype=np.float32)
            self.outputs[rows], self.done[rows] = some, True
        self.under_way.clear()

    def of_all_processes(self, what: str) -> np.ndarray:
        """All rows, (n, width). Raises RunError if some were not computed."""
        width = parallel.highest(0 if self.outputs is None else self.outputs.shape[1])
        if self.outputs is None:  # fewer steps than processes
            self.outputs = np.zeros((len(self.done), width), dtype=np.float32)
        outputs, done = _of_all(self.outputs, self.done)
        if not done.all():
            raise RunError(f"{what}: {(~done).sum()} rows were not computed, such as row {done.argmin()}; run it again")
        return outputs


def embed_texts(
    network: SiameseNetwork, rows: Batches, batch_size: int, device: torch.device, what: str, show: bool | None = None
) -> np.ndarray:
    """Embeddings of a student's distinct texts, (texts, embedding_size), float32; arguments as of `infer`."""
    return infer(network.dse_model.bert, rows, batch_size, device, what, show=show, texts=True)


def infer_pairs(
    network: SiameseNetwork, rows: Batches, batch_size: int, device: torch.device, what: str, show: bool | None = None
) -> np.ndarray:
    """As `infer` for a student's pairs, (n, fc_dims[-1]), float32; batch_size counts pairs; a text is embedded once.

    Each of several processes takes a block of the pairs, and embeds their texts alone.
    """
    own = parallel.block_of_rank(len(rows))
    features = rows.features if parallel.size() == 1 else rows.features.block(own)
    with parallel.alone():
        part = Batches(features, rows.padding, rows.max_seq_length)
        embeddings = embed_texts(network, part, 2 * batch_size, device, what, show)
    outputs = np.zeros((len(rows), network.config.fc_dims[-1]), dtype=np.float32)
    outputs[own] = score_stored(network, embeddings, features.first, features.second, device)
    return parallel.summed(outputs)


def score_stored(
    network: SiameseNetwork, embeddings: np.ndarray, first: np.ndarray, second: np.ndarray, device: torch.device
) -> np.ndarray:
    """The head's outputs (n, fc_dims[-1]), float32, of rows `first` and `second` (n,) of (texts, size) embeddings."""
    outputs = [np.empty((0, network.config.fc_dims[-1]), np.float32)]
    with scoring(network, device):
        for pairs in in_batches(np.arange(len(first)), _PAIRS_PER_STEP):
            u, v = (torch.from_numpy(embeddings[rows[pairs]]).to(device) for rows in (first, second))
            outputs.append(network.siamese_head(u, v).float().cpu().numpy())
    return np.concatenate(outputs)


def order_difference(network: SiameseNetwork, rows: Batches, batch_size: int, device: torch.device) -> float:
    """Mean over pairs and outputs of |head(u, v) - head(v, u)| of a symmetric head, before it takes their mean."""
    embeddings, head = embed_texts(network, rows, 2 * batch_size, device, "both orders"), network.siamese_head
    sides = rows.features.first, rows.features.second
    head.symmetric = False
    try:
        one, other = (score_stored(network, embeddings, *order, device) for order in (sides, sides[::-1]))
    finally:
        head.symmetric = True
    return float(np.abs(one - other).mean())


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, for weights that do not change meanwhile; then each module's own mode again.

    Threads that use the same modules take turns if these are in training mode.
    """
    modules = list(model.modules())
    encoders, me = [part for part in modules if isinstance(part, PooledBert)], threading.current_thread()
    with _MODES:
        # A forked child has the entries of threads that it does not have.
        _MODES.wait_for(lambda: all(by is me or not by.is_alive() for x in modules if (by := _TURNED.get(x))))
        training = {part for part in modules if part.training}
        _TURNED.update(dict.fromkeys(training, me))
    try:
        if training:
            model.eval()
        for encoder in encoders:
            encoder.kept = {}
        with torch.inference_mode():
            yield
    finally:
        for encoder in encoders:
            encoder.kept = None
        if training:
            with _MODES:
                model.train()  # of all, since a module may have a `train` of its own
                for part in modules:
                    part.training = part in training
                for part in training:
                    del _TURNED[part]
                _MODES.notify_all()


@contextlib.contextmanager
def scoring(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The context in which a head is called, or what its `factorised` gives; `model` is the head, or contains it.

    Evaluation mode without gradients; no other thread lowers the precision of float32 products.
    """
    with _inference(model), products("fp32", device):
        yield


def _of_all(outputs: np.ndarray, done: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows (n, width) that the processes have done, NaN for others, never zeros; and which rows are done, (n,)."""
    if parallel.size() == 1:
        return outputs, done
    done_by = parallel.summed(done.astype(np.int64))
    rows = parallel.summed(np.where(done[:, None], outputs, np.float32(0)))
    return np.where((done_by > 0)[:, None], rows, np.float32(np.nan)), done_by > 0
