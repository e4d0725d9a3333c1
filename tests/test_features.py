"""Token ids, truncation, and caches that know what they were made from."""

import logging

import numpy as np
import pytest
import torch

from dse.data.features import cached_features, joint_features, kept_lengths, separate_features, tokenize_texts
from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.networks.batches import Batches, padding_for
from dse.system.errors import InputError, RunError

MRPC = get_task("mrpc")
CLS, SEP, PAD = 2, 3, 0


@pytest.fixture(scope="module")
def tokenizer(bert):
    return load_tokenizer(bert, True, "--bert_model")


def ids_of(tokenizer, text: str) -> list[int]:
    """The second way: word by word from the vocabulary, which holds every word of the made-up sentences."""
    return [tokenizer.get_vocab().get(word, tokenizer.get_vocab()["[UNK]"]) for word in text.lower().split()]


def test_truncation_equals_dropping_piece_by_piece():
    for length in (4, 7, 8, 128):
        a, b = (grid.ravel() for grid in np.mgrid[0 : 2 * length : max(1, length // 9), 0 : 2 * length : length // 4])
        expected = []
        for kept_a, kept_b in zip(a.tolist(), b.tolist(), strict=True):
            while kept_a + kept_b > length - 3:
                if kept_a > kept_b:
                    kept_a -= 1
                else:
                    kept_b -= 1
            expected.append((kept_a, kept_b))
        pairs = kept_lengths(a, b, np.ones(len(a), bool), length)
        assert list(zip(*(kept.tolist() for kept in pairs), strict=True)) == expected
        alone, none = kept_lengths(a, b, np.zeros(len(a), bool), length)
        assert alone.tolist() == [min(x, length - 2) for x in a.tolist()]
        assert not none.any()


def test_joint_rows_by_hand(tokenizer):
    words = "doctor bought a car"
    d, b, a, c = ids_of(tokenizer, words)
    pairs = Examples([words, words, words, "", words], ["car a", "", "\u200b", "car", "doctor doctor doctor"])
    features = joint_features(MRPC, pairs, tokenizer, 6)
    rows = np.split(features.tokens.ids, features.tokens.offsets[1:-1])
    assert [list(row) for row in rows] == [
        [CLS, d, b, SEP, c, SEP],  # 4 + 2 in a budget of 3: 3 + 2 is still over, 2 + 2 ties, the second loses
        [CLS, d, b, a, c, SEP],  # an empty second text: budget 6 - 2
        [CLS, d, b, a, SEP],  # a second text without pieces: no second [SEP], budget 6 - 3
        [CLS, SEP, c, SEP],
        [CLS, d, b, SEP, d, SEP],
    ]
    batch = Batches(features).of_pairs(np.array([3, 0]))
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert batch["input_ids"].tolist()[0] == [CLS, SEP, c, SEP, PAD, PAD]


def test_separate_texts_are_embedded_once_each(tokenizer):
    pairs = Examples(["a car", "the town", "a car"], ["the town", "the town", ""], [1, 0, 1])
    features = separate_features(MRPC, pairs, tokenizer, 4)
    assert len(features.texts.lengths) == 3
    batch = Batches(features).of_pairs(np.array([2, 0]))
    a, car = ids_of(tokenizer, "a car")
    the, town = ids_of(tokenizer, "the town")
    assert batch["input_ids"].tolist() == [
        [CLS, a, car, SEP], [CLS, a, car, SEP], [CLS, SEP, PAD, PAD], [CLS, the, town, SEP],
    ]  # fmt: skip
    assert features.costs.tolist() == [4, 4, 4]
    assert features.labels.tolist() == [1, 0, 1]


def test_a_separate_text_is_cut_to_length(tokenizer):
    texts, places = tokenize_texts(["car " * 50], tokenizer, 6)
    (car,) = ids_of(tokenizer, "car")
    assert (texts.ids.tolist(), places.tolist()) == ([CLS, car, car, car, car, SEP], [0])


def test_casing_reaches_the_normalizer(bert):
    for lower, expected in ((True, "car"), (False, "[UNK]")):
        tokenizer = load_tokenizer(bert, lower, "--bert_model")
        texts, _ = tokenize_texts(["CAR"], tokenizer, 8)
        assert texts.ids.tolist() == [CLS, tokenizer.get_vocab()[expected], SEP]


def test_an_unlike_casing_is_a_warning(bert, caplog):
    with caplog.at_level(logging.WARNING):
        load_tokenizer(bert, True, "--bert_model")
        assert caplog.text == ""
        load_tokenizer(bert, False, "--bert_model")
    assert "was saved with --do_lower_case (uncased), and this run uses no --do_lower_case (cased)" in caplog.text


PAIRS = Examples(["a car", "the town"], ["a ship", "the city"], [1, 0], [{"file": "train.tsv", "sha256": "1" * 64}])


def make(tokenizer, path, form="separate", task=MRPC, examples=PAIRS, length=16, chosen=False):
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
            {"examples": Examples(PAIRS.first, PAIRS.second, [1, 0], [{"file": "train.tsv", "sha256": "2" * 64}])},
            "data",
        ),
        ({"form": "joint"}, "form"),
    ],
)
def test_a_cache_is_remade_when_its_source_changed(changed, what, tokenizer, tmp_path, caplog):
    make(tokenizer, tmp_path / "cache")
    with caplog.at_level(logging.INFO):
        features = make(tokenizer, tmp_path / "cache", **changed)
    assert f"was made with another {what}; remade" in caplog.text
    fresh = make(tokenizer, tmp_path / "fresh", **changed)
    np.testing.assert_array_equal(next(iter(features.arrays().values())), next(iter(fresh.arrays().values())))


def test_a_cache_is_remade_for_another_casing(bert, tokenizer, tmp_path, caplog):
    make(tokenizer, tmp_path / "cache")
    with caplog.at_level(logging.INFO):
        make(load_tokenizer(bert, False, "--bert_model"), tmp_path / "cache")
    assert "another tokenizer, do_lower_case; remade" in caplog.text


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
    assert "; remade" in caplog.text


def test_a_chosen_path_never_overwrites_another_file(tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a feature cache of this project"):
        make(tokenizer, tmp_path / "notes.txt", chosen=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    make(tokenizer, tmp_path / "joint", "joint", chosen=True)
    before = (tmp_path / "joint").read_bytes()
    with pytest.raises(InputError, match="holds joint features, and this stage needs separate ones"):
        make(tokenizer, tmp_path / "joint", "separate", chosen=True)
    assert (tmp_path / "joint").read_bytes() == before


def test_special_tokens_count_only_where_they_stand_alone(tokenizer):
    texts, _ = tokenize_texts(["car [SEP] a", "car[SEP]a", "[MASK]"], tokenizer, 20)
    vocabulary = tokenizer.get_vocab()
    car, a, unknown, mask = (vocabulary[word] for word in ("car", "a", "[UNK]", "[MASK]"))
    rows = [list(row) for row in np.split(texts.ids, texts.offsets[1:-1])]
    assert rows == [[CLS, car, SEP, a, SEP], [CLS, car, *[unknown] * 3, a, SEP], [CLS, mask, SEP]]  # [ sep ]


def test_no_cache_when_writing_fails(tokenizer, tmp_path, monkeypatch, caplog):
    from safetensors import SafetensorError

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


@pytest.mark.parametrize("make_features", [joint_features, separate_features])
def test_texts_in_parts_give_the_rows_of_all_at_once(make_features, tokenizer, monkeypatch):
    words = ["doctor", "bought", "a", "car", "the", "town", "a", "ship"]
    pairs = Examples([" ".join(words[:n]) for n in (8, 1, 3, 5, 2)], [" ".join(words[n:]) for n in (7, 4, 8, 5, 2)])
    expected = make_features(MRPC, pairs, tokenizer, 9).arrays()
    for name, size in (("_TOKENIZE_AT_ONCE", 3), ("_ROWS_AT_ONCE", 2)):
        monkeypatch.setattr(f"dse.data.features.{name}", size)
        got = make_features(MRPC, pairs, tokenizer, 9).arrays()
        for array in expected:
            np.testing.assert_array_equal(got[array], expected[array], err_msg=f"{name} {array}")


def test_a_special_token_with_a_space_on_one_side_only_is_plain_text(tokenizer):
    car, a, unknown = (tokenizer.get_vocab()[word] for word in ("car", "a", "[UNK]"))
    texts, _ = tokenize_texts(["car [SEP]a", "car[SEP] a"], tokenizer, 20)
    assert texts.ids.reshape(2, -1).tolist() == [[CLS, car, *[unknown] * 3, a, SEP]] * 2


def test_the_padding_asked_for_goes_before_the_devices():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [padding_for(cpu, None), padding_for(cuda, None)] == ["packed", "batch"]
    for asked in ("packed", "batch", "max"):
        assert [padding_for(cpu, asked), padding_for(cuda, asked)] == [asked, asked]


@pytest.mark.parametrize("form", ["joint", "separate"])
def test_max_pads_to_max_seq_length_from_the_cache_too(form, tokenizer, tmp_path):
    for _ in ("made", "read"):
        features = cached_features(form, MRPC, PAIRS, tokenizer, 16, tmp_path / "cache", False)
        inputs = Batches(features, "max", 16).of_pairs(np.array([1]))
        assert inputs["input_ids"].shape == (1 if form == "joint" else 2, 16)
