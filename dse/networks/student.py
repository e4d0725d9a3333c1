"""The student's network: a BERT that embeds each sentence alone, and a small head over two embeddings.

Names in the state dict are the original's: `dse_model.bert.bert.…` is the encoder, `dse_model.bert.classifier.…` the
additional layer, `siamese_head.fc_layers.<i>.…` the head (heads.py).
"""

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from dse.data.tasks import DEFAULT_THRESHOLD, Task
from dse.networks.config import DSEConfig
from dse.networks.encoder import PooledBert
from dse.networks.heads import HEADS
from dse.networks.pretrained import load_bert

# A forked child has none of the threads that its parent's products were shared with, and would wait for them.
if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class SiameseNetwork(nn.Module):
    """Embeds both sentences of each pair with one encoder and scores the pair with the head.

    The encoder is float32, with its tanh pooler only for pooler_type `cls`; torch initialises all other layers.
    """

    def __init__(self, bert: BertModel, config: DSEConfig) -> None:
        super().__init__()
        # With transformers' defaults written out, so that a checkpoint means the same under a later version.
        self.config = replace(config, bert=bert.config.to_dict())
        added = config.additional_embedding_layer_size
        layer = None if added == -1 else nn.Linear(config.pooled_size, added)
        dropout = nn.Dropout(bert.config.hidden_dropout_prob)
        pooled = PooledBert(bert, config.pooler, config.pooler_num_top_hidden_layers, dropout, layer)
        if config.freeze_bert:
            bert.requires_grad_(False)
        self.dse_model: Any = nn.ModuleDict({"bert": pooled})  # one level more than needed, for the original's names
        self.siamese_head = HEADS[config.siamese_head_type](config)

    @property
    def encoder(self) -> BertModel:
        """The BERT."""
        return self.dse_model.bert.bert

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def precision(self) -> str:
        """The precision that the encoder computes in (encoder.py)."""
        return self.dse_model.bert.precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self.dse_model.bert.precision = precision

    def embed(self, *args: Any, **inputs: Any) -> Tensor:
        """Inputs as PooledBert takes them to (batch, embedding_size), float32."""
        return self.dse_model.bert(*args, **inputs)

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        """The outputs of B pairs, (B, fc_dims[-1]), float32: logits, or scores for regression.

        Inputs are 2 * B rows as PooledBert takes them: the first sentences of all pairs, then the second ones, so that
        one pass of the encoder serves both.
        """
        u, v = self.embed(*args, **inputs).chunk(2)
        return self.siamese_head(u, v)

    def set_dropout(self, rate: float) -> None:
        """Set the rate of all dropout: on the embeddings, and in the encoder, whose config packed batches read."""
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
    origin: dict[str, Any] = field(default_factory=dict)  # of its training: epoch, metrics, commands (script, flags)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device


def empty_network(config: DSEConfig) -> SiameseNetwork:
    """A network without pre-trained weights, to load a state dict into."""
    return SiameseNetwork(BertModel(BertConfig(**config.bert), add_pooling_layer=config.pooler.is_berts), config)


def new_network(folder: Path, config: DSEConfig) -> SiameseNetwork:
    """A network with the pre-trained encoder of a folder, float32, and an untrained head."""
    return SiameseNetwork(load_bert(BertModel, folder, add_pooling_layer=config.pooler.is_berts)[0], config)
