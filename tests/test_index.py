"""The index: scores of the head on pairs, the best ones, files that are whole, spoiled or of another model."""

import errno
import os
import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout

from dse import index as index_module
from dse.data.tasks import get_task
from dse.experiments.synthetic import make_pair
from dse.index import CandidateIndex, Hit
from dse.networks import heads
from dse.storage import index_files
from dse.system.errors import InputError

CANDIDATES = [make_pair(random.Random(seed))[2] for seed in range(23)]
QUERIES = [make_pair(random.Random(seed))[1] for seed in (100, 101, 102)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 5 rows, made 8 at a time, two queries at once: nothing ends where something else does."""
    places = ((index_files, "BLOCK", 5), (index_module, "BLOCK", 5), (index_module, "_EMBED_AT_ONCE", 8))
    for module, name, value in (*places, (index_module, "_QUERIES", 2), (heads, "_PART", 40)):
        monkeypatch.setattr(module, name, value)


def pair_scores(model, queries: list[str], candidates: list[str]) -> np.ndarray:
    """The second way: every pair through the head as in training, (queries, candidates, outputs)."""
    scores = model.score([(query, candidate) for query in queries for candidate in candidates])
    return scores.reshape(len(queries), len(candidates), -1)


@pytest.mark.parametrize("extra", [-1, 12])
@pytest.mark.parametrize("fc_dims", [(1,), (8, 1), (8, 4, 1)])
@pytest.mark.parametrize("head", ["concat", "dot"])
def test_scores_are_the_heads(student, head, fc_dims, extra):
    model = student(siamese_head_type=head, fc_dims=fc_dims, additional_embedding_layer_size=extra)
    scores = CandidateIndex.build(model, CANDIDATES).score(QUERIES)
    expected = pair_scores(model, QUERIES, CANDIDATES)[..., 0]
    assert scores.shape == (3, 23)
    assert np.abs(scores - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.ptp(expected) > 1e-3 * np.abs(expected).max()


def test_multiclass_ranks_by_the_labels_probability(student):
    model, labels = student("snli"), get_task("snli").labels
    index = CandidateIndex.build(model, CANDIDATES)
    outputs = pair_scores(model, QUERIES, CANDIDATES).astype(np.float64)
    probabilities = np.exp(outputs) / np.exp(outputs).sum(axis=-1, keepdims=True)
    for label in (None, *labels):
        p = probabilities[..., labels.index(label or "entailment")]
        np.testing.assert_allclose(index.score(QUERIES, label), np.log(p / (1 - p)), rtol=1e-4, atol=1e-5)
        assert [hit.row for hit in index.search(QUERIES[0], 2, label)] == np.argsort(-p[0])[:2].tolist()
    with pytest.raises(InputError, match="'neither' is not a label of snli"):
        index.score(QUERIES, "neither")


@pytest.mark.parametrize("top_k", [1, 4, 7, 30])
def test_search_against_sorting_all(student, top_k):
    index = CandidateIndex.build(student(), CANDIDATES)
    for scores, hits in zip(index.score(QUERIES), index.search(QUERIES, top_k), strict=True):
        rows = np.argsort(-scores, kind="stable")[:top_k]
        assert hits == [Hit(scores[row], row, CANDIDATES[row]) for row in rows]
    assert index.search(QUERIES[0], top_k) == index.search(QUERIES[:1], top_k)[0]


def test_of_equals_the_earlier_row_wins():
    """Two blocks whose scores tie across and within them."""
    best = (torch.empty(0), torch.empty(0, dtype=torch.int64))
    best = index_module._best(*best, torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0]), 0, 2)
    assert best[1].tolist() == [1, 2]
    best = index_module._best(*best, torch.tensor([2.0, 3.0, 2.0]), 5, 2)
    assert (best[0].tolist(), best[1].tolist()) == ([3.0, 2.0], [6, 1])


def test_none_and_few_candidates(student):
    model = student()
    empty = CandidateIndex.build(model, [])
    assert (len(empty), empty.search(QUERIES, 3), empty.score(QUERIES[0]).shape) == (0, [[], [], []], (0,))
    empty.append(CANDIDATES[:1])
    assert [hit.row for hit in empty.search(QUERIES[0], 3)] == [0]
    assert empty.search([], 3) == []
    with pytest.raises(ValueError, match="top_k"):
        empty.search(QUERIES, 0)


def test_stored_opened_and_appended_is_as_built_at_once(student, tmp_path):
    model = student()
    texts = [*CANDIDATES, "", "tab\there", "a\nb", "ça va ≤ 🙂"]
    whole = CandidateIndex.build(model, texts, tmp_path / "whole")
    grown = CandidateIndex.build(model, iter(texts[:7]), tmp_path / "grown")
    for a, b in ((7, 8), (8, 8), (8, 19), (19, 27)):
        grown.append(texts[a:b])
    again = CandidateIndex.open(tmp_path / "grown", model)
    again.save(tmp_path / "saved")
    saved = CandidateIndex.open(tmp_path / "saved", model)
    for index in (whole, grown, again, saved):
        assert len(index) == 27
        assert [index.text(row) for row in range(27)] == texts
        np.testing.assert_allclose(index.score(QUERIES), whole.score(QUERIES), rtol=1e-5)
    for row in (-1, 27):
        with pytest.raises(IndexError):
            whole.text(row)


def test_half_the_space(student, tmp_path):
    model = student()
    full, half = (CandidateIndex.build(model, CANDIDATES, tmp_path / kind, kind) for kind in ("float32", "float16"))
    sizes = [(tmp_path / kind / "vectors.bin").stat().st_size for kind in ("float32", "float16")]
    assert sizes == [23 * full.width * 4, 23 * full.width * 2]
    np.testing.assert_array_equal(half.vectors(0, 23), full.vectors(0, 23).astype(np.float16))
    assert np.abs(half.score(QUERIES) - full.score(QUERIES)).max() < 0.01 * np.abs(full.score(QUERIES)).max()
    with pytest.raises(ValueError, match="dtype"):
        CandidateIndex.build(model, CANDIDATES, dtype="int8")


def test_a_stop_leaves_the_index_as_it_was(student, tmp_path):
    model = student()

    def stopped():
        yield from CANDIDATES
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CandidateIndex.build(model, stopped(), tmp_path / "index")
    assert list(tmp_path.iterdir()) == []
    index = CandidateIndex.build(model, CANDIDATES, tmp_path / "index")
    scores = index.score(QUERIES)
    for begin in (index.append, lambda texts: CandidateIndex.build(model, texts, tmp_path / "index")):
        with pytest.raises(KeyboardInterrupt):
            begin(stopped())
        index = CandidateIndex.open(tmp_path / "index", model)
        np.testing.assert_array_equal(index.score(QUERIES), scores)
    (tmp_path / "index" / "vectors.bin").open("ab").write(b"left by a kill")
    index.append(["one more"])
    index = CandidateIndex.open(tmp_path / "index", model)
    assert index.text(23) == "one more"
    np.testing.assert_allclose(
        index.score(QUERIES)[:, 23], pair_scores(model, QUERIES, ["one more"])[:, 0, 0], rtol=1e-4
    )


def test_another_models_index_is_refused(student, tmp_path):
    CandidateIndex.build(student(), CANDIDATES, tmp_path / "index")
    CandidateIndex.open(tmp_path / "index", student())
    other = student()
    with torch.no_grad():
        other.network.siamese_head.fc_layers[0].bias[0] += 1e-3
    with pytest.raises(InputError, match="another model"):
        CandidateIndex.open(tmp_path / "index", other)


@pytest.mark.parametrize("file", ["vectors.bin", "ends.bin", "texts.bin", "index.json"])
def test_a_changed_byte_is_found(student, tmp_path, file):
    """Each byte in turn of the small files, some of the big one."""
    model = student()
    CandidateIndex.build(model, CANDIDATES, tmp_path / "index")
    path = tmp_path / "index" / file
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"index|build it anew"):
            CandidateIndex.open(tmp_path / "index", model).search(QUERIES, 23)
    path.write_bytes(whole[:-2])
    with pytest.raises(InputError, match=f"{file}"):
        CandidateIndex.open(tmp_path / "index", model)
    path.unlink()
    with pytest.raises(InputError, match=f"{file}"):
        CandidateIndex.open(tmp_path / "index", model)


def test_other_folders_are_not_overwritten(student, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for place, message in ((tmp_path, "holds other files"), (tmp_path / "notes.txt", "is a file")):
        with pytest.raises(InputError, match=message):
            CandidateIndex.build(student(), CANDIDATES, place)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_embeddings_that_are_there_already(student):
    model = student()
    parts = [(model.encode(CANDIDATES[a:b]), CANDIDATES[a:b]) for a, b in ((0, 9), (9, 23))]
    index = CandidateIndex.from_embeddings(model, iter(parts))
    np.testing.assert_allclose(index.score(QUERIES), CandidateIndex.build(model, CANDIDATES).score(QUERIES), rtol=1e-4)
    assert [index.text(row) for row in range(23)] == CANDIDATES
    with pytest.raises(ValueError, match="expected"):
        CandidateIndex.from_embeddings(model, [(parts[0][0], CANDIDATES[:8])])


def test_a_users_index_json_is_not_taken_for_ours(student, tmp_path):
    (tmp_path / "index.json").write_text('{"name": "my site"}')
    with pytest.raises(InputError, match=r"holds other files \(index\.json\)"):
        CandidateIndex.build(student(), CANDIDATES, tmp_path)
    index = CandidateIndex.build(student(), CANDIDATES, tmp_path / "ours")
    (tmp_path / "ours" / "candidates.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(candidates\.txt\)"):
        index.save(tmp_path / "ours")


def test_an_append_meets_a_rebuild(student, tmp_path, monkeypatch):
    """While candidates are appended another index is built at the same place: it waits, and is whole."""
    model, built, asked = student(), [], threading.Event()

    class Lock(FileLock):
        def __enter__(self):
            if threading.current_thread() is other:
                asked.set()
            return super().__enter__()

    def rebuild() -> None:
        built.append(CandidateIndex.build(model, CANDIDATES[:3], tmp_path / "index"))

    other = threading.Thread(target=rebuild)

    def slowly():
        yield CANDIDATES[0]
        other.start()
        while other.is_alive() and not asked.wait(0.01):
            pass
        other.join(timeout=0.2)
        assert other.is_alive(), "the rebuild did not wait"
        yield CANDIDATES[1]

    index = CandidateIndex.build(model, CANDIDATES, tmp_path / "index")
    monkeypatch.setattr(index_files, "FileLock", Lock)
    index.append(slowly())
    assert len(index) == 25
    other.join()
    again = CandidateIndex.open(tmp_path / "index", model)
    assert len(again) == len(built[0]) == 3
    assert [again.text(row) for row in range(3)] == CANDIDATES[:3]


def test_what_is_no_list_of_texts(student, tmp_path):
    model = student()
    with pytest.raises(TypeError, match="got str, expected a list of strings"):
        CandidateIndex.build(model, "candidates.txt")
    with pytest.raises(TypeError, match="number 20: got int"):
        CandidateIndex.build(model, [*CANDIDATES[:20], 3])


def test_numbers_that_are_not_finite_are_not_stored(student, tmp_path):
    model = student()
    vectors = np.full((1, model.network.config.embedding_size), 70_000.0, np.float32)
    assert len(CandidateIndex.from_embeddings(model, [(vectors, ["a"])])) == 1
    for spoiled, dtype in ((vectors, "float16"), (vectors * np.nan, "float32")):
        with pytest.raises(InputError, match="NaN, infinite numbers or, for float16"):
            CandidateIndex.from_embeddings(model, [(spoiled, ["a"])], tmp_path / "index", dtype)
    assert not (tmp_path / "index").exists()


def test_an_index_larger_than_memory_opens(student, tmp_path):
    """As many vectors as memory does not hold, in a file with holes."""
    model = student()
    index = CandidateIndex.build(model, CANDIDATES[:1], tmp_path / "index")
    rows = (3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // (4 * index.width)
    os.truncate(tmp_path / "index" / "vectors.bin", 4 * rows * index.width)
    content = index_files._read_content(tmp_path / "index")
    mapped = {**content, "count": rows, "text_bytes": 0}
    with open(tmp_path / "index" / "ends.bin", "ab") as file:
        file.truncate(8 * rows)
    opened = CandidateIndex(model, index_files.IndexFiles(tmp_path / "index", mapped))
    assert len(opened.vectors(rows - 1, rows)) == 1


def test_append_goes_on_from_what_another_process_appended(student, tmp_path):
    model = student()
    CandidateIndex.build(model, CANDIDATES, tmp_path / "index")
    one, other = (CandidateIndex.open(tmp_path / "index", model) for _ in range(2))
    one.append(["first", "second"])
    other.append(["third"])
    again = CandidateIndex.open(tmp_path / "index", model)
    for index in (other, again):
        assert [index.text(row) for row in range(len(index))] == [*CANDIDATES, "first", "second", "third"]
        np.testing.assert_allclose(
            index.score(QUERIES)[:, 23:],
            pair_scores(model, QUERIES, ["first", "second", "third"])[..., 0],
            rtol=1e-4,
            atol=1e-5,
        )


def test_append_counts_what_was_appended_while_it_waited_for_the_lock(student, tmp_path, monkeypatch):
    model = student()
    index = CandidateIndex.build(model, CANDIDATES, tmp_path / "index")
    other = CandidateIndex.open(tmp_path / "index", model)

    class TakenByAnother(FileLock):
        """Another append, which has the lock, ends before this one gets it."""

        def __enter__(self):
            monkeypatch.setattr(index_files, "FileLock", FileLock)
            other.append(["theirs"])
            return super().__enter__()

    monkeypatch.setattr(index_files, "FileLock", TakenByAnother)
    index.append(["mine"])
    again = CandidateIndex.open(tmp_path / "index", model)
    assert [again.text(row) for row in range(len(again))] == [*CANDIDATES, "theirs", "mine"]


def test_nothing_is_appended_to_another_models_index(student, tmp_path):
    index = CandidateIndex.build(student(), CANDIDATES, tmp_path / "index")
    other = student()
    with torch.no_grad():
        other.network.siamese_head.fc_layers[0].bias[0] += 1e-3
    CandidateIndex.build(other, CANDIDATES[:3], tmp_path / "index")
    with pytest.raises(InputError, match="another model"):
        index.append(["more"])
    assert len(CandidateIndex.open(tmp_path / "index", other)) == 3


def test_append_waits_for_another_one(student, tmp_path, monkeypatch):
    index = CandidateIndex.build(student(), CANDIDATES, tmp_path / "index")
    monkeypatch.setattr(index_files, "FileLock", partial(FileLock, timeout=0))  # waits no longer than that
    with FileLock(tmp_path / "index" / ".lock"), pytest.raises(Timeout):
        index.append(["more"])
    index.append(["more"])
    assert len(CandidateIndex.open(tmp_path / "index", index.model)) == 24


def test_a_lock_counts_in_the_folder_that_is_there(tmp_path, monkeypatch):
    """Another folder takes the place while one waits for the lock."""
    folder, taken = tmp_path / "index", []
    folder.mkdir()

    class Lock:
        def __init__(self, path):
            self.folder = path.parent

        def __enter__(self):
            taken.append(self.folder.stat().st_ino)
            if len(taken) == 1:
                self.folder.rename(tmp_path / "old")
                self.folder.mkdir()

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(index_files, "FileLock", Lock)
    with index_files._locked(folder):
        assert len(taken) == 2
        assert taken[1] == folder.stat().st_ino


def test_a_file_that_cannot_be_opened_is_not_called_truncated(student, tmp_path, monkeypatch):
    CandidateIndex.build(student(), CANDIDATES, tmp_path / "index")

    def too_many(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(index_files, "open", too_many, raising=False)
    with pytest.raises(InputError, match=r"vectors\.bin: cannot be read \(Too many open files\)"):
        CandidateIndex.open(tmp_path / "index", student())


def test_embeddings_as_tensors_are_stored_too(student):
    model = student()
    parts = [(model.encode(CANDIDATES[:2], convert_to="tensor"), CANDIDATES[:2])]
    assert len(CandidateIndex.from_embeddings(model, parts)) == 2
