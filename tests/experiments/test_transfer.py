"""Cosines, probes and baselines in a second way."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MNLI, MRPC, SST_2, write_task
from scipy import sparse
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from transformers import BertModel, BertTokenizer

from dse.data.processors import Examples, read_examples
from dse.data.tasks import get_task
from dse.experiments import transfer
from dse.experiments.synthetic import vocabulary
from dse.system.errors import InputError

FORMS = {
    "dense": lambda rows: np.array(rows, np.float32),
    "sparse": lambda rows: sparse.csr_matrix(np.array(rows, np.int64)),
}


def embedder(vectors: dict[str, list[float]], form: str = "dense") -> transfer.Embedder:
    return lambda texts: FORMS[form]([vectors[text] for text in texts])


@pytest.mark.parametrize("form", FORMS)
def test_cosines_by_hand(form):
    """(3, 4) and (4, 3): 24 / 25; at right angles 0; in one direction 1; with a zero vector 0; opposite -1."""
    vectors = {"a": [3, 4], "b": [4, 3], "x": [2, 0], "y": [0, 5], "far": [7, 0], "zero": [0, 0], "back": [-1, 0]}
    rows = Examples(["a", "x", "x", "zero", "x"], ["b", "y", "far", "a", "back"], [4.0, 1.0, 5.0, 0.5, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = transfer.cosine_correlations(embedder(vectors, form), rows)
    cosines = [0.96, 0, 1, 0, -1]
    assert found["pearson"] == pytest.approx(np.corrcoef(cosines, rows.labels)[0, 1], rel=1e-6)
    # Ranks, the two zeros sharing 2 and 3.
    assert found["spearman"] == pytest.approx(np.corrcoef([4, 2.5, 5, 2.5, 1], [4, 2, 5, 1, 3])[0, 1], rel=1e-6)


def test_cosines_of_a_student(student, data):
    rows = read_examples(get_task("sts-b"), data("sts-b"), "dev")
    model = student()
    found = transfer.cosine_correlations(model.encode, rows)
    u, v = (model.encode(side).astype(np.float64) for side in (rows.first, rows.second))
    cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(u, v, strict=True)]
    assert found["pearson"] == pytest.approx(pearsonr(cosines, rows.labels)[0], abs=1e-5)
    assert found["spearman"] == pytest.approx(spearmanr(cosines, rows.labels)[0], abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_features_by_hand(form):
    embed = embedder({"a": [1, 2, 0], "b": [3, -1, 0], "c": [0, 4, 5]}, form)
    pairs = transfer.probe_features(embed, Examples(["a", "b"], ["b", "c"]))
    singles = transfer.probe_features(embed, Examples(["c", "a"], None))
    if form == "sparse":
        assert sparse.issparse(pairs)
        assert sparse.issparse(singles)
        pairs, singles = pairs.toarray(), singles.toarray()
    assert pairs.tolist() == [[2, 3, 0, 3, -2, 0], [3, 5, 5, 0, -4, 0]]
    assert singles.tolist() == [[0, 4, 5], [1, 2, 0]]


def labelled(labels: list[int], pairs: bool = True) -> Examples:
    """Rows whose texts are their numbers and labels: "3 of 1"."""
    texts = [f"{i} of {label}" for i, label in enumerate(labels)]
    return Examples(texts, [f"other {text}" for text in texts] if pairs else None, labels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", [MRPC, SST_2, MNLI], ids=lambda task: task.name)
def test_embeddings_that_tell_the_label_give_all(task, form):
    """Of pairs, both texts have their row's label's direction, so that u * v points there; train and dev share no row.

    The sparse one stands for a bag of words: 2 times the word that tells, once one that does not.
    """

    def embed(texts):
        label = [int(text.split()[-1]) for text in texts]
        return FORMS[form]([[2 * (place == of_row) for place in range(3)] + [1] for of_row in label])

    kinds = max(2, len(task.labels))
    train = labelled([row % kinds for row in range(30)], task.text_b is not None)
    dev = labelled([(row // 3) % kinds for row in range(40)], task.text_b is not None)
    binary = {"f1": 1.0} if task.kind == "binary" else {}
    assert transfer.probe(embed, task, train, {"dev": dev}) == {"dev": {"accuracy": 1.0, **binary}}


@pytest.mark.parametrize("form", FORMS)
def test_constant_embeddings_give_the_majoritys_share(form):
    def embed(texts):
        return FORMS[form]([[1, 0, 3]] * len(texts))

    train = labelled([0] * 18 + [1] * 12)
    sets = {"dev": labelled([0] * 7 + [1] * 3), "test": labelled([1] * 6 + [0] * 4)}
    found = transfer.probe(embed, MRPC, train, sets)
    assert found == {"dev": {"accuracy": 0.7, "f1": 0.0}, "test": {"accuracy": 0.4, "f1": 0.0}}
    # With 1 as the training set's majority: precision 6 of 10, recall 1.
    found = transfer.probe(embed, MRPC, labelled([1] * 18 + [0] * 12), sets)
    assert found["test"] == {"accuracy": 0.6, "f1": pytest.approx(2 * 0.6 / 1.6)}


def test_the_penalty_is_the_one_that_cross_validation_likes_best():
    """The second way: each feature to mean 0 and variance 1 on the training rows, a grid search over C."""
    rng = np.random.default_rng(1)
    labels = {split: rng.integers(0, 2, 60) for split in ("train", "dev")}
    rows, vectors = {}, {}
    for split, of_split in labels.items():
        rows[split] = labelled(of_split.tolist(), pairs=False)
        rows[split].first = [f"{split} {text}" for text in rows[split].first]
        noisy = (rng.normal(size=(60, 6)) + np.outer(of_split, [1, 0, 0, 0.5, 0, 0])) * [1, 1e3, 1e-3, 1, 50, 1] + 7
        vectors |= dict(zip(rows[split].first, noisy.astype(np.float32), strict=True))
    found = transfer.probe(lambda texts: np.array([vectors[t] for t in texts]), SST_2, rows["train"],
                           {"dev": rows["dev"]})  # fmt: skip
    train, dev = (np.array([vectors[t] for t in rows[split].first], np.float64) for split in ("train", "dev"))
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": [1e-4, 1e-3, 1e-2, 0.1, 1, 10]}, cv=5)
    search.fit((train - mean) / deviation, labels["train"])
    predicted = search.predict((dev - mean) / deviation)
    assert found["dev"]["accuracy"] == pytest.approx((predicted == labels["dev"]).mean())
    assert 0.5 < found["dev"]["accuracy"] < 1
    worst = LogisticRegression(C=1e-4).fit((train - mean) / deviation, labels["train"])
    assert search.best_params_["C"] != 1e-4
    assert (worst.predict((dev - mean) / deviation) != predicted).any(), "any penalty would do"


def test_the_log_counts_fits_that_did_not_converge_and_no_other_warnings(caplog, monkeypatch):
    """scikit-learn warns too where a label has fewer rows than there are folds."""
    caplog.set_level(logging.INFO, "dse")
    train = labelled([0] * 10 + [1] * 3, pairs=False)
    vectors = {text: [i * i % 7, i % 3] for i, text in enumerate(train.first)}
    transfer.probe(embedder(vectors), SST_2, train, {})
    assert "sst-2, 2 features: C " in caplog.text
    assert "; 0 of the fits had not converged after 200 steps" in caplog.text
    monkeypatch.setattr(transfer, "STEPS", 1)
    transfer.probe(embedder(vectors), SST_2, train, {})
    assert caplog.messages[-1].endswith("; 31 of the fits had not converged after 1 steps")  # 5 folds x 6, and the last


def mean_by_hand(folder: Path, text: str, length: int, lower_case: bool = True) -> np.ndarray:
    """The mean over [CLS], the words, whose ids are their places in the vocabulary, and [SEP]."""
    place = {word: i for i, word in enumerate(vocabulary())}
    words = (text.lower() if lower_case else text).split()[: length - 2]
    ids = [place["[CLS]"], *(place.get(word, place["[UNK]"]) for word in words), place["[SEP]"]]
    with torch.inference_mode():
        states = BertModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state
    return states[0].mean(dim=0).numpy()


TEXTS = ["The doctor bought a CAR .", "ship", "", "the doctor sold a lamp in the forest " * 12]


def test_the_encoder_as_downloaded_is_the_mean_over_all_its_tokens(bert, student):
    embeddings = transfer.encoder_embedder(bert, student())(TEXTS)
    assert embeddings.shape == (4, 32)
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        np.testing.assert_allclose(embedding, mean_by_hand(bert, text, 32), rtol=1e-4, atol=1e-5)


def test_another_encoder_has_its_own_casing_and_positions(bert, student, copied):
    """Here a cased one, for a student that is uncased and takes longer texts than it has positions."""
    folder = copied(bert)
    BertTokenizer.from_pretrained(bert, do_lower_case=False).save_pretrained(folder)
    model = student()
    model.max_seq_length = 90
    embeddings = transfer.encoder_embedder(folder, model)(TEXTS)
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        np.testing.assert_allclose(embedding, mean_by_hand(bert, text, 64, lower_case=False), rtol=1e-4, atol=1e-5)


def test_the_bag_counts_the_words_of_its_training_texts():
    embed = transfer.bag_of_words(["a dog , a cat", "I saw 2 dogs !"])
    counts = embed(["A dog and a dog", "", "2 cats"])
    assert sparse.issparse(counts)
    #                            2  a  cat dog dogs i saw
    assert counts.toarray().tolist() == [[0, 2, 0, 2, 0, 0, 0], [0] * 7, [1, 0, 0, 0, 0, 0, 0]]


def test_tasks_at_hand(tmp_path, caplog):
    """Those with train and dev, STS-B first, which needs dev alone; no test set alone, and MNLI once."""
    assert transfer.tasks_at_hand(tmp_path) == []
    for name in ("sst-2", "mrpc", "rte", "qnli", "mnli", "snli", "sts-b"):
        write_task(tmp_path / get_task(name).folder, get_task(name), rows=1)
    for file in ("RTE/train.tsv", "QNLI/dev.tsv"):
        (tmp_path / file).unlink()
    (tmp_path / "diagnostic").mkdir()
    (tmp_path / "diagnostic" / "diagnostic.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n")
    assert [task.name for task in transfer.tasks_at_hand(tmp_path)] == ["sts-b", "mrpc", "mnli", "snli", "sst-2"]
    (tmp_path / "STS-B" / "train.tsv").unlink()  # which cosines do not need
    assert transfer.tasks_at_hand(tmp_path)[0] == get_task("sts-b")
    caplog.clear()
    (tmp_path / "STS-B" / "dev.tsv").unlink()
    assert [task.name for task in transfer.tasks_at_hand(tmp_path)] == ["mrpc", "mnli", "snli", "sst-2"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder} is left out: {file} is not in {tmp_path / folder}"
        for folder, file in (("STS-B", "dev.tsv"), ("QNLI", "dev.tsv"), ("RTE", "train.tsv"))
    ]


def test_the_first_rows():
    rows = labelled([0, 1, 1])
    some = transfer.first_rows(rows, 2)
    assert (some.first, some.second, some.labels) == (rows.first[:2], rows.second[:2], [0, 1])
    assert transfer.first_rows(labelled([0, 1], pairs=False), 9).labels == [0, 1]


def test_three_labels_of_too_few_rows_each_are_refused():
    """Five folds need five rows of one label at least."""
    with pytest.raises(InputError, match="4 of contradiction, 3 of entailment, 3 of neutral"):
        transfer.check_trainable(MNLI, labelled([0, 1, 2] * 3 + [0]))
    transfer.check_trainable(MNLI, labelled([0, 1, 2] * 3 + [0, 0]))
    transfer.probe(lambda texts: np.ones((len(texts), 2)), MNLI, labelled([0, 1, 2] * 3 + [0, 0]), {})
