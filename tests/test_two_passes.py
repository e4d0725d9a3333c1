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
    for name, value in (("_LEFT", 40), ("_WORTH_TWO", {"cpu": 2, "cuda": 2})):
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
    options = {"fc_dims": (6, 3), "scale": 90.0} if task == "snli" else {}
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
        monkeypatch.setitem(index_module._WORTH_TWO, "cpu", 6)
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


def one_number(weights: list[float], last: float | None = None, symmetric: bool = False) -> torch.nn.Module:
    """A head for embeddings of one number, without biases; its hidden number's ReLU times `last`, or the number."""
    fc_dims = (1,) if last is None else (1, 1)
    config = DSEConfig({"hidden_size": 1}, pooler_num_top_hidden_layers=1, fc_dims=fc_dims, symmetric=symmetric)
    head = HEADS["concat"](config)
    with torch.no_grad():
        for layer, values in zip(head.fc_layers, (weights, [last]), strict=False):
            layer.weight.copy_(torch.tensor([values]))
            layer.bias.zero_()
    return head


MORE = 1 + 2.0**-8  # the worst case of bfloat16's 8 bits: it becomes 1


@pytest.mark.parametrize(
    ("weights", "u", "v", "exact", "rounded", "bound"),
    [
        # v changes by 2^-8 of itself, and the product, 256, by as much.
        ([0.0, 256.0, 0.0, 0.0], 0.0, MORE, 257.0, 256.0, 1 + 1),
        # 257, of which 1 is W_d |u - v|, becomes 256: an error of 2.
        ([0.0, 256.0, 0.0, 1.0], 0.0, MORE, 258.00390625, 256.0, 257 / 256 + 1),
        # W_d |u - v| is 256 max(u, v) - 128 (u + v). u changes by 2^-8; that product, 128 + the constant's 128, by 1.
        ([0.0, 0.0, 0.0, 128.0], MORE, 0.0, 128.5, 128.0, 0.5 + 1),
        # W_u u is computed in float32; the product, which is 0 for v = 0, may change by 2^-8 of this constant.
        ([256.0, 0.0, 0.0, 0.0], MORE, 0.0, 257.0, 257.0, 2 * 257 / 256),
        # The weight changes by 1, for each unit of |(v, max(u, v))|.
        ([0.0, 256 * MORE, 0.0, 0.0], 0.0, 1.0, 257.0, 256.0, 1 + 1 + 2**0.5),
    ],
)
def test_the_bound_by_hand(weights, u, v, exact, rounded, bound):
    head, u, v = one_number(weights), torch.tensor([[u]]), torch.tensor([[v]])
    found, errors = head.rounded(u)(v)
    assert (head.factorised()(u, v).item(), found.item()) == (exact, rounded)
    assert abs(exact - rounded) <= errors.item() == pytest.approx(bound, rel=0.02)


@pytest.mark.parametrize(
    ("weights", "u", "v", "rounded", "bound"),
    [
        # W_u u is 0, but W_u v is 257 and becomes 256. v, this product and its sum with 0 may change by 1 each, and so
        # may the hidden number.
        ([256.0, 0.0, 0.0, 0.0], 0.0, MORE, 256.0, 3 + 1),
        # W_v v is 0, and W_v u a constant: the product may be off by 2^-8 of the hidden number and of this.
        ([0.0, 256.0, 0.0, 0.0], MORE, 0.0, 257.0, 1 + 1),
    ],
)
def test_the_bound_of_the_other_order_by_hand(weights, u, v, rounded, bound):
    """The first order gives 0, this one 257."""
    head, u, v = one_number(weights, symmetric=True), torch.tensor([[u]]), torch.tensor([[v]])
    found, errors = head.rounded(u)(v)
    assert (head.factorised()(u, v).item(), found.item()) == (257 / 2, rounded / 2)
    assert errors.item() == pytest.approx(bound / 2, rel=0.03)


@pytest.mark.parametrize(("weight", "exact", "rounded", "bound"), [(256.0, 514.0, 512.0, 2 * 2), (-256.0, 0.0, 0.0, 0)])
def test_a_hidden_number_that_must_be_negative_adds_no_error(weight, exact, rounded, bound):
    head, u, v = one_number([0.0, weight, 0.0, 0.0], 2.0), torch.zeros(1, 1), torch.tensor([[MORE]])
    found, errors = head.rounded(u)(v)
    assert (head.factorised()(u, v).item(), found.item()) == (exact, rounded)
    assert abs(exact - rounded) <= errors.item() == pytest.approx(bound, rel=0.02)


def test_one_that_may_be_positive_adds_its_error():
    """256 + 1 with its bias of -256.5: 256 - 256.5 is negative, 0.5 is not."""
    head, u, v = one_number([0.0, 256.0, 0.0, 0.0], 2.0), torch.zeros(1, 1), torch.tensor([[MORE]])
    with torch.no_grad():
        head.fc_layers[0].bias.fill_(-256.5)
    found, errors = head.rounded(u)(v)
    assert (head.factorised()(u, v).item(), found.item()) == (1.0, 0.0)
    # v's 1, and 2^-8 of the product, which is at most that of the constant.
    assert errors.item() == pytest.approx(2 * (1 + 256.5 / 256), rel=0.02)


def test_errors_of_many_hidden_numbers_together_are_those_of_one_vector():
    """256 I v, |v| = 2: each of the four may be off by 2, 8 in all; together by 2 as a vector, so their sum by 4."""
    head = HEADS["concat"](DSEConfig({"hidden_size": 4}, pooler_num_top_hidden_layers=1, fc_dims=(4, 1)))
    with torch.no_grad():
        head.fc_layers[0].weight.zero_()
        head.fc_layers[0].weight[:, 4:8] = 256 * torch.eye(4)
        head.fc_layers[1].weight.fill_(1)
        for layer in head.fc_layers:
            layer.bias.zero_()
    _, errors = head.rounded(torch.zeros(1, 4))(torch.ones(1, 4))
    spectral = 4 ** (1 / 16)  # `_norm_bound` of I
    assert errors.item() == pytest.approx(4 * spectral + 4, rel=0.02)  # and the four products' 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("fc_dims", [(1,), (3, 1), (3, 2, 1)])
def test_the_bound_holds_for_numbers_that_float32_hardly_holds(fc_dims, symmetric):
    """Weights and embeddings of 1e-30 to 1e30, whose squares and products may be 0 or infinite."""
    torch.manual_seed(0)
    config = DSEConfig({"hidden_size": 8}, pooler_num_top_hidden_layers=1, fc_dims=fc_dims, symmetric=symmetric)
    finite = 0
    for _ in range(100):
        head = HEADS["concat"](config)
        for layer in head.fc_layers:
            torch.nn.init.normal_(layer.weight, std=10.0 ** torch.randint(-30, 31, ()))
            layer.bias.data.zero_()
        u, v = (10.0 ** torch.randint(-30, 31, ()) * torch.randn(count, 8) for count in (1, 20))
        found, errors = head.rounded(u)(v)
        differ = (found - head.factorised()(u, v)).abs().amax(dim=-1)
        assert (differ <= errors).logical_or(~errors.isfinite()).all()
        finite += errors.isfinite().sum()
    assert finite > 500


def test_a_matrix_that_is_a_difference_of_larger_ones():
    """W_v + W_p u is 0 where it is computed in two steps, and not where in one: both are right to rounding."""
    u, product = torch.tensor([[0.01]]), torch.tensor(1.0001) / torch.tensor(0.01)
    head = one_number([0.0, -(product * u).item(), product.item(), 0.0])
    found, errors = head.rounded(u)(torch.ones(1, 1))
    assert abs(found.item() - head.factorised()(u, torch.ones(1, 1)).item()) <= errors.item() < 1e-6


def test_a_product_that_overflows_bounds_nothing():
    head, v = one_number([0.0, 1.8438e19, 0.0, 0.0], 1e-30), torch.tensor([[-1.8438e19]])
    with torch.no_grad():
        head.fc_layers[0].bias.fill_(3.402e38)
    _, errors = head.rounded(torch.zeros(1, 1))(v)
    assert not errors.isfinite().any()


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
        assert norm <= _norm_bound(matrix) <= 1.3 * norm + 1e-17
