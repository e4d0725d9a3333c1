"""Each call of torch that is not public against its public way: values, gradients, and that it is taken."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import random_student, separate_rows
from torch.nn import functional

from dse.networks import kernels
from dse.networks.batches import Batches
from dse.training.optimization import make_optimizer

PRIVATE = {
    "_LINEAR": getattr(torch.ops.mkldnn, "_linear_pointwise", None),
    "_ONEDNN": getattr(torch.ops.mkldnn, "_linear_pointwise", None),
    "_LAY_OUT": getattr(torch.ops.mkldnn, "_reorder_linear_weight", None),
    "_SOFTMAX_BACKWARD": getattr(torch.ops.aten, "_softmax_backward_data", None),
    "_NORMS": getattr(torch, "_foreach_norm", None),
}


pytestmark = pytest.mark.skipif(None in PRIVATE.values(), reason="this build of torch lacks a private call")


@pytest.fixture
def calls(monkeypatch):
    """The names of the private calls that were made; every one is taken here, whatever the processor."""
    made: list[str] = []

    def counted(name):
        return lambda *inputs: made.append(name) or PRIVATE[name](*inputs)

    for name in PRIVATE:
        monkeypatch.setattr(kernels, name, counted(name))
    return made


@pytest.fixture(params=["private", "public only", "another build of torch"])
def way(request, monkeypatch, calls):
    """Which way is taken; at the end, whether it was."""
    if request.param == "public only":
        monkeypatch.setattr(kernels, "PUBLIC_ONLY", True)
    if request.param == "another build of torch":
        for name in PRIVATE:
            monkeypatch.setattr(kernels, name, None)
    yield request.param
    assert bool(calls) == (request.param == "private")


def test_linear(way):
    torch.manual_seed(0)
    inputs = [torch.randn(9, 6), torch.randn(4, 6), torch.randn(4)]
    results = []
    for compute in (kernels.linear, functional.linear):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = compute(*leaves)
        (outputs * torch.arange(36.0).view(9, 4)).sum().backward()
        results.append([outputs, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    states = inputs[0].clone().requires_grad_()  # and frozen weights
    kernels.linear(states, inputs[1], inputs[2]).sum().backward()
    torch.testing.assert_close(states.grad, inputs[1].sum(dim=0).expand(9, 6), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here")
@torch.inference_mode()
def test_weights_that_are_laid_out(way):
    torch.manual_seed(0)
    states, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((9, 6), (4, 6), (4,)))
    laid_out = kernels.laid_out(weight)
    assert laid_out.is_mkldnn == (way == "private")
    torch.testing.assert_close(kernels.linear(states, laid_out, bias), functional.linear(states, weight, bias))
    assert not kernels.laid_out(weight.float()).is_mkldnn


def test_other_types_take_torchs_own_linear(calls):
    """What oneDNN's operator is not there for: double precision, and autocast, which chooses the type."""
    torch.manual_seed(0)
    states, weight, bias = torch.randn(9, 6), torch.randn(4, 6), torch.randn(4)
    doubled = kernels.linear(states.double(), weight.double(), bias.double())
    assert torch.equal(doubled, functional.linear(states.double(), weight.double(), bias.double()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernels.linear(states, weight, bias).dtype == torch.bfloat16
    assert calls == []


def test_softmax_backward(way):
    torch.manual_seed(0)
    scores, gradient = torch.randn(3, 2, 7, requires_grad=True), torch.randn(3, 2, 7)
    weights = scores.softmax(dim=-1)
    weights.backward(gradient)
    assert scores.grad.abs().max() > 0.1
    torch.testing.assert_close(kernels.softmax_backward(gradient, weights.detach()), scores.grad, rtol=1e-5, atol=1e-6)


def test_norms(way):
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([[1.0, -2.0], [2.0, 0.0]]), torch.zeros(2)]
    assert kernels.norms(tensors).tolist() == pytest.approx([5.0, 3.0, 0.0], rel=1e-6)


@pytest.mark.parametrize("pooler", ["concat_top_mean", "cls"])
def test_a_packed_training_step_is_the_same_with_public_calls_alone(pooler, calls, monkeypatch):
    """With dropout and clipping; float32, which oneDNN's operator is for."""
    results = []
    for public_only in (False, True):
        monkeypatch.setattr(kernels, "PUBLIC_ONLY", public_only)
        calls.clear()
        model = random_student(pooler, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        optimizer = make_optimizer(model, 1e-3, 10, 0.0)
        torch.manual_seed(4)
        outputs = model(**Batches(separate_rows(), "packed").of_pairs(np.arange(11)))
        outputs.square().mean().backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        optimizer.step()
        steps = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
        assert set(calls) == (set() if public_only else set(PRIVATE) - {"_ONEDNN", "_LAY_OUT"})  # of 16 bits
        results.append((outputs.detach(), gradients, steps))
    (outputs, gradients, steps), (others, other_gradients, other_steps) = results
    assert outputs.abs().max() > 0.1
    torch.testing.assert_close(others, outputs, rtol=1e-4, atol=1e-5)
    assert other_gradients.keys() == gradients.keys()
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)
        # Adam's first step is the rate times the sign of the gradient, which rounding may turn where that is about 0.
        sure = gradient.abs() > 1e-4 * scale
        torch.testing.assert_close(other_steps[name][sure], steps[name][sure], rtol=1e-2, atol=1e-7, msg=name)
    assert sum((gradient.abs() > 1e-4 * scale).sum() for gradient in gradients.values()) > 1000


@pytest.mark.parametrize(("hidden", "device", "takes"), [(96, "cuda", True), (104, "cuda", False), (96, "cpu", False)])
def test_the_call_for_rows_of_any_length_takes_heads_of_multiples_of_8(hidden, device, takes):
    """4 heads of 24, and of 26, as a small BERT has them."""
    states = SimpleNamespace(shape=(9, hidden), device=torch.device(device))
    assert kernels.has_varlen_attention(states, 4) == takes
