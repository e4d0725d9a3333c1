"""encode, score and predict: texts of every kind, their order, and what they compare with."""

import random

import numpy as np
import pytest
import torch

from dse.data.features import tokenize_texts
from dse.data.tasks import get_task
from dse.experiments.synthetic import make_pair
from dse.networks.batches import pad

PAIRS = [make_pair(random.Random(seed))[1:] for seed in range(9)]
TEXTS = [text for pair in PAIRS for text in pair]


def embedded_alone(model, text: str) -> np.ndarray:
    """A second way: one text, padded, through the network itself."""
    tokens, _ = tokenize_texts([text], model.tokenizer, model.max_seq_length)
    with torch.inference_mode():
        return model.network.embed(*pad(tokens, np.array([0]), 0, 32))[0].numpy()


def test_encode_keeps_the_order_whatever_the_batches(student):
    model = student()
    texts = [*TEXTS, TEXTS[0], "x " * 500, ""]
    expected = np.stack([embedded_alone(model, text) for text in texts])
    for batch_size in (1, 3, 1000):
        embeddings = model.encode(iter(texts), batch_size)
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(embeddings, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected[0], expected[1], atol=0.01)


def test_long_texts_are_cut_to_the_students_length(student):
    """32 tokens are [CLS], 30 pieces and [SEP]: what the 31st says does not count."""
    model = student()
    words = ["doctor", "car", "town"] * 10
    same, other, short = (" ".join([*words, *more]) for more in (["hill"], [], ["ring", "boat"]))
    np.testing.assert_array_equal(model.encode(same), model.encode(other))
    np.testing.assert_array_equal(model.encode(short), model.encode(other))
    assert not np.allclose(model.encode(" ".join(words[:29])), model.encode(other), atol=1e-4)


def test_what_encode_returns(student):
    model = student()
    width = model.network.config.embedding_size
    both = model.encode(TEXTS[:2])
    assert model.encode(TEXTS[0]).shape == (width,)
    assert model.encode([]).shape == (0, width)
    tensor = model.encode(TEXTS[:2], convert_to="tensor")
    assert torch.equal(tensor, torch.from_numpy(both))
    listed = model.encode(TEXTS[:2], convert_to="list")
    assert [row.shape for row in listed] == [(width,), (width,)]
    unit = model.encode(TEXTS[:2], normalize=True)
    np.testing.assert_allclose(unit, both / np.sqrt((both**2).sum(axis=1, keepdims=True)), rtol=1e-5)
    half = model.encode(TEXTS[:2], half=True)
    assert half.dtype == np.float16
    assert np.abs(half - both).max() < 0.03 * np.abs(both).max()
    assert not model.network.training


def test_encode_leaves_the_mode_as_it_was(student):
    model = student()
    model.network.train()
    model.encode(TEXTS[:2])
    assert model.network.training


@pytest.mark.parametrize("task", ["mrpc", "snli", "sts-b"])
def test_score_is_the_head_on_the_embeddings(student, task):
    model = student(task)
    u, v = (torch.from_numpy(model.encode([pair[side] for pair in PAIRS])) for side in (0, 1))
    with torch.inference_mode():
        expected = model.network.siamese_head(u, v).numpy()
    scores = model.score(iter(PAIRS), batch_size=2)
    assert scores.shape == ((9, 3) if task == "snli" else (9,))
    np.testing.assert_allclose(scores.reshape(9, -1), expected, rtol=1e-4, atol=1e-5)
    assert model.score([]).shape == ((0, 3) if task == "snli" else (0,))
    reversed_scores = model.score([(b, a) for a, b in PAIRS])
    assert not np.allclose(scores, reversed_scores, atol=1e-4), "the order of a pair's texts does not count"


def test_predict_by_hand(student, monkeypatch):
    binary, nli, similarity = student("mrpc"), student("snli"), student("sts-b")
    monkeypatch.setattr(binary, "score", lambda *_: np.array([-0.1, 0.0, np.log(3)], np.float32))
    assert binary.predict(PAIRS[:3]) == ["0", "0", "1"]
    assert binary.predict(PAIRS[:3], threshold=0.4) == ["1", "1", "1"]
    np.testing.assert_allclose(binary.predict(PAIRS[:3], probabilities=True)[1:], [0.5, 0.75], rtol=1e-6)
    monkeypatch.setattr(nli, "score", lambda *_: np.log(np.array([[1, 2, 1], [3, 1, 4]], np.float32)))
    labels = get_task("snli").labels
    assert nli.predict(PAIRS[:2]) == [labels[1], labels[2]]
    np.testing.assert_allclose(
        nli.predict(PAIRS[:2], probabilities=True), [[1 / 4, 2 / 4, 1 / 4], [3 / 8, 1 / 8, 4 / 8]], rtol=1e-6
    )
    np.testing.assert_array_equal(similarity.predict(PAIRS), similarity.score(PAIRS))
    with pytest.raises(ValueError, match="regression"):
        similarity.predict(PAIRS, probabilities=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode(["a", None]), "number 1: got NoneType, expected a string"),
        (lambda model: model.encode([b"a"]), "number 0: got bytes, expected a string"),
        (lambda model: model.encode(["a", "\ud800"]), "number 1: UTF-8 cannot hold it"),
        (lambda model: model.encode("a", batch_size=0), "batch_size: 0"),
        (lambda model: model.score([("a", "b")], batch_size=0), "batch_size: 0"),
        (lambda model: model.encode("a", convert_to="jax"), "convert_to: 'jax'"),
        (lambda model: model.score([("a", "b"), "ab"]), "number 1: got str, expected .text, text., or a mapping"),
        (lambda model: model.score([("a", "b", "c")]), "number 0: got 3 texts, expected 2"),
        (lambda model: model.score([("a", 3)]), "second texts, number 0: got int, expected a string"),
    ],
)
def test_what_is_no_text_is_refused(student, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(student())


def test_half_computes_with_fewer_bits(student):
    """Not in float32, rounded at the end."""
    model = student()
    half, rounded = model.encode(TEXTS, half=True), model.encode(TEXTS).astype(np.float16)
    assert (half != rounded).mean() > 0.5


def test_batch_size_is_texts_or_pairs_of_full_length(student):
    """Six texts of 32 tokens."""
    model, seen = student(), []
    model.network.dse_model.bert.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(len(inputs["packed"].starts)), with_kwargs=True
    )
    texts = [f"{word} " * 40 for word in ("doctor", "car", "town", "hill", "ring", "boat")]
    pairs = list(zip(texts[:3], texts[3:], strict=True))
    for call, steps in (
        (lambda: model.encode(texts, batch_size=1), [1] * 6),
        (lambda: model.encode(texts, batch_size=4), [4, 2]),
        (lambda: model.score(pairs, batch_size=1), [2, 2, 2]),
        (lambda: model.predict(pairs, batch_size=2), [4, 2]),
    ):
        seen.clear()
        call()
        assert seen == steps


def test_nothing_is_dropped_out_in_training_mode(student):
    model = student()
    expected = model.encode(TEXTS), model.score(PAIRS)
    model.network.train()
    np.testing.assert_array_equal(model.encode(TEXTS), expected[0])
    np.testing.assert_array_equal(model.score(PAIRS), expected[1])


def test_an_embedding_of_zeros_is_normalized_to_zeros(student):
    model = student(additional_embedding_layer_size=4)
    for parameter in model.network.dse_model.bert.classifier.parameters():
        torch.nn.init.zeros_(parameter)
    assert model.encode(["a car", ""], normalize=True).tolist() == [[0.0] * 4] * 2


def test_a_student_moves_to_a_device_itself(student):
    model = student()
    assert model.device == torch.device("cpu")
    assert model.to("meta") is model
    assert model.device == torch.device("meta")
    assert {parameter.device.type for parameter in model.network.parameters()} == {"meta"}
