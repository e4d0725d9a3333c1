"""Answers from outputs, and what is told of the texts."""

import numpy as np

from dse.data.processors import Examples
from dse.data.tasks import Task, get_task
from dse.experiments.predictions import answers, student_scorer


def test_the_threshold_is_strict():
    """A logit of 0 has probability 0.5, which is not above 0.5."""
    assert answers(get_task("mrpc"), np.array([[0.0], [1e-6], [-1e-6]], np.float32)) == ["0", "1", "0"]


def test_scores_of_an_own_regression_are_left_alone():
    assert answers(Task("mine", "regression"), np.array([[-2.5], [7.25]], np.float32)) == ["-2.500", "7.250"]
    assert answers(get_task("sts-b"), np.array([[-0.0]], np.float32)) == ["0.000"]


def test_predict_tells_of_the_texts(student, told):
    rows = Examples(["a car " * 20, "zzz"], ["town", "ship"], None, [{"file": "dev.tsv", "sha256": "1" * 64}])
    score = student_scorer(student("mrpc"), get_task("mrpc"))
    # 30 pieces are left of the first text
    assert told(lambda: score(rows)) == [
        "INFO dev.tsv: 1 of 4 distinct texts are cut at --max_seq_length 32; 3.0 % of the pieces are [UNK]"
    ]
