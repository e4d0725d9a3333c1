"""Several processes, started by torchrun, that train one model, or compute its outputs, together.

Each of N processes has all the data and the model. It takes every N-th row of each training batch. Of an inference it
takes every N-th batch, or of a student's pairs one of N blocks; its other outputs are zeros. Only the first process
writes files. One process runs as usual.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dse.system.errors import InputError, RunError, lack_of_memory, one_line

if TYPE_CHECKING:
    import torch

_TIMEOUT = datetime.timedelta(minutes=30)  # the first process may tokenize that long while the others wait
_OF_THE_CONNECTION = ("Connection", "onnection closed", "gloo", "NCCL", "peer", "Socket")
_device: "torch.device | None" = None  # of this process, once it has joined the others


def launched() -> bool:
    """Did torchrun start this process as one of several? It sets all of these; a cluster may set some of them."""
    numbers = [os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")]
    return all(number.isdecimal() for number in numbers) and "MASTER_ADDR" in os.environ and int(numbers[0]) > 1


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def size() -> int:
    """How many processes work together: 1 until `join`."""
    return 1 if _device is None else int(os.environ["WORLD_SIZE"])


def is_first() -> bool:
    """Is this the process that writes?"""
    return rank() == 0


def join(device: "torch.device") -> None:
    """Meet the other processes, if there are any; `process_group` leaves them."""
    global _device
    if launched():
        import torch

        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        torch.distributed.init_process_group(backend, timeout=_TIMEOUT, device_id=gpu)  # barriers take it, too
        _device = device


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Leave the other processes, if this one joined them in the block. Raises RunError if one is lost."""
    global _device
    try:
        yield
        if _device is not None:
            import torch

            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except RuntimeError as error:
        of_it = any(word in str(error) for word in _OF_THE_CONNECTION) and not lack_of_memory(error)  # as of NCCL
        if _device is None or not of_it:
            raise
        mend = "look for that process's error; --resume continues if there is a state"
        raise RunError(f"process {rank()} lost the connection to another ({one_line(error)[:200]}): {mend}") from error
    finally:
        _device = None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let this process run the block by itself, as if there were no others (`size` is 1)."""
    global _device
    device, _device = _device, None
    try:
        yield
    finally:
        _device = device


def wait_for_all() -> None:
    """Return when all processes have called this."""
    if size() > 1:
        import torch

        torch.distributed.barrier()


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process run the block before the others, so that they find what it left, such as a cache."""
    if not is_first():
        wait_for_all()
    yield
    if is_first():
        wait_for_all()


def rows_of_rank(rows: np.ndarray) -> np.ndarray:
    """This process's part of a batch's rows."""
    return rows[rank() :: size()] if size() > 1 else rows


def block_of_rank(rows: int) -> slice:
    """This process's block of so many rows; the blocks are of one size, to 1, and may be empty.

    Rows that are neighbours in a file often share texts, which are then in one block.
    """
    first, last = (rows * (rank() % size() + i) // size() for i in (0, 1))
    return slice(first, last)


def agree(numbers: list[int], what: str) -> None:
    """Raise RunError if the processes' numbers differ."""
    everyone = _by_rank(numbers, np.int64)
    if (everyone != everyone[0]).any():
        differ = f"the processes differ in {what}; this one has {numbers}"
        raise RunError(f"{differ}: all of them need the same folders with the same files")


def summed(values: np.ndarray) -> np.ndarray:
    """The sum of all processes' arrays, which have one shape and dtype, in every process."""
    if size() == 1:
        return values
    import torch

    tensor = torch.from_numpy(values).to(_device, copy=True)
    torch.distributed.all_reduce(tensor)
    return tensor.cpu().numpy()


def _by_rank(value: Any, dtype: Any) -> np.ndarray:
    """(processes, *shape): every process's value, which has one shape."""
    everyone = np.zeros((size(), *np.shape(value)), dtype)
    everyone[rank() % size()] = value  # a process that has not joined yet is alone
    return summed(everyone)


def highest(value: int) -> int:
    """The highest of all processes' numbers."""
    return int(_by_rank(value, np.int64).max())


def of_first(value: int) -> int:
    """The first process's number."""
    return int(_by_rank(value, np.int64)[0])


def of_all(tensor: "torch.Tensor") -> "list[torch.Tensor]":
    """Every process's tensor, by rank; all are on the CPU and have one shape and dtype."""
    return [tensor.new_tensor(values) for values in _by_rank(tensor, tensor.numpy().dtype)]


def synchronized(model: "torch.nn.Module") -> Any:
    """The model or, with several processes, its DistributedDataParallel. Raises InputError if nothing is trained."""
    if _device is None:
        return model
    from torch.nn.parallel import DistributedDataParallel

    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("--freeze_bert: leaves this architecture nothing to train")
    devices = [_device] if _device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
