"""Which rows an epoch trains on together, and in which order.

The order of an epoch depends on the seed and the epoch alone. An update comes every `accumulation_steps` batches, each
batch's loss divided by the batches of its group; the last group of an epoch may be shorter:

    5 batches by 2 -> (1/2, 1/2), (1/2, 1/2), (1)

Packed batches of a group share a pass where they need no more room than one batch padded to max_seq_length: the sum
stays the same, and bigger matrix products are faster. Others have a pass each. Several processes (system/parallel.py)
take their parts of each batch; the mean over its n rows stays what it is, since a part of k rows weighs k / n.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dse.data.features import cached_features, in_batches
from dse.data.processors import Examples
from dse.data.tasks import Task
from dse.networks.batches import Batches
from dse.system import parallel


def cached_batches(
    form: str, task: Task, splits: dict[str, Examples], tokenizer: Any, caches: dict[str, tuple[Path, bool]],
    args: argparse.Namespace,
) -> dict[str, Batches]:  # fmt: skip
    """The batches of each split: form "joint" for a teacher, "separate" for a student.

    `caches` holds the path of each split's features and whether the user chose it; `args` are those of a script.
    """
    length, padding = args.max_seq_length, args.padding or "packed"
    return {
        split: Batches(cached_features(form, task, rows, tokenizer, length, *caches[split]), padding, length)
        for split, rows in splits.items()
    }


class BatchPart(NamedTuple):
    """A process's part of a batch."""

    rows: np.ndarray  # int64
    weight: float  # of its mean loss: 1, or with several processes their number x its part of the batch's rows
    number: int  # of the batch, in the epoch, from 1


@dataclass
class EpochPlan:
    """The order and the grouping in which the rows of `batches` are trained on."""

    batches: Batches
    batch_size: int  # rows per batch
    accumulation_steps: int  # batches per update
    seed: int  # of the order

    def groups(self, epoch: int) -> list[list[np.ndarray]]:
        """The epoch's batches of rows, by update."""
        order = epoch_order(len(self.batches), self.seed, epoch)
        return in_batches(in_batches(order, self.batch_size), self.accumulation_steps)

    def rows_until(self, epoch: int, updates: int) -> np.ndarray:
        """The rows of an epoch's first updates, in its order."""
        return np.concatenate([rows for group in self.groups(epoch)[:updates] for rows in group])

    def passes(self, group: list[np.ndarray], update: int = 0) -> list[list[BatchPart]]:
        """This process's parts of the batches of an update (counted from 0), by pass through the model."""
        first = update * self.accumulation_steps + 1
        parts = [
            BatchPart(rows, parallel.size() * len(rows) / len(whole), first + i)
            for i, whole in enumerate(group)
            if len(rows := parallel.rows_of_rank(whole))
        ]
        # Of a short last batch there may be nothing for it, but the others wait for its gradient.
        parts = parts or [BatchPart(group[0][:1], 0.0, first)]
        if self.batches.padding != "packed":
            return [[part] for part in parts]
        costs, room = self.batches.features.costs, -1
        passes: list[list[BatchPart]] = []
        for part in parts:
            needed = int(costs[part.rows].sum())
            if needed > room:
                passes.append([])
                room = self.batch_size * self.batches.max_seq_length
            passes[-1].append(part)
            room -= needed
        return passes


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A random order of the rows that depends on seed and epoch alone, int64."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def count_updates(rows: int, batch_size: int, accumulation_steps: int) -> int:
    """Updates per epoch; the last group counts though it may be shorter."""
    return math.ceil(math.ceil(rows / batch_size) / accumulation_steps)
