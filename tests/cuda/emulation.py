"""A CUDA that is not there: tensors that say cuda:0, hold CPU data, and refuse to be mixed with CPU tensors.

What a GPU's speed depends on is counted, with the line of the project that it comes from:

    launch      a call of an operator that computes; views and allocations are none, attention is one forward and three
                backward, and every other operator counts as one, though some are more
    read        the host waits for the device: item(), a copy to the host, a boolean index, synchronize()
    h2d, d2h    copies to the device and to the host
    collective  what goes to nccl, here gloo

Not emulated: CUDA's kernels and rounding, its random numbers, nccl, memory, and what runs beside what: streams and
events do nothing, and pinned memory is ordinary. `inference_mode` is `no_grad`, since a wrapper cannot be made in it.
"""

import builtins
import contextlib
import ctypes
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attention
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)
aten = torch.ops.aten

counts: Counter[str] = Counter()  # by kind: launch, read, h2d, d2h, collective
launches: Counter[str] = Counter()  # by operator
where: Counter[tuple[str, str]] = Counter()  # by kind but for launches, and place in the sources
rng_states: list[torch.Tensor] = []  # that were set

_FREE = {"_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "record_stream", "resize_"}  # and empty…, new_empty…
_READS = {"nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal", "bincount"}
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_COPIES = ("_to_copy", "copy_")


def compile_guard(folder: Path) -> Path:
    """The library of guard.cpp, for this build of torch; g++ must be there."""
    torch_folder, library = Path(torch.__file__).parent, folder / "guard.so"
    into = ["-shared", "-fPIC", "-std=c++20", "-O0", f"-I{torch_folder}/include", "-o", library]
    built = subprocess.run(
        ["g++", *into, HERE / "guard.cpp", f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[:4000]
    return library


def reset() -> None:
    """Forget all counts."""
    for counter in (counts, launches, where):
        counter.clear()


def found() -> dict[str, Any]:
    """All counts since `reset`, as JSON takes them."""
    places = [[kind, place, count] for (kind, place), count in where.most_common()]
    return {"counts": dict(counts), "launches": dict(launches.most_common()), "where": places}


def _count(kind: str, place: str = "") -> None:
    counts[kind] += 1
    where[kind, place or _place()] += 1


def _place() -> str:
    """Where the project is: the innermost line of dse/ or a script, else of whatever is not torch or this folder."""
    frame, other = sys._getframe(2), ""
    while frame is not None:
        path = frame.f_code.co_filename
        ours = path.startswith(f"{ROOT}/") and not path.startswith(f"{ROOT}/tests/")
        if ours or not (other or path.startswith(f"{HERE}/") or "/torch/" in path):
            other = f"{path.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        if ours:
            break
        frame = frame.f_back
    return other or "?"


class Emulated(torch.Tensor):
    """A tensor that says cuda:0; `held` is the CPU tensor with its numbers."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Emulated":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=CUDA,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"emulated {self.cpu()!r}"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: int) -> Any:  # torch.save copies to the host as well
        return self.cpu().__reduce_ex__(protocol)


class Mode(TorchDispatchMode):
    """Sees the operators that make tensors on CUDA, or move them there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def _each(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """The value with each of its tensors, at any depth of lists and tuples, as the function gives it."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)([_each(function, part) for part in value]) if type(value) in (list, tuple) else value


def _held(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, Emulated) else tensor


def _wrapped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, Emulated) else Emulated(tensor)


def _all_held(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _each(_held, args), {key: _each(_held, value) for key, value in kwargs.items()}


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, tensors = func._opname, []
    _each(tensors.append, [args, *kwargs.values()])
    on = [tensor for tensor in tensors if isinstance(tensor, Emulated)]
    off = [tensor for tensor in tensors if not isinstance(tensor, Emulated) and tensor.device.type != "meta"]
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if func.namespace == "c10d":
        return _collective(func, name, off, args, kwargs)
    if name in ("is_pinned", "_pin_memory"):
        return False if name == "is_pinned" else args[0].clone()
    if name in _COPIES:
        return _copy(name, args, kwargs)
    device = kwargs.get("device")
    if not on and not _is_cuda(device):
        return func(*args, **kwargs)
    if on:
        _refuse_mixed(name, off, tensors)
        _count_reads(name, args, kwargs)
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    result = _computed(func, name, *_all_held(args, kwargs))
    if on and device is not None and not _is_cuda(device):  # such as empty_like to the host
        return result
    wrapped = _each(_wrapped, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if on else wrapped


def _collective(func: Any, name: str, off: list[torch.Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
    if off and name != "barrier":
        raise RuntimeError(f"No backend type associated with device type cpu: {name} at {_place()}")
    _count("collective", f"{name} {_place()}")
    held, options = _all_held(args, kwargs)
    return func(*held, **options)


def _copy(name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """`to` and `copy_`: the ways between the devices, and those that stay on one."""
    if name == "copy_":
        target, source = args[:2]
        waits = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
        to_cuda, result = isinstance(target, Emulated), target
        _held(target).copy_(_held(source))
    else:
        source, waits = args[0], not kwargs.pop("non_blocking", False)
        to_cuda = _is_cuda(kwargs.pop("device", source.device))
        result = aten._to_copy.default(_held(source), **kwargs)
        result = Emulated(result) if to_cuda else result
    if to_cuda and isinstance(source, Emulated):
        counts["launch"] += 1
        launches[name] += 1
    elif to_cuda:
        _count("h2d")
    elif isinstance(source, Emulated):
        _count("d2h")
        if waits:
            _count("read")
    return result


def _refuse_mixed(name: str, off: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    """What torch refuses: CPU tensors beside CUDA's, unless they are scalars, or integers that index."""
    indices = [tensor for tensor in off if name in _INDEXING and tensor.dtype in (torch.int64, torch.bool)]
    if any(tensor.dim() and not any(tensor is index for index in indices) for tensor in off):
        given = ", ".join(f"{tensor.device} {tensor.dtype} {tuple(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {given} at {_place()}")
    for _ in indices:
        _count("h2d", f"index {_place()}")


def _count_reads(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    masks = name in _INDEXING and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name == "_local_scalar_dense" or name in _READS or masks or repeats:
        _count("read")


def _computed(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operator gives on CPU tensors; counted as a launch if it computes something."""
    weight, own = attention.KERNELS.get(name, (1, func))
    if not (func.is_view or name in _FREE or name == "_local_scalar_dense" or name.startswith(("empty", "new_empty"))):
        counts["launch"] += weight
        launches[name] += weight
    if name in ("_softmax", "_log_softmax") and args[2]:  # from 16 bits to float32, which the CPU does not do
        return func(args[0].float(), args[1], False)
    if name in ("_softmax_backward_data", "_log_softmax_backward_data") and args[0].dtype != args[3]:
        return func(*args[:3], torch.float32).to(args[3])
    return own(*args, **kwargs)


# What torch.cuda offers


class Event:
    """An event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: "Event") -> float:
        return 0.0

    def synchronize(self) -> None:
        _count("read")


class Stream(Event):
    """A stream that has nothing to do."""

    cuda_stream, device, device_index = 0, CUDA, 0
    wait_stream = wait_event = Event.record

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


class Properties:
    """Of an H200, in what anything here reads."""

    name, major, minor, total_memory, multi_processor_count = "an emulated GPU", 9, 0, 141 << 30, 132


def _synchronize(*_: Any) -> None:
    _count("read")


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _value(value: Any, *_: Any, **__: Any) -> Any:
    return value


_OF_CUDA: dict[str, Any] = {
    "Event": Event, "Stream": Stream, "stream": contextlib.nullcontext, "synchronize": _synchronize,
    "current_stream": partial(_value, Stream()), "default_stream": partial(_value, Stream()), "set_stream": _nothing,
    "_lazy_init": _nothing, "is_initialized": partial(_value, True), "is_available": partial(_value, True),
    "device_count": partial(_value, 1), "current_device": partial(_value, 0), "set_device": _nothing,
    "_exchange_device": partial(_value, 0), "_maybe_exchange_device": partial(_value, 0),
    "get_device_name": partial(_value, Properties.name), "get_device_properties": partial(_value, Properties),
    "get_device_capability": partial(_value, (9, 0)), "is_bf16_supported": partial(_value, True),
    "graph_pool_handle": _nothing, "memory_reserved": partial(_value, 0),
    "mem_get_info": partial(_value, (140 << 30, 141 << 30)), "memory_allocated": partial(_value, 0),
    "max_memory_allocated": partial(_value, 0), "reset_peak_memory_stats": _nothing, "empty_cache": _nothing,
    "is_current_stream_capturing": partial(_value, False), "manual_seed": _nothing, "manual_seed_all": _nothing,
    "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": lambda state, *_: rng_states.append(state),
}  # fmt: skip


def _plain_type(value: Any, *more: Any) -> Any:
    """As `type`, but of an emulated tensor what it would be on a GPU."""
    if more or not isinstance(value, Emulated):
        return builtins.type(value, *more)
    return torch.nn.Parameter if isinstance(value, torch.nn.Parameter) else torch.Tensor


def _captured(compute: Any, pool: None) -> Callable[[], Any]:
    """A pass that is run again, with what is then in the memory of its inputs, as a graph does."""
    batch = compute.args[0]["packed"]

    def replay() -> Any:
        for record in (batch, *batch.groups):  # what was computed of the former inputs
            for name in ("bounds32", "bias"):
                vars(record).pop(name, None)
        return compute()

    return replay


def install(guard: Path) -> None:
    """Emulate CUDA in this process from here on; `guard` is the library of `compile_guard`."""
    import transformers

    from dse.networks import kernels
    from dse.storage import student_folder
    from dse.training import trainer

    ctypes.CDLL(str(guard))
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") makes them on the host, then copies
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a wrapper cannot be changed in place
    # The class stays, which some functions are decorated with already.
    torch.inference_mode.__enter__, torch.inference_mode.__exit__ = torch.no_grad.__enter__, torch.no_grad.__exit__
    torch.cuda.amp.common.amp_definitely_not_available = partial(_value, False)
    for name, value in _OF_CUDA.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.record_stream = torch.distributed.Logger.set_runtime_stats_and_log = _nothing  # it has no timer
    kernels.type = student_folder.type = _plain_type
    trainer.has_graphs, trainer.captured = partial(_value, True), _captured
    save, run = transformers.PreTrainedModel.save_pretrained, threading.Thread.run

    def save_pretrained(self, folder, **options):  # safetensors copies to the host itself
        state = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        return save(self, folder, state_dict=state, **options)

    def run_emulated(self):
        with Mode():
            run(self)

    transformers.PreTrainedModel.save_pretrained, threading.Thread.run = save_pretrained, run_emulated
    Mode().__enter__()
