"""What student and teacher have in common: a BERT that makes one vector of each row of token ids."""

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from dse.networks.batches import PackedBatch, by_group, padded, padded_inputs
from dse.networks.kernels import is_plain
from dse.networks.packed_bert import layer_states
from dse.networks.poolers import Pooler


class PooledBert(nn.Module):
    """A BertModel, a pooler of its last `top_layers` layers, dropout and, if there is one, a linear `classifier`."""

    def __init__(
        self, bert: Any, pooler: Pooler, top_layers: int, dropout: nn.Dropout, classifier: nn.Linear | None
    ) -> None:
        super().__init__()
        self.pooler, self.top_layers = pooler, top_layers
        self.bert, self.dropout, self.classifier = bert, dropout, classifier

    def forward(self, *args: Tensor, packed: PackedBatch | None = None, **inputs: Tensor) -> Tensor:
        """(batch, length) ids, mask and types, int64, or the same rows packed, to (batch, width), float32."""
        if packed is None:
            pooled = self._pool(*args, **inputs)
        elif is_plain(self.bert):
            pooled = self._pool_packed(packed)
        else:
            pooled = torch.cat([self._pool(**inputs) for inputs in padded_inputs(packed)]).index_select(0, packed.order)
        pooled = self.dropout(pooled)
        return pooled if self.classifier is None else self.classifier(pooled)

    def _pool_packed(self, batch: PackedBatch) -> Tensor:
        layers = deque(layer_states(self.bert, batch, last_alone=self.pooler.is_berts), maxlen=self.top_layers)
        if self.pooler.is_berts:
            return self.bert.pooler(layers.pop().index_select(0, batch.order).unsqueeze(1))
        # By layer and group, the states of the group's tokens.
        parts = zip(batch.groups, *(by_group(states, batch) for states in layers), strict=True)
        pooled = [self.pooler.pool([padded(x, group) for x in states], group.mask) for group, *states in parts]
        return torch.cat(pooled).index_select(0, batch.order)

    def _pool(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        if self.pooler.is_berts:
            return self.bert(**inputs).pooler_output
        # hidden_states[0] is the embedding layer; k <= number of layers keeps it out.
        layers = self.bert(**inputs, output_hidden_states=True).hidden_states[-self.top_layers :]
        return self.pooler.pool(layers, attention_mask)
