"""Answers from outputs, and what is told of the texts."""

import numpy as np
import pytest
import torch

from dse.data.processors import Examples
from dse.data.tasks import Task, get_task
from dse.experiments.predictions import answers, find_partners, rank_by_cosine, rank_by_head, student_scorer


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


def ranking(scores: dict[tuple[str, str], float]):
    """A ranker with these scores of (query, text), 0 for others."""
    return lambda texts, queries: torch.tensor(
        [[scores.get((texts[query], text), 0.0) for text in texts] for query in queries]
    )


def test_finding_partners_by_hand():
    """Pairs a-b, a-c and c-d are positive: a, b, c, d are one group, of which only the partner asked for counts.

    a finds b behind x and tied with y: 1 + 1 + 1/2. a finds c before all. c finds d behind x and y: 3. The pair of x
    with itself is nothing to find, and that of e and x is negative.
    """
    rows = Examples(["a", "a", "c", "x", "e"], ["b", "c", "d", "x", "y"], [1, 1, 1, 1, 0])
    scores = {("a", "x"): 5.0, ("a", "y"): 3.0, ("a", "b"): 3.0, ("a", "c"): 9.0, ("a", "d"): 8.0, ("a", "a"): 10.0,
              ("c", "d"): 1.0, ("c", "x"): 2.0, ("c", "y"): 2.0, ("c", "a"): 7.0}  # fmt: skip
    found = find_partners(get_task("mrpc"), rows, ranking(scores))
    assert found == pytest.approx({"mrr": (1 / 2.5 + 1 + 1 / 3) / 3, "recall_at_1": 1 / 3, "recall_at_10": 1.0})


def test_partners_of_other_kinds():
    """The label that ranks, or the top tenth of the scale: of scores from 0 to 5, those from 4.5 on."""
    best = ranking({("a", "b"): 1.0})
    rows = Examples(["a", "b", "c", "e"], ["b", "c", "d", "f"], [4.5, 4.4, 0.0, 5.0])  # f ties with four
    assert find_partners(get_task("sts-b"), rows, best)["mrr"] == pytest.approx((1 + 1 / 3) / 2)
    rows.labels = [5.0, 4.5, 0.0, 0.0]  # c ties with d, e and f
    assert find_partners(get_task("sts-b"), rows, best)["mrr"] == pytest.approx((1 + 1 / 2.5) / 2)
    rows.labels = [3.0] * 4
    assert find_partners(get_task("sts-b"), rows, best) == {}
    rows.labels = [1, 0, 2, 0]  # entailment is the second of three labels, and the first of RTE's two
    assert find_partners(get_task("snli"), rows, best)["recall_at_1"] == 1.0
    rows.labels = [0, 1, 1, 1]
    assert find_partners(get_task("rte"), rows, best)["recall_at_1"] == 1.0
    rows.labels = [1, 1, 1, 1]
    assert find_partners(get_task("rte"), rows, best) == {}


def test_rankers(student):
    texts, queries = ["a car", "the town", "lamp", "a ship"], np.array([2, 0])
    model = student("snli", siamese_head_type="residual")
    outputs = model.score([(texts[query], text) for query in queries for text in texts]).astype(np.float64)
    expected = outputs[:, 1] - np.logaddexp(outputs[:, 0], outputs[:, 2])
    np.testing.assert_allclose(rank_by_head(model)(texts, queries).flatten(), expected, rtol=1e-4, atol=1e-5)
    vectors = torch.from_numpy(model.encode(texts))
    cosines = rank_by_cosine(lambda texts: vectors)(texts, queries)
    expected = torch.cosine_similarity(vectors[queries][:, None], vectors, dim=-1)
    torch.testing.assert_close(cosines, expected)
