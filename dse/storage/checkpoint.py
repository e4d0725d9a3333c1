"""A student's checkpoint: everything to go on training, and everything to use it without flags.

One file per epoch, or within one (states.py), a dict of tensors, numbers, strings, lists and dicts that
`weights_only=True` reads:

    format, version        "dse checkpoint", 2
    model                  state dict of the Siamese classifier
    architecture           DSEConfig's fields; `bert` is the encoder's whole configuration
    tokenizer              the tokenizer's files as texts
    task, data             the task's line; hashes of data, logits and encoder, and the commands that made these
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

import torch

from dse.data.tasks import DEFAULT_THRESHOLD, Task, task_from_dict, task_to_dict
from dse.data.tokenizers import tokenizer_from_files
from dse.networks.config import DSEConfig
from dse.networks.pretrained import bert_hashes, find_bert
from dse.storage.states import Position, States
from dse.storage.student_folder import CONFIG, STUDENT_FILES, read_config
from dse.system.errors import InputError, RunError, one_line
from dse.system.files import check_file, disk_errors, load_tensors, remove_stale_parts, same_value, utc_stamp
from dse.training.reporting import winning_threshold

logger = logging.getLogger(__name__)

FORMAT, VERSION = "dse checkpoint", 2
HEADER = {"format": FORMAT, "version": VERSION}
# Flags of inputs that are compared by their hashes, and of places of outputs.
_PLACES = {"bert_model", "data_dir", "distillation_logits_path", "train_features_path", "dev_features_path",
           "checkpoint_dir", "log_dir", "plots_dir", "output_dir", "cache_dir"}  # fmt: skip
BEST = "best"  # folder of the best epoch's student, in the run's
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
    now, then, there = flags["bert_model"], checkpoint["run"]["bert_model"], checkpoint["data"].get("bert")
    same = same_value(now, then)
    try:
        here = None if there is None else bert_hashes(find_bert(now, "--bert_model", hub=not same))
    except InputError:
        if not same:
            raise
        here = there  # it is gone, or a hub's, and not needed: the weights are the checkpoint's
    check_same_bert(then, now, there, here)


def check_same_bert(then: str, now: str, there: dict[str, str] | None, here: dict[str, str] | None) -> None:
    """Raise InputError where --bert_model is another encoder than the run's.

    Args:
        then, now: its names, which count alone for a run from before hashes were stored.
        there, here: its `bert_hashes` in the run and now.
    """
    if not (same_value(then, now) if there is None else here == there):
        how = "" if there is None else ", which differ in the SHA-256 of their files"
        raise InputError(f"--bert_model: {now} now, {then} in the run{how}: going on needs the same encoder")


def check_same_flags(then: dict[str, Any], now: dict[str, Any], but: str = "") -> None:
    """Raise InputError, naming both values, for a flag that changed; inputs that hashes tell, and places, apart."""
    for flag, value in now.items():
        if flag in _PLACES:
            continue
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


def student_from_checkpoint(checkpoint: dict[str, Any]) -> tuple[Any, Any]:
    """The student, in evaluation mode on the CPU, and its tokenizer; no pre-trained weights are needed.

    The student takes texts (encoding.py) and can be saved as a folder (sharing.py).
    """
    from dse.models import empty_student

    try:
        model = empty_student(DSEConfig.from_dict(checkpoint["architecture"]))
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, KeyError) as error:
        raise InputError(
            f"--trainer_checkpoint: its weights and its architecture differ ({one_line(error)})"
        ) from error
    run, trainer = checkpoint["run"], checkpoint["trainer"]
    history = trainer["history"] if trainer["partial"] is None else []  # its metrics are of other weights
    tokenizer = tokenizer_from_files(checkpoint["tokenizer"])
    model.settings = settings_of(tokenizer, task_from_dict(checkpoint["task"]), run["max_seq_length"], history)
    model.origin = origin_of(run, trainer["seed"], history, checkpoint["data"], checkpoint["stamp"])
    return model.eval(), tokenizer


def settings_of(tokenizer: Any, task: Task, max_seq_length: int, history: list[dict[str, Any]]) -> Any:
    """A student's settings, with the threshold that won on dev in the last epoch."""
    from dse.models import TextSettings

    threshold = winning_threshold(history[-1].get("validation", {})) if history else None
    return TextSettings(tokenizer, task, max_seq_length, threshold or DEFAULT_THRESHOLD)


def origin_of(
    run: dict[str, Any], seed: int, history: list[dict[str, Any]], data: dict[str, Any], stamp: str
) -> dict[str, Any]:
    """What a saved student tells of its training.

    Args:
        run: the flags; seed: the one that was used.
        history: the records of all epochs; those of the last one count.
        data, stamp: a checkpoint's entries.
    """
    record = history[-1] if history else {"epoch": None}
    metrics = {name: value for name, value in record.get("validation", {}).items() if math.isfinite(value)}
    commands = [*data["commands"], ["dse_train_runner.py", {**run, "random_seed": seed}]]
    return {
        "epoch": record["epoch"], "metrics": metrics, "commands": commands, "logits_sha256": data["logits"],
        "stamp": stamp,
    }  # fmt: skip


def told_by(folder: Path) -> dict[str, Any]:
    """What a student's folder tells of its training (`origin_of`); {} for another folder, or one that tells nothing."""
    try:
        return read_config(folder).get("origin") or {}
    except InputError:
        return {}


def best_folders(run: Path) -> list[Path]:
    """Where the best epoch's student may be in a run's folder; what is there may be something else (`told_by`)."""
    return [run / BEST, *(path for path in run.glob(f"{BEST}_epoch_*") if path.name.rpartition("_")[2].isdecimal())]


def save_best(model: Any, run: Path) -> None:
    """Write the best epoch's student into a run's folder, as `best`, or as `best_epoch_<n>` where that cannot be.

    That is so where others' files are in `best`, or another student. What this run wrote of earlier epochs goes.
    """
    origin = model.origin
    for place in (run / BEST, run / f"{BEST}_epoch_{origin['epoch']}"):
        told = told_by(place)
        # What was written before there were stamps is this run's if the same command wrote it.
        key = "stamp" if "stamp" in told else "commands"
        if (place / CONFIG).exists() and told.get(key) != origin[key]:
            logger.warning("%s holds another run's student and stays: the best epoch goes elsewhere", place)
            continue
        try:
            model.save_pretrained(place)
        except (InputError, RunError) as error:
            logger.warning("the best epoch so far, %d, goes elsewhere: %s", origin["epoch"], error)
            continue
        remove_older_best(run, place, origin["stamp"])
        logger.info("best epoch so far, %d: %s", origin["epoch"], place)
        return


def mend_best(run: Path, checkpoint: Path, epoch: int, stamp: str) -> None:
    """Write `best` where it is missing, of another epoch or run, as after a stop or with others' checkpoints.

    Args:
        checkpoint: of the best epoch; where it is gone, nothing is written.
        epoch, stamp: of the best epoch, and of the run.
    """
    for place in best_folders(run):
        told = told_by(place)
        if (told.get("epoch"), told.get("stamp")) == (epoch, stamp):
            remove_older_best(run, place, stamp)
            return
    if checkpoint.is_file():
        save_best(student_from_checkpoint(load_checkpoint(checkpoint))[0], run)


def remove_older_best(run: Path, newest: Path, stamp: str) -> None:
    """Remove a run's students of earlier epochs that could not be replaced, so that none is taken for the best."""
    for place in best_folders(run):
        if place != newest and told_by(place).get("stamp") == stamp:
            with contextlib.suppress(OSError):
                for name in (*STUDENT_FILES, CONFIG):  # without which it is not a student's folder
                    (place / name).unlink(missing_ok=True)
                place.rmdir()  # unless others' files are in it


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


def stamp_in(path: Path) -> str | None:
    """The start of the run that wrote a checkpoint, whose tensors are not read; None where it does not tell."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)["stamp"]
    except Exception:  # it raises many kinds for a spoiled or foreign file
        return None


def take_over(path: Path, checkpoint: dict[str, Any], experiment: str) -> States:
    """The states of the run in a checkpoint's folder. Raises InputError where a later one than it lies there."""
    states = States(path.parent, experiment, mine=lambda other: stamp_in(other) == checkpoint["stamp"])
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

    None where there is none at all. Raises InputError for runs that are spoiled or that `check` refuses, with what it
    says of the newest. What is left of runs that were killed before their first state was whole goes.
    """
    found, refusal = None, None
    name = re.compile(re.escape(experiment) + r"_\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d")
    for folder in sorted((f for f in parent.glob("*") if name.fullmatch(f.name)), reverse=True):
        states = States(folder, experiment, own=True)
        if not states.files:
            with contextlib.suppress(OSError):  # there is something in it
                remove_stale_parts(folder, "*", 0.0)
                folder.rmdir()
        elif found is None:
            try:
                path, checkpoint = states.newest(load_checkpoint)
            except InputError as error:
                logger.warning("%s: none of its states can be read; looking for another run of %s", folder, experiment)
                refusal = refusal or error
                continue
            try:
                check(checkpoint)
            except InputError as error:
                refusal = refusal or InputError(f"--resume: {path}: {error}; leave --resume out for a new run")
                continue
            of_it = (checkpoint["stamp"], None)  # None: spoiled
            states.files = {at: other for at, other in states.files.items() if stamp_in(other) in of_it}
            found = states, path, checkpoint
    if found is None and refusal is not None:
        raise refusal
    return found
