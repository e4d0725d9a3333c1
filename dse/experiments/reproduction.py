"""The paper's comparison: a teacher, its student, two controls and Sentence-BERT, per task and seed, each done once.

    <output_dir>/mrpc_seed1/teacher.json   of a stage that is done: settings, results, hashes of inputs and files
    <output_dir>/mrpc_seed1/teacher/       what its script wrote

A stage counts as done while its record has the same settings and inputs and its files have their hashes; it is done
again when what it was made from has changed. Where the settings themselves have, the folder is refused.

    teacher, logits        finetune_bert.py, run_distillation_logits_creator.py
    dse                    dse_train_runner.py with the preset's coefficient
    labels_only            the same with coefficient 0: without teacher
    logits_only            the same with coefficient 1: without labels
    sentence_bert          baselines.py, where sentence-transformers is installed
    rates                  pairs scored per second, of teacher and students side by side

A student's checkpoints go when it is done; its best epoch stays, as a folder that loads.
"""

import importlib.util
import logging
import math
import platform
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dse import __version__
from dse.data.processors import Examples, labelled_test, read_examples
from dse.data.tasks import BINARY, REGRESSION, Task
from dse.networks.pretrained import TRAINING, bert_config, read_training
from dse.system.device import select_device
from dse.system.errors import InputError, one_line
from dse.system.files import read_json, sha256_file, utc_stamp, write_json, write_text
from dse.training.reporting import format_record

logger = logging.getLogger(__name__)

Result = dict[str, Any]  # of a stage: command, metrics by split, history
FORMAT = "dse stage 1"
MAX_SEQ_LENGTH = 128
STUDENTS = {"dse": None, "labels_only": 0.0, "logits_only": 1.0}  # their coefficients; None: the preset's
STAGES = ("teacher", "logits", *STUDENTS, "sentence_bert", "rates")
OPTIONAL = ("sentence_bert",)
NEEDS = {"logits": ("teacher",), **dict.fromkeys(STUDENTS, ("logits",)), "rates": ("teacher", *STUDENTS)}
# Seconds per training pair and epoch (of the stages without epochs: per pair) for the 6-layer BERT on two cores, until
# something was timed; in proportion to layers x hidden size^2 for other encoders.
_SECONDS = {"teacher": 0.02, "logits": 0.005, "student": 0.02, "sentence_bert": 0.13, "rates": 0.01}
_MEASURED_ON = 6 * 384**2
_RATE_REPEATS = 3


@dataclass(frozen=True)
class Preset:
    """What is run: seeds by task, and the scripts' flags beyond data, model, paths and the head's last size."""

    seeds: dict[str, tuple[int, ...]]
    teacher: tuple[str, ...]
    student: tuple[str, ...]

    def flags(self, stage: str, task: Task) -> list[str]:
        """The flags of a stage's script; a control has another coefficient."""
        if stage not in STUDENTS:
            return list(self.teacher)
        coefficient = STUDENTS[stage]
        control = () if coefficient is None else ("--distillation_coeff", str(coefficient))
        return [*self.student, "--fc_dims", "512", str(task.num_student_outputs), *control]

    def epochs(self, stage: str) -> int:
        """Passes over the training pairs; stages other than trainings make one."""
        if stage == "teacher":
            return int(value_of(self.teacher, "--num_train_epochs", "3"))
        return int(value_of(self.student, "--epochs", "5")) if stage in STUDENTS else 1

    @property
    def top_layers(self) -> int:
        """Layers of the encoder that a student's pooler takes."""
        return int(value_of(self.student, "--pooler_num_top_hidden_layers", "4"))


def value_of(flags: tuple[str, ...], flag: str, default: str) -> str:
    """The value that a flag has among flags, or its default."""
    return flags[flags.index(flag) + 1] if flag in flags else default


PRESETS = {
    # BertAdam has no bias correction: its steps are 1 / sqrt(1 - 0.999^n) times Adam's, 3.2 times after 100 updates and
    # 1.7 times after 400, so that encoders want a low rate; an untrained head wants a high one; and dropout, drawn for
    # u and v apart, makes |u - v| of training another quantity than that of use (README, "What decides the quality").
    "small": Preset(
        {"mrpc": (1, 2), "sts-b": (1, 2), "snli": (1,)},
        teacher=("--learning_rate", "2e-5", "--num_train_epochs", "4", "--train_batch_size", "16"),
        student=(
            *("--lr", "3e-5", "--head_lr", "1e-3", "--dropout", "0", "--schedule_in_updates", "--epochs", "3"),
            *("--tune_positive_thresholds", *(f"{threshold / 20:g}" for threshold in range(4, 19))),
        ),
    ),
    "large": Preset(
        dict.fromkeys(("mrpc", "sts-b", "qqp", "qnli", "mnli"), (42,)),
        teacher=("--learning_rate", "2e-5", "--num_train_epochs", "3", "--gradient_accumulation_steps", "2"),
        student=("--epochs", "8"),
    ),
}


@dataclass(frozen=True)
class Encoder:
    """The pre-trained BERT that all begin with."""

    folder: Path
    hashes: dict[str, str]  # SHA-256 of its weights and configuration, and its tokenizer's key
    lower_case: bool


def has_sentence_transformers() -> bool:
    """Is a sentence-transformers installed that the baseline can use?"""
    if importlib.util.find_spec("sentence_transformers") is None:
        return False
    try:
        from sentence_transformers.sentence_transformer import losses  # noqa: F401
    except ImportError as error:
        logger.warning("sentence-transformers %s is not 6.x: %s", version("sentence-transformers"), one_line(error))
        return False
    return True


def measure(task: Task, outputs: dict[str, np.ndarray], sets: dict[str, Examples]) -> dict[str, dict[str, float]]:
    """Metrics by split of outputs in a student's form.

    Binary: accuracy and f1 of positive logits; `tuned_…` the same above the threshold that is best, for that metric,
    on dev. Multiclass: accuracy. Regression: pearson, spearman.
    """
    from dse.training.kinds import kind_of
    from dse.training.metrics import best_threshold

    labels = {split: np.array(rows.labels) for split, rows in sets.items()}
    if task.kind != BINARY:
        return {split: kind_of(task).metrics(outputs[split], labels[split]) for split in sets}
    found: dict[str, dict[str, float]] = {split: {} for split in sets}
    for name in ("f1", "accuracy"):
        chosen = best_threshold(name, outputs["dev"][:, 0], labels["dev"])
        for split in sets:
            for prefix, above in (("", 0.0), ("tuned_", chosen)):
                logits = outputs[split].astype(np.float64) - above
                found[split][prefix + name] = kind_of(task).metrics(logits, labels[split])[f"{name}_0.5"]
    return found


class Experiment:
    """The stages of a task and seed.

    Args:
        preset: its flags.
        task, seed: of this work.
        data_dir: the task's folder.
        encoder: what teacher, students and Sentence-BERT begin with.
        folder: where everything goes.
        stages: those to do, of STAGES.
    """

    def __init__(
        self,
        preset: Preset,
        task: Task,
        seed: int,
        data_dir: Path,
        encoder: Encoder,
        folder: Path,
        stages: list[str],
    ) -> None:
        self.preset, self.task, self.seed, self.encoder, self.stages = preset, task, seed, encoder, stages
        self.data_dir, self.folder = data_dir.resolve(), folder.resolve()  # however they are spelled next time
        self.train = read_examples(task, data_dir, "train")
        test = labelled_test(task, data_dir)
        self.sets = {"dev": read_examples(task, data_dir, "dev"), **({} if test is None else {"test": test})}
        others = [read_examples(task, data_dir, split).files for split, _ in task.also_validate]
        self.data = sum(others, self.train.files + self.sets["dev"].files)  # what the scripts read

    # What is done

    def settings(self, stage: str) -> dict[str, Any]:
        """All that the user chose and that decides what a stage gives: flags, data, encoder."""
        about = {"task": self.task.name, "seed": self.seed, "data": self.data, "bert": self.encoder.hashes,
                 "do_lower_case": self.encoder.lower_case}  # fmt: skip
        if stage == "sentence_bert":
            from dse.experiments.baselines import SETTINGS

            return {**about, **SETTINGS}
        return {**about, "flags": self.preset.flags(stage, self.task)}

    def record(self, stage: str) -> dict[str, Any] | None:
        """What is known of a stage that was done."""
        return read_record(self.folder / f"{stage}.json")

    def inputs(self, stage: str) -> dict[str, Any]:
        """Hashes of what a stage takes from those before it, which must be done; what JSON tells of them aside."""
        return {
            name: {file: key for file, key in self.record(name)["files"].items() if not file.endswith(".json")}
            for name in NEEDS.get(stage, ())
        }

    def check_settings(self) -> None:
        """Raise InputError where a stage that is done had other settings, naming both."""
        for stage in self.stages:
            record = self.record(stage)
            if record is None:
                continue
            for key, value in self.settings(stage).items():
                there = record["settings"].get(key)
                if there != value:
                    raise InputError(
                        f"--output_dir: {self.folder / stage} was made with {key} {there}, and now it is {value}; "
                        "name another --output_dir, or remove what is there"
                    )
            unmeasured = set(self.sets) - set(record.get("metrics", self.sets))
            if unmeasured:
                logger.warning("%s was done before the labels of %s were there", self.folder / stage, *unmeasured)

    def left(self) -> list[str]:
        """The stages that are not done, or were made from something else than what is there, in order."""
        left: list[str] = []
        for stage in self.stages:
            record = self.record(stage)
            fresh = record is not None and not set(NEEDS.get(stage, ())) & set(left)
            if not (fresh and record["inputs"] == self.inputs(stage) and self._is_whole(record)):
                left.append(stage)
        return left

    def _is_whole(self, record: dict[str, Any]) -> bool:
        files = [(self.folder / name, expected) for name, expected in record["files"].items()]
        return all(path.is_file() and sha256_file(path) == expected for path, expected in files)

    def expected_seconds(self, stage: str) -> float:
        """How long a stage takes on the machine of _SECONDS."""
        bert = bert_config(self.encoder.folder, "--bert_model")
        size = bert["num_hidden_layers"] * bert["hidden_size"] ** 2 / _MEASURED_ON
        each = _SECONDS["student" if stage in STUDENTS else stage]
        return each * len(self.train) * self.preset.epochs(stage) * size

    # Doing it

    def do(self, stage: str) -> None:
        """Do a stage, going on where it was stopped, and write its record."""
        record, place, spent = (self.folder / f"{stage}{end}" for end in (".json", "", ".seconds"))
        if record.exists():
            logger.warning("%s is made again: its files, or what it was made from, have changed", place)
            if place.exists():
                shutil.rmtree(place)
            record.unlink()  # last: while it is there, a stop in between begins here again
        inputs, started = self.inputs(stage), time.monotonic()
        before = float(spent.read_text()) if spent.is_file() else 0.0
        try:
            result, files = self._student(stage) if stage in STUDENTS else getattr(self, f"_{stage}")()
        except BaseException:
            write_text(spent, str(before + time.monotonic() - started))
            raise
        about = {
            "format": FORMAT, "stage": stage, "finished": utc_stamp(), "seconds": before + time.monotonic() - started,
            **result, "settings": self.settings(stage), "versions": versions(stage), "inputs": inputs,
            "files": {str(path.relative_to(self.folder)): sha256_file(path) for path in files},
        }  # fmt: skip
        write_json(record, about)
        spent.unlink(missing_ok=True)
        self.tidy(stage)

    def tidy(self, stage: str) -> None:
        """Remove the states of a stage that is done, which nothing needs any more."""
        for state in (self.folder / stage).glob("*.pt" if stage == "sentence_bert" else "*/*.pt"):
            state.unlink()

    def _flags(self) -> list[str]:
        casing = ["--do_lower_case"] if self.encoder.lower_case else []
        return ["--task_name", self.task.name, "--data_dir", str(self.data_dir), *casing,
                "--max_seq_length", str(MAX_SEQ_LENGTH)]  # fmt: skip

    def _teacher(self) -> tuple[Result, list[Path]]:
        import finetune_bert

        folder = self.folder / "teacher"
        command = call(
            finetune_bert, *self._flags(), "--bert_model", self.encoder.folder, "--output_dir", folder, "--do_train",
            "--do_eval", "--seed", self.seed, *self.preset.flags("teacher", self.task), "--resume",
        )  # fmt: skip
        training = read_training(folder)
        result = {"command": command, "history": training["history"], "metrics": self._measure(folder)}
        return result, [folder / name for name in (*training["sha256"], TRAINING)]

    def _logits(self) -> tuple[Result, list[Path]]:
        import run_distillation_logits_creator

        folder = self.folder / "logits"
        command = call(
            run_distillation_logits_creator, *self._flags(), "--train_features_path", folder / "features",
            "--bert_checkpoint_dir", self.folder / "teacher", "--output_dir", folder,
        )  # fmt: skip
        (folder / "features").unlink()
        return {"command": command}, [folder / f"teacher_logits.{end}" for end in ("pt", "json")]

    def _student(self, stage: str) -> tuple[Result, list[Path]]:
        import dse_train_runner
        from dse.storage.checkpoint import Checkpoint
        from dse.storage.student_folder import read_config

        command = call(
            dse_train_runner, *self._flags(), "--bert_model", self.encoder.folder, "--random_seed", self.seed,
            "--distillation_logits_path", self.folder / "logits" / "teacher_logits.pt",
            *self.preset.flags(stage, self.task),
            "--experiment_name", stage, "--checkpoint_dir", self.folder / stage, "--store_checkpoints", "--resume",
        )  # fmt: skip
        folder = self.model_folder(stage)
        newest = max(folder.parent.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
        result = {
            "command": command, "history": Checkpoint.read(newest).trainer["history"],
            "metrics": self._measure(folder), "best_epoch": read_config(folder)["origin"]["epoch"],
        }  # fmt: skip
        return result, sorted(path for path in folder.iterdir() if path.name != "README.md")

    def _sentence_bert(self) -> tuple[Result, list[Path]]:
        from dse.experiments.baselines import EPOCHS, SentenceBert

        baseline = SentenceBert(self.encoder.folder, self.task, MAX_SEQ_LENGTH, self.seed, select_device(False, 0))
        baseline.prepare(len(self.train))
        state = self.folder / "sentence_bert" / "state.pt"
        history: list[dict[str, Any]] = baseline.load(state) if state.is_file() else []
        for epoch in range(len(history), EPOCHS):
            started = time.monotonic()
            loss = baseline.train_epoch(self.train, epoch)
            metrics = measure(self.task, {split: baseline.score(rows) for split, rows in self.sets.items()}, self.sets)
            if self.task.kind == BINARY:  # a cosine above 0 means nothing
                metrics = {split: {n: v for n, v in found.items() if "tuned_" in n} for split, found in metrics.items()}
            history.append({"epoch": epoch, "train": {"loss": loss}, "metrics": metrics, "validation": metrics["dev"],
                            "rate": baseline.rate, "seconds": time.monotonic() - started})  # fmt: skip
            baseline.save(state, history)
            logger.info("Sentence-BERT, epoch %d of 0 to %d: %s", epoch, EPOCHS - 1, format_record(history[-1]))
        # As a student's: the epoch with the best f1, accuracy or Pearson on dev, the first of equals.
        name = {BINARY: "tuned_f1", REGRESSION: "pearson"}.get(self.task.kind, "accuracy")
        best = max(
            history, key=lambda each: -math.inf if math.isnan(each["validation"][name]) else each["validation"][name]
        )
        return {"history": history, "best_epoch": best["epoch"], "metrics": best["metrics"]}, []

    def _rates(self) -> tuple[Result, list[Path]]:
        """Pairs scored per second on dev: a teacher reads each pair, a student's head takes stored embeddings."""
        from dse.experiments.predictions import load_scorer

        rows, rates, device = self.sets["dev"], {}, select_device(False, 0)
        variants = {"teacher": load_scorer(str(self.model_folder("teacher")), self.task, device)[0]}
        variants |= {stage: stored_scorer(self.model_folder(stage), rows, device) for stage in STUDENTS}
        for _ in range(_RATE_REPEATS):
            for stage, score in variants.items():
                started = time.perf_counter()
                score(rows)
                rate = len(rows) / (time.perf_counter() - started)
                rates[stage] = max(rates.get(stage, 0.0), rate)
        return {"pairs_per_second": rates}, []

    def model_folder(self, stage: str) -> Path:
        """The teacher's folder, or a student's best epoch."""
        if stage == "teacher":
            return self.folder / stage
        from dse.storage.student_folder import best_folders, told_by

        for run in sorted(self.folder.glob(f"{stage}/{stage}_*"), reverse=True):
            found = {told_by(path).get("epoch"): path for path in best_folders(run)}
            if epochs := found.keys() - {None}:
                return found[max(epochs)]  # of `best` and, where it could not be replaced, those beside it
        raise InputError(f"--output_dir: {self.folder / stage} holds no student; remove the folder")

    def _measure(self, folder: Path) -> dict[str, dict[str, float]]:
        from dse.experiments.predictions import load_scorer

        score, _ = load_scorer(str(folder), self.task, select_device(False, 0))
        return measure(self.task, {split: score(rows) for split, rows in self.sets.items()}, self.sets)


def seconds_left(works: list[Experiment], left: list[tuple[Experiment, str]]) -> float:
    """An estimate for the stages that are left, from what those that were done took here."""
    done = [(work, stage, record) for work in works for stage in work.stages if (record := work.record(stage))]
    expected = sum(work.expected_seconds(stage) for work, stage, _ in done)
    pace = sum(record["seconds"] for *_, record in done) / expected if done else 1.0
    return pace * sum(work.expected_seconds(stage) for work, stage in left)


def call(script: Any, *flags: object) -> list[str]:
    """Run a script; the command line. Raises InputError, naming the script, for what it refuses."""
    argv = [str(flag) for flag in flags]
    logger.info("python %s %s", script.PROG, shlex.join(argv))
    try:
        script.run(script.parse_arguments(argv))
    except InputError as error:
        raise InputError(f"{script.PROG}, of its own flags: {error}") from error
    return [script.PROG, *argv]


def stored_scorer(folder: Path, rows: Examples, device: Any) -> Callable[[Examples], Any]:
    """A student's head on embeddings of the rows that are stored already."""
    from dse.models import DSESiameseClassifier
    from dse.networks.inference import score_stored

    model = DSESiameseClassifier.from_pretrained(folder).to(device)
    embeddings, places = model.encode([*rows.first, *rows.second]), np.arange(2 * len(rows))
    return lambda _: score_stored(model.network, embeddings, places[: len(rows)], places[len(rows) :], device)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record of a stage; None where there is none."""
    if not path.is_file():
        return None
    record = read_json(path, "the record of a stage")
    if record.get("format") != FORMAT:
        raise InputError(f"{path}: no record that this version reads; name another --output_dir, or move it away")
    return record


def versions(stage: str) -> dict[str, str]:
    """Of what computed a stage."""
    packages = ["torch", "transformers", *(["sentence-transformers"] if stage == "sentence_bert" else [])]
    return {"python": platform.python_version(), "dse": __version__, **{name: version(name) for name in packages}}


def headline(task: Task, tuned: bool = False) -> str:
    """The metric that degradation is measured on: f1 for mrpc and qqp, Pearson for regressions, else accuracy.

    Args:
        tuned: the one above the threshold chosen on dev, where there is one.
    """
    if task.kind == REGRESSION:
        return "pearson"
    name = "f1" if "f1" in task.metrics else "accuracy"
    return f"tuned_{name}" if tuned and task.kind == BINARY else name
