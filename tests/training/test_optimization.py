"""The optimizer, the schedule and the clipping, each worked out by hand."""

import math

import numpy as np
import pytest
import torch

from dse.training import optimization
from dse.training.optimization import BertAdam, clip_each, make_optimizer, scheduled_rate


@pytest.mark.parametrize(
    ("updates", "warmup", "rate"),
    [
        *((0, 0.1, 0.0), (1, 0.1, 1.0), (2, 0.4, 0.5), (5, 0.1, 5 / 9), (10, 0.1, 0.0), (11, 0.1, 0.0)),
        *((0, 0.0, 1.0), (5, 0.0, 0.5), (5, 1.0, 0.5), (10, 1.0, 0.0)),
    ],
)
def test_schedule(updates, warmup, rate):
    assert scheduled_rate(1.0, updates, 10, warmup) == pytest.approx(rate)


def test_two_updates_of_bert_adam_by_hand():
    """A tensor (3, 4) with gradient (30, 40), which clipping makes (.6, .8); rate 1 for the first update, .5 then."""
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = BertAdam([parameter], lr=1.0, t_total=2, warmup=0.0)
    expected, m, v = np.array([3.0, 4.0]), 0.0, 0.0
    for rate, gradient in ((1.0, np.array([30.0, 40.0])), (0.5, np.array([0.06, -0.08]))):
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        g = gradient / max(1.0, float(np.hypot(*gradient)) + 1e-6)  # torch's clip adds 1e-6 to the norm
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected = expected - rate * (m / (np.sqrt(v) + 1e-6) + 0.01 * expected)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-6)
    assert optimizer.next_rate == 0.0


def test_no_gradient_no_decay():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "unused": torch.nn.Linear(2, 1)})
    before = model["unused"].weight.clone()
    optimizer = make_optimizer(model, 1.0, 10, 0.0)
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model["unused"].weight, before)


def test_biases_and_layer_norms_are_not_decayed():
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2), "LayerNorm": torch.nn.LayerNorm(2)})
    model["dense"].requires_grad_(True)
    model["frozen"] = torch.nn.Linear(2, 2).requires_grad_(False)
    decayed, spared = make_optimizer(model, 1.0, 10, 0.0).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(model["dense"].weight)]
    wanted = {id(model["dense"].bias), id(model["LayerNorm"].weight), id(model["LayerNorm"].bias)}
    assert {id(p) for p in spared["params"]} == wanted


def test_a_rate_of_its_own_for_the_head():
    model = torch.nn.ModuleDict({"siamese_head": torch.nn.Linear(1, 1), "bert": torch.nn.Linear(1, 1)}).double()
    optimizer = make_optimizer(model, 0.1, 4, 0.0, head_lr=0.4, head="siamese_head.")
    before = {name: parameter.item() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    step = 0.1 * 0.5 / (math.sqrt(0.001 * 0.25) + 1e-6)  # m / (sqrt(v) + e), the same for all
    for name, parameter in model.named_parameters():
        rate = 0.4 if name.startswith("siamese_head.") else 0.1
        decay = 0.01 * before[name] if name.endswith("weight") else 0.0
        assert parameter.item() == pytest.approx(before[name] - rate * (step + decay), rel=1e-6)
    assert optimizer.next_rate == pytest.approx(0.075)  # the encoder's; the schedule is the same for both


def test_an_update_counts_where_a_group_has_no_gradient():
    still, moved = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = BertAdam([{"params": [still]}, {"params": [moved]}], lr=1.0, t_total=4, warmup=0.0)
    moved.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.updates == 1
    assert optimizer.next_rate == 0.75
    assert still.tolist() == [1, 1]


def test_clipping_by_hand():
    """Each tensor by itself; NaN spreads over its tensor, so that a loss gone wrong is seen in all of it."""
    long, barely, short, spoiled = (
        torch.tensor(x, dtype=torch.float64) for x in ([3.0, 4.0], [0.60006, 0.80008], [0.6, -0.6], [math.nan, 1.0])
    )
    clip_each([long, barely, short, spoiled])
    np.testing.assert_allclose(long, [3 / 5.000001, 4 / 5.000001], rtol=1e-12)
    np.testing.assert_allclose(barely, [0.60006 / 1.000101, 0.80008 / 1.000101], rtol=1e-12)
    assert short.tolist() == [0.6, -0.6]
    assert spoiled.isnan().all()


def test_what_a_kernel_takes_for_1_minus_beta2_is_made_up_for(monkeypatch):
    """A kernel whose v is 2 % too small, against one that is exact; 20 updates in float64."""

    def written_out(share):
        def adamw(weights, gradients, ms, vs, _, steps, *, lr, beta1, beta2, eps, weight_decay, **others):
            for weight, gradient, m, v in zip(weights, gradients, ms, vs, strict=True):
                m.mul_(beta1).add_(gradient, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(gradient, gradient, value=(1 - beta2) * share)
                weight.sub_(lr * (m / (v.sqrt() + eps) + weight_decay * weight))

        return adamw

    results = []
    for share, known in ((1.0, 1.0), (0.98, 0.98), (0.98, 1.0)):
        monkeypatch.setattr(optimization, "adamw", written_out(share))
        monkeypatch.setattr(optimization, "kernels_share", lambda device, beta2, known=known: known)
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
        optimizer = BertAdam([weight], lr=0.1, t_total=40, warmup=0.0)
        for _ in range(20):
            weight.grad = torch.randn(50, dtype=torch.float64) / 100
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
    assert (results[2] - results[0]).abs().max() > 1e-3


def test_on_the_cpu_nothing_is_made_up_for():
    assert optimization.kernels_share(torch.device("cpu"), 0.999) == 1.0


def test_norms_that_are_given_are_taken():
    """A gradient of norm 5, said to have norm 2, is halved."""
    gradients = [torch.tensor([3.0, 4.0])]
    clip_each(gradients, [2.0])
    torch.testing.assert_close(gradients[0], torch.tensor([1.5, 2.0]), rtol=1e-5, atol=0)
