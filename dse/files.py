"""Refusals, hashes, and files that are written whole or not at all.

Every file that outlives a process (caches, logits, checkpoints, results) goes through `write_whole`: the bytes
go to a hidden neighbour, are flushed, and only then take the name. A model's folder does so file by file.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


class InputError(Exception):
    """The user's input cannot be used. The message is one line: what is wrong, what was expected, how to mend it."""


def one_line(error: BaseException) -> str:
    """An exception in one line: its kind and the first line of what it says."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place once the block ends without an error.

    Whatever stood at `path` stays untouched until then, and for good when the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole."""
    with write_whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def check_file(path: str | Path, flag: str, hint: str) -> None:
    """Raise InputError unless `path` is a file; `hint` says where it comes from."""
    if not Path(path).is_file():
        raise InputError(f"{flag}: there is no file {path}; {hint}")


def check_writable(folder: str | Path, flag: str) -> None:
    """Raise InputError unless files can be made in `folder` (or, where it does not exist yet, in its nearest parent).

    Tried rather than asked: permission bits say nothing about read-only mounts or root.
    """
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"{flag}: cannot write in {folder} ({error.strerror}): name a folder that can be written"
        ) from error


def load_tensors(path: str | Path, refusal: str) -> Any:
    """What torch.save wrote, on the CPU, no objects unpickled. Raises InputError(refusal) for anything else."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # it raises many kinds for a spoiled or foreign file
        raise InputError(refusal) from error


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object; `what` names the file's role in the error message."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read {what} ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: {what} is no valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: {what} must be a JSON object, found a {type(value).__name__}")
    return value


@contextlib.contextmanager
def write_folder_whole(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; its files move into `folder` once the block ends without an error.

    Other files in `folder` stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as beside:
        yield Path(beside)
        for path in sorted(Path(beside).iterdir()):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            path.replace(folder / path.name)


@contextlib.contextmanager
def replace_folder(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which takes its place as a whole once the block ends without an error."""
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    old = beside.with_suffix(".old")
    try:
        yield beside
        for path in beside.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)


def utc_stamp() -> str:
    """Now, as it stands in file names."""
    return datetime.now(UTC).strftime("%Y_%m_%d-%H_%M_%S")
