"""Stored candidates, scored by the student's trained head.

    index = CandidateIndex.build(model, sentences, folder)      embeds, once
    index = CandidateIndex.open(folder, model)                  maps the folder's files, reads nothing yet
    index.search("a query", top_k=10)                           [Hit(score, row, text), …], best first

The query is the pair's first text. The head's first layer is linear in the blocks of [u, v, u * v, |u - v|], so for
one query u and all candidates v

    W_u u + W_v v + W_p (u * v) + W_d |u - v| + b  =  (W_u u + b)  +  (W_v + W_p diag(u)) v  +  W_d |u - v|

has a constant, one matrix for v, and |u - v| as the only thing to be made per pair; nothing but v is stored. With
the `dot` head u . v is one matrix product for all queries.

A folder holds vectors.bin (rows of float32 or float16, little-endian), texts.bin (UTF-8, end to end), ends.bin (int64:
where each text ends) and index.json: the model's hash, the number of rows, and a CRC-32 of each block of rows. A block
is compared with its sum when it is first read. Appending writes behind what is there and then replaces index.json, so
a stop in between leaves the index as it was.
"""

import contextlib
import itertools
import math
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from dse.encoding import checked_texts, elements
from dse.features import batches_of
from dse.files import (
    InputError,
    check_ours,
    json_text,
    read_json,
    remove_stale_parts,
    replace_folder,
    sha256_json,
    write_text,
)
from dse.packing import is_plain, linear
from dse.processors import BINARY, REGRESSION, Task, ranked_label
from dse.sharing import fingerprint

if TYPE_CHECKING:
    from dse.models import DSESiameseClassifier, SiameseHead

FORMAT, VERSION = "dse index", 1
INDEX = "index.json"
_LOCK = ".lock"  # held while an append writes, or another index takes the folder's place
_FILES = ("vectors.bin", "ends.bin", "texts.bin")
_KINDS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
_ENDS = np.dtype("<i8")
BLOCK = 4096  # rows that are scored, and checked, at once
_ATTEMPTS = 5  # to open one that is replaced meanwhile
_EMBED_AT_ONCE = 4 * BLOCK
_CHARACTERS_AT_ONCE = 1 << 24
_QUERIES = 64  # scored at once
_PART = 1 << 19  # numbers in a part's hidden layer


class Hit(NamedTuple):
    """A candidate as it was found."""

    score: float  # of a regression, else the log-odds of the rank label: its probability is sigmoid(score)
    row: int  # from 0, in the order in which the candidates were given
    text: str


class PairHead:
    """A student's head for few queries and many candidates, in float32; one that is not plain is called as it is."""

    def __init__(self, head: "SiameseHead") -> None:
        self.head = None if is_plain(head) else head
        if self.head is not None:
            return
        self.is_dot = head.head_type == "dot"
        self.first, *self.rest = (
            (layer.weight.detach().float(), layer.bias.detach().float()) for layer in head.fc_layers
        )
        if not self.is_dot:
            blocks = self.first[0].chunk(4, dim=1)
            self.of_u, self.of_v, self.of_product, self.of_difference = (block.contiguous() for block in blocks)
            self.zero = torch.zeros_like(self.first[1])

    def outputs(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """(queries, width) and (candidates, width) to (queries, candidates, outputs), all float32."""
        if self.head is not None:
            return torch.stack([self.head(u.expand_as(candidates), candidates).float() for u in queries])
        return self._of_dots(queries, candidates) if self.is_dot else self._of_blocks(queries, candidates)

    def _of_blocks(self, queries: Tensor, candidates: Tensor) -> Tensor:
        # Made beforehand: small results kept between the large steps would keep these from using the same memory again.
        scores = queries.new_empty(len(queries), len(candidates), len((self.rest or [self.first])[-1][1]))
        constants = queries @ self.of_u.t() + self.first[1]
        for u, constant, row in zip(queries, constants, scores, strict=True):
            hidden = linear(candidates, torch.addcmul(self.of_v, self.of_product, u), constant)
            hidden += linear(torch.sub(candidates, u).abs_(), self.of_difference, self.zero)
            row.copy_(self._after_first(hidden))
        return scores

    def _of_dots(self, queries: Tensor, candidates: Tensor) -> Tensor:
        products = queries @ candidates.t()
        # In parts, whose hidden layer stays in the processor's cache.
        parts = products.reshape(-1, 1).split(max(1, _PART // len(self.first[1])))
        scores = [self._after_first(functional.linear(part, *self.first)) for part in parts]
        return torch.cat(scores).view(*products.shape, -1)

    def _after_first(self, x: Tensor) -> Tensor:
        for layer in self.rest:
            x = functional.linear(x.relu_(), *layer)
        return x


class CandidateIndex:
    """Candidates' embeddings and texts in a folder, and a student to score them with; made by `build` or `open`."""

    def __init__(
        self, model: "DSESiameseClassifier", folder: Path, content: dict[str, Any], mapped: list[np.ndarray],
        keep: Any = None,
    ) -> None:  # fmt: skip
        self.model, self.folder = model, folder
        self._keep = keep  # a temporary folder, removed with the last reference to it
        self._take(content, mapped)

    def __len__(self) -> int:
        return self.count

    @classmethod
    def build(
        cls,
        model: "DSESiameseClassifier",
        sentences: Iterable[str],
        folder: str | Path | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        show_progress: bool | None = None,
    ) -> "CandidateIndex":
        """Embed candidates and store them, in constant memory.

        Args:
            sentences: any iterable of strings, e.g. a file's lines; rows are numbered as they come.
            folder: where it is kept, whole or not at all; an index that is there is replaced. None: a temporary
                folder, which goes with the index.
            dtype: "float32", or "float16" for half the space (embeddings rounded to 11 bits).
            batch_size, show_progress: as in `encode`.

        Raises InputError for a folder with other things in it.
        """
        return cls.from_embeddings(model, _embedded(model, sentences, batch_size, show_progress), folder, dtype)

    @classmethod
    def from_embeddings(
        cls,
        model: "DSESiameseClassifier",
        parts: Iterable[tuple[np.ndarray, list[str]]],
        folder: str | Path | None = None,
        dtype: str = "float32",
    ) -> "CandidateIndex":
        """Store candidates whose embeddings are there already.

        Args:
            parts: embeddings (n, embedding_size) that `model.encode` made, not normalized, and their n texts, part by
                part.
            folder, dtype: as in `build`.
        """
        if dtype not in _KINDS:
            raise ValueError(f"dtype: {dtype!r} is none of {', '.join(_KINDS)}")
        keep = tempfile.TemporaryDirectory(prefix="dse-index-") if folder is None else None
        folder = Path(keep.name) / "index" if keep is not None else Path(folder)
        check_index_place(folder, str(folder))
        width = model.config.embedding_size
        content = {"model": fingerprint(model), "dtype": dtype, "width": width, "count": 0, "text_bytes": 0, "sums": []}
        with contextlib.ExitStack() as held, replace_folder(folder) as beside:
            _extend(beside, content, parts)
            _write_content(beside, content)
            mapped = _mapped(beside, content)
            if folder.is_dir():  # the two change places when no append is under way
                held.enter_context(_locked(folder))
        return cls(model, folder, content, mapped, keep)

    @classmethod
    def open(cls, folder: str | Path, model: "DSESiameseClassifier") -> "CandidateIndex":
        """An index as it was stored, memory-mapped. Raises InputError where it is none, spoiled or another model's."""
        folder = Path(folder)
        content, mapped = _opened(folder)
        if content["model"] != fingerprint(model):
            raise InputError(
                f"{folder}: this index was made by another model; build it anew, or give the model it is of"
            )
        return cls(model, folder, content, mapped)

    def append(self, sentences: Iterable[str], batch_size: int = 32, show_progress: bool | None = None) -> None:
        """Add candidates behind those that are there; a stop in between leaves the index as it was."""
        with _locked(self.folder):
            remove_stale_parts(self.folder, INDEX, 0.0)  # nobody else writes it now
            content = _read_content(self.folder)  # another process may have added some
            if content["model"] != fingerprint(self.model):
                raise InputError(f"{self.folder}: was replaced by an index of another model")
            _extend(self.folder, content, _embedded(self.model, sentences, batch_size, show_progress))
            _write_content(self.folder, content)
            self._take(content, _mapped(self.folder, content))

    def save(self, folder: str | Path) -> None:
        """Copy the index to another folder, whole. Raises InputError for a folder with other things in it."""
        check_index_place(Path(folder), str(folder))
        with replace_folder(folder) as beside:
            for name, array in zip(_FILES, (self._vectors, self._ends, self._texts), strict=True):
                array.tofile(beside / name)  # what was opened, whatever has come to that place since
            _write_content(beside, self._content)

    def score(self, queries: str | Sequence[str], rank_label: str | None = None) -> np.ndarray:
        """How each candidate ranks for a query: by the probability of the rank label, or the score of a regression.

        Args:
            queries: one text or several.
            rank_label: the label whose probability counts; None: the task's own, else entailment, else the second one
                of a binary task.

        Returns:
            float32, (candidates,) for one query, (queries, candidates) for several: `rank_scores` of what `model.score`
            gives for the pairs (query, candidate), to rounding.

        Raises TypeError for what is not text, InputError for a label that the task lacks or has to be told.
        """
        texts = [queries] if isinstance(queries, str) else list(checked_texts(queries, "queries"))
        scores = np.empty((len(texts), len(self)), np.float32)
        for rows, columns, some in self._blocks(texts, rank_label, show=False):
            scores[rows, columns] = some.cpu().numpy()
        return scores[0] if isinstance(queries, str) else scores

    def search(
        self, queries: str | Sequence[str], top_k: int = 10, rank_label: str | None = None,
        show_progress: bool | None = False,
    ) -> list[Hit] | list[list[Hit]]:  # fmt: skip
        """The best candidates of each query, best first, of equals the earlier row; all where there are fewer.

        Args:
            queries, rank_label: as in `score`.
            top_k: how many.

        Returns:
            Hits for one query, a list of them for several. Memory does not grow with the candidates.
        """
        if top_k < 1:
            raise ValueError(f"top_k: {top_k} is below 1")
        texts = [queries] if isinstance(queries, str) else list(checked_texts(queries, "queries"))
        best: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0, dtype=torch.int64)) for _ in texts]
        for rows, columns, some in self._blocks(texts, rank_label, show_progress):
            for row, scores in zip(range(rows.start, rows.stop), some.cpu(), strict=True):
                best[row] = _best(*best[row], scores, columns.start, top_k)
        hits = [
            [Hit(score, row, self.text(row)) for score, row in zip(scores.tolist(), found.tolist(), strict=True)]
            for scores, found in best
        ]
        return hits[0] if isinstance(queries, str) else hits

    def text(self, row: int) -> str:
        """The candidate of a row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row}: there are {len(self)} candidates")
        start = row // BLOCK * BLOCK
        first = int(self._ends[start - 1]) if start else 0
        ends = self._ends[start : start + BLOCK]
        self._check("ends.bin", start, ends)
        self._check("texts.bin", start, self._texts[first : int(ends[-1])])
        begin = int(self._ends[row - 1]) if row else 0
        return self._texts[begin : int(self._ends[row])].tobytes().decode()

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """The embeddings of rows `start` to `stop`, as stored, (stop - start, width); not compared with their sums."""
        return self._vectors[start:stop]

    def _blocks(
        self, texts: list[str], rank_label: str | None, show: bool | None
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Queries' rows, candidates' rows and their scores, part by part."""
        task = self.model.settings.task
        ranked_label(task, rank_label)  # refused before anything is embedded
        queries = self.model.encode(texts, convert_to="tensor", show_progress=False)
        groups = [slice(i, min(i + _QUERIES, len(texts))) for i in range(0, len(texts), _QUERIES)]
        starts = range(0, len(self), BLOCK)
        disable = None if show is None else not show
        with (
            torch.inference_mode(),
            tqdm(total=len(groups) * len(starts), desc="score", unit="block", disable=disable, leave=False) as bar,
        ):
            head = PairHead(self.model.siamese_head)
            for rows in groups:
                for start in starts:
                    candidates = self.block(start)
                    columns = slice(start, start + len(candidates))
                    scores = rank_scores(head.outputs(queries[rows], candidates), task, rank_label)
                    if not bool(scores.isfinite().all()):
                        raise InputError(f"{self.folder}: the student's scores are NaN or infinite; train it again")
                    yield rows, columns, scores
                    bar.update()

    def block(self, start: int) -> Tensor:
        """Up to BLOCK embeddings from a row on, a multiple of BLOCK, float32, on the model's device."""
        block = self._vectors[start : start + BLOCK]
        self._check("vectors.bin", start, block)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
            return torch.from_numpy(block).to(self.model.device, torch.float32)

    def _check(self, file: str, start: int, content: np.ndarray) -> None:
        """Compare a block with its sum, once. Raises InputError where they differ."""
        key = (file, start)
        if key in self._checked:
            return
        if zlib.crc32(content) != self._sums[start // BLOCK][_FILES.index(file)]:
            rows = f"{start} to {min(start + BLOCK, len(self)) - 1}"
            raise InputError(f"{self.folder / file}: spoiled, in rows {rows} (CRC-32 differs); build the index anew")
        self._checked.add(key)

    def _take(self, content: dict[str, Any], mapped: list[np.ndarray]) -> None:
        self._content, (self._vectors, self._ends, self._texts) = content, mapped
        self.count, self.width, self.dtype = content["count"], content["width"], content["dtype"]
        self._sums, self._checked = content["sums"], set()


def rank_scores(outputs: Tensor, task: Task, rank_label: str | None = None) -> Tensor:
    """What ranks candidates, of the head's outputs: (..., outputs) to (...), float.

    A regression's score; else the log-odds log(p / (1 - p)) of the rank label's probability p, which rank as p does and
    still differ where p rounds to 1. In a binary task they are the logit, negated for the first label.

    Raises InputError as `ranked_label` does.
    """
    label = ranked_label(task, rank_label)
    if task.kind == REGRESSION:
        return outputs[..., 0]
    place = task.labels.index(label)
    if task.kind == BINARY:
        return outputs[..., 0] if place else -outputs[..., 0]
    others = [i for i in range(len(task.labels)) if i != place]
    return outputs[..., place] - outputs[..., others].logsumexp(dim=-1)


def _best(scores: Tensor, rows: Tensor, new: Tensor, start: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The best so far and a block's, whose rows begin at `start`, to the best of both, best first."""
    if len(new) > top_k:
        least = new.topk(top_k).values[-1]
        some = (new >= least).nonzero().squeeze(1)  # all equals of the last one, so that the earliest can win
    else:
        some = torch.arange(len(new))
    scores, rows = torch.cat([scores, new[some]]), torch.cat([rows, some + start])
    order = scores.sort(descending=True, stable=True).indices[:top_k]  # earlier rows come first
    return scores[order], rows[order]


def _embedded(
    model: "DSESiameseClassifier", sentences: Iterable[str], batch_size: int, show: bool | None
) -> Iterator[tuple[np.ndarray, list[str]]]:
    disable = None if show is None else not show
    with tqdm(desc="embed", unit="sentence", disable=disable, leave=False) as bar:
        for texts in batches_of(checked_texts(sentences, "sentences"), _EMBED_AT_ONCE, _CHARACTERS_AT_ONCE):
            yield model.encode(texts, batch_size, show_progress=False), texts
            bar.update(len(texts))


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
