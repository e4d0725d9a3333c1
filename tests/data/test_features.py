"""Token ids, truncation, and what is told of them."""

import numpy as np
import pytest
from helpers import CLS, MRPC, PAD, SEP, names_of

from dse.data.features import Ragged, cached_features, joint_features, kept_lengths, separate_features, tokenize_texts
from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.networks.batches import Batches


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


# What is cut and what is unknown. The words of the tiny vocabulary are a piece each, any other one is [UNK].

# (name, form, max_seq_length, text a, text b, cut, share of [UNK] in %)
CUT = [
    ("joint, to the last piece", "joint", 6, ["a car", "a"], ["town", "ship car"], "0 of 2 rows", 0.0),
    ("joint, one piece too many", "joint", 6, ["a car", "a"], ["town", "ship car a"], "1 of 2 rows", 0.0),
    ("joint, without a second text", "joint", 6, ["a car a car", "a car a car a"], ["", ""], "1 of 2 rows", 0.0),
    ("separate", "separate", 4, ["a car", "a car a"], ["a car", "a town ship"], "2 of 3 distinct texts", 0.0),
    ("5 % exactly", "separate", 12, ["a car " * 5], ["zzz " + "a " * 9], "0 of 2 distinct texts", 5.0),
    ("more", "joint", 64, ["a car " * 5], ["zzz " + "a " * 8], "0 of 1 rows", 100 / 19),
    ("unknown beyond the cut", "separate", 4, ["a car zzz"], ["a ship zzz"], "2 of 2 distinct texts", 0.0),
    ("no pieces at all", "joint", 8, [""], [""], "0 of 1 rows", 0.0),
]


@pytest.mark.parametrize(("name", "form", "length", "first", "second", "cut", "share"), CUT, ids=names_of(CUT))
def test_what_is_cut_or_unknown_is_told(
    name, form, length, first, second, cut, share, tokenizer, tmp_path, told, monkeypatch
):
    """Of features as they are made, from the cache, and from a cache of before it held the count."""
    examples = Examples(first, second, [0] * len(first), [{"file": "dev.tsv", "sha256": "1" * 64}])
    expected = [f"INFO dev.tsv: {cut} are cut at --max_seq_length {length}; {share:.1f} % of the pieces are [UNK]"]
    if share > 5:
        expected += [f"WARNING dev.tsv: {share:.0f} % of the pieces are [UNK], all alike to the model: "
                     "its tokenizer does not fit these texts"]  # fmt: skip

    def make(path):
        return cached_features(form, get_task("mrpc"), examples, tokenizer, length, tmp_path / path, False)

    assert told(lambda: make("cache")) == expected
    assert told(lambda: make("cache")) == expected
    with monkeypatch.context() as patch:
        patch.setattr(Ragged, "arrays", lambda rows: {"ids": rows.ids, "offsets": rows.offsets})
        make("older")
    older = told(lambda: make("older"))
    at_most = int(older[0].split()[4])
    assert older == [expected[0].replace(f" {cut[0]} ", f" at most {at_most} ", 1), *expected[1:]]
    assert at_most >= int(cut[0])
