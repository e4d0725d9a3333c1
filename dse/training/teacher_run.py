"""A teacher's training in its output folder: states while it is under way, then the teacher and training.json.

<output_dir>/training_state/    states of a training that is not finished
<output_dir>/                   the teacher, as transformers loads it; training.json: how it was made, and hashes
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.data.tokenizers import tokenizer_in, tokenizer_key
from dse.networks.pretrained import STATE, TRAINING, TRAINING_FORMAT, check_hashes, files_of_teacher, read_training
from dse.storage.states import States
from dse.system import parallel
from dse.system.errors import InputError, RunError
from dse.system.files import load_tensors, sha256_file, write_folder_whole, write_json
from dse.training.reporting import RESULTS, Record, results_dirs
from dse.training.run import Identity, Run, Validate

logger = logging.getLogger(__name__)
HEADER = {"format": "dse teacher state", "version": 1}


def _load_state(path: Path) -> dict[str, Any]:
    state = load_tensors(path, f"{path} is truncated, corrupt or not a state of finetune_bert.py")
    if not isinstance(state, dict) or any(state.get(key) != value for key, value in HEADER.items()):
        raise InputError(f"{path} is not a state of this version of finetune_bert.py")
    return state


@dataclass
class TeacherRun(Run):
    """A teacher's training. With `resumes` it continues from the newest intact state in its folder, if there is one.

    Raises InputError if no state is intact, or if they are of another training.
    """

    folder: Path  # where the teacher goes
    task_name: str  # as it was given
    identity: Identity
    tokenizer: Any
    epochs: int  # in all
    resumes: bool  # --resume
    every_epoch: bool  # refresh the teacher after each epoch

    def __post_init__(self) -> None:
        self.states = States(self.folder / STATE, "teacher", own=True)
        if self.resumes and self.states.files:
            self.path, self.found = self.states.newest(_load_state)
            self._check_same(self.found)

    def _check_same(self, entries: dict[str, Any]) -> None:
        """Raise InputError if the entries of a state, or of training.json, are of another training."""
        tokenizer = entries["tokenizer"]
        then = Identity(entries["task"], entries["run"], entries["data"], entries.get("bert"), tokenizer=tokenizer)
        self.identity.check(then)

    def finished(self, overwrite: bool) -> list[Record] | None:
        """With `resumes`, the history of a teacher that this same training has finished; None if there is none.

        Raises InputError if the folder holds other files, or another training, unless it may be overwritten.
        """
        if not self.resumes or self.path is not None:
            return None
        there, folder = read_training(self.folder), self.folder
        if there is not None:
            try:
                self._check_same(there)
            except InputError:
                if not overwrite:
                    raise
            else:
                if len(there["history"]) >= self.epochs:  # fewer: of --save_checkpoint_every_epoch
                    check_hashes(folder, "--output_dir")
                    return there["history"]
        elif not overwrite and folder.is_dir() and {path.name for path in folder.iterdir()} - {STATE}:
            raise InputError(
                f"--output_dir: {folder} holds other files and no training to continue; give "
                "--overwrite_output_dir to train into it, or another folder"
            )
        logger.info("--resume: no state in %s: starting a new training", folder)
        return None

    def train(self, validate: Validate | None, save_every: int | None) -> list[Record]:
        """Train to the end and write the teacher. Returns the records of all epochs."""
        if self.path is None:
            self.states.finish()  # of a training that is not continued
        self.fit(self.epochs, validate, save_every=save_every)
        self.write_teacher()
        return self.trainer.history

    def about(self) -> dict[str, Any]:
        """What states and training.json record about the training."""
        now = self.identity
        return {"task_name": self.task_name, "task": now.task, "run": now.flags, "data": now.files, "bert": now.bert,
                "tokenizer": now.tokenizer}  # fmt: skip

    def entries(self, name: str = "") -> dict[str, Any]:
        """What a state would hold now."""
        trainer = self.trainer
        return {**HEADER, **self.about(), "model": trainer.model.state_dict(), "trainer": trainer.state_dict()}

    def after_epoch(self, record: Record) -> bool:
        """Write a state and, if requested, the teacher as it is."""
        self.save()
        if self.every_epoch and len(self.trainer.history) < self.epochs:
            self.write_teacher()
        return super().after_epoch(record)

    def write_teacher(self) -> None:
        """Write the teacher and training.json, which has its files' hashes and comes last."""
        if not parallel.is_first():
            return
        with write_folder_whole(self.folder, last=TRAINING) as beside:
            self.trainer.model.save_pretrained(beside)
            self.tokenizer.save_pretrained(beside)
            hashes = {path.name: sha256_file(path) for path in sorted(beside.iterdir())}
            about = {**self.about(), "history": self.trainer.history, "sha256": hashes}
            write_json(beside / TRAINING, {"format": TRAINING_FORMAT, **about})
            for name in files_of_teacher(self.folder) - hashes.keys():  # they would be read along with this one's
                (self.folder / name).unlink(missing_ok=True)
        if tokenizer_key(tokenizer_in(self.folder)) != self.identity.tokenizer:
            raise RunError(
                f"{self.folder}: its tokenizer is not the one of the training, because of other files there: move "
                "these away, and run the same command with --resume to continue"
            )
        for folder in results_dirs(self.folder, self.identity.task["also_validate"]).values():
            (folder / RESULTS).unlink(missing_ok=True)  # of the teacher that was replaced
        logger.info("teacher saved in %s", self.folder)
