"""A student's training in a folder of its own: checkpoints and states, the best epoch's student, when to stop.

<checkpoint_dir>/<experiment>_<stamp>/    checkpoints and states (storage/states.py), and `best`, a student's folder
"""

import contextlib
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.data.tasks import Task, task_to_dict, winning_threshold
from dse.data.tokenizers import tokenizer_from_files, tokenizer_to_files
from dse.networks.config import DSEConfig
from dse.storage.checkpoint import Checkpoint, stamp_in
from dse.storage.states import Position, States
from dse.storage.student_folder import mend_best, save_best
from dse.system import parallel
from dse.system.errors import InputError
from dse.system.files import disk_errors, remove_stale_parts, utc_stamp
from dse.training.kinds import kind_of
from dse.training.reporting import Record, append_json_line, format_metrics, plot_metrics
from dse.training.run import Identity, Run, encoder_now
from dse.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass
class RunStart:
    """What a student's run starts from: the pre-trained encoder, or a state of the run."""

    tokenizer: Any
    config: DSEConfig
    stamp: str  # names the run's folders
    bert_folder: Path | None = None  # of a new run
    states: States | None = None  # of one that goes on, with its state
    path: Path | None = None
    checkpoint: Checkpoint | None = None
    epochs: int | None = None  # --epochs of the run that wrote the state


def start_from(path: Path, checkpoint: Checkpoint, states: States) -> RunStart:
    """Go on from a checkpoint or state; warns where the best checkpoint so far is not beside it."""
    best = checkpoint.best
    if best is not None and not states.files.setdefault((best["epoch"] + 1, 0), path.parent / best["file"]).is_file():
        logger.warning("the best checkpoint so far, %s, is not beside %s", best["file"], path)
    tokenizer, config = tokenizer_from_files(checkpoint.tokenizer), DSEConfig.from_dict(checkpoint.architecture)
    return RunStart(
        tokenizer, config, checkpoint.stamp, None, states, path, checkpoint, epochs=checkpoint.run["epochs"]
    )


def check_same(checkpoint: Checkpoint, now: Identity) -> None:
    """Raise InputError, naming both values, for anything but --epochs that would make another run of this one."""
    data = checkpoint.data
    then = Identity(checkpoint.task, checkpoint.run, data["files"], data.get("bert"), data["logits"])
    now.bert = then.bert
    now.check(then, free="epochs")
    now.bert = encoder_now(now.flags["bert_model"], then)
    now.check(then, free="epochs")


def take_over(path: Path, experiment: str, now: Identity) -> RunStart:
    """Go on from a checkpoint. Raises InputError for one of another run, or where a later one lies beside it."""
    checkpoint = Checkpoint.read(path)
    check_same(checkpoint, now)
    states = States(path.parent, experiment, mine=lambda other: stamp_in(other) == checkpoint.stamp)
    newest, position = max(states.files, default=None), _position_in(checkpoint)
    if newest is not None and newest > position:
        raise InputError(
            f"--trainer_checkpoint: {path} is not the newest, {states.files[newest]} is: go on from that one, "
            "or move it away"
        )
    states.files[position] = path
    return start_from(path, checkpoint, states)


def _position_in(checkpoint: Checkpoint) -> Position:
    partial = checkpoint.trainer["partial"]
    return len(checkpoint.trainer["history"]), 0 if partial is None else partial["updates"]


def find_run(parent: Path, experiment: str, now: Identity) -> RunStart | None:
    """Go on from the newest whole state of the newest run of an experiment below `parent` that is this one.

    None where there is none at all. Raises InputError for runs that are spoiled or other ones, with what is wrong with
    the newest. What is left of runs that were killed before their first state was whole goes.
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
                path, checkpoint = states.newest(Checkpoint.read)
            except InputError as error:
                logger.warning("%s: none of its states can be read; looking for another run of %s", folder, experiment)
                refusal = refusal or error
                continue
            try:
                check_same(checkpoint, now)
            except InputError as error:
                refusal = refusal or InputError(f"--resume: {path}: {error}; leave --resume out for a new run")
                continue
            of_it = (checkpoint.stamp, None)  # None: spoiled
            states.files = {at: other for at, other in states.files.items() if stamp_in(other) in of_it}
            found = start_from(path, checkpoint, states)
    if found is None and refusal is not None:
        raise refusal
    return found


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


class StudentRun(Run):
    """A student's training.

    Args:
        start: where it begins.
        task: of the student.
        flags: of the run, by name, as its checkpoints remember them.
        data: hashes of what it is made from, as a checkpoint stores them.
        log_file: beside which a JSON line per epoch goes.
    """

    def __init__(
        self, start: RunStart, task: Task, flags: dict[str, Any], data: dict[str, Any], log_file: Path | None
    ) -> None:
        found, start.checkpoint = start.checkpoint and vars(start.checkpoint), None
        super().__init__(start.states, start.path, found)
        self.start, self.task, self.flags, self.data, self.log_file = start, task, flags, data, log_file
        self.stored = bool(flags["store_checkpoints"])

    def train(self, trainer: Trainer, validate: Callable[[], dict[str, float]], save_every: int | None) -> None:
        """Train to the end of --epochs, or of --patience, keeping states."""
        flags, start = self.flags, self.start
        if self.states is None:
            folder = Path(flags["checkpoint_dir"])  # of the first process, which alone writes in its own below it
            if parallel.is_first():
                folder, start.stamp = new_run_folder(folder, flags["experiment_name"], start.stamp)
            self.states = States(folder, flags["experiment_name"], own=True)
        self.files = {"tokenizer": tokenizer_to_files(start.tokenizer), "task": task_to_dict(self.task, ranks=True)}
        done = len(trainer.history) >= flags["epochs"]
        ended = out_of_patience(self.task, trainer.history, flags["patience"])
        if ended:
            logger.warning("nothing to train: the run had stopped early, out of --patience %d", flags["patience"])
        elif done:
            logger.warning(
                "nothing to train: %d epochs are done, --epochs is %d", len(trainer.history), flags["epochs"]
            )
        else:
            trainer.fit(flags["epochs"], validate, flags["validate_every"], self, save_every)
        if ended or not done or flags["epochs"] == start.epochs:  # else more may be wanted again: what is there stays
            self.finish()
        best = self.best_epoch()
        if best is not None and parallel.is_first():
            checkpoint = self.states.files[best + 1, 0]
            mend_best(self.states.folder, best, start.stamp, checkpoint)

    def best_epoch(self) -> int | None:
        """The best epoch so far, where checkpoints are kept."""
        return best_epoch(self.task, self.trainer.history) if self.stored else None

    def entries(self, name: str = "") -> dict[str, Any]:
        """All that a state holds now, or a checkpoint under that file name."""
        trainer, epoch, best = self.trainer, self.best_epoch(), None
        if epoch is not None:
            newest = epoch + 1 == len(trainer.history) and name
            threshold = winning_threshold(best_record(self.task, trainer.history)["validation"])
            best = {"epoch": epoch, "file": newest or self.states.files[epoch + 1, 0].name, "threshold": threshold}
        checkpoint = Checkpoint(
            model=trainer.model.state_dict(), architecture=trainer.model.config.to_dict(), data=self.data,
            run=self.flags, trainer=trainer.state_dict(), stamp=self.start.stamp, best=best, **self.files,
        )  # fmt: skip
        return vars(checkpoint)

    def after_epoch(self, record: Record) -> bool:
        """Checkpoint or state, the best epoch's student, JSON line, plots; True ends the training early."""
        history, flags, best = self.trainer.history, self.flags, self.best_epoch()
        names = [score(self.task, each)[0] for each in history if "validation" in each]
        if names.count("loss") == 1 and names[-1] == "loss":  # once in a run
            logger.warning("the correlation on dev is undefined, as all scores or all outputs are the same: the loss "
                           "ranks such epochs")  # fmt: skip
        if self.stored and "validation" in record:
            name, value = score(self.task, record)
            file = f"{flags['experiment_name']}_{utc_stamp()}_{name}_{value:.3f}_epoch_{record['epoch']}.pt"
            entries = self.entries(file)
            self.trainer.saved = self.states.save((record["epoch"] + 1, 0), entries, file, best)
            logger.info("checkpoint %s", self.trainer.saved)
            if best == record["epoch"] and parallel.is_first():
                student = Checkpoint(**entries).student(self.trainer.model, self.start.tokenizer)
                save_best(student, self.states.folder)
        else:
            self.trainer.saved = self.save()
        if parallel.is_first():
            if self.log_file is not None:
                append_json_line(self.log_file.with_suffix(".jsonl"), record)
            if flags["plot_metrics"]:
                folder = Path(flags["plots_dir"]) / f"{flags['experiment_name']}_{self.start.stamp}"
                plot_metrics(history, folder, flags["experiment_name"])
        stop = out_of_patience(self.task, history, flags["patience"])
        if stop:
            logger.info("no better score in %d validations: stopped early", flags["patience"])
        return stop


def score(task: Task, record: Record) -> tuple[str, float]:
    """Name and value of the score that ranks checkpoints; the loss where the correlation is undefined."""
    return kind_of(task).score(record["validation"])


def best_record(task: Task, history: list[Record]) -> Record | None:
    """The validated epoch with the best score, the first of equals; None where none was validated.

    Epochs without a score rank last, by their loss.
    """

    def rank(record: Record) -> tuple[bool, float]:
        name, value = score(task, record)
        return name != "loss", -value if name == "loss" else value

    return max((record for record in history if "validation" in record), key=rank, default=None)


def best_epoch(task: Task, history: list[Record]) -> int | None:
    """The number of `best_record`."""
    record = best_record(task, history)
    return None if record is None else record["epoch"]


def out_of_patience(task: Task, history: list[Record], patience: int | None) -> bool:
    """Did `patience` validations since the best epoch bring nothing better?"""
    validated = [record["epoch"] for record in history if "validation" in record]
    if patience is None or not validated:
        return False
    return sum(epoch > best_epoch(task, history) for epoch in validated) >= patience


def report_best(task: Task, history: list[Record]) -> None:
    """Log the best epoch's score and metrics."""
    best = best_record(task, history)
    if best is None:
        return
    name, value = score(task, best)
    threshold = winning_threshold(best["validation"])
    where = "" if threshold is None else f" with threshold {threshold}"
    logger.info("best %s %.4f at epoch %d%s", name, value, best["epoch"], where)
    for part in ("train", "validation"):
        logger.info("its %s metrics: %s", part, format_metrics(best[part], threshold))
