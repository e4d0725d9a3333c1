"""The files of an index of candidates."""

import contextlib
import itertools
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from dse.system.errors import InputError
from dse.system.files import check_ours, json_text, read_json, sha256_json, write_text
from dse.system.text_files import checked_texts, elements

FORMAT, VERSION = "dse index", 1
INDEX = "index.json"
_LOCK = ".lock"  # held while an append writes, or another index takes the folder's place
_FILES = ("vectors.bin", "ends.bin", "texts.bin")
_KINDS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_ENDS = np.dtype("<i8")
BLOCK = 4096  # rows that are scored, and checked, at once
_ATTEMPTS = 5  # to open one that is replaced meanwhile


def _extend(folder: Path, content: dict[str, Any], parts: Iterable[tuple[np.ndarray, list[str]]]) -> None:
    """Write embeddings and texts behind what `content` counts, and count them in."""
    kind = _KINDS[content["dtype"]]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / name, "ab")) for name in _FILES]
        sizes = [_bytes(*shape) for shape in _shapes(content).values()]
        for file, size in zip(files, sizes, strict=True):
            file.truncate(size)  # what an append left that did not end
        for part in elements(parts, "parts", "a list of (embeddings, texts) parts"):
            if not (isinstance(part, tuple | list) and len(part) == 2):
                raise TypeError(
                    f"parts: got {type(part).__name__}, expected (embeddings, texts): [(E, texts)] is one part"
                )
            vectors, texts = np.asarray(part[0]), list(checked_texts(part[1], "parts, texts"))
            if vectors.shape != (len(texts), content["width"]):
                raise ValueError(f"embeddings: {vectors.shape}, expected {(len(texts), content['width'])}")
            encoded = [text.encode() for text in texts]
            ends = content["text_bytes"] + np.cumsum([len(text) for text in encoded], dtype=_ENDS)
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(vectors, dtype=kind)
            if not np.isfinite(stored).all():
                raise InputError(
                    f"{folder}: embeddings with NaN, infinite numbers or, for float16, numbers above 65504; "
                    "store float32, or train a sound student"
                )
            for some in _within_blocks(content["count"], len(texts)):
                pieces = (stored[some].tobytes(), ends[some].tobytes(), b"".join(encoded[some]))
                _count_in(content, some.stop - some.start, pieces)
                for file, piece in zip(files, pieces, strict=True):
                    file.write(piece)
        for file in files:
            file.flush()
            os.fsync(file.fileno())


def _within_blocks(count: int, more: int) -> list[slice]:
    """Rows `count` and on, cut where blocks end.

    >>> _within_blocks(BLOCK - 2, 5)
    [slice(0, 2, None), slice(2, 5, None)]
    """
    cuts = [0, *range(-count % BLOCK or BLOCK, more, BLOCK), more]
    return [slice(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def _count_in(content: dict[str, Any], rows: int, pieces: tuple[bytes, ...]) -> None:
    if content["count"] % BLOCK == 0:
        content["sums"].append([0] * len(_FILES))
    content["sums"][-1] = [zlib.crc32(piece, old) for piece, old in zip(pieces, content["sums"][-1], strict=True)]
    content["count"] += rows
    content["text_bytes"] += len(pieces[-1])


def _shapes(content: dict[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of each file."""
    count = content["count"]
    return {
        "vectors.bin": (_KINDS[content["dtype"]], (count, content["width"])),
        "ends.bin": (_ENDS, (count,)),
        "texts.bin": (np.dtype("u1"), (content["text_bytes"],)),
    }


def _bytes(kind: np.dtype, shape: tuple[int, ...]) -> int:
    return kind.itemsize * math.prod(shape)


def _write_content(folder: Path, content: dict[str, Any]) -> None:
    """Replace index.json: from then on what was written counts."""
    whole = {"format": FORMAT, "version": VERSION, **content}
    write_text(folder / INDEX, json_text({**whole, "sha256": sha256_json(whole)}) + "\n")


def _read_content(folder: Path) -> dict[str, Any]:
    """index.json. Raises InputError where it is missing, spoiled or another program's."""
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder}: no index of candidates ({INDEX} is missing); `python -m dse index` makes one")
    whole = read_json(folder / INDEX, "the index")
    if whole.get("format") != FORMAT or whole.get("version") != VERSION:
        raise InputError(
            f"{folder}: expected {FORMAT} {VERSION}, found {whole.get('format')} {whole.get('version')}; build it anew"
        )
    if whole.pop("sha256", None) != sha256_json(whole):
        raise InputError(f"{folder / INDEX}: spoiled (its hash differs); build the index anew")
    return {key: value for key, value in whole.items() if key not in ("format", "version")}


def _mapped(folder: Path, content: dict[str, Any]) -> list[np.ndarray]:
    """The files as far as `content` counts them. Raises InputError where they are missing or too short."""
    arrays = []
    for name, (kind, shape) in _shapes(content).items():
        try:
            with open(folder / name, "rb") as file:  # a map stays what it is when another file takes the name
                arrays.append(np.memmap(file, kind, "r", shape=shape) if math.prod(shape) else np.empty(shape, kind))
        except (FileNotFoundError, ValueError) as error:  # ValueError: the file is shorter
            raise InputError(f"{folder / name}: missing or truncated; build the index anew") from error
        except OSError as error:
            raise InputError(f"{folder / name}: cannot be read ({error.strerror})") from error
    return arrays


def _opened(folder: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """index.json and its files, mapped, of one index, also while others take its place."""
    for _ in range(_ATTEMPTS):
        before, refusal = _number(folder), None
        try:
            content = _read_content(folder)
            mapped = _mapped(folder, content)
        except InputError as error:
            refusal = error
        if _number(folder) == before:  # all of it was read from one folder
            if refusal is not None:
                raise refusal
            return content, mapped
    raise InputError(f"{folder}: is replaced all the time; open it when that has ended")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder that is there; another may take its place while one waits for the lock."""
    while True:
        before = _number(folder)
        with FileLock(folder / _LOCK):
            if _number(folder) == before:
                yield
                return


def _number(folder: Path) -> int | None:
    """What tells a folder from the one that took its place."""
    try:
        return folder.stat().st_ino
    except OSError:
        return None


def check_index_place(folder: Path, what: str) -> None:
    """Raise InputError when a folder to be written is a file, or holds something else than an index."""
    check_ours(folder, what, INDEX, FORMAT, {*_FILES, INDEX, _LOCK})
