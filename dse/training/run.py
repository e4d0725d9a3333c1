"""A training that can be stopped and resumed: what makes it this one and no other, and its states."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.networks.pretrained import bert_hashes, find_bert
from dse.storage.states import States
from dse.system.errors import InputError
from dse.system.files import same_value
from dse.training.reporting import Record
from dse.training.trainer import Trainer

logger = logging.getLogger(__name__)

# Flags of inputs that are compared by their hashes, and of places of outputs.
_PLACES = {"bert_model", "data_dir", "distillation_logits_path", "train_features_path", "dev_features_path",
           "checkpoint_dir", "log_dir", "plots_dir", "output_dir", "cache_dir"}  # fmt: skip


@dataclass
class Identity:
    """What makes a training this one: the same flags, on the same data, from the same encoder."""

    task: dict[str, Any]  # its line (tasks.task_to_dict)
    flags: dict[str, Any]  # by name; those that are not given here may differ
    files: dict[str, Any]  # names and hashes of the data's files, by split
    bert: dict[str, str] | None  # hashes of the encoder's files; None: not known, and its name counts
    logits: str | None = None  # hash of the teacher's logits
    tokenizer: str | None = None  # hash

    def check(self, then: "Identity", free: str = "") -> None:
        """Raise InputError, naming both values, where a run of before was another one.

        Args:
            then: that run's.
            free: a flag that may have changed.
        """
        for key, value in self.task.items():
            _compare("task_name", value, then.task.get(key), "" if key == "name" else key)
        excepted = f": going on needs the same flags{f', --{free} excepted' if free else ''}"
        for flag, value in self.flags.items():
            added = flag not in then.flags and (
                value is None or value is False
            )  # the run was before there was the flag
            if flag not in _PLACES and flag != free and not added:
                _compare(flag, value, then.flags.get(flag), "", excepted)
        for split, files in then.files.items():
            _compare("data_dir", self.files.get(split), files, f"the {split} data")
        _compare("distillation_logits_path", self.logits, then.logits, "SHA-256")
        now, before = self.flags["bert_model"], then.flags["bert_model"]
        same = same_value(now, before) if then.bert is None else self.bert == then.bert
        if not same:
            how = "" if then.bert is None else ", which differ in the SHA-256 of their files"
            raise InputError(f"--bert_model: {now} now, {before} in the run{how}: going on needs the same encoder")
        if self.tokenizer != then.tokenizer:
            raise InputError("--bert_model: its tokenizer is not the one that the run began with")


def _compare(flag: str, now: Any, then: Any, what: str = "", ending: str = "") -> None:
    if not same_value(now, then):
        both = f"{what} is {now} now, and was {then}" if what else f"{now} now, {then}"
        raise InputError(f"--{flag}: {both} in the run{ending}")


def encoder_now(name: str, then: Identity) -> dict[str, str] | None:
    """The hashes of --bert_model, to be compared with those of a run of before that goes on from its own weights.

    An encoder of the same name that is gone, or a hub's, is not needed: its hashes are taken to be the run's.
    """
    if then.bert is None:
        return None
    same = same_value(name, then.flags["bert_model"])
    try:
        return bert_hashes(find_bert(name, "--bert_model", hub=not same))
    except InputError:
        if not same:
            raise
        return then.bert


class Run:
    """A training's states in a folder: it goes on from one of them, and keeps new ones. Subclasses know what is stored.

    Args:
        states: of the folder.
        path, found: the state to go on from, and its entries `model` and `trainer`; None: a new run.
    """

    def __init__(self, states: States, path: Path | None = None, found: dict[str, Any] | None = None) -> None:
        self.states, self.path, self.found = states, path, found

    def resume(self, trainer: Trainer) -> None:
        """Put the trainer where the run stands."""
        self.trainer = trainer
        if self.found is None:
            return
        trainer.model.load_state_dict(self.found["model"])
        trainer.load_state_dict(self.found["trainer"])
        trainer.saved, self.found = self.path, None  # its tensors are not needed twice
        logger.info(
            "going on after %d epochs and %d updates of the next, from %s",
            len(trainer.history), trainer.position, self.path,
        )  # fmt: skip

    def entries(self) -> dict[str, Any]:
        """All that a state holds now."""
        raise NotImplementedError

    def best_epoch(self) -> int | None:
        """The epoch whose checkpoint is kept; None: there is none."""
        return None

    def save(self) -> Path:
        """Write the state as it is; where it is now."""
        position = len(self.trainer.history), self.trainer.position
        return self.states.save(position, self.entries(), best_epoch=self.best_epoch())

    def after_epoch(self, record: Record) -> bool:
        """Keep what an epoch leaves; True ends the training."""
        self.trainer.saved = self.save()
        return False

    def finish(self) -> None:
        """The training is at its end: keep what is not for going on alone."""
        self.states.finish(self.best_epoch())
