"""BertAdam: the Adam that BERT was trained with, which differs from torch's AdamW.

Per tensor: its own gradient is clipped to norm 1, there is no bias correction, and the decay is added to
the update rather than to the gradient:

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        p = p - rate (m / (sqrt(v) + e) + wd p)

torch's fused AdamW computes the same in one pass over memory once its bias correction, 1 - b^step, is 1, so it is told
that a billion steps went before. (It decays first, p (1 - rate wd), and then adds the rest, which is the same sum.)
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from dse.networks.kernels import multiply, norms

NO_DECAY = ("bias", "LayerNorm.bias", "LayerNorm.weight")
MAX_GRADIENT_NORM = 1.0
_LONG_AGO = 1e9  # steps: 0.999^1e9 is 0


def scheduled_rate(rate: float, updates: int, t_total: int, warmup: float) -> float:
    """The rate after `updates` updates: linear warm-up over `warmup` of t_total, then linear decay to 0.

    >>> [scheduled_rate(1.0, n, 10, 0.2) for n in (0, 1, 2, 6, 10, 11)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    x = updates / t_total
    if x < warmup:
        return rate * x / warmup
    return 0.0 if x >= 1 else rate * (x - 1) / (warmup - 1)


class BertAdam(torch.optim.Optimizer):
    """Adam without bias correction, with decoupled decay, per-tensor clipping and a built-in schedule.

    Args:
        params: parameters, or groups with their own `weight_decay` and `lr`, the peak rate.
        t_total: updates over which the schedule runs; later ones have rate 0.
        warmup: share of t_total with a growing rate, in [0, 1].
    """

    def __init__(self, params: Iterable[Any], lr: float, t_total: int, warmup: float = 0.1) -> None:
        defaults = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "updates": 0}
        super().__init__(params, defaults)
        self.t_total, self.warmup = t_total, warmup

    @property
    def updates(self) -> int:
        """Updates made so far."""
        return self.param_groups[0]["updates"]

    @property
    def next_rate(self) -> float:
        """The rate that the next update will use, of the first group."""
        return scheduled_rate(self.param_groups[0]["lr"], self.updates, self.t_total, self.warmup)

    def gradients(self) -> list[torch.Tensor]:
        """The gradients of all parameters that have one, group after group."""
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def step(self, closure: None = None, norms_before: Sequence[float] | None = None) -> None:  # type: ignore[override]
        """Make one update from the gradients; a parameter without a gradient is not changed, not even by decay.

        `norms_before` are the norms of `gradients()`, if they are known: to read them from a GPU is to wait for it.
        """
        clip_each(self.gradients(), norms_before)
        for group in self.param_groups:
            rate = scheduled_rate(group["lr"], group["updates"], self.t_total, self.warmup)
            group["updates"] += 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients, states = [p.grad for p in parameters], [self.state[p] for p in parameters]
            for parameter, state in zip(parameters, states, strict=True):
                if not state:
                    state.update(m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
            m, v = ([state[name] for state in states] for name in ("m", "v"))
            # One tensor for all: adding 1 to it, as torch does for each, changes no float32 of that size.
            steps = [torch.full((), _LONG_AGO, device=parameters[0].device)] * len(parameters)
            (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
            s = kernels_share(parameters[0].device, beta2) ** 0.5  # its v is s^2 times ours
            rates = {"lr": rate * s, "beta1": beta1, "beta2": beta2, "eps": eps * s, "weight_decay": decay / s}
            adamw(parameters, gradients, m, v, [], steps, fused=True, amsgrad=False, maximize=False, **rates)


@cache
def kernels_share(device: torch.device, beta2: float) -> float:
    """What torch's kernel takes for 1 - beta2, over 1 - beta2.

    That of CUDA subtracts in float32: for 0.999 the difference is 1.3e-5 too small, and after some updates weights
    differ by 1e-4 from those of the CPU.
    """
    if device.type != "cuda":
        return 1.0
    p, m, v = torch.zeros(3, 1, device=device).unbind()
    step = torch.full((), _LONG_AGO, device=device)
    none: Any = {"lr": 0.0, "beta1": 0.0, "beta2": beta2, "eps": 1.0, "weight_decay": 0.0}
    adamw([p], [torch.ones_like(p)], [m], [v], [], [step], fused=True, amsgrad=False, maximize=False, **none)
    return v.item() / (1 - beta2)


def clip_each(gradients: list[torch.Tensor], norms_before: Sequence[float] | None = None) -> None:
    """Scale each gradient, by itself, to a norm of at most MAX_GRADIENT_NORM, in place; its norm now may be given."""
    if norms_before is None:
        norms_before = norms(gradients).tolist() if gradients else []
    both = zip(gradients, norms_before, strict=True)
    long = [(gradient, norm) for gradient, norm in both if not norm <= MAX_GRADIENT_NORM]  # NaN too: it must be seen
    multiply([gradient for gradient, _ in long], [MAX_GRADIENT_NORM / (norm + 1e-6) for _, norm in long])


def make_optimizer(
    model: nn.Module, lr: float, t_total: int, warmup: float, head_lr: float | None = None, head: str = ""
) -> BertAdam:
    """BertAdam over the model's trainable parameters, without decay for biases and layer norms.

    Args:
        head_lr: peak rate of the parameters whose names begin with `head`; None: `lr`.
    """
    rates = [lr] if head_lr is None else [lr, head_lr]
    groups: list[Any] = [{"params": [], "weight_decay": decay, "lr": rate} for rate in rates for decay in (0.01, 0.0)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_head = head_lr is not None and name.startswith(head)
            spared = any(part in name for part in NO_DECAY)
            groups[2 * of_head + spared]["params"].append(parameter)
    return BertAdam(groups, lr=lr, t_total=t_total, warmup=warmup)
