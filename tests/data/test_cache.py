"""Caches of features, which know what they were made from."""

import logging

import numpy as np
import pytest
from helpers import DEEP, MRPC, TWO_ROWS
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dse.data import download
from dse.data.cache import check_cache_path
from dse.data.features import cached_features
from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.system.errors import InputError, RunError
from dse.system.files import read_json


def make(tokenizer, path, form="separate", task=MRPC, examples=TWO_ROWS, length=16, chosen=False):
    return cached_features(form, task, examples, tokenizer, length, path, chosen)


@pytest.mark.parametrize("form", ["joint", "separate"])
def test_a_cache_gives_the_same_features_without_tokenizing(form, tokenizer, tmp_path, monkeypatch):
    made = make(tokenizer, tmp_path / "cache", form)
    monkeypatch.setattr("dse.data.features._distinct_pieces", None)  # calling it would fail
    read = make(tokenizer, tmp_path / "cache", form)
    for name, array in made.arrays().items():
        np.testing.assert_array_equal(array, read.arrays()[name])
        assert array.dtype == read.arrays()[name].dtype
    np.testing.assert_array_equal(made.labels, read.labels)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"length": 4}, "max_seq_length"),
        ({"task": get_task("rte")}, "task"),
        (
            {
                "examples": Examples(
                    TWO_ROWS.first, TWO_ROWS.second, [1, 0], [{"file": "train.tsv", "sha256": "2" * 64}]
                )
            },
            "data",
        ),
        ({"form": "joint"}, "form"),
    ],
)
def test_a_cache_is_remade_when_its_source_changed(changed, what, tokenizer, tmp_path, caplog):
    make(tokenizer, tmp_path / "cache")
    with caplog.at_level(logging.INFO):
        features = make(tokenizer, tmp_path / "cache", **changed)
    assert f"was made with another {what}; making it again" in caplog.text
    fresh = make(tokenizer, tmp_path / "fresh", **changed)
    np.testing.assert_array_equal(next(iter(features.arrays().values())), next(iter(fresh.arrays().values())))


def test_a_cache_is_remade_for_another_casing(bert, tokenizer, tmp_path, caplog):
    make(tokenizer, tmp_path / "cache")
    with caplog.at_level(logging.INFO):
        make(load_tokenizer(bert, False, "--bert_model"), tmp_path / "cache")
    assert "another tokenizer, do_lower_case; making it again" in caplog.text


@pytest.mark.parametrize("place", [0.5, -8])
def test_a_spoiled_cache_is_remade(place, tokenizer, tmp_path, caplog):
    path = tmp_path / "cache"
    expected = make(tokenizer, path).arrays()
    raw = bytearray(path.read_bytes())
    raw[place if place < 0 else int(len(raw) * place)] ^= 1
    path.write_bytes(raw)
    with caplog.at_level(logging.INFO):
        again = make(tokenizer, path).arrays()
    assert all(np.array_equal(again[name], expected[name]) for name in expected)
    assert "; making it again" in caplog.text


def test_a_chosen_path_never_overwrites_another_file(tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a feature cache of this project"):
        make(tokenizer, tmp_path / "notes.txt", chosen=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    make(tokenizer, tmp_path / "joint", "joint", chosen=True)
    before = (tmp_path / "joint").read_bytes()
    with pytest.raises(InputError, match="holds joint features, but this stage needs separate ones"):
        make(tokenizer, tmp_path / "joint", "separate", chosen=True)
    assert (tmp_path / "joint").read_bytes() == before


def test_no_cache_when_writing_fails(tokenizer, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise SafetensorError("I/O error: Permission denied")

    monkeypatch.setattr("dse.data.cache.save_file", fail)
    assert len(make(tokenizer, tmp_path / "cache")) == 2
    assert "no feature cache" in caplog.text
    with pytest.raises(RunError, match="cache: cannot be written"):
        make(tokenizer, tmp_path / "cache", chosen=True)


def test_no_cache_where_the_folder_cannot_be_written(tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    features = make(tokenizer, tmp_path / "file" / "cache")
    assert len(features) == 2
    assert "no feature cache" in caplog.text


def test_deep_json_anywhere(tmp_path):
    """In what `read_json` reads, a cache's header, and the note beside a download."""
    deep = tmp_path / "deep.json"
    deep.write_text(DEEP)
    with pytest.raises(InputError, match=r"deep\.json: what it is is not valid JSON"):
        read_json(deep, "what it is")
    save_file({"ids": np.zeros(1, np.int32)}, tmp_path / "cache", metadata={"dse_features": DEEP})
    with pytest.raises(InputError, match="cache: is not a feature cache of this project"):
        check_cache_path(tmp_path / "cache", "joint")
    (tmp_path / "deep.part").write_bytes(b"x")
    assert download.Download("http://host/deep", tmp_path / "deep", most=9, size=9).progress() == (0, "")
