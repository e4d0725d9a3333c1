"""The student: a BERT that embeds each sentence alone, and a small head over two embeddings.

    scores = head([u, v, u * v, |u - v|])      (concat), or      head(u . v)      (dot)

after Barkan et al., "Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding",
AAAI 2020. Names in the state dict are the original's: `dse_model.bert.bert.…` is the encoder,
`dse_model.bert.classifier.…` the additional layer, `siamese_head.fc_layers.<i>.…` the head.

The teacher is transformers' BertForSequenceClassification, as it is.
"""

import logging
import os
import re
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel
from transformers.utils import logging as transformers_logging

from dse.config import DSEConfig
from dse.encoding import TextInterface
from dse.files import InputError, one_line
from dse.packing import PackedBatch, by_group, first_states, hidden_states, is_plain, padded, padded_inputs
from dse.poolers import pool
from dse.pretrained import bert_config
from dse.processors import Task
from dse.sharing import Shareable

logger = logging.getLogger(__name__)

# Weights that may be left over: heads, and what older versions of transformers stored.
_HEADS = re.compile(r"(bert\.)?(pooler\.|embeddings\.position_ids$)|cls\.|classifier\.|qa_outputs\.")

# A forked child has none of the threads that its parent's products were shared with, and would wait for them.
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class SentenceEncoder(nn.Module):
    """BERT, a pooler, dropout and, if wanted, a linear layer: token ids to one vector per sentence."""

    def __init__(self, bert: BertModel, config: DSEConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = bert
        self.dropout = nn.Dropout(bert.config.hidden_dropout_prob)
        self.classifier = None
        if config.additional_embedding_layer_size != -1:
            self.classifier = nn.Linear(config.pooled_size, config.additional_embedding_layer_size)
        if config.freeze_bert:
            bert.requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        packed: PackedBatch | None = None,
    ) -> Tensor:
        """(batch, length) ids and mask, int64, or the same sentences packed, to (batch, embedding_size), float32."""
        if packed is None:
            pooled = self._pool(input_ids, attention_mask)
        elif is_plain(self.bert):
            pooled = self._pool_packed(packed)
        else:
            pooled = torch.cat([self._pool(**inputs) for inputs in padded_inputs(packed)]).index_select(0, packed.order)
        pooled = self.dropout(pooled)
        return pooled if self.classifier is None else self.classifier(pooled)

    def _pool_packed(self, batch: PackedBatch) -> Tensor:
        if self.config.pooler_type == "cls":
            return self.bert.pooler(first_states(self.bert, batch).unsqueeze(1))
        top = hidden_states(self.bert, batch, self.config.pooler_num_top_hidden_layers)
        # By group, the layers' states of its tokens.
        parts = zip(*(by_group(states, batch) for states in top), strict=True)
        pooled = [
            pool(self.config.pooler_type, [padded(states, group) for states in layers], group.mask)
            for group, layers in zip(batch.groups, parts, strict=True)
        ]
        return torch.cat(pooled).index_select(0, batch.order)

    def _pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.config.pooler_type == "cls":
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        output = self.bert(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        # hidden_states[0] is the embedding layer; k <= number of layers keeps it out.
        top = output.hidden_states[-self.config.pooler_num_top_hidden_layers :]
        return pool(self.config.pooler_type, top, attention_mask)


class DSEModel(nn.Module):
    """Sentences to embeddings. One level more than needed: it gives the state dict the original's names."""

    def __init__(self, bert: BertModel, config: DSEConfig) -> None:
        super().__init__()
        self.bert = SentenceEncoder(bert, config)

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        """As SentenceEncoder: to (batch, embedding_size), float32."""
        return self.bert(*args, **inputs)


class SiameseHead(nn.Module):
    """Two embeddings to outputs: their blocks, then linear layers with ReLU between them."""

    def __init__(self, config: DSEConfig) -> None:
        super().__init__()
        self.head_type = config.siamese_head_type
        first = 4 * config.embedding_size if self.head_type == "concat" else 1
        sizes = (first, *config.fc_dims)
        self.fc_layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """(batch, embedding_size) twice to (batch, fc_dims[-1]), computed in the dtype of its weights."""
        if not torch.is_autocast_enabled(u.device.type):
            kind = next((weight.dtype for weight in self.parameters() if weight.is_floating_point()), torch.float32)
            u, v = u.to(kind), v.to(kind)
        if self.head_type == "concat":
            x = torch.cat([u, v, u * v, (u - v).abs()], dim=-1)
        else:
            x = (u * v).sum(dim=-1, keepdim=True)
        for layer in self.fc_layers[:-1]:
            x = torch.relu(layer(x))
        return self.fc_layers[-1](x)


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


def set_dropout(model: DSESiameseClassifier, rate: float) -> None:
    """Another rate for all dropout: of the embeddings, and in the encoder, where packed batches read its config."""
    config = model.dse_model.bert.bert.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = rate
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def teacher_logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Logits (batch, labels) of a BertForSequenceClassification, from padded or packed inputs."""
    if "packed" not in inputs:
        return model(**inputs).logits
    batch = inputs["packed"]
    if not is_plain(model):
        return torch.cat([model(**some).logits for some in padded_inputs(batch)]).index_select(0, batch.order)
    pooled = model.bert.pooler(first_states(model.bert, batch).unsqueeze(1))
    return model.classifier(model.dropout(pooled))


def _load(bert_class: type, folder: Path, **options: Any) -> tuple[Any, set[str]]:
    """A BERT in float32 and the names of weights that its folder lacks. Raises InputError where the encoder's are.

    Warns of weights that have no place in it, but for the heads that other trainings leave on a BERT.
    """
    transformers_logging.set_verbosity_error()  # its load report and bars; what matters is said here
    transformers_logging.disable_progress_bar()
    try:
        model, info = bert_class.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # a spoiled file raises whatever its reader trips over
        raise InputError(f"{folder}: its weights cannot be loaded ({one_line(error)})") from error
    new = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    encoder = sorted(name for name in new if "pooler." not in name and not name.startswith("classifier."))
    if encoder:
        raise InputError(
            f"{folder}: no whole BERT: {len(encoder)} weights missing or of another shape, e.g. {encoder[0]}"
        )
    unused = sorted(name for name in info["unexpected_keys"] if not _HEADS.match(name))
    if unused:
        logger.warning(
            "%s: %d weights have no place in the BERT that its config.json describes and are not used, e.g. %s",
            folder, len(unused), unused[0],
        )  # fmt: skip
    return model, new


def new_student(folder: Path, config: DSEConfig) -> DSESiameseClassifier:
    """A student with the pre-trained encoder of a folder, float32, and an untrained head.

    The encoder has its tanh pooler only where pooler_type `cls` uses it.
    """
    bert, new = _load(BertModel, folder, add_pooling_layer=config.pooler_type == "cls")
    if new:
        logger.warning("%s has no tanh pooler: --pooler_type cls starts from a random one", folder)
    # With transformers' defaults written out, so that a checkpoint means the same under a later version.
    return DSESiameseClassifier(bert, replace(config, bert=bert.config.to_dict()))


def load_teacher(folder: Path, task: Task, fine_tuned: bool) -> BertForSequenceClassification:
    """A cross-encoder, float32: BERT, its tanh pooler, dropout and a linear layer to the task's logits.

    Args:
        fine_tuned: True for a folder that finetune_bert.py made for this task, whose classifier is used as it
            is; raises InputError for any other. False for training: the classifier starts from
            N(0, initializer_range), bias 0, even where the folder has one.
    """
    labels = list(task.labels) or ["score"]
    types = bert_config(folder, "the teacher").get("type_vocab_size", 2)
    if types < 2 and task.text_b is not None:
        raise InputError(f"{folder}: type_vocab_size is {types}, and a teacher of pairs needs 2: take another BERT")
    if fine_tuned:
        _check_teacher_task(folder, task, labels)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model, new = _load(BertForSequenceClassification, folder, num_labels=len(labels), **names)
    model.config.finetuning_task = task.name
    if fine_tuned:
        if new:
            raise InputError(
                f"{folder}: no fine-tuned teacher: {', '.join(sorted(new))} missing; finetune_bert.py makes one"
            )
        return model
    if any("pooler." in name for name in new):
        logger.warning("%s has no tanh pooler: the teacher starts from a random one", folder)
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)
    return model


def _check_teacher_task(folder: Path, task: Task, labels: list[str]) -> None:
    """Labels in another order would give logits that mean something else."""
    config = bert_config(folder, "the teacher")
    names = [name for _, name in sorted((config.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    if names and len(names) != len(labels):
        raise InputError(
            f"{folder}: gives {len(names)} logits, and {task.name} needs {len(labels)}: {', '.join(labels)}"
        )
    if all(name.startswith("LABEL_") for name in names):  # or none: transformers leaves out LABEL_0 and LABEL_1
        if task.labels:
            logger.warning("%s does not name its labels: whether they are in the order %s is not known", folder, labels)
    elif names != labels:
        raise InputError(f"{folder}: its labels in order are {names}, those of {task.name} are {labels}")
    if config.get("finetuning_task") not in (None, task.name):
        logger.warning("%s was fine-tuned on %s and is used for %s", folder, config["finetuning_task"], task.name)
