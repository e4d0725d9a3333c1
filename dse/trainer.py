"""The training loop of both stages: epochs of shuffled batches, accumulation, updates, validation.

It knows neither tasks nor models: `forward` turns a batch's inputs into outputs, `loss` turns outputs and
their rows into the scalar to descend, `measure` turns a whole epoch's outputs into metrics.

An update comes every `accumulation_steps` batches, each batch's loss divided by the batches of its group,
and the last group of an epoch may be shorter:  5 batches by 2 -> (1/2, 1/2), (1/2, 1/2), (1).
Packed batches of a group go through the model in one pass where that needs no more room than one padded
batch: the sum is the same, and bigger matrix products are faster ones.

The order of an epoch depends on the seed and the epoch alone, so a run that goes on needs no more than the
numbers in `state_dict` to make the same updates as one that never stopped.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dse.evaluation import Forward, Measure
from dse.features import Features, in_batches
from dse.optimization import BertAdam
from dse.reporting import Record, format_record

logger = logging.getLogger(__name__)


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
        self.model, self.forward, self.loss, self.measure = model, forward, loss, measure
        self.features, self.optimizer = features, optimizer
        self.batch_size, self.accumulation_steps = batch_size, accumulation_steps
        self.seed, self.device = seed, device
        half = torch.float16 if precision == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype=half, enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.history: list[Record] = []
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
    ) -> list[Record]:
        """Train until `epochs` epochs are done, counting those done before.

        Args:
            validate: gives the metrics of a validation set; called every `validate_every` epochs and after the last.
            after_epoch: called with the epoch's record; ends the training by returning True.

        Returns:
            The records of all epochs.
        """
        while len(self.history) < epochs:
            epoch, started = len(self.history), time.monotonic()
            record: Record = {"epoch": epoch, "train": self.train_epoch(epoch, epochs)}
            if validate is not None and ((epoch + 1) % validate_every == 0 or epoch + 1 == epochs):
                record["validation"] = validate()
            record |= {"updates": self.updates, "rate": self.optimizer.next_rate, "seconds": time.monotonic() - started}
            self.history.append(record)
            logger.info("epoch %d of 0 to %d: %s", epoch, epochs - 1, format_record(record))
            if not math.isfinite(record["train"].get("loss", 0.0)):
                logger.warning("the training loss is not finite: the training has diverged; try a lower rate")
            if after_epoch is not None and after_epoch(record):
                break
        return self.history

    def train_epoch(self, epoch: int, epochs: int) -> dict[str, float]:
        """One pass over all rows in random order; the metrics of the batches as they passed."""
        self.model.train()
        outputs: np.ndarray | None = None
        total = math.ceil(len(self.features) / self.batch_size)
        with tqdm(
            total=total, desc=f"epoch {epoch} of 0 to {epochs - 1}", unit="batch", disable=None, leave=False
        ) as bar:
            for group in self.groups(epoch):
                for batches in self.passes(group):
                    some = self.backward(batches, len(group))
                    if outputs is None:
                        outputs = np.empty((len(self.features), some.shape[1]), dtype=np.float32)
                    outputs[np.concatenate(batches)] = some
                    bar.update(len(batches))
                self.update()
        return self.measure(outputs, self.features.labels)

    def groups(self, epoch: int) -> list[list[np.ndarray]]:
        """The epoch's batches of rows, by update."""
        order = epoch_order(len(self.features), self.seed, epoch)
        return in_batches(in_batches(order, self.batch_size), self.accumulation_steps)

    def passes(self, group: list[np.ndarray]) -> list[list[np.ndarray]]:
        """An update's batches by pass through the model: packed ones share a pass while they fit in the places
        that one batch padded to max_seq_length has, others have one each.
        """
        if self.features.padding != "packed":
            return [[rows] for rows in group]
        places = self.batch_size * (self.features.max_seq_length or int(self._costs.max()))
        passes: list[list[np.ndarray]] = []
        room = -1
        for rows in group:
            needed = int(self._costs[rows].sum())
            if needed > room:
                passes.append([])
                room = places
            passes[-1].append(rows)
            room -= needed
        return passes

    def backward(self, batches: list[np.ndarray], group_size: int) -> np.ndarray:
        """Add the batches' shares of the gradient; their outputs, (rows, width)."""
        inputs = self.features.batch(np.concatenate(batches))
        with self.autocast:
            outputs = self.forward({name: tensor.to(self.device) for name, tensor in inputs.items()})
            parts = outputs.split([len(rows) for rows in batches])
            loss = sum(self.loss(part, rows) for part, rows in zip(parts, batches, strict=True))
        self.scaler.scale(loss / group_size).backward()
        return outputs.detach().float().cpu().numpy()

    def update(self) -> None:
        """Let the optimizer use the gradient, and clear it."""
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on after the last finished epoch, besides the model's weights."""
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "seed": self.seed,
            "rng": {"cpu": torch.get_rng_state(), "cuda": cuda},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken: optimizer, position in the schedule, random numbers, history."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.history, self.seed = list(state["history"]), state["seed"]
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and state["rng"]["cuda"]:
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A random order of the rows that depends on seed and epoch alone, int64."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def count_updates(rows: int, batch_size: int, accumulation_steps: int) -> int:
    """Updates per epoch; the last group counts though it may be shorter."""
    return math.ceil(math.ceil(rows / batch_size) / accumulation_steps)
