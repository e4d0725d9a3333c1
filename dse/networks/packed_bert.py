"""Encoding without padding: real tokens only, in everything but the attention product.

A batch's rows lie end to end, longest first: (tokens,) ids become (tokens, hidden) states, on which embeddings,
projections, feed-forward and layer norms work. Attention needs rows apart. It pads them in groups of similar length,
so that little is padded, and takes the padding out again:

    rows of 9 8 8 5 4 4 tokens, say in threes  ->  3 x 9 and 3 x 5 places for 38 tokens; one block would take 54

The weights and modules are those of transformers' BertModel, and so are the numbers, to rounding: padding is masked
anyway. A BERT with modules that are not plain ones (`is_plain`) gets its groups padded and does the rest itself.
Where only `[CLS]` of the last layer is used (the teacher, the pooler `cls`), that layer computes no more.

oneDNN keeps its compiled product, a megabyte or so, for each number of rows that it meets. So that these stay few, a
batch ends with up to 3 % of idle tokens (`_few_sizes`), which belong to no row and so reach neither outputs nor
gradients.

Dropout draws 16 random bits per element, so that a rate p becomes round(65536 p) / 65536, and keeps exactly that
expectation; torch's own mask on CPU costs many times more.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dse.networks.batches import Group, PackedBatch, by_group, padded
from dse.networks.kernels import linear, softmax_backward

if TYPE_CHECKING:
    from transformers import BertModel


class _Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(width)) v within a group, from packed projections to packed context.

    Written out, forward and backward, because then each tensor is padded, or has its heads moved, once.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor, keep: Tensor | None, group: Group, heads: int) -> Tensor:
        """(tokens, 3 * hidden) queries, keys and values, and dropout's factors, to (tokens, hidden)."""
        width = projected.shape[1] // 3 // heads
        places = projected if group.bias is None else projected.index_select(0, group.place)
        places = places.view(group.rows, group.length, 3, heads, width).permute(2, 0, 3, 1, 4)
        q, k, v = places.reshape(3, group.rows * heads, group.length, width)
        weights = torch.softmax(_scores(q, k, group, heads), dim=-1).to(q.dtype)
        kept = weights if keep is None else weights * keep
        context = torch.bmm(kept, v).view(group.rows, heads, group.length, width).transpose(1, 2)
        context = context.reshape(group.rows * group.length, heads * width)
        ctx.save_for_backward(q, k, v, weights, keep, kept)
        ctx.group, ctx.heads = group, heads
        return context if group.bias is None else context.index_select(0, group.back)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the context, (tokens, hidden), to that of the projections, (tokens, 3 * hidden)."""
        q, k, v, weights, keep, kept = ctx.saved_tensors
        group, heads, width = ctx.group, ctx.heads, q.shape[2]
        if group.bias is not None:
            scattered = gradient.new_zeros(group.rows * group.length, heads * width)
            scattered[group.back] = gradient
            gradient = scattered
        gradient = gradient.view(group.rows, group.length, heads, width).transpose(1, 2)
        gradient = gradient.reshape(group.rows * heads, group.length, width)
        of_weights = torch.bmm(gradient, v.transpose(1, 2))
        if keep is not None:
            of_weights.mul_(keep)
        of_scores = softmax_backward(of_weights, weights).mul_(width**-0.5)
        of_all = torch.stack(
            [
                torch.bmm(of_scores, k),
                torch.bmm(of_scores.transpose(1, 2), q),
                torch.bmm(kept.transpose(1, 2), gradient),
            ]
        )
        of_all = of_all.view(3, group.rows, heads, group.length, width).permute(1, 3, 0, 2, 4)
        of_all = of_all.reshape(group.rows * group.length, 3 * heads * width)
        return of_all if group.bias is None else of_all.index_select(0, group.back), None, None, None


def _scores(q: Tensor, k: Tensor, group: Group, heads: int) -> Tensor:
    """(rows * heads, queries, width) and (rows * heads, length, width) to scaled and masked (…, queries, length)."""
    scale = q.shape[2] ** -0.5
    if group.bias is None:
        return torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    bias = group.bias.to(q.dtype).expand(group.rows, heads, group.length).reshape(-1, 1, group.length)
    return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)


def keep_factors(shapes: list[tuple[int, ...]], rate: float, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Dropout's factors, 0 or 1 / (1 - rate), for tensors of the given shapes; from torch's random numbers."""
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

    weights: list[Tensor | None]  # by group: (rows * heads, queries, length)
    context: Tensor | None  # (tokens, hidden)
    output: Tensor | None  # (tokens, hidden)


def _draw(bert: "BertModel", batch: PackedBatch, like: Tensor, last_alone: bool) -> tuple[Tensor | None, list[_Keep]]:
    """The factors of one pass through the encoder: for the embeddings, and for each layer.

    Args:
        like: the embeddings, (tokens, hidden).
        last_alone: is the last layer computed for each row's first token only?
    """
    config, groups, layers = bert.config, batch.groups, len(bert.encoder.layer)
    heads, whole, alone = config.num_attention_heads, layers - last_alone, int(last_alone)
    hidden = [like.shape] * (1 + 2 * whole) + [(len(batch.starts), like.shape[1])] * (2 * alone)
    weights = [(group.rows * heads, group.length, group.length) for group in groups] * whole
    weights += [(group.rows * heads, 1, group.length) for group in groups] * alone

    def factors(shapes: list[Any], rate: float) -> list[Any]:
        return keep_factors(shapes, rate, like.device, like.dtype) if bert.training and rate else [None] * len(shapes)

    embeddings, *outputs = factors(hidden, config.hidden_dropout_prob)
    attention = factors(weights, config.attention_probs_dropout_prob)
    count = len(groups)
    return embeddings, [
        _Keep(attention[i * count : (i + 1) * count], outputs[2 * i], outputs[2 * i + 1]) for i in range(layers)
    ]


def hidden_states(bert: "BertModel", batch: PackedBatch, top: int) -> list[Tensor]:
    """The last `top` layers' states, lowest first, each (tokens, hidden)."""
    states, keeps = _embed(bert, batch, last_alone=False)
    layers = []
    for layer, keep in zip(bert.encoder.layer, keeps, strict=True):
        states = _run(_layer, layer, states, batch, keep)
        layers.append(states)
    return layers[-top:]


def first_states(bert: "BertModel", batch: PackedBatch) -> Tensor:
    """The last layer's state of `[CLS]` of each row, (rows, hidden), in the order that was asked for.

    The last layer's queries, and all that follows them, are computed for these alone.
    """
    states, keeps = _embed(bert, batch, last_alone=True)
    *below, last = bert.encoder.layer
    for layer, keep in zip(below, keeps[:-1], strict=True):
        states = _run(_layer, layer, states, batch, keep)
    return _run(_last_layer, last, states, batch, keeps[-1]).index_select(0, batch.order)


def _run(compute: Callable[..., Tensor], layer: nn.Module, *inputs: Any) -> Tensor:
    """A layer, its states forgotten until the backward pass where gradient checkpointing is on."""
    if layer.gradient_checkpointing and layer.training:
        return checkpoint(compute, layer, *inputs, use_reentrant=False)
    return compute(layer, *inputs)


def _embed(bert: "BertModel", batch: PackedBatch, last_alone: bool) -> tuple[Tensor, list[_Keep]]:
    """(tokens, hidden) embeddings, and the layers' dropout."""
    modules = bert.embeddings
    states = modules.word_embeddings(batch.ids)
    if batch.types is None:
        states = states + modules.token_type_embeddings.weight[0]
    else:
        states = states + modules.token_type_embeddings(batch.types)
    states = modules.LayerNorm(states + modules.position_embeddings(batch.positions))
    keep, keeps = _draw(bert, batch, states, last_alone)
    return (states if keep is None else states * keep), keeps


def _layer(layer: nn.Module, states: Tensor, batch: PackedBatch, keep: _Keep) -> Tensor:
    """One BertLayer: (tokens, hidden) to (tokens, hidden)."""
    own, heads = layer.attention.self, layer.attention.self.num_attention_heads
    projected = _project(states, own.query, own.key, own.value)
    contexts = [
        _Attention.apply(part, None if kept is None else kept.to(part.dtype), group, heads)
        for part, group, kept in zip(by_group(projected, batch), batch.groups, keep.weights, strict=True)
    ]
    idle = len(states) - sum(map(len, contexts))
    context = torch.cat([*contexts, contexts[0].new_zeros(idle, states.shape[1])])
    states = _add_and_norm(layer.attention.output, context, states, keep.context)
    return _feed_forward(layer, states, keep.output)


def _feed_forward(layer: nn.Module, states: Tensor, keep: Tensor | None) -> Tensor:
    """What BertIntermediate and BertOutput do."""
    module = layer.intermediate
    inner = module.intermediate_act_fn(linear(states, module.dense.weight, module.dense.bias))
    return _add_and_norm(layer.output, inner, states, keep)


def _last_layer(layer: nn.Module, states: Tensor, batch: PackedBatch, keep: _Keep) -> Tensor:
    """One BertLayer for the first token of each row alone: (tokens, hidden) to (rows, hidden)."""
    own, heads = layer.attention.self, layer.attention.self.num_attention_heads
    first = states.index_select(0, batch.starts)
    queries = linear(first, own.query.weight, own.query.bias).split([group.rows for group in batch.groups])
    keys_values = by_group(_project(states, own.key, own.value), batch)
    context = []
    for group, query, part, kept in zip(batch.groups, queries, keys_values, keep.weights, strict=True):
        width = query.shape[1] // heads
        both = padded(part, group).view(group.rows, group.length, 2, heads, width).permute(2, 0, 3, 1, 4)
        k, v = both.reshape(2, group.rows * heads, group.length, width)
        weights = torch.softmax(_scores(query.reshape(-1, 1, width), k, group, heads), dim=-1).to(query.dtype)
        weights = weights if kept is None else weights * kept.to(weights.dtype)
        context.append(torch.bmm(weights, v).view(group.rows, heads * width))
    states = _add_and_norm(layer.attention.output, torch.cat(context), first, keep.context)
    return _feed_forward(layer, states, keep.output)


def _project(states: Tensor, *modules: nn.Module) -> Tensor:
    """Several linear layers of one input as one matrix product, their outputs side by side."""
    weight = torch.cat([module.weight for module in modules])
    return linear(states, weight, torch.cat([module.bias for module in modules]))


def _add_and_norm(module: nn.Module, inputs: Tensor, residual: Tensor, keep: Tensor | None) -> Tensor:
    """What BertSelfOutput and BertOutput do: a projection, dropout, the residual, a layer norm."""
    projected = linear(inputs, module.dense.weight, module.dense.bias)
    total = projected + residual if keep is None else torch.addcmul(residual, projected, keep.to(projected.dtype))
    return module.LayerNorm(total)
