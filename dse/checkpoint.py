"""A student's checkpoint: everything to go on training, and everything to use it without flags.

One file per epoch, a dict of tensors, numbers, strings, lists and dicts that `weights_only=True` reads:

    format, version        "dse checkpoint", 1
    model                  state dict of the Siamese classifier
    architecture           DSEConfig's fields; `bert` is the encoder's whole configuration
    tokenizer              the tokenizer's files as texts
    task, data             the task's line; hashes of data and logits
    run                    the flags of the run
    trainer                optimizer, updates, random states, history (Trainer.state_dict)
    stamp, best            start of the run; file and epoch of the best so far
"""

import glob
import logging
import math
import re
import time
from pathlib import Path
from typing import Any

import torch

from dse.cli import same_value
from dse.config import DSEConfig
from dse.encoding import TextSettings
from dse.files import InputError, check_file, load_tensors, one_line, utc_stamp, write_whole
from dse.models import DSESiameseClassifier, empty_student
from dse.pretrained import tokenizer_from_files
from dse.processors import Task, task_from_dict, task_to_dict
from dse.reporting import Record

logger = logging.getLogger(__name__)

FORMAT, VERSION = "dse checkpoint", 1
_ENTRIES = ("model", "architecture", "tokenizer", "task", "data", "run", "trainer", "stamp", "best")


def save_checkpoint(path: Path, entries: dict[str, Any]) -> None:
    """Write a checkpoint whole."""
    with write_whole(path) as beside:
        torch.save({"format": FORMAT, "version": VERSION, **entries}, beside)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises InputError for a missing, truncated or foreign file."""
    path = Path(path)
    check_file(path, "--trainer_checkpoint", "dse_train_runner.py --store_checkpoints writes it")
    checkpoint = load_tensors(
        path, f"--trainer_checkpoint: {path} is truncated or no checkpoint of dse_train_runner.py; take another one"
    )
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise InputError(f"--trainer_checkpoint: {path} was not written by dse_train_runner.py, which is expected here")
    missing = [name for name in _ENTRIES if name not in checkpoint]
    if checkpoint.get("version") != VERSION or missing:
        raise InputError(
            f"--trainer_checkpoint: {path} has format version {checkpoint.get('version')}"
            f"{' and lacks ' + ', '.join(missing) if missing else ''}; this program reads version {VERSION}"
        )
    return checkpoint


def check_task(checkpoint: dict[str, Any], task: Task) -> None:
    """Raise InputError for a checkpoint of another task: another name, other labels, or another order of them."""
    there = checkpoint["task"]
    if there["name"] != task.name or tuple(there["labels"]) != task.labels:
        raise InputError(
            f"--task_name: {task.name} {list(task.labels)} was given, but the checkpoint is of "
            f"{there['name']} {there['labels']}"
        )


def check_same_run(checkpoint: dict[str, Any], task: Task, flags: dict[str, Any], data: dict[str, Any]) -> None:
    """Raise InputError, naming both values, for anything but --epochs that would make another run of a continued one.

    Args:
        flags: the flags now, as the checkpoint's `run` entry has them.
        data: the data now, as its `data` entry has it: hashes of the files by split, and of the logits.
    """
    check_task(checkpoint, task)
    for key, value in task_to_dict(task).items():
        if checkpoint["task"].get(key) != value:
            raise InputError(f"--task_name: {key} is {value} now, and was {checkpoint['task'].get(key)} in the run")
    for flag, value in flags.items():
        there = checkpoint["run"].get(flag, value)
        if flag != "epochs" and not same_value(there, value):
            raise InputError(
                f"--{flag}: {value} now, {there} in the run: going on needs the same flags, --epochs excepted"
            )
    for split, files in checkpoint["data"]["files"].items():
        if files != data["files"].get(split):
            raise InputError(
                f"--data_dir: the {split} data is {data['files'].get(split)} now, and was {files} in the run"
            )
    if data["logits"] != checkpoint["data"]["logits"]:
        raise InputError(
            f"--distillation_logits_path: SHA-256 is {data['logits']} now, "
            f"and was {checkpoint['data']['logits']} in the run"
        )


def student_from_checkpoint(checkpoint: dict[str, Any]) -> tuple[DSESiameseClassifier, Any]:
    """The student, in evaluation mode on the CPU, and its tokenizer; no pre-trained weights are needed.

    The student takes texts (encoding.py) and can be saved as a folder (sharing.py).
    """
    try:
        model = empty_student(DSEConfig.from_dict(checkpoint["architecture"]))
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise InputError(
            f"--trainer_checkpoint: its weights and its architecture differ ({one_line(error)})"
        ) from error
    run, record = checkpoint["run"], checkpoint["trainer"]["history"][-1]
    tokenizer = tokenizer_from_files(checkpoint["tokenizer"])
    model.settings = TextSettings(tokenizer, task_from_dict(checkpoint["task"]), run["max_seq_length"])
    model.origin = origin_of(run, record, checkpoint["data"]["logits"])
    return model.eval(), tokenizer


def origin_of(run: dict[str, Any], record: Record, logits: str) -> dict[str, Any]:
    """What a saved student tells of its training.

    Args:
        run: the flags.
        record: of the epoch.
        logits: SHA-256 of the teacher's.
    """
    metrics = {name: value for name, value in record.get("validation", {}).items() if math.isfinite(value)}
    return {"epoch": record["epoch"], "metrics": metrics, "run": run, "logits_sha256": logits}


def new_run_folder(parent: Path, experiment: str, stamp: str) -> tuple[Path, str]:
    """Make `<experiment>_<stamp>` below `parent`; where another run took that second, wait for the next.

    Returns:
        The folder and its stamp.
    """
    while True:
        folder = parent / f"{experiment}_{stamp}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.1)
            stamp = utc_stamp()
        else:
            return folder, stamp


class CheckpointFolder:
    """A run's folder of checkpoints: the best by validation score and the newest, one file when they are the same.

    Only checkpoints of this run are ever removed, and only after the newer one is whole.
    """

    def __init__(self, folder: Path, experiment: str) -> None:
        self.folder, self.experiment = folder, experiment
        self.files: dict[int, Path] = {}  # by epoch

    def save(self, epoch: int, score: tuple[str, float], best_epoch: int, entries: dict[str, Any]) -> Path:
        """Write the checkpoint of `epoch`, then remove those that are neither the best nor the newest."""
        path = self.folder / f"{self.experiment}_{utc_stamp()}_{score[0]}_{score[1]:.3f}_epoch_{epoch}.pt"
        self.files[epoch] = path
        save_checkpoint(path, {**entries, "best": {"epoch": best_epoch, "file": self.files[best_epoch].name}})
        for old in set(self.files) - {epoch, best_epoch}:
            self.files.pop(old).unlink(missing_ok=True)
        return path

    def take_over(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Go on in the folder of a checkpoint. Raises InputError where a later one lies there."""
        best, newest = checkpoint["best"], len(checkpoint["trainer"]["history"]) - 1
        for other in self.folder.glob(f"{glob.escape(self.experiment)}_*.pt"):
            match = re.search(r"_epoch_(\d+)\.pt$", other.name)
            if match and int(match.group(1)) > newest:
                raise InputError(
                    f"--trainer_checkpoint: {path} is not the newest, {other} is: go on from that one, or move it away"
                )
            if match:  # one that is neither best nor newest was left by a stop between writing and removing
                self.files[int(match.group(1))] = other
        self.files[newest] = path
        if not (self.folder / best["file"]).is_file():
            logger.warning("the best checkpoint so far, %s, is not beside %s", best["file"], path)
        self.files[best["epoch"]] = self.folder / best["file"]
