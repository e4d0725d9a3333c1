"""Heads: from two embeddings u and v to a pair's outputs, through linear layers with ReLU between them.

`head(u, v)` scores pair by pair, as in training; `head.factorised()` does so for few queries and many stored
candidates, and `head.rounded(queries)` roughly, with a bound of the error. A head is a class here, with these ways, and
has its name in config.HEAD_TYPES.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from dse.networks.config import DSEConfig
from dse.networks.kernels import is_plain, laid_out, linear

_PART, _CUDA_PART = 1 << 19, 1 << 26  # numbers in an intermediate result: in a processor's cache; 256 MiB of a GPU
_Layer = tuple[Tensor, Tensor]  # weight and bias
_ROUNDING = 1.01 * 2.0**-8  # to bfloat16 changes a number by so much of itself, before or after, at most
_SUMMING = 2.0**-22  # float32 sums change by so much of the sum of the terms' sizes, for each term, at most
_TINY = 2.0**-59  # 2^-8 of its square is the least number that is surely not taken for 0
_SETTINGS = threading.Lock()
Rounded = Callable[[Tensor], tuple[Tensor, Tensor]]  # of `rounded`


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
        first, *rest = self._layers()
        return self._factorised(first, rest)

    def _layers(self) -> list[_Layer]:
        return [(layer.weight.detach().float(), layer.bias.detach().float()) for layer in self.fc_layers]

    def _factorised(self, first: _Layer, rest: list[_Layer]) -> Callable[[Tensor, Tensor], Tensor]:
        raise NotImplementedError

    def rounded(self, queries: Tensor) -> Rounded | None:
        """A function from (candidates, size) to what `factorised` gives for them, its large products in bfloat16.

        It also gives how far each output may be from that of `factorised`, (queries, candidates); all are float32.
        None: a head that is not plain, or has no such products.
        """
        return None


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in bfloat16, whose sums are float32 on CUDA too, where torch may round parts of them."""
    if x.device.type != "cuda":
        return linear(x, weight, None)
    settings = torch.backends.cuda.matmul
    with _SETTINGS:  # those of the process
        before = settings.allow_bf16_reduced_precision_reduction
        settings.allow_bf16_reduced_precision_reduction = False
        try:
            return functional.linear(x, weight)
        finally:
            settings.allow_bf16_reduced_precision_reduction = before


def _lengths(x: Tensor) -> Tensor:
    """The Euclidean norms over the last dimension, or little more: squares, and products, may be too small to count."""
    return torch.linalg.vector_norm(x, dim=-1) + _TINY * x.shape[-1] ** 0.5


def _norm_bound(weight: Tensor) -> Tensor:
    """The spectral norm or little more: the 16th root of the sum of the singular values' 16th powers."""
    size = _lengths(weight.flatten())
    power = (weight / size) @ (weight / size).t()
    for _ in range(2):
        power = power @ power
    return 1.001 * size * power.norm() ** (1 / 8) + _TINY * weight.numel() ** 0.5


@dataclass(frozen=True)
class _Reach:
    """How far the numbers of a vector may reach: each one, (numbers,), and all of them, as its Euclidean norm.

    That of a matrix is the reach of its products with vectors of length 1.
    """

    each: Tensor
    length: Tensor

    @classmethod
    def of_matrix(cls, weight: Tensor) -> Self:
        return cls(_lengths(weight), _norm_bound(weight))

    @classmethod
    def of_numbers(cls, numbers: Tensor) -> Self:
        return cls(numbers, _lengths(numbers))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.each + other.each, self.length + other.length)

    def __mul__(self, factor: Tensor | float) -> Self:
        return type(self)(self.each * factor, self.length * factor)


def _rounded(weight: Tensor) -> tuple[Tensor, _Reach]:
    """A matrix in bfloat16, laid out, and the reach of what rounding it and adding up, also in float32, change."""
    half = weight.bfloat16()
    of_sums = _Reach.of_numbers(_SUMMING * weight.shape[1] * _lengths(weight))
    return laid_out(half), _Reach.of_matrix(weight - half.float()) + of_sums


def _after_first(x: Tensor, rest: list[_Layer]) -> Tensor:
    for layer in rest:
        x = functional.linear(x.relu_(), *layer)
    return x


def _last_layers(hidden: Tensor, off: _Reach, of_constant: Tensor, rest: list[_Layer]) -> tuple[Tensor, Tensor]:
    """What the layers after the first make of (candidates, hidden), and how far their outputs may be off.

    A hidden number h may be off by `off`, `of_constant`, (hidden,), and _ROUNDING * |h|. If it is so far below 0 that
    the exact one must be negative, too, ReLU makes both 0, and no error is left. Most of them are in a trained head.
    """
    if not rest:
        return hidden, off.each + of_constant + _ROUNDING * hidden.abs()
    off, of_constant = off * (1 / (1 - _ROUNDING)), of_constant / (1 - _ROUNDING)  # where -h is larger, so is its error
    (weight, bias), *rest = rest
    x, sizes, largest = hidden.relu(), weight.abs(), weight.abs().amax(1, keepdim=True) + _TINY
    active = torch.gt(hidden, -(off.each + of_constant), out=torch.empty_like(hidden))  # 0 or 1
    both = functional.linear(x, torch.cat([weight, (_ROUNDING + _SUMMING * len(of_constant)) * sizes]))
    scores, errors = both.chunk(2, dim=1)
    of_active = torch.cat([off.each * sizes, of_constant * sizes, (weight / largest).square()])
    each, more, squares = functional.linear(active, of_active).chunk(3, dim=1)
    errors = errors + more + torch.minimum(each, off.length * largest.t() * squares.sqrt())
    scores, errors = scores + bias, errors + 0 * hidden.amin()  # NaN if that is infinite
    for weight, bias in rest:
        x = scores.relu_()
        errors = functional.linear(errors + _SUMMING * weight.shape[1] * x, weight.abs())
        scores = functional.linear(x, weight, bias)
    return scores, errors


class ConcatHead(SiameseHead):
    """The paper's head, on [u, v, u * v, |u - v|].

    Its first layer is linear in the blocks, so for one query u and all candidates v

        W_u u + W_v v + W_p (u * v) + W_d |u - v| + b  =  (W_u u + b)  +  (W_v + W_p diag(u)) v  +  W_d |u - v|

    has a constant, one matrix for v, and |u - v| as the only term to compute for each pair; only v is stored. The
    matrices of several queries, one below the other, are one matrix for v.

    For the other order, of a symmetric head, the first layer gives (W_u - W_v) (v - u) more.

    |u - v| is 2 max(u, v) - u - v. So `rounded` needs no difference. Of its inputs it rounds u and v alone, because the
    larger of two rounded numbers is the larger number, rounded.
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

    def rounded(self, queries: Tensor) -> Rounded | None:
        if not is_plain(self):
            return None
        (weight, bias), *rest = self._layers()
        of_u, of_v, of_product, of_difference = weight.chunk(4, dim=1)
        size, turn, halves = of_v.shape[1], of_u - of_v, queries.bfloat16()
        of_vs = [of_v + of_product * u for u in queries]
        products = [_rounded(torch.cat([matrix - of_difference, 2 * of_difference], dim=1)) for matrix in of_vs]
        constants = queries @ of_u.t() + bias - halves.float() @ of_difference.t()
        # What changes the first layer's results in any case: sums in float32, here and in the exact outputs, and the
        # rounding of u.
        of_us, of_differences = _lengths(queries), _Reach.of_matrix(of_difference)
        weights = _lengths(of_u) + of_differences.each + _lengths(turn)
        sums = _SUMMING * size * (weights * of_us[:, None] + bias.abs())
        roundings = _lengths(queries - halves.float())
        fixed = [_Reach.of_numbers(x) + of_differences * length for x, length in zip(sums, roundings, strict=True)]
        # What changes them for each unit of v's length: its rounding, and the sum that makes its matrix.
        sums_of = [_Reach.of_numbers(_SUMMING * _lengths(of_product * u)) for u in queries]
        slopes = [(_Reach.of_matrix(x) + of_differences) * _ROUNDING + y for x, y in zip(of_vs, sums_of, strict=True)]
        if self.symmetric:
            turns, (turned, of_turned) = queries @ turn.t(), _rounded(turn)
            # v is rounded, the second product is, and the first may be larger than the sum by the second.
            of_turned += _Reach.of_matrix(turn) * (3 * _ROUNDING)

        def outputs(candidates: Tensor) -> tuple[Tensor, Tensor]:
            found, half = list[tuple[Tensor, Tensor]](), candidates.bfloat16()
            x = half.new_empty(len(half), 2 * size)
            x[:, :size] = half
            longest = (1 + _ROUNDING) * _lengths(candidates).amax()
            other = _product(half, turned).float() if self.symmetric else None
            for place, (product, changes) in enumerate(products):
                torch.maximum(half, halves[place], out=x[:, size:])
                hidden, constant = _product(x, product).float(), constants[place]
                of_x = torch.hypot(2**0.5 * longest, (1 + _ROUNDING) * of_us[place])  # |v, max(u, v)|
                off = fixed[place] + slopes[place] * longest + changes * of_x
                some = [_last_layers(hidden.add_(constant), off, _ROUNDING * constant.abs(), rest)]
                if other is not None:
                    hidden, constant = (hidden + other).sub_(turns[place]), constant - turns[place]
                    off = off + of_turned * longest
                    some.append(_last_layers(hidden, off, _ROUNDING * constant.abs(), rest))
                scores, errors = (torch.stack(each).mean(0) for each in zip(*some, strict=True))
                found.append((scores, errors.amax(1)))
            scores, errors = map(torch.stack, zip(*found, strict=True))
            return scores, errors + _SUMMING * scores.abs().amax(-1)

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

    def rounded(self, queries: Tensor) -> Rounded | None:
        concat, scale = super().rounded(queries), self.scale.detach().float()
        if concat is None:
            return None
        units_u = functional.normalize(queries[:, -self.top :])

        def outputs(candidates: Tensor) -> tuple[Tensor, Tensor]:
            scores, errors = concat(candidates)
            lengths = torch.linalg.vector_norm(candidates[:, -self.top :], dim=1).clamp(min=1e-12)  # as in `normalize`
            cosines = units_u @ candidates[:, -self.top :].t() / lengths
            return scores.addcmul_(cosines.unsqueeze(-1), scale), errors + _SUMMING * (self.top + 4) * scale.abs().max()

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
            return torch.cat(scores).view(*products.shape, -1).float()

        return outputs


HEADS: dict[str, type[SiameseHead]] = {"concat": ConcatHead, "dot": DotHead, "residual": ResidualHead}
