"""Stored candidates, scored by the student's trained head.

    index = CandidateIndex.build(model, sentences, folder)      embeds, once
    index = CandidateIndex.open(folder, model)                  maps the folder's files, reads nothing yet
    index.search("a query", top_k=10)                           [Hit(score, row, text, id), …], best first

The query is the pair's first text. Nothing but the candidates' texts and embeddings is stored (storage/index_files.py);
each head knows how to score one query against many of them at once (networks/heads.py). A GPU keeps the embeddings
while they fit, or else they stream to it for each call. A shortlist, the candidates that are nearest by the cosine of
the top layer, spares the head most of them. Where bfloat16 is fast, a large index is searched in it first, and the hits
are found in float32 among the candidates that a bound of the error leaves.
"""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dse.data.features import batches_of
from dse.data.tasks import ranked_label
from dse.models import DSESiameseClassifier, Hit, check_probabilities, check_top_k, finite, make_hits, rank_scores
from dse.networks.inference import rank_keys, scores_and_rows, scoring
from dse.storage.index_files import BLOCK, VECTORS, Embeddings, IndexFiles, Part, nearest
from dse.storage.student_folder import fingerprint
from dse.system.device import has_bfloat16
from dse.system.errors import InputError
from dse.system.text_files import checked_texts

_EMBED_AT_ONCE, _CHARACTERS_AT_ONCE = 4 * BLOCK, 1 << 24
_QUERIES = 64  # scored at once
# A shortlist of "auto": hits that decide, at least; candidates for each of them in the first list; in the longest list.
_HITS, _FIRST, _LONGEST = 10, 25, 8000
_MANY = 500_000  # candidates for which such lists are enough; among n times as many they are n times as long
_LEAST = torch.iinfo(torch.int64).min  # below all keys
_LEFT = BLOCK  # by a first pass, at most
_WORTH_TWO = {"cpu": 4, "cuda": 32}  # how many times as many make one worth while


class CandidateIndex:
    """Candidates' embeddings and texts in a folder, and a student to score them with; made by `build` or `open`.

    The student's weights must stay as they are. A call sees the candidates that were there when it began.
    """

    def __init__(self, model: DSESiameseClassifier, files: IndexFiles, keep: Any = None) -> None:
        self.model, self.files, self.folder, self.width = model, files, files.folder, files.content["width"]
        self._keep = keep  # a temporary folder, removed with the last reference to it
        self.embeddings = Embeddings()

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
        config = model.network.config
        sizes = {"width": config.embedding_size, "top": config.top_size}
        return cls(model, IndexFiles.create(folder, fingerprint(model), dtype=dtype, parts=parts, **sizes), keep)

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
        index, texts = copy(self), [queries] if isinstance(queries, str) else list(checked_texts(queries, "queries"))
        wanted = None if rows is None else _row_numbers(rows, "rows", len(index))
        scores = np.empty((len(texts), len(index) if wanted is None else len(wanted)), np.float32)
        embeddings = _embedded_queries(index, texts, rank_label)
        with scoring(self.model.network.siamese_head, self.model.device):
            for row, start, some in _blocks(index, embeddings, rank_label, False, wanted):
                scores[row : row + len(some), start : start + some.shape[1]] = finite(some.cpu(), self.folder).numpy()
        return scores[0] if isinstance(queries, str) else scores

    @torch.inference_mode()
    def search(
        self, queries: str | Sequence[str], top_k: int = 10, rank_label: str | None = None,
        show_progress: bool | None = False, exclude: Sequence[int] = (), min_score: float | None = None,
        probabilities: bool = False, shortlist: int | str | None = None,
    ) -> list[Hit] | list[list[Hit]]:  # fmt: skip
        """The best candidates of each query, best first, of equal scores the earlier row first; all if there are fewer.

        Args:
            shortlist: score only so many candidates, the nearest by the cosine of the top layer. "auto": each query's
                list doubles until its second half adds no hit; all if thousands are not enough. None: all.
            rank_label: as in `score`.
            exclude: rows that are never found, such as the query's own.
            min_score: hits below it are left out.
            probabilities: the hits' scores, and `min_score`, are probabilities of the rank label.

        Memory does not grow with the candidates, but for what a GPU holds of them. Raises as `score` does, ValueError
        for other wrong arguments.
        """
        check_top_k(top_k)
        check_probabilities(self.model.task, probabilities)
        index, texts = copy(self), [queries] if isinstance(queries, str) else list(checked_texts(queries, "queries"))
        left_out = np.unique(_row_numbers(exclude, "exclude", len(index)))
        kept, way = min(top_k, len(index) - len(left_out)), _search_way(index, shortlist, top_k)
        given = (index, _embedded_queries(index, texts, rank_label), kept, left_out, rank_label, show_progress)
        with scoring(self.model.network.siamese_head, self.model.device):
            best = (way if kept else _best_of_all)(*given)
            scores, rows = scores_and_rows(best.cpu())  # waits for a GPU, once
        found = zip(finite(scores, self.folder), rows.tolist(), strict=True)
        hits = [make_hits(*each, index.text, index.id, min_score, probabilities) for each in found]
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


def _embedded_queries(index: CandidateIndex, texts: list[str], label: str | None) -> Tensor:
    """The embeddings, (queries, width), float32; a label that the task lacks is refused before."""
    ranked_label(index.model.task, label)
    return index.model.encode(texts, convert_to="tensor", show_progress=False)


def _blocks(
    index: CandidateIndex, queries: Tensor, label: str | None, show: bool | None, rows: np.ndarray | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Block by block: the first query's place, the first candidate's, and scores (queries, candidates).

    `rows` are the candidates; None: all.
    """
    task, outputs = index.model.task, index.model.network.siamese_head.factorised()
    device, count = index.model.device, len(index) if rows is None else len(rows)
    if rows is None:
        blocks = index.embeddings.blocks(index.files, device, max(index.model.network.config.fc_dims))
    else:
        some = ((start, index.files.rows(rows[start : start + BLOCK])) for start in range(0, count, BLOCK))
        blocks = ((start, torch.from_numpy(stored).to(device, torch.float32)) for start, stored in some)
    with _bar(len(queries) * count, show) as bar:
        for start, candidates in blocks:
            for row in range(0, len(queries), _QUERIES):
                scores = rank_scores(outputs(queries[row : row + _QUERIES], candidates), task, label)
                yield row, start, scores
                bar.update(scores.numel())


def _bar(pairs: int, show: bool | None) -> tqdm:
    return tqdm(None, "score", pairs, False, unit="pair", unit_scale=True, disable=None if show is None else not show)


def _best_of_all(index: CandidateIndex, queries: Tensor, kept: int, *given: Any) -> Tensor:
    """The keys of the best candidates of each query, (queries, kept), the best first."""
    # Else float32 products would not have the errors that a first pass reckons with.
    plain = torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled(queries.device.type)
    two = plain and 0 < kept <= _LEFT // 4 and has_bfloat16(queries.device)
    worth_while = two and len(index) >= _WORTH_TWO[queries.device.type] * _LEFT
    return (_best_in_two_passes if worth_while else _best_in_one_pass)(index, queries, kept, *given)


def _best_in_one_pass(
    index: CandidateIndex, queries: Tensor, kept: int, left_out: np.ndarray, label: str | None, show: bool | None
) -> Tensor:
    """As `_best_of_all`."""
    best = torch.full((len(queries), kept), _LEAST, device=queries.device)
    for row, start, some in _blocks(index, queries, label, show):
        of_some = best[row : row + len(some)]
        keys = rank_keys(some, torch.arange(start, start + some.shape[1], device=some.device))
        if len(left_out):
            keys[:, left_out[(left_out >= start) & (left_out < start + keys.shape[1])] - start] = _LEAST
        of_some.copy_(torch.cat([of_some, keys], dim=1).topk(kept).values)
    return best


def _best_in_two_passes(
    index: CandidateIndex, queries: Tensor, kept: int, left_out: np.ndarray, label: str | None, show: bool | None
) -> Tensor:
    """As `_best_of_all`, but with products in bfloat16; in float32 for the candidates whose place their errors decide.

    Queries of which these are more than _LEFT, as where all are nearly equal, get one pass.
    """
    best, again = torch.full((len(queries), kept), _LEAST, device=queries.device), list[int]()
    outputs = index.model.network.siamese_head.factorised()
    with _bar(len(queries) * len(index), show) as bar:
        for start in range(0, len(queries), _QUERIES):
            highest = _highest(index, queries[start : start + _QUERIES], kept, left_out, label, bar)
            for place, rows in enumerate(highest, start):
                if rows is None:
                    again.append(place)
                else:
                    best[place] = _best_of_rows(index, outputs, queries[place], rows, kept, label)
    if again:
        best[again] = _best_in_one_pass(index, queries[again], kept, left_out, label, show)
    return best


def _highest(
    index: CandidateIndex, queries: Tensor, kept: int, left_out: np.ndarray, label: str | None, bar: tqdm
) -> list[Tensor | None]:
    """For each query the rows on CPU that may be among the best `kept`; None if they may be more than _LEFT."""
    if (rounded := index.model.network.siamese_head.rounded(queries)) is None:  # it has no large products
        return [None] * len(queries)
    device, half = queries.device, len(index) // 2
    lowest = torch.full((len(queries), kept), -math.inf, device=device)  # the best of the scores' lower bounds
    highest = torch.empty(len(queries), 0, dtype=torch.int64, device=device)  # keys of the best upper bounds
    for start, candidates in index.embeddings.blocks(index.files, device, max(index.model.network.config.fc_dims)):
        stop, (found, errors) = start + len(candidates), rounded(candidates)
        scores, errors = rank_scores(found, index.model.task, label), errors * min(2, found.shape[-1])  # of log-odds
        lower = (scores - errors).nan_to_num(-math.inf, -math.inf, -math.inf)
        keys = rank_keys(scores + errors, torch.arange(start, stop, device=device))
        gone = left_out[(left_out >= start) & (left_out < stop)] - start
        lower[:, gone], keys[:, gone] = -math.inf, _LEAST
        lowest = torch.cat([lowest, lower], dim=1).topk(kept).values
        highest = torch.cat([highest, keys], dim=1)
        highest = highest.topk(min(_LEFT, highest.shape[1])).values
        bar.update(scores.numel())
        if start < half <= stop or stop == len(index):
            more = (scores_and_rows(highest[:, -1])[0] >= lowest[:, -1]) & (highest.shape[1] == _LEFT)
            if more.float().mean() > 0.5:
                return [None] * len(queries)
    uppers, rows = scores_and_rows(highest)  # NaN for _LEAST
    each = zip(rows.cpu(), (uppers >= lowest[:, -1:]).cpu(), more.tolist(), strict=True)
    return [None if too_many else some[wanted] for some, wanted, too_many in each]


def _best_of_rows(index: CandidateIndex, outputs: Any, u: Tensor, rows: Tensor, kept: int, label: Any) -> Tensor:
    """The keys of the best of these rows, (rows,) on CPU, (1, kept or fewer); `outputs` is from `factorised`."""
    candidates = torch.from_numpy(index.files.rows(rows.numpy())).to(u.device, torch.float32)
    scores = rank_scores(outputs(u[None], candidates), index.model.task, label)
    return rank_keys(scores, rows.to(u.device)).topk(min(kept, len(rows))).values


def _search_way(index: CandidateIndex, shortlist: int | str | None, top_k: int) -> Callable[..., Tensor]:
    """The function that finds the best, called as `_best_of_all`. Raises ValueError for what is no shortlist."""
    if shortlist is None:
        return _best_of_all
    if "top" not in index.files.content:
        raise InputError(f"{index.folder}: was built before there were shortlists; build it again")
    if shortlist == "auto":
        return _best_of_enough
    if not isinstance(shortlist, Integral) or isinstance(shortlist, bool) or shortlist < top_k:
        what = f"neither 'auto' nor a whole number of at least top_k, {top_k}"
        raise ValueError(f"shortlist: {shortlist!r} is {what}")
    return partial(_best_of_nearest, int(shortlist))


def _nearest(
    index: CandidateIndex, queries: Tensor, size: int, left_out: np.ndarray
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each query's embedding, and the rows of its `size` nearest candidates, or of all, on CPU, the nearest first."""
    count = min(size, len(index) - len(left_out))
    for some in queries.split(_QUERIES):
        for u, rows in zip(some, nearest(index.files, some, count + len(left_out)), strict=True):
            yield u, rows[~torch.isin(rows, torch.from_numpy(left_out))][:count]


def _best_of_nearest(
    size: int, index: CandidateIndex, queries: Tensor, kept: int, left_out: np.ndarray, label: str | None, _: Any
) -> Tensor:
    """As `_best_of_all`, of the `size` nearest candidates of each query alone, (queries, kept or fewer)."""
    outputs = index.model.network.siamese_head.factorised()
    best = [_best_of_rows(index, outputs, *each, kept, label) for each in _nearest(index, queries, size, left_out)]
    return torch.cat(best) if best else torch.empty(0, kept, dtype=torch.int64)


def _best_of_enough(
    index: CandidateIndex, queries: Tensor, kept: int, left_out: np.ndarray, label: str | None, show: bool | None
) -> Tensor:
    """As `_best_of_all`, of each query's nearest candidates, in a list that doubles until its second half adds no hit.

    At least _HITS hits decide, because fewer could stay the same by chance. Lists grow with the number of candidates,
    as more of these are about as near. A query for which _LONGEST are not enough gets all candidates.
    """
    best, again = torch.full((len(queries), kept), _LEAST, device=queries.device), list[int]()
    count, outputs = len(index) - len(left_out), index.model.network.siamese_head.factorised()
    hits, scale = max(kept, _HITS), max(1, count // _MANY)
    first, longest = _FIRST * hits * scale, _LONGEST * scale
    if 2 * first > longest and count > longest:
        return _best_of_all(index, queries, kept, left_out, label, show)
    for place, (u, rows) in enumerate(_nearest(index, queries, longest, left_out)):
        size, found = first, _best_of_rows(index, outputs, u, rows[:first], hits, label)
        while size < len(rows):
            before, more = found, _best_of_rows(index, outputs, u, rows[size : 2 * size], hits, label)
            found, size = torch.cat([found, more], dim=1), 2 * size
            found = found.topk(min(hits, found.shape[1])).values
            if size <= len(rows) and torch.equal(found, before):
                break
        else:
            if len(rows) < count:
                again.append(place)
                continue
        best[place] = found[0, :kept]
    if again:
        best[again] = _best_of_all(index, queries[again], kept, left_out, label, show)
    return best


def _row_numbers(rows: Sequence[int], what: str, count: int) -> np.ndarray:
    """Rows as int64. Raises TypeError for anything but whole numbers, IndexError for a row that is not there."""
    numbers = np.asarray(rows)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise TypeError(f"{what}: expected a list of whole numbers, found {numbers.dtype} of shape {numbers.shape}")
    for row in numbers[(numbers < 0) | (numbers >= count)]:
        raise IndexError(f"{what}: row {row}, but there are {count} candidates")
    return numbers.astype(np.int64)


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
