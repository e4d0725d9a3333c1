"""The short form of soak_resume.py."""

from soak_resume import soak


def test_kills_in_short(tmp_path):
    """Two of tests/soak_resume.py's; the whole soak is run by hand."""
    assert soak(kills=2, seed=1, pairs=300, folder=tmp_path) == 2
