"""Heads over two embeddings."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from dse.networks.config import DSEConfig
from dse.networks.kernels import linear
from dse.networks.packed_bert import is_plain

_PART = 1 << 19  # numbers in a part's hidden layer


class PairHead:
    """A student's head for few queries and many candidates, in float32; one that is not plain is called as it is."""

    def __init__(self, head: "SiameseHead") -> None:
        self.head = None if is_plain(head) else head
        if self.head is not None:
            return
        self.is_dot = head.head_type == "dot"
        self.first, *self.rest = (
            (layer.weight.detach().float(), layer.bias.detach().float()) for layer in head.fc_layers
        )
        if not self.is_dot:
            blocks = self.first[0].chunk(4, dim=1)
            self.of_u, self.of_v, self.of_product, self.of_difference = (block.contiguous() for block in blocks)
            self.zero = torch.zeros_like(self.first[1])

    def outputs(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """(queries, width) and (candidates, width) to (queries, candidates, outputs), all float32."""
        if self.head is not None:
            return torch.stack([self.head(u.expand_as(candidates), candidates).float() for u in queries])
        return self._of_dots(queries, candidates) if self.is_dot else self._of_blocks(queries, candidates)

    def _of_blocks(self, queries: Tensor, candidates: Tensor) -> Tensor:
        # Made beforehand: small results kept between the large steps would keep these from using the same memory again.
        scores = queries.new_empty(len(queries), len(candidates), len((self.rest or [self.first])[-1][1]))
        constants = queries @ self.of_u.t() + self.first[1]
        for u, constant, row in zip(queries, constants, scores, strict=True):
            hidden = linear(candidates, torch.addcmul(self.of_v, self.of_product, u), constant)
            hidden += linear(torch.sub(candidates, u).abs_(), self.of_difference, self.zero)
            row.copy_(self._after_first(hidden))
        return scores

    def _of_dots(self, queries: Tensor, candidates: Tensor) -> Tensor:
        products = queries @ candidates.t()
        # In parts, whose hidden layer stays in the processor's cache.
        parts = products.reshape(-1, 1).split(max(1, _PART // len(self.first[1])))
        scores = [self._after_first(functional.linear(part, *self.first)) for part in parts]
        return torch.cat(scores).view(*products.shape, -1)

    def _after_first(self, x: Tensor) -> Tensor:
        for layer in self.rest:
            x = functional.linear(x.relu_(), *layer)
        return x


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
