"""Encoding without padding: real tokens only, in everything but the attention product.

A batch's rows lie end to end, longest first: (tokens,) ids become (tokens, hidden) states. Only attention needs rows
apart. It pads them in groups of similar length, so that little is padded, and takes the padding out again:

    rows of 9 8 8 5 4 4 tokens, say in threes  ->  3 x 9 and 3 x 5 places for 38 tokens; one block would take 54

On CUDA one call takes rows of any length as they are (kernels.varlen_attention) or, where it is to drop weights, rows
that are padded to the longest.

With 16 bits all weights are converted in one call, once per batch, and so are their gradients. States have 16 bits
between the steps of a layer; products, layer norms and softmax add up in 32.

The weights and modules are those of a plain (`is_plain`) BertModel of transformers, and so are the numbers, to
rounding. Where only `[CLS]` of the last layer is used (the teacher, the pooler `cls`), that layer computes only that.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import BertModel

from dse.networks.batches import Group, PackedBatch, by_group, padded
from dse.networks.kernels import (
    converted,
    cut,
    has_varlen_attention,
    laid_out,
    linear,
    softmax_backward,
    varlen_attention,
)

_Shapes = Sequence[tuple[int, ...]]
_Factors = Sequence[Tensor | None]  # of dropout, by group
Weights = dict[nn.Module, tuple[Any, Any]]  # weight and bias, by module; of queries, keys and values by the first


class _Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(width)) v within a group, from packed projections to packed context.

    Written out, forward and backward, because then each tensor is padded, or has its heads moved, once.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, keep: Tensor | None, group: Group, heads: int) -> Tensor:
        """(tokens, 3 * hidden) queries, keys and values, and dropout's factors, to (tokens, hidden)."""
        width = projected.shape[1] // 3 // heads
        places = projected if group.full else projected.index_select(0, group.place)
        places = places.view(group.rows, group.length, 3, heads, width).permute(2, 0, 3, 1, 4)
        q, k, v = places.reshape(3, group.rows * heads, group.length, width)
        weights = torch.softmax(_scores(q, k, group, heads), dim=-1).to(q.dtype)
        kept = weights if keep is None else weights * keep
        context = torch.bmm(kept, v).view(group.rows, heads, group.length, width).transpose(1, 2)
        context = context.reshape(group.rows * group.length, heads * width)
        ctx.save_for_backward(q, k, v, weights, keep, kept)
        ctx.group, ctx.heads = group, heads
        return context if group.full else context.index_select(0, group.back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the context, (tokens, hidden), to that of the projections, (tokens, 3 * hidden)."""
        q, k, v, weights, keep, kept = ctx.saved_tensors
        group, heads, width = ctx.group, ctx.heads, q.shape[2]
        if not group.full:
            zeros = gradient.new_zeros(group.rows * group.length, heads * width)
            gradient = zeros.index_copy_(0, group.back, gradient)
        gradient = gradient.view(group.rows, group.length, heads, width).transpose(1, 2)
        gradient = gradient.reshape(group.rows * heads, group.length, width)
        of_weights = torch.bmm(gradient, v.transpose(1, 2))
        if keep is not None:
            of_weights.mul_(keep)
        of_scores = softmax_backward(of_weights, weights).mul_(width**-0.5)
        factors = ((of_scores, k), (of_scores.transpose(1, 2), q), (kept.transpose(1, 2), gradient))
        of_all = torch.stack([torch.bmm(a, b) for a, b in factors]).view(3, group.rows, heads, group.length, width)
        of_all = of_all.permute(1, 3, 0, 2, 4).reshape(group.rows * group.length, 3 * heads * width)
        return of_all if group.full else of_all.index_select(0, group.back), None, None, None


def _scores(q: Tensor, k: Tensor, group: Group, heads: int) -> Tensor:
    """(rows * heads, queries, width) and (rows * heads, length, width) to scaled and masked (…, queries, length)."""
    scale = q.shape[2] ** -0.5
    if group.full:
        return torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    bias = group.bias.to(q.dtype).expand(group.rows, heads, group.length).reshape(-1, 1, group.length)
    return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)


def keep_factors(shapes: _Shapes, rate: float, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Dropout's factors, 0 or 1 / (1 - rate), for tensors of the given shapes; from torch's random numbers.

    Each takes 16 random bits, which round the rate to a multiple of 1/65536; torch's own mask costs many times more.
    """
    sizes = [int(np.prod(shape)) for shape in shapes]
    dropped = round(65536 * rate)
    bits = torch.empty((sum(sizes) + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    bits, least = bits.view(torch.int16), dropped - 32768
    # numpy compares int16 several times faster
    keep = torch.from_numpy(bits.numpy() >= least) if device.type == "cpu" else bits >= least
    factors = keep.view(torch.int8).to(dtype).mul_(65536 / (65536 - dropped))[: sum(sizes)]
    return [part.view(shape) for part, shape in zip(factors.split(sizes), shapes, strict=True)]


class _Keep(NamedTuple):
    """Dropout's factors for one layer; None where nothing is dropped."""

    weights: _Factors  # (rows * heads, queries, length); empty where the attention draws its own
    context: Tensor | None  # (tokens, hidden)
    output: Tensor | None  # (tokens, hidden)


def _draw(bert: BertModel, batch: PackedBatch, like: Tensor, last_alone: bool) -> tuple[Tensor | None, list[_Keep]]:
    """Factors for the embeddings, which are `like`, (tokens, hidden), and each layer, as `layer_states` takes them."""
    config, heads = bert.config, bert.config.num_attention_heads
    alone = [False] * (len(bert.encoder.layer) - 1) + [last_alone]  # by layer
    rows = [len(like), *(len(batch.starts) if first else len(like) for first in alone for _ in range(2))]
    hidden = [(count, like.shape[1]) for count in rows]
    groups = [batch.groups if first or not has_varlen_attention(like, heads) else [] for first in alone]
    weights = [
        (group.rows * heads, 1 if first else group.length, group.length)
        for first, some in zip(alone, groups, strict=True)
        for group in some
    ]

    def factors(shapes: _Shapes, rate: float) -> list[Any]:
        return keep_factors(shapes, rate, like.device, like.dtype) if bert.training and rate else [None] * len(shapes)

    embeddings, *outputs = factors(hidden, config.hidden_dropout_prob)
    drawn = iter(factors(weights, config.attention_probs_dropout_prob))
    by_layer = [[next(drawn) for _ in some] for some in groups]
    return embeddings, [_Keep(*each) for each in zip(by_layer, outputs[::2], outputs[1::2], strict=True)]


class _Convert(torch.autograd.Function):
    """Tensors in another dtype, some of them put together along the first dimension; gradients in their own dtype."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, together: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        """`together` says how many tensors make each output."""
        ctx.dtype, ctx.shapes, ctx.together = tensors[0].dtype, [tensor.shape for tensor in tensors], together
        left = iter(tensors)
        joined = [(sum(len(x) for x in some), *some[0].shape[1:]) for some in (list(islice(left, n)) for n in together)]
        return cut(converted(tensors, dtype), joined)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        if not any(ctx.needs_input_grad):
            return None, None, *([None] * len(ctx.shapes))
        left = iter(ctx.shapes)
        lengths = [[shape[0] for shape in islice(left, n)] for n in ctx.together]
        parts = [part for x, some in zip(gradients, lengths, strict=True) for part in x.split(some)]
        return None, None, *cut(converted(parts, ctx.dtype), ctx.shapes)


def _parts(layer: Any) -> list[tuple[Any, ...]]:
    """The modules of a layer that have weights; those that take the same input are together."""
    own, first, second = layer.attention.self, layer.attention.output, layer.output
    linear_ones = [(own.query, own.key, own.value), (first.dense,), (layer.intermediate.dense,), (second.dense,)]
    return [*linear_ones, (first.LayerNorm,), (second.LayerNorm,)]


def _own_weights(layer: Any) -> Weights:
    """A layer's weights and biases."""
    return {
        part[0]: (part[0].weight, part[0].bias)
        if len(part) == 1
        else (torch.cat([module.weight for module in part]), torch.cat([module.bias for module in part]))
        for part in _parts(layer)
    }


def converted_weights(bert: BertModel, dtype: torch.dtype) -> Weights:
    """All layers' weights and biases in another dtype, by one call, as are their gradients."""
    parts = [part for layer in bert.encoder.layer for part in _parts(layer)]
    tensors: list[Any] = [getattr(module, name) for part in parts for name in ("weight", "bias") for module in part]
    found = _Convert.apply(dtype, [len(part) for part in parts for _ in range(2)], *tensors)
    return dict(zip((part[0] for part in parts), zip(found[::2], found[1::2], strict=True), strict=True))


def laid_out_weights(bert: BertModel, weights: Weights, last_alone: bool) -> Weights:
    """The weights of products in oneDNN's own layout (`laid_out`), except those that a layer splits."""
    last: Any = bert.encoder.layer[-1]
    split = [last.attention.self.query] if last_alone else []
    return {
        module: (weight if weight.dim() == 1 or module in split else laid_out(weight), bias)
        for module, (weight, bias) in weights.items()
    }


def layer_states(
    bert: BertModel, batch: PackedBatch, last_alone: bool = False, weights: Weights | None = None
) -> Iterator[Tensor]:
    """The states that each layer gives, (tokens, hidden), the lowest first.

    With `last_alone` the last layer's queries, and all that follows them, are computed for each row's `[CLS]` alone:
    (rows, hidden). Where gradient checkpointing is on, a layer's own states are forgotten until the backward pass.
    `weights` are those of `converted_weights`, whose dtype the states then have; None: the modules' own.
    """
    modules = bert.embeddings
    types = modules.token_type_embeddings
    states = modules.word_embeddings(batch.ids) + (types.weight[0] if batch.types is None else types(batch.types))
    states = modules.LayerNorm(states + modules.position_embeddings(batch.positions))
    if weights is not None:
        states = states.to(next(iter(weights.values()))[0].dtype)
    factors, keeps = _draw(bert, batch, states, last_alone)
    states = states if factors is None else states * factors
    attentions = [_attend] * (len(keeps) - 1) + [_attend_alone if last_alone else _attend]
    for layer, keep, attend in zip(bert.encoder.layer, keeps, attentions, strict=True):
        if layer.gradient_checkpointing and layer.training:
            states = checkpoint(_layer, layer, weights, attend, states, batch, keep, use_reentrant=False)
        else:
            states = _layer(layer, weights, attend, states, batch, keep)
        yield states


def _layer(
    layer: Any, weights: Weights | None, attend: Callable[..., Tensor], states: Tensor, batch: PackedBatch, keep: _Keep
) -> Tensor:
    """One BertLayer with `_attend` or `_attend_alone`: (tokens, hidden) to as many rows as that gives."""
    weights = weights or _own_weights(layer)
    own, middle = layer.attention.self, layer.intermediate
    residual = states if attend is _attend else states.index_select(0, batch.starts)
    context = attend(own, *weights[own.query], states, batch, keep.weights)
    states = _add_and_norm(layer.attention.output, weights, context, residual, keep.context)
    inner = middle.intermediate_act_fn(linear(states, *weights[middle.dense]))
    return _add_and_norm(layer.output, weights, inner, states, keep.output)


def _attend(own: Any, weight: Tensor, bias: Tensor, states: Tensor, batch: PackedBatch, keep: _Factors) -> Tensor:
    """The context, (tokens, hidden). Weight and bias are those of queries, keys and values."""
    projected, heads = linear(states, weight, bias), own.num_attention_heads
    if has_varlen_attention(states, heads):
        (group,) = batch.groups
        if own.training and own.dropout.p:
            return attend_padded(projected, group, heads, own.dropout.p)
        return varlen_attention(projected, batch.bounds32, group.length, heads)
    contexts = [
        _Attention.apply(part, kept, group, heads)
        for part, group, kept in zip(by_group(projected, batch), batch.groups, keep, strict=True)
    ]
    return torch.cat([*contexts, contexts[0].new_zeros(len(states) - sum(map(len, contexts)), states.shape[1])])


def attend_padded(projected: Tensor, group: Group, heads: int, rate: float) -> Tensor:
    """The context, (tokens, hidden), of (tokens, 3 * hidden), through torch's own attention and dropout."""
    places = padded(projected, group).view(group.rows, group.length, 3, heads, -1)
    q, k, v = places.permute(2, 0, 3, 1, 4).unbind()
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):  # the second where the first is not
        context = scaled_dot_product_attention(q, k, v, group.bias[:, None].to(q.dtype), rate)
    return context.transpose(1, 2).reshape(group.rows * group.length, -1).index_select(0, group.back)


def _attend_alone(own: Any, weight: Tensor, bias: Tensor, states: Tensor, batch: PackedBatch, keep: _Factors) -> Tensor:
    """The context of the first token of each row alone, (rows, hidden)."""
    first, heads, hidden = states.index_select(0, batch.starts), own.num_attention_heads, states.shape[1]
    queries = linear(first, weight[:hidden], bias[:hidden]).split([group.rows for group in batch.groups])
    keys_values = by_group(linear(states, weight[hidden:], bias[hidden:]), batch)
    context = []
    for group, query, part, kept in zip(batch.groups, queries, keys_values, keep, strict=True):
        both = padded(part, group).view(group.rows, group.length, 2, heads, hidden // heads).permute(2, 0, 3, 1, 4)
        k, v = both.reshape(2, group.rows * heads, group.length, hidden // heads)
        shares = torch.softmax(_scores(query.reshape(-1, 1, hidden // heads), k, group, heads), dim=-1).to(query.dtype)
        shares = shares if kept is None else shares * kept
        context.append(torch.bmm(shares, v).view(group.rows, hidden))
    return torch.cat(context)


def _add_and_norm(module: Any, weights: Weights, inputs: Tensor, residual: Tensor, keep: Tensor | None) -> Tensor:
    """What BertSelfOutput and BertOutput do: a projection, dropout, the residual, a layer norm."""
    projected, norm = linear(inputs, *weights[module.dense]), module.LayerNorm
    total = projected + residual if keep is None else torch.addcmul(residual, projected, keep)
    return layer_norm(total, norm.normalized_shape, *weights[norm], norm.eps)
