"""Refusals, hashes, and files that are written whole or not at all.

Every file that outlives a process (caches, logits, checkpoints, results) goes through `atomic_write`: the bytes
go to a hidden neighbour, are flushed, and only then take the name. A folder of ours changes places with its
successor in one step (`replace_folder`); where files of others may lie in it too, it does so file by file.

Files of tensors (`save_tensors`) are torch's zip archives, whose comment is the SHA-256 of all that stands before it:
torch itself compares no checksums, and would give other numbers for a flipped bit.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dse.system import signals
from dse.system.errors import InputError, RunError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and fs.h
_STALE_SECONDS = 3600
_PART = re.compile(r"\.(.+)\.(\d+)\.part")  # of a name, and of the process that writes it
_SEAL = re.compile(rb"dse-sha256:([0-9a-f]{64})")
_SEAL_BYTES = 75


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place once the block ends without an error.

    Whatever stood at `path` stays untouched until then, and for good when the block raises. Raises RunError where the
    disk refuses (full, read-only, gone).
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_parts(path.parent, glob.escape(path.name))
        try:
            yield beside
            _flush(beside)
            beside.replace(path)
            _flush(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk; a file with the rights that new files have."""
    is_file = path.is_file()
    if is_file:
        os.umask(mask := os.umask(0o077))
        path.chmod(0o666 & ~mask)  # safetensors' are for the owner alone
    with contextlib.nullcontext() if is_file else contextlib.suppress(OSError):  # not every system flushes folders
        handle = os.open(path, os.O_RDWR if is_file else os.O_RDONLY)  # nor what is open for reading
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise RunError for a write to `path` that the disk refuses, in whatever words the writer says so."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            why = error.strerror or _words(error)
        elif type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in str(error):
            why = _words(error)
        else:
            raise
        raise RunError(
            f"{path}: cannot be written ({why}; {_room(path)}); what stood there before is untouched. "
            "Make room or give another place, and run the same command again"
        ) from error


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _room(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB are free there"
    except OSError:
        return "its folder is gone"


def remove_stale_parts(folder: Path, name: str, seconds: float = _STALE_SECONDS) -> None:
    """Remove what processes that were killed left of writing files of that name, a glob pattern, in a folder.

    Args:
        seconds: how old it must be, for it may be another machine's process that is writing; 0 where only this one
            may. Those of another process that runs here stay in any case.
    """
    for part in folder.glob(f".{name}.*.part"):
        match = _PART.fullmatch(part.name)
        with contextlib.suppress(OSError):
            # In a container a process that is started again often has the number of the one before.
            runs = match and Path(f"/proc/{match[2]}").exists() and not (seconds == 0 and match[2] == str(os.getpid()))
            if match and not runs and time.time() - part.stat().st_mtime >= seconds:
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def json_text(value: Any, **options: Any) -> str:
    """JSON of a value; NaN and infinities, which JSON lacks, become null. Options are json.dumps's."""
    return json.dumps(without_nan(value), allow_nan=False, **options)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file whole, for people to read; NaN and infinities become null."""
    write_text(path, json_text(value, indent=2) + "\n")


def without_nan(value: Any) -> Any:
    """The same for JSON: NaN and infinities become None."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_file(path: str | Path, flag: str, hint: str) -> None:
    """Raise InputError unless `path` is a file; `hint` says where it comes from."""
    if not Path(path).is_file():
        raise InputError(f"{flag}: there is no file {path}; {hint}")


def check_name(path: str | Path, flag: str) -> None:
    """Raise InputError unless a file can have that path, and its hidden neighbour, to which it is written first.

    A name must be UTF-8, since it is told in files that are, and not too long, which is tried.
    """
    path = Path(path).absolute()
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{flag}: {str(path)!a} is not valid UTF-8: give a path that is") from error
    hidden, existing = path.parent / f".{path.name}.{2**22}.part", _nearest(path)
    for place in (*(existing / part for part in hidden.parts[1:]), hidden):
        try:
            place.lstat()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise InputError(
                    f"{flag}: {place.name[:50]}... is too long for a file's name, or its path is: it has "
                    f"{len(os.fsencode(place.name))} bytes with what this program adds; give shorter names"
                ) from error


def _nearest(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    while not os.path.exists(path) and path != path.parent:  # noqa: PTH110 (Path's raises for long names)
        path = path.parent
    return path


def check_writable(folder: str | Path, flag: str, name: str = "x") -> None:
    """Raise InputError unless files can be made in `folder` (or, where it does not exist yet, in its nearest parent).

    Tried rather than asked: permission bits say nothing about read-only mounts or root.

    Args:
        name: the longest that a file there will have.
    """
    check_name(Path(folder) / name, flag)
    try:
        with tempfile.TemporaryFile(dir=_nearest(Path(folder).absolute())):
            pass
    except OSError as error:
        raise InputError(
            f"{flag}: cannot write in {folder} ({error.strerror}): name a folder that can be written"
        ) from error


def check_output_file(path: str | Path, flag: str) -> None:
    """Raise InputError unless a file can be written at `path`, which is not a folder."""
    if os.path.isdir(path):  # noqa: PTH112 (Path's raises for long names)
        raise InputError(f"{flag}: {path} is a folder; name a file")
    check_writable(Path(path).parent, flag, Path(path).name)


def save_tensors(path: str | Path, value: Any) -> None:
    """torch.save to a file, whole, with its SHA-256 at its end."""
    import torch

    with atomic_write(path) as beside, open(beside, "wb+") as file:
        torch.save(value, file)  # given a name, it would write that into the file
        file.seek(-2, os.SEEK_END)  # a zip archive ends with the length of its comment
        file.write(_SEAL_BYTES.to_bytes(2, "little"))
        file.seek(0)
        seal = b"dse-sha256:" + hashlib.file_digest(file, "sha256").hexdigest().encode()
        file.seek(0, os.SEEK_END)
        file.write(seal)


def check_ours(folder: Path, what: str, main: str, form: str, known: set[str]) -> None:
    """Raise InputError when a folder to be replaced is a file, or holds other things than an earlier one of its kind.

    Args:
        what: names the folder's role in the error.
        main: its JSON file, whose `format` must be `form`.
        known: the names that its files may have.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{what}: {folder} is a file; name a folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names -= {name for name in names if (part := _PART.fullmatch(name)) and part[1] in known}  # left by a kill
    others = names - known
    if others or (names and read_json(folder / main, "what the folder holds").get("format") != form):
        raise InputError(
            f"{what}: {folder} holds other files ({', '.join(sorted(others or names)[:3])}); name a new folder, or "
            f"one that holds a {form} alone"
        )


def load_tensors(path: str | Path, refusal: str) -> Any:
    """What torch.save wrote, on the CPU, no objects unpickled, after comparing its checksums.

    Raises InputError(refusal) for anything else, spoiled bytes included. A file of another program has no SHA-256; if
    it is an archive, its CRCs are compared, which see a flipped bit of a tensor too.
    """
    import torch

    try:
        if not _is_sound(Path(path)):
            raise ValueError("spoiled")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # it raises many kinds for a spoiled or foreign file
        raise InputError(refusal) from error


def _is_sound(path: Path) -> bool:
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _SEAL_BYTES))
        seal = _SEAL.fullmatch(file.read())
        if seal is None:
            if not zipfile.is_zipfile(path):
                return True  # torch's format of before 1.6, or nothing that torch reads
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        digest, left = hashlib.sha256(), size - _SEAL_BYTES
        file.seek(0)
        while left and (some := file.read(min(left, 1 << 20))):
            digest.update(some)
            left -= len(some)
    return digest.hexdigest().encode() == seal.group(1)


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object, with a byte-order mark or without; `what` names the file's role in the error message."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot read {what} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {what} is no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: {what} must be a JSON object, found a {type(value).__name__}")
    return value


@contextlib.contextmanager
def write_folder_whole(folder: str | Path, last: str = "") -> Iterator[Path]:
    """Yield an empty folder within `folder`; its files move up once the block ends without an error, `last` at last.

    Other files in `folder` stay. Raises RunError where the disk refuses. A signal waits until all have moved; a death
    in that moment leaves new files beside old ones.
    """
    folder = Path(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale_parts(folder, "folder", 0.0)  # nothing else writes a model's folder meanwhile
        beside = folder / f".folder.{os.getpid()}.part"
        beside.mkdir()
        try:
            yield beside
            made = sorted(beside.iterdir(), key=lambda path: (path.name == last, path.name))
            for path in made:
                _flush(path)
            with signals.deferred():
                for path in made:
                    path.replace(folder / path.name)
            signals.check()
            _flush(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def replace_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which takes its place as a whole once the block ends without an error.

    Raises RunError where the disk refuses.
    """
    folder = Path(folder).resolve()
    if os.path.ismount(folder):
        raise InputError(f"{folder} is a mount point, which cannot be replaced as a whole: name a folder in it")
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_parts(folder.parent, glob.escape(folder.name))
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            yield beside
            for path in beside.iterdir():
                _flush(path)
            if not (folder.exists() and _exchange(beside, folder)):
                _rename_over(beside, folder)
            _flush(folder.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Have two folders change places, which Linux does in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _rename_over(beside: Path, folder: Path) -> None:
    """Two renames; a death between them leaves the old folder, whole, under its hidden name."""
    old = beside.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def utc_stamp() -> str:
    """Now, as it stands in file names."""
    return datetime.now(UTC).strftime("%Y_%m_%d-%H_%M_%S")


def same_value(one: Any, other: Any) -> bool:
    """Are two values of a flag the same? Paths may be spelled with or without a slash at the end."""
    if isinstance(one, str) and isinstance(other, str) and one and other:
        return os.path.normpath(one) == os.path.normpath(other)
    return one == other
