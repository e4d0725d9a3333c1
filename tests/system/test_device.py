"""What a measurement says of its machine."""

from pathlib import Path

import pytest

from dse.system import device

INFO = "processor\t: 0\nmodel name\t: A Chip\nflags\t\t: fpu {}\n"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("avx2 avx512f avx512_bf16 amx_tile", "A Chip, AMX"),
        ("avx2 avx512f avx512_bf16", "A Chip, AVX-512 with bfloat16"),
        ("avx2 avx512f", "A Chip, AVX-512"),
        ("avx2", "A Chip, AVX2"),
        ("sse2", "A Chip"),
    ],
)
def test_the_processor_and_its_best_products(monkeypatch, flags, told):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: INFO.format(flags))
    assert device.processor() == told
