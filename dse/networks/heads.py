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

_PART, _CUDA_PART = 1 << 19, 1 << 26  # numbers in an intermediate result: in a processor's cache; 256 MiB of a GPU
_Layer = tuple[Tensor, Tensor]  # weight and bias


def at_once(device: torch.device, numbers: int) -> int:
    """How many pieces of so many numbers an intermediate result may hold, at least 1; on CUDA few launches do much."""
    return max(1, (_CUDA_PART if device.type == "cuda" else _PART) // numbers)


def _queries_at_once(candidates: Tensor, numbers: int) -> int:
    """How many queries the concat head takes in one product: several on CUDA, else one, whose `hidden` is cached."""
    return at_once(candidates.device, len(candidates) * numbers) if candidates.device.type == "cuda" else 1


class SiameseHead(nn.Module):
    """What heads share: the linear layers `fc_layers`; a subclass makes their input."""

    def __init__(self, config: DSEConfig) -> None:
        super().__init__()
        self.symmetric = config.symmetric
        none = torch.empty(0, config.embedding_size)
        sizes = (self.blocks(none, none).shape[1], *config.fc_dims)
        self.fc_layers: Any = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def blocks(self, u: Tensor, v: Tensor) -> Tensor:
        """(batch, embedding_size) twice to the first layer's input."""
        raise NotImplementedError

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        """(batch, embedding_size) twice to (batch, fc_dims[-1]), computed in the dtype of its weights.

        If symmetric, the outputs are the mean of those of (u, v) and (v, u).
        """
        if not torch.is_autocast_enabled(u.device.type):
            kind = next((weight.dtype for weight in self.parameters() if weight.is_floating_point()), torch.float32)
            u, v = u.to(kind), v.to(kind)
        if self.symmetric:
            u, v = torch.cat([u, v]), torch.cat([v, u])
        x = self.blocks(u, v)
        for place, layer in enumerate(self.fc_layers):
            x = layer(x.relu() if place else x)
        return (x[: len(x) // 2] + x[len(x) // 2 :]) / 2 if self.symmetric else x

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

    has a constant, one matrix for v, and |u - v| as the only term to compute for each pair; only v is stored. The
    matrices of several queries, one below the other, are one matrix for v.

    For the other order, of a symmetric head, the first layer gives (W_u - W_v) (v - u) more.
    """

    def blocks(self, u: Tensor, v: Tensor) -> Tensor:
        """(batch, embedding_size) twice to (batch, 4 * embedding_size)."""
        return torch.cat([u, v, u * v, (u - v).abs()], dim=-1)

    def _factorised(self, first: _Layer, rest: list[_Layer]) -> Callable[[Tensor, Tensor], Tensor]:
        of_u, of_v, of_product, of_difference = (block.contiguous() for block in first[0].chunk(4, dim=1))
        turn = of_u - of_v
        zero, width = torch.zeros_like(first[1]), len((rest or [first])[-1][1])
        hidden_size, size = of_v.shape

        def outputs(queries: Tensor, candidates: Tensor) -> Tensor:
            # Made first: small results kept between the large steps would keep these from using the same memory again.
            scores = queries.new_empty(len(queries), len(candidates), width)
            constants = queries @ of_u.t() + first[1]
            turned = linear(candidates, turn, zero)[:, None] if self.symmetric else None
            some = _queries_at_once(candidates, max(size, hidden_size))
            for us, constant, rows in zip(queries.split(some), constants.split(some), scores.split(some), strict=True):
                of_some = torch.addcmul(of_v, of_product, us[:, None])  # (queries, hidden, size)
                hidden = linear(candidates, of_some.view(-1, size), constant.view(-1)).view(-1, hidden_size)
                difference = torch.sub(candidates[:, None], us).abs_()  # (candidates, queries, size)
                hidden += linear(difference.view(-1, size), of_difference, zero)  # (candidates * queries, hidden)
                if turned is not None:  # both orders, one below the other
                    other = hidden.view(len(candidates), len(us), -1) + (turned - us @ turn.t())
                    hidden = torch.cat([hidden, other.view(-1, hidden_size)])
                found = _after_first(hidden, rest).view(1 + self.symmetric, len(candidates), len(us), width)
                rows.copy_((found.mean(0) if self.symmetric else found[0]).transpose(0, 1))
            return scores

        return outputs


class ResidualHead(ConcatHead):
    """The encoder's own similarity and what the concat head adds to it: scale * cos(u, v) + concat(u, v).

    The cosine is that of the pooler's top layer. The last layer of the concat head starts at 0, so that an untrained
    head with its scale of 1 gives cosines; training begins at the scale and offset of `start_at`.
    """

    def __init__(self, config: DSEConfig) -> None:
        super().__init__(config)
        self.top = config.top_size
        self.scale = nn.Parameter(torch.ones(config.fc_dims[-1]))
        nn.init.zeros_(self.fc_layers[-1].weight)
        nn.init.zeros_(self.fc_layers[-1].bias)

    def forward(self, u: Tensor, v: Tensor) -> Tensor:
        cosines = functional.cosine_similarity(u[..., -self.top :].float(), v[..., -self.top :].float(), dim=-1)
        return super().forward(u, v) + self.scale * cosines.unsqueeze(-1)

    @torch.no_grad()
    def start_at(self, scale: Tensor, offset: Tensor) -> None:
        """Begin with scale * cosine + offset, (fc_dims[-1],) each."""
        self.scale.copy_(scale)
        self.fc_layers[-1].bias.copy_(offset)

    def _factorised(self, first: _Layer, rest: list[_Layer]) -> Callable[[Tensor, Tensor], Tensor]:
        concat, scale = super()._factorised(first, rest), self.scale.detach().float()

        def outputs(queries: Tensor, candidates: Tensor) -> Tensor:
            scores = concat(queries, candidates)
            units_u, units_v = (functional.normalize(x[:, -self.top :]) for x in (queries, candidates))
            return scores.addcmul_((units_u @ units_v.t()).unsqueeze(-1), scale)

        return outputs


class DotHead(SiameseHead):
    """Linear layers on u . v, which is one matrix product for all queries and candidates."""

    def blocks(self, u: Tensor, v: Tensor) -> Tensor:
        """(batch, embedding_size) twice to (batch, 1)."""
        return (u * v).sum(dim=-1, keepdim=True)

    def _factorised(self, first: _Layer, rest: list[_Layer]) -> Callable[[Tensor, Tensor], Tensor]:
        def outputs(queries: Tensor, candidates: Tensor) -> Tensor:
            products = queries @ candidates.t()
            parts = products.reshape(-1, 1).split(at_once(products.device, len(first[1])))  # by their hidden layer
            scores = [_after_first(functional.linear(part, *first), rest) for part in parts]
            return torch.cat(scores).view(*products.shape, -1)

        return outputs


HEADS: dict[str, type[SiameseHead]] = {"concat": ConcatHead, "dot": DotHead, "residual": ResidualHead}
