"""Checks of paths, hashes, JSON, and files that are written whole or not at all.

A file that outlives the process is written under a hidden name beside its own, flushed, and only then renamed.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dse.system import libc, signals
from dse.system.errors import InputError, RunError

_STALE_SECONDS = 3600
os.umask(_MASK := os.umask(0o077))  # asked for once, since to ask is to change it, for all threads
_PART = re.compile(r"\.(.+)\.(\d+)\.part")  # the file's name, and the number of the process that writes it


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a path; a file written there replaces `path` after the block. Raises RunError if the disk refuses it."""
    path = Path(path)
    with disk_errors(path), _neighbour(path) as beside:
        yield beside
        _flush(beside)
        beside.replace(path)
        _flush(path.parent)


@contextlib.contextmanager
def write_folder_whole(folder: str | Path, last: str = "") -> Iterator[Path]:
    """Yield an empty folder in `folder`. If the block ends without an error, its files move up, the file `last` last.

    Other files in `folder` stay. Raises RunError if the disk refuses a write. A signal waits until all files have
    moved; a kill in that moment leaves new files beside old ones.
    """
    folder = Path(folder)
    # 0 seconds: nothing else writes a model's folder meanwhile
    with disk_errors(folder), _neighbour(folder / "folder", seconds=0.0) as beside:
        beside.mkdir()
        yield beside
        for path in (made := sorted(beside.iterdir(), key=lambda path: (path.name == last, path.name))):
            _flush(path)
        with signals.deferred():
            for path in made:
                path.replace(folder / path.name)
        signals.check()
        _flush(folder)


@contextlib.contextmanager
def replace_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder, which replaces `folder` as a whole if the block ends without an error.

    Raises InputError for a mount point, RunError if the disk refuses a write.
    """
    folder = Path(folder).resolve()
    if os.path.ismount(folder):
        raise InputError(f"{folder} is a mount point, which cannot be replaced as a whole: give a folder in it")
    with disk_errors(folder), _neighbour(folder) as beside:
        beside.mkdir()
        yield beside
        for path in beside.iterdir():
            _flush(path)
        if not libc.exchange(beside, folder):  # nor can it where there is no folder yet
            _rename_over(beside, folder)
        _flush(folder.parent)


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
    _remove(old)


@contextlib.contextmanager
def _neighbour(path: Path, seconds: float = _STALE_SECONDS) -> Iterator[Path]:
    """Yield a hidden name beside `path` that nothing has, in a folder that is made; remove what is there at the end."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_parts(path.parent, glob.escape(path.name), seconds)
    _remove(beside)
    try:
        yield beside
    finally:
        _remove(beside)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def remove_stale_parts(folder: Path, name: str, seconds: float = _STALE_SECONDS) -> None:
    """Remove the hidden parts that killed processes left in a folder; `name`, a glob pattern, is that of the files.

    A part must be `seconds` old, since a process of another machine may be writing it; 0 if only this process writes
    there. Parts of another process that still runs on this machine always stay.
    """
    for part in folder.glob(f".{name}.*.part"):
        with contextlib.suppress(OSError):
            if match := _PART.fullmatch(part.name):
                # In a container a process that is started again often has the number of the one before.
                before = seconds == 0 and match[2] == str(os.getpid())
                if (before or not Path("/proc", match[2]).exists()) and time.time() - part.stat().st_mtime >= seconds:
                    _remove(part)


def _flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk; a file gets the permissions of a new file."""
    if is_file := path.is_file():
        path.chmod(0o666 & ~_MASK)  # safetensors makes files for the owner alone
    with contextlib.nullcontext() if is_file else contextlib.suppress(OSError):  # not every system flushes folders
        handle = os.open(path, os.O_RDWR if is_file else os.O_RDONLY)  # nor a file that is open for reading
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise RunError for a write to `path` that the disk refuses, whichever library reports it."""
    try:
        yield
    except Exception as error:
        of_library = type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in str(error)
        if not (isinstance(error, OSError) or of_library):
            raise
        why, room = getattr(error, "strerror", None) or " ".join(str(error).split())[:200], "its folder is gone"
        with contextlib.suppress(OSError):
            room = f"{shutil.disk_usage(path.parent).free / 2**20:,.0f} MiB are free there"
        mend = "Make room or give another path, and run the same command again"
        what = f"cannot be written ({why}; {room}); what was there before is untouched"
        raise RunError(f"{path}: {what}. {mend}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def json_text(value: Any, **options: Any) -> str:
    """JSON of a value; NaN and infinities, which JSON lacks, become null. The options are those of json.dumps."""
    return json.dumps(without_nan(value), **options)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file whole, for people to read; NaN and infinities become null."""
    write_text(path, json_text(value, indent=2) + "\n")


def without_nan(value: Any) -> Any:
    """A value as JSON holds it, in which None stands for NaN and infinities."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """A file's JSON object. Raises InputError, in which `what` names the file's role, for anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot read {what} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {what} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: {what} must be a JSON object, found a {type(value).__name__}")
    return value


def check_file(path: str | Path, flag: str, hint: str) -> None:
    """Raise InputError unless `path` is a file; `hint` says where it comes from."""
    if not Path(path).is_file():
        raise InputError(f"{flag}: there is no file {path}; {hint}")


def check_name(path: str | Path, flag: str) -> None:
    """Raise InputError unless the path is UTF-8, and short enough for a file and for the hidden one beside it.

    The system is asked about each name, since limits differ between file systems.
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
                size = f"{len(os.fsencode(place.name))} bytes, including what this program adds"
                what = f"{place.name[:50]}... is too long for a file's name, or its path is: the name has {size}"
                raise InputError(f"{flag}: {what}; give shorter names") from error


def _nearest(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(place for place in (path, *path.parents) if os.path.exists(place))  # noqa: PTH110 (long names raise)


def check_writable(folder: str | Path, flag: str, name: str = "x") -> None:
    """Raise InputError unless a file called `name` can be made in `folder`, or in its nearest parent that exists.

    A file is made to find out: permission bits say nothing about read-only mounts or root.
    """
    check_name(Path(folder) / name, flag)
    try:
        tempfile.TemporaryFile(dir=_nearest(Path(folder).absolute())).close()
    except OSError as error:
        what = f"cannot write in {folder} ({error.strerror})"
        raise InputError(f"{flag}: {what}: give a folder that can be written") from error


def check_output_file(path: str | Path, flag: str, used: Iterable[str | Path] = ()) -> None:
    """Raise InputError unless a file can be written at `path`. It must not be a folder, nor a file that is `used`."""
    check_writable(Path(path).parent, flag, Path(path).name)
    if os.path.realpath(path) in map(os.path.realpath, used):
        raise InputError(f"{flag}: {path} is an input of this command, or another flag's output; give another place")
    if Path(path).is_dir():
        raise InputError(f"{flag}: {path} is a folder; give a file")


def check_ours(folder: Path, what: str, main: str, form: str, known: set[str]) -> None:
    """Raise InputError unless a folder to be replaced is missing, empty, or an earlier one of the same kind.

    Its JSON file `main` must have the `format` `form`, and all its files' names must be `known`. `what` names its role.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{what}: {folder} is a file; give a folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names -= {name for name in names if (part := _PART.fullmatch(name)) and part[1] in known}  # left by a kill
    others = names - known
    if others or (names and read_json(folder / main, "what the folder holds").get("format") != form):
        found, mend = ", ".join(sorted(others or names)[:3]), f"give a new folder, or one that holds only a {form}"
        raise InputError(f"{what}: {folder} holds other files ({found}); {mend}")


def save_tensors(path: str | Path, value: Any) -> None:
    """Write a value with torch.save, as a zip archive, whole or not at all."""
    import torch

    with atomic_write(path) as beside, open(beside, "wb") as file:
        torch.save(value, file)  # torch writes a file's name, if it is given one, into the file


def load_tensors(path: str | Path, refusal: str) -> Any:
    """Load what torch.save wrote, on the CPU, without unpickling objects. CRCs are compared, which torch does not do.

    Raises InputError(refusal) for anything else, corrupt bytes included. torch's format before 1.6 has no CRCs.
    """
    import torch

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # 0x10 calls an entry a folder; for a tensor of that kind torch loads whatever the memory holds
                if archive.testzip() or any(entry.external_attr & 0x10 for entry in archive.infolist()):
                    raise ValueError("corrupt")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # it raises many kinds for a corrupt or foreign file
        raise InputError(refusal) from error


def utc_stamp() -> str:
    """The current UTC time, in the form used in file names."""
    return datetime.now(UTC).strftime("%Y_%m_%d-%H_%M_%S")


def same_value(one: Any, other: Any) -> bool:
    """Are two values of a flag the same? Paths may or may not end with a slash."""
    if isinstance(one, str) and isinstance(other, str) and one and other:
        return os.path.normpath(one) == os.path.normpath(other)
    return one == other
