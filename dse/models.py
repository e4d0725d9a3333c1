"""The student: from texts to embeddings, scores and labels, and from and to folders and the hub.

    model = DSESiameseClassifier.from_pretrained(folder)
    model.encode(sentences)          embeddings, one row per sentence
    model.score(pairs)               the head's outputs, as in training
    model.predict(pairs)             labels, or scores for regression
    model.rank(query, documents)     the best of a few documents (index.py: of very many)

A text is cut off after the student's `max_seq_length` tokens, `[CLS]` and `[SEP]` included. Each distinct text is
embedded once per call, in steps of similar length; the other texts of a call change its numbers by rounding only.
After Barkan et al., "Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding", AAAI 2020.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from torch.nn import functional

from dse.data.features import SeparateFeatures, tokenize_texts
from dse.data.tasks import MULTICLASS, REGRESSION, Task, ranked_label
from dse.networks.batches import Batches, pad
from dse.networks.inference import embed_texts, infer_pairs, scoring
from dse.networks.student import SiameseNetwork, Student
from dse.storage.checkpoint import Checkpoint
from dse.storage.student_folder import read_student, write_student
from dse.system.errors import InputError
from dse.system.text_files import checked_texts, elements
from dse.training.kinds import kind_of

Pair = tuple[str, str] | Mapping[str, str]  # a mapping has the keys text and text_pair
_RANKED_AT_ONCE = 4096


class Hit(NamedTuple):
    """A candidate that ranks high for a query."""

    score: float  # of a regression, else the log-odds of the rank label: its probability is sigmoid(score)
    row: int  # from 0, in the order in which the candidates were given
    text: str
    id: str | None = None  # that its candidates were given


class DSESiameseClassifier(Student, ModelHubMixin):
    """A student on texts. `Student` has its fields; `push_to_hub` is huggingface_hub's."""

    def to(self, device: torch.device | str) -> Self:
        """Move the network to a device. Returns the student."""
        self.network.to(device)
        return self

    @classmethod
    def from_pretrained(cls, name: str | Path, **of_hub: Any) -> Self:  # type: ignore[override]  # the mixin names all
        """A student in evaluation mode on the CPU, float32.

        `name` is a folder of `save_pretrained`, the folder of a run of dse_train_runner.py (of which the best epoch
        counts), a checkpoint's file, or a name on the hub. `of_hub` is huggingface_hub's revision, token, cache_dir and
        local_files_only. Raises InputError for a folder that holds no student, or one that is incomplete, corrupt or of
        another version.
        """
        return cls(**vars(read_student(name, **of_hub)))

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Self:
        """The student of a checkpoint of dse_train_runner.py, as `from_pretrained` gives it."""
        return cls(**vars(Checkpoint.read(path).student()))

    def save_pretrained(  # type: ignore[override]  # it takes what push_to_hub gives, and refuses the rest
        self, folder: str | Path, config: None = None, model_card_kwargs: Any = None
    ) -> None:
        """As `write_student`; the other arguments, which `push_to_hub` gives, are ignored."""
        write_student(self, Path(folder))

    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int = 32,
        normalize: bool = False,
        convert_to: str = "numpy",
        show_progress: bool | None = None,
        half: bool = False,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
    ) -> Any:
        """Embed sentences.

        Args:
            sentences: any iterable of strings, or one string.
            batch_size: sentences of full length that a step may hold; of shorter ones it holds more.
            normalize: scale each embedding to length 1.
            convert_to: "numpy", "tensor" (on the model's device) or "list" (of one array per sentence).
            show_progress: whether to show a progress bar; None: if the output is a terminal.
            half: compute with 16 bits (float16 on CUDA, bfloat16 on CPU) and return float16. Embeddings then differ
                by about 0.5 % of the largest number in them.
            convert_to_tensor, normalize_embeddings: as sentence-transformers calls convert_to="tensor", normalize.

        Returns:
            (sentences, embedding_size) in the order given, float32, or float16 with `half`; for one string
            (embedding_size,). No sentences: (0, embedding_size).

        Raises TypeError for anything but text (mappings, sets, tables and bytes included), ValueError for a string that
        UTF-8 cannot hold and for other wrong arguments.
        """
        convert_to = "tensor" if convert_to_tensor else convert_to
        if convert_to not in ("numpy", "tensor", "list"):
            raise ValueError(f"convert_to: {convert_to!r} is not one of numpy, tensor, list")
        _check_count(batch_size, "batch_size")
        alone = isinstance(sentences, str)
        texts = list(checked_texts([sentences] if alone else sentences, "sentences"))
        batches = _batches(self, texts, [])
        with _precision(self.network, half):
            distinct = embed_texts(self.network, batches, batch_size, self.device, "encode", show_progress)
        in_order = distinct[batches.features.first].reshape(len(texts), self.network.config.embedding_size)  # or (0, 0)
        embeddings: Any = torch.from_numpy(in_order)
        if normalize or normalize_embeddings:
            embeddings = functional.normalize(embeddings, eps=torch.finfo(torch.float32).tiny)
        embeddings = embeddings.to(torch.float16 if half else torch.float32)
        embeddings = embeddings.to(self.device) if convert_to == "tensor" else embeddings.numpy()
        return embeddings[0] if alone else list(embeddings) if convert_to == "list" else embeddings

    def score(self, pairs: Iterable[Pair], batch_size: int = 32, show_progress: bool | None = None) -> np.ndarray:
        """The head's outputs for pairs of texts, the first one being the query if that matters.

        Args:
            pairs: (text, text), or {"text": ..., "text_pair": ...}, each.
            batch_size: pairs of full length that a step may hold; of shorter ones it holds more.

        Returns:
            float32, in the order given: (pairs,) logits of the task's second label, or scores for regression;
            (pairs, labels) logits for multiclass, labels in the task's order.

        Raises TypeError for anything but pairs of texts, ValueError for wrong arguments, InputError for NaN outputs.
        """
        _check_count(batch_size, "batch_size")
        batches, width = _batches(self, *_sides(pairs)), self.network.config.fc_dims[-1]
        outputs = infer_pairs(self.network, batches, batch_size, self.device, "score", show_progress)
        finite(torch.from_numpy(outputs), "score")
        return outputs[:, 0] if width == 1 else outputs

    def predict(
        self,
        pairs: Iterable[Pair],
        probabilities: bool | str = False,
        threshold: float | None = None,
        batch_size: int = 32,
        show_progress: bool | None = None,
    ) -> list[str] | np.ndarray:
        """Labels of pairs; scores for regression.

        Args:
            probabilities: float32 instead of labels. True: of a binary task (pairs,), the probability of the label that
                ranks (tasks.ranked_label: "entailment" of RTE and QNLI, "1" of MRPC); of a multiclass task
                (pairs, labels), labels in the task's order. "all": (pairs, labels) for both.
            threshold: in binary tasks, a pair has the second label if that label's probability is strictly above it.
                None: the threshold that was best on dev in training (`self.threshold`).

        Raises ValueError for probabilities of a regression, TypeError as `score` does.
        """
        task, kind = self.task, kind_of(self.task)
        if probabilities not in (False, True, "all"):
            raise ValueError(f"probabilities: got {probabilities!r}, expected False, True or 'all'")
        check_probabilities(task, bool(probabilities))
        outputs = self.score(pairs, batch_size, show_progress)
        if task.kind == REGRESSION:
            return outputs
        rows = outputs.reshape(len(outputs), self.network.config.fc_dims[-1])
        if not probabilities:
            places = kind.decisions(rows, self.threshold if threshold is None else threshold)
            return [task.labels[place] for place in places]
        of_labels = kind.probabilities(rows)
        both = probabilities == "all" or task.kind == MULTICLASS
        return of_labels if both else of_labels[:, task.labels.index(ranked_label(task))]

    @torch.inference_mode()
    def rank(
        self, query: str, documents: Iterable[str], top_k: int | None = None, rank_label: str | None = None,
        probabilities: bool = False, batch_size: int = 32,
    ) -> list[Hit]:  # fmt: skip
        """The best documents for a query, best first, of equals the earlier one first; all without `top_k`.

        `rank_label` and `probabilities` are as in `CandidateIndex.search`, which keeps embeddings for more queries.
        """
        check_probabilities(self.task, probabilities)
        check_top_k(top_k)
        texts = list(checked_texts(documents, "documents"))
        embeddings = self.encode([query, *texts], batch_size, convert_to="tensor")
        with scoring(self.network.siamese_head, self.device):
            outputs = self.network.siamese_head.factorised()
            parts = [outputs(embeddings[:1], some) for some in embeddings[1:].split(_RANKED_AT_ONCE)]
        scores = finite(rank_scores(torch.cat(parts, dim=1), self.task, rank_label)[0].cpu(), "rank")
        rows = scores.argsort(descending=True, stable=True)[:top_k]
        return make_hits(scores[rows], rows.tolist(), texts.__getitem__, lambda row: None, None, probabilities)


class SentenceTransformerModule(torch.nn.Module):
    """A student as the one module of a SentenceTransformer (sentence-transformers 6.x), with the same embeddings.

    SentenceTransformer(folder, trust_remote_code=True) loads a student's folder, whose modules.json names this class.
    """

    def __init__(self, student: DSESiameseClassifier) -> None:
        super().__init__()
        self.student, self.network, self.tokenizer = student, student.network, student.tokenizer
        self.max_seq_length = student.max_seq_length

    @classmethod
    def load(
        cls, name: str, subfolder: str = "", token: Any = None, cache_folder: str | None = None,
        revision: str | None = None, local_files_only: bool = False, **_: Any,
    ) -> Self:  # fmt: skip
        """As `DSESiameseClassifier.from_pretrained`."""
        of_hub = {"token": token, "cache_dir": cache_folder, "revision": revision, "local_files_only": local_files_only}
        return cls(DSESiameseClassifier.from_pretrained(Path(name, subfolder) if subfolder else name, **of_hub))

    def save(self, folder: str, **_: Any) -> None:
        """Write the student's folder."""
        self.student.save_pretrained(folder)

    def get_embedding_dimension(self) -> int:
        """The size of the embeddings."""
        return self.network.config.embedding_size

    def preprocess(self, texts: list[str], prompt: str | None = None, **_: Any) -> dict[str, torch.Tensor]:
        """Token ids and mask of texts, (texts, longest), int64."""
        whole = [(prompt or "") + text for text in texts]
        tokens, places = tokenize_texts(whole, self.tokenizer, self.max_seq_length)
        ids, mask = pad(tokens, places, self.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """The features with sentence_embedding, (texts, embedding_size), float32."""
        return {**features, "sentence_embedding": self.network.embed(features["input_ids"], features["attention_mask"])}


def _batches(student: Student, firsts: list[str], seconds: list[str]) -> Batches:
    distinct, places = tokenize_texts(firsts + seconds, student.tokenizer, student.max_seq_length)
    first, second = places[: len(firsts)], places[len(firsts) :]
    features = SeparateFeatures(distinct, first, second, None, student.tokenizer.pad_token_id)
    return Batches(features, "packed", student.max_seq_length)


def _precision(network: SiameseNetwork, half: bool) -> torch.autocast:
    kind, own = network.device.type, next(network.parameters()).dtype  # another dtype keeps to its own
    quantized = any("quantized" in type(module).__module__ for module in network.modules())  # float32 alone
    enabled = half and own == torch.float32 and not quantized
    return torch.autocast(kind, torch.float16 if kind == "cuda" else torch.bfloat16, enabled=enabled)


def rank_scores(outputs: torch.Tensor, task: Task, rank_label: str | None = None) -> torch.Tensor:
    """What ranks candidates, of the head's outputs: (..., outputs) to (...), float; raises as `ranked_label` does."""
    label = ranked_label(task, rank_label)
    return kind_of(task).rank_scores(outputs, None if label is None else task.labels.index(label))


def finite(scores: torch.Tensor, where: object) -> torch.Tensor:
    """The scores, which are on the host. Raises InputError if any is NaN or infinite."""
    if not bool(scores.isfinite().all()):
        raise InputError(f"{where}: the student's scores are NaN or infinite; train it again")
    return scores


def make_hits(
    scores: torch.Tensor, rows: Sequence[int], text: Callable[[int], str], id_of: Callable[[int], str | None],
    min_score: float | None = None, probabilities: bool = False,
) -> list[Hit]:  # fmt: skip
    """The hits of a query, of scores (n,) and their rows, best first, without those below `min_score`."""
    values = (scores.double().sigmoid() if probabilities else scores).tolist()
    found = [(score, row) for score, row in zip(values, rows, strict=True) if min_score is None or score >= min_score]
    return [Hit(score, row, text(row), id_of(row)) for score, row in found]


def check_top_k(top_k: int | None) -> None:
    """Raise TypeError for what is not a whole number, ValueError for fewer hits than one; None is all."""
    if top_k is not None:
        _check_count(top_k, "top_k")


def check_probabilities(task: Task, wanted: bool) -> None:
    """Raise ValueError if probabilities are wanted of a regression."""
    if wanted and task.kind == REGRESSION:
        raise ValueError(f"probabilities: {task.name} is a regression, which has none; leave it out")


def _check_count(count: int, what: str) -> None:
    if not isinstance(count, Integral):
        raise TypeError(f"{what}: got {type(count).__name__}, expected a whole number")
    if count < 1:
        raise ValueError(f"{what}: {count} is below 1")


def _sides(pairs: Iterable[Pair]) -> tuple[list[str], list[str]]:
    firsts, seconds = [], []
    for i, pair in enumerate(elements(pairs, "pairs", "a list of pairs of texts")):
        if isinstance(pair, Mapping) and set(pair) == {"text", "text_pair"}:
            pair = pair["text"], pair["text_pair"]
        pair = list(elements(pair, f"pairs, number {i}", "(text, text), or a mapping of text and text_pair alone"))
        if len(pair) != 2:
            raise TypeError(f"pairs, number {i}: got {len(pair)} texts, expected 2")
        firsts.append(pair[0])
        seconds.append(pair[1])
    return list(checked_texts(firsts, "pairs, first texts")), list(checked_texts(seconds, "pairs, second texts"))
