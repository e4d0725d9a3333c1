"""A split's features as batches that a network takes.

packed    rows end to end without padding, on the CPU in groups of similar length (packed_bert.py)
batch     padded to the batch's longest row
max       padded to max_seq_length

A batch is made on the CPU and reaches a GPU in one copy, which the work under way there does not wait for.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dse.data.features import Ragged

_FEWEST, _MOST = 8, 32  # rows per group: fewer cost more calls, more fit no cache
_IDLE = 5  # idle rows of the few shapes; each is shorter than 32 tokens
_SHORTEST = 0.85  # of the longest row, from which on a new group is worth its calls
_MASKED = -1e30  # to a score, in place of -inf, whose softmax of a whole row would be NaN
_CPU = torch.device("cpu")
Inputs = dict[str, Any]  # what a network's forward takes, by name


class Batches:
    """The rows of a split's Features, of either form, laid out for a network by one of config.PADDINGS.

    max_seq_length: what "max" pads to, and the length in which step sizes are counted; None: the longest row.
    """

    def __init__(self, features: Any, padding: str = "batch", max_seq_length: int | None = None) -> None:
        self.features, self.padding = features, padding
        self.max_seq_length = max_seq_length or int(features.costs.max())

    def __len__(self) -> int:
        return len(self.features)

    def of_pairs(self, rows: np.ndarray, device: torch.device = _CPU) -> Inputs:
        """Inputs of the given pairs; for a student, the first texts of all pairs, then the second ones."""
        return self._inputs(device, *self.features.rows_of(rows))

    def of_few_shapes(self, rows: np.ndarray) -> "PackedBatch":
        """As `of_pairs`, packed, on the CPU; most batches of so many rows have the shapes of another one."""
        tokens, places, *of_first = self.features.rows_of(rows)
        return pack(tokens, places, of_first[0] if of_first else None, grouped=False, few_shapes=True)

    def of_texts(self, rows: np.ndarray, device: torch.device = _CPU) -> Inputs:
        """Inputs of the given rows of a student's distinct texts."""
        return self._inputs(device, self.features.texts, rows)

    def _inputs(
        self, device: torch.device, tokens: Ragged, rows: np.ndarray, first_lengths: np.ndarray | None = None
    ) -> Inputs:
        """`packed`, or input_ids, attention_mask and, of joint features, token_type_ids, each (rows, length), int64."""
        if self.padding == "packed":
            return {"packed": pack(tokens, rows, first_lengths, grouped=device.type == "cpu").to(device)}
        ids, mask = pad(tokens, rows, self.features.pad_id, self.max_seq_length if self.padding == "max" else None)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if first_lengths is not None:
            second = torch.arange(ids.shape[1]) >= torch.from_numpy(first_lengths.astype(np.int64))[:, None]
            inputs["token_type_ids"] = second.long() * mask
        return dict(zip(inputs, moved(list(inputs.values()), device), strict=True))


def pad(tokens: Ragged, rows: np.ndarray, pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and mask of the given rows, each (len(rows), `length` or the longest row), int64."""
    lengths = tokens.offsets[rows + 1] - tokens.offsets[rows]
    columns = np.arange(length or lengths.max())
    mask = columns < lengths[:, None]
    places = np.where(mask, tokens.offsets[rows][:, None] + columns, 0)
    ids = np.where(mask, tokens.ids[places], pad_id).astype(np.int64)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def moved(tensors: list[Tensor], device: torch.device, into: Tensor | None = None) -> list[Tensor]:
    """Tensors of the CPU, int64, on a device: by one copy of one buffer, for which nobody waits.

    `into` is the memory there, int64, (elements of all tensors,); None: new memory.
    """
    if device.type == "cpu":
        return tensors
    sizes = [tensor.numel() for tensor in tensors]
    flat = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    torch.cat([tensor.flatten() for tensor in tensors], out=flat)
    there = flat.to(device, non_blocking=True) if into is None else into.copy_(flat, non_blocking=True)
    return [part.view(tensor.shape) for part, tensor in zip(there.split(sizes), tensors, strict=True)]


@dataclass
class Group:
    """Rows of similar length, which attention pads to the longest of them."""

    rows: int
    length: int  # at least that of the longest row
    full: bool  # has no row any padding?
    place: Tensor  # int64, (rows * length,): the token of each place; for padding, any of the group's
    back: Tensor  # int64, (tokens,): the place of each token; of idle tokens that are counted, the last one: padding
    mask: Tensor  # int64, (rows, length): 1 for tokens and 0 for padding

    @cached_property
    def bias(self) -> Tensor:
        """(rows, 1, length), float32: 0 for tokens, far below for padding."""
        return ((1 - self.mask) * _MASKED)[:, None]


@dataclass
class PackedBatch:
    """Rows of token ids end to end, longest first, then idle tokens."""

    ids: Tensor  # int64, (tokens,)
    positions: Tensor  # int64, (tokens,)
    types: Tensor | None  # int64, (tokens,); None: all 0
    bounds: Tensor  # int64, (rows + 1,): where each row begins, and the last ends; idle rows of few shapes, too
    order: Tensor  # int64, (rows,): x[order] puts per-row results back into the order that was asked for
    groups: list[Group]

    @property
    def starts(self) -> Tensor:
        """int64, (rows,): where each row begins."""
        return self.bounds[: len(self.order)]

    @cached_property
    def bounds32(self) -> Tensor:
        """`bounds` as int32."""
        return self.bounds.int()

    def places(self) -> list[tuple[Any, str]]:
        """Where the batch has its tensors: records and names of their fields."""
        records: list[Any] = [self, *self.groups]
        return [(x, each.name) for x in records for each in fields(x) if isinstance(getattr(x, each.name), Tensor)]

    def to(self, device: torch.device, into: Tensor | None = None) -> "PackedBatch":
        """The same batch on a device; `into` is as in `moved`."""
        there = replace(self, groups=[replace(group) for group in self.groups])
        tensors = moved([getattr(*place) for place in self.places()], device, into)
        for place, tensor in zip(there.places(), tensors, strict=True):
            setattr(*place, tensor)
        return there


def pack(
    tokens: Ragged, rows: np.ndarray, first_lengths: np.ndarray | None = None, grouped: bool = True,
    few_shapes: bool = False,
) -> PackedBatch:  # fmt: skip
    """Pack the given rows, int, of `tokens`; a row may occur several times.

    Args:
        first_lengths: (len(rows),), tokens of type 0 in each row, the others being of type 1; None: all of type 0.
        grouped: cut the rows into groups of similar length, and add idle tokens; otherwise there are one group and no
            idle tokens, as suits a device whose attention takes rows of any length.
        few_shapes: not grouped, but with 5 idle rows that fill up to a multiple of 128 tokens, and with places for the
            longest row up to a multiple of 32, one of them for padding: shapes that other batches are likely to have.
    """
    order = np.argsort(tokens.offsets[rows] - tokens.offsets[rows + 1], kind="stable")  # longest first
    rows = rows[order]
    lengths = tokens.offsets[rows + 1] - tokens.offsets[rows]
    starts = np.cumsum(lengths) - lengths
    count = int(lengths.sum())
    within = np.arange(count) - np.repeat(starts, lengths)
    size = _few_sizes(count) if grouped else ((count + _IDLE - 1) // 128 + 1) * 128 if few_shapes else count
    ids, positions, types = torch.zeros((3, size), dtype=torch.int64)
    ids[:count] = torch.from_numpy(tokens.ids[np.repeat(tokens.offsets[rows], lengths) + within])
    positions[:count] = torch.from_numpy(within)
    if first_lengths is not None:
        types[:count] = torch.from_numpy(within >= np.repeat(first_lengths[order], lengths))
    groups = list(_groups(lengths)) if grouped else [_group(lengths)]
    bounds = np.append(starts, count)
    if few_shapes:
        groups = [_group(lengths, (int(lengths[0]) // 32 + 1) * 32, size)]
        bounds = np.append(starts, np.linspace(count, size, _IDLE + 1, dtype=np.int64))
    ends, back = map(torch.from_numpy, (bounds, np.argsort(order)))
    return PackedBatch(ids, positions, None if first_lengths is None else types, ends, back, groups)


def _few_sizes(count: int) -> int:
    """`count` rounded up to one of 32 sizes between a power of 2 and the next.

    oneDNN keeps a compiled product, a megabyte or so, for each number of rows. The idle tokens reach no output.

    >>> [_few_sizes(count) for count in (9, 63, 65, 1000, 1025)]
    [9, 63, 66, 1008, 1056]
    """
    step = 1 << max(0, count.bit_length() - 6)
    return -(-count // step) * step


def _groups(lengths: np.ndarray) -> Iterator[Group]:
    """Cut rows of falling length into groups.

    >>> [group.rows for group in _groups(np.array([9] * 10 + [5] * 40))]
    [10, 32, 8]
    """
    while len(lengths):
        similar = int((lengths[:_MOST] >= _SHORTEST * lengths[0]).sum())
        some, lengths = np.split(lengths, [max(similar, _FEWEST)])
        yield _group(some)


def _group(lengths: np.ndarray, length: int = 0, tokens: int = 0) -> Group:
    """A group of rows of falling length, with at least so many places per row, and so many tokens with idle ones."""
    length = max(length, int(lengths[0]))
    mask = np.arange(length) < lengths[:, None]
    back = np.flatnonzero(mask)
    place = np.zeros(mask.size, dtype=np.int64)
    place[back] = np.arange(len(back))
    full = len(back) == mask.size
    back = np.append(back, np.full(max(0, tokens - len(back)), mask.size - 1))
    return Group(len(lengths), length, full, *map(torch.from_numpy, (place, back, mask.astype(np.int64))))


class _Pad(torch.autograd.Function):
    """(tokens, width) to (places, width); what a place of padding holds must not be used."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return states if group.full else states.index_select(0, group.place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Nothing comes back from padding, so the gradient is gathered where index_select's own would be scattered.
        return gradient if ctx.group.full else gradient.index_select(0, ctx.group.back), None


def padded_inputs(batch: PackedBatch) -> Iterator[dict[str, Tensor]]:
    """Each group's rows as transformers' BertModel takes them, (rows, length), int64; results need `batch.order`."""
    entries = {"input_ids": batch.ids} | ({} if batch.types is None else {"token_type_ids": batch.types})
    for group, *parts in zip(batch.groups, *(by_group(x[:, None], batch) for x in entries.values()), strict=True):
        inputs = {name: padded(part, group)[..., 0] for name, part in zip(entries, parts, strict=True)}
        yield {**inputs, "attention_mask": group.mask}


def by_group(states: Tensor, batch: PackedBatch) -> list[Tensor]:
    """(tokens, width) cut into each group's tokens; a split, whose gradient is put together in one pass."""
    sizes = [len(group.back) for group in batch.groups]
    return list(states.split([*sizes, len(states) - sum(sizes)]))[:-1]


def padded(states: Tensor, group: Group) -> Tensor:
    """A group's tokens, (tokens, width), as (rows, length, width), to be used with `group.mask`."""
    return _Pad.apply(states, group).view(group.rows, group.length, -1)
