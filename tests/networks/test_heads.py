"""Heads, with values by hand."""

import torch

from dse.networks.config import HEAD_TYPES, DSEConfig
from dse.networks.heads import HEADS, SiameseHead


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


def test_dot_head_by_hand():
    config = DSEConfig(bert={"hidden_size": 2}, pooler_num_top_hidden_layers=1, siamese_head_type="dot", fc_dims=(1,))
    assert head(config, [[2.0]])(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).tolist() == [[22.5]]
