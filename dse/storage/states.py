"""The states of a run in its folder, and which one to continue from.

    <stem>_…_epoch_3.pt                  after epoch 3: a student's checkpoint
    <stem>_state_epoch_3_update_200.pt   within epoch 3, or at the end of one that leaves no checkpoint

While the run is under way, its best checkpoint and the two newest states are kept, so that a corrupt one costs only the
work since the one before. At the end of the run only its best and its newest checkpoint are left.
"""

import copy
import glob
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dse.system import parallel
from dse.system.errors import InputError
from dse.system.files import remove_stale_parts, save_tensors, utc_stamp

logger = logging.getLogger(__name__)

Position = tuple[int, int]  # epochs that are done, updates made in the one under way
_KEPT = 2
_STATE, _CHECKPOINT = re.compile(r"_state_epoch_(\d+)_update_(\d+)\.pt$"), re.compile(r"_epoch_(\d+)\.pt$")


def position_of(name: str) -> Position | None:
    """Where a run stands after the state of that file name.

    >>> position_of("x_state_epoch_3_update_200.pt"), position_of("x_f1_0.861_epoch_3.pt"), position_of("x.pt")
    ((3, 200), (4, 0), None)
    """
    if state := _STATE.search(name):
        return int(state[1]), int(state[2])
    checkpoint = _CHECKPOINT.search(name)
    return checkpoint and (int(checkpoint[1]) + 1, 0)


def snapshot(value: Any, device: torch.device) -> Any:
    """A copy of a state's tensors, dicts and lists on the CPU, which training on `device` does not change.

    CUDA tensors are copied into pinned memory, which torch keeps and uses again for the next snapshot.
    """

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("cpu", non_blocking=True, copy=True)
        if isinstance(value, dict):
            whole = copy.copy(value)  # a state dict has attributes
            whole.update((key, copied(entry)) for key, entry in value.items())
            return whole
        return type(value)(map(copied, value)) if isinstance(value, list | tuple) else value

    whole = copied(value)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return whole


class States:
    """A run's states by position. Only its own are ever removed or replaced, and only after a newer one is complete.

    Their names begin with `stem`, and `mine`, if given, tells them from other runs'. A folder of the run's `own` is
    removed if it ends up empty.
    """

    def __init__(self, folder: Path, stem: str, own: bool = False, mine: Callable[[Path], bool] | None = None) -> None:
        self.folder, self.stem, self.own = folder, stem, own
        paths = [path for path in sorted(folder.glob(f"{glob.escape(stem)}_*.pt")) if mine is None or mine(path)]
        self.files = {position: path for path in paths if (position := position_of(path.name)) is not None}
        self._spoiled: list[Path] = []

    def newest(self, load: Callable[[Path], Any]) -> tuple[Path, Any]:
        """The newest state that `load` can read, and what it gives. Raises InputError if it can read none."""
        for position in sorted(self.files, reverse=True):
            path = self.files[position]
            try:
                return path, load(path)
            except InputError as error:
                logger.warning("%s; looking for the state before it", error)
                self._spoiled.append(self.files.pop(position))
        raise InputError(f"--resume: none of the states in {self.folder} can be read; leave it out to start a new run")

    def save(self, position: Position, entries: dict[str, Any], name: str = "", best_epoch: int | None = None) -> Path:
        """Write a state whole, unless this position has one, and then remove the states that are no longer needed.

        A checkpoint's file has a `name`. The checkpoint of the best epoch is kept.
        """
        if not name and position in self.files:
            return self.files[position]
        tail = f"state_epoch_{position[0]}_update_{position[1]}.pt"
        path = self.folder / (name or f"{self.stem}_{tail}")
        if not name and path.exists() and path not in self._spoiled:  # another run's
            path = self.folder / f"{self.stem}_{utc_stamp()}_{tail}"
        if parallel.is_first():
            self._remove_parts()
            save_tensors(path, entries)
        if name:
            logger.info("checkpoint %s", path)
        self.files[position] = path
        self._remove_but(sorted(self.files)[-_KEPT:], best_epoch)
        for spoiled in set(self._spoiled) - set(self.files.values()):
            self._unlink(spoiled)
        self._spoiled.clear()
        return path

    def finish(self, best_epoch: int | None = None) -> None:
        """End the run: keep its newest and its best checkpoint or, without a best epoch, nothing."""
        checkpoints = [position for position, path in self.files.items() if not _STATE.search(path.name)]
        self._remove_but(sorted(checkpoints)[-1:] if best_epoch is not None else [], best_epoch)
        if self.own and parallel.is_first() and self.folder.is_dir():
            self._remove_parts()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _remove_parts(self) -> None:
        """Remove what this run left of states and students when it was killed; in a folder of its own, at once."""
        remove_stale_parts(self.folder, *(("*", 0.0) if self.own else (f"{glob.escape(self.stem)}_*",)))

    def _remove_but(self, kept: list[Position], best_epoch: int | None) -> None:
        """Remove the files of all other positions but the one after the best epoch."""
        for position in self.files.keys() - {*kept, None if best_epoch is None else (best_epoch + 1, 0)}:
            self._unlink(self.files.pop(position))

    def _unlink(self, path: Path) -> None:
        if parallel.is_first() and path.name.startswith(f"{self.stem}_"):
            path.unlink(missing_ok=True)
