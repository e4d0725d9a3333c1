"""Searches that look at all candidates in bfloat16 first: exact, by a bound of its error."""

import numpy as np
import pytest
import torch
from helpers import QUERIES, made_up

from dse import index as index_module
from dse.index import CandidateIndex
from dse.networks.config import DSEConfig
from dse.networks.heads import HEADS, _norm_bound
from dse.system.errors import InputError

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def passes(monkeypatch):
    """Two passes are worth while for few candidates, of which 40 may be left. Gives how often one pass was taken."""
    taken = []
    real = index_module._best_in_one_pass
    monkeypatch.setattr(index_module, "_best_in_one_pass", lambda *given: taken.append(1) or real(*given))
    monkeypatch.setattr(index_module, "has_bfloat16", lambda device: True)
    for name, value in (("_LEFT", 40), ("_WORTH_TWO", 2)):
        monkeypatch.setattr(index_module, name, value)
    return taken


def check_same(found: list, expected: list) -> None:
    """The same rows, with the same scores to rounding."""
    assert [[hit.row for hit in hits] for hits in found] == [[hit.row for hit in hits] for hits in expected]
    scores = ([hit.score for hits in some for hit in hits] for some in (found, expected))
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)


def in_one_pass(index: CandidateIndex, *given, **options) -> list:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "has_bfloat16", lambda device: False)
        return index.search(*given, **options)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("task", ["mrpc", "sts-b", "snli"])
def test_what_is_found_is_what_one_pass_finds(student, passes, task, symmetric):
    options = {"fc_dims": (6, 3)} if task == "snli" else {}
    index = made_up(student, task, symmetric=symmetric, **options)
    best = in_one_pass(index, QUERIES, 5)
    passes.clear()
    check_same(index.search(QUERIES, 5), best)
    assert passes == [], "two passes"
    rows = [hit.row for hits in best for hit in hits[:2]]
    without = in_one_pass(index, QUERIES, 5, exclude=rows)
    passes.clear()
    check_same(index.search(QUERIES, 5, exclude=rows), without)
    assert passes == []
    assert index.search([], 5) == []


def test_the_other_label_of_a_binary_task_ranks_by_the_least_score(student, passes):
    index = made_up(student)
    expected = in_one_pass(index, QUERIES, 4, "0")
    passes.clear()
    check_same(index.search(QUERIES, 4, "0"), expected)
    assert passes == []


def test_where_all_are_nearly_equal_one_pass_decides(student, passes):
    """The differences are below what bfloat16 can tell, so all are left."""
    index = made_up(student, spread=1e-5)
    expected = in_one_pass(index, QUERIES, 5)
    passes.clear()
    check_same(index.search(QUERIES, 5), expected)
    assert passes == [1]


def test_a_query_for_which_too_many_are_left_gets_one_pass_alone(student, passes, monkeypatch):
    """The bounds of the second query, and then of two of the three, are made too wide."""
    index = made_up(student)
    expected = in_one_pass(index, QUERIES, 5)
    asked, real, counts = [1], HEADS["residual"].rounded, []
    one_pass = index_module._best_in_one_pass

    def rounded(head, queries):
        outputs = real(head, queries)

        def wide(candidates):
            scores, errors = outputs(candidates)
            errors[asked] += 1000
            return scores, errors

        return wide

    monkeypatch.setattr(index_module, "_QUERIES", 3)
    monkeypatch.setattr(HEADS["residual"], "rounded", rounded)
    monkeypatch.setattr(
        index_module,
        "_best_in_one_pass",
        lambda index, queries, *rest: counts.append(len(queries)) or one_pass(index, queries, *rest),
    )
    check_same(index.search(QUERIES, 5), expected)
    asked.append(2)
    check_same(index.search(QUERIES, 5), expected)
    assert counts == [1, 3]


@pytest.mark.parametrize(("head", "few"), [("dot", False), ("residual", True)])
def test_where_two_passes_are_not_worth_while(student, passes, monkeypatch, head, few):
    """The dot head has no large product; few candidates, or many hits, pay less than the bound costs."""
    index = made_up(student) if few else CandidateIndex.from_embeddings(
        model := student(siamese_head_type=head),
        [(np.random.default_rng(0).normal(size=(200, model.network.config.embedding_size)), ["a"] * 200)],
    )  # fmt: skip
    index.search(QUERIES, 11 if few else 5)
    assert passes == [1]
    if few:
        monkeypatch.setattr(index_module, "_WORTH_TWO", 6)
        index.search(QUERIES, 5)
        assert passes == [1, 1]


def test_scores_that_are_nan_are_refused(student, passes):
    index = made_up(student)
    with torch.no_grad():
        index.model.network.siamese_head.fc_layers[-1].bias.fill_(torch.nan)
    with pytest.raises(InputError, match="the student's scores are NaN or infinite"):
        index.search(QUERIES, 5)


@pytest.mark.parametrize("fc_dims", [(7, 1), (6, 4, 3), (1,)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["concat", "residual"])
def test_the_bound_holds(kind, symmetric, fc_dims):
    """For weights and embeddings of all sizes; and rounding does change the outputs."""
    torch.manual_seed(0)
    config = DSEConfig({"hidden_size": 24}, "concat_top_mean", 2, kind, fc_dims=fc_dims, symmetric=symmetric)
    for scale in (1e-3, 1.0, 100.0):
        head = HEADS[kind](config)
        for layer in head.fc_layers:
            torch.nn.init.normal_(layer.weight, std=scale**0.5)
        u, v = scale * torch.randn(3, 48), scale * torch.randn(200, 48)
        found, errors = head.rounded(u)(v)
        differ = (found - head.factorised()(u, v)).abs().amax(dim=-1)
        assert (differ <= errors).all()
        assert differ.max() > 1e-3 * errors.max()


@pytest.mark.parametrize(
    ("weights", "exact", "rounded", "bound"),
    [
        # 1 + 2^-8 becomes 1. Its square and that of |0 - v| add up to 2, so x may change by sqrt(2) * 2^-8.
        ([0.0, 256.0, 0.0, 0.0], 257.0, 256.0, 256 * 2**0.5 / 256 + 1),
        # And 256 + 1 becomes 256, too: an error of 2.
        ([0.0, 256.0, 0.0, 1.0], 258.00390625, 256.0, (256**2 + 1) ** 0.5 * 2**0.5 / 256 + 1),
    ],
)
def test_the_bound_by_hand(weights, exact, rounded, bound):
    """u = 0 and v = 1 + 2^-8, the worst case of bfloat16's 8 bits; the product of about 256 changes by 1 at most."""
    head = HEADS["concat"](DSEConfig({"hidden_size": 1}, pooler_num_top_hidden_layers=1, fc_dims=(1,)))
    with torch.no_grad():
        head.fc_layers[0].weight.copy_(torch.tensor([weights]))
        head.fc_layers[0].bias.zero_()
    u, v = torch.zeros(1, 1), torch.tensor([[1 + 2.0**-8]])
    found, errors = head.rounded(u)(v)
    assert (head.factorised()(u, v).item(), found.item()) == (exact, rounded)
    assert exact - rounded <= errors.item() == pytest.approx(bound, rel=0.02)


@pytest.mark.parametrize("places", [[0], list(range(100, 110))])
def test_a_bound_that_is_nan_prunes_nothing(student, passes, monkeypatch, places):
    """Of one candidate, and of more than are asked for: the first pass may overflow where exact scores are finite."""
    index = made_up(student)
    expected, real, seen = in_one_pass(index, QUERIES, 5), HEADS["residual"].rounded, []

    def rounded(head, queries):
        seen.clear()
        outputs = real(head, queries)

        def overflowed(candidates):
            scores, errors = outputs(candidates)
            errors[:, [place - len(seen) for place in places if 0 <= place - len(seen) < len(candidates)]] = torch.nan
            seen.extend(candidates)
            return scores, errors

        return overflowed

    monkeypatch.setattr(HEADS["residual"], "rounded", rounded)
    check_same(index.search(QUERIES, 5), expected)


def test_a_user_that_rounds_float32_gets_one_pass(student, passes):
    index = made_up(student)
    with torch.autocast("cpu", torch.bfloat16):
        index.search(QUERIES, 5)
    assert passes == [1]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        index.search(QUERIES, 5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert passes == [1, 1]
    index.search(QUERIES, 5)
    assert passes == [1, 1]


def test_the_norm_bound():
    for matrix in (torch.diag(torch.tensor([3.0, 1.0, 0.5])), torch.randn(20, 50), torch.zeros(2, 3), torch.ones(4, 6)):
        norm = torch.linalg.matrix_norm(matrix, 2)
        assert norm <= _norm_bound(matrix) <= 1.3 * norm
