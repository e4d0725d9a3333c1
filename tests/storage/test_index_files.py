"""Files of an index: whole, spoiled, locked, or replaced while they are read."""

import errno
import os
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout
from helpers import CANDIDATES, QUERIES, pair_scores
from processes import ended, start

from dse.index import CandidateIndex
from dse.storage import index_files
from dse.storage.index_files import IndexFiles
from dse.system.errors import InputError

pytestmark = pytest.mark.usefixtures("small_blocks")


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


@pytest.mark.parametrize("file", ["vectors.bin", "ends.bin", "texts.bin", "id_ends.bin", "ids.bin", "index.json"])
def test_a_changed_byte_is_found(student, tmp_path, file):
    """Each byte in turn of the small files, some of the big one."""
    model = student()
    CandidateIndex.build(model, CANDIDATES, tmp_path / "index", ids=CANDIDATES[::-1])
    path = tmp_path / "index" / file
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(InputError, match=r"index|build it again"):
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


def test_a_users_index_json_is_not_taken_for_ours(student, tmp_path):
    (tmp_path / "index.json").write_text('{"name": "my site"}')
    with pytest.raises(InputError, match=r"holds other files \(index\.json\)"):
        CandidateIndex.build(student(), CANDIDATES, tmp_path)
    index = CandidateIndex.build(student(), CANDIDATES, tmp_path / "ours")
    (tmp_path / "ours" / "candidates.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(candidates\.txt\)"):
        index.save(tmp_path / "ours")


@pytest.mark.parametrize("saved", [False, True])
def test_an_append_meets_a_rebuild(student, tmp_path, monkeypatch, saved):
    """While candidates are appended another index is built at, or saved to, the same place: it waits, and is whole."""
    model, asked = student(), threading.Event()
    few = CandidateIndex.build(model, CANDIDATES[:3])

    class Lock(FileLock):
        def __enter__(self):
            if threading.current_thread() is other:
                asked.set()
            return super().__enter__()

    def rebuild() -> None:
        if saved:
            few.save(tmp_path / "index")
        else:
            CandidateIndex.build(model, CANDIDATES[:3], tmp_path / "index")

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
    assert len(again) == 3
    np.testing.assert_array_equal(again.score(QUERIES), few.score(QUERIES))
    assert [again.text(row) for row in range(3)] == CANDIDATES[:3]


def test_an_index_larger_than_memory_opens(student, tmp_path):
    """As many vectors as memory does not hold, in a file with holes."""
    model = student()
    index = CandidateIndex.build(model, CANDIDATES[:1], tmp_path / "index")
    rows = (3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // (4 * index.width)
    os.truncate(tmp_path / "index" / "vectors.bin", 4 * rows * index.width)
    content = index_files._read_content(tmp_path / "index")
    mapped = {**content, "count": rows, "text_bytes": 0}
    for name, size in (("ends.bin", 8), ("directions.bin", content["top"]), ("factors.bin", 4)):
        os.truncate(tmp_path / "index" / name, size * rows)
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


def dead_part(folder: Path, name: str) -> Path:
    """What a killed process left of a file."""
    part = folder / f".{name}.{2**22 + 1}.part"
    part.write_bytes(b"half")
    return part


def test_what_a_kill_left_of_index_json_blocks_nothing(student, tmp_path):
    model, folder = student(), tmp_path / "index"
    CandidateIndex.build(model, ["one", "two"], folder)
    part = dead_part(folder, "index.json")
    CandidateIndex.open(folder, model).append(["three"])
    assert not part.exists()
    dead_part(folder, "index.json")
    assert len(CandidateIndex.build(model, ["one"], folder)) == 1
    assert not list(folder.glob(".*.part"))
    mine = dead_part(folder, "notes.txt")
    with pytest.raises(InputError, match=r"holds other files \(\.notes"):
        CandidateIndex.build(model, ["one"], folder)
    assert mine.exists()


def test_an_index_that_is_replaced_while_it_is_opened(student, tmp_path, monkeypatch):
    """By a smaller and by a larger one, between index.json and each of the files: all of it is of one index."""
    model, folder = student(), tmp_path / "index"
    read, calls = index_files._read_content, []
    CandidateIndex.build(model, ["one", "two", "three"], folder)
    for texts in (["a"], ["b", "c"] * 5):

        def replaced(place, texts=texts):
            content = read(place)
            if not calls:
                calls.append(1)
                CandidateIndex.build(model, texts, folder)
            return content

        calls.clear()
        monkeypatch.setattr(index_files, "_read_content", replaced)
        opened = CandidateIndex.open(folder, model)
        assert [opened.text(row) for row in range(len(opened))] == texts
    monkeypatch.setattr(index_files, "_read_content", read)
    (folder / "texts.bin").unlink()
    with pytest.raises(InputError, match=r"texts\.bin: missing or truncated"):
        CandidateIndex.open(folder, model)


def test_an_open_index_stays_what_it_was(student, tmp_path):
    """One that was built or opened, while others take its place; so does what it saves elsewhere."""
    model, folder = student(), tmp_path / "index"
    built = CandidateIndex.build(model, ["one", "two"], folder)
    opened = CandidateIndex.open(folder, model)
    CandidateIndex.build(model, ["other"] * 7, folder)
    opened.save(tmp_path / "saved")
    for one in (built, opened, CandidateIndex.open(tmp_path / "saved", model)):
        assert sorted(hit.text for hit in one.search("one", 9)) == ["one", "two"]


def parts_of(texts: list[str]):
    """Parts of two rows, whose ids and embeddings follow from their texts."""
    for first in range(0, len(texts), 2):
        some = texts[first : first + 2]
        yield np.array([[float(text)] * 4 for text in some]), some, [f"id of {text}" for text in some]


def write_rows(folder: str, append: bool, texts: list[str]) -> None:
    index_files.BLOCK = 5  # in another process, too
    if append:
        IndexFiles.open(Path(folder)).append("a model", parts_of(texts))
    else:
        IndexFiles.create(Path(folder), "a model", 4, "float32", parts_of(texts))


@pytest.mark.parametrize("append", [False, True])
def test_a_kill_leaves_the_old_index_or_the_new_one(append, tmp_path):
    """Killed at ten moments: texts, ids and embeddings are those of one of the two, and of the same."""
    folder, log = tmp_path / "index", tmp_path / "log"
    old, more = ([str(number) for number in numbers] for numbers in (range(11), range(100, 160)))
    new = old + more if append else more
    write_rows(folder, False, old)
    for _ in range(2):  # the first one starts the server, too
        began, found = time.monotonic(), list[bool]()
        ended(start(write_rows, str(folder), append, more, log=log), log)
        seconds = time.monotonic() - began
    for moment in range(10):
        write_rows(folder, False, old)
        process = start(write_rows, str(folder), append, more, log=log)
        time.sleep(seconds * moment / 8)
        process.kill()
        process.join()
        files = IndexFiles.open(folder)
        texts, ids = ([files.string(row, kind) for row in range(len(files))] for kind in ("text", "id"))
        assert texts in (old, new)
        assert ids == [f"id of {text}" for text in texts]
        assert files.rows(np.arange(len(files)))[:, 3].tolist() == [float(text) for text in texts]
        found.append(texts == new)
    assert found[0] is False
