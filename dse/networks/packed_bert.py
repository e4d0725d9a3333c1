"""Encoding without padding: real tokens only, in everything but the attention product.

A batch's rows lie end to end, longest first: (tokens,) ids become (tokens, hidden) states. Only attention needs rows
apart. It pads them in groups of similar length, so that little is padded, and takes the padding out again:

    rows of 9 8 8 5 4 4 tokens, say in threes  ->  3 x 9 and 3 x 5 places for 38 tokens; one block would take 54

On CUDA one call takes rows of any length as they are (kernels.varlen_attention).

Under autocast the weights are converted once, in one pass over all of them, and so are their gradients. Products and
attention then have 16 bits; the sums of a layer and its residual, and layer norms, have 32.

The weights and modules are those of a plain (`is_plain`) BertModel of transformers, and so are the numbers, to
rounding. Where only `[CLS]` of the last layer is used (the teacher, the pooler `cls`), that layer computes only that.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertModel

from dse.networks.batches import Group, PackedBatch, by_group, padded
from dse.networks.kernels import converted, has_varlen_attention, linear, softmax_backward, varlen_attention

_Shapes = Sequence[tuple[int, ...]]
_Factors = Sequence[Tensor | None]  # of dropout, by group
_Weights = dict[nn.Module, tuple[Tensor, Tensor]]  # weight and bias, by module


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

    weights: _Factors  # (rows * heads, queries, length); empty where the attention drops by itself
    context: Tensor | None  # (tokens, hidden)
    output: Tensor | None  # (tokens, hidden)


def _draw(bert: BertModel, batch: PackedBatch, like: Tensor, last_alone: bool) -> tuple[Tensor | None, list[_Keep]]:
    """Factors for the embeddings, which are `like`, (tokens, hidden), and each layer, as `layer_states` takes them."""
    config, heads = bert.config, bert.config.num_attention_heads
    alone = [False] * (len(bert.encoder.layer) - 1) + [last_alone]  # by layer
    rows = [len(like), *(len(batch.starts) if first else len(like) for first in alone for _ in range(2))]
    hidden = [(count, like.shape[1]) for count in rows]
    # Where the attention draws its own there are none.
    groups = [batch.groups if first or not has_varlen_attention(like.device) else [] for first in alone]
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
    """Tensors in another dtype, and their gradients back in their own."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return converted(tensors, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(converted(gradients, ctx.dtype) if any(ctx.needs_input_grad) else gradients)


def _weights_of(bert: BertModel, dtype: torch.dtype | None) -> _Weights:
    """Weight and bias of each linear module of the layers, in a dtype; None: their own."""
    modules = [module for module in bert.encoder.layer.modules() if isinstance(module, nn.Linear)]
    tensors: Sequence[Tensor] = [tensor for module in modules for tensor in (module.weight, module.bias)]
    if dtype is not None:
        tensors = _Convert.apply(dtype, *tensors)
    return dict(zip(modules, zip(tensors[::2], tensors[1::2], strict=True), strict=True))


def layer_states(
    bert: BertModel, batch: PackedBatch, last_alone: bool = False, dtype: torch.dtype | None = None
) -> Iterator[Tensor]:
    """The states that each layer gives, (tokens, hidden), float32, the lowest first.

    With `last_alone` the last layer's queries, and all that follows them, are computed for each row's `[CLS]` alone:
    (rows, hidden). Where gradient checkpointing is on, a layer's own states are forgotten until the backward pass.
    `dtype` is that of products and attention; None: the weights'.
    """
    modules = bert.embeddings
    types = modules.token_type_embeddings
    states = modules.word_embeddings(batch.ids) + (types.weight[0] if batch.types is None else types(batch.types))
    states = modules.LayerNorm(states + modules.position_embeddings(batch.positions))
    factors, keeps = _draw(bert, batch, states, last_alone)
    states = states if factors is None else states * factors
    weights = _weights_of(bert, dtype)
    attentions = [_attend] * (len(keeps) - 1) + [_attend_alone if last_alone else _attend]
    for layer, keep, attend in zip(bert.encoder.layer, keeps, attentions, strict=True):
        if layer.gradient_checkpointing and layer.training:
            states = checkpoint(_layer, layer, weights, attend, states, batch, keep, use_reentrant=False)
        else:
            states = _layer(layer, weights, attend, states, batch, keep)
        yield states


def _layer(
    layer: Any, weights: _Weights, attend: Callable[..., Tensor], states: Tensor, batch: PackedBatch, keep: _Keep
) -> Tensor:
    """One BertLayer with `_attend` or `_attend_alone`: (tokens, hidden) to as many rows as that gives."""
    residual = states if attend is _attend else states.index_select(0, batch.starts)
    context = attend(layer.attention.self, weights, states, batch, keep.weights)
    states = _add_and_norm(layer.attention.output, weights, context, residual, keep.context)
    inner = layer.intermediate.intermediate_act_fn(_project(states, weights, layer.intermediate.dense))
    return _add_and_norm(layer.output, weights, inner, states, keep.output)


def _attend(own: Any, weights: _Weights, states: Tensor, batch: PackedBatch, keep: _Factors) -> Tensor:
    """The context, (tokens, hidden)."""
    projected, heads = _project(states, weights, own.query, own.key, own.value), own.num_attention_heads
    if has_varlen_attention(states.device):
        rate = own.dropout.p if own.training else 0.0
        return varlen_attention(projected, batch.bounds, batch.groups[0].length, heads, rate)
    contexts = [
        _Attention.apply(part, None if kept is None else kept.to(part.dtype), group, heads)
        for part, group, kept in zip(by_group(projected, batch), batch.groups, keep, strict=True)
    ]
    return torch.cat([*contexts, contexts[0].new_zeros(len(states) - sum(map(len, contexts)), states.shape[1])])


def _attend_alone(own: Any, weights: _Weights, states: Tensor, batch: PackedBatch, keep: _Factors) -> Tensor:
    """The context of the first token of each row alone, (rows, hidden)."""
    first, heads = states.index_select(0, batch.starts), own.num_attention_heads
    queries = _project(first, weights, own.query).split([group.rows for group in batch.groups])
    keys_values = by_group(_project(states, weights, own.key, own.value), batch)
    context = []
    for group, query, part, kept in zip(batch.groups, queries, keys_values, keep, strict=True):
        width = query.shape[1] // heads
        both = padded(part, group).view(group.rows, group.length, 2, heads, width).permute(2, 0, 3, 1, 4)
        k, v = both.reshape(2, group.rows * heads, group.length, width)
        shares = torch.softmax(_scores(query.reshape(-1, 1, width), k, group, heads), dim=-1).to(query.dtype)
        shares = shares if kept is None else shares * kept.to(shares.dtype)
        context.append(torch.bmm(shares, v).view(group.rows, heads * width))
    return torch.cat(context)


def _project(states: Tensor, weights: _Weights, *modules: nn.Linear) -> Tensor:
    """Several linear layers of one input as one matrix product, their outputs side by side."""
    both = zip(*(weights[module] for module in modules), strict=True)
    weight, bias = (torch.cat(some) if len(some) > 1 else some[0] for some in both)
    return linear(states.to(weight.dtype), weight, bias)


def _add_and_norm(module: Any, weights: _Weights, inputs: Tensor, residual: Tensor, keep: Tensor | None) -> Tensor:
    """What BertSelfOutput and BertOutput do: a projection, dropout, the residual, a layer norm."""
    projected = _project(inputs, weights, module.dense)
    total = projected + residual if keep is None else torch.addcmul(residual, projected, keep.to(projected.dtype))
    return module.LayerNorm(total)
