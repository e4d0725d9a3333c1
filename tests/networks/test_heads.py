"""Heads, with values by hand."""

from dataclasses import replace

import pytest
import torch

from dse.networks import heads
from dse.networks.config import HEAD_TYPES, DSEConfig
from dse.networks.heads import HEADS, SiameseHead, at_once


def head(config: DSEConfig, *weights: list) -> SiameseHead:
    head = HEADS[config.siamese_head_type](config)
    with torch.no_grad():
        for layer, weight in zip(head.fc_layers, weights, strict=True):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.fill_(0.5)
    return head


def test_each_head_that_flags_name_has_a_class():
    assert set(HEADS) == set(HEAD_TYPES)


def test_concat_head_by_hand():
    """u = 2, v = 3: blocks 2, 3, 6, 1; first layer 2+3+6+1 + .5 and -12.5 + 1, ReLU, then 12.5 * 2 + .5."""
    config = DSEConfig(bert={"hidden_size": 1}, pooler_num_top_hidden_layers=1, fc_dims=(2, 1))
    layers = head(config, [[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]], [[2.0, 7.0]])
    assert layers(torch.tensor([[2.0]]), torch.tensor([[3.0]])).tolist() == [[25.5]]
    assert layers(torch.tensor([[2.0]]), torch.tensor([[-3.0]])).tolist() == [[7 * 2.5 + 0.5]]  # 2, -3, -6, 5


def test_symmetric_concat_head_by_hand():
    """u = 2, v = 3: of (2, 3, 6, 1) 4 + .5, of (3, 2, 6, 1) -1 + .5, which ReLU drops; 2 * 4.5 + .5 and .5."""
    config = DSEConfig(bert={"hidden_size": 1}, pooler_num_top_hidden_layers=1, fc_dims=(1, 1), symmetric=True)
    layers = head(config, [[-2.0, 3.0, 0.0, -1.0]], [[2.0]])
    assert layers(torch.tensor([[2.0], [3.0]]), torch.tensor([[3.0], [2.0]])).tolist() == [[5.0], [5.0]]


def test_dot_head_by_hand():
    config = DSEConfig(bert={"hidden_size": 2}, pooler_num_top_hidden_layers=1, siamese_head_type="dot", fc_dims=(1,))
    assert head(config, [[2.0]])(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).tolist() == [[22.5]]


def test_residual_head_by_hand():
    """(3, 4) and (4, 3): their cosine is 24 / 25."""
    config = DSEConfig({"hidden_size": 2}, "concat_top_mean", 2, "residual", fc_dims=(1, 2))
    layers = HEADS["residual"](replace(config, pooler_num_top_hidden_layers=1))
    assert (config.top_size, replace(config, additional_embedding_layer_size=7).top_size) == (2, 7)
    assert replace(config, pooler_type="mean_top_mean").top_size == 2
    u, v = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert layers(u, v).tolist() == [[pytest.approx(0.96)] * 2], "untrained"
    layers.start_at(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
    assert layers(u, v)[0].tolist() == pytest.approx([2 * 0.96 + 0.5, 3 - 0.96])
    # 7 + 7 + 24 + 2 = 40, + 0.5; then a tenth of it
    with torch.no_grad():
        for layer, weight in zip(layers.fc_layers, (1.0, 0.1), strict=True):
            layer.weight.fill_(weight)
            layer.bias.fill_(0.5)
    assert layers(u, v)[0].tolist() == pytest.approx([2 * 0.96 + 4.55, 4.55 - 0.96])
    wide = HEADS["residual"](config)  # two layers side by side: the top one's columns are the last
    u, v = torch.tensor([[9.0, 9.0, 3.0, 4.0]]), torch.tensor([[-9.0, 9.0, 4.0, 3.0]])
    assert wide(u, v)[0].tolist() == pytest.approx([0.96] * 2)


@pytest.mark.parametrize("fc_dims", [(3,), (8, 3), (8, 4, 3)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", HEAD_TYPES)
def test_queries_in_one_product(monkeypatch, kind, symmetric, fc_dims):
    """Five queries, two or all at once, against pair by pair; only a symmetric head takes both orders for the same."""
    torch.manual_seed(0)
    layers = HEADS[kind](DSEConfig(bert={"hidden_size": 6}, pooler_num_top_hidden_layers=1, siamese_head_type=kind,
                                   fc_dims=fc_dims, symmetric=symmetric))  # fmt: skip
    torch.nn.init.normal_(layers.fc_layers[-1].weight)
    queries, candidates = torch.randn(5, 6), torch.randn(7, 6)
    with torch.no_grad():
        expected = torch.stack([layers(u.expand(7, -1), candidates) for u in queries])
        for some in (2, 9):
            monkeypatch.setattr(heads, "_queries_at_once", lambda candidates, numbers, some=some: some)
            torch.testing.assert_close(layers.factorised()(queries, candidates), expected)
        same = torch.allclose(layers(queries, candidates[:5]), layers(candidates[:5], queries))
        assert same is (symmetric or kind == "dot")


def test_a_gpu_takes_more_at_once():
    """2 ** 26 numbers are ten times 4096 rows of 1536; the processor's cache has 2 ** 19."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [at_once(cuda, 4096 * 1536), at_once(cuda, 1 << 27), at_once(cpu, 4096 * 1536)] == [10, 1, 1]
    assert at_once(cpu, 512) == 1024
    assert heads._queries_at_once(torch.empty(5, 8), 8) == 1
