"""Measuring sentence embeddings beyond the task that made them (the paper's claim of universal embeddings).

cosine       Pearson and Spearman of cos(u, v) with the similarity scores of STS-B's dev set; nothing is trained
probe        logistic regression on frozen embeddings, as SentEval does it: on [|u - v|, u * v] for pairs, on u for
             single sentences; cross-validation on the training set chooses the penalty
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler, normalize

from dse.data.processors import Examples, labelled_test, read_examples
from dse.data.tasks import BINARY, REGRESSION, TASKS, Task
from dse.data.tokenizers import saved_casing
from dse.experiments.baselines import mean_encoder
from dse.models import DSESiameseClassifier
from dse.system.errors import InputError
from dse.training.kinds import correlations
from dse.training.reporting import markdown_table

logger = logging.getLogger(__name__)

Embedder = Callable[[list[str]], Any]  # texts to (texts, size), an array or a sparse matrix; such as a student's encode
PENALTIES = np.logspace(-4, 1, 6)  # the regression's C, inverse strengths
FOLDS, STEPS = 5, 200
COUNTED_TWICE = ("allnli", "mnli-mm", "diagnostic")


def encoder_embedder(folder: Path, student: DSESiameseClassifier, batch_size: int = 32) -> Embedder:
    """The mean of the last layer's states of a BERT as downloaded, with its own casing; cut as the student's texts."""
    casing = saved_casing(folder, "--bert_model")
    lower_case = student.tokenizer.backend_tokenizer.normalizer.lowercase if casing is None else casing
    encoder = mean_encoder(folder, lower_case, student.task, student.max_seq_length, student.device)
    return partial(encoder.encode, batch_size=batch_size)


def bag_of_words(training_texts: list[str]) -> Embedder:
    """Counts of the words of the training texts. Raises InputError if they have none."""
    counter = CountVectorizer(token_pattern=r"(?u)\b\w+\b")
    try:
        return counter.fit(training_texts).transform
    except ValueError as error:
        where = f"--data_dir: the {len(training_texts)} training texts"
        raise InputError(f"{where} have no words to count ({error})") from error


def cosine_correlations(embed: Embedder, rows: Examples) -> dict[str, float]:
    """Pearson and Spearman of the pairs' cosines with their scores; the cosine with a zero vector is 0."""
    u, v = (normalize(embed(side)) for side in rows.sides)
    cosines = np.asarray(_product(u, v).sum(axis=1), dtype=np.float64).ravel()
    pearson, spearman = correlations(cosines, np.array(rows.labels))
    return {"pearson": pearson, "spearman": spearman}


def _product(u: Any, v: Any) -> Any:
    """The product element by element; for sparse matrices, `*` is the product of matrices."""
    return u.multiply(v) if sparse.issparse(u) else u * v


def probe_features(embed: Embedder, rows: Examples) -> Any:
    """[|u - v|, u * v] of pairs, (n, 2 * size); u of single sentences."""
    u = embed(rows.first)
    if rows.second is None:
        return u
    v = embed(rows.second)
    blocks = [abs(u - v), _product(u, v)]
    return sparse.hstack(blocks).tocsr() if sparse.issparse(u) else np.hstack(blocks)


def probe(embed: Embedder, task: Task, train: Examples, sets: dict[str, Examples]) -> dict[str, dict[str, float]]:
    """Accuracy, and f1 of binary tasks, by split, of a logistic regression on frozen embeddings."""
    features = probe_features(embed, train)
    # The penalty needs features of one variance, or in a bag of words of one maximum.
    scaler = MaxAbsScaler() if sparse.issparse(features) else StandardScaler()
    regression = LogisticRegressionCV(
        Cs=PENALTIES, cv=FOLDS, l1_ratios=(0.0,), scoring="accuracy", max_iter=STEPS, use_legacy_attributes=False
    )
    model = make_pipeline(scaler, regression)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, train.labels)
    found = {}
    for split, rows in sets.items():
        predicted = model.predict(probe_features(embed, rows))
        found[split] = {"accuracy": float((predicted == np.array(rows.labels)).mean())}
        if task.kind == BINARY:
            found[split]["f1"] = float(f1_score(rows.labels, predicted, zero_division=0.0))
    unfinished = sum(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    logger.info("%s, %d features: C %g; %d of the fits had not converged after %d steps",
                task.name, features.shape[1], regression.C_, unfinished, STEPS)  # fmt: skip
    return found


def measure(embed: Embedder, task: Task, train: Examples, sets: dict[str, Examples]) -> dict[str, dict[str, float]]:
    """Numbers by split: cosines for a regression, a probe for a classification."""
    if task.kind == REGRESSION:
        return {split: cosine_correlations(embed, rows) for split, rows in sets.items()}
    return probe(embed, task, train, sets)


def check_trainable(task: Task, train: Examples) -> None:
    """Raise InputError if `probe` cannot fold the training rows: they need two labels, one of them FOLDS times."""
    counts = Counter(train.labels)
    if len(counts) < 2 or max(counts.values()) < FOLDS:
        found = ", ".join(f"{count} of {task.labels[label]}" for label, count in sorted(counts.items()))
        needs = f"a regression needs two of them, and {FOLDS} rows of one; give more rows, or move the folder away"
        where = f"the first {len(train)} rows of {task.folder}'s {task.train}"
        raise InputError(f"--max_rows: {where} have too few labels ({found}): {needs}")


def tasks_at_hand(data_dir: Path) -> list[Task]:
    """STS-B if its dev set is there, and the tasks whose training and dev sets are; warns of one that lacks a set."""
    found = []
    counted = [task for name, task in TASKS.items() if name not in COUNTED_TWICE]
    for task in sorted(counted, key=lambda task: task.kind != REGRESSION):
        folder, files = data_dir / task.folder, (task.dev,) if task.kind == REGRESSION else (task.train, task.dev)
        if not (missing := [file for file in files if file and not (folder / file).is_file()]):
            found.append(task)
        elif folder.is_dir():
            logger.warning("%s is left out: %s is not in %s", task.folder, " and ".join(missing), folder)
    return found


def read_tasks(data_dir: Path, max_rows: int) -> dict[Task, tuple[Examples, dict[str, Examples]]]:
    """The tasks at hand: the rows to learn words and labels from, and by split the rows to measure on."""
    data = {}
    for task in tasks_at_hand(data_dir):
        folder = data_dir / task.folder
        train = dev = read_examples(task, folder, "dev")
        test = labelled_test(task, folder)
        if task.kind != REGRESSION:
            train = first_rows(read_examples(task, folder, "train"), max_rows)
            check_trainable(task, train)
        data[task] = train, {"dev": dev, **({} if test is None else {"test": test})}
    return data


def first_rows(rows: Examples, count: int) -> Examples:
    """At most `count` rows, from the start."""
    labels = rows.labels and rows.labels[:count]
    return Examples(rows.first[:count], rows.second and rows.second[:count], labels, rows.files)


def to_markdown(found: dict[str, dict[str, dict[str, dict[str, float]]]]) -> str:
    """A table of numbers by task, kind, split and metric: a column per kind of embeddings, a row for all else."""
    kinds = list(next(iter(found.values())))
    rows = [
        (task, f"{split} {metric}", *(f"{of_task[kind][split][metric]:.3f}" for kind in kinds))
        for task, of_task in found.items()
        for split, metrics in of_task[kinds[0]].items()
        for metric in metrics
    ]
    return markdown_table(("task", "metric", *kinds), rows)
