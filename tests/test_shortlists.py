"""Searches in an index that score the nearest candidates alone."""

import numpy as np
import pytest
import torch
from helpers import CANDIDATES, HEADS, QUERIES, made_up

from dse import index as index_module
from dse.index import CandidateIndex
from dse.networks import kernels
from dse.storage import index_files
from dse.storage.index_files import IndexFiles
from dse.system.errors import InputError

pytestmark = pytest.mark.usefixtures("small_blocks")


def cosines(model, texts: list[str]) -> np.ndarray:
    """Those of the top layer in 7 bits, (texts, candidates): the tiny model's differ by less than the rounding."""
    return seven_bits(model.encode(texts), model.encode(CANDIDATES), model.network.config.top_size)


def seven_bits(u: np.ndarray, v: np.ndarray, top: int) -> np.ndarray:
    """The cosines of the last columns, in 7 bits, of each two rows."""
    u, v = (x[:, -top:].astype(np.float64) for x in (u, v))
    u, v = (np.rint(63 * x / np.abs(x).max(axis=1, keepdims=True)) for x in (u, v))
    return (u / np.linalg.norm(u, axis=1, keepdims=True)) @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("head", HEADS)
def test_a_shortlist_of_all_finds_what_a_search_finds(student, head, dtype):
    index = CandidateIndex.build(student(**HEADS[head]), CANDIDATES, dtype=dtype)
    for found, expected in zip(index.search(QUERIES, 7, shortlist=50), index.search(QUERIES, 7), strict=True):
        assert [hit.row for hit in found] == [hit.row for hit in expected]
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("exclude", [(), (1, 4, 22)])
def test_only_the_nearest_are_scored(student, exclude):
    model = student(siamese_head_type="residual")
    index = CandidateIndex.build(model, CANDIDATES)
    found = index.search(QUERIES, 4, shortlist=6, exclude=exclude)
    for cosine, scores, hits in zip(cosines(model, QUERIES), index.score(QUERIES), found, strict=True):
        near = [row for row in np.argsort(-cosine) if row not in exclude][:6]
        assert [hit.row for hit in hits] == sorted(near, key=lambda row: -scores[row])[:4]
    assert len(index.search(QUERIES[0], 4, shortlist=4, exclude=range(20))) == 3
    assert index.search([], 4, shortlist=4) == []
    assert index.search(QUERIES[0], 3, shortlist=3, exclude=range(23)) == []
    assert CandidateIndex.build(model, []).search(QUERIES, 3, shortlist=np.int64(3)) == [[], [], []]


@pytest.mark.parametrize("count", [1, 7, 10, 11, 199, 200, 300])
def test_the_nearest_of_equals_are_the_earlier_rows(student, count):
    """Each direction occurs 20 times, once in each 10 rows; a block has 10."""
    few = made_up(student, count=10)
    rows = np.concatenate([np.roll(few.vectors(0, 10), turn, axis=0) for turn in range(20)])
    index = CandidateIndex.from_embeddings(few.model, [(rows, [""] * 200)])
    queries, top = few.model.encode(QUERIES), few.model.network.config.top_size
    found = index_files.nearest(index.files, torch.from_numpy(queries), count)
    expected = np.argsort(-seven_bits(queries, rows, top).round(9), axis=1, kind="stable")
    assert found.tolist() == expected[:, :count].tolist()


@pytest.mark.parametrize("kept", [1, 6])
@pytest.mark.parametrize("longest", [200, 100, 45])
@pytest.mark.parametrize(("exclude", "many"), [((), 300), (tuple(range(0, 200, 3)), 300), ((), 100)])
def test_auto_scores_so_many_that_as_many_more_add_no_hit(student, monkeypatch, exclude, many, longest, kept):
    """From 5 for each hit on, of at least 4, by cosines and scores of all; if a double list is too long, all count.

    Twice as many among `many` candidates or more.
    """
    index, lists, real = made_up(student, scale=1.0), [], IndexFiles.rows
    for name, value in (("_HITS", 4), ("_FIRST", 5), ("_LONGEST", longest), ("_MANY", many)):
        monkeypatch.setattr(index_module, name, value)
    monkeypatch.setattr(IndexFiles, "rows", lambda files, rows: lists.append(len(rows)) or real(files, rows))
    found = index.search(QUERIES * 2, kept, shortlist="auto", exclude=exclude)
    cosine = seven_bits(index.model.encode(QUERIES), index.vectors(0, 200), index.model.network.config.top_size)
    sizes, hits, scale = [], max(kept, 4), 2 if many == 100 else 1
    first, longest = 5 * hits * scale, longest * scale
    for near, scores, *of_query in zip(
        (-cosine).argsort(axis=1), index.score(QUERIES), found[:3], found[3:], strict=True
    ):
        rows = [row for row in near if row not in exclude]

        def best(size, rows=rows, scores=scores):
            return sorted(rows[:size], key=(-scores).__getitem__)[:hits]

        size = first
        while 2 * size <= longest and best(2 * size) != best(size):
            size *= 2
        enough = 2 * size <= min(longest, len(rows))
        expected = best(2 * size if enough else len(rows))
        assert [[hit.row for hit in each] for each in of_query] == [expected[:kept]] * 2
        listed = min(longest, len(rows))
        sizes.append(2 * size if enough else listed if 2 * first <= longest or listed == len(rows) else 0)
    assert sum(lists) == 2 * sum(sizes)
    assert longest == 45 * scale or max(sizes) > 40, "some lists are doubled more than once, or are not enough"


def test_few_hits_do_not_end_the_list_by_chance(student, monkeypatch):
    """The best of unrelated scores stays the same by chance in every second doubling."""
    index = made_up(student, scale=0.0, count=500)
    monkeypatch.setattr(index_module, "_FIRST", 2)
    monkeypatch.setattr(index_module, "_LONGEST", 320)
    found, expected = (index.search(QUERIES, 1, shortlist=size) for size in ("auto", None))
    assert [hits[0].row for hits in found] == [hits[0].row for hits in expected]


def test_auto_where_lists_are_of_all_or_of_no_use(student, monkeypatch):
    """Few candidates, more hits than lists are long, and any label; the list holds all, or all are searched."""
    index = CandidateIndex.build(student("snli"), CANDIDATES)
    for longest in (8000, 12):
        monkeypatch.setattr(index_module, "_LONGEST", longest)
        for kept, label in ((3, None), (3, "neutral"), (12, None), (50, "neutral")):
            expected = index.search(QUERIES, kept, label, exclude=[4])
            found = index.search(QUERIES, kept, label, exclude=[4], shortlist="auto")
            for hits, wanted in zip(found, expected, strict=True):
                assert [hit.row for hit in hits] == [hit.row for hit in wanted]
    assert index.search([], 3, shortlist="auto") == []
    assert index.search(QUERIES[0], 3, shortlist="auto", exclude=range(23)) == []


def test_what_is_no_shortlist(student, tmp_path):
    index = CandidateIndex.build(student(), CANDIDATES)
    for wrong in (2, 0, "all", 7.0, True):
        with pytest.raises(ValueError, match="is neither 'auto' nor a whole number of at least top_k, 3"):
            index.search(QUERIES[0], 3, shortlist=wrong)
    del index.files.content["top"]
    with pytest.raises(InputError, match="was built before there were shortlists; build it again"):
        index.search(QUERIES[0], 3, shortlist="auto")


def test_directions_of_any_length():
    """Squares that float32 does not hold, and zeros. 3 / 4 * 63 is 47.25."""
    rows = np.array([[9, 3e30, 4e30], [9, 0, 0], [9, 3e-30, -4e-30]], np.float32)
    numbers, factors = index_files.directions(rows, 2)
    assert numbers.tolist() == [[47, 63], [0, 0], [47, -63]]
    np.testing.assert_allclose(1 / factors, [np.hypot(47, 63), 1, np.hypot(47, 63)], rtol=1e-6)


@pytest.mark.parametrize("counts", [(50, 3), (3, 50), (1, 50)])
@pytest.mark.parametrize("size", [1, 2, 30, 384])
def test_products_of_small_integers(size, counts, monkeypatch):
    """Of torch's operator and of floats."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-63, 64, (n, size)).astype(np.int8) for n in counts)
    for public in (False, True):
        monkeypatch.setattr(kernels, "PUBLIC_ONLY", public)
        found = kernels.int8_products(torch.from_numpy(a), torch.from_numpy(b))
        assert (found.numpy() == a.astype(int) @ b.T.astype(int)).all()
