"""`python -m dse predict`: every task's file as GLUE's leaderboard takes it, with the model's own answers in it."""

import json
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import OWN_TASK, TRIO, as_flags
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import finetune_bert
from dse import __main__ as entry
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.experiments.synthetic import make_pair, vocabulary
from dse.networks.teacher import load_teacher
from dse.system.errors import InputError

# The leaderboard's name of the file, the labels that it takes, the test file and its columns; * marks the texts.
ZERO_ONE, TWO_WAY = ("0", "1"), ("entailment", "not_entailment")


THREE_WAY = ("entailment", "neutral", "contradiction")


_MNLI = "index promptID pairID genre binary1 binary2 parse1 parse2 *sentence1 *sentence2"


GLUE = {
    "cola": ("CoLA", ZERO_ONE, "test.tsv", "index *sentence"),
    "sst-2": ("SST-2", ZERO_ONE, "test.tsv", "index *sentence"),
    "mrpc": ("MRPC", ZERO_ONE, "test.tsv", "index #1ID #2ID *#1String *#2String"),
    "qqp": ("QQP", ZERO_ONE, "test.tsv", "id *question1 *question2"),
    "sts-b": ("STS-B", None, "test.tsv",
              "index genre filename year old_index source1 source2 *sentence1 *sentence2"),
    "mnli": ("MNLI-m", THREE_WAY, "test_matched.tsv", _MNLI),
    "mnli-mm": ("MNLI-mm", THREE_WAY, "test_mismatched.tsv", _MNLI),
    "qnli": ("QNLI", TWO_WAY, "test.tsv", "index *question *sentence"),
    "rte": ("RTE", TWO_WAY, "test.tsv", "index *sentence1 *sentence2"),
    "wnli": ("WNLI", ZERO_ONE, "test.tsv", "index *sentence1 *sentence2"),
    "diagnostic": ("AX", THREE_WAY, "diagnostic.tsv", "index *sentence1 *sentence2"),
}  # fmt: skip


SINGLE = ("cola", "sst-2")


PAIRS = [make_pair(random.Random(seed))[1:] for seed in range(24)]


PAIRS[3] = (" ".join([PAIRS[3][0]] * 6), " ".join([PAIRS[3][1]] * 5))  # more tokens than the tiny BERT has positions


def write_test_set(folder: Path, name: str, texts: list[tuple[str, ...]] = PAIRS) -> Path:
    """A task's test file; cells that no model should read hold a row of other words."""
    _, _, file, layout = GLUE[name]
    columns = layout.split()
    lines = ["\t".join(columns).replace("*", "")]
    for index, row in enumerate(texts):
        left = iter(row)
        lines.append("\t".join(next(left) if c[0] == "*" else f"thief {index} never" for c in columns))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def check_leaderboard_file(path: Path, name: str, rows: int) -> list[str]:
    """The predictions of a file, after checking all that the leaderboard asks of its form."""
    file_name, labels, _, _ = GLUE[name]
    assert path.name == f"{file_name}.tsv"
    content = path.read_bytes()
    assert b"\r" not in content
    header, *lines, end = content.decode("ascii").split("\n")
    assert header == "index\tprediction"
    assert end == "", "the last line has no end"
    cells = [line.split("\t") for line in lines]
    assert all(len(row) == 2 for row in cells)
    assert [index for index, _ in cells] == [str(index) for index in range(rows)]
    predictions = [prediction for _, prediction in cells]
    if labels is None:
        assert all(re.fullmatch(r"\d(\.\d+)?", score) and 0 <= float(score) <= 5 for score in predictions)
    else:
        assert set(predictions) <= set(labels)
    return predictions


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("mrpc", "mrpc.tsv", "index\tprediction\n0\t1\n1\t0\n"),
        ("mrpc", "MRPC.tsv", "index\tprediction\r\n0\t1\r\n1\t0\r\n"),
        ("mrpc", "MRPC.tsv", "index\tprediction\n0\t1\n1\t0"),
        ("mrpc", "MRPC.tsv", "index\tprediction\n0\t1\n1\t0\n\n"),
        ("mrpc", "MRPC.tsv", "id\tprediction\n0\t1\n1\t0\n"),
        ("mrpc", "MRPC.tsv", "0\t1\n1\t0\n"),
        ("mrpc", "MRPC.tsv", "index\tprediction\n1\t1\n2\t0\n"),
        ("mrpc", "MRPC.tsv", "index\tprediction\n0\t1\n"),
        ("mrpc", "MRPC.tsv", "index\tprediction\n0\t1\n1\t0\n2\t0\n"),
        ("mrpc", "MRPC.tsv", "index\tprediction\n0\t1\n1\tentailment\n"),
        ("mrpc", "MRPC.tsv", "index\tprediction\n0\t1\n1\t0\t0\n"),
        ("rte", "RTE.tsv", "index\tprediction\n0\tentailment\n1\tneutral\n"),
        ("sts-b", "STS-B.tsv", "index\tprediction\n0\t1.5\n1\t5.1\n"),
        ("sts-b", "STS-B.tsv", "index\tprediction\n0\t1.5\n1\tnan\n"),
    ],
)
def test_the_check_sees_each_fault(tmp_path, name, file, content):
    (tmp_path / file).write_bytes(content.encode())
    with pytest.raises(AssertionError):
        check_leaderboard_file(tmp_path / file, name, 2)


def ids_by_hand(texts: tuple[str, ...], length: int, lower_case: bool) -> tuple[list[int], list[int]]:
    """Token ids and types of a row; each word of the made-up sentences is an entry of the vocabulary."""
    place = {word: i for i, word in enumerate(vocabulary())}
    words = [(text.lower() if lower_case else text).split() for text in texts]
    while sum(map(len, words)) > length - 1 - len(words):  # the longer one loses its last word, on a tie the second
        (words[0] if len(words) == 1 or len(words[0]) > len(words[1]) else words[1]).pop()
    ids, types = [place["[CLS]"]], [0]
    for kind, side in enumerate(words):
        ids += [*(place.get(word, place["[UNK]"]) for word in side), place["[SEP]"]]
        types += [kind] * (len(side) + 1)
    return ids, types


def logits_by_hand(model, texts: list[tuple[str, ...]], length: int = 64, lower_case: bool = True) -> np.ndarray:
    """A teacher's logits, all rows padded to one length, through transformers alone."""
    rows = [ids_by_hand(row, length, lower_case) for row in texts]
    longest = max(len(ids) for ids, _ in rows)
    ids, types, mask = (
        torch.tensor([[*row, *[0] * (longest - len(row))] for row in part])
        for part in ([r[0] for r in rows], [r[1] for r in rows], [[1] * len(r[0]) for r in rows])
    )
    with torch.inference_mode():
        return model.eval()(input_ids=ids, token_type_ids=types, attention_mask=mask).logits.numpy()


def texts_of(name: str) -> list[tuple[str, ...]]:
    return [pair[:1] for pair in PAIRS] if name in SINGLE else PAIRS


@pytest.fixture(scope="module")
def teacher(bert, tmp_path_factory):
    """A function from a task's name to the folder of a teacher as transformers alone would save it, made once."""
    folder = tmp_path_factory.mktemp("teachers")

    def folder_of(name: str) -> Path:
        if not (folder / name).exists():
            task = get_task(name)
            torch.manual_seed(5)
            load_teacher(bert, task, fine_tuned=False).save_pretrained(folder / name)
            model = BertForSequenceClassification.from_pretrained(folder / name)
            with torch.no_grad():  # answers spread over all labels, scores beyond 0 and 5
                logits = torch.from_numpy(logits_by_hand(model, texts_of(name)))
                spread = 3 / logits.std(dim=0)
                model.classifier.weight *= spread[:, None]
                model.classifier.bias -= logits.quantile(0.5, dim=0) * spread  # between two rows: none is on the edge
                if task.num_logits == 1:
                    model.classifier.bias += 2.5
            model.save_pretrained(folder / name)
            load_tokenizer(bert, True, "bert").save_pretrained(folder / name)
        return folder / name

    return folder_of


@pytest.fixture
def spread_student(student):
    """A function that makes an untrained student: its answers on PAIRS have all labels, its scores leave 0 to 5."""

    def make(name: str = "mrpc"):
        model = student(name)
        scores = torch.from_numpy(model.score(PAIRS)).view(len(PAIRS), -1)
        last = model.network.siamese_head.fc_layers[-1]
        with torch.no_grad():
            spread = 3 / scores.std(dim=0)
            last.bias.copy_((last.bias - scores.quantile(0.5, dim=0)) * spread)
            last.weight *= spread[:, None]
            if model.task.kind == "regression":
                last.bias += 2.5
        return model

    return make


@pytest.fixture
def run(tmp_path):
    """A function that predicts with a model and gives the file."""

    def run(model: Path, name: str, data: Path, *flags: object) -> Path:
        folder = tmp_path / "predictions"
        entry.main([
            "predict", "--model", str(model), "--task_name", name, "--data_dir", str(data), "--output_dir", str(folder),
            *map(str, flags),
        ])  # fmt: skip
        (path,) = folder.iterdir()
        return path

    return run


def check_scores(predictions: list[str], raw: np.ndarray) -> None:
    """Scores to three decimals, brought to 0 to 5."""
    assert raw.min() < 0
    assert raw.max() > 5
    assert np.sum((raw > 0) & (raw < 5)) > 5
    expected = [min(max(float(score), 0.0), 5.0) for score in raw]
    assert [float(score) for score in predictions] == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("name", GLUE)
def test_a_teacher_predicts_every_task(name, teacher, run, tmp_path):
    texts = texts_of(name)
    path = run(teacher(name), name, write_test_set(tmp_path / "data", name, texts))
    predictions = check_leaderboard_file(path, name, len(texts))
    logits = logits_by_hand(BertForSequenceClassification.from_pretrained(teacher(name)), texts)
    if name == "sts-b":
        check_scores(predictions, logits[:, 0])
        return
    names = json.loads((teacher(name) / "config.json").read_text())["id2label"]
    assert predictions == [names[str(best)] for best in logits.argmax(axis=1)]
    assert set(predictions) == set(GLUE[name][1]), "rows of one label would prove little"


@pytest.mark.parametrize("name", [name for name in GLUE if name not in SINGLE])
def test_a_student_predicts_every_task_of_pairs(name, spread_student, run, tmp_path, caplog):
    own = name if name not in ("mnli-mm", "diagnostic") else "mnli"  # as one would answer all three
    model = spread_student(own)
    model.save_pretrained(tmp_path / "student")
    path = run(tmp_path / "student", name, write_test_set(tmp_path / "data", name))
    predictions = check_leaderboard_file(path, name, len(PAIRS))
    expected = model.predict(PAIRS)
    if name == "sts-b":
        check_scores(predictions, expected)
        return
    assert predictions == expected
    assert set(predictions) == set(GLUE[name][1])
    assert (f"a student of mnli is used for {name}" in caplog.text) == (own != name)


def test_a_trained_teachers_length_and_casing_are_those_of_its_training(teacher_flags, run, tmp_path):
    """Without training.json its tokenizer still tells the casing, and the length is what its positions allow."""
    texts = [tuple(text.title() if row % 2 else text for text in pair) for row, pair in enumerate(PAIRS)]
    finetune_bert.main(teacher_flags("rte", do_lower_case=None, max_seq_length=20, do_eval=None))
    data, folder = write_test_set(tmp_path / "data", "rte", texts), tmp_path / "teacher"
    model = BertForSequenceClassification.from_pretrained(folder)

    def probability(length: int, lower_case: bool) -> np.ndarray:
        logits = logits_by_hand(model, texts, length, lower_case).astype(np.float64)
        return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))

    def check(right: np.ndarray, wrong: np.ndarray) -> None:
        """At a threshold between what two ways give the row that they differ most in."""
        row = np.abs(right - wrong).argmax()
        assert abs(right[row] - wrong[row]) > 1e-3
        threshold = (right[row] + wrong[row]) / 2
        predictions = check_leaderboard_file(run(folder, "rte", data, "--threshold", threshold), "rte", len(texts))
        assert predictions == ["not_entailment" if p > threshold else "entailment" for p in right]

    check(probability(20, False), probability(64, False))
    check(probability(20, False), probability(20, True))
    (folder / "training.json").unlink()
    check(probability(64, False), probability(20, False))
    check(probability(64, False), probability(64, True))


@pytest.mark.parametrize("threshold", [0.2, 0.9])
def test_the_threshold(threshold, teacher, spread_student, run, tmp_path):
    data = write_test_set(tmp_path / "data", "qqp")
    logits = logits_by_hand(BertForSequenceClassification.from_pretrained(teacher("qqp")), PAIRS)
    probability = np.exp(logits[:, 1]) / np.exp(logits).sum(axis=1)
    predictions = check_leaderboard_file(run(teacher("qqp"), "qqp", data, "--threshold", threshold), "qqp", len(PAIRS))
    assert predictions == ["1" if p > threshold else "0" for p in probability]
    assert predictions != ["1" if p > 0.5 else "0" for p in probability]

    model = spread_student("qqp")
    model.save_pretrained(tmp_path / "student")
    path = run(tmp_path / "student", "qqp", data, "--threshold", threshold)
    predictions = check_leaderboard_file(path, "qqp", len(PAIRS))
    assert predictions == model.predict(PAIRS, threshold=threshold)
    assert predictions != model.predict(PAIRS)


def test_quotes_and_strange_line_ends_do_not_shift_rows(spread_student, run, tmp_path):
    """Only \\n, \\r\\n and \\r end a line, and a quote is a letter like others."""
    first = PAIRS[0][0]
    strange = [(f'"{first}', first), (first, f'{first}"'), (f"the\u2028{first}", f"a\x85\x0b\x0c{first}"), ("", first)]
    pairs = [pair for two in zip(PAIRS, strange * 6, strict=True) for pair in two]
    model = spread_student()
    model.save_pretrained(tmp_path / "student")
    path = run(tmp_path / "student", "mrpc", write_test_set(tmp_path / "data", "mrpc", pairs))
    predictions = check_leaderboard_file(path, "mrpc", len(pairs))
    assert predictions == model.predict(pairs)
    assert predictions[::2] == model.predict(PAIRS)


def test_an_own_task(spread_student, run, tmp_path):
    """Its test file's columns are found by name, and the file has the task's name."""
    line = {
        "kind": "binary", "labels": ["different", "same"], "text_a": "left", "text_b": "right", "label": "verdict",
        "test": "unseen.tsv", "test_text_a": "b", "test_text_b": "a",
    }  # fmt: skip
    (tmp_path / "news.json").write_text(json.dumps(line))
    rows = [f"{second}\tthe\t{first}" for first, second in PAIRS]
    (tmp_path / "unseen.tsv").write_text("\n".join(["a\tother\tb", *rows]))  # the last line needs no end
    model = spread_student(str(tmp_path / "news.json"))
    model.save_pretrained(tmp_path / "student")
    path = run(tmp_path / "student", str(tmp_path / "news.json"), tmp_path)
    assert path.name == "news.tsv"
    header, *lines = path.read_text().splitlines()
    assert header == "index\tprediction"
    assert lines == [f"{row}\t{label}" for row, label in enumerate(model.predict(PAIRS))]
    assert {line.split("\t")[1] for line in lines} == {"different", "same"}


@pytest.fixture
def refusal(refused, student, tmp_path):
    """A function to the one line with which `predict` refuses; a file from before stays as it was, alone."""
    student().save_pretrained(tmp_path / "student")

    def line_of(name: str, **changes: object) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        there = folder / f"{GLUE.get(name, [name])[0]}.tsv"
        there.write_text("of last week")
        data = tmp_path / "data" / name
        if name in GLUE and not data.exists():
            write_test_set(data, name, texts_of(name))
        flags = {"model": tmp_path / "student", "task_name": name, "data_dir": data, "output_dir": folder, **changes}
        line = refused(
            entry.main, ["predict", *(word for flag, value in flags.items() for word in (f"--{flag}", value))]
        )
        assert line.startswith("python -m dse predict: error: ")
        assert list(folder.iterdir()) == [there]
        assert there.read_text() == "of last week"
        return line

    return line_of


def test_a_short_row_is_refused_for_skipping_it_would_shift_the_others(refusal, tmp_path):
    """In training rows of QQP that are too short are skipped."""
    path = write_test_set(tmp_path / "data" / "qqp", "qqp") / "test.tsv"
    lines = path.read_text().split("\n")
    lines[4] = "3\tonly one question"
    path.write_text("\n".join(lines))
    assert "test.tsv, line 5: at least 3 columns expected, found 2: '3\\tonly one question'" in refusal("qqp")


def test_models_of_other_tasks_are_refused(refusal, teacher, bert):
    assert "--task_name: cola has one sentence per row, but DSE scores pairs" in refusal("cola")
    line = refusal("mnli")
    assert "a student of mrpc (binary, ['0', '1'])" in line
    assert "mnli (multiclass, ['contradiction', 'entailment', 'neutral'])" in line
    line = refusal("rte")
    assert "['0', '1']" in line
    assert "['entailment', 'not_entailment']" in line
    assert "its labels in order are ['0', '1'], but those of rte are ['entailment', 'not_entailment']" in refusal(
        "rte", model=teacher("mrpc")
    )
    assert "gives 2 logits, but mnli needs 3" in refusal("mnli", model=teacher("mrpc"))
    assert "gives the scores of sts-b, a regression, and not logits of rte" in refusal("rte", model=teacher("sts-b"))
    assert "not a fine-tuned teacher: classifier.bias, classifier.weight missing" in refusal("rte", model=bert)


def test_a_student_that_gives_nan_is_refused(refusal, student, tmp_path):
    """Its labels would mean nothing, and the leaderboard takes no `nan` as a score."""
    for name in ("mrpc", "mnli", "sts-b"):
        model = student(name)
        with torch.no_grad():
            model.network.siamese_head.fc_layers[-1].bias[0] = torch.nan
        model.save_pretrained(tmp_path / name)
        assert f"--model: its outputs on {name} are NaN or infinite" in refusal(name, model=tmp_path / name)
        for use, texts in ((model.predict, ([TRIO[:2]],)), (model.rank, ("a query", TRIO))):
            with pytest.raises(InputError, match="scores are NaN or infinite"):
                use(*texts)


def test_a_teacher_that_gives_nan_is_refused(refusal, teacher, copied):
    folder = copied(teacher("mrpc"))
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "--model: its outputs on mrpc are NaN or infinite" in refusal("mrpc", model=folder)


def test_other_refusals(refusal, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "mine.json").write_text('{"kind": "regression", "text_a": 0, "text_b": 1, "label": 2}')
    assert "--model: " in (line := refusal("mrpc", model=empty))
    assert "not a model folder: no config.json in it" in line
    assert "is not a local folder, and the hub did not provide a student" in refusal("mrpc", model="./nowhere")
    assert "test.tsv: cannot read the data of mrpc (No such file or directory)" in refusal("mrpc", data_dir=empty)
    assert "nowhere is not a folder" in refusal("mrpc", data_dir="nowhere")
    assert "1.5 is outside (0, 1)" in refusal("mrpc", threshold=1.5)
    assert "--threshold: is for binary tasks, and sts-b is regression" in refusal("sts-b", threshold=0.3)
    assert "--threshold: is for binary tasks, and mnli is multiclass" in refusal("mnli", threshold=0.3)
    folder = tmp_path / "predictions"
    (folder / "MRPC.tsv").mkdir(parents=True)
    assert "MRPC.tsv is a folder" in refusal("mrpc", output_dir=folder)
    assert "--output_dir: cannot write in" in refusal("mrpc", output_dir=tmp_path / "mine.json")
    (tmp_path / "faq.json").write_text(
        '{"kind": "regression", "text_a": 0, "text_b": 1, "label": 2, "test": "faq.tsv"}'
    )
    (tmp_path / "faq.tsv").write_text("a\tb\nmine\tyours\n")
    same = {"task_name": tmp_path / "faq.json", "data_dir": tmp_path, "output_dir": tmp_path}
    assert "faq.tsv is an input of this command" in refusal("mine", **same)
    assert "--task_name: allnli has no test file to predict" in refusal("allnli")
    assert "--task_name: mine has no test file to predict" in refusal("mine", task_name=tmp_path / "mine.json")


def test_predict_takes_the_students_threshold(student, tmp_path):
    """One pair of probability p; the stored threshold and the flag lie a little below or above it."""
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "test.tsv").write_text(
        f"index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\t{TRIO[0]}\t{TRIO[1]}\n"
    )
    model = student()
    p = 1 / (1 + np.exp(-float(model.score([TRIO[:2]])[0])))
    for stored, flag, expected in (
        (p - 1e-3, None, 1),
        (p + 1e-3, None, 0),
        (p + 1e-3, p - 1e-3, 1),
        (0.5, p + 1e-3, 0),
    ):
        model.threshold = float(stored)
        model.save_pretrained(tmp_path / "student")
        assert model.predict([TRIO[:2]], threshold=flag) == [str(expected)]
        entry.main(["predict", "--model", str(tmp_path / "student"), "--task_name", "mrpc", "--data_dir",
                    str(tmp_path / "glue"), "--output_dir", str(tmp_path), *as_flags({"threshold": flag})])  # fmt: skip
        assert (tmp_path / "MRPC.tsv").read_text() == f"index\tprediction\n0\t{expected}\n"


def test_predict_tells_how_far_it_agrees_with_labels_that_are_there(student, tmp_path, caplog):
    """A student whose one logit is high for every pair, against a test file that says `match` three times of four."""
    (tmp_path / "own.json").write_text(json.dumps(OWN_TASK))
    model = student("rte")
    model.task = get_task(str(tmp_path / "own.json"))
    with torch.no_grad():
        model.network.siamese_head.fc_layers[-1].bias.fill_(9.0)
    model.save_pretrained(tmp_path / "student")
    (tmp_path / "own.json").write_text(json.dumps({**OWN_TASK, "test_label": "verdict"}))
    rows = "".join(f"{i}\tleft one\tright one\t{'other' if i == 2 else 'match'}\n" for i in range(4))
    (tmp_path / "test.tsv").write_text("index\tleft\tright\tverdict\n" + rows)
    entry.main(["predict", "--model", str(tmp_path / "student"), "--task_name", str(tmp_path / "own.json"),
                "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])  # fmt: skip
    assert "the model agrees with the file's labels in 25.0 % of 4 rows" in caplog.text
    assert "less than the most frequent label does (75.0 %)" in caplog.text


def test_scores_and_ids_of_the_users_file(student, tmp_path):
    """In which a tab becomes a space."""
    lines = ["left,right,sku,verdict", *(f'"{a}","{b}",s\t{row},' for row, (a, b) in enumerate(PAIRS[:5]))]
    (tmp_path / "test.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "own.json").write_text(json.dumps({**OWN_TASK, "test": "test.csv"}))
    model = student()
    model.task = get_task(str(tmp_path / "own.json"))
    model.save_pretrained(tmp_path / "student")
    flags = {"model": tmp_path / "student", "task_name": tmp_path / "own.json", "data_dir": tmp_path}
    flags |= {"output_dir": tmp_path / "out", "scores": True, "id_column": "sku"}
    entry.main(["predict", *as_flags(flags)])
    header, *rows = [line.split("\t") for line in (tmp_path / "out" / "own.tsv").read_text().splitlines()]
    assert header == ["index", "prediction", "score"]
    assert [row[0] for row in rows] == [f"s {row}" for row in range(5)]
    np.testing.assert_allclose([float(row[2]) for row in rows], -model.score(PAIRS[:5]), rtol=1e-5)  # of "match"
    assert [row[1] for row in rows] == model.predict(PAIRS[:5])
