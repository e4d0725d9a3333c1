"""Calls of glibc and Linux, and their public fallbacks."""

import numpy as np
import pytest

from dse.system import libc


@pytest.mark.parametrize("private", [True, False])
def test_what_glibc_and_linux_do_has_public_fallbacks(private, tmp_path, monkeypatch):
    """With the private calls and without: memory is measured, and folders change places or say that they cannot."""
    monkeypatch.setattr(libc, "PRIVATE", private)
    libc.keep_freed_memory()
    libc.forget_peak_memory()
    assert libc.peak_memory() > 1
    assert np.isnan(libc.anonymous_memory()) == (not private)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert libc.exchange(tmp_path / "one", tmp_path / "other") == private
    assert (tmp_path / "one" / "other").exists() == private
