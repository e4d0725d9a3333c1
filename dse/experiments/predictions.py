"""Outputs of a trained teacher or student, told apart by its folder, on the rows of a task; GLUE's files of them.

Outputs are a student's whoever gives them: in binary tasks one logit of "positive" (of a teacher's two, the
difference), else a logit per label, or a score. Teachers are packed on CPU, and students embed each text once.

A file for GLUE's leaderboard is a TSV of that task's fixed name with the header `index`, `prediction`, a line per row
of the test file in its order, counted from 0, and the label by name, or a score from 0 to 5.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dse.data.features import joint_features, separate_features
from dse.data.processors import Examples
from dse.data.tasks import DEFAULT_THRESHOLD, REGRESSION, Task
from dse.data.tokenizers import load_tokenizer, saved_casing
from dse.models import DSESiameseClassifier
from dse.networks.batches import Batches, padding_for
from dse.networks.inference import infer, infer_pairs
from dse.networks.pretrained import bert_config, find_bert, read_training
from dse.networks.teacher import load_teacher
from dse.storage.student_folder import FORMAT as STUDENT_FORMAT
from dse.system.errors import InputError
from dse.system.files import read_json, write_text
from dse.training.kinds import kind_of

logger = logging.getLogger(__name__)

Scorer = Callable[[Examples], np.ndarray]  # rows to outputs (n, 1) or (n, labels), float32
STS_RANGE = 0.0, 5.0
MAX_SEQ_LENGTH = 128  # finetune_bert.py's default, of a teacher that does not tell its own


def is_student(folder: Path) -> bool:
    """Is it a student's folder, not a teacher's?"""
    config = folder / "config.json"
    return config.is_file() and read_json(config, "the model's configuration").get("format") == STUDENT_FORMAT


def load_scorer(name: str, task: Task, device: torch.device, batch_size: int = 32) -> tuple[Scorer, float]:
    """What a teacher or student in a folder says of the rows of a task, and its threshold: a student's is that of its
    training, a teacher's 0.5.

    Args:
        name: folder of a student (or its hub name), or of a teacher that finetune_bert.py made.
        task: its labels must be the model's, in the same order.
        batch_size: pairs of full length per step.

    Raises InputError for a folder that is neither, or of a task with other labels.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not is_student(folder):
        return teacher_scorer(folder, task, device, batch_size), DEFAULT_THRESHOLD
    model = DSESiameseClassifier.from_pretrained(name).to(device)
    return student_scorer(model, task, batch_size), model.threshold


def student_scorer(model: DSESiameseClassifier, task: Task, batch_size: int = 32) -> Scorer:
    """A student's outputs on a task with the labels of its own."""
    own = model.task
    if task.text_b is None:
        raise InputError(f"--task_name: {task.name} has one sentence per row, and a student scores pairs")
    if (own.kind, own.labels) != (task.kind, task.labels):
        raise InputError(
            f"--model: a student of {own.name} ({own.kind}, {list(own.labels)}), which does not "
            f"answer {task.name} ({task.kind}, {list(task.labels)})"
        )
    if own.name != task.name:
        logger.warning("a student of %s is used for %s", own.name, task.name)

    def score(rows: Examples) -> np.ndarray:
        features = separate_features(task, rows, model.tokenizer, model.max_seq_length)
        batches = Batches(features, padding_for(model.device, None))
        return infer_pairs(model.network, batches, batch_size, model.device, "student")

    return score


def teacher_scorer(folder: Path, task: Task, device: torch.device, batch_size: int = 32) -> Scorer:
    """A teacher's outputs; casing and length are those of its training, where its folder tells."""
    folder = find_bert(str(folder), "--model", hub=False)
    run = (read_training(folder) or {"run": {}})["run"]
    casing = run.get("do_lower_case", saved_casing(folder, "--model"))
    positions = bert_config(folder, "--model").get("max_position_embeddings", MAX_SEQ_LENGTH)
    length = run.get("max_seq_length", min(MAX_SEQ_LENGTH, positions))
    tokenizer = load_tokenizer(folder, casing is not False, "--model")
    teacher = load_teacher(folder, task, fine_tuned=True).to(device)

    def score(rows: Examples) -> np.ndarray:
        batches = Batches(joint_features(task, rows, tokenizer, length), padding_for(device, None))
        logits = infer(teacher, batches, batch_size, device, "teacher")
        return kind_of(task).targets(torch.from_numpy(logits)).numpy()

    return score


def answers(task: Task, outputs: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> list[str]:
    """The outputs as GLUE wants them: names of labels, or a score with three decimals (of STS-B within 0 to 5).

    Args:
        threshold: binary: positive above this probability, strictly.

    Raises InputError for NaN or infinite outputs, of a model whose training diverged: the leaderboard takes no NaN,
    and a label made of one would mean nothing.

    >>> from dse.data.tasks import TASKS
    >>> answers(TASKS["rte"], np.array([[-0.1], [0.1]], np.float32))
    ['entailment', 'not_entailment']
    >>> answers(TASKS["sts-b"], np.array([[5.7], [2.34567]], np.float32))
    ['5.000', '2.346']
    """
    if not np.isfinite(outputs).all():
        raise InputError(f"--model: gives NaN or infinite outputs on {task.name}; train it again, slower")
    if task.kind == REGRESSION:
        scores = np.clip(outputs[:, 0], *STS_RANGE) if task.name == "sts-b" else outputs[:, 0]
        return [f"{score + 0.0:.3f}" for score in scores]  # of -0.0 too
    return [task.labels[place] for place in kind_of(task).decisions(outputs, threshold)]


def write_answers(path: Path, predictions: Sequence[str]) -> None:
    """Write a file for the leaderboard, whole."""
    lines = ["index\tprediction", *(f"{row}\t{prediction}" for row, prediction in enumerate(predictions))]
    write_text(path, "\n".join(lines) + "\n")
