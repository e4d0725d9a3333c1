"""Batches: packed by hand, padded, moved to a device."""

import numpy as np
import pytest
import torch
from helpers import LENGTHS, MRPC, TWO_ROWS, ragged_rows

from dse.data.features import Ragged, cached_features
from dse.networks import batches
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


def test_few_shapes_by_hand():
    """Rows of 3 and 2 tokens: 5, and 123 idle ones in 5 rows; 32 places a row, the last one for padding."""
    tokens = Ragged(np.array([1, 2, 3, 4, 5, 6], dtype=np.int32), np.array([0, 2, 5, 6]))
    batch = pack(tokens, np.array([0, 1]), np.array([1, 2]), grouped=False, few_shapes=True)
    assert batch.ids.tolist() == [3, 4, 5, 1, 2] + [0] * 123
    assert batch.starts.tolist() == [0, 3]
    assert batch.bounds.tolist() == [0, 3, 5, 29, 54, 78, 103, 128]
    (group,) = batch.groups
    assert (group.rows, group.length, group.full) == (2, 32, False)
    assert group.mask.sum(dim=1).tolist() == [3, 2]
    assert group.back.tolist() == [0, 1, 2, 32, 33] + [63] * 123
    assert group.mask.flatten()[63] == 0


def test_few_shapes_are_few():
    """Of 200 batches of 16 rows of 5 to 20 tokens; the exact shapes of nearly all differ."""
    rng = np.random.default_rng(0)
    counts = []
    for few in (True, False):
        shapes = set()
        for _ in range(200):
            batch = pack(ragged_rows(rng.integers(5, 21, 16).tolist()), np.arange(16), grouped=False, few_shapes=few)
            shapes.add(tuple(getattr(*place).shape for place in batch.places()))
        counts.append(len(shapes))
    assert counts[0] <= 3
    assert counts[1] > 50


def test_a_row_as_long_as_the_places_has_padding_after_it():
    for longest, places in ((31, 32), (32, 64), (33, 64)):
        (group,) = pack(ragged_rows([longest, 4]), np.arange(2), grouped=False, few_shapes=True).groups
        assert group.length == places


def test_what_moves_goes_into_given_memory():
    tensors, into = (
        [torch.tensor([[1, 2], [3, 4]]), torch.tensor([5])],
        torch.empty(5, dtype=torch.int64, device="meta"),
    )
    moved = batches.moved(tensors, torch.device("meta"), into)
    assert [x.shape for x in moved] == [(2, 2), (1,)]
    assert all(x.untyped_storage()._cdata == into.untyped_storage()._cdata for x in moved)
    assert batches.moved(tensors, torch.device("cpu")) is tensors
