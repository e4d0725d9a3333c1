"""The student's network: a BERT that embeds each sentence alone, and a small head over two embeddings.

Names in the state dict are the original's: `dse_model.bert.bert.…` is the encoder, `dse_model.bert.classifier.…` the
additional layer, `siamese_head.fc_layers.<i>.…` the head (heads.py).
"""

import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from dse.data.tasks import DEFAULT_THRESHOLD, Task
from dse.networks.batches import PackedBatch, by_group, padded, padded_inputs
from dse.networks.config import DSEConfig
from dse.networks.heads import HEADS
from dse.networks.kernels import is_plain
from dse.networks.packed_bert import first_states, hidden_states
from dse.networks.pretrained import load_bert

logger = logging.getLogger(__name__)

# A forked child has none of the threads that its parent's products were shared with, and would wait for them.
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class SentenceEncoder(nn.Module):
    """BERT, a pooler, dropout and, if wanted, a linear layer: token ids to one vector per sentence."""

    def __init__(self, bert: BertModel, config: DSEConfig) -> None:
        super().__init__()
        self.pooler, self.top_layers = config.pooler, config.pooler_num_top_hidden_layers
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
        if self.pooler.is_berts:
            return self.bert.pooler(first_states(self.bert, batch).unsqueeze(1))
        top = hidden_states(self.bert, batch, self.top_layers)
        # By group, the layers' states of its tokens.
        parts = zip(*(by_group(states, batch) for states in top), strict=True)
        pooled = [
            self.pooler.pool([padded(states, group) for states in layers], group.mask)
            for group, layers in zip(batch.groups, parts, strict=True)
        ]
        return torch.cat(pooled).index_select(0, batch.order)

    def _pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.pooler.is_berts:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        output = self.bert(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        # hidden_states[0] is the embedding layer; k <= number of layers keeps it out.
        return self.pooler.pool(output.hidden_states[-self.top_layers :], attention_mask)


class DSEModel(nn.Module):
    """Sentences to embeddings. One level more than needed: it gives the state dict the original's names."""

    def __init__(self, bert: BertModel, config: DSEConfig) -> None:
        super().__init__()
        self.bert = SentenceEncoder(bert, config)

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        """As SentenceEncoder: to (batch, embedding_size), float32."""
        return self.bert(*args, **inputs)


class SiameseNetwork(nn.Module):
    """Embeds both sentences of each pair with one encoder and scores the pair with the head.

    Args:
        bert: the encoder, float32; with its tanh pooler for pooler_type `cls`, without it otherwise.
        config: the architecture. Its additional layer and head start as torch's Linear does.
    """

    def __init__(self, bert: BertModel, config: DSEConfig) -> None:
        super().__init__()
        # With transformers' defaults written out, so that a checkpoint means the same under a later version.
        self.config = replace(config, bert=bert.config.to_dict())
        self.dse_model = DSEModel(bert, config)
        self.siamese_head = HEADS[config.siamese_head_type](config)

    @property
    def encoder(self) -> BertModel:
        """The BERT."""
        return self.dse_model.bert.bert

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

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

    def set_dropout(self, rate: float) -> None:
        """Another rate for all dropout: of the embeddings, and in the encoder, where packed batches read its config."""
        config = self.encoder.config
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = rate
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = rate


@dataclass(eq=False)  # one and the same, or not
class Student:
    """A student: its network, and what it needs beside the weights to take texts."""

    network: SiameseNetwork
    tokenizer: Any
    task: Task
    max_seq_length: int  # token ids per sentence
    threshold: float = DEFAULT_THRESHOLD  # binary: above it, strictly, a pair has the second label
    origin: dict[str, Any] | None = None  # what is known of its training: epoch, metrics, commands (script, flags)


def empty_network(config: DSEConfig) -> SiameseNetwork:
    """A network without pre-trained weights, to load a state dict into."""
    return SiameseNetwork(BertModel(BertConfig(**config.bert), add_pooling_layer=config.pooler.is_berts), config)


def new_network(folder: Path, config: DSEConfig) -> SiameseNetwork:
    """A network with the pre-trained encoder of a folder, float32, and an untrained head.

    The encoder has its tanh pooler only where pooler_type `cls` uses it.
    """
    bert, new = load_bert(BertModel, folder, add_pooling_layer=config.pooler.is_berts)
    if new:
        logger.warning("%s has no tanh pooler: --pooler_type cls starts from a random one", folder)
    return SiameseNetwork(bert, config)
