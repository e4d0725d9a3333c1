"""Doing the stages of a reproduction; reproduction.py knows which are left.

Each runs its script, except `sentence_bert` and `encoder` (baselines.py), and `rates`, which counts the pairs that
teacher, students and cosines score per second, side by side. A finished student keeps its best epoch, as a folder that
loads, and no checkpoints.
"""

import logging
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import torch

import dse_train_runner
import finetune_bert
import run_distillation_logits_creator
from dse import __version__
from dse.data.processors import Examples, with_labels
from dse.data.tasks import BINARY, MULTICLASS, REGRESSION, Task
from dse.experiments.baselines import SentenceBert, mean_encoder
from dse.experiments.predictions import (
    Ranker,
    Scorer,
    find_partners,
    load_scorer,
    rank_by_cosine,
    rank_by_head,
    student_scorer,
)
from dse.experiments.presets import SENTENCE_BERT, STUDENTS, TEACHER, VARIANTS
from dse.experiments.reproduction import FORMAT, Experiment
from dse.models import DSESiameseClassifier
from dse.networks.inference import score_stored
from dse.networks.pretrained import TRAINING, read_training
from dse.storage.checkpoint import Checkpoint
from dse.storage.student_folder import find_student, read_config
from dse.system import signals
from dse.system.device import select_device
from dse.system.errors import InputError, RunError
from dse.system.files import sha256_file, utc_stamp, write_json, write_text
from dse.training.kinds import best_threshold, kind_of
from dse.training.reporting import format_record

logger = logging.getLogger(__name__)

Result = dict[str, Any]  # of a stage: command, metrics by split, history


def do(work: Experiment, stage: str) -> None:
    """Do a stage, going on where it was stopped, and write its record."""
    record, place, spent = (work.folder / f"{stage}{end}" for end in (".json", "", ".seconds"))
    if record.exists():
        logger.warning("%s is made again: its files, or what it was made from, have changed", place)
        if place.exists():
            shutil.rmtree(place)
        record.unlink()  # last: while it is there, a stop in between begins here again
    inputs, started = work.inputs(stage), time.monotonic()
    before = float(spent.read_text()) if spent.is_file() else 0.0
    try:
        result, files = _DO[stage](work, place)
    except BaseException:
        write_text(spent, str(before + time.monotonic() - started))
        raise
    packages = ["torch", "transformers", *(["sentence-transformers"] if stage == "sentence_bert" else [])]
    versions = {"python": platform.python_version(), "dse": __version__, **{name: version(name) for name in packages}}
    write_json(record, {
        "format": FORMAT, "stage": stage, "finished": utc_stamp(), "seconds": before + time.monotonic() - started,
        **result, "settings": work.settings(stage), "versions": versions, "inputs": inputs,
        "files": {str(path.relative_to(work.folder)): sha256_file(path) for path in files},
    })  # fmt: skip
    spent.unlink(missing_ok=True)
    tidy(work, stage)


def do_for_command(work: Experiment, stage: str, flag: str) -> None:
    """As `do`; what ends it early is told in the command's terms, since a script's advice names its own flags."""
    place, goes_on = work.folder / stage, "the same command continues with what is left"
    try:
        do(work, stage)
    except signals.Stopped as stop:
        stop.advice = f"{place} is not done: {goes_on}"
        raise
    except InputError as error:
        mend = f"move it away, and it begins anew, or name another {flag}"
        raise InputError(f"{flag}: {place} cannot be made ({error}); {mend}") from error
    except RunError as error:
        raise RunError(f"{place} is not done ({error}): {goes_on}") from error


def tidy(work: Experiment, stage: str) -> None:
    """Remove the states of a finished stage, which nothing needs any more."""
    for state in (work.folder / stage).glob("*.pt" if stage == "sentence_bert" else "*/*.pt"):
        state.unlink()


def _call(script: Any, work: Experiment, *flags: object) -> list[str]:
    """Run a script on an experiment's data and return its command line. Raises InputError where the script refuses."""
    casing = ["--do_lower_case"] if work.encoder.lower_case else []
    common = ["--task_name", work.task_name or work.task.name, "--data_dir", work.data_dir, *casing]
    argv = [*map(str, common), "--max_seq_length", str(work.preset.max_seq_length), *map(str, flags)]
    logger.info("python %s %s", script.PROG, shlex.join(argv))
    try:
        script.run(script.parse_arguments(argv))
    except InputError as error:
        raise InputError(f"{script.PROG} refuses its flags: {error}") from error
    return [script.PROG, *argv]


def _teacher(work: Experiment, folder: Path) -> tuple[Result, list[Path]]:
    command = _call(
        finetune_bert, work, "--bert_model", work.encoder.folder, "--output_dir", folder, "--do_train", "--do_eval",
        "--seed", work.seed, *work.preset.flags("teacher", work.task), "--resume",
    )  # fmt: skip
    training, (score, _) = read_training(folder) or {}, load_scorer(str(folder), work.task, select_device(False, 0))
    result = {"command": command, "history": training["history"], "metrics": measure(work.task, work.sets, score)}
    return result, [folder / name for name in (*training["sha256"], TRAINING)]


def _logits(work: Experiment, folder: Path) -> tuple[Result, list[Path]]:
    command = _call(
        run_distillation_logits_creator, work, "--train_features_path", folder / "features",
        "--bert_checkpoint_dir", work.folder / "teacher", "--output_dir", folder,
    )  # fmt: skip
    (folder / "features").unlink()
    return {"command": command}, [folder / f"teacher_logits.{end}" for end in ("pt", "json")]


def _student(work: Experiment, folder: Path) -> tuple[Result, list[Path]]:
    flags = [work.folder / "teacher" if flag == TEACHER else flag for flag in work.preset.flags(folder.name, work.task)]
    command = _call(
        dse_train_runner, work, "--bert_model", work.encoder.folder, "--random_seed", work.seed,
        "--distillation_logits_path", work.folder / "logits" / "teacher_logits.pt",
        *flags, "--experiment_name", folder.name, "--checkpoint_dir", folder, "--store_checkpoints", "--resume",
    )  # fmt: skip
    best = student_folder(work.folder, folder.name)
    newest = max(best.parent.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
    model = DSESiameseClassifier.from_pretrained(best).to(select_device(False, 0))
    metrics = measure(work.task, work.sets, student_scorer(model, work.task), rank_by_head(model))
    result = {
        "command": command, "history": Checkpoint.read(newest).trainer["history"], "metrics": metrics,
        "best_epoch": read_config(best)["origin"]["epoch"],
    }  # fmt: skip
    return result, sorted(path for path in best.iterdir() if path.name != "README.md")


def _sentence_bert(work: Experiment, folder: Path) -> tuple[Result, list[Path]]:
    """Like a student: the epoch with the best f1, accuracy or Pearson on dev counts, the first of equals."""
    epochs, state = SENTENCE_BERT["epochs"], folder / "state.pt"
    device = select_device(False, 0)
    baseline = SentenceBert(work.encoder.folder, work.task, work.preset.max_seq_length, work.seed, device)
    train = with_labels(work.train)
    baseline.prepare(len(train))
    history: list[dict[str, Any]] = baseline.load(state) if state.is_file() else []
    for epoch in range(len(history), epochs):
        started = time.monotonic()
        losses = {"loss": baseline.train_epoch(train, epoch)}
        metrics = measure(work.task, work.sets, baseline.score, rank_by_cosine(baseline.embed))
        metrics = only_tuned(work.task, metrics)
        history.append({"epoch": epoch, "train": losses, "metrics": metrics, "validation": metrics["dev"],
                        "rate": baseline.rate, "seconds": time.monotonic() - started})  # fmt: skip
        baseline.save(state, history)
        logger.info("Sentence-BERT, epoch %d of 0 to %d: %s", epoch, epochs - 1, format_record(history[-1]))
    name = {BINARY: "tuned_f1", REGRESSION: "pearson"}.get(work.task.kind, "accuracy")
    best = max(history, key=lambda record: np.nan_to_num(record["validation"][name], nan=-np.inf))
    return {"history": history, "best_epoch": best["epoch"], "metrics": best["metrics"]}, []


def _encoder(work: Experiment, folder: Path) -> tuple[Result, list[Path]]:
    """The cosines of the encoder as downloaded, before any training."""
    embed = encoder_as_downloaded(work)
    rank = rank_by_cosine(embed)
    if work.task.kind == MULTICLASS:  # a cosine does not tell classes
        return {"metrics": measure(work.task, work.sets, rank=rank)}, []

    def score(rows: Examples) -> np.ndarray:
        u, v = (embed(side) for side in rows.sides)
        return torch.cosine_similarity(u, v)[:, None].cpu().numpy()

    return {"metrics": only_tuned(work.task, measure(work.task, work.sets, score, rank))}, []


def encoder_as_downloaded(work: Experiment) -> Callable[[Iterable[str]], torch.Tensor]:
    """Texts to (texts, hidden size) means of the last layer, float32."""
    bert, length = work.encoder, work.preset.max_seq_length
    student = mean_encoder(bert.folder, bert.lower_case, work.task, length, select_device(False, 0))
    return partial(student.encode, convert_to="tensor")


def _rates(work: Experiment, folder: Path) -> tuple[Result, list[Path]]:
    """Pairs scored per second on dev: a teacher reads each pair, all others take stored embeddings.

    Sentence-BERT's cosines are of the same size as those of the encoder as downloaded, and take as long.
    """
    rows, device = work.sets["dev"], select_device(False, 0)
    first, second = np.arange(2 * len(rows)).reshape(2, -1)
    variants: dict[str, Callable[[], object]] = {}
    variants["teacher"] = partial(load_scorer(str(work.folder / "teacher"), work.task, device)[0], rows)
    for name in STUDENTS:
        model = DSESiameseClassifier.from_pretrained(student_folder(work.folder, name)).to(device)
        embeddings = model.encode(chain(*rows.sides))
        variants[name] = partial(score_stored, model.network, embeddings, first, second, device)
    if work.task.kind != MULTICLASS:
        vectors = encoder_as_downloaded(work)(chain(*rows.sides))
        variants["encoder"] = lambda: torch.cosine_similarity(vectors[first], vectors[second]).cpu()
    turns = [{name: timeit(score, number=1) for name, score in variants.items()} for _ in range(3)]
    rates = {name: len(rows) / min(turn[name] for turn in turns) for name in variants}
    if work.task.kind != MULTICLASS and "sentence_bert" in work.stages:
        rates["sentence_bert"] = rates["encoder"]
    return {"pairs_per_second": rates}, []


# How each stage is done in its folder: gives what its record says, and the files that it made.
_DO: dict[str, Callable[[Experiment, Path], tuple[Result, list[Path]]]] = {
    "teacher": _teacher, "logits": _logits, **dict.fromkeys(STUDENTS | VARIANTS, _student),
    "sentence_bert": _sentence_bert, "encoder": _encoder, "rates": _rates,
}  # fmt: skip


def student_folder(folder: Path, stage: str) -> Path:
    """The best epoch of a student, below the folder of its task and seed."""
    for run in sorted(folder.glob(f"{stage}/{stage}_*"), reverse=True):
        if (found := find_student(run)) != run:
            return found
    raise InputError(f"--output_dir: {folder / stage} holds no student; remove the folder")


def only_tuned(task: Task, metrics: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The metrics of cosines by split: in a binary task, 0 is not a threshold that means something."""
    if task.kind != BINARY:
        return metrics
    untuned = ("accuracy", "f1")
    return {split: {name: n for name, n in found.items() if name not in untuned} for split, found in metrics.items()}


def measure(
    task: Task, sets: dict[str, Examples], score: Scorer | None = None, rank: Ranker | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of what `score` says of each split's pairs, and of how `rank` finds partners (`find_partners`).

    Binary: accuracy and f1 of positive logits; `tuned_…` the same above the threshold that is best, for that metric,
    on dev. Multiclass: accuracy. Regression: pearson, spearman.
    """
    metrics = {} if score is None else _of_pairs(task, score, sets)
    finding = {} if rank is None else {split: find_partners(task, rows, rank) for split, rows in sets.items()}
    return {split: metrics.get(split, {}) | finding.get(split, {}) for split in sets}


def _of_pairs(task: Task, score: Scorer, sets: dict[str, Examples]) -> dict[str, dict[str, float]]:
    found = {split: (score(rows), np.array(rows.labels)) for split, rows in sets.items()}
    if task.kind != BINARY:
        return {split: kind_of(task).metrics(*of_split) for split, of_split in found.items()}
    outputs, labels = found["dev"]
    thresholds = {name: best_threshold(name, outputs[:, 0], labels) for name in ("f1", "accuracy")}
    return {
        split: {
            prefix + name: kind_of(task).metrics(outputs.astype(np.float64) - above, labels)[f"{name}_0.5"]
            for name, chosen in thresholds.items()
            for prefix, above in (("", 0.0), ("tuned_", chosen))
        }
        for split, (outputs, labels) in found.items()
    }
