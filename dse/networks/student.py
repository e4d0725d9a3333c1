"""The student's network: a BERT that embeds each sentence alone, and a small head over two embeddings.

    scores = head([u, v, u * v, |u - v|])      (concat), or      head(u . v)      (dot)

Names in the state dict are the original's: `dse_model.bert.bert.…` is the encoder, `dse_model.bert.classifier.…` the
additional layer, `siamese_head.fc_layers.<i>.…` the head.
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from dse.networks.batches import PackedBatch
from dse.networks.config import DSEConfig
from dse.networks.packed_bert import by_group, first_states, hidden_states, is_plain, padded, padded_inputs
from dse.networks.poolers import pool
from dse.system.errors import InputError, one_line

logger = logging.getLogger(__name__)


# Weights that may be left over: heads, and what older versions of transformers stored.
_HEADS = re.compile(r"(bert\.)?(pooler\.|embeddings\.position_ids$)|cls\.|classifier\.|qa_outputs\.")


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


def set_dropout(model: nn.Module, rate: float) -> None:
    """Another rate for all dropout: of the embeddings, and in the encoder, where packed batches read its config."""
    config = model.dse_model.bert.bert.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = rate
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


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
