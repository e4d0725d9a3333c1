"""`python -m dse transfer`: cosines, probes and baselines in a second way, and the table that the command prints."""

import json
import logging
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_task
from scipy import sparse
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from transformers import BertModel, BertTokenizer

from dse import __main__ as entry
from dse.data.processors import Examples, read_examples
from dse.data.tasks import get_task
from dse.experiments import transfer
from dse.experiments.synthetic import vocabulary
from dse.models import DSESiameseClassifier
from dse.system.errors import InputError

PAIRS, SENTENCES, NLI = get_task("mrpc"), get_task("sst-2"), get_task("mnli")
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
@pytest.mark.parametrize("task", [PAIRS, SENTENCES, NLI], ids=lambda task: task.name)
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
    found = transfer.probe(embed, PAIRS, train, sets)
    assert found == {"dev": {"accuracy": 0.7, "f1": 0.0}, "test": {"accuracy": 0.4, "f1": 0.0}}
    # With 1 as the training set's majority: precision 6 of 10, recall 1.
    found = transfer.probe(embed, PAIRS, labelled([1] * 18 + [0] * 12), sets)
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
    found = transfer.probe(lambda texts: np.array([vectors[t] for t in texts]), SENTENCES, rows["train"],
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
    transfer.probe(embedder(vectors), SENTENCES, train, {})
    assert "sst-2, 2 features: C " in caplog.text
    assert "; 0 of the fits had not converged after 200 steps" in caplog.text
    monkeypatch.setattr(transfer, "STEPS", 1)
    transfer.probe(embedder(vectors), SENTENCES, train, {})
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


@pytest.fixture
def glue(tmp_path):
    """STS-B, MRPC with Microsoft's labelled test file, and single sentences, each of 24 rows a file.

    In MRPC, one word is in second sentences alone.
    """
    for name in ("sts-b", "mrpc", "sst-2"):
        write_task(tmp_path / "glue" / get_task(name).folder, get_task(name))
    for file in ("train.tsv", "dev.tsv"):
        path = tmp_path / "glue" / "MRPC" / file
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        path.write_text("".join("\t".join([*row[:4], f"{row[4]} indeed", *row[5:]]) + "\n" for row in rows))
    lines = (tmp_path / "glue" / "MRPC" / "dev.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "glue" / "MRPC" / "msr_paraphrase_test.txt").write_text("".join(lines[:10]))
    return tmp_path / "glue"


@pytest.fixture
def saved(student, bert, tmp_path):
    """A student's folder, which tells that its training began with `bert`, and its teacher with something else."""
    model = student()
    commands = [["finetune_bert.py", {"bert_model": "./nowhere"}], ["dse_train_runner.py", {"bert_model": str(bert)}]]
    model.origin = {"epoch": 1, "commands": commands, "logits_sha256": "of them"}
    model.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def table_of(output: str) -> dict[tuple[str, str], dict[str, str]]:
    """The printed Markdown table's cells by (task, metric) and kind."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    header, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == ["task", "metric", "DSE", "encoder as downloaded", "bag of words"]
    assert rule == ["---"] * 5
    return {(task, metric): dict(zip(header[2:], cells, strict=True)) for task, metric, *cells in rows}


def rows_of(path: Path, columns: tuple[int, ...], start: int = 1, stop: int | None = None) -> list[list[str]]:
    """Columns of a file's lines, the header being line 0."""
    lines = [line.split("\t") for line in path.read_text().splitlines()[start:stop]]
    return [[line[column] for line in lines] for column in columns]


def assert_close(found: dict, expected: dict) -> None:
    """Numbers by task, kind, split and metric, in this order of tasks and kinds."""
    assert list(found) == list(expected)
    for task, by_kind in expected.items():
        assert list(found[task]) == ["DSE", "encoder as downloaded", "bag of words"]
        for kind, by_split in by_kind.items():
            assert found[task][kind].keys() == by_split.keys()
            for split, metrics in by_split.items():
                assert found[task][kind][split] == pytest.approx(metrics, abs=1e-4)


def as_shown(found: dict) -> dict[tuple[str, str], dict[str, str]]:
    """The cells that the table should have."""
    cells: dict = {}
    for task, by_kind in found.items():
        for kind, by_split in by_kind.items():
            for split, metrics in by_split.items():
                for metric, value in metrics.items():
                    cells.setdefault((task, f"{split} {metric}"), {})[kind] = f"{value:.3f}"
    return cells


def test_the_command_prints_and_writes_what_the_functions_give(
    glue, saved, bert, tmp_path, monkeypatch, capsys, caplog
):
    batch_sizes, encode = set(), DSESiameseClassifier.encode

    def seen(model, texts, batch_size=32, **options):
        batch_sizes.add(batch_size)
        return encode(model, texts, batch_size, **options)

    monkeypatch.setattr(DSESiameseClassifier, "encode", seen)
    flags = ["transfer", "--model", str(saved), "--data_dir", str(glue), "--output", str(tmp_path / "out" / "t.json")]
    entry.main([*flags, "--max_rows", "20", "--batch_size", "5"])
    table, written = table_of(capsys.readouterr().out), json.loads((tmp_path / "out" / "t.json").read_text())
    assert batch_sizes == {5}

    # The data by hand: columns as GLUE has them, the first 20 rows for training.
    def mrpc(file: str, stop: int | None = None) -> Examples:
        labels, first, second = rows_of(glue / "MRPC" / file, (0, 3, 4), stop=stop)
        return Examples(first, second, [int(label) for label in labels])

    def sst(file: str, stop: int | None = None) -> Examples:
        first, labels = rows_of(glue / "SST-2" / file, (0, 1), stop=stop)
        return Examples(first, None, [int(label) for label in labels])

    similar = Examples(*rows_of(glue / "STS-B" / "dev.tsv", (7, 8, -1)))
    similar.labels = [float(score) for score in similar.labels]
    pairs, sentences = mrpc("train.tsv", 21), sst("train.tsv", 21)
    sets = {"dev": mrpc("dev.tsv"), "test": mrpc("msr_paraphrase_test.txt")}
    assert (len(pairs), len(sentences), len(sets["dev"]), len(sets["test"])) == (20, 20, 24, 9)

    words = {word for text in pairs.first + pairs.second for word in re.findall(r"\w+", text)}
    assert f"mrpc, {2 * len(words)} features: C " in caplog.text
    assert "mrpc: train 20, dev 24, test 9" in caplog.text

    model = DSESiameseClassifier.from_pretrained(saved)
    kinds = {"DSE": model.encode, "encoder as downloaded": transfer.encoder_embedder(bert, model)}
    expected: dict = {"STS-B": {}, "MRPC": {}, "SST-2": {}}
    for kind in table["STS-B", "dev pearson"]:
        of_sts, of_pairs, of_sentences = (
            kinds.get(kind) or transfer.bag_of_words(texts)
            for texts in (similar.first + similar.second, pairs.first + pairs.second, sentences.first)
        )
        expected["STS-B"][kind] = {"dev": transfer.cosine_correlations(of_sts, similar)}
        expected["MRPC"][kind] = transfer.probe(of_pairs, PAIRS, pairs, sets)
        expected["SST-2"][kind] = transfer.probe(of_sentences, SENTENCES, sentences, {"dev": sst("dev.tsv")})

    assert written["model"] == str(saved)
    assert (written["task"], written["max_rows"]) == ("mrpc", 20)
    assert written.keys() == {"model", "task", "max_rows", "results"}
    assert_close(written["results"], expected)
    assert table == as_shown(written["results"])
    assert list(table) == [
        ("STS-B", "dev pearson"), ("STS-B", "dev spearman"), ("MRPC", "dev accuracy"), ("MRPC", "dev f1"),
        ("MRPC", "test accuracy"), ("MRPC", "test f1"), ("SST-2", "dev accuracy"), ("SST-2", "dev f1"),
    ]  # fmt: skip
    for cells in (table["STS-B", "dev pearson"], table["MRPC", "dev accuracy"]):
        assert len(set(cells.values())) > 1, "columns that are all the same would prove little"


def test_what_has_no_correlation_is_null_in_json(student, bert, tmp_path, capsys):
    """Pairs without a common word all have cosine 0 as bags of words; JSON has no NaN."""
    sts = tmp_path / "glue" / "STS-B"
    sts.mkdir(parents=True)
    rows = [("doctor", "lamp", 1.5), ("teacher", "house", 4.0), ("the thief", "a boat", 0.5)]
    lines = ["\t".join(["x"] * 7 + [first, second, str(score)]) for first, second, score in rows]
    (sts / "dev.tsv").write_text("\n".join(["\t".join("0123456789"), *lines]) + "\n")
    student().save_pretrained(tmp_path / "student")
    entry.main(["transfer", "--model", str(tmp_path / "student"), "--data_dir", str(sts.parent),
                "--bert_model", str(bert), "--output", str(tmp_path / "t.json")])  # fmt: skip
    table = table_of(capsys.readouterr().out)
    written = json.loads((tmp_path / "t.json").read_text(), parse_constant=pytest.fail)["results"]
    assert written.keys() == {"STS-B"}
    assert written["STS-B"]["bag of words"] == {"dev": {"pearson": None, "spearman": None}}
    assert table["STS-B", "dev pearson"]["bag of words"] == "nan"
    assert -1 <= written["STS-B"]["DSE"]["dev"]["pearson"] <= 1


def test_refusals(glue, saved, student, bert, tmp_path, refused):
    student().save_pretrained(tmp_path / "silent")

    def line(**changes: object) -> str:
        flags = {"model": saved, "data_dir": glue, **changes}
        argv = ["transfer", *(word for flag, value in flags.items() for word in (f"--{flag}", value))]
        found = refused(entry.main, argv)
        assert found.startswith("python -m dse transfer: error: ")
        return found

    (tmp_path / "empty").mkdir()
    assert "--data_dir: nowhere is not a folder" in line(data_dir="nowhere")
    assert "empty has no task's train and dev files" in line(data_dir=tmp_path / "empty")
    assert "holds no student of this project" in line(model=bert)
    assert "no student: config.json is missing" in line(model=tmp_path / "empty")
    assert "no folder of a student" in line(model="./nowhere")
    assert "--bert_model: the student does not say which encoder it began with; give it" in line(
        model=tmp_path / "silent"
    )
    assert "--bert_model: there is no folder ./nowhere" in line(bert_model="./nowhere")
    assert "not a model folder: no config.json in it" in line(bert_model=tmp_path / "empty")
    assert "9 is below 10" in line(max_rows=9)
    assert "is a folder; name a file" in line(output=tmp_path)


def test_bad_data_of_any_task_is_refused_before_a_model_is_loaded(glue, tmp_path, refused):
    """Not after the tasks before it were done, whose numbers would be lost."""

    def line(*flags: str) -> str:
        return refused(entry.main, ["transfer", "--model", "./nowhere", "--data_dir", glue, *flags])

    sst = glue / "SST-2" / "train.tsv"
    header, *rows = sst.read_text().splitlines()
    rows = sorted(rows, key=lambda row: row.split("\t")[1])
    negative = sum(row.split("\t")[1] == "0" for row in rows)
    sst.write_text("\n".join([header, *rows]))
    assert negative >= 10
    assert (
        "--max_rows: the first 10 rows of SST-2's train.tsv have too few labels (10 of 0): a regression needs two"
        in line("--max_rows", "10")
    )
    assert "no folder of a student" in line("--max_rows", str(negative + 1))
    sst.write_text("\n".join([header, *rows, "the ship\tgood"]))
    assert "train.tsv, line 26: label 'good' is not one of sst-2's: 0, 1" in line()


def test_three_labels_of_too_few_rows_each_are_refused():
    """Five folds need five rows of one label at least."""
    with pytest.raises(InputError, match="4 of contradiction, 3 of entailment, 3 of neutral"):
        transfer.check_trainable(NLI, labelled([0, 1, 2] * 3 + [0]))
    transfer.check_trainable(NLI, labelled([0, 1, 2] * 3 + [0, 0]))
    transfer.probe(lambda texts: np.ones((len(texts), 2)), NLI, labelled([0, 1, 2] * 3 + [0, 0]), {})
