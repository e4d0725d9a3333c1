"""A student's checkpoint: everything needed to continue the training, and to use the student without flags.

Written after an epoch or within one (states.py), it is a dict of tensors, numbers, strings, lists and dicts, the fields
of `Checkpoint` under their names, which `weights_only=True` reads.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from dse.data.tasks import DEFAULT_THRESHOLD, Task, task_from_dict, winning_threshold
from dse.data.tokenizers import tokenizer_from_files
from dse.networks.config import DSEConfig
from dse.networks.student import SiameseNetwork, Student, empty_network
from dse.system.errors import InputError, one_line
from dse.system.files import check_file, load_tensors


@dataclass
class Checkpoint:
    """What a checkpoint holds; the file is the dict of its fields."""

    model: dict[str, Any]  # state dict of the SiameseNetwork
    architecture: dict[str, Any]  # DSEConfig's fields; `bert` is the encoder's whole configuration
    tokenizer: dict[str, str]  # the tokenizer's files as texts
    task: dict[str, Any]  # the task's line
    data: dict[str, Any]  # hashes: files by split, logits, bert (encoder); commands that made the logits
    run: dict[str, Any]  # the flags of the run
    trainer: dict[str, Any]  # optimizer, position, random states, history (Trainer.state_dict)
    stamp: str  # start of the run
    best: dict[str, Any] | None  # file, epoch and threshold of the best epoch so far; None before the first validation
    format: str = "dse checkpoint"
    version: int = 2

    @classmethod
    def read(cls, path: str | Path, flag: str = "--trainer_checkpoint") -> "Checkpoint":
        """Read a checkpoint onto the CPU. Raises InputError, naming the flag, for a missing, cut or foreign one."""
        path = Path(path)
        check_file(path, flag, "dse_train_runner.py --store_checkpoints writes it")
        entries = load_tensors(path, f"{flag}: {path} is truncated or not a checkpoint of dse_train_runner.py")
        if not isinstance(entries, dict) or entries.get("format") != cls.format:
            raise InputError(f"{flag}: {path} was not written by dse_train_runner.py; give one that was")
        missing = [field.name for field in fields(cls) if field.name not in entries]
        if entries.get("version") != cls.version or missing:
            found = f"version {entries.get('version')}{' and lacks ' if missing else ''}{', '.join(missing)}"
            raise InputError(f"{flag}: {path} has format {found}; this program reads version {cls.version}")
        return cls(**{field.name: entries[field.name] for field in fields(cls)})

    def check_task(self, task: Task) -> None:
        """Raise InputError for a checkpoint of another task: another name, other labels, or another order of them."""
        given, own = f"{task.name} {list(task.labels)}", f"{self.task['name']} {self.task['labels']}"
        if given != own:
            raise InputError(f"--task_name: {given} was given, but the checkpoint is of {own}")

    def student(self, network: SiameseNetwork | None = None, tokenizer: Any = None) -> Student:
        """The student, with what is known of its training; the metrics are those of the last epoch.

        A network and tokenizer that are given are used as they are; else they are made from the checkpoint, in
        evaluation mode on the CPU. Raises InputError if its weights do not fit its architecture.
        """
        if network is None:
            try:
                network = empty_network(DSEConfig.from_dict(self.architecture)).eval()
                network.load_state_dict(self.model)
            except (RuntimeError, TypeError, KeyError) as error:
                why = f"its weights do not fit its architecture ({one_line(error)})"
                raise InputError(f"--trainer_checkpoint: {why}") from error
        history = self.trainer["history"] if self.trainer["partial"] is None else []  # its metrics are of other weights
        record: dict[str, Any] = history[-1] if history else {"epoch": None}
        metrics, flags = record.get("validation", {}), {**self.run, "random_seed": self.trainer["seed"]}
        origin = {
            "epoch": record["epoch"],
            "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
            "commands": [*self.data["commands"], ["dse_train_runner.py", flags]],
            "logits_sha256": self.data["logits"],
            "stamp": self.stamp,
        }
        return Student(
            network, tokenizer or tokenizer_from_files(self.tokenizer), task_from_dict(self.task),
            self.run["max_seq_length"], winning_threshold(metrics) or DEFAULT_THRESHOLD, origin,
        )  # fmt: skip


def stamp_in(path: Path) -> str | None:
    """The start of the run that wrote a checkpoint, read without its tensors; None if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)["stamp"]
    except Exception:  # it raises many kinds for a corrupt or foreign file
        return None
