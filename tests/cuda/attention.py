"""CPU stand-ins for the attention kernels that only a CUDA build of torch has.

softmax(q k^T scale + bias) v, row by row and in float32, with the checks that the kernels make. What they leave as it
was in memory, the places that belong to no row, is NaN here. Dropout draws a seed from torch's random numbers, which
travels with the results, so that the backward pass draws the same factors again.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_Slices = Iterator[tuple[slice, slice]]


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    """(…, queries, width) and (…, keys, width), float32, to (…, queries, keys)."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(dim=-1)


def _factors(like: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(like.shape, generator=generator) >= rate) / (1 - rate)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rate: float, draw: Any, *how: Any) -> Tensor:
    weights = _weights(q.float(), k.float(), bias, *how)
    return (weights * _factors(weights, rate, draw) if rate else weights) @ v.float()


def backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rate: float, draw: Any, *how: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and of the scores, float32, from that of the context."""
    gradient, q, k, v = gradient.float(), q.float(), k.float(), v.float()
    weights = _weights(q, k, bias, *how)
    factors = _factors(weights, rate, draw) if rate else torch.ones(())
    of_weights = gradient @ v.transpose(-1, -2) * factors
    of_scores = weights * (of_weights - (of_weights * weights).sum(dim=-1, keepdim=True))
    scaled = of_scores * (q.shape[-1] ** -0.5 if how[0] is None else how[0])
    of_v = (weights * factors).transpose(-1, -2) @ gradient
    return scaled @ k, scaled.transpose(-1, -2) @ q, of_v, of_scores


def _seed(rate: float) -> Tensor:
    return torch.randint(2**62, ()) if rate else torch.zeros((), dtype=torch.int64)


def _generator(seed: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


# Rows end to end: (tokens, heads, width), whose row i is offsets[i] to offsets[i + 1]


def _check(kernel: str, dtypes: tuple[torch.dtype, ...], multiple: int, *states: Tensor) -> None:
    """Raise RuntimeError for what the kernel does not take."""
    for x in states:
        assert x.dtype in dtypes and x.dtype == states[0].dtype, f"{kernel}: {x.dtype} is not one of {dtypes}"
        assert x.shape[-1] % multiple == 0 and x.shape[-1] <= 256, f"{kernel}: a head of width {x.shape[-1]}"
        assert x.stride(-1) == 1, f"{kernel}: the numbers of a head must be side by side, not {x.stride()}"


def _rows(q_offsets: Tensor, k_offsets: Tensor, longest_q: int, longest_k: int) -> _Slices:
    for offsets, longest in ((q_offsets, longest_q), (k_offsets, longest_k)):
        assert offsets.dtype == torch.int32 and offsets.is_contiguous(), f"offsets of {offsets.dtype}"
        assert int(offsets.diff().max()) <= longest, f"a row is longer than {longest}"
    both = (offsets.tolist() for offsets in (q_offsets, k_offsets))
    slices = ([slice(a, b) for a, b in pairwise(ends)] for ends in both)
    return zip(*slices, strict=True)


def _varlen(q: Tensor, k: Tensor, v: Tensor, rows: _Slices, rate: float, seed: Tensor, *how: Any) -> Tensor:
    context, draw = torch.full_like(q, float("nan")), _generator(seed)
    for of_q, of_k in rows:
        parts = (x[part].transpose(0, 1) for x, part in ((q, of_q), (k, of_k), (v, of_k)))
        context[of_q] = forward(*parts, None, rate, draw, *how).transpose(0, 1).to(q.dtype)
    return context


def _varlen_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: _Slices, rate: float, seed: Tensor, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    of_all, draw = tuple(torch.full_like(x, float("nan")) for x in (q, k, v)), _generator(seed)
    for of_q, of_k in rows:
        parts = (x[part].transpose(0, 1) for x, part in ((gradient, of_q), (q, of_q), (k, of_k), (v, of_k)))
        some = backward(*parts, None, rate, draw, *how)
        for whole, part, of_row in zip(of_all, (of_q, of_k, of_k), some, strict=False):
            whole[part] = of_row.transpose(0, 1).to(whole.dtype)
    return of_all


_HALF = (torch.float16, torch.bfloat16)
_ANY = (*_HALF, torch.float32)


def _flash(
    q, k, v, q_offsets, k_offsets, longest_q, longest_k, rate, causal, debug, *, scale=None, **unused: None
) -> tuple[Tensor, ...]:
    assert not debug and not any(value is not None for value in unused.values()), unused
    _check("flash attention", _HALF, 8, q, k, v)
    seed, rows = _seed(rate), _rows(q_offsets, k_offsets, longest_q, longest_k)
    context = _varlen(q, k, v, rows, rate, seed, scale, causal)
    sums = q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
    return context, sums, seed.expand(2).clone(), torch.zeros((), dtype=torch.int64), q.new_empty(0)


def _flash_backward(
    gradient, q, k, v, context, sums, q_offsets, k_offsets, longest_q, longest_k, rate, causal, state, _, *,
    scale=None, **unused: None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert context.shape == gradient.shape == q.shape and sums.shape == (q.shape[1], len(q)), sums.shape
    _check("flash attention", _HALF, 8, gradient, q, k, v, context)
    rows = _rows(q_offsets, k_offsets, longest_q, longest_k)
    return _varlen_backward(gradient, q, k, v, rows, rate, state[0], scale, causal)


def _efficient(
    q, k, v, bias, q_offsets, k_offsets, longest_q, longest_k, rate, mask, sums=False, *, scale=None, **unused: None
) -> tuple[Any, ...]:
    assert bias is None and len(q) == len(k) == len(v) == 1, "only rows end to end, (1, tokens, heads, width)"
    _check("memory-efficient attention", _ANY, 4 if q.dtype == torch.float32 else 8, q, k, v)
    seed, rows = _seed(rate), _rows(q_offsets, k_offsets, longest_q, longest_k)
    context = _varlen(q[0], k[0], v[0], rows, rate, seed, scale, bool(mask))[None]
    of_rows = q.new_zeros(len(q_offsets) - 1, q.shape[2], -(-longest_q // 32) * 32 if sums else 0, dtype=torch.float32)
    return context, of_rows, seed, torch.zeros_like(seed), longest_q, longest_k


def _efficient_backward(
    gradient, q, k, v, bias, context, q_offsets, k_offsets, longest_q, longest_k, sums, rate, seed, offset, mask,
    of_bias, *, scale=None, **unused: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    assert bias is None and not of_bias and context.shape == gradient.shape == q.shape, context.shape
    assert sums.shape[-1], "the forward pass was not told to compute log-sum-exp"
    _check("memory-efficient attention", _ANY, 4 if q.dtype == torch.float32 else 8, gradient, q, k, v, context)
    rows = _rows(q_offsets, k_offsets, longest_q, longest_k)
    of_all = _varlen_backward(gradient[0], q[0], k[0], v[0], rows, rate, seed, scale, bool(mask))
    return *(x[None] for x in of_all), torch.empty(0)


# Padded rows, (rows, heads, length, width), as scaled_dot_product_attention calls them


def _as_kernels_do(context: Tensor, dtype: torch.dtype) -> Tensor:
    """The heads of a token side by side in memory."""
    return context.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _padded(q, k, v, bias, sums, rate=0.0, causal=False, *, scale=None) -> tuple[Tensor, ...]:
    seed = _seed(rate)
    context = _as_kernels_do(forward(q, k, v, bias, rate, _generator(seed), scale, causal), q.dtype)
    return context, q.new_zeros(q.shape[:3], dtype=torch.float32), seed, torch.zeros_like(seed)


def _padded_backward(
    gradient, q, k, v, bias, context, sums, seed, offset, rate, wanted, causal=False, *, scale=None
) -> tuple[Tensor | None, ...]:
    *of_all, of_bias = backward(gradient, q, k, v, bias, rate, _generator(seed), scale, causal)
    wanted_bias = of_bias.sum_to_size(bias.shape).to(bias.dtype) if wanted[3] else torch.empty(0)
    return *(x.to(q.dtype) for x in of_all), wanted_bias


def _padded_flash(q, k, v, rate=0.0, causal=False, debug=False, *, scale=None) -> tuple[Any, ...]:
    context, sums, seed, offset = _padded(q, k, v, None, True, rate, causal, scale=scale)
    none = torch.empty(0)
    return context, sums, none, none.clone(), q.shape[2], k.shape[2], seed, offset, none.clone()


def _padded_flash_backward(
    gradient, q, k, v, context, sums, _, __, longest_q, longest_k, rate, causal, seed, offset, *, scale=None
) -> tuple[Tensor | None, ...]:
    wanted = (True, True, True, False)
    of_all = _padded_backward(gradient, q, k, v, None, context, sums, seed, offset, rate, wanted, causal, scale=scale)
    return of_all[:3]


# By name: the launches that a call counts as, and the stand-in
KERNELS: dict[str, tuple[int, Callable[..., Any]]] = {
    "_flash_attention_forward": (1, _flash),
    "_flash_attention_backward": (3, _flash_backward),
    "_efficient_attention_forward": (1, _efficient),
    "_efficient_attention_backward": (3, _efficient_backward),
    "_scaled_dot_product_efficient_attention": (1, _padded),
    "_scaled_dot_product_efficient_attention_backward": (3, _padded_backward),
    "_scaled_dot_product_flash_attention": (1, _padded_flash),
    "_scaled_dot_product_flash_attention_backward": (3, _padded_flash_backward),
}
