"""What student and teacher have in common: a BERT that makes one vector of each row of token ids.

The encoder computes in its `precision`; what follows it (pooling, heads, losses) is float32.

fp32    float32
tf32    float32 whose products round their inputs to 10 bits of fraction, on CUDA; elsewhere float32
bf16    products and attention in bfloat16
fp16    the same in float16, CUDA only
auto    tf32 on CUDA, fp32 elsewhere

torch.autocast around a call, which holds for its thread alone, takes the place of the precision.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dse.networks.batches import PackedBatch, by_group, padded, padded_inputs
from dse.networks.kernels import is_plain
from dse.networks.packed_bert import converted_weights, laid_out_weights, layer_states
from dse.networks.poolers import Pooler

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SETTING = threading.RLock()  # of the precision of float32 products, which is the process's
_MANY = 2048  # tokens of a batch from which on it pays to lay out the weights


@contextlib.contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """Products of float32 in the block, of forward or backward, are as `precision` says on the device.

    Threads take turns on CUDA, since the setting is the process's.
    """
    if device.type != "cuda" or precision in _HALF:
        yield
        return
    with _SETTING:
        before = torch.get_float32_matmul_precision()
        if precision != "fp32":
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


class PooledBert(nn.Module):
    """A BertModel, a pooler of its last `top_layers` layers, dropout and, if there is one, a linear `classifier`."""

    precision = "auto"  # of the encoder; set it to change it
    kept: dict[str, Any] | None = None  # while weights stay as they are: what was computed of them

    def __init__(
        self, bert: Any, pooler: Pooler, top_layers: int, dropout: nn.Dropout, classifier: nn.Linear | None
    ) -> None:
        super().__init__()
        self.pooler, self.top_layers = pooler, top_layers
        self.bert, self.dropout, self.classifier = bert, dropout, classifier

    def forward(self, *args: Tensor, packed: PackedBatch | None = None, **inputs: Tensor) -> Tensor:
        """(batch, length) ids, mask and types, int64, or the same rows packed, to (batch, width), float32."""
        kind, half = self.bert.device.type, _HALF.get(self.precision)
        if torch.is_autocast_enabled(kind):  # of this thread alone, so it goes before the precision
            half = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            if packed is None:
                pooled = self._pool(half, *args, **inputs)
            elif self._once("plain", lambda: is_plain(self.bert)):
                pooled = self._pool_packed(half, packed)
            else:
                parts = [self._pool(half, **inputs) for inputs in padded_inputs(packed)]
                pooled = torch.cat(parts).index_select(0, packed.order)
            pooled = self.dropout(pooled)
            return pooled if self.classifier is None else self.classifier(pooled)

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        kept = {} if self.kept is None else self.kept  # another thread may end its own inference meanwhile
        if name not in kept:
            kept[name] = compute()
        return kept[name]

    def _pool_packed(self, half: torch.dtype | None, batch: PackedBatch) -> Tensor:
        alone = self.pooler.is_berts
        weights: Any = self._once(str(half), lambda: converted_weights(self.bert, half)) if half else None
        if half and self.kept is not None and not torch.is_grad_enabled() and len(batch.ids) >= _MANY:
            weights = self._once(f"{half}, laid out", lambda: laid_out_weights(self.bert, weights, alone))
        with products(self.precision, batch.ids.device):
            layers: Any = deque(layer_states(self.bert, batch, alone, weights), maxlen=self.top_layers)
        if half:
            layers = [layer.float() for layer in layers]
        if alone:
            return self.bert.pooler(layers.pop().index_select(0, batch.order).unsqueeze(1))
        # By layer and group, the states of the group's tokens.
        parts = zip(batch.groups, *(by_group(states, batch) for states in layers), strict=True)
        pooled = [self.pooler.pool([padded(x, group) for x in states], group.mask) for group, *states in parts]
        return torch.cat(pooled).index_select(0, batch.order)

    def _pool(
        self, half: torch.dtype | None, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        autocast = torch.autocast(input_ids.device.type, half, enabled=half is not None)
        with products(self.precision, input_ids.device), autocast:
            outputs = self.bert(**inputs, output_hidden_states=not self.pooler.is_berts)
        # hidden_states[0] is the embedding layer; k <= number of layers keeps it out.
        alone = (outputs.last_hidden_state,)
        layers = alone if self.pooler.is_berts else outputs.hidden_states[-self.top_layers :]
        if half:
            layers = [layer.float() for layer in layers]
        return self.bert.pooler(layers[0]) if self.pooler.is_berts else self.pooler.pool(layers, attention_mask)
