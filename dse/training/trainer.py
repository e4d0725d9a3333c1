"""The training loop of both stages: epochs of shuffled batches, accumulation, updates, validation.

It knows neither tasks nor models: the model turns a batch's inputs into outputs, `loss` turns outputs and their rows
into the scalar to descend, `measure` turns a whole epoch's outputs into metrics. The order of the rows is the plan's
(epoch_plan.py); a run that goes on needs no more than `state_dict` to make the same updates as one that never stopped,
from the middle of an epoch too.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dse.system import parallel, signals
from dse.system.errors import RunError
from dse.training.epoch_plan import BatchPart, EpochPlan
from dse.training.optimization import BertAdam
from dse.training.reporting import Record, format_record

logger = logging.getLogger(__name__)


class Keeper(Protocol):
    """What keeps a training's states (run.py)."""

    def save(self) -> Path:
        """Write the state as it is; where it is now."""

    def after_epoch(self, record: Record) -> bool:
        """Keep what an epoch leaves; True ends the training."""


class Trainer:
    """Trains a model, and remembers how each epoch went.

    Args:
        model: in place, on `device`; takes the inputs of the plan's batches to outputs (batch, width).
        plan: the batches, and how they make updates; their features have labels.
        loss: outputs and their rows (batch,) to a scalar.
        measure: outputs (n, width) and labels (n,) of all rows to metrics.
        optimizer: BertAdam over the model's parameters.
        precision: "fp32", or mixed: "fp16" (CUDA only) or "bf16".
    """

    def __init__(
        self,
        model: nn.Module,
        plan: EpochPlan,
        loss: Callable[[Tensor, np.ndarray], Tensor],
        measure: Callable[[np.ndarray, np.ndarray], dict[str, float]],
        optimizer: BertAdam,
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        self.model, self.plan, self.loss, self.measure = model, plan, loss, measure
        self.optimizer, self.device = optimizer, device
        self.together = parallel.synchronized(model)  # the model, and with several processes their gradients' mean
        if parallel.size() > 1:  # weights are the same by now; dropout is not to be
            torch.manual_seed(plan.seed + parallel.rank())
        half = torch.float16 if precision == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype=half, enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.history: list[Record] = []
        self.saved: Path | None = None  # the last state that was written, as far as this run knows
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.position = 0  # updates made in the epoch that is under way
        self._outputs: np.ndarray | None = None  # of that epoch, (n, width), by this process; zeros for others' rows
        self._seconds = 0.0  # that it took so far

    @property
    def updates(self) -> int:
        """Updates made so far, those of earlier runs included."""
        return self.optimizer.updates

    def fit(
        self,
        epochs: int,
        validate: Callable[[], dict[str, float]] | None = None,
        validate_every: int = 1,
        keeper: Keeper | None = None,
        save_every: int | None = None,
    ) -> list[Record]:
        """Train until `epochs` epochs are done, counting those done before; the records of all epochs.

        Args:
            validate: gives the metrics of a validation set; called every `validate_every` epochs and after the last.
            keeper: keeps states every `save_every` updates, after epochs, and when a signal ends the run.

        Raises RunError for a loss that is NaN or infinite, before it reaches the weights; Stopped after a signal.
        """
        done = [len(self.history), self.position, self.updates, self.plan.seed, len(self.plan.batches)]
        parallel.agree(done, "what they go on from (epochs, updates, updates in all, seed, pairs)")
        try:
            while len(self.history) < epochs:
                epoch = len(self.history)
                with signals.deferred():
                    train = self.train_epoch(epochs, keeper if save_every else None, save_every or 1)
                record: Record = {"epoch": epoch, "train": train}
                if validate is not None and ((epoch + 1) % validate_every == 0 or epoch + 1 == epochs):
                    started = time.monotonic()
                    # With several processes, which wait for each other in it, a signal does not cut it off.
                    with contextlib.nullcontext() if parallel.size() == 1 else signals.deferred():
                        record["validation"] = validate()
                    self._seconds += time.monotonic() - started
                with signals.deferred():
                    if self._end_epoch(record, epochs, keeper):
                        break
                _stop_together()
        except signals.Stopped as stop:
            self._save_on(stop, keeper)
            raise
        return self.history

    def train_epoch(self, epochs: int, keeper: Keeper | None = None, save_every: int = 1) -> dict[str, float]:
        """One pass over all rows in random order, or its rest; the metrics of the batches as they passed."""
        self.model.train()
        epoch, started, before = len(self.history), time.monotonic(), self._seconds
        groups = self.plan.groups(epoch)
        with tqdm(
            total=sum(map(len, groups)), initial=sum(map(len, groups[: self.position])), unit="batch", leave=False,
            desc=f"epoch {epoch} of 0 to {epochs - 1}", disable=None if parallel.is_first() else True,
        ) as bar:  # fmt: skip
            for group in groups[self.position :]:
                self.train_group(group)
                bar.update(len(group))
                self.position += 1
                self._seconds = before + time.monotonic() - started
                _stop_together()
                if keeper is not None and self.updates % save_every == 0:
                    self._save(keeper)
        return self.measure(parallel.summed(self._outputs), self.plan.batches.features.labels)

    def train_group(self, group: list[np.ndarray]) -> None:
        """One update, from its batches of rows."""
        passes = self.plan.passes(group, self.position)
        for i, parts in enumerate(passes):
            waits = parallel.size() > 1 and i + 1 < len(passes)  # the last pass averages the gradients of all of them
            with self.together.no_sync() if waits else contextlib.nullcontext():
                outputs = self.backward(parts, len(group))
            if self._outputs is None:
                self._outputs = np.zeros((len(self.plan.batches), outputs.shape[1]), dtype=np.float32)
            if parts[0].weight:
                self._outputs[np.concatenate([part.rows for part in parts])] = outputs
        self.update()

    def backward(self, parts: list[BatchPart], group_size: int) -> np.ndarray:
        """Add the batches' parts of the gradient; their outputs, (rows, width)."""
        inputs = self.plan.batches.of_pairs(np.concatenate([part.rows for part in parts]))
        with self.autocast:
            outputs = self.together(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
            pieces = outputs.split([len(part.rows) for part in parts])
            losses = [self.loss(piece, part.rows) for piece, part in zip(pieces, parts, strict=True)]
        for loss, part in zip(losses, parts, strict=True):
            if not bool(loss.isfinite()):
                self._diverged(f"epoch {len(self.history)}, batch {part.number}: the loss is {loss.item()}")
        total = sum(loss * part.weight for loss, part in zip(losses, parts, strict=True))
        self.scaler.scale(total / group_size).backward()
        return outputs.detach().float().cpu().numpy()

    def update(self) -> None:
        """Let the optimizer use the gradient, and clear it."""
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _end_epoch(self, record: Record, epochs: int, keeper: Keeper | None) -> bool:
        record |= {"updates": self.updates, "rate": self.optimizer.next_rate, "seconds": self._seconds}
        self.history.append(record)
        self._begin_epoch()
        logger.info("epoch %d of 0 to %d: %s", record["epoch"], epochs - 1, format_record(record))
        self.check_weights()
        return keeper is not None and keeper.after_epoch(record)

    def _save(self, keeper: Keeper) -> None:
        self.check_weights()
        self.saved = keeper.save()

    def _save_on(self, stop: signals.Stopped, keeper: Keeper | None) -> None:
        """Keep the state when a signal ends the run, and tell where it is."""
        if keeper is None:
            return
        if not stop.anywhere:  # else an update may be half made
            with signals.deferred():
                self._save(keeper)
                parallel.wait_for_all()  # torchrun ends all of them soon after the first
        if self.saved is not None:
            stop.advice = f"state in {self.saved}; the same command with --resume goes on"

    def check_weights(self) -> None:
        """Raise RunError if a weight is NaN or infinite, so that no such state is written."""
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                self._diverged(f"the weights of {name} are not finite after update {self.updates}")

    def _diverged(self, what: str) -> NoReturn:
        raise RunError(
            f"{what}: the training has diverged; last good state: {self.saved or 'none was written'}. "
            "Start again with a lower rate, and look for odd rows in the data"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on after the last update, besides the model's weights.

        All processes must call it together.
        """
        partial = None
        if self.position:
            rows = self.plan.rows_until(len(self.history), self.position)
            outputs = torch.from_numpy(parallel.summed(self._outputs)[rows])
            partial = {"updates": self.position, "outputs": outputs, "seconds": self._seconds}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.empty(0)
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "seed": self.plan.seed,
            "partial": partial,  # of the epoch that is under way, its rows in the order of the epoch
            "rng": {"cpu": parallel.of_all(torch.get_rng_state()), "cuda": parallel.of_all(cuda)},  # by process
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken: optimizer, position, random numbers, history."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.history, self.plan.seed = list(state["history"]), state["seed"]
        partial = state["partial"]
        if partial is not None:
            self.position, self._seconds = partial["updates"], partial["seconds"]
            self._outputs = np.zeros((len(self.plan.batches), partial["outputs"].shape[1]), dtype=np.float32)
            if parallel.is_first():  # the others add theirs to come
                self._outputs[self.plan.rows_until(len(self.history), self.position)] = partial["outputs"].numpy()
        cpu, cuda = state["rng"]["cpu"], state["rng"]["cuda"]
        if len(cpu) != parallel.size():
            logger.warning(
                "%d processes now, %d before: dropout draws other random numbers from here", parallel.size(), len(cpu)
            )
            torch.manual_seed(hash((self.plan.seed, self.updates, parallel.rank())) % 2**63)
            return
        torch.set_rng_state(cpu[parallel.rank()])
        if self.device.type == "cuda" and len(cuda[parallel.rank()]):
            torch.cuda.set_rng_state(cuda[parallel.rank()], self.device)


def _stop_together() -> None:
    """Raise Stopped if any of the processes was asked to stop, in all of them at the same update."""
    number = parallel.highest(signals.requested() or 0)
    if number:
        raise signals.Stopped(number)
