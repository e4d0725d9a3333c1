"""A training that can be stopped and resumed: what identifies it, its epochs and its states."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dse.networks.pretrained import bert_hashes, find_bert
from dse.storage.states import States, snapshot
from dse.system import parallel, signals
from dse.system.errors import InputError, one_line
from dse.system.files import same_value
from dse.training.reporting import Record, append_json_line, format_record
from dse.training.trainer import EpochSoFar, Trainer

logger = logging.getLogger(__name__)
Validate = Callable[[], dict[str, float]]  # gives the metrics of the validation sets

# Flags of inputs that are compared by their content, and of places of outputs.
_PLACES = {"task_name", "bert_model", "data_dir", "distillation_logits_path", "train_features_path",
           "dev_features_path", "checkpoint_dir", "log_dir", "plots_dir", "output_dir", "cache_dir"}  # fmt: skip


@dataclass
class Identity:
    """What identifies a training: its flags, its data, and the encoder that it starts from."""

    task: dict[str, Any]  # its line (tasks.task_to_dict)
    flags: dict[str, Any]  # by name; those that are not given here may differ
    files: dict[str, Any]  # names and hashes of the data's files, by split
    bert: dict[str, str] | None = None  # hashes of the encoder's files; None: looked up when they are compared
    logits: str | None = None  # hash of the teacher's logits
    tokenizer: str | None = None  # hash

    def check(self, then: "Identity", free: str = "") -> None:
        """Raise InputError, naming both values, if an earlier run, `then`, was a different one.

        `free` is a flag that may have changed. If the earlier run did not store its encoder's hashes, names count.
        """
        for key, value in self.task.items():
            _compare("task_name", value, then.task.get(key), "" if key == "name" else key)
        excepted = f": continuing needs the same flags{f', except --{free}' if free else ''}"
        for flag, value in self.flags.items():
            added = flag not in then.flags and (value is None or value is False)  # the run is older than the flag
            if flag not in _PLACES and flag != free and not added:
                _compare(flag, value, then.flags.get(flag), "", excepted)
        for split, files in then.files.items():
            _compare("data_dir", self.files.get(split), files, f"the {split} data")
        _compare("distillation_logits_path", self.logits, then.logits, "SHA-256")
        now, before, how = self.flags["bert_model"], then.flags["bert_model"], ""
        same = same_value(now, before)
        if then.bert is not None:
            how = ", which differ in the SHA-256 of their files"
            # A hub's, or one that is gone, is taken for the run's where the name is the same.
            with contextlib.suppress(InputError) if same else contextlib.nullcontext():
                same = then.bert == (self.bert or bert_hashes(find_bert(now, "--bert_model", hub=not same)))
        if not same:
            raise InputError(f"--bert_model: {now} now, {before} in the run{how}: continuing needs the same encoder")
        if self.tokenizer != then.tokenizer:
            raise InputError("--bert_model: its tokenizer is not the one that the run started with")


def _compare(flag: str, now: Any, then: Any, what: str = "", ending: str = "") -> None:
    if not same_value(now, then):
        both = f"{what} is {now} now, and was {then}" if what else f"{now} now, {then}"
        raise InputError(f"--{flag}: {both} in the run{ending}")


@dataclass(kw_only=True)
class Run:
    """A training's epochs and its states in a folder. Subclasses say what is stored.

    A thread writes each state while training goes on (`save`, `wait`); nothing else uses `states` meanwhile.
    """

    states: States = field(init=False)  # of the folder; a new student's is made when it begins to train
    path: Path | None = None  # of the state to continue from; None: a new run
    found: dict[str, Any] | None = None  # that state's entries, of which `model` and `trainer` are used
    log_file: Path | None = None  # beside which a JSON line per epoch goes
    _writer: ThreadPoolExecutor = field(init=False, repr=False, default_factory=lambda: ThreadPoolExecutor(1))
    _write: "Future[None] | None" = field(init=False, repr=False, default=None)  # the last one, until `wait`

    def resume(self, trainer: Trainer) -> None:
        """Put the trainer where the run stands: at its start, or at the state that it continues from."""
        self.trainer = trainer
        if self.found is not None:
            try:
                trainer.model.load_state_dict(self.found["model"])
            except RuntimeError as error:
                raise InputError(f"{self.path}: its weights do not fit the model ({one_line(error)})") from error
            trainer.load_state_dict(self.found["trainer"])
            trainer.saved, self.found = self.path, None  # its tensors are not needed twice
            done = len(trainer.history), trainer.so_far.updates
            logger.info("continuing after %d epochs and %d updates of the next, from %s", *done, self.path)

    def fit(
        self, epochs: int, validate: Validate | None = None, validate_every: int = 1, save_every: int | None = None
    ) -> None:
        """Train until `epochs` epochs are done, counting those done before.

        Args:
            validate: called every `validate_every` epochs and after the last.
            save_every: updates between two states; a signal that ends the run also saves one.

        All states are on the disk when it ends, whichever way. Raises RunError for a loss that is NaN or infinite,
        before it reaches the weights, or for a state that cannot be written; Stopped after a signal.
        """
        trainer, plan = self.trainer, self.trainer.plan
        done = [len(trainer.history), trainer.so_far.updates, trainer.optimizer.updates, plan.seed, len(plan.batches)]
        parallel.agree(done, "what they continue from (epochs, updates, updates in all, seed, pairs)")

        saved = trainer.optimizer.updates  # in the last state: a step that fp16 skips makes no other

        def after_update() -> None:
            nonlocal saved
            _stop_together()
            if save_every is not None and saved != (now := trainer.optimizer.updates) and now % save_every == 0:
                saved = now
                self.save()

        with self._all_written():
            while (epoch := len(trainer.history)) < epochs:
                what = f"epoch {epoch} of 0 to {epochs - 1}"
                with signals.deferred():
                    record: Record = {"epoch": epoch, "train": trainer.train_epoch(what, after_update)}
                if validate is not None and ((epoch + 1) % validate_every == 0 or epoch + 1 == epochs):
                    started = time.monotonic()
                    # With several processes, which wait for each other in it, a signal does not cut it off.
                    with contextlib.nullcontext() if parallel.size() == 1 else signals.deferred():
                        record["validation"] = validate()
                    trainer.so_far.seconds += time.monotonic() - started
                with signals.deferred():
                    record |= {"updates": trainer.optimizer.updates, "rate": trainer.optimizer.next_rate}
                    record["seconds"] = trainer.so_far.seconds
                    trainer.history.append(record)
                    trainer.so_far = EpochSoFar()
                    logger.info("%s: %s", what, format_record(record))
                    if self.after_epoch(record):
                        return
                _stop_together()

    @contextlib.contextmanager
    def _all_written(self) -> Iterator[None]:
        """Wait for the state under way when the block ends; if a signal ended it, write the state as it is then."""
        try:
            try:
                yield
            finally:
                with signals.deferred():
                    self.wait()
            _stop_together()
        except signals.Stopped as stop:
            if not stop.anywhere:  # else an update may be half made
                with signals.deferred():
                    self.save()
                    self.wait()
                    parallel.wait_for_all()  # torchrun ends all of them soon after the first
            if self.trainer.saved is not None:
                stop.advice = f"state saved in {self.trainer.saved}; run the same command with --resume to continue"
            raise

    def entries(self, name: str = "") -> dict[str, Any]:
        """What a state would hold now, or a checkpoint with that file name."""
        raise NotImplementedError

    def best_epoch(self) -> int | None:
        """The best epoch, whose checkpoint is kept; None if there is none."""
        return None

    def save(self, name: str = "") -> dict[str, Any]:
        """Begin to write the state as it is, or a checkpoint with that file name. Returns its entries, copied.

        Waits for the write before, so that there is never more than one copy. Raises RunError as `wait` does.
        """
        trainer = self.trainer
        trainer.check_weights()
        self.wait()
        position, entries, best = (len(trainer.history), trainer.so_far.updates), self.entries(name), self.best_epoch()
        if parallel.is_first():  # which alone writes
            entries = snapshot(entries, trainer.device)

        def write() -> None:
            trainer.saved = self.states.save(position, entries, name, best)

        self._write = self._writer.submit(write)
        return entries

    def wait(self) -> None:
        """Return once the last state is complete on the disk. Raises RunError if it could not be written."""
        if self._write is not None:
            self._write.result()
            self._write = None

    def after_epoch(self, record: Record) -> bool:
        """Write what an epoch leaves behind; True ends the training."""
        if self.log_file is not None and parallel.is_first():
            append_json_line(self.log_file.with_suffix(".jsonl"), record)
        return False


def _stop_together() -> None:
    """Raise Stopped if any of the processes was asked to stop, in all of them at the same update."""
    if number := parallel.highest(signals.requested() or 0):
        raise signals.Stopped(number)
