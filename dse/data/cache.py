"""Caches of arrays, which are valid only while everything that they were made from is unchanged.

A cache is a safetensors file; its header says what it was made from, and holds the hash of its content.
"""

import contextlib
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dse.system.errors import InputError, RunError
from dse.system.files import atomic_write, check_writable

logger = logging.getLogger(__name__)
_HEADER = "dse_features"
_DTYPES: dict[str, Any] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


def cache_name(split: str, bert_name: str, max_seq_length: int, task_name: str, form: str) -> str:
    """The name of a cache beside the data, for when the user gives no path; the two forms have different names."""
    return f"{split}_{bert_name}_{max_seq_length}_{task_name}{'_separate' if form == 'separate' else ''}"


def check_cache_path(path: str | Path, form: str) -> None:
    """Raise InputError if a path that the user gave holds anything but a cache of that form, or is not writable."""
    path = Path(path)
    check_writable(path.parent, f"the feature cache {path}", path.name)
    if not path.exists():
        return
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the file of a feature cache, or a name for one")
    if (header := _read_header(path)) is None:
        what = "is not a feature cache of this project, so it is not overwritten"
        raise InputError(f"{path}: {what}; remove it or give another path")
    if (held := header.get("form")) != form:
        raise InputError(f"{path}: holds {held} features, but this stage needs {form} ones; give another path")


def _read_header(path: Path) -> dict[str, Any] | None:
    """What a cache says it was made from; None for a file that is not a whole cache."""
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(json.loads((file.metadata() or {})[_HEADER]))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError):
        return None


def read_cache(path: Path, made_from: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The arrays of a cache that was made from the same inputs; None, with a log line, for another or a corrupt one."""
    header = _read_header(path)
    if header and (changed := [key for key in made_from if header.get(key) != made_from[key]]):
        logger.info("feature cache %s was made with another %s; making it again", path, ", ".join(changed))
        return None
    with contextlib.suppress(Exception):  # a dtype that numpy lacks raises what the library trips over
        if header and _content_hash(arrays := _mapped(path)) == header.get("content"):
            return arrays
    logger.warning("feature cache %s is corrupt or of another program; making it again", path)
    return None


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a whole safetensors file, mapped from the disk: processes on one machine share them.

    The file begins with the header's length (8 bytes, little-endian) and the header, JSON with dtypes and places.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    arrays: dict[str, np.ndarray] = {}
    for name in entries.keys() - {"__metadata__"}:
        (begin, end), shape = entries[name]["data_offsets"], tuple(entries[name]["shape"])
        kind = _DTYPES[entries[name]["dtype"]]  # an array without elements cannot be mapped
        arrays[name] = np.memmap(path, kind, "r", 8 + length + begin, shape) if end > begin else np.empty(shape, kind)
    return arrays


def write_cache(path: Path, arrays: dict[str, np.ndarray], made_from: dict[str, Any], chosen: bool) -> None:
    """Write a cache whole. If that fails, raises RunError for a path that the user gave, and otherwise warns."""
    header = {**made_from, "content": _content_hash(arrays)}
    try:
        with atomic_write(path) as beside:
            save_file(arrays, beside, metadata={_HEADER: json.dumps(header)})
        logger.info("%s features stored in %s", made_from["form"], path)
    except RunError as error:
        if chosen:
            raise
        logger.warning("no feature cache is stored: %s", error)


def _content_hash(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
