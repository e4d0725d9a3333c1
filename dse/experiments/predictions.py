"""Outputs of a trained teacher or student, told apart by its folder, on a task's rows; its answers in GLUE's words.

Outputs have a student's form: in binary tasks one logit of "positive" (for a teacher, the difference of its two), else
a logit per label, or a score.
"""

import logging
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dse.data.features import joint_features, separate_features
from dse.data.processors import Examples
from dse.data.tasks import (
    DEFAULT_THRESHOLD,
    MULTICLASS,
    REGRESSION,
    Task,
    check_sentence_pairs,
    ranked_label,
    task_from_dict,
)
from dse.data.tokenizers import load_tokenizer, saved_casing
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier, Hit, rank_scores
from dse.networks.batches import Batches
from dse.networks.config import MAX_SEQ_LENGTH
from dse.networks.inference import infer, infer_pairs
from dse.networks.pretrained import bert_config, find_bert, read_training
from dse.networks.teacher import load_teacher
from dse.storage.student_folder import FORMAT as STUDENT_FORMAT
from dse.storage.student_folder import find_student, read_student
from dse.system.errors import InputError
from dse.system.files import read_json
from dse.training.kinds import correlations, kind_of, sigmoid

logger = logging.getLogger(__name__)

Scorer = Callable[[Examples], np.ndarray]  # rows to outputs (n, 1) or (n, labels), float32
Ranker = Callable[[list[str], np.ndarray], torch.Tensor]  # texts, places of n queries to (n, texts), high for partners
MOST_QUERIES = 400


def load_scorer(
    name: str, task: Task, device: torch.device, batch_size: int = 32, precision: str = "auto", flag: str = "--model"
) -> tuple[Scorer, float]:
    """A model's outputs on the rows of a task, and its threshold: of a student that of its training, of a teacher 0.5.

    `name` is a student as `read_student` takes it, or the folder of a teacher that finetune_bert.py made. A step has
    `batch_size` pairs of full length. Raises InputError for a folder that is neither, and for other labels.
    """
    folder = find_student(name)
    config = folder / "config.json"
    entries = read_json(config, "the model's configuration") if config.is_file() else {}
    if folder.is_dir() and entries.get("format") != STUDENT_FORMAT:
        return teacher_scorer(folder, task, device, batch_size, precision, flag), DEFAULT_THRESHOLD
    model = DSESiameseClassifier.from_pretrained(name).to(device)
    model.network.precision = precision
    return student_scorer(model, task, batch_size, flag), model.threshold


def student_scorer(model: DSESiameseClassifier, task: Task, batch_size: int = 32, flag: str = "--model") -> Scorer:
    """A student's outputs on a task, which must have the labels of the student's own."""
    own = model.task
    check_sentence_pairs(task)
    if (own.kind, own.labels) != (task.kind, task.labels):
        found, wanted = (f"{it.name} ({it.kind}, {list(it.labels)})" for it in (own, task))
        raise InputError(f"{flag}: this is a student of {found}; it cannot answer {wanted}")
    if own.name != task.name:
        logger.warning("a student of %s is used for %s", own.name, task.name)

    def score(rows: Examples) -> np.ndarray:
        features = separate_features(task, rows, model.tokenizer, model.max_seq_length)
        batches = Batches(features, "packed")
        return _checked(infer_pairs(model.network, batches, batch_size, model.device, "student"), task, flag)

    return score


def _checked(outputs: np.ndarray, task: Task, flag: str) -> np.ndarray:
    """The outputs. Raises InputError if some are NaN or infinite, as those of a model whose training diverged."""
    if not np.isfinite(outputs).all():
        raise InputError(f"{flag}: its outputs on {task.name} are NaN or infinite; train it again at a lower rate")
    return outputs


def teacher_scorer(
    name: str | Path, task: Task, device: torch.device, batch_size: int = 32, precision: str = "auto",
    flag: str = "--model", hub: bool = False,
) -> Scorer:  # fmt: skip
    """A teacher's outputs; casing and length are those of its training, if its folder records them."""
    folder = find_bert(str(name), flag, hub=hub)
    run = (read_training(folder) or {"run": {}})["run"]
    casing = run.get("do_lower_case", saved_casing(folder, flag))
    positions = bert_config(folder, flag).get("max_position_embeddings", MAX_SEQ_LENGTH)
    length = run.get("max_seq_length", min(MAX_SEQ_LENGTH, positions))
    tokenizer = load_tokenizer(folder, casing is not False, flag)
    teacher = load_teacher(folder, task, fine_tuned=True).to(device)
    teacher.precision = precision

    def score(rows: Examples) -> np.ndarray:
        batches = Batches(joint_features(task, rows, tokenizer, length), "packed")
        logits = _checked(infer(teacher, batches, batch_size, device, "teacher"), task, flag)
        return kind_of(task).targets(torch.from_numpy(logits)).numpy()

    return score


def rerank(task: Task, score: Scorer, query: str, hits: list[Hit], label: str | None) -> list[Hit]:
    """The hits of a query in the order of a teacher's scores, which take the place of the student's."""
    if not hits:
        return []
    outputs = score(Examples([query] * len(hits), [hit.text for hit in hits]))
    scores = rank_scores(torch.from_numpy(outputs), task, label)
    order = scores.argsort(descending=True, stable=True).tolist()
    return [hits[place]._replace(score=float(scores[place])) for place in order]


def find_partners(task: Task, rows: Examples, rank: Ranker) -> dict[str, float]:
    """How well a model finds the true partner of a text among all distinct texts of a split; {} without true partners.

    Partners are the texts of a positive pair: one with the label that ranks, or a score in the top tenth of the scale.
    Each of the first MOST_QUERIES positive pairs asks once, with its first text, and is found at the rank of its
    second. The query itself and other texts that positive pairs link to it, directly or through others, are left out; a
    rank counts half of the texts that score the same. `mrr` is the mean of 1 / rank, `recall_at_k` the share of ranks
    up to k.
    """
    texts = list(dict.fromkeys(chain(*rows.sides)))
    place = {text: i for i, text in enumerate(texts)}
    first, second = (np.array([place[text] for text in side]) for side in rows.sides)
    positive = _positive(task, np.array(rows.labels)) & (first != second)
    if not positive.any():
        return {}
    first, second = first[positive], second[positive]
    links = coo_array((np.ones(len(first)), (first, second)), shape=(len(texts), len(texts)))
    group = torch.from_numpy(connected_components(links, directed=False)[1])
    first, second = first[:MOST_QUERIES], second[:MOST_QUERIES]
    queries, asked = np.unique(first, return_inverse=True)
    scores = rank(texts, queries).double().cpu()[asked]  # (pairs, texts)
    own = scores.gather(1, torch.from_numpy(second)[:, None])
    others = group != group[first, None]
    ranks = 1 + ((scores > own) & others).sum(1) + ((scores == own) & others).sum(1) / 2
    recalls = {f"recall_at_{k}": (ranks <= k).double().mean().item() for k in (1, 10)}
    return {"mrr": (1 / ranks.double()).mean().item(), **recalls}


def _positive(task: Task, labels: np.ndarray) -> np.ndarray:
    if task.kind != REGRESSION:
        try:
            return labels == task.labels.index(str(ranked_label(task)))
        except InputError:  # nothing says which label means a partner
            return np.zeros(len(labels), bool)
    least, most = labels.min(), labels.max()
    return (labels >= most - 0.1 * (most - least)) & (labels > least)


def rank_by_head(model: DSESiameseClassifier) -> Ranker:
    """A student's scores."""

    def rank(texts: list[str], queries: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(CandidateIndex.build(model, texts).score([texts[query] for query in queries]))

    return rank


def rank_by_cosine(embed: Callable[[list[str]], torch.Tensor]) -> Ranker:
    """Cosines of embeddings."""

    def rank(texts: list[str], queries: np.ndarray) -> torch.Tensor:
        units = torch.nn.functional.normalize(embed(texts))
        return units[queries] @ units.t()

    return rank


def answers(task: Task, outputs: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> list[str]:
    """The outputs in GLUE's words: names of labels, or scores with three decimals (STS-B's within 0 to 5).

    In a binary task, a probability strictly above the threshold is positive.

    >>> from dse.data.tasks import TASKS
    >>> answers(TASKS["rte"], np.array([[-0.1], [0.1]], np.float32))
    ['entailment', 'not_entailment']
    >>> answers(TASKS["sts-b"], np.array([[5.7], [2.34567]], np.float32))
    ['5.000', '2.346']
    """
    if task.kind == REGRESSION:
        scores = np.clip(outputs[:, 0], 0.0, 5.0) if task.name == "sts-b" else outputs[:, 0]
        return [f"{score + 0.0:.3f}" for score in scores]  # + 0.0 turns -0.0 into 0.0
    return [task.labels[place] for place in kind_of(task).decisions(outputs, threshold)]


def scores_of(task: Task, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """What a report of rows shows, (n,) each: scores and None for a regression, else log-odds and their probabilities.

    They are of the rank label in binary tasks, and of the predicted label if there are more.
    """
    z = torch.from_numpy(outputs).double()
    of_labels = [kind_of(task).rank_scores(z, place) for place in range(len(task.labels))]
    scores = (torch.stack(of_labels).amax(0) if task.kind == MULTICLASS else rank_scores(z, task)).numpy()
    return scores, None if task.kind == REGRESSION else sigmoid(scores)


def evaluate(task: Task, outputs: np.ndarray, labels: np.ndarray, threshold: float, resamples: int) -> dict[str, Any]:
    """Metrics of outputs against labels, each [value, lower, upper end of its 95 % interval], by percentile bootstrap.

    Binary: accuracy, and precision, recall and f1 of the second label; multiclass: accuracy and the mean f1 of all
    labels; also `labels`, with precision, recall, f1 and rows of each, and `confusions`, rows by label and predicted
    label. Regression: pearson, spearman, mean_squared_error. Undefined ratios are 0, and correlations NaN.
    """
    predicted = kind_of(task).decisions(outputs, threshold)
    count, rng = max(1, len(task.labels)), np.random.default_rng(0)
    cells = labels.astype(np.int64) * count + predicted.astype(np.int64)

    def measured(rows: np.ndarray | slice) -> dict[str, float]:
        if task.kind == REGRESSION:
            pearson, spearman = correlations(predicted[rows], labels[rows])
            error = float(((predicted[rows] - labels[rows]) ** 2).mean())
            return {"pearson": pearson, "spearman": spearman, "mean_squared_error": error}
        confusions = np.bincount(cells[rows], minlength=count * count).reshape(count, count)
        of_labels = _of_confusions(confusions)
        accuracy = float(confusions.trace() / confusions.sum())
        if task.kind == MULTICLASS:
            return {"accuracy": accuracy, "macro_f1": float(of_labels["f1"].mean())}
        return {"accuracy": accuracy, **{name: float(values[1]) for name, values in of_labels.items()}}

    whole = measured(slice(None))
    draws = [measured(rng.integers(len(labels), size=len(labels))) for _ in range(resamples)]
    ends = {name: np.nanpercentile([draw[name] for draw in draws], [2.5, 97.5]).tolist() for name in whole}
    found: dict[str, Any] = {"metrics": {name: [value, *ends[name]] for name, value in whole.items()}}
    if task.labels:
        confusions = np.bincount(cells, minlength=count * count).reshape(count, count)
        by_name = {**_of_confusions(confusions), "rows": confusions.sum(1)}
        found["labels"] = {
            label: {name: values[place].item() for name, values in by_name.items()}
            for place, label in enumerate(task.labels)
        }
        found["confusions"] = confusions.tolist()
    return found


def _of_confusions(confusions: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and f1 of each label, of counts by label and predicted label; 0 if undefined."""
    right = np.diag(confusions)
    of_predicted, of_label = np.maximum(confusions.sum(0), 1), np.maximum(confusions.sum(1), 1)
    both = np.maximum(confusions.sum(0) + confusions.sum(1), 1)
    return {"precision": right / of_predicted, "recall": right / of_label, "f1": 2 * right / both}


def task_of(name: str) -> Task:
    """The task of a student, or of a teacher that finetune_bert.py made. Raises InputError if nothing says it."""
    folder = find_student(name)
    if folder.is_dir() and (training := read_training(folder)) is not None:
        return task_from_dict(training["task"])
    return read_student(name).task
