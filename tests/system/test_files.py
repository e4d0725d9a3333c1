"""Files are whole or not there; names that are too long, disks that refuse."""

import errno
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dse.index import CandidateIndex
from dse.storage.states import States
from dse.system import files, libc
from dse.system.errors import InputError, RunError
from dse.system.files import json_text


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("[enforce] PytorchStreamWriter")]
)
def test_a_write_that_the_disk_refuses(error, tmp_path):
    (tmp_path / "x").write_text("old")
    for write in (files.atomic_write, files.write_folder_whole, files.replace_folder):
        place = tmp_path / ("x" if write is files.atomic_write else "folder")
        with pytest.raises(RunError, match=r"cannot be written \((No space|\[enforce\])"), write(place):
            raise error
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*.part")] == []


def test_bytes_are_flushed_before_a_name_is_given(tmp_path, monkeypatch):
    events, replace = [], Path.replace
    monkeypatch.setattr(files, "_flush", lambda path: events.append(("flush", path.name)))
    monkeypatch.setattr(Path, "replace", lambda *paths: events.append(("rename", paths[0].name)) or replace(*paths))
    files.write_text(tmp_path / "x", "text")
    part = f".x.{os.getpid()}.part"
    assert events == [("flush", part), ("rename", part), ("flush", tmp_path.name)]
    events.clear()
    with files.write_folder_whole(tmp_path / "folder", last="a") as beside:
        for name in "abc":
            (beside / name).write_text(name)
    assert events == [*(("flush", name) for name in "bca"), *(("rename", name) for name in "bca"), ("flush", "folder")]


def test_parts_that_killed_processes_left_are_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    old, young, living, other = (
        tmp_path / f".{name}.{pid}.part"
        for name, pid in (("x", dead.pid), ("x", dead.pid + 2**22), ("x", os.getpid() + 0), ("y", dead.pid))
    )
    for path in (old, living, other):
        path.write_text("")
        os.utime(path, (0, 0))
    young.write_text("")
    files.remove_stale_parts(tmp_path, "x")
    assert [path.exists() for path in (old, young, living, other)] == [False, True, True, True]
    left = tmp_path / "states" / f".x_state_epoch_0_update_2.pt.{dead.pid}.part"
    left.parent.mkdir()
    left.write_text("")
    (left.parent / f".x_state_epoch_0_update_4.pt.{os.getpid()}.part").write_text("")  # of one with our number
    with files.write_folder_whole(tmp_path / "teacher") as beside:
        (beside / "a").write_text("")
        killed = shutil.copytree(beside, tmp_path / "killed")
    killed.rename(beside)  # as if the process before, with our number, had been killed in it
    with files.write_folder_whole(tmp_path / "teacher") as beside:
        assert not list(beside.iterdir())
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == ["a"]
    States(left.parent, "x", own=True).finish()
    assert not left.parent.exists()


def test_a_folder_changes_places_with_its_successor(tmp_path, monkeypatch):
    """In one step where the system can, in two where it cannot; a successor that cannot come leaves the old one."""
    for private in (True, False):
        monkeypatch.setattr(libc, "PRIVATE", private)
        for content in ("one", "two"):
            with files.replace_folder(tmp_path / "folder") as beside:
                (beside / "file").write_text(content)
        assert (tmp_path / "folder" / "file").read_text() == "two"
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]
        shutil.rmtree(tmp_path / "folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    (tmp_path / "beside").mkdir()
    assert not libc.exchange(tmp_path / "folder", tmp_path / "beside")
    with pytest.raises(FileNotFoundError):
        files._rename_over(tmp_path / "nothing", tmp_path / "folder")
    assert (tmp_path / "folder" / "file").read_text() == "old"


def test_a_mount_point_is_refused_before_the_work(student, tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "mounted")
    with pytest.raises(InputError, match="is a mount point"):
        CandidateIndex.build(student(), iter(()), tmp_path / "mounted")


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with files.replace_folder(tmp_path / "link") as beside:
        (beside / "file").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"


def test_json_has_no_nan():
    assert json_text({"a": (float("nan"), 1.5), "b": [float("-inf")]}) == '{"a": [null, 1.5], "b": [null]}'


def test_systems_that_flush_no_folders_nor_what_is_open_for_reading(tmp_path, monkeypatch):
    """As Windows does it: folders cannot be opened, and a file's handle must be one for writing."""
    opened, flush, flushed = os.open, os.fsync, []

    def open_file(path, flags, *args, **options):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *args, **options)

    def flush_written(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(handle)
        flush(handle)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", flush_written)
    files.write_text(tmp_path / "x", "text")
    with files.write_folder_whole(tmp_path / "one") as beside:
        (beside / "y").write_text("text")
    with files.replace_folder(tmp_path / "two") as beside:
        (beside / "z").write_text("text")
    assert [path.read_text() for path in (tmp_path / "x", tmp_path / "one/y", tmp_path / "two/z")] == ["text"] * 3
    assert len(flushed) == 3
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(RunError, match="Input/output error"):  # of a file it still counts
        files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "text"


def test_the_longest_names_that_can_be(tmp_path):
    """The hidden neighbour has 14 bytes more: `.`, `.4194304` and `.part`."""
    name = "n" * (255 - 14)
    files.check_writable(tmp_path, "--x", name)
    files.write_text(tmp_path / name, "text")
    with pytest.raises(InputError, match=r"--x: \.nn"):
        files.check_writable(tmp_path, "--x", f"{name}n")


def test_a_users_own_part_is_not_ours(tmp_path):
    mine = tmp_path / ".chapter.first.part"
    mine.write_text("mine")
    os.utime(mine, (0, 0))
    files.remove_stale_parts(tmp_path, "*", 0.0)
    assert mine.exists()


def test_a_names_limit_is_told_in_bytes(tmp_path):
    """130 letters of two bytes, and 14 of the hidden neighbour: a dot before, `.4194304.part` after."""
    with pytest.raises(InputError, match="the name has 274 bytes, including what this program adds"):
        files.check_name(tmp_path / ("é" * 130), "--output_dir")
    files.check_name(tmp_path / ("e" * 130), "--output_dir")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_write(tmp_path / "file") as beside:
        beside.write_text("ne")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_whose_name_is_not_utf8(tmp_path, monkeypatch):
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    monkeypatch.chdir(tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(InputError, match=r"--x: .*is not valid UTF-8"):
        files.check_writable("here", "--x")
