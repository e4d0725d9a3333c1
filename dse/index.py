"""Stored candidates, scored by the student's trained head.

    index = CandidateIndex.build(model, sentences, folder)      embeds, once
    index = CandidateIndex.open(folder, model)                  maps the folder's files, reads nothing yet
    index.search("a query", top_k=10)                           [Hit(score, row, text, id), …], best first

The query is the pair's first text. Nothing but the candidates' texts and embeddings is stored (storage/index_files.py);
each head knows how to score one query against many of them at once (networks/heads.py). A GPU keeps the embeddings
while they fit, or else they stream to it for each call.
"""

import itertools
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dse.data.features import batches_of
from dse.data.tasks import ranked_label
from dse.models import DSESiameseClassifier, Hit, check_probabilities, check_top_k, finite, make_hits, rank_scores
from dse.networks.heads import at_once
from dse.storage.index_files import BLOCK, VECTORS, IndexFiles, Part
from dse.storage.student_folder import fingerprint
from dse.system.errors import InputError
from dse.system.text_files import checked_texts

_EMBED_AT_ONCE = 4 * BLOCK
_CHARACTERS_AT_ONCE = 1 << 24
_QUERIES = 64  # scored at once
_OF_FREE_MEMORY = 0.6  # that embeddings may take of a GPU's; the rest is for scoring, and for other work
_LAST_ROW, _MAGNITUDE = (1 << 32) - 1, (1 << 31) - 1  # the low half of a key; all bits of a float32 but its sign


class CandidateIndex:
    """Candidates' embeddings and texts in a folder, and a student to score them with; made by `build` or `open`."""

    def __init__(self, model: DSESiameseClassifier, files: IndexFiles, keep: Any = None) -> None:
        self.model, self.files, self.folder, self.width = model, files, files.folder, files.content["width"]
        self._keep = keep  # a temporary folder, removed with the last reference to it
        self.embeddings = _Embeddings()

    def __len__(self) -> int:
        return len(self.files)

    @classmethod
    def build(
        cls,
        model: DSESiameseClassifier,
        sentences: Iterable[str],
        folder: str | Path | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        show_progress: bool | None = None,
        ids: Iterable[str] | None = None,
    ) -> Self:
        """Embed candidates and store them, in constant memory.

        Args:
            sentences: any iterable of strings, e.g. a file's lines; rows are numbered in their order.
            ids: an own string for each of them, which hits have too.
            folder: where it is written, whole or not at all; an index already there is replaced. None: a temporary
                folder, which is removed with the index.
            dtype: "float32", or "float16" for half the space (embeddings rounded to 11 bits).

        Raises InputError for a folder with other files in it.
        """
        return cls.from_embeddings(model, _embedded(model, sentences, batch_size, show_progress, ids), folder, dtype)

    @classmethod
    def from_embeddings(
        cls, model: DSESiameseClassifier, parts: Iterable[Part], folder: str | Path | None = None,
        dtype: str = "float32",
    ) -> Self:  # fmt: skip
        """As `build`, from parts: embeddings (n, embedding_size) as `model.encode` gives them, n texts, maybe n ids."""
        keep: Any = tempfile.TemporaryDirectory(prefix="dse-index-") if folder is None else None
        folder = Path(keep.name, "index") if folder is None else Path(folder)
        width = model.network.config.embedding_size
        return cls(model, IndexFiles.create(folder, fingerprint(model), width, dtype, parts), keep)

    @classmethod
    def open(cls, folder: str | Path, model: DSESiameseClassifier) -> Self:
        """An index as it was stored, memory-mapped.

        Raises InputError if it is another model's, not an index, or lacks bytes; damaged bytes are refused when read.
        """
        files = IndexFiles.open(Path(folder))
        if files.content["model"] != fingerprint(model):
            raise InputError(f"{folder}: this index was made by another model; build it again, or give its own model")
        return cls(model, files)

    def append(
        self, sentences: Iterable[str], batch_size: int = 32, show_progress: bool | None = None,
        ids: Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        """Add candidates after the existing ones; a stop in between leaves the index as it was.

        Raises InputError for candidates with ids if those that are there have none, and the other way round.
        """
        if self.files.has_ids != (ids is not None):
            found = "have ids; give some" if self.files.has_ids else "have no ids; give none"
            raise InputError(f"{self.folder}: the candidates that are there {found}")
        parts = _embedded(self.model, sentences, batch_size, show_progress, ids)
        self.files = self.files.append(fingerprint(self.model), parts)

    def save(self, folder: str | Path) -> None:
        """Copy the index to another folder, whole. Raises InputError for a folder with other files in it."""
        self.files.save(Path(folder))

    @torch.inference_mode()
    def score(
        self, queries: str | Sequence[str], rank_label: str | None = None, rows: Sequence[int] | None = None
    ) -> np.ndarray:
        """How each candidate ranks for a query: by the probability of the rank label, or the score of a regression.

        Args:
            rank_label: the label whose probability counts; None: the task's own, else entailment, else the second one
                of a binary task.
            rows: of these candidates alone, such as the best of another search.

        Returns:
            float32, (candidates,) for one query, (queries, candidates) for several: `rank_scores` of what `model.score`
            gives for the pairs (query, candidate), to rounding.

        Raises TypeError for anything but text, InputError for a label that the task lacks, or if one must be given,
        IndexError for a row that is not there.
        """
        texts = [queries] if isinstance(queries, str) else list(checked_texts(queries, "queries"))
        wanted = None if rows is None else _row_numbers(rows, "rows", len(self))
        scores = np.empty((len(texts), len(self) if wanted is None else len(wanted)), np.float32)
        for row, start, some in _blocks(self, texts, rank_label, False, wanted):
            scores[row : row + some.shape[0], start : start + some.shape[1]] = finite(some.cpu(), self.folder).numpy()
        return scores[0] if isinstance(queries, str) else scores

    @torch.inference_mode()
    def search(
        self, queries: str | Sequence[str], top_k: int = 10, rank_label: str | None = None,
        show_progress: bool | None = False, exclude: Sequence[int] = (), min_score: float | None = None,
        probabilities: bool = False,
    ) -> list[Hit] | list[list[Hit]]:  # fmt: skip
        """The best candidates of each query, best first, of equals the earlier row first; all if there are fewer.

        Args:
            rank_label: as in `score`.
            exclude: rows that are never found, such as the query's own.
            min_score: hits below it are left out.
            probabilities: the hits' scores, and `min_score`, are probabilities of the rank label.

        Memory does not grow with the candidates, but for what a GPU holds of them. Raises as `score` does, ValueError
        for other wrong arguments.
        """
        check_top_k(top_k)
        check_probabilities(self.model.task, probabilities)
        texts = [queries] if isinstance(queries, str) else list(checked_texts(queries, "queries"))
        left_out = np.unique(_row_numbers(exclude, "exclude", len(self)))
        kept, least = min(top_k, len(self) - len(left_out)), torch.iinfo(torch.int64).min
        best = torch.full((len(texts), kept), least, device=self.model.device)
        for row, start, some in _blocks(self, texts, rank_label, show_progress):
            of_some, keys = best[row : row + len(some)], _keys(some, start)
            if len(left_out):
                keys[:, left_out[(left_out >= start) & (left_out < start + keys.shape[1])] - start] = least
            of_some.copy_(torch.cat([of_some, keys], dim=1).topk(kept).values)
        scores, rows = _scores_and_rows(best.cpu())  # waits for a GPU, once
        found = zip(finite(scores, self.folder), rows.tolist(), strict=True)
        hits = [make_hits(*each, self.text, self.id, min_score, probabilities) for each in found]
        return hits[0] if isinstance(queries, str) else hits

    def text(self, row: int) -> str:
        """The candidate of a row."""
        return self.files.string(row)

    def id(self, row: int) -> str | None:
        """The id of a row; None if candidates have none."""
        return self.files.string(row, "id") if self.files.has_ids else None

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """The embeddings of rows `start` to `stop`, as stored, (stop - start, width), without comparing CRCs."""
        return self.files.arrays[VECTORS][start:stop]


def _blocks(
    index: CandidateIndex, texts: list[str], label: str | None, show: bool | None, rows: np.ndarray | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Block by block: the first query's place, the first candidate's, and scores (queries, candidates).

    `rows` are the candidates; None: all.
    """
    task = index.model.task
    ranked_label(task, label)  # refused before anything is embedded
    queries = index.model.encode(texts, convert_to="tensor", show_progress=False)
    outputs = index.model.network.siamese_head.factorised()
    device, count = index.model.device, len(index) if rows is None else len(rows)
    if rows is None:
        blocks = index.embeddings.blocks(index.files, device, max(index.model.network.config.fc_dims))
    else:
        some = ((start, index.files.rows(rows[start : start + BLOCK])) for start in range(0, count, BLOCK))
        blocks = ((start, torch.from_numpy(stored).to(device, torch.float32)) for start, stored in some)
    hidden = None if show is None else not show
    with tqdm(None, "score", len(texts) * count, unit="pair", unit_scale=True, disable=hidden, leave=False) as bar:
        for start, candidates in blocks:
            for row in range(0, len(texts), _QUERIES):
                scores = rank_scores(outputs(queries[row : row + _QUERIES], candidates), task, label)
                yield row, start, scores
                bar.update(scores.numel())


def _row_numbers(rows: Sequence[int], what: str, count: int) -> np.ndarray:
    """Rows as int64. Raises TypeError for anything but whole numbers, IndexError for a row that is not there."""
    numbers = np.asarray(rows)
    if numbers.size and numbers.dtype.kind not in "iu":
        raise TypeError(f"{what}: expected whole numbers, found {numbers.dtype}")
    for row in numbers[(numbers < 0) | (numbers >= count)]:
        raise IndexError(f"{what}: row {row}, but there are {count} candidates")
    return numbers.astype(np.int64)


def _keys(scores: Tensor, start: int) -> Tensor:
    """Scores (queries, candidates), float32, of the candidates from row `start` on, to int64 keys of the same shape.

    Keys order as scores do, and of equal scores the earlier row has the larger key: `topk` of keys is exact, which it
    is not for equal scores, and nothing waits for a GPU. The high 32 bits are those of the score, of which negative
    ones have all bits but the sign inverted, so that they order as integers; the low 32 bits are _LAST_ROW - row.
    Scores that are NaN or infinite become infinity, and so the largest, for who looks at the best to find them.
    """
    bits = (scores.nan_to_num(math.inf, math.inf, math.inf) + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    ordered = bits ^ ((bits >> 31) & _MAGNITUDE)
    after = _LAST_ROW - start
    return (ordered.long() << 32) + torch.arange(after, after - scores.shape[1], -1, device=scores.device)


def _scores_and_rows(keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `_keys` made the keys from, each of their shape: float32 and int64."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & _MAGNITUDE)).view(torch.float32), _LAST_ROW - (keys & _LAST_ROW)


def _stored(files: IndexFiles, start: int) -> Tensor:
    """Up to BLOCK embeddings as stored, from row `start` on, a multiple of BLOCK."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
        return torch.from_numpy(files.block(start))


def _rows_on_cuda(device: torch.device, widest: int) -> int:
    """How many rows a GPU takes at once, a multiple of BLOCK; 0 for another device."""
    return BLOCK * at_once(device, BLOCK * widest) if device.type == "cuda" else 0


def _free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nobody uses, those that torch holds in reserve included."""
    in_reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + in_reserve


class _Embeddings:
    """The embeddings of an index, block by block, on any device; a GPU holds them all while they fit."""

    def __init__(self) -> None:
        self._held: tuple[IndexFiles, Tensor] | None = None  # what they are of, and all of them as stored, on a GPU

    def blocks(self, files: IndexFiles, device: torch.device, hidden: int) -> Iterator[tuple[int, Tensor]]:
        """The first row of each block, and its embeddings (rows, width), float32, on the device.

        A block is valid until the next one is asked for. `hidden` numbers per row are computed from it.
        """
        if self._held is not None and (self._held[0] is not files or self._held[1].device != device):
            self._held = None  # candidates were appended, or the model was moved
        if rows := _rows_on_cuda(device, max(files.content["width"], hidden)):
            return self._on_cuda(files, device, rows)
        return ((start, _stored(files, start).to(device, torch.float32)) for start in range(0, len(files), BLOCK))

    def _on_cuda(self, files: IndexFiles, device: torch.device, rows: int) -> Iterator[tuple[int, Tensor]]:
        """So many rows at a time, from what the GPU holds, or can hold from now on, or else from a stream."""
        blocks, stored = _streamed(files, device, rows), files.arrays[VECTORS]
        if self._held is None and stored.nbytes <= _OF_FREE_MEMORY * _free_memory(device):
            held = torch.empty(stored.shape, dtype=getattr(torch, files.content["dtype"]), device=device)
            for start, block in blocks:
                held[start : start + len(block)] = block
            self._held = files, held  # whole, or not at all
        if self._held is not None:
            blocks = zip(range(0, len(files), rows), self._held[1].split(rows), strict=False)  # none: one empty part
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
            block = _stored(files, start + first)
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


def _embedded(
    model: DSESiameseClassifier, sentences: Iterable[str], batch_size: int, show: bool | None,
    ids: Iterable[str] | None,
) -> Iterator[Part]:  # fmt: skip
    own = None if ids is None else checked_texts(ids, "ids")
    with tqdm(desc="embed", unit="sentence", disable=None if show is None else not show, leave=False) as bar:
        for texts in batches_of(checked_texts(sentences, "sentences"), _EMBED_AT_ONCE, _CHARACTERS_AT_ONCE):
            embeddings = model.encode(texts, batch_size, show_progress=False)
            yield (embeddings, texts) if own is None else (embeddings, texts, list(itertools.islice(own, len(texts))))
            bar.update(len(texts))
    if own is not None and next(own, None) is not None:
        raise ValueError("ids: more than sentences; give one for each")
