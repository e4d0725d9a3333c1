"""Stored candidates, scored by the student's trained head.

    index = CandidateIndex.build(model, sentences, folder)      embeds, once
    index = CandidateIndex.open(folder, model)                  maps the folder's files, reads nothing yet
    index.search("a query", top_k=10)                           [Hit(score, row, text), …], best first

The query is the pair's first text. Nothing but the candidates' texts and embeddings is stored (storage/index_files.py);
each head knows how to score one query against many of them at once (networks/heads.py).
"""

import itertools
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dse.data.features import batches_of
from dse.data.tasks import Task, ranked_label
from dse.models import DSESiameseClassifier
from dse.storage.index_files import BLOCK, VECTORS, IndexFiles, Part
from dse.storage.student_folder import fingerprint
from dse.system.errors import InputError
from dse.system.text_files import checked_texts
from dse.training.kinds import kind_of

_EMBED_AT_ONCE = 4 * BLOCK
_CHARACTERS_AT_ONCE = 1 << 24
_QUERIES = 64  # scored at once


class Hit(NamedTuple):
    """A candidate that a search found."""

    score: float  # of a regression, else the log-odds of the rank label: its probability is sigmoid(score)
    row: int  # from 0, in the order in which the candidates were given
    text: str


class CandidateIndex:
    """Candidates' embeddings and texts in a folder, and a student to score them with; made by `build` or `open`."""

    def __init__(self, model: DSESiameseClassifier, files: IndexFiles, keep: Any = None) -> None:
        self.model, self.files, self.folder, self.width = model, files, files.folder, files.content["width"]
        self._keep = keep  # a temporary folder, removed with the last reference to it

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
    ) -> Self:
        """Embed candidates and store them, in constant memory.

        Args:
            sentences: any iterable of strings, e.g. a file's lines; rows are numbered in their order.
            folder: where it is written, whole or not at all; an index already there is replaced. None: a temporary
                folder, which is removed with the index.
            dtype: "float32", or "float16" for half the space (embeddings rounded to 11 bits).

        Raises InputError for a folder with other files in it.
        """
        return cls.from_embeddings(model, _embedded(model, sentences, batch_size, show_progress), folder, dtype)

    @classmethod
    def from_embeddings(
        cls,
        model: DSESiameseClassifier,
        parts: Iterable[Part],
        folder: str | Path | None = None,
        dtype: str = "float32",
    ) -> Self:
        """As `build`, from parts: embeddings (n, embedding_size) as `model.encode` gives them, and their n texts."""
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

    def append(self, sentences: Iterable[str], batch_size: int = 32, show_progress: bool | None = None) -> None:
        """Add candidates after the existing ones; a stop in between leaves the index as it was."""
        parts = _embedded(self.model, sentences, batch_size, show_progress)
        self.files = self.files.append(fingerprint(self.model), parts)

    def save(self, folder: str | Path) -> None:
        """Copy the index to another folder, whole. Raises InputError for a folder with other files in it."""
        self.files.save(Path(folder))

    def score(self, queries: str | Sequence[str], rank_label: str | None = None) -> np.ndarray:
        """How each candidate ranks for a query: by the probability of the rank label, or the score of a regression.

        Args:
            rank_label: the label whose probability counts; None: the task's own, else entailment, else the second one
                of a binary task.

        Returns:
            float32, (candidates,) for one query, (queries, candidates) for several: `rank_scores` of what `model.score`
            gives for the pairs (query, candidate), to rounding.

        Raises TypeError for anything but text, InputError for a label that the task lacks, or if one must be given.
        """
        texts = [queries] if isinstance(queries, str) else list(checked_texts(queries, "queries"))
        scores = np.empty((len(texts), len(self)), np.float32)
        for row, start, some in self._blocks(texts, rank_label, show=False):
            scores[row : row + len(some), start : start + BLOCK] = some.cpu().numpy()
        return scores[0] if isinstance(queries, str) else scores

    def search(
        self, queries: str | Sequence[str], top_k: int = 10, rank_label: str | None = None,
        show_progress: bool | None = False,
    ) -> list[Hit] | list[list[Hit]]:  # fmt: skip
        """The best candidates of each query, best first, of equals the earlier row first; all if there are fewer.

        `rank_label` is as in `score`. Memory does not grow with the candidates.
        """
        if top_k < 1:
            raise ValueError(f"top_k: {top_k} is below 1")
        texts = [queries] if isinstance(queries, str) else list(checked_texts(queries, "queries"))
        best = [(torch.empty(0), torch.empty(0, dtype=torch.int64))] * len(texts)
        for row, start, some in self._blocks(texts, rank_label, show_progress):
            for query, scores in enumerate(some.cpu(), row):
                best[query] = _best(*best[query], scores, start, top_k)
        found = [zip(scores.tolist(), rows.tolist(), strict=True) for scores, rows in best]
        hits = [[Hit(score, row, self.text(row)) for score, row in each] for each in found]
        return hits[0] if isinstance(queries, str) else hits

    def text(self, row: int) -> str:
        """The candidate of a row."""
        return self.files.text(row)

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """The embeddings of rows `start` to `stop`, as stored, (stop - start, width), without comparing CRCs."""
        return self.files.arrays[VECTORS][start:stop]

    def block(self, start: int) -> Tensor:
        """Up to BLOCK embeddings from row `start` on, a multiple of BLOCK, float32, on the model's device."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
            return torch.from_numpy(self.files.block(start)).to(self.model.device, torch.float32)

    def _blocks(self, texts: list[str], label: str | None, show: bool | None) -> Iterator[tuple[int, int, Tensor]]:
        """Block by block: the first query's place, the first candidate's row, and scores (queries, candidates)."""
        task = self.model.task
        ranked_label(task, label)  # refused before anything is embedded
        queries = self.model.encode(texts, convert_to="tensor", show_progress=False)
        places = list(itertools.product(range(0, len(texts), _QUERIES), range(0, len(self), BLOCK)))
        hidden = None if show is None else not show
        with torch.inference_mode(), tqdm(places, "score", unit="block", disable=hidden, leave=False) as bar:
            outputs = self.model.network.siamese_head.factorised()
            for row, start in bar:
                scores = rank_scores(outputs(queries[row : row + _QUERIES], self.block(start)), task, label)
                if not bool(scores.isfinite().all()):
                    raise InputError(f"{self.folder}: the student's scores are NaN or infinite; train it again")
                yield row, start, scores


def rank_scores(outputs: Tensor, task: Task, rank_label: str | None = None) -> Tensor:
    """What ranks candidates, of the head's outputs: (..., outputs) to (...), float; raises as `ranked_label` does."""
    label = ranked_label(task, rank_label)
    return kind_of(task).rank_scores(outputs, None if label is None else task.labels.index(label))


def _best(scores: Tensor, rows: Tensor, new: Tensor, start: int, top_k: int) -> tuple[Tensor, Tensor]:
    """The best so far and a block's, whose rows begin at `start`, to the best of both, best first."""
    least = new.topk(min(top_k, len(new))).values[-1]
    some = (new >= least).nonzero().squeeze(1)  # all equals of the last one, so that the earliest can win
    scores, rows = torch.cat([scores, new[some]]), torch.cat([rows, some + start])
    order = scores.sort(descending=True, stable=True).indices[:top_k]  # earlier rows come first
    return scores[order], rows[order]


def _embedded(
    model: DSESiameseClassifier, sentences: Iterable[str], batch_size: int, show: bool | None
) -> Iterator[Part]:
    with tqdm(desc="embed", unit="sentence", disable=None if show is None else not show, leave=False) as bar:
        for texts in batches_of(checked_texts(sentences, "sentences"), _EMBED_AT_ONCE, _CHARACTERS_AT_ONCE):
            yield model.encode(texts, batch_size, show_progress=False), texts
            bar.update(len(texts))
