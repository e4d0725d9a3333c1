"""The student on texts: embeddings and scores of texts, labels, folders and the hub.

    model = DSESiameseClassifier.from_pretrained(folder)
    model.encode(sentences)          embeddings, one row per sentence
    model.score(pairs)               the head's outputs, as in training
    model.predict(pairs)             labels, or scores for regression

Texts are what Python calls strings, of any length: what is beyond the student's `max_seq_length` tokens is cut off,
`[CLS]` and `[SEP]` counted, and an empty text is `[CLS] [SEP]`. Each distinct text is embedded once per call, in
steps of similar length; what else is in a call changes a number by rounding only.

After Barkan et al., "Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding", AAAI 2020.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from dse.data.features import SeparateFeatures, tokenize_texts
from dse.data.tasks import DEFAULT_THRESHOLD, MULTICLASS, REGRESSION, Task, ranked_label
from dse.networks.batches import padding_for
from dse.networks.config import DSEConfig
from dse.networks.heads import SiameseHead
from dse.networks.inference import embed_texts, infer_pairs
from dse.networks.student import DSEModel, _load
from dse.storage.student_folder import Shareable
from dse.system.text_files import checked_texts, elements
from dse.training.metrics import decisions, sigmoid

Pair = tuple[str, str] | Mapping[str, str]  # a mapping has the keys text and text_pair


@dataclass(frozen=True)
class TextSettings:
    """What a student needs beside its weights to take texts: the tokenizer and length of its training, its task."""

    tokenizer: Any
    task: Task
    max_seq_length: int  # token ids per sentence
    threshold: float = DEFAULT_THRESHOLD  # binary: above it, strictly, `predict` says the second label


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

        Raises TypeError for what is not text (mappings, sets, tables and bytes too), ValueError for a string that UTF-8
        cannot hold and for other wrong arguments.
        """
        if convert_to not in ("numpy", "tensor", "list"):
            raise ValueError(f"convert_to: {convert_to!r} is none of numpy, tensor, list")
        _check_batch_size(batch_size)
        alone = isinstance(sentences, str)
        texts = list(checked_texts([sentences] if alone else sentences, "sentences"))
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

    def score(self, pairs: Iterable[Pair], batch_size: int = 32, show_progress: bool | None = None) -> np.ndarray:
        """The head's outputs for pairs of texts, the first one being the query where that matters.

        Args:
            pairs: (text, text), or {"text": ..., "text_pair": ...}, each.
            batch_size, show_progress: as in `encode`.

        Returns:
            float32, in the order given: (pairs,) logits of the task's second label, or scores for regression;
            (pairs, labels) logits for multiclass, labels in the task's order.

        Raises TypeError for what is not a pair of texts, ValueError for wrong arguments.
        """
        _check_batch_size(batch_size)
        firsts, seconds = _sides(pairs)
        width = self.config.fc_dims[-1]
        outputs = np.empty((0, width), np.float32)
        if firsts:
            features = self._features(firsts, seconds)
            outputs = infer_pairs(self, features, batch_size, self.device, "score", show_progress)
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
            pairs: as in `score`.
            probabilities: float32 instead of labels. True: of a binary task (pairs,), the probability of the label that
                ranks (processors.ranked_label: "entailment" of RTE and QNLI, "1" of MRPC); of a multiclass task
                (pairs, labels), labels in the task's order. "all": (pairs, labels) for both.
            threshold: binary: a pair has the second label where that one's probability is above it, strictly. None: the
                one that was best on dev in training (`settings.threshold`).
            batch_size, show_progress: as in `encode`.

        Raises ValueError for probabilities of a regression, TypeError as `score` does.
        """
        task = self._settings().task
        if probabilities not in (False, True, "all"):
            raise ValueError(f"probabilities: got {probabilities!r}, expected False, True or 'all'")
        if task.kind == REGRESSION and probabilities:
            raise ValueError(f"probabilities: {task.name} is a regression, which has none; leave it out")
        outputs = self.score(pairs, batch_size, show_progress)
        if task.kind == REGRESSION:
            return outputs
        if not probabilities:
            rows = outputs.reshape(len(outputs), self.config.fc_dims[-1])
            threshold = self.settings.threshold if threshold is None else threshold
            return [task.labels[place] for place in decisions(task.kind, rows, threshold)]
        if task.kind == MULTICLASS:
            return torch.from_numpy(outputs).softmax(dim=-1).numpy()
        of_labels = np.stack([sigmoid(-outputs), sigmoid(outputs)], axis=1).astype(np.float32)
        return of_labels if probabilities == "all" else of_labels[:, task.labels.index(ranked_label(task))]

    def _settings(self) -> TextSettings:
        if self.settings is None:
            raise ValueError("this student has no tokenizer: load it with from_pretrained, or set `settings`")
        return self.settings

    def _features(self, firsts: list[str], seconds: list[str]) -> SeparateFeatures:
        settings = self._settings()
        texts = firsts if firsts is seconds else firsts + seconds
        distinct, places = tokenize_texts(texts, settings.tokenizer, settings.max_seq_length)
        padding = padding_for(self.device, None)
        return SeparateFeatures(
            distinct, places[: len(firsts)], places[-len(seconds) :], None, settings.tokenizer.pad_token_id,
            padding=padding, max_seq_length=settings.max_seq_length,
        )  # fmt: skip

    def _precision(self, half: bool) -> torch.autocast:
        kind, own = self.device.type, next(self.parameters()).dtype  # a model of another dtype keeps to its own
        quantized = any("quantized" in type(module).__module__ for module in self.modules())  # these take float32 alone
        enabled = half and own == torch.float32 and not quantized
        return torch.autocast(kind, torch.float16 if kind == "cuda" else torch.bfloat16, enabled=enabled)


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, Integral):
        raise TypeError(f"batch_size: got {type(batch_size).__name__}, expected a whole number")
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is below 1")


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


logger = logging.getLogger(__name__)

# A forked child has none of the threads that its parent's products were shared with, and would wait for them.
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class DSESiameseClassifier(TextInterface, Shareable, nn.Module):
    """The student: embeds both sentences of each pair with one encoder and scores the pair with the head.

    For texts see encoding.py (`encode`, `score`, `predict`), for folders and the hub sharing.py (`from_pretrained`).

    Args:
        bert: the encoder, float32; with its tanh pooler for pooler_type `cls`, without it otherwise.
        config: the architecture. Its additional layer and head start as torch's Linear does.
    """

    def __init__(self, bert: BertModel, config: DSEConfig) -> None:
        super().__init__()
        self.config = config
        self.dse_model = DSEModel(bert, config)
        self.siamese_head = SiameseHead(config)

    def embed(self, *args: Any, **inputs: Any) -> Tensor:
        """Inputs as SentenceEncoder takes them to (batch, embedding_size), float32."""
        return self.dse_model(*args, **inputs)

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        """Score B pairs; inputs as SentenceEncoder takes them.

        Args:
            input_ids: (2 * B, length), int64: the first sentences of all pairs, then the second ones, so that
                one pass of the encoder serves both.
            attention_mask: (2 * B, length), int64.
            packed: the same rows without padding, in place of both.

        Returns:
            (B, fc_dims[-1]), float32: logits, or scores for regression.
        """
        u, v = self.embed(*args, **inputs).chunk(2)
        return self.siamese_head(u, v)


def empty_student(config: DSEConfig) -> DSESiameseClassifier:
    """A student without pre-trained weights, to load a state dict into."""
    bert = BertModel(BertConfig(**config.bert), add_pooling_layer=config.pooler_type == "cls")
    # With transformers' defaults written out, so that a checkpoint means the same under a later version.
    return DSESiameseClassifier(bert, replace(config, bert=bert.config.to_dict()))


def new_student(folder: Path, config: DSEConfig) -> DSESiameseClassifier:
    """A student with the pre-trained encoder of a folder, float32, and an untrained head.

    The encoder has its tanh pooler only where pooler_type `cls` uses it.
    """
    bert, new = _load(BertModel, folder, add_pooling_layer=config.pooler_type == "cls")
    if new:
        logger.warning("%s has no tanh pooler: --pooler_type cls starts from a random one", folder)
    # With transformers' defaults written out, so that a checkpoint means the same under a later version.
    return DSESiameseClassifier(bert, replace(config, bert=bert.config.to_dict()))
