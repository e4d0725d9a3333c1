"""A student's checkpoint: everything to go on training, and everything to use it without flags.

One file per epoch, or within one (states.py), a dict of tensors, numbers, strings, lists and dicts that
`weights_only=True` reads:

    format, version        "dse checkpoint", 2
    model                  state dict of the Siamese classifier
    architecture           DSEConfig's fields; `bert` is the encoder's whole configuration
    tokenizer              the tokenizer's files as texts
    task, data             the task's line; hashes of data and logits, and the commands that made these
    run                    the flags of the run
    trainer                optimizer, position, random states, history (Trainer.state_dict)
    stamp, best            start of the run; file, epoch, threshold of the best so far, None before the first validation
"""

import contextlib
import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dse.cli import same_value
from dse.config import DSEConfig
from dse.encoding import DEFAULT_THRESHOLD, TextSettings
from dse.files import InputError, check_file, disk_errors, load_tensors, one_line, utc_stamp
from dse.models import DSESiameseClassifier, empty_student
from dse.pretrained import tokenizer_from_files
from dse.processors import Task, task_from_dict, task_to_dict
from dse.reporting import Record, winning_threshold
from dse.states import Position, States

logger = logging.getLogger(__name__)

FORMAT, VERSION = "dse checkpoint", 2
HEADER = {"format": FORMAT, "version": VERSION}
_ENTRIES = ("model", "architecture", "tokenizer", "task", "data", "run", "trainer", "stamp", "best")


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
    check_same_flags(checkpoint["run"], flags, but="epochs")
    check_same_data(checkpoint["data"]["files"], data["files"])
    if data["logits"] != checkpoint["data"]["logits"]:
        raise InputError(
            f"--distillation_logits_path: SHA-256 is {data['logits']} now, "
            f"and was {checkpoint['data']['logits']} in the run"
        )


def check_same_flags(then: dict[str, Any], now: dict[str, Any], but: str = "") -> None:
    """Raise InputError, naming both values, for a flag that changed."""
    for flag, value in now.items():
        there = then.get(flag)
        if flag not in then and (value is None or value is False):  # a run from before the flag had it not
            continue
        if flag != but and not same_value(there, value):
            raise InputError(
                f"--{flag}: {value} now, {there} in the run: going on needs the same flags"
                f"{f', --{but} excepted' if but else ''}"
            )


def check_same_data(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError for data files, by split, that changed."""
    for split, files in then.items():
        if files != now.get(split):
            raise InputError(f"--data_dir: the {split} data is {now.get(split)} now, and was {files} in the run")


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
    run, history = checkpoint["run"], checkpoint["trainer"]["history"]
    tokenizer = tokenizer_from_files(checkpoint["tokenizer"])
    threshold = winning_threshold(history[-1].get("validation", {})) if history else None
    model.settings = TextSettings(
        tokenizer, task_from_dict(checkpoint["task"]), run["max_seq_length"], threshold or DEFAULT_THRESHOLD
    )
    model.origin = origin_of(run, checkpoint["trainer"]["seed"], history, checkpoint["data"])
    return model.eval(), tokenizer


def origin_of(run: dict[str, Any], seed: int, history: list[Record], data: dict[str, Any]) -> dict[str, Any]:
    """What a saved student tells of its training.

    Args:
        run: the flags; seed: the one that was used.
        history: the records of all epochs; those of the last one count.
        data: a checkpoint's entry.
    """
    record = history[-1] if history else {"epoch": None}
    metrics = {name: value for name, value in record.get("validation", {}).items() if math.isfinite(value)}
    commands = [*data["commands"], ["dse_train_runner.py", {**run, "random_seed": seed}]]
    return {"epoch": record["epoch"], "metrics": metrics, "commands": commands, "logits_sha256": data["logits"]}


def new_run_folder(parent: Path, experiment: str, stamp: str) -> tuple[Path, str]:
    """Make `<experiment>_<stamp>` below `parent`; where another run took that second, wait for the next.

    Returns:
        The folder and its stamp.
    """
    while True:
        folder = parent / f"{experiment}_{stamp}"
        with disk_errors(folder):
            try:
                folder.mkdir(parents=True)
                return folder, stamp
            except FileExistsError:
                time.sleep(0.1)
                stamp = utc_stamp()


def take_over(path: Path, checkpoint: dict[str, Any], experiment: str) -> States:
    """The states of the run in a checkpoint's folder. Raises InputError where a later one than it lies there."""
    states = States(path.parent, experiment)
    newest = max(states.files, default=None)
    if newest is not None and newest > position_in(checkpoint["trainer"]):
        raise InputError(
            f"--trainer_checkpoint: {path} is not the newest, {states.files[newest]} is: go on from that one, "
            "or move it away"
        )
    states.files[position_in(checkpoint["trainer"])] = path
    return states


def position_in(trainer_state: dict[str, Any]) -> Position:
    """Where a run stands by its `trainer` entry."""
    partial = trainer_state["partial"]
    return len(trainer_state["history"]), 0 if partial is None else partial["updates"]


def find_run(
    parent: Path, experiment: str, check: Callable[[dict[str, Any]], None]
) -> tuple[States, Path, dict[str, Any]] | None:
    """The newest run of an experiment below `parent` that `check` takes: its states, and the newest whole one.

    None where there is none at all. Raises InputError for runs that `check` refuses, with what it says of the newest.
    """
    refusal = None
    name = re.compile(re.escape(experiment) + r"_\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d")
    for folder in sorted((f for f in parent.glob("*") if name.fullmatch(f.name)), reverse=True):
        states = States(folder, experiment, own=True)
        found = states.newest(load_checkpoint)
        if found is None:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()  # of a run that was killed before its first state
            continue
        try:
            check(found[1])
        except InputError as error:
            refusal = refusal or InputError(f"--resume: {found[0]}: {error}; leave --resume out for a new run")
            continue
        return states, *found
    if refusal is not None:
        raise refusal
    return None
