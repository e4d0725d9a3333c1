"""Searches in an index that score the nearest candidates alone, and the recall that an index notes."""

import json

import numpy as np
import pytest
import torch
from helpers import CANDIDATES, HEADS, QUERIES

from dse import index as index_module
from dse.index import CandidateIndex
from dse.networks import kernels
from dse.storage import index_files
from dse.storage.index_files import IndexFiles
from dse.system import signals
from dse.system.errors import InputError

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture
def measured(monkeypatch):
    """Few candidates are worth measuring: shortlists of 2, 5 and 23."""
    monkeypatch.setattr(index_module, "_WORTH", 10)
    monkeypatch.setattr(index_module, "_SHORTLISTS", (2, 5, 12))
    monkeypatch.setattr(index_module, "_ASKED", (6, 6))
    monkeypatch.setattr(index_module, "_BEST", 3)


def cosines(model, texts: list[str]) -> np.ndarray:
    """Those of the top layer in 7 bits, (texts, candidates): the tiny model's differ by less than the rounding."""
    top = model.network.config.top_size
    u, v = (model.encode(some)[:, -top:].astype(np.float64) for some in (texts, CANDIDATES))
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


def test_the_recall_of_shortlists_is_noted(student, measured, tmp_path, caplog):
    """Against the same from scores and cosines of all pairs of candidates."""
    model = student()
    with caplog.at_level("INFO", "dse"):
        index = CandidateIndex.build(model, CANDIDATES, tmp_path / "index")
    asked = np.random.default_rng(0).choice(23, 6, replace=False)
    shares: dict[str, list[float]] = {"2": [], "5": [], "12": []}
    for own, scores, cosine in zip(
        asked, index.score([CANDIDATES[i] for i in asked]), cosines(model, [CANDIDATES[i] for i in asked]), strict=True
    ):
        best, near = ([row for row in np.argsort(-of_all, kind="stable") if row != own] for of_all in (scores, cosine))
        for size, found in shares.items():
            found.append(len(set(best[:3]) & set(near[: int(size)])) / 3)
    wanted = {
        size: [pytest.approx(np.mean(found)), pytest.approx(np.std(found) / 6**0.5)] for size, found in shares.items()
    }
    noted = json.loads((tmp_path / "index" / "index.json").read_text())["shortlists"]
    assert noted == {"count": 23, "recalls": wanted}
    assert 0 < np.mean(shares["2"]) < np.mean(shares["12"])
    assert f"shortlists of the nearest hold 2: {100 * np.mean(shares['2']):.1f} %, 5: " in caplog.text
    assert caplog.text.endswith("; auto takes all\n")
    assert CandidateIndex.open(tmp_path / "index", model).files.content["shortlists"] == noted
    index.append(["one more"])
    assert index.files.content["shortlists"]["count"] == 23
    index.append(["two more", "three more"])
    assert index.files.content["shortlists"]["count"] == 26, "it has grown by a tenth"


def test_copies_of_a_query_do_not_count(student, measured, monkeypatch, tmp_path):
    """Four copies of each text: the ten best would be its own copies and the nearest, too."""
    model = student(siamese_head_type="residual")
    with torch.no_grad():
        model.network.siamese_head.scale.fill_(1e4)  # so that they are the best
    monkeypatch.setattr(index_module, "_BEST", 4)
    index = CandidateIndex.build(model, CANDIDATES * 4, tmp_path / "index")
    recalls = index.files.content["shortlists"]["recalls"]
    rows = np.random.default_rng(0).choice(92, 6, replace=False)
    expected = []
    for row in rows:
        text = CANDIDATES[row % 23]
        near = np.argsort(-np.tile(cosines(model, [text])[0], 4), kind="stable")
        best = np.argsort(-index.score(text), kind="stable")
        near, best = ([i for i in order if i % 23 != row % 23] for order in (near, best))
        expected.append(len(set(best[:4]) & set(near[:5])) / 4)
    assert recalls["5"][0] == pytest.approx(np.mean(expected))


def test_a_stop_while_shortlists_are_measured_loses_nothing(student, measured, monkeypatch, tmp_path):
    """And an index from before there were shortlists takes more rows."""
    model, search = student(), CandidateIndex.search

    def stopped(*args, **options):
        raise signals.Stopped(2)

    monkeypatch.setattr(CandidateIndex, "search", stopped)
    with pytest.raises(signals.Stopped) as stop:
        CandidateIndex.build(model, CANDIDATES, tmp_path / "index")
    assert stop.value.advice == f"{tmp_path / 'index'} is whole, but its shortlists are not measured"
    monkeypatch.setattr(CandidateIndex, "search", search)
    index = CandidateIndex.open(tmp_path / "index", model)
    assert len(index) == 23
    old = IndexFiles.create(tmp_path / "old", index_module.fingerprint(model), index.width, "float32", [
        (model.encode(CANDIDATES), CANDIDATES)
    ])  # fmt: skip
    (older := CandidateIndex(model, old)).append(["one more"])
    assert len(older) == 24
    assert "shortlists" not in older.files.content


def test_auto_takes_the_smallest_that_is_good_enough(student, measured, monkeypatch, tmp_path):
    """All are scored where none is, for more hits than were measured, and for another label."""
    index = CandidateIndex.build(student("snli"), CANDIDATES, tmp_path / "index")
    taken = []

    def nearest(files, queries, count):
        taken.append(count)
        return torch.arange(count).expand(len(queries), count)

    monkeypatch.setattr(index_module, "nearest", nearest)
    for recalls, expected in (({"2": 0.9, "5": 0.995, "12": 1.0}, [5]), ({"2": 0.9, "5": 0.99, "12": 0.99}, [])):
        index.files.content["shortlists"]["recalls"] = {size: [recall, 0.002] for size, recall in recalls.items()}
        taken.clear()
        index.search(QUERIES[0], 3, shortlist="auto")
        assert taken == expected
    index.files.content["shortlists"]["recalls"] = {"5": [1.0, 0.0]}
    assert index.search(QUERIES[0], 4, shortlist="auto") == index.search(QUERIES[0], 4)
    assert index.search(QUERIES[0], 3, "neutral", shortlist="auto") == index.search(QUERIES[0], 3, "neutral")
    assert taken == []
    index.search(QUERIES[0], 3, "entailment", shortlist="auto")
    assert taken == [5]
    del index.files.content["shortlists"]
    assert index.search(QUERIES[0], 3, shortlist="auto") == index.search(QUERIES[0], 3)


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


@pytest.mark.parametrize("size", [1, 2, 30, 384])
def test_products_of_small_integers(size, monkeypatch):
    """Of torch's operator and of floats."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-63, 64, (n, size)).astype(np.int8) for n in (50, 3))
    for public in (False, True):
        monkeypatch.setattr(kernels, "PUBLIC_ONLY", public)
        found = kernels.int8_products(torch.from_numpy(a), torch.from_numpy(b))
        assert (found.numpy() == a.astype(int) @ b.T.astype(int)).all()
