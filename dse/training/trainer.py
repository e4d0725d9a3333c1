"""The training loop of both stages: epochs of shuffled batches, accumulation, updates, validation.

It knows neither tasks nor models: `forward` turns a batch's inputs into outputs, `loss` turns outputs and
their rows into the scalar to descend, `measure` turns a whole epoch's outputs into metrics.

An update comes every `accumulation_steps` batches, each batch's loss divided by the batches of its group,
and the last group of an epoch may be shorter:  5 batches by 2 -> (1/2, 1/2), (1/2, 1/2), (1).
Packed batches of a group go through the model in one pass where that needs no more room than one padded
batch: the sum is the same, and bigger matrix products are faster ones.

The order of an epoch depends on the seed and the epoch alone, so a run that goes on needs no more than the
numbers in `state_dict` to make the same updates as one that never stopped, from the middle of an epoch too.

Several processes (parallel.py) take their shares of each batch; the mean over the batch's rows stays what it is, since
a share of k of its n rows weighs k / n. Each keeps the outputs of its own rows, and zeros for the others'.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dse.data.features import Features, in_batches
from dse.networks.inference import Forward
from dse.system import parallel, signals
from dse.system.errors import RunError
from dse.training.metrics import Measure
from dse.training.optimization import BertAdam
from dse.training.reporting import Record, format_record

logger = logging.getLogger(__name__)


class BatchPart(NamedTuple):
    """A process's part of a batch."""

    rows: np.ndarray  # int64
    weight: float  # of its mean loss: 1, or with several processes their number x its part of the batch's rows
    number: int  # of the batch, in the epoch, from 1


class Trainer:
    """Trains a model on features, and remembers how each epoch went.

    Args:
        model: in place, on `device`.
        forward: a batch's inputs, on the device, to outputs (batch, width).
        loss: outputs and their rows (batch,) to a scalar.
        measure: outputs (n, width) and labels (n,) of all rows to metrics.
        features: with labels.
        optimizer: BertAdam over the model's parameters.
        batch_size: rows per batch.
        accumulation_steps: batches per update.
        seed: of the order of the rows.
        precision: "fp32", or mixed: "fp16" (CUDA only) or "bf16".
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        loss: Callable[[Tensor, np.ndarray], Tensor],
        measure: Measure,
        features: Features,
        optimizer: BertAdam,
        *,
        batch_size: int,
        accumulation_steps: int,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        self.model, self.loss, self.measure = model, loss, measure
        self.forward = parallel.synchronized(model, forward)
        if parallel.size() > 1:  # weights are the same by now; dropout is not to be
            torch.manual_seed(seed + parallel.rank())
        self.features, self.optimizer = features, optimizer
        self.batch_size, self.accumulation_steps = batch_size, accumulation_steps
        self.seed, self.device = seed, device
        half = torch.float16 if precision == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype=half, enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.history: list[Record] = []
        self.position = 0  # updates made in the epoch that is under way
        self.saved: Path | None = None  # the last state that was written, as far as this run knows
        self._outputs: np.ndarray | None = None  # of that epoch, (n, width), by this process
        self._seconds = 0.0  # that it took so far
        self._costs = features.costs

    @property
    def updates(self) -> int:
        """Updates made so far, those of earlier runs included."""
        return self.optimizer.updates

    def fit(
        self,
        epochs: int,
        validate: Callable[[], dict[str, float]] | None = None,
        validate_every: int = 1,
        after_epoch: Callable[[Record], bool | None] | None = None,
        save: Callable[[], Path] | None = None,
        save_every: int | None = None,
    ) -> list[Record]:
        """Train until `epochs` epochs are done, counting those done before.

        Args:
            validate: gives the metrics of a validation set; called every `validate_every` epochs and after the last.
            after_epoch: called with the epoch's record; ends the training by returning True.
            save: writes the state as it is, and tells where; called when a signal ends the run (stopping.py), and
            save_every: every so many updates.

        Returns:
            The records of all epochs.

        Raises RunError for a loss that is NaN or infinite, before it reaches the weights; Stopped after a signal.
        """
        done = [len(self.history), self.position, self.updates, self.seed, len(self.features)]
        parallel.agree(done, "what they go on from (epochs, updates, updates in all, seed, pairs)")
        try:
            while len(self.history) < epochs:
                epoch = len(self.history)
                with signals.deferred():
                    train = self.train_epoch(epoch, epochs, save if save_every else None, save_every or 1)
                record: Record = {"epoch": epoch, "train": train}
                if validate is not None and ((epoch + 1) % validate_every == 0 or epoch + 1 == epochs):
                    started = time.monotonic()
                    record["validation"] = self._undisturbed(validate)
                    self._seconds += time.monotonic() - started
                with signals.deferred():
                    if self._end_epoch(record, epochs, after_epoch):
                        break
                self._stop_together()
        except signals.Stopped as stop:
            if save is not None:
                if not stop.anywhere:  # else an update may be half made
                    with signals.deferred():
                        self._save(save)
                        parallel.wait_for_all()  # torchrun ends all of them soon after the first
                if self.saved is not None:
                    stop.advice = f"state in {self.saved}; the same command with --resume goes on"
            raise
        return self.history

    def _undisturbed(self, validate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Validation, which a signal cuts off; not so with several processes, which wait for each other in it."""
        if parallel.size() == 1:
            return validate()
        with signals.deferred():
            return validate()

    def _end_epoch(
        self, record: Record, epochs: int, after_epoch: Callable[[Record], bool | None] | None
    ) -> bool | None:
        record |= {"updates": self.updates, "rate": self.optimizer.next_rate, "seconds": self._seconds}
        self.history.append(record)
        self.position, self._outputs, self._seconds = 0, None, 0.0
        logger.info("epoch %d of 0 to %d: %s", record["epoch"], epochs - 1, format_record(record))
        self.check_weights()
        return after_epoch is not None and after_epoch(record)

    def _stop_together(self) -> None:
        """Raise Stopped if any of the processes was asked to stop, in all of them at the same update."""
        number = parallel.highest(signals.requested() or 0)
        if number:
            raise signals.Stopped(number)

    def _save(self, save: Callable[[], Path]) -> Path:
        self.check_weights()
        self.saved = save()
        return self.saved

    def check_weights(self) -> None:
        """Raise RunError if a weight is NaN or infinite, so that no such state is written."""
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                self._diverged(f"the weights of {name} are not finite after update {self.updates}")

    def _diverged(self, what: str) -> None:
        raise RunError(
            f"{what}: the training has diverged; last good state: {self.saved or 'none was written'}. "
            "Start again with a lower rate, and look for odd rows in the data"
        )

    def train_epoch(
        self, epoch: int, epochs: int, save: Callable[[], Path] | None = None, save_every: int = 1
    ) -> dict[str, float]:
        """One pass over all rows in random order, or its rest; the metrics of the batches as they passed."""
        self.model.train()
        started, before = time.monotonic(), self._seconds
        groups = self.groups(epoch)
        done = self.position * self.accumulation_steps
        with tqdm(
            total=math.ceil(len(self.features) / self.batch_size), initial=done, unit="batch", leave=False,
            desc=f"epoch {epoch} of 0 to {epochs - 1}", disable=None if parallel.is_first() else True,
        ) as bar:  # fmt: skip
            for group in groups[self.position :]:
                self.train_group(group)
                bar.update(len(group))
                self.position += 1
                self._seconds = before + time.monotonic() - started
                self._stop_together()
                if save is not None and self.updates % save_every == 0:
                    self._save(save)
        return self.measure(parallel.summed(self._outputs), self.features.labels)

    def train_group(self, group: list[np.ndarray]) -> None:
        """One update, from its batches of rows."""
        passes = self.passes(self.shares(group))
        for i, together in enumerate(passes):
            waits = i + 1 < len(passes)  # the last pass averages the gradients of all of them
            with self.forward.no_sync() if waits and parallel.size() > 1 else contextlib.nullcontext():
                outputs = self.backward(together, len(group))
            if self._outputs is None:
                self._outputs = np.zeros((len(self.features), outputs.shape[1]), dtype=np.float32)
            if together[0].weight:
                self._outputs[np.concatenate([share.rows for share in together])] = outputs
        self.update()

    def groups(self, epoch: int) -> list[list[np.ndarray]]:
        """The epoch's batches of rows, by update."""
        order = epoch_order(len(self.features), self.seed, epoch)
        return in_batches(in_batches(order, self.batch_size), self.accumulation_steps)

    def shares(self, group: list[np.ndarray]) -> list[BatchPart]:
        """This process's part of an update's batches: all of them, where it is alone."""
        first = self.position * self.accumulation_steps + 1
        shares = [
            BatchPart(rows, parallel.size() * len(rows) / len(whole), first + i)
            for i, whole in enumerate(group)
            if len(rows := parallel.rows_of_rank(whole))
        ]
        # Of a short last batch there may be nothing for it, but the others wait for its gradient.
        return shares or [BatchPart(group[0][:1], 0.0, first)]

    def passes(self, shares: list[BatchPart]) -> list[list[BatchPart]]:
        """An update's batches by pass through the model: packed ones share a pass while they fit in the places
        that one batch padded to max_seq_length has, others have one each.
        """
        if self.features.padding != "packed":
            return [[share] for share in shares]
        places = self.batch_size * (self.features.max_seq_length or int(self._costs.max()))
        passes: list[list[BatchPart]] = []
        room = -1
        for share in shares:
            needed = int(self._costs[share.rows].sum())
            if needed > room:
                passes.append([])
                room = places
            passes[-1].append(share)
            room -= needed
        return passes

    def backward(self, together: list[BatchPart], group_size: int) -> np.ndarray:
        """Add the batches' shares of the gradient; their outputs, (rows, width)."""
        inputs = self.features.batch(np.concatenate([share.rows for share in together]))
        with self.autocast:
            outputs = self.forward({name: tensor.to(self.device) for name, tensor in inputs.items()})
            parts = outputs.split([len(share.rows) for share in together])
            losses = [self.loss(part, share.rows) for part, share in zip(parts, together, strict=True)]
        for loss, share in zip(losses, together, strict=True):
            if not bool(loss.isfinite()):
                self._diverged(f"epoch {len(self.history)}, batch {share.number}: the loss is {loss.item()}")
        total = sum(loss * share.weight for loss, share in zip(losses, together, strict=True))
        self.scaler.scale(total / group_size).backward()
        return outputs.detach().float().cpu().numpy()

    def update(self) -> None:
        """Let the optimizer use the gradient, and clear it."""
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on after the last update, besides the model's weights.

        All processes must call it together.
        """
        partial = None
        if self.position:
            outputs = torch.from_numpy(parallel.summed(self._outputs)[self._rows_done()])
            partial = {"updates": self.position, "outputs": outputs, "seconds": self._seconds}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.empty(0)
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "seed": self.seed,
            "partial": partial,  # of the epoch that is under way, its rows in the order of the epoch
            "rng": {"cpu": parallel.of_all(torch.get_rng_state()), "cuda": parallel.of_all(cuda)},  # by process
        }

    def _rows_done(self) -> np.ndarray:
        """The rows of the epoch's updates so far, in its order."""
        return np.concatenate([rows for group in self.groups(len(self.history))[: self.position] for rows in group])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken: optimizer, position, random numbers, history."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.history, self.seed = list(state["history"]), state["seed"]
        partial = state["partial"]
        if partial is not None:
            self.position, self._seconds = partial["updates"], partial["seconds"]
            self._outputs = np.zeros((len(self.features), partial["outputs"].shape[1]), dtype=np.float32)
            if parallel.is_first():  # the others add theirs to come
                self._outputs[self._rows_done()] = partial["outputs"].numpy()
        cpu, cuda = state["rng"]["cpu"], state["rng"]["cuda"]
        if len(cpu) != parallel.size():
            logger.warning(
                "%d processes now, %d before: dropout draws other random numbers from here", parallel.size(), len(cpu)
            )
            torch.manual_seed(hash((self.seed, self.updates, parallel.rank())) % 2**63)
            return
        torch.set_rng_state(cpu[parallel.rank()])
        if self.device.type == "cuda" and len(cuda[parallel.rank()]):
            torch.cuda.set_rng_state(cuda[parallel.rank()], self.device)


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A random order of the rows that depends on seed and epoch alone, int64."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def count_updates(rows: int, batch_size: int, accumulation_steps: int) -> int:
    """Updates per epoch; the last group counts though it may be shorter."""
    return math.ceil(math.ceil(rows / batch_size) / accumulation_steps)
