"""Batches: packed by hand, padded, moved to a device."""

import numpy as np
import pytest
import torch
from helpers import LENGTHS, MRPC, TWO_ROWS, ragged_rows

from dse.data.features import Ragged, cached_features
from dse.networks.batches import Batches, pack


def test_a_batch_by_hand():
    tokens = Ragged(np.array([1, 2, 3, 4, 5, 6], dtype=np.int32), np.array([0, 2, 5, 6]))
    batch = pack(tokens, np.array([0, 1]), first_lengths=np.array([1, 2]))
    assert batch.ids.tolist() == [3, 4, 5, 1, 2]  # the longer row first
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.types.tolist() == [0, 0, 1, 0, 1]
    assert batch.starts.tolist() == [0, 3]
    assert batch.order.tolist() == [1, 0]
    (group,) = batch.groups
    assert group.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert group.back.tolist() == [0, 1, 2, 3, 4]
    assert group.place.tolist()[:5] == [0, 1, 2, 3, 4]


def test_a_batch_moves_to_a_device_whole():
    moved = pack(ragged_rows(LENGTHS), np.arange(11), np.ones(11, np.int64)).to(torch.device("meta"))
    tensors = [x for record in (moved, *moved.groups) for x in vars(record).values() if isinstance(x, torch.Tensor)]
    assert [x.device.type for x in tensors] == ["meta"] * (5 + 2 * 3)


@pytest.mark.parametrize("form", ["joint", "separate"])
def test_max_pads_to_max_seq_length_from_the_cache_too(form, tokenizer, tmp_path):
    for _ in ("made", "read"):
        features = cached_features(form, MRPC, TWO_ROWS, tokenizer, 16, tmp_path / "cache", False)
        inputs = Batches(features, "max", 16).of_pairs(np.array([1]))
        assert inputs["input_ids"].shape == (1 if form == "joint" else 2, 16)
