"""A teacher's training in its output folder: states while it is under way, then the teacher and training.json.

<output_dir>/training_state/    states of a training that is not at its end
<output_dir>/                   the teacher, as transformers loads it; training.json: how it was made, and hashes
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dse.data.tokenizers import tokenizer_in, tokenizer_key
from dse.networks.pretrained import STATE, TRAINING, TRAINING_FORMAT, check_hashes, files_of_teacher, read_training
from dse.storage.states import States
from dse.system import parallel
from dse.system.errors import InputError, RunError
from dse.system.files import load_tensors, sha256_file, write_folder_whole, write_json
from dse.training.reporting import RESULTS, Record, append_json_line, results_dirs
from dse.training.run import Identity, Run
from dse.training.trainer import Trainer

logger = logging.getLogger(__name__)

HEADER = {"format": "dse teacher state", "version": 1}


def stored_identity(entries: dict[str, Any]) -> Identity:
    """The identity that a state, or training.json, tells."""
    return Identity(
        entries["task"], entries["run"], entries["data"], entries.get("bert"), tokenizer=entries["tokenizer"]
    )


def _load_state(path: Path) -> dict[str, Any]:
    state = load_tensors(path, f"{path} is truncated, spoiled or not a state of finetune_bert.py")
    if not isinstance(state, dict) or any(state.get(key) != value for key, value in HEADER.items()):
        raise InputError(f"{path} is not a state of this version of finetune_bert.py")
    return state


def finished_training(folder: Path, identity: Identity, epochs: int, overwrite: bool) -> list[Record] | None:
    """The history of a teacher that this very training has finished in a folder; None where there is none.

    Raises InputError for a folder with other things, or another training, in it, unless it may be overwritten.
    """
    there = read_training(folder)
    if there is None:
        if not overwrite and folder.is_dir() and {path.name for path in folder.iterdir()} - {STATE}:
            raise InputError(
                f"--output_dir: {folder} holds other files and no training to go on with; give "
                "--overwrite_output_dir to train into it, or another folder"
            )
        return None
    try:
        identity.check(stored_identity(there))
    except InputError:
        if overwrite:
            return None
        raise
    if len(there["history"]) < epochs:  # of --save_checkpoint_every_epoch
        return None
    check_hashes(folder, "--output_dir")
    return there["history"]


class TeacherRun(Run):
    """A teacher's training. With `resume` it goes on from the newest whole state of its folder, where there is one.

    Args:
        folder: where the teacher goes.
        task_name: as it was given.
        identity: of the training.
        tokenizer: of the teacher.
        epochs: in all.
        every_epoch: refresh the teacher after each epoch.
        log_file: beside which a JSON line per epoch goes.

    Raises InputError for states that are spoiled, or of another training.
    """

    def __init__(
        self, folder: Path, task_name: str, identity: Identity, tokenizer: Any, epochs: int, *, resume: bool,
        every_epoch: bool, log_file: Path | None,
    ) -> None:  # fmt: skip
        states = States(folder / STATE, "teacher", own=True)
        path, found = (states.newest(_load_state) if resume else None) or (None, None)
        if found is not None:
            identity.check(stored_identity(found))
        super().__init__(states, path, found)
        self.folder, self.tokenizer, self.epochs, self.every_epoch = folder, tokenizer, epochs, every_epoch
        self.log_file = log_file
        self.about = {
            "task_name": task_name, "task": identity.task, "run": identity.flags, "data": identity.files,
            "bert": identity.bert, "tokenizer": identity.tokenizer,
        }  # fmt: skip

    def train(
        self, trainer: Trainer, validate: Callable[[], dict[str, float]] | None, save_every: int | None
    ) -> list[Record]:
        """Train to the end and write the teacher; the records of all epochs."""
        if self.found is None:
            self.states.finish()  # of a training that is not gone on with
        self.resume(trainer)
        history = trainer.fit(self.epochs, validate, keeper=self, save_every=save_every)
        self.write_teacher()
        return history

    def entries(self) -> dict[str, Any]:
        """All that a state holds now."""
        trainer = self.trainer
        return {**HEADER, **self.about, "model": trainer.model.state_dict(), "trainer": trainer.state_dict()}

    def after_epoch(self, record: Record) -> bool:
        """Keep a state and, if that was asked for, the teacher as it is."""
        self.trainer.saved = self.save()
        if self.every_epoch and len(self.trainer.history) < self.epochs:
            self.write_teacher()
        if self.log_file is not None and parallel.is_first():
            append_json_line(self.log_file.with_suffix(".jsonl"), record)
        return False

    def write_teacher(self) -> None:
        """Write the teacher and training.json, which has its files' hashes and comes last."""
        if not parallel.is_first():
            return
        with write_folder_whole(self.folder, last=TRAINING) as beside:
            self.trainer.model.save_pretrained(beside)
            self.tokenizer.save_pretrained(beside)
            hashes = {path.name: sha256_file(path) for path in sorted(beside.iterdir())}
            about = {**self.about, "history": self.trainer.history, "sha256": hashes}
            write_json(beside / TRAINING, {"format": TRAINING_FORMAT, **about})
            for name in files_of_teacher(self.folder) - hashes.keys():  # they would be read along with this one's
                (self.folder / name).unlink(missing_ok=True)
        if tokenizer_key(tokenizer_in(self.folder)) != self.about["tokenizer"]:
            raise RunError(
                f"{self.folder}: its tokenizer is not the one of the training, because of other files there: move "
                "these away, and go on from the last state"
            )
        for folder in results_dirs(self.folder, self.about["task"]["also_validate"]).values():
            (folder / RESULTS).unlink(missing_ok=True)  # of the teacher that was replaced
        logger.info("teacher saved in %s", self.folder)
