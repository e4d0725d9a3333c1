"""Every call of torch that is not public, with its reason, its gain and the public way beside it.

`PUBLIC_ONLY` forces the public ways, as tests do. If a build of torch lacks an operator, its public way is taken, too.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PUBLIC_ONLY = False

_PLAIN_LAYERS = {nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList, nn.ModuleDict}
_PLAIN_MODULES = ("transformers.models.bert.modeling_bert", "transformers.activations", "torch.nn.modules.activation",
                  "dse.networks.")  # fmt: skip

# oneDNN's linear. torch's own takes MKL for float32, which is a fifth slower on the AMD processor where both were
# measured, and 4 % faster on Intel's. It takes weights in bfloat16 that oneDNN has laid out for it once: encoding took
# 0.93 of the time on that AMD processor, 0.74 to 0.83 with AMX.
_LINEAR: Any = None
_ONEDNN: Any = None
_LAY_OUT: Any = None
_CPU = Path("/proc/cpuinfo")  # where the system has one
_INTEL = os.access(_CPU, os.R_OK) and b"GenuineIntel" in _CPU.read_bytes()
if torch.backends.mkldnn.is_available():
    _ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    _LINEAR = None if _INTEL else _ONEDNN
    if getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)():  # bool() is False
        _LAY_OUT = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
# Products of 8-bit integers: a quarter of float32's bytes to read, which is what many rows against few take.
_INT8: Any = getattr(torch, "_int_mm", None)
# The gradient of a softmax in one pass; written out, it takes three.
_SOFTMAX_BACKWARD: Any = getattr(torch.ops.aten, "_softmax_backward_data", None)
# Attention over rows of any length, end to end, on CUDA: one call for a batch, no padding, float32 or 16 bits, on every
# card; torch's public call for such rows (nn.attention.varlen) takes no float32. Its dropout is not used: with torch
# 2.11 the backward pass drops other weights than the forward pass did, and all rows and heads drop the same ones.
_VARLEN: Any = getattr(torch.ops.aten, "_efficient_attention_forward", None)
# A list of tensors copied, and converted, in one call; 390 calls for a BERT-large otherwise.
_COPY: Any = getattr(torch, "_foreach_copy_", None)
# All norms of a list of tensors in one call, all products with a number each, all set to 0; 200 calls for a BERT-base
# otherwise.
_NORMS: Any = getattr(torch, "_foreach_norm", None)
_MULTIPLY: Any = getattr(torch, "_foreach_mul_", None)
_ZERO: Any = getattr(torch, "_foreach_zero_", None)


def linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """states @ weight.T + bias, for float32 on CPU through oneDNN if that is faster.

    The weight may be `laid_out`, where no gradient is wanted.
    """
    if weight.is_mkldnn:
        return _ONEDNN(states, weight, bias, "none", [], "")
    elsewhere = states.device.type != "cpu" or states.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if elsewhere or PUBLIC_ONLY or _LINEAR is None:
        return functional.linear(states, weight, bias)
    return _OneDNNLinear.apply(states, weight, bias)


def laid_out(weight: Tensor) -> Tensor:
    """The weight (out, in) in oneDNN's own layout, for `linear` without gradients; unchanged unless bfloat16 on CPU."""
    other = weight.device.type != "cpu" or weight.dtype != torch.bfloat16
    if other or PUBLIC_ONLY or _ONEDNN is None or _LAY_OUT is None:
        return weight
    return _LAY_OUT(weight)


class _OneDNNLinear(torch.autograd.Function):
    """The operator that torch.compile uses for a linear layer; it has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _LINEAR(states, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (states, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _LINEAR(gradient, weight.t(), None, "none", [], "") if wanted[0] else None,
            gradient.t() @ states if wanted[1] else None,  # here MKL is the faster one
            gradient.sum(dim=0) if wanted[2] else None,
        )


def int8_products(rows: Tensor, others: Tensor) -> Tensor:
    """rows @ others.T of int8 (n, k) and (m, k) on CPU, (n, m), float32.

    Exact for numbers from -63 to 63 and k up to 4,000: processors without VNNI add two products in 16 bits.
    """
    if PUBLIC_ONLY or _INT8 is None or rows.shape[1] < 8:  # oneDNN gives garbage for k = 1
        return rows.float() @ others.float().t()
    return _INT8(rows, others.t()).float()


def softmax_backward(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient of softmax's input over the last dimension, given that of its output and the output, one shape."""
    if PUBLIC_ONLY or _SOFTMAX_BACKWARD is None:
        product = gradient * weights
        return product - weights * product.sum(dim=-1, keepdim=True)
    return _SOFTMAX_BACKWARD(gradient, weights, -1, weights.dtype)


def has_varlen_attention(states: Tensor, heads: int) -> bool:
    """Does `varlen_attention` take (tokens, hidden) of so many heads there? Its public way is to pad the rows.

    The kernels read 16 bytes at a time, so that a head's width must be a multiple of 8.
    """
    width = states.shape[1] // heads
    return states.device.type == "cuda" and not PUBLIC_ONLY and _VARLEN is not None and width % 8 == 0


def has_graphs(device: torch.device) -> bool:
    """Can calls be captured there? Otherwise they are made again."""
    return device.type == "cuda" and not PUBLIC_ONLY and torch.backends.cuda.is_built()


def captured(compute: Callable[[], Sequence[Tensor]], pool: Any) -> Callable[[], list[Tensor]]:
    """A function that does what `compute` does, with what is then in the same memory, and gives new tensors.

    `pool` is memory that several of them share. Nothing is computed yet.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # another thread writes states
        results = compute()

    def replay() -> list[Tensor]:
        graph.replay()
        return [result.clone() for result in results]  # the next replay overwrites them

    return replay


def varlen_attention(projected: Tensor, bounds: Tensor, longest: int, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(width)) v within each row.

    Args:
        projected: (tokens, 3 * hidden), queries, keys and values of rows that lie end to end.
        bounds: (rows + 1,), int32: where each row begins, and where the last one ends.
        longest: tokens of the longest row.

    Returns:
        The context, (tokens, hidden).
    """
    q, k, v = projected.view(1, len(projected), 3, heads, -1).unbind(2)
    wanted = projected.requires_grad and torch.is_grad_enabled()  # then the softmax's sums are kept
    return _VARLEN(q, k, v, None, bounds, bounds, longest, longest, 0.0, 0, wanted)[0].view(len(projected), -1)


def converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensors' elements in another dtype, one tensor after the other, (elements,)."""
    flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)
    parts = cut(flat, [tensor.shape for tensor in tensors])
    if PUBLIC_ONLY or _COPY is None:
        for one, other in zip(parts, tensors, strict=True):
            one.copy_(other)
    else:
        _COPY(parts, tensors)
    return flat


def cut(flat: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """(elements,) as tensors of the given shapes."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return tuple(part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True))


def norms(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of each tensor, (tensors,)."""
    if PUBLIC_ONLY or _NORMS is None:
        return torch.stack([tensor.norm() for tensor in tensors])
    return torch.stack(_NORMS(tensors))


def clear(tensors: list[Tensor]) -> None:
    """Set all elements to 0, in place."""
    if PUBLIC_ONLY or _ZERO is None:
        for tensor in tensors:
            tensor.zero_()
    elif tensors:
        _ZERO(tensors)


def multiply(tensors: list[Tensor], factors: list[float]) -> None:
    """Multiply each tensor by its factor, in place."""
    if PUBLIC_ONLY or _MULTIPLY is None:
        for tensor, factor in zip(tensors, factors, strict=True):
            tensor.mul_(factor)
    elif tensors:
        _MULTIPLY(tensors, factors)


def is_plain(module: nn.Module) -> bool:
    """Do its modules compute what their weights and classes say, so that these can be read in place of calling them?

    Not where one is of another class (quantized, wrapped, a LoRA layer), has a hook or a `forward` of its own, lacks a
    bias, or has weights that are more than a tensor. torch has no public way to list hooks; the public way beside this
    is to call the modules, as callers do if they are not plain.
    """
    for each in module.modules():
        kind = type(each)
        if kind not in _PLAIN_LAYERS and not kind.__module__.startswith(_PLAIN_MODULES):
            return False
        hooks = (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks)
        owners = [str(getattr(hook, "__module__", "")) for some in hooks for hook in some.values()]
        # transformers' own note states, or make checkpointing work: they change nothing
        hooked = not all(owner.startswith("transformers.") for owner in owners)
        odd = any(type(weight) not in (nn.Parameter, type(None)) for weight in each._parameters.values())
        if hooked or odd or "forward" in vars(each) or (kind is nn.Linear and each.bias is None):
            return False
    return True
