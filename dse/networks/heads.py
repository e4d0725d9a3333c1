"""Heads: from two embeddings u and v to a pair's outputs, through linear layers with ReLU between them.

`head(u, v)` scores pair by pair, as in training; `head.factorised()` does so for few queries and many stored
candidates. A head is a class here, with both ways, and has its name in config.HEAD_TYPES.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dse.networks.config import DSEConfig
from dse.networks.kernels import is_plain, linear

_PART = 1 << 19  # numbers in a part's hidden layer
_Layer = tuple[Tensor, Tensor]  # weight and bias


class SiameseHead(nn.Module):
    """What heads share: the linear layers `fc_layers`; a subclass makes their input."""

    def __init__(self, config: DSEConfig) -> None:
        super().__init__()
        none = torch.empty(0, config.embedding_size)
        sizes = (self.blocks(none, none).shape[1], *config.fc_dims)
        self.fc_layers: Any = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def blocks(self, u: Tensor, v: Tensor) -> Tensor:
        """(batch, embedding_size) twice to the first layer's input."""
        raise NotImplementedError

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """(batch, embedding_size) twice to (batch, fc_dims[-1]), computed in the dtype of its weights."""
        if not torch.is_autocast_enabled(u.device.type):
            kind = next((weight.dtype for weight in self.parameters() if weight.is_floating_point()), torch.float32)
            u, v = u.to(kind), v.to(kind)
        x = self.blocks(u, v)
        for place, layer in enumerate(self.fc_layers):
            x = layer(x.relu() if place else x)
        return x

    def factorised(self) -> Callable[[Tensor, Tensor], Tensor]:
        """A function from (queries, size) and (candidates, size) to (queries, candidates, outputs), all float32.

        A head that is not plain (`is_plain`) is called as it is, query by query.
        """
        if not is_plain(self):
            return lambda queries, all_v: torch.stack([self(u.expand_as(all_v), all_v).float() for u in queries])
        first, *rest = ((layer.weight.detach().float(), layer.bias.detach().float()) for layer in self.fc_layers)
        return self._factorised(first, rest)

    def _factorised(self, first: _Layer, rest: list[_Layer]) -> Callable[[Tensor, Tensor], Tensor]:
        raise NotImplementedError


def _after_first(x: Tensor, rest: list[_Layer]) -> Tensor:
    for layer in rest:
        x = functional.linear(x.relu_(), *layer)
    return x


class ConcatHead(SiameseHead):
    """The paper's head, on [u, v, u * v, |u - v|].

    Its first layer is linear in the blocks, so for one query u and all candidates v

        W_u u + W_v v + W_p (u * v) + W_d |u - v| + b  =  (W_u u + b)  +  (W_v + W_p diag(u)) v  +  W_d |u - v|

    has a constant, one matrix for v, and |u - v| as the only term to compute for each pair; only v is stored.
    """

    def blocks(self, u: Tensor, v: Tensor) -> Tensor:
        """(batch, embedding_size) twice to (batch, 4 * embedding_size)."""
        return torch.cat([u, v, u * v, (u - v).abs()], dim=-1)

    def _factorised(self, first: _Layer, rest: list[_Layer]) -> Callable[[Tensor, Tensor], Tensor]:
        of_u, of_v, of_product, of_difference = (block.contiguous() for block in first[0].chunk(4, dim=1))
        zero, width = torch.zeros_like(first[1]), len((rest or [first])[-1][1])

        def outputs(queries: Tensor, candidates: Tensor) -> Tensor:
            # Made first: small results kept between the large steps would keep these from using the same memory again.
            scores = queries.new_empty(len(queries), len(candidates), width)
            constants = queries @ of_u.t() + first[1]
            for u, constant, row in zip(queries, constants, scores, strict=True):
                hidden = linear(candidates, torch.addcmul(of_v, of_product, u), constant)
                hidden += linear(torch.sub(candidates, u).abs_(), of_difference, zero)
                row.copy_(_after_first(hidden, rest))
            return scores

        return outputs


class DotHead(SiameseHead):
    """Linear layers on u . v, which is one matrix product for all queries and candidates."""

    def blocks(self, u: Tensor, v: Tensor) -> Tensor:
        """(batch, embedding_size) twice to (batch, 1)."""
        return (u * v).sum(dim=-1, keepdim=True)

    def _factorised(self, first: _Layer, rest: list[_Layer]) -> Callable[[Tensor, Tensor], Tensor]:
        def outputs(queries: Tensor, candidates: Tensor) -> Tensor:
            products = queries @ candidates.t()
            # In parts, whose hidden layer stays in the processor's cache.
            parts = products.reshape(-1, 1).split(max(1, _PART // len(first[1])))
            scores = [_after_first(functional.linear(part, *first), rest) for part in parts]
            return torch.cat(scores).view(*products.shape, -1)

        return outputs


HEADS: dict[str, type[SiameseHead]] = {"concat": ConcatHead, "dot": DotHead}
