"""The device that a run uses, its description for the log, and the seed."""

import importlib.util
import logging
import os
import platform
import random
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dse import __version__
from dse.system import libc, parallel
from dse.system.errors import InputError, one_line

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
_WITH_BFLOAT16 = ("AMX", "AVX-512 with bfloat16")  # instructions, as `processor` names them
_SIGNS_OF_A_GPU = (Path("/dev/nvidia0"), Path("/proc/driver/nvidia"))  # of its driver


def select_device(no_gpu: bool, gpu_id: int, precision: str = "auto") -> "torch.device":
    """CUDA if there is a GPU and `no_gpu` is false, else the CPU. A GPU becomes torch's current one.

    Raises InputError for a GPU that does not exist or cannot be used; warns if torch can use none of those that do.
    """
    import torch

    if no_gpu or not _has_cuda():
        if precision in ("fp16", "tf32"):
            why = "needs a CUDA device, and this run has none"
            raise InputError(f"--precision {precision}: {why}: leave it out, or give --precision bf16")
        libc.keep_freed_memory()
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if parallel.launched():
        gpu_id = int(os.environ["LOCAL_RANK"])  # the process's number on its machine
        if gpu_id >= count:
            raise InputError(f"torchrun: process {gpu_id} of this machine has no GPU, since there are {count}")
    elif not 0 <= gpu_id < count:
        raise InputError(f"--gpu_id: there is no GPU {gpu_id}; give a number from 0 to {count - 1}")
    elif count > 1:
        all_of_them = f"to use all, start a script that trains or makes logits with `torchrun --nproc_per_node {count}`"
        logger.info("of %d GPUs, this run uses number %d; %s", count, gpu_id, all_of_them)
    device = torch.device("cuda", gpu_id)
    try:
        torch.cuda.set_device(device)  # for whatever says just "cuda"; it is the first call that needs the GPU
    except RuntimeError as error:
        raise InputError(
            f"GPU {gpu_id} cannot be used ({one_line(error)[:200]}): give another --gpu_id, or use the CPU"
        ) from error
    return device


def _has_cuda() -> bool:
    """Can torch use a GPU? Warns if it cannot and there is one."""
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return True
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    if hidden == "" or hidden.startswith("-"):  # by the user
        return False
    if told:  # once in a process
        why = re.sub(r" \(Triggered internally .*", "", " ".join(str(told[0].message).split()))
    elif any(path.exists() for path in _SIGNS_OF_A_GPU):
        built = f"torch {torch.__version__} finds no GPU that it can use: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        why = built if torch.version.cuda else f"torch {torch.__version__} is a build without CUDA: install another"
    else:
        return False
    logger.warning("this machine has a GPU, but the CPU is used: %s", why)
    return False


def describe_device(device: "torch.device", precision: str = "auto") -> str:
    """The device and the encoder's precision there in words, for the log; what a CPU that has bfloat16 would gain."""
    import torch

    if device.type == "cuda":
        encoder = f"encoder in {'tf32' if precision == 'auto' else precision}"
        return f"{device} ({torch.cuda.get_device_name(device)}), {encoder}"
    rounded = "" if precision in ("auto", "fp32") else f", encoder in {precision}"
    if precision == "auto" and has_bfloat16(device):
        rounded = ", encoder in fp32 (this processor has bfloat16: --precision bf16 is faster)"
    return f"CPU with {count_of(torch.get_num_threads())}{rounded}"


def has_bfloat16(device: "torch.device") -> bool:
    """Does the device multiply bfloat16 faster than float32?"""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and processor().endswith(_WITH_BFLOAT16)


def count_of(threads: int) -> str:
    """The number of threads in words.

    >>> count_of(1), count_of(2)
    ('1 thread', '2 threads')
    """
    return f"{threads} thread{'s' * (threads != 1)}"


def processor() -> str:
    """The processor's name and the instructions that decide how fast it multiplies, such as "AMD EPYC, AVX-512"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    has = set(told.get("flags", "").split())
    amx, avx = _WITH_BFLOAT16
    known = {"amx_bf16": amx, "avx512_bf16": avx, "avx512f": "AVX-512", "avx2": "AVX2"}
    best = next((name for flag, name in known.items() if flag in has), None)
    return ", ".join(filter(None, (told.get("model name") or platform.machine(), best)))


def machine() -> dict[str, Any]:
    """What a measurement depends on: processor, GPU, threads, versions."""
    import torch

    packages = [name for name in ("transformers", "sentence_transformers") if importlib.util.find_spec(name)]
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": {"dse": __version__, "python": platform.python_version(), "torch": torch.__version__,
                     **{name: version(name) for name in packages}},
    }  # fmt: skip


def bert_parameters(bert: dict[str, Any]) -> tuple[int, int]:
    """Parameters of a BERT's layers, and of all of it, from the sizes in its configuration."""
    hidden, inner = bert["hidden_size"], bert["intermediate_size"]
    layer = 4 * hidden * (hidden + 1) + 2 * hidden * inner + inner + hidden + 4 * hidden  # the last: two layer norms
    rows = bert["vocab_size"] + bert["max_position_embeddings"] + bert["type_vocab_size"] + 2
    layers = bert["num_hidden_layers"] * layer
    return layers, layers + rows * hidden + hidden * (hidden + 1)  # with the pooler


def training_bytes(bert: dict[str, Any], tokens: int, precision: str) -> float:
    """Memory of a training with so many tokens in a pass, computed: 16 bytes per parameter, and activations.

    A parameter has a weight, a gradient and two moments in float32. For each token and layer, about 34 bytes x hidden
    are kept for the backward pass in bf16 or fp16, and twice that otherwise (Korthikanti et al., 2022, without what
    attention keeps if it is not computed in one call).
    """
    each = 34 if precision in ("bf16", "fp16") else 68
    return 16 * bert_parameters(bert)[1] + each * bert["hidden_size"] * bert["num_hidden_layers"] * tokens


def training_seconds(bert: dict[str, Any], tokens: float, peak: float, share: float) -> float:
    """Time of a training on so many tokens, epochs included, computed: 6 x parameters of the layers x tokens FLOP.

    peak, share: the GPU's FLOP a second, and how much of that the training reaches.
    """
    return 6 * bert_parameters(bert)[0] * tokens / (peak * share)


def seed_everything(seed: int) -> int:
    """Seed torch and Python; -1 draws a seed, the same in all processes. Returns the seed."""
    import torch

    if seed == -1:
        seed = parallel.of_first(int.from_bytes(os.urandom(4), "little"))
    random.seed(seed)
    torch.manual_seed(seed)
    return seed
