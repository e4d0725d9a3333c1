"""encode, score and predict: texts of every kind, their order, and what they compare with; the hub."""

import logging
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ODD_TEXTS, PAIRS, TEXTS, TRIO
from huggingface_hub import hub_mixin

from dse.data.features import tokenize_texts
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier
from dse.networks.batches import pad
from dse.storage.student_folder import fingerprint
from dse.system.errors import InputError


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


def test_threads_drop_nothing_out_in_training_mode(student):
    """One that ends first does not put the others into training mode."""
    model, found = student(), []
    model.network.set_dropout(0.5)
    expected = model.encode(TEXTS)
    model.network.train()
    threads = [threading.Thread(target=lambda: found.extend(model.encode(TEXTS) for _ in range(8))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    for embeddings in found:
        np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-5)
    assert model.network.training


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


def test_texts_from_python_are_warned_of_once(student, caplog):
    model = student("mrpc")
    with caplog.at_level(logging.WARNING, "dse"):
        model.encode(["a car in the town"] * 9)
        assert caplog.text == ""
        model.encode("what car")  # one query tells nothing of a tokenizer
        assert caplog.text == ""
        for _ in range(2):
            model.encode(["zzz a car " * 9, "a car " * 12])  # 27 pieces and 24
    assert caplog.text.count("texts: 18 % of the pieces are [UNK]") == 1


def test_an_index_is_of_the_length_and_tokenizer_too(student, bert, tmp_path):
    """Either decides the embeddings: texts of another length or casing, with the same weights, are other texts."""
    model = student()
    index, known = CandidateIndex.build(model, TEXTS, tmp_path / "index"), fingerprint(model)
    assert fingerprint(student()) == known
    for change in ({"max_seq_length": 5}, {"tokenizer": load_tokenizer(bert, False, "bert")}):
        other = replace(student(), **change)
        assert not np.array_equal(other.encode("The doctor bought a car"), model.encode("The doctor bought a car"))
        assert fingerprint(other) != known
        with pytest.raises(InputError, match="made by another model"):
            CandidateIndex.open(index.folder, other)


def test_push_to_hub_uploads_the_folder(student, monkeypatch):
    uploads = []

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **_):
            uploads.append((repo_id, DSESiameseClassifier.from_pretrained(folder_path).score(PAIRS)))
            return "address"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    model = student()
    assert model.push_to_hub("someone/student") == "address"
    ((name, scores),) = uploads
    assert name == "someone/student"
    np.testing.assert_array_equal(scores, model.score(PAIRS))


MISTAKEN = {  # what a user gave, to what, and what the error says
    "a mapping of columns": (
        lambda m: m.score({"text": ["a"], "text_pair": ["b"]}),
        "pairs: got dict, expected a list of pairs",
    ),
    "a mapping as a pair": (
        lambda m: m.score([{"a": "x", "b": "y"}]),
        "number 0: got dict, expected (text, text), or a mapping",
    ),
    "more than the two keys": (
        lambda m: m.score([{"text": "x", "text_pair": "y", "label": 1}]),
        "number 0: got dict",
    ),
    "a set of pairs": (lambda m: m.score({("a", "b")}), "pairs: got set"),
    "a set as a pair": (lambda m: m.score([{"a", "b"}]), "number 0: got set"),
    "bytes as a pair": (lambda m: m.score([b"ab"]), "number 0: got bytes"),
    "a query and candidates": (lambda m: m.score("q", ["a"]), "batch_size: got list"),
    "a query": (lambda m: m.score("q"), "pairs: got str"),
    "encode a mapping": (lambda m: m.encode({"text": "a"}), "sentences: got dict, expected a list of strings"),
    "encode a set": (lambda m: m.encode({"a", "b"}), "sentences: got set"),
    "encode bytes": (lambda m: m.encode(b"ab"), "sentences: got bytes"),
    "encode nothing": (lambda m: m.encode(None), "sentences: got NoneType, expected a list of strings"),
    "encode a number": (lambda m: m.encode(3), "sentences: got int"),
    "predict a mapping": (lambda m: m.predict({"text": "a", "text_pair": "b"}), "pairs: got dict"),
    "search nothing": (lambda m: CandidateIndex.build(m, TRIO).search(None), "queries: got NoneType"),
    "search a set": (lambda m: CandidateIndex.build(m, TRIO).search({"a"}), "queries: got set"),
    "search numbers": (
        lambda m: CandidateIndex.build(m, TRIO).search([1]),
        "queries, number 0: got int, expected a string",
    ),
    "index a mapping": (lambda m: CandidateIndex.build(m, {"a": "b"}), "sentences: got dict"),
    "index a set": (lambda m: CandidateIndex.build(m, set(TRIO)), "sentences: got set"),
    "one part": (
        lambda m: CandidateIndex.from_embeddings(m, (m.encode(TRIO), TRIO)),
        "parts: got ndarray",
    ),
    "texts that are a string": (
        lambda m: CandidateIndex.from_embeddings(m, [(m.encode(TRIO), "abc")]),
        "got str",
    ),
    "texts that are a set": (
        lambda m: CandidateIndex.from_embeddings(m, [(m.encode(TRIO), set(TRIO))]),
        "got set",
    ),
}


@pytest.mark.parametrize("case", MISTAKEN)
def test_what_is_not_texts_is_refused(case, student):
    call, message = MISTAKEN[case]
    with pytest.raises(TypeError) as error:
        call(student())
    assert message in str(error.value)


def test_a_table_is_refused_and_its_columns_are_not(student):
    class Table:  # iterates its columns' names, as a data frame does
        columns = ("text", "text_pair")

        def __iter__(self):
            return iter(self.columns)

    with pytest.raises(TypeError, match="sentences: got Table"):
        student().encode(Table())
    np.testing.assert_array_equal(student().encode(np.array(TRIO)), student().encode(TRIO))


def test_pairs_as_mappings(student):
    model = student()
    pairs = [(TRIO[0], TRIO[1]), (TRIO[2], TRIO[0])]
    mappings = [{"text_pair": b, "text": a} for a, b in pairs]
    np.testing.assert_array_equal(model.score(mappings), model.score(pairs))
    np.testing.assert_array_equal(model.score([mappings[0], pairs[1]]), model.score(pairs))


def test_arguments_named_as_in_sentence_transformers(student):
    model = student()
    units = model.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True)
    assert isinstance(units, torch.Tensor)
    np.testing.assert_array_equal(units.numpy(), model.encode(TEXTS, normalize=True))


def test_a_folder_in_sentence_transformers(student, tmp_path):
    """The same embeddings, of odd texts too, also after it was saved there."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, texts = student(additional_embedding_layer_size=5), [*ODD_TEXTS, "", "cars[SEP]more", "long " * 99]
    model.save_pretrained(tmp_path / "student")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "student"), trust_remote_code=True, device="cpu")
    assert loaded.get_embedding_dimension() == 5
    np.testing.assert_allclose(loaded.encode(texts), model.encode(texts), rtol=1e-5, atol=1e-6)
    prompted = loaded.encode(texts[:2], prompt="query: ")
    np.testing.assert_allclose(prompted, model.encode([f"query: {text}" for text in texts[:2]]), rtol=1e-5, atol=1e-6)
    loaded.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    np.testing.assert_array_equal(again.encode(texts), loaded.encode(texts))
