"""The training loop of both stages: epochs of shuffled batches, accumulation, updates, validation.

It knows neither tasks nor models. The order of the rows is the plan's (epoch_plan.py). A resumed run needs only the
weights and `state_dict` to make the same updates as one that never stopped, from the middle of an epoch too.
"""

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dse.networks.batches import Inputs, PackedBatch, moved
from dse.networks.encoder import PooledBert, products
from dse.networks.kernels import captured, clear, has_graphs, is_plain, norms
from dse.system import parallel
from dse.system.errors import RunError
from dse.training.epoch_plan import BatchPart, EpochPlan
from dse.training.optimization import BertAdam
from dse.training.reporting import Record

logger = logging.getLogger(__name__)
_MOST_GRAPHS = 16
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # outputs, their labels and their rows, (batch,), to a scalar
Results = tuple[Tensor, Tensor]  # of a pass: the losses of its parts, (parts,), and the outputs, (rows, width)
Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]  # outputs (n, width), labels (n,) of all rows to metrics


@dataclass
class EpochSoFar:
    """What has been done of the current epoch."""

    updates: int = 0
    seconds: float = 0.0
    outputs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # rows, their outputs: of this process

    def all_outputs(self, rows: int) -> np.ndarray:
        """The outputs of all processes, (rows, width), float32; zeros for the rows that are still to come."""
        done, outputs = map(np.concatenate, zip(*self.outputs, strict=True))
        whole = np.zeros((rows, outputs.shape[1]), dtype=np.float32)
        whole[done] = outputs
        return parallel.summed(whole)

    def state_dict(self, plan: EpochPlan, epoch: int) -> dict[str, Any] | None:
        """What `from_state` needs, the outputs in the order of the epoch; None before its first update."""
        if not self.updates:
            return None
        outputs = torch.from_numpy(self.all_outputs(len(plan.batches))[plan.rows_until(epoch, self.updates)])
        return {"updates": self.updates, "outputs": outputs, "seconds": self.seconds}

    @classmethod
    def from_state(cls, state: dict[str, Any] | None, plan: EpochPlan, epoch: int) -> "EpochSoFar":
        """The epoch so far, as it was when `state_dict` was taken."""
        if state is None:
            return cls()
        done = slice(None if parallel.is_first() else 0)  # the outputs are summed: one process has those of before
        rows = plan.rows_until(epoch, state["updates"])
        return cls(state["updates"], state["seconds"], [(rows[done], state["outputs"].numpy()[done])])


class CapturedPasses:
    """Passes on CUDA that are captured and replayed, since to launch a kernel takes longer than most of them run.

    A pass is captured, with all its shapes, when these come for the second time. It gives the numbers that it would
    give if it were run, random ones included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.seen: Counter[Any] = Counter()
        self.graphs: dict[Any, tuple[Callable[[], Sequence[Tensor]], Tensor, Tensor]] = {}

    def run(
        self, compute: Callable[..., Results], batch: PackedBatch, rows: list[Tensor], weights: list[float], size: int
    ) -> Sequence[Tensor]:
        """What `compute` gives for the batch, the parts' rows and weights, and the gradient that it adds."""
        tensors = [getattr(*place) for place in batch.places()]
        key = (*(x.shape for x in tensors), *(len(own) for own in rows), *weights, size)
        self.seen[key] += 1
        if key not in self.graphs and (self.seen[key] < 2 or len(self.graphs) == _MOST_GRAPHS):
            return compute({"packed": batch.to(self.device)}, moved(rows, self.device), weights, size)
        if key not in self.graphs:
            sizes = [sum(x.numel() for x in some) for some in (tensors, rows)]
            flats = [torch.empty(size, dtype=torch.int64, device=self.device) for size in sizes]
            inputs = {"packed": batch.to(self.device, flats[0])}, moved(rows, self.device, flats[1])
            self.graphs[key] = captured(partial(compute, *inputs, weights, size), self.pool), flats[0], flats[1]
        replay, of_batch, of_rows = self.graphs[key]
        batch.to(self.device, of_batch)
        moved(rows, self.device, of_rows)
        return replay()


class Trainer:
    """Trains a model, and remembers how each epoch went.

    Args:
        model: a module on one device, trained in place; from the plan's inputs to outputs (batch, width). Its
            `precision` is that of its encoder (networks/encoder.py).
        plan: the batches, and how they make updates; their features have labels.
        optimizer: BertAdam over the model's parameters.
        graphs: capture passes where that is possible: packed, on one GPU, a plain BERT, no gradient checkpointing.
    """

    def __init__(
        self, model: Any, plan: EpochPlan, loss: Loss, measure: Measure, optimizer: BertAdam, graphs: bool = True
    ) -> None:
        self.model, self.plan, self.loss, self.measure = model, plan, loss, measure
        self.optimizer, self.device = optimizer, next(model.parameters()).device
        self.labels = torch.from_numpy(plan.batches.features.labels).to(self.device)
        self.together = parallel.synchronized(model)  # the model, and with several processes their gradients' mean
        if parallel.size() > 1:  # weights are the same by now; dropout is not to be
            torch.manual_seed(plan.seed + parallel.rank())
        self.captured = CapturedPasses(self.device) if graphs and self._can_capture() else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=model.precision == "fp16")
        self.history: list[Record] = []
        self.so_far = EpochSoFar()
        self.saved: Path | None = None  # the last state that was written, as far as this run knows

    def _can_capture(self) -> bool:
        encoder = next((module for module in self.model.modules() if isinstance(module, PooledBert)), None)
        if not has_graphs(self.device) or self.plan.batches.padding != "packed" or parallel.size() > 1:
            return False
        return encoder is not None and is_plain(encoder.bert) and not encoder.bert.is_activation_checkpointing

    def train_epoch(self, what: str, after_update: Callable[[], None]) -> dict[str, float]:
        """Train on all rows in random order, or on those left. Returns the metrics of the outputs on the way."""
        self.model.train()
        so_far, groups = self.so_far, self.plan.groups(len(self.history))
        batches, started = [len(group) for group in groups], time.monotonic() - so_far.seconds
        with tqdm(
            total=sum(batches), initial=sum(batches[: so_far.updates]), unit="batch", leave=False, desc=what,
            disable=None if parallel.is_first() else True,
        ) as bar:  # fmt: skip
            for group in groups[so_far.updates :]:
                self.train_group(group)
                bar.update(len(group))
                so_far.updates += 1
                so_far.seconds = time.monotonic() - started
                after_update()
        return self.measure(so_far.all_outputs(len(self.plan.batches)), self.plan.batches.features.labels)

    def train_group(self, group: list[np.ndarray]) -> None:
        """One update, from its batches of rows."""
        passes = self.plan.passes(group, self.so_far.updates)
        done = []
        for i, parts in enumerate(passes):
            waits = parallel.size() > 1 and i + 1 < len(passes)  # the last pass averages the gradients of all of them
            with self.together.no_sync() if waits else contextlib.nullcontext():
                done.append(self.backward(parts, len(group)))
        self.update(passes, *map(torch.cat, zip(*done, strict=True)))

    def backward(self, parts: list[BatchPart], group_size: int) -> Sequence[Tensor]:
        """Add the batches' parts of the gradient. Returns their losses, (parts,), and outputs, (rows, width)."""
        weights = [part.weight for part in parts]
        rows = [torch.from_numpy(part.rows) for part in parts]
        everything = np.concatenate([part.rows for part in parts])
        if self.captured is None:
            return self._pass(
                self.plan.batches.of_pairs(everything, self.device), moved(rows, self.device), weights, group_size
            )
        return self.captured.run(self._pass, self.plan.batches.of_few_shapes(everything), rows, weights, group_size)

    def _pass(self, inputs: Inputs, rows: list[Tensor], weights: list[float], group_size: int) -> tuple[Tensor, Tensor]:
        """A pass forward and backward, with the rows of each part on the device, and its weight."""
        pieces = self.together(**inputs).split([len(own) for own in rows])
        losses = [self.loss(piece, self.labels[own], own) for piece, own in zip(pieces, rows, strict=True)]
        total: Any = sum(loss * weight for loss, weight in zip(losses, weights, strict=True))
        with products(self.model.precision, self.device):
            self.scaler.scale(total / group_size).backward()
        return torch.stack(losses).detach(), torch.cat(pieces).detach()

    def update(self, passes: list[list[BatchPart]], losses: Tensor, outputs: Tensor) -> None:
        """Let the optimizer use the gradient, clear it, keep the outputs. Raises RunError for a loss that is NaN."""
        self.scaler.unscale_(self.optimizer)
        gradients = self.optimizer.gradients()
        # All that the host needs to know of the update, in one copy.
        found = torch.cat([losses, outputs.flatten(), norms(gradients).to(losses)]).cpu().numpy()
        of_losses, of_outputs, of_norms = np.split(found, [len(losses), len(losses) + outputs.numel()])
        parts = [part for some in passes for part in some]
        for part, loss in zip(parts, of_losses, strict=True):
            if not np.isfinite(loss):
                self._diverged(f"epoch {len(self.history)}, batch {part.number}: the loss is {loss}")
        rows = np.concatenate([part.rows for part in parts])
        counted = slice(None if parts[0].weight else 0)
        self.so_far.outputs.append((rows[counted], of_outputs.reshape(outputs.shape)[counted]))
        self.scaler.step(self.optimizer, norms_before=of_norms.tolist())
        self.scaler.update()
        if self.captured is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:  # a captured pass adds where it always did
            clear(gradients)

    def check_weights(self) -> None:
        """Raise RunError if a weight is NaN or infinite, so that no such state is written."""
        named = dict(self.model.named_parameters())
        for (name, parameter), norm in zip(named.items(), norms(list(named.values())).tolist(), strict=True):
            # The norm of large weights is infinite, too.
            if not math.isfinite(norm) and not bool(parameter.isfinite().all()):
                self._diverged(f"the weights of {name} are not finite after update {self.optimizer.updates}")

    def _diverged(self, what: str) -> NoReturn:
        raise RunError(
            f"{what}: the training has diverged; last good state: {self.saved or 'none was written'}. "
            "Start again with a lower learning rate, and look for odd rows in the data"
        )

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs besides the model's weights. All processes must call it together."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.empty(0)
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "seed": self.plan.seed,
            "partial": self.so_far.state_dict(self.plan, len(self.history)),
            "rng": {"cpu": parallel.of_all(torch.get_rng_state()), "cuda": parallel.of_all(cuda)},  # by process
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken: optimizer, position, random numbers, history."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.history, self.plan.seed = list(state["history"]), state["seed"]
        self.so_far = EpochSoFar.from_state(state["partial"], self.plan, len(self.history))
        before, processes = len(state["rng"]["cpu"]), parallel.size()
        if before != processes:
            what = "%d processes now, %d before: dropout draws other random numbers from here on"
            logger.warning(what, processes, before)
            torch.manual_seed(hash((self.plan.seed, self.optimizer.updates, parallel.rank())) % 2**63)
            return
        cpu, cuda = (state["rng"][kind][parallel.rank()] for kind in ("cpu", "cuda"))
        torch.set_rng_state(cpu)
        if self.device.type == "cuda" and len(cuda):
            torch.cuda.set_rng_state(cuda, self.device)
