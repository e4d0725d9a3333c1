"""torch's private operators, each with a public way beside it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def find_onednn() -> Callable[..., Tensor] | None:
    """oneDNN's linear, unless the processor is Intel's; for float32, torch's own goes through MKL.

    A fifth faster than MKL on the AMD processor where both were measured, and 4 % slower on Intel's. The operator is
    not public, so it may be missing from another build of torch: None then too.
    """
    with contextlib.suppress(OSError):
        if b"GenuineIntel" in Path("/proc/cpuinfo").read_bytes():
            return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


_ONEDNN = find_onednn()


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


def linear(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """states @ weight.T + bias, for float32 on CPU through oneDNN where that is the faster one (`find_onednn`)."""
    plain = states.device.type != "cpu" or states.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if plain or _ONEDNN is None:
        return functional.linear(states, weight, bias)
    return _OneDNNLinear.apply(states, weight, bias)


class _OneDNNLinear(torch.autograd.Function):
    """The operator that torch.compile uses for a linear layer; it has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _ONEDNN(states, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (states, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _ONEDNN(gradient, weight.t(), None, "none", [], "") if wanted[0] else None,
            gradient.t() @ states if wanted[1] else None,  # here MKL is the faster one
            gradient.sum(dim=0) if wanted[2] else None,
        )
