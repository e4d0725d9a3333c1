"""Texts in, embeddings and scores out: what a trained student is used with.

    model = DSESiameseClassifier.from_pretrained(folder)
    model.encode(sentences)          embeddings, one row per sentence
    model.score(pairs)               the head's outputs, as in training
    model.predict(pairs)             labels, or scores for regression

Texts are what Python calls strings, of any length: what is beyond the student's `max_seq_length` tokens is cut off,
`[CLS]` and `[SEP]` counted, and an empty text is `[CLS] [SEP]`. Each distinct text is embedded once per call, in
steps of similar length; what else is in a call changes a number by rounding only.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dse.evaluation import embed_texts, predict_pairs
from dse.features import SeparateFeatures, encode_texts, padding_for
from dse.metrics import sigmoid
from dse.processors import BINARY, REGRESSION, Task


@dataclass(frozen=True)
class TextSettings:
    """What a student needs beside its weights to take texts: the tokenizer and length of its training, its task."""

    tokenizer: Any
    task: Task
    max_seq_length: int  # token ids per sentence


class TextInterface:
    """encode, score and predict, for a student that has `settings`."""

    settings: TextSettings | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int = 32,
        normalize: bool = False,
        convert_to: str = "numpy",
        show_progress: bool | None = None,
        half: bool = False,
    ) -> Any:
        """Embed sentences.

        Args:
            sentences: any iterable of strings, or one string.
            batch_size: sentences of full length that a step may hold; of shorter ones it holds more.
            normalize: scale each embedding to length 1.
            convert_to: "numpy", "tensor" (on the model's device) or "list" (of one array per sentence).
            show_progress: a progress bar; None: where the output is a terminal.
            half: compute with 16 bits (float16 on CUDA, bfloat16 on CPU) and return float16. Embeddings then differ
                by about 0.5 % of the largest number in them.

        Returns:
            (sentences, embedding_size) in the order given, float32, or float16 with `half`; for one string
            (embedding_size,). No sentences: (0, embedding_size).

        Raises TypeError for what is no string, ValueError for one that cannot be UTF-8 or for other wrong arguments.
        """
        if convert_to not in ("numpy", "tensor", "list"):
            raise ValueError(f"convert_to: {convert_to!r} is none of numpy, tensor, list")
        _check_batch_size(batch_size)
        alone = isinstance(sentences, str)
        texts = _checked([sentences] if alone else list(sentences), "sentences")
        embeddings = np.empty((0, self.config.embedding_size), np.float32)
        if texts:
            features = self._features(texts, texts)
            with self._precision(half):
                distinct = embed_texts(self, features, batch_size, self.device, "encode", show_progress)
            embeddings = distinct[features.first]
        if normalize:
            lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
            embeddings = embeddings / np.maximum(lengths, np.finfo(np.float32).tiny)
        embeddings = embeddings.astype(np.float16 if half else np.float32, copy=False)
        if convert_to == "tensor":
            embeddings = torch.from_numpy(embeddings).to(self.device)
        if alone:
            return embeddings[0]
        return list(embeddings) if convert_to == "list" else embeddings

    def score(
        self, pairs: Iterable[tuple[str, str]], batch_size: int = 32, show_progress: bool | None = None
    ) -> np.ndarray:
        """The head's outputs for pairs of texts, the first one being the query where that matters.

        Args:
            batch_size, show_progress: as in `encode`.

        Returns:
            float32, in the order given: (pairs,) logits of "positive", or scores for regression; (pairs, labels)
            logits for multiclass, labels in the task's order.
        """
        _check_batch_size(batch_size)
        firsts, seconds = _sides(pairs)
        width = self.config.fc_dims[-1]
        outputs = np.empty((0, width), np.float32)
        if firsts:
            features = self._features(firsts, seconds)
            outputs = predict_pairs(self, features, batch_size, self.device, "score", show_progress)
        return outputs[:, 0] if width == 1 else outputs

    def predict(
        self,
        pairs: Iterable[tuple[str, str]],
        probabilities: bool = False,
        threshold: float = 0.5,
        batch_size: int = 32,
        show_progress: bool | None = None,
    ) -> list[str] | np.ndarray:
        """Labels of pairs; scores for regression.

        Args:
            probabilities: float32 instead of labels: (pairs,) of the positive one, or (pairs, labels).
            threshold: binary: a pair is positive above it, strictly.
            batch_size, show_progress: as in `encode`.

        Raises ValueError for probabilities of a regression.
        """
        task = self._settings().task
        if task.kind == REGRESSION and probabilities:
            raise ValueError(f"probabilities: {task.name} is a regression, which has none; leave it out")
        outputs = self.score(pairs, batch_size, show_progress)
        if task.kind == REGRESSION:
            return outputs
        if task.kind == BINARY:
            positive = sigmoid(outputs)
            if probabilities:
                return positive.astype(np.float32)
            return [task.labels[int(above)] for above in positive > threshold]
        if probabilities:
            return torch.from_numpy(outputs).softmax(dim=-1).numpy()
        return [task.labels[best] for best in outputs.argmax(axis=1)]

    def _settings(self) -> TextSettings:
        if self.settings is None:
            raise ValueError("this student has no tokenizer: load it with from_pretrained, or set `settings`")
        return self.settings

    def _features(self, firsts: list[str], seconds: list[str]) -> SeparateFeatures:
        settings = self._settings()
        texts = firsts if firsts is seconds else firsts + seconds
        distinct, places = encode_texts(texts, settings.tokenizer, settings.max_seq_length)
        padding = padding_for(self.device, None)
        return SeparateFeatures(
            distinct, places[: len(firsts)], places[-len(seconds) :], None, settings.tokenizer.pad_token_id,
            padding=padding, max_seq_length=settings.max_seq_length,
        )  # fmt: skip

    def _precision(self, half: bool) -> torch.autocast:
        kind, own = self.device.type, next(self.parameters()).dtype  # a model of another dtype keeps to its own
        enabled = half and own == torch.float32
        return torch.autocast(kind, torch.float16 if kind == "cuda" else torch.bfloat16, enabled=enabled)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is below 1")


def _sides(pairs: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    both = [pair if isinstance(pair, str) else tuple(pair) for pair in pairs]
    for i, pair in enumerate(both):
        if isinstance(pair, str) or len(pair) != 2:
            raise TypeError(f"pairs: number {i} is no pair of texts: {str(pair)[:80]!r}")
    firsts, seconds = ([pair[side] for pair in both] for side in (0, 1))
    return _checked(firsts, "pairs, first texts"), _checked(seconds, "pairs, second texts")


def _checked(texts: list[Any], what: str) -> list[str]:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{what}: number {i} is a {type(text).__name__}, and a string was expected")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{what}: number {i} is no text that UTF-8 can hold ({error.reason})") from error
    return texts
