"""A student's training in a folder of its own: checkpoints and states, the best epoch's student, when to stop.

<checkpoint_dir>/<experiment>_<stamp>/    checkpoints and states (storage/states.py), and `best`, a student's folder
"""

import contextlib
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dse.data.tasks import Task, task_to_dict, winning_threshold
from dse.data.tokenizers import tokenizer_from_files, tokenizer_to_files
from dse.networks.config import DSEConfig
from dse.storage.checkpoint import Checkpoint, stamp_in
from dse.storage.states import States
from dse.storage.student_folder import mend_best, save_best
from dse.system import parallel
from dse.system.errors import InputError
from dse.system.files import disk_errors, remove_stale_parts, utc_stamp
from dse.training.kinds import kind_of
from dse.training.reporting import Record, format_metrics, plot_metrics
from dse.training.run import Identity, Run, Validate

logger = logging.getLogger(__name__)
Found = tuple[Path, Checkpoint, States]  # a state to continue from, and the states of its run


def _check_same(checkpoint: Checkpoint, now: Identity) -> None:
    """Raise InputError, naming both values, for anything but --epochs that would make another run of this one."""
    data = checkpoint.data
    then = Identity(checkpoint.task, checkpoint.run, data["files"], data.get("bert"), data["logits"])
    now.check(then, free="epochs")


def take_over(path: Path, experiment: str, now: Identity) -> Found:
    """Continue from a checkpoint. Raises InputError if it is of another run, or a newer one lies beside it."""
    checkpoint = Checkpoint.read(path)
    _check_same(checkpoint, now)
    states = States(path.parent, experiment, mine=lambda other: stamp_in(other) == checkpoint.stamp)
    trainer, newest = checkpoint.trainer, max(states.files, default=(0, 0))
    position = len(trainer["history"]), (trainer["partial"] or {"updates": 0})["updates"]
    if newest > position:
        raise InputError(
            f"--trainer_checkpoint: {path} is not the newest, {states.files[newest]} is: continue from that "
            "one, or move it away"
        )
    states.files[position] = path
    return path, checkpoint, states


def find_run(parent: Path, experiment: str, now: Identity) -> Found | None:
    """Continue from the newest intact state of the newest run of an experiment below `parent` that agrees with `now`.

    None if there is no run. If all are corrupt or different, raises InputError with what is wrong with the newest.
    Removes what is left of runs that were killed before their first state was complete.
    """
    found, refusal = None, None
    pattern = re.escape(experiment) + r"_\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d"
    for folder in sorted((f for f in parent.glob("*") if re.fullmatch(pattern, f.name)), reverse=True):
        states, path = States(folder, experiment, own=True), None
        if not states.files:
            with contextlib.suppress(OSError):  # there is something in it
                remove_stale_parts(folder, "*", 0.0)
                folder.rmdir()
        elif found is None:
            try:
                path, checkpoint = states.newest(Checkpoint.read)
                _check_same(checkpoint, now)
            except InputError as error:
                if path is None:
                    what = "%s: none of its states can be read; looking for another run of %s"
                    logger.warning(what, folder, experiment)
                else:
                    error = InputError(f"--resume: {path}: {error}; leave --resume out to start a new run")
                refusal = refusal or error
                continue
            of_it = (checkpoint.stamp, None)  # None: corrupt
            states.files = {at: other for at, other in states.files.items() if stamp_in(other) in of_it}
            found = path, checkpoint, states
    if found is None and refusal is not None:
        raise refusal
    return found


def new_run_folder(parent: Path, experiment: str, stamp: str) -> tuple[Path, str]:
    """Make the folder `<experiment>_<stamp>` below `parent`, with a later stamp if it exists. Returns both."""
    while True:
        folder = parent / f"{experiment}_{stamp}"
        with disk_errors(folder):
            try:
                folder.mkdir(parents=True)
                return folder, stamp
            except FileExistsError:
                time.sleep(0.1)
                stamp = utc_stamp()


@dataclass
class StudentRun(Run):
    """A student's training."""

    task: Task
    flags: dict[str, Any]  # of the run, by name, as its checkpoints remember them
    data: dict[str, Any]  # hashes of what it is made from, as a checkpoint stores them
    tokenizer: Any
    config: DSEConfig
    stamp: str  # names the run's folders
    bert_folder: Path | None = None  # of a new run
    epochs_before: int | None = None  # --epochs of the run that wrote the state

    @classmethod
    def going_on(cls, state: Found, task: Task, flags: dict[str, Any], log_file: Path | None) -> "StudentRun":
        """The run that continues from a state. Warns if the best checkpoint so far is not beside it."""
        path, checkpoint, states = state
        best = checkpoint.best
        if best and not states.files.setdefault((best["epoch"] + 1, 0), path.parent / best["file"]).is_file():
            logger.warning("the best checkpoint so far, %s, is not beside %s", best["file"], path)
        tokenizer, config = tokenizer_from_files(checkpoint.tokenizer), DSEConfig.from_dict(checkpoint.architecture)
        run = cls(
            task, flags, checkpoint.data, tokenizer, config, checkpoint.stamp, None, checkpoint.run["epochs"],
            path=path, found=vars(checkpoint), log_file=log_file,
        )  # fmt: skip
        run.states = states
        return run

    def train(self, validate: Validate, save_every: int | None) -> None:
        """Train until --epochs or --patience is reached, and keep states."""
        flags = self.flags
        if self.path is None:
            folder, name = Path(flags["checkpoint_dir"]), flags["experiment_name"]
            if parallel.is_first():  # which alone writes
                folder, self.stamp = new_run_folder(folder, name, self.stamp)
            self.states = States(folder, name, own=True)
        self.tokenizer_files = tokenizer_to_files(self.tokenizer)
        count, ended, wanted = len(self.trainer.history), self.out_of_patience(), flags["epochs"]
        if ended:
            logger.warning("nothing to train: the run stopped early because of --patience %d", flags["patience"])
        elif count >= wanted:
            logger.warning("nothing to train: %d epochs are done, --epochs is %d", count, wanted)
        else:
            self._mend_best()  # now, as the best epoch's state may not be kept
            self.fit(wanted, validate, flags["validate_every"], save_every)
        self._mend_best()
        if ended or count < wanted or wanted == self.epochs_before:  # else more may be wanted again: all stays
            self.states.finish(self.best_epoch())

    def _mend_best(self) -> None:
        """Write the best epoch's student if a stop came before it."""
        best = self.best()
        if best is not None and parallel.is_first():
            state = self.states.files.get((best["epoch"] + 1, 0))
            with torch.random.fork_rng(devices=[]):  # a network that is made draws numbers
                mend_best(self.states.folder, best["epoch"], self.stamp, state)

    def best(self) -> Record | None:
        """The validated epoch with the best score, the first of equals; None if none was validated.

        Epochs without a score rank last, by their loss.
        """

        def rank(record: Record) -> tuple[bool, float]:
            name, value = kind_of(self.task).score(record["validation"])
            return name != "loss", -value if name == "loss" else value

        return max((record for record in self.trainer.history if "validation" in record), key=rank, default=None)

    def best_epoch(self) -> int | None:
        """The best epoch so far, whose checkpoint is kept; None if no checkpoints are."""
        best = self.best() if self.flags["store_checkpoints"] else None
        return best["epoch"] if best else None

    def out_of_patience(self) -> bool:
        """Have --patience validations since the best epoch brought no better score?"""
        patience, best = self.flags["patience"], self.best()
        if patience is None or best is None:
            return False
        return sum("validation" in record for record in self.trainer.history[best["epoch"] + 1 :]) >= patience

    def entries(self, name: str = "") -> dict[str, Any]:
        """What a state would hold now, or a checkpoint with that file name."""
        trainer, epoch, best = self.trainer, self.best_epoch(), None
        if epoch is not None:
            newest = epoch + 1 == len(trainer.history) and name
            best = {"epoch": epoch, "file": newest or self.states.files[epoch + 1, 0].name,
                    "threshold": winning_threshold(trainer.history[epoch]["validation"])}  # fmt: skip
        return vars(Checkpoint(
            model=trainer.model.state_dict(), architecture=trainer.model.config.to_dict(), data=self.data,
            tokenizer=self.tokenizer_files, task=task_to_dict(self.task, ranks=True), run=self.flags,
            trainer=trainer.state_dict(), stamp=self.stamp, best=best,
        ))  # fmt: skip

    def after_epoch(self, record: Record) -> bool:
        """Write a checkpoint or state, the best epoch's student, JSON line and plots; True ends the training early."""
        trainer, history, flags, file = self.trainer, self.trainer.history, self.flags, ""
        names = [kind_of(self.task).score(each["validation"])[0] for each in history if "validation" in each]
        if names.count("loss") == 1 and names[-1] == "loss":  # once in a run
            logger.warning("the correlation on dev is undefined, as all scores or all outputs are the same: such "
                           "epochs are ranked by their loss")  # fmt: skip
        if flags["store_checkpoints"] and "validation" in record:
            name, value = kind_of(self.task).score(record["validation"])
            file = f"{flags['experiment_name']}_{utc_stamp()}_{name}_{value:.3f}_epoch_{record['epoch']}.pt"
        entries = self.save(file)
        if "validation" in record and self.best() is record and parallel.is_first():
            self.wait()  # a student whose checkpoint or state is not there could not be mended
            save_best(Checkpoint(**entries).student(trainer.model, self.tokenizer), self.states.folder)
        super().after_epoch(record)
        if flags["plot_metrics"] and parallel.is_first():
            folder = Path(flags["plots_dir"]) / f"{flags['experiment_name']}_{self.stamp}"
            plot_metrics(history, folder, flags["experiment_name"])
        if stop := self.out_of_patience():
            logger.info("no better score in %d validations: stopped early", flags["patience"])
        return stop

    def report_best(self) -> None:
        """Log the best epoch's score and metrics."""
        best = self.best()
        if best is None:
            return
        name, value = kind_of(self.task).score(best["validation"])
        threshold = winning_threshold(best["validation"])
        where = "" if threshold is None else f" with threshold {threshold}"
        logger.info("best %s %.4f at epoch %d%s", name, value, best["epoch"], where)
        for part in ("train", "validation"):
            logger.info("its %s metrics: %s", part, format_metrics(best[part], threshold))
