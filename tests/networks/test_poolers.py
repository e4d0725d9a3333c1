"""Poolers, with values by hand."""

import pytest
import torch

from dse.networks.poolers import POOLERS

# One sentence of [CLS], two tokens, [SEP] and padding, one hidden unit; two layers.
LOW = torch.tensor([[[8.0], [1.0], [-3.0], [2.0], [99.0]]])


HIGH = torch.tensor([[[4.0], [3.0], [5.0], [-2.0], [99.0]]])


MASK = torch.tensor([[1, 1, 1, 1, 0]])


ROOT3 = 3**0.5


BY_HAND = {
    "concat_top_mean": [0.0, 2.0],  # (1 - 3 + 2) / 3, (3 + 5 - 2) / 3
    "concat_top_sqrt_mean": [0.0, 6 / ROOT3],
    "concat_top_max": [2.0, 5.0],
    "mean_top_mean": [1.0],
    "mean_top_sqrt_mean": [3 / ROOT3],  # of the layers' mean: 2, 1, 0
    "mean_top_max": [2.0],
    "concat_top_mean_with_cls": [2.0, 2.5],
    "concat_top_sqrt_mean_with_cls": [4.0, 5.0],
    "concat_top_max_with_cls": [8.0, 5.0],
    "mean_top_mean_with_cls": [2.25],
    "mean_top_sqrt_mean_with_cls": [4.5],
    "mean_top_max_with_cls": [6.0],
}


def test_by_hand_covers_every_pooler():
    assert {*BY_HAND, "cls"} == set(POOLERS)


@pytest.mark.parametrize("name", BY_HAND)
def test_poolers(name):
    assert POOLERS[name].pool([LOW, HIGH], MASK).tolist() == [pytest.approx(BY_HAND[name])]
