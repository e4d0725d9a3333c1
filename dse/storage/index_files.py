"""The files of an index of candidates, independent of any model, and their embeddings on a device.

A folder holds vectors.bin (rows of float32 or float16, little-endian), ends.bin (int64: where each text ends),
texts.bin (UTF-8, end to end), the same two files of ids if rows have some, directions.bin (int8: the last columns of
each row, rounded to a 63rd of the largest one), factors.bin (float32: what gives these vectors length 1), and
index.json: the model's hash, the number of rows, and a CRC-32 of each block of rows in each file. A block is compared
with its CRC when it is first read.
Appending writes after what is there and then replaces index.json, so a stop in between leaves the index as it was.
"""

import contextlib
import itertools
import math
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from dse.networks.heads import at_once
from dse.networks.inference import rank_keys, scores_and_rows
from dse.networks.kernels import int8_products
from dse.storage.folder_format import FolderFormat
from dse.system.errors import InputError
from dse.system.files import remove_stale_parts, replace_folder, write_text
from dse.system.text_files import checked_texts, elements

_OF_FREE_MEMORY = 0.6  # that embeddings may take of a GPU's; the rest is for scoring, and for other work
BLOCK = 4096  # rows that are scored, and checked, at once
_NEAREST_AT_ONCE = 16  # blocks
_INDEX, _LOCK = "index.json", ".lock"  # locked while an append writes, or another index takes the folder's place
VECTORS, DIRECTIONS, FACTORS = "vectors.bin", "directions.bin", "factors.bin"
_STRINGS = {"text": ("ends.bin", "texts.bin"), "id": ("id_ends.bin", "ids.bin")}  # of each row: ends, and UTF-8
_DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_INT64, _INT8 = np.dtype("<i8"), np.dtype("i1")
_PARTS = "a list of (embeddings, texts) or (embeddings, texts, ids) parts"
_ATTEMPTS = 5  # to open one that is replaced meanwhile
_FORMAT = FolderFormat(
    "index of candidates", "dse index", 1, _INDEX, (VECTORS, DIRECTIONS, FACTORS, *chain(*_STRINGS.values()), _LOCK),
    "build the index again with `python -m dse index`",
)  # fmt: skip
check_index_place, _read_content = _FORMAT.check_place, _FORMAT.read

# Embeddings (n, width), their n texts and, in every part or in none, n ids.
Part = tuple[np.ndarray, list[str]] | tuple[np.ndarray, list[str], list[str]]


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

    @property
    def has_ids(self) -> bool:
        """Do the rows have ids?"""
        return "id" in _kinds(self.content)

    @classmethod
    def create(cls, folder: Path, model: str, width: int, dtype: str, parts: Iterable[Part], top: int = 0) -> Self:
        """Write an index, whole or not at all, with directions of the last `top` columns, if that is not 0.

        Raises InputError for a folder with other files, or NaN embeddings.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(_DTYPES)}")
        check_index_place(folder, str(folder))
        content = {"model": model, "dtype": dtype, "width": width, "count": 0, "text_bytes": 0, "sums": []}
        parts = iter(elements(parts, "parts", _PARTS))
        if (first := next(parts, None)) is not None:
            parts = chain([first], parts)
            content |= {"id_bytes": 0} if isinstance(first, tuple | list) and len(first) == 3 else {}
        content |= {"top": top} if top else {}
        with _replaced(folder) as beside:
            _extend(beside, content, parts)
            files = cls(beside, content)
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
        with _replaced(folder) as beside:
            for name, array in self.arrays.items():
                array.tofile(beside / name)
            write_text(beside / _INDEX, _FORMAT.text(self.content))

    def block(self, start: int, file: str = VECTORS, places: slice | None = None) -> np.ndarray:
        """Up to BLOCK rows of a file from row `start` on, a multiple of BLOCK, compared with their CRC once.

        `places` is where they are in a file of strings. Raises InputError if they are corrupt.
        """
        content = self.arrays[file][places or slice(start, start + BLOCK)]
        if (start, file) not in self._checked:
            if zlib.crc32(content.data) != self.content["sums"][start // BLOCK][list(self.arrays).index(file)]:
                rows = f"{start} to {min(start + BLOCK, len(self)) - 1}"
                raise InputError(f"{self.folder / file}: corrupt in rows {rows} (CRC-32 differs); {_FORMAT.mend}")
            self._checked.add((start, file))
        return content

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """The embeddings of any rows, int, as stored, (rows, width)."""
        for start in np.unique(rows // BLOCK * BLOCK).tolist():
            self.block(start)  # compared
        return self.arrays[VECTORS][rows]

    def string(self, row: int, kind: str = "text") -> str:
        """The text or the id of a row. Raises IndexError for a row that is not there."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row}: there are {len(self)} candidates")
        (ends_file, file), start = _STRINGS[kind], row // BLOCK * BLOCK
        first = int(self.arrays[ends_file][start - 1]) if start else 0
        ends = self.block(start, ends_file)
        strings = self.block(start, file, slice(first, int(ends[-1])))
        begin = int(ends[row - start - 1]) if row > start else first
        return strings[begin - first : int(ends[row - start]) - first].tobytes().decode()


def _extend(folder: Path, content: dict[str, Any], parts: Iterable[Part]) -> None:
    """Write embeddings and strings behind what `content` counts, count them in, and then replace index.json."""
    kinds = _kinds(content)
    with contextlib.ExitStack() as stack:
        shapes = _shapes(content)
        files = [stack.enter_context(open(folder / name, "ab")) for name in shapes]
        for file, (dtype, shape) in zip(files, shapes.values(), strict=True):
            file.truncate(dtype.itemsize * math.prod(shape))  # what an append left that did not end
        for part in elements(parts, "parts", _PARTS):
            stored, strings = _checked_part(part, content)
            start, pieces = 0, list[Any]([stored])
            for kind, encoded in zip(kinds, strings, strict=True):
                ends = content[f"{kind}_bytes"] + np.cumsum([len(text) for text in encoded], dtype=_INT64)
                pieces += [ends, encoded]
            while start < len(stored):
                place = content["count"] % BLOCK
                if place == 0:
                    content["sums"].append([0] * len(files))
                some, sums = slice(start, min(start + BLOCK - place, len(stored))), content["sums"][-1]
                written = [b"".join(whole[some]) if isinstance(whole, list) else whole[some] for whole in pieces]
                written += directions(stored[some], content["top"]) if "top" in content else []
                for i, (file, piece) in enumerate(zip(files, written, strict=True)):
                    file.write(piece)
                    sums[i] = zlib.crc32(piece, sums[i])
                content["count"] += some.stop - start
                start = some.stop
            for kind, encoded in zip(kinds, strings, strict=True):
                content[f"{kind}_bytes"] += sum(map(len, encoded))
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    write_text(folder / _INDEX, _FORMAT.text(content))


def _checked_part(part: Any, content: dict[str, Any]) -> tuple[np.ndarray, list[list[bytes]]]:
    """A part's embeddings as they are stored, and its texts and ids as UTF-8."""
    expected = "(embeddings, texts, ids)" if "id_bytes" in content else "(embeddings, texts)"
    if not isinstance(part, tuple | list) or len(part) != 1 + len(_kinds(content)):
        found = f"{len(part)} entries" if isinstance(part, tuple | list) else type(part).__name__
        raise TypeError(f"parts: got {found}, expected {expected}, as in [(E, texts)]")
    vectors, strings = np.asarray(part[0]), [list(checked_texts(some, "parts, texts and ids")) for some in part[1:]]
    if vectors.shape != (len(strings[0]), content["width"]):
        raise ValueError(f"embeddings: {vectors.shape}, expected {(len(strings[0]), content['width'])}")
    if len(strings[-1]) != len(strings[0]):
        raise ValueError(f"ids: {len(strings[-1])} for {len(strings[0])} texts; give one for each")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(vectors, dtype=_DTYPES[content["dtype"]])
    if not np.isfinite(stored).all():
        raise InputError(
            "some embeddings are NaN, infinite or, for float16, above 65504; store float32, or train the student again"
        )
    return stored, [[text.encode() for text in some] for some in strings]


def _kinds(content: dict[str, Any]) -> list[str]:
    """The kinds of strings that the rows have."""
    return [kind for kind in _STRINGS if f"{kind}_bytes" in content]


def _shapes(content: dict[str, Any]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of each file, in the order of their CRCs."""
    rows, dtype = content["count"], _DTYPES[content["dtype"]]
    shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {VECTORS: (dtype, (rows, content["width"]))}
    for kind in _kinds(content):
        ends, strings = _STRINGS[kind]
        shapes |= {ends: (_INT64, (rows,)), strings: (np.dtype("u1"), (content[f"{kind}_bytes"],))}
    if "top" in content:
        shapes |= {DIRECTIONS: (_INT8, (rows, content["top"])), FACTORS: (_DTYPES["float32"], (rows,))}
    return shapes


def directions(stored: np.ndarray, top: int) -> list[np.ndarray]:
    """The last `top` columns of each row in 7 bits, int8, and (rows,) factors, float32, that give these length 1."""
    some = stored[:, -top:].astype(np.float64)  # whose squares float32 may not hold
    largest = np.abs(some).max(axis=1, keepdims=True, initial=0.0)
    rounded = np.rint(63 * some / np.maximum(largest, np.finfo(np.float32).tiny)).astype(_INT8)
    lengths = np.linalg.norm(rounded.astype(np.float32), axis=1)
    return [rounded, (1 / np.maximum(lengths, 1)).astype(_DTYPES["float32"])]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder that is there; another may take its place while one waits for the lock."""
    while True:
        before = _number(folder)
        with FileLock(folder / _LOCK):
            if _number(folder) == before:
                yield
                return


@contextlib.contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder to write to, beside the given one. The two change places when no append is under way."""
    with contextlib.ExitStack() as held, replace_folder(folder) as beside:
        yield beside
        if folder.is_dir():
            held.enter_context(_locked(folder))


def _number(folder: Path) -> int | None:
    """What tells a folder from the one that took its place."""
    with contextlib.suppress(OSError):
        return folder.stat().st_ino
    return None


def stored(files: IndexFiles, start: int, file: str = VECTORS, blocks: int = 1) -> Tensor:
    """Up to so many blocks of a file's rows, the embeddings, as stored, from row `start` on, a multiple of BLOCK."""
    stop = min(start + blocks * BLOCK, len(files))
    for first in range(start, stop, BLOCK):
        files.block(first, file)  # compared
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
        return torch.from_numpy(files.arrays[file][start:stop])


def nearest(files: IndexFiles, queries: Tensor, count: int) -> Tensor:
    """The rows with about the highest cosines of the top layer with each query, (queries, count), on CPU."""
    asked = torch.from_numpy(directions(queries.float().cpu().numpy(), files.content["top"])[0])
    best = torch.full((len(asked), min(count, len(files))), torch.iinfo(torch.int64).min)
    for start in range(0, len(files), _NEAREST_AT_ONCE * BLOCK):
        rows, factors = (stored(files, start, file, _NEAREST_AT_ONCE) for file in (DIRECTIONS, FACTORS))
        cosines = int8_products(asked, rows) * factors  # times the length of what is asked
        for some, of_query in zip(cosines, best, strict=True):
            lowest = scores_and_rows(of_query.min())[0]  # NaN as long as there are fewer than `count`
            places = (~(some < lowest)).nonzero()[:, 0]
            keys = torch.cat([of_query, rank_keys(some[places], start + places)])
            of_query.copy_(keys.topk(len(of_query), sorted=False).values)
    return scores_and_rows(best.sort(descending=True).values)[1]


def _rows_on_cuda(device: torch.device, widest: int) -> int:
    """How many rows a GPU takes at once, a multiple of BLOCK; 0 for another device."""
    return BLOCK * at_once(device, BLOCK * widest) if device.type == "cuda" else 0


def _free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses, those that torch holds in reserve included."""
    in_reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + in_reserve


class Embeddings:
    """The embeddings of an index, block by block, on any device; a GPU holds them all while they fit."""

    def __init__(self) -> None:
        self._held: tuple[IndexFiles, Tensor] | None = None  # what they are of, and all of them as stored, on a GPU

    def blocks(self, files: IndexFiles, device: torch.device, hidden: int) -> Iterator[tuple[int, Tensor]]:
        """The first row of each block, and its embeddings (rows, width), float32, on the device.

        A block is valid until the next one is asked for. `hidden` numbers per row are computed from it.
        """
        held = self._held
        if held is not None and (held[0] is not files or held[1].device != device):
            held = self._held = None  # candidates were appended, or the model was moved
        if rows := _rows_on_cuda(device, max(files.content["width"], hidden)):
            return self._on_cuda(files, device, rows, held)
        return ((start, stored(files, start).to(device, torch.float32)) for start in range(0, len(files), BLOCK))

    def _on_cuda(
        self, files: IndexFiles, device: torch.device, rows: int, held: tuple[IndexFiles, Tensor] | None
    ) -> Iterator[tuple[int, Tensor]]:
        """So many rows at a time, from what the GPU holds, or can hold from now on, or else from a stream."""
        blocks, whole = _streamed(files, device, rows), files.arrays[VECTORS]
        if held is None and whole.nbytes <= _OF_FREE_MEMORY * _free_memory(device):
            held = files, torch.empty(whole.shape, dtype=getattr(torch, files.content["dtype"]), device=device)
            for start, block in blocks:
                held[1][start : start + len(block)] = block
            self._held = held  # whole, or not at all
        if held is not None:
            blocks = zip(range(0, len(files), rows), held[1].split(rows), strict=False)  # none: one empty part
        for start, block in blocks:
            yield start, block.float()  # float16 is widened block by block


def _streamed(files: IndexFiles, device: torch.device, rows: int) -> Iterator[tuple[int, Tensor]]:
    """So many rows at a time, a multiple of BLOCK: the first row, and embeddings as stored, on a GPU.

    Two pinned buffers and two on the GPU take turns: while a block is used, the next one is copied in another stream.
    A block is valid until the next one is asked for.
    """
    shape, dtype = (min(rows, len(files)), files.content["width"]), getattr(torch, files.content["dtype"])
    using, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    pinned = device.type == "cuda"
    turns = [
        (torch.empty(shape, dtype=dtype, pin_memory=pinned), torch.empty(shape, dtype=dtype, device=device), copied)
        for copied in (torch.cuda.Event(), torch.cuda.Event())
    ]

    def copy(start: int, turn: tuple[Tensor, Tensor, Any]) -> tuple[int, Tensor, Any]:
        on_host, on_device, copied = turn
        count = min(rows, len(files) - start)
        copied.synchronize()  # the buffer on the host is free again
        for first in range(0, count, BLOCK):
            block = stored(files, start + first)
            on_host[first : first + len(block)] = block
        copying.wait_stream(using)  # all that uses the GPU's buffer was launched
        with torch.cuda.stream(copying):
            on_device[:count].copy_(on_host[:count], non_blocking=True)
            copied.record(copying)
        return start, on_device[:count], copied

    copies: Iterator[Any] = map(copy, range(0, len(files), rows), itertools.cycle(turns))
    try:
        for (start, block, copied), _ in itertools.pairwise(itertools.chain(copies, [None])):  # begins the next one
            using.wait_event(copied)
            yield start, block
    finally:
        using.wait_stream(copying)  # before the buffers' memory serves anything else
