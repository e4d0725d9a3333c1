"""The files of an index of candidates, independent of any model.

A folder holds vectors.bin (rows of float32 or float16, little-endian), ends.bin (int64: where each text ends),
texts.bin (UTF-8, end to end) and index.json: the model's hash, the number of rows, and a CRC-32 of each block of rows
in each file. A block is compared with its CRC when it is first read. Appending writes after what is there and then
replaces index.json, so a stop in between leaves the index as it was.
"""

import contextlib
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from filelock import FileLock

from dse.storage.folder_format import FolderFormat
from dse.system.errors import InputError
from dse.system.files import remove_stale_parts, replace_folder, write_text
from dse.system.text_files import checked_texts, elements

BLOCK = 4096  # rows that are scored, and checked, at once
_INDEX, _LOCK = "index.json", ".lock"  # locked while an append writes, or another index takes the folder's place
_FILES = VECTORS, _ENDS, _TEXTS = ("vectors.bin", "ends.bin", "texts.bin")
_DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_INT64 = np.dtype("<i8")
_ATTEMPTS = 5  # to open one that is replaced meanwhile
_FORMAT = FolderFormat(
    "index of candidates", "dse index", 1, _INDEX, (*_FILES, _LOCK), "build the index again with `python -m dse index`"
)
check_index_place, _read_content = _FORMAT.check_place, _FORMAT.read

Part = tuple[np.ndarray, list[str]]  # embeddings (n, width), and their n texts


class IndexFiles:
    """An index's files, memory-mapped: they keep their contents even if another index takes their place on the disk.

    `content` has the entries of index.json. Raises InputError if files are missing or too short.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder, self.content = folder, content
        self.arrays: dict[str, np.ndarray] = {}  # by file
        self._checked: set[tuple[int, str]] = set()  # the blocks that were compared, by first row and file
        for name, (dtype, shape) in _shapes(content).items():
            try:
                with open(folder / name, "rb") as file:  # a map stays what it is when another file takes the name
                    empty = 0 in shape
                    self.arrays[name] = np.empty(shape, dtype) if empty else np.memmap(file, dtype, "r", shape=shape)
            except (FileNotFoundError, ValueError) as error:  # ValueError: the file is shorter
                raise InputError(f"{folder / name}: missing or truncated; {_FORMAT.mend}") from error
            except OSError as error:
                raise InputError(f"{folder / name}: cannot be read ({error.strerror})") from error

    def __len__(self) -> int:
        return self.content["count"]

    @classmethod
    def create(cls, folder: Path, model: str, width: int, dtype: str, parts: Iterable[Part]) -> Self:
        """Write an index, whole or not at all. Raises InputError for a folder with other files, or NaN embeddings."""
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(_DTYPES)}")
        check_index_place(folder, str(folder))
        content = {"model": model, "dtype": dtype, "width": width, "count": 0, "text_bytes": 0, "sums": []}
        with contextlib.ExitStack() as held, replace_folder(folder) as beside:
            _extend(beside, content, parts)
            files = cls(beside, content)
            if folder.is_dir():  # the two change places when no append is under way
                held.enter_context(_locked(folder))
        files.folder = folder
        return files

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The files of one index, even while others take its place. Raises InputError if they are corrupt."""
        for _ in range(_ATTEMPTS):
            before = _number(folder)
            try:
                files = cls(folder, _read_content(folder))
            except InputError:
                if _number(folder) == before:
                    raise
            else:
                if _number(folder) == before:  # all of it was read from one folder
                    return files
        raise InputError(f"{folder}: keeps being replaced; open it when that has ended")

    def append(self, model: str, parts: Iterable[Part]) -> Self:
        """The index with more rows; a stop in between leaves it as it was. Raises InputError for another model's."""
        with _locked(self.folder):
            remove_stale_parts(self.folder, _INDEX, 0.0)  # nobody else writes it now
            content = _read_content(self.folder)  # another process may have added some
            if content["model"] != model:
                raise InputError(f"{self.folder}: was replaced by an index of another model")
            _extend(self.folder, content, parts)
            return type(self)(self.folder, content)

    def save(self, folder: Path) -> None:
        """Write a copy of the opened index, as `create` does, even if another one has taken its place since."""
        check_index_place(folder, str(folder))
        with replace_folder(folder) as beside:
            for name, array in self.arrays.items():
                array.tofile(beside / name)
            write_text(beside / _INDEX, _FORMAT.text(self.content))

    def block(self, start: int, file: str = VECTORS, places: slice | None = None) -> np.ndarray:
        """Up to BLOCK rows of a file from row `start` on, a multiple of BLOCK, compared with their CRC once.

        `places` is where they are in texts.bin. Raises InputError if they are corrupt.
        """
        content = self.arrays[file][places or slice(start, start + BLOCK)]
        if (start, file) not in self._checked:
            if zlib.crc32(content.data) != self.content["sums"][start // BLOCK][_FILES.index(file)]:
                rows = f"{start} to {min(start + BLOCK, len(self)) - 1}"
                raise InputError(f"{self.folder / file}: corrupt in rows {rows} (CRC-32 differs); {_FORMAT.mend}")
            self._checked.add((start, file))
        return content

    def text(self, row: int) -> str:
        """The text of a row. Raises IndexError for a row that is not there."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row}: there are {len(self)} candidates")
        start = row // BLOCK * BLOCK
        first = int(self.arrays[_ENDS][start - 1]) if start else 0
        ends = self.block(start, _ENDS)
        texts = self.block(start, _TEXTS, slice(first, int(ends[-1])))
        begin = int(ends[row - start - 1]) if row > start else first
        return texts[begin - first : int(ends[row - start]) - first].tobytes().decode()


def _extend(folder: Path, content: dict[str, Any], parts: Iterable[Part]) -> None:
    """Write embeddings and texts behind what `content` counts, count them in, and then replace index.json."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / name, "ab")) for name in _FILES]
        for file, (dtype, shape) in zip(files, _shapes(content).values(), strict=True):
            file.truncate(dtype.itemsize * math.prod(shape))  # what an append left that did not end
        for part in elements(parts, "parts", "a list of (embeddings, texts) parts"):
            if not (isinstance(part, tuple | list) and len(part) == 2):
                raise TypeError(f"parts: got {type(part).__name__}, expected (embeddings, texts), as in [(E, texts)]")
            vectors, texts = np.asarray(part[0]), list(checked_texts(part[1], "parts, texts"))
            if vectors.shape != (len(texts), content["width"]):
                raise ValueError(f"embeddings: {vectors.shape}, expected {(len(texts), content['width'])}")
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(vectors, dtype=_DTYPES[content["dtype"]])
            if not np.isfinite(stored).all():
                raise InputError(
                    f"{folder}: some embeddings are NaN, infinite or, for float16, above 65504; "
                    "store float32, or train the student again"
                )
            encoded = [text.encode() for text in texts]
            ends = content["text_bytes"] + np.cumsum([len(text) for text in encoded], dtype=_INT64)
            start = 0
            while start < len(texts):
                place = content["count"] % BLOCK
                if place == 0:
                    content["sums"].append([0] * len(_FILES))
                some, sums = slice(start, min(start + BLOCK - place, len(texts))), content["sums"][-1]
                pieces = (stored[some], ends[some], b"".join(encoded[some]))
                for i, (file, piece) in enumerate(zip(files, pieces, strict=True)):
                    file.write(piece)
                    sums[i] = zlib.crc32(piece, sums[i])
                content["count"] += some.stop - start
                content["text_bytes"] += len(pieces[-1])
                start = some.stop
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    write_text(folder / _INDEX, _FORMAT.text(content))


def _shapes(content: dict[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of each file."""
    rows, dtype = content["count"], _DTYPES[content["dtype"]]
    shapes = (dtype, (rows, content["width"])), (_INT64, (rows,)), (np.dtype("u1"), (content["text_bytes"],))
    return dict(zip(_FILES, shapes, strict=True))


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
    with contextlib.suppress(OSError):
        return folder.stat().st_ino
    return None
