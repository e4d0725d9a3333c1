"""What a measurement says of its machine; GPUs that cannot be used."""

import warnings
from pathlib import Path

import pytest
import torch

from dse.system import device
from dse.system.device import select_device
from dse.system.errors import InputError

OLD = """CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU
driver. (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"""

INFO = "processor\t: 0\nmodel name\t: A Chip\nflags\t\t: fpu {}\n"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("avx2 avx512f avx512_bf16 amx_tile amx_bf16", "A Chip, AMX"),
        ("avx2 avx512f avx512_bf16", "A Chip, AVX-512 with bfloat16"),
        ("avx2 avx512f", "A Chip, AVX-512"),
        ("avx2", "A Chip, AVX2"),
        ("sse2", "A Chip"),
    ],
)
def test_the_processor_and_its_best_products(monkeypatch, flags, told):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: INFO.format(flags))
    assert device.processor() == told


@pytest.mark.parametrize(
    ("flags", "precision", "told"),
    [
        ("avx512_bf16", "auto", ", encoder in fp32 (this processor has bfloat16: --precision bf16 is faster)"),
        ("amx_bf16", "auto", ", encoder in fp32 (this processor has bfloat16: --precision bf16 is faster)"),
        ("avx512f", "auto", ""),
        ("avx512_bf16", "fp32", ""),
        ("avx512_bf16", "bf16", ", encoder in bf16"),
    ],
)
def test_the_log_tells_of_bfloat16_where_it_is_not_asked_for(monkeypatch, flags, precision, told):
    threads = torch.get_num_threads()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: INFO.format(flags))
    words = device.describe_device(torch.device("cpu"), precision)
    assert words == f"CPU with {device.count_of(threads)}{told}"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine whose GPU torch cannot use: what torch warns of, its CUDA, CUDA_VISIBLE_DEVICES."""

    def there(warning: str | None, cuda: str | None, visible: str | None) -> None:
        def available() -> bool:
            if warning:
                warnings.warn(warning, stacklevel=1)
            return False

        monkeypatch.setattr(torch.cuda, "is_available", available)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(device, "_SIGNS_OF_A_GPU", (tmp_path / "none", tmp_path))
        monkeypatch.setattr(device.libc, "keep_freed_memory", lambda: None)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return there


@pytest.mark.parametrize(
    ("warning", "cuda", "visible", "why"),
    [
        (OLD, "13.0", None, "is too old (found version 11040). Please update your GPU driver."),
        (None, None, None, f"torch {torch.__version__} is a build without CUDA"),
        (None, "13.0", "7", f"torch {torch.__version__} finds no GPU that it can use"),
        (OLD, "13.0", "", ""),
        (None, None, "-1", ""),
    ],
)  # fmt: skip
def test_a_gpu_that_is_not_used_is_told_in_one_line(warning, cuda, visible, why, gpu, caplog, recwarn):
    gpu(warning, cuda, visible)
    assert select_device(False, 0) == torch.device("cpu")
    assert len(caplog.messages) == bool(why)
    assert all(line.startswith("this machine has a GPU, but the CPU is used: ") for line in caplog.messages)
    assert why in caplog.text
    assert "\n" not in caplog.text[:-1]
    assert "Triggered" not in caplog.text
    caplog.clear()
    assert select_device(True, 0) == torch.device("cpu")
    assert not caplog.messages
    assert not list(recwarn)


def test_a_machine_without_a_gpu_says_nothing(gpu, caplog, monkeypatch, tmp_path):
    gpu(None, None, None)
    monkeypatch.setattr(device, "_SIGNS_OF_A_GPU", (tmp_path / "none",))
    assert select_device(False, 0) == torch.device("cpu")
    assert not caplog.messages


def test_a_gpu_that_fails_at_once_is_refused(monkeypatch):
    def busy(_):
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors might")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(InputError, match=r"GPU 0 cannot be used \(RuntimeError: CUDA error: .* or unavailable\): give"):
        select_device(False, 0)
