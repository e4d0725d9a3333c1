"""Folders of students: what is written, loaded, refused; the commands that make and use them."""

import io
import json
import os
import random
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import as_flags
from huggingface_hub import hub_mixin
from processes import ended, start

import dse_train_runner
import load_dse_checkpoint_example
from dse import __main__ as entry
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.experiments.synthetic import make_pair
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier
from dse.storage.checkpoint import Checkpoint
from dse.storage.student_folder import command_line, fingerprint
from dse.system.errors import InputError
from dse.system.files import sha256_json

ROOT = Path(__file__).parents[1]
TEXTS = [text for seed in range(4) for text in make_pair(random.Random(seed))[1:]]
PAIRS = list(zip(TEXTS[::2], TEXTS[1::2], strict=True))


@pytest.mark.parametrize("task", ["snli", "sts-b"])
def test_saved_and_loaded_is_the_same(student, task, tmp_path):
    model = student(task, pooler_type="cls", additional_embedding_layer_size=5)
    model.save_pretrained(tmp_path / "a" / "student")
    again = DSESiameseClassifier.from_pretrained(tmp_path / "a" / "student")
    before, after = model.network.state_dict(), again.network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert (again.task, again.max_seq_length) == (get_task(task), 32)
    assert not again.network.training
    np.testing.assert_array_equal(again.score(PAIRS), model.score(PAIRS))
    again.save_pretrained(tmp_path / "a" / "student")  # over itself
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["student"]
    config = json.loads((tmp_path / "a" / "student" / "config.json").read_text())
    assert config["labels"] == list(get_task(task).labels)
    assert (config["max_seq_length"], config["do_lower_case"]) == (32, True)
    assert config["score_name"] == ("accuracy" if task == "snli" else "pearson")


def encode_and_score(folder: str, out: str, threads: int) -> None:
    torch.set_num_threads(threads)  # which decide the last bits
    model = DSESiameseClassifier.from_pretrained(folder)
    np.savez(out, model.encode(TEXTS), model.score(PAIRS))


def test_a_new_process_gives_the_same_bits(student, tmp_path):
    model, out, log = student(), tmp_path / "out.npz", tmp_path / "log"
    model.save_pretrained(tmp_path / "student")
    ended(start(encode_and_score, str(tmp_path / "student"), str(out), torch.get_num_threads(), log=log), log)
    embeddings, scores = np.load(out).values()
    np.testing.assert_array_equal(embeddings, model.encode(TEXTS))
    np.testing.assert_array_equal(scores, model.score(PAIRS))


def test_the_runner_leaves_the_best_epoch_and_export_makes_the_same(student_flags, checkpoints, tmp_path):
    dse_train_runner.main(student_flags(epochs=4, lr=3e-3))
    best = checkpoints()[-1].parent / Checkpoint.read(checkpoints()[-1]).best["file"]
    entry.main(["export", "--trainer_checkpoint", str(best), "--output", str(tmp_path / "exported")])
    for name in ("config.json", "README.md", "model.safetensors", "tokenizer.json"):
        assert (best.parent / "best" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes(), name
    model = DSESiameseClassifier.from_pretrained(best.parent / "best")
    np.testing.assert_array_equal(model.score(PAIRS), DSESiameseClassifier.from_checkpoint(best).score(PAIRS))
    card = (best.parent / "best" / "README.md").read_text()
    record = Checkpoint.read(best).trainer["history"][-1]
    assert f"epoch {record['epoch']}" in card
    assert f"| f1_0.5 | {record['validation']['f1_0.5']:.4f} |" in card
    assert "--lr 0.003" in card


def test_the_cards_command_is_the_runs(student_flags):
    """Its words, parsed, give the flags again."""
    args = dse_train_runner.parse_arguments(student_flags(fp16=True, file_log=True))
    words = command_line("dse_train_runner.py", {"task_name": "mrpc", **dse_train_runner.run_flags(args)}).split()
    assert words[:2] == ["python", "dse_train_runner.py"]
    assert dse_train_runner.parse_arguments(words[2:]) == args


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


def test_spoiled_folders_are_refused(student, tmp_path, copied, edit_json):
    student().save_pretrained(tmp_path / "student")

    def refusal(spoil, name):
        folder = copied(tmp_path / "student", name)
        spoil(folder)
        with pytest.raises(InputError) as error:
            DSESiameseClassifier.from_pretrained(folder)
        return str(error.value)

    def rewrite_config(folder, **changes):
        """As a program that saves nonsense would, with a hash that fits."""
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        del config["sha256"]
        (folder / "config.json").write_text(json.dumps({**config, "sha256": sha256_json(config)}))

    def flip(name, place=-1):
        def spoil(folder):
            content = bytearray((folder / name).read_bytes())
            content[place] ^= 1
            (folder / name).write_bytes(content)

        return spoil

    assert "spoiled" in refusal(flip("model.safetensors"), "a")
    assert "is missing" in refusal(lambda folder: (folder / "model.safetensors").unlink(), "b")
    assert "config.json is missing" in refusal(lambda folder: (folder / "config.json").unlink(), "c")
    assert "holds no student" in refusal(lambda folder: edit_json(folder / "config.json", format=None), "d")
    assert "version 3" in refusal(lambda folder: edit_json(folder / "config.json", version=3), "e")
    assert "spoiled or changed" in refusal(lambda folder: edit_json(folder / "config.json", task=None), "f")
    assert "spoiled or changed" in refusal(lambda folder: edit_json(folder / "config.json", max_seq_length=31), "g")
    assert "do not fit" in refusal(lambda folder: rewrite_config(folder, architecture={}), "k")
    assert "do not fit" in refusal(lambda folder: rewrite_config(folder, task="x"), "l")
    assert "tokenizer" in refusal(lambda folder: (folder / "tokenizer.json").write_text("{}"), "h")
    text = (tmp_path / "student" / "tokenizer.json").read_text().replace('"doctor"', '"doktor"')
    assert "not the one" in refusal(lambda folder: (folder / "tokenizer.json").write_text(text), "i")
    assert "valid JSON" in refusal(flip("config.json", 0), "j")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(InputError, match="no folder of a student"):
        DSESiameseClassifier.from_pretrained(name)


def test_other_folders_are_not_replaced(student, tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="holds other files"):
        student().save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years"
    (tmp_path / "config.json").write_text('{"format": "mine"}')
    (tmp_path / "thesis.txt").unlink()
    with pytest.raises(InputError, match=r"holds other files \(config\.json\)"):
        student().save_pretrained(tmp_path)
    student().save_pretrained(tmp_path / "mine")
    student().save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("years")
    with pytest.raises(InputError, match=r"holds other files \(notes\.txt\)"):
        student().save_pretrained(tmp_path / "mine")


def test_every_file_of_a_saved_student_has_a_new_files_rights(student, tmp_path):
    student().save_pretrained(tmp_path / "student")
    (tmp_path / "new").write_text("")
    rights = {path.stat().st_mode for path in (tmp_path / "student").iterdir()}
    assert rights == {(tmp_path / "new").stat().st_mode}


@pytest.fixture
def saved(student, tmp_path):
    """A student's folder."""
    student().save_pretrained(tmp_path / "student")
    return str(tmp_path / "student")


def run_score(*flags: object) -> None:
    entry.main(["score", *map(str, flags)])


def test_index_and_score_commands(saved, tmp_path, capsys):
    (tmp_path / "candidates.txt").write_text("\n".join(TEXTS[:5]))
    (tmp_path / "more.txt").write_text("\n".join(TEXTS[5:]) + "\n")
    (tmp_path / "queries.txt").write_text("\n".join(TEXTS[:2]) + "\n")
    base = ("index", "--model", saved, "--output", str(tmp_path / "index"))
    entry.main([*base, "--candidates", str(tmp_path / "candidates.txt")])
    entry.main([*base, "--candidates", str(tmp_path / "more.txt"), "--append"])
    (tmp_path / "all.txt").write_text("\n".join(TEXTS))
    flags = ("--model", saved, "--queries", tmp_path / "queries.txt", "--top_k", 3)
    run_score(*flags, "--candidates", tmp_path / "index", "--output", tmp_path / "hits.jsonl")
    run_score(*flags, "--candidates", tmp_path / "all.txt", "--output", tmp_path / "hits.tsv")
    capsys.readouterr()
    run_score(*flags, "--candidates", tmp_path / "index", "--format", "jsonl")
    lines = [json.loads(line) for line in (tmp_path / "hits.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    model = DSESiameseClassifier.from_pretrained(saved)
    expected = [
        {"query_row": i, "query": query, "rank": rank, "row": row, "score": score, "candidate": TEXTS[row]}
        for i, query in enumerate(TEXTS[:2])
        for rank, (score, row) in enumerate(
            sorted(((s, r) for r, s in enumerate(model.score([(query, t) for t in TEXTS]))), reverse=True)[:3], 1
        )
    ]
    for line, wanted in zip(lines, expected, strict=True):
        assert line == {**wanted, "score": pytest.approx(wanted["score"], rel=1e-4)}
    header, *rows = [line.split("\t") for line in (tmp_path / "hits.tsv").read_text().splitlines()]
    assert header == list(expected[0])
    assert [[int(row[0]), row[1], int(row[2]), int(row[3]), row[5]] for row in rows] == [
        [line[key] for key in ("query_row", "query", "rank", "row", "candidate")] for line in lines
    ]


def test_strange_lines(saved, tmp_path, monkeypatch, refused, caplog):
    """Empty lines are texts, long ones are cut, a tab becomes a space in TSV, the last line needs no end."""
    lines = ["", TEXTS[0], "a\tb", "x" * 100_000, "word " * 20_000, "\ufeffmark", "ends\u2028here", "last"]
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\nthree")))
    flags = ("--model", saved, "--candidates", tmp_path / "c.txt", "--top_k", 99)
    run_score(*flags, "--queries", "-", "--output", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert len(rows) == 3 * len(lines)
    assert {row["row"]: row["candidate"] for row in rows} == dict(enumerate(lines))
    assert [row["query"] for row in rows[:: len(lines)]] == ["one", "", "three"]
    assert "--candidates: 1 of the lines are empty" in caplog.text
    (tmp_path / "q.txt").write_text("one")
    run_score(*flags, "--queries", tmp_path / "q.txt", "--output", tmp_path / "out.tsv")
    rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text("utf-8").split("\n")[:-1]]
    assert {len(row) for row in rows} == {6}
    assert "a b" in {row[5] for row in rows}

    (tmp_path / "bad.txt").write_bytes(b"fine\ncaf\xe9\n")
    for texts in ("--queries", "--candidates"):
        other = "--candidates" if texts == "--queries" else "--queries"
        argv = ["score", "--model", saved, texts, tmp_path / "bad.txt", other, tmp_path / "q.txt"]
        assert "bad.txt, line 2: byte 0xe9 is not valid UTF-8" in refused(entry.main, argv)
    index = ["index", "--model", saved, "--candidates", tmp_path / "bad.txt", "--output", tmp_path / "index"]
    assert "line 2" in refused(entry.main, index)
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ncaf\xe9")))
    argv = ["score", "--model", saved, "--queries", "-", "--candidates", tmp_path / "q.txt"]
    assert "--queries: standard input, line 2: byte 0xe9 is not valid UTF-8" in refused(entry.main, argv)


def test_a_pipe_with_a_name(saved, tmp_path, refused):
    """It can be read only once: a bad byte is refused with its line, and nothing waits for more."""
    (tmp_path / "q.txt").write_text("one")
    for content in (b"\xef\xbb\xbfone\rtwo\r\n\nlast", b"one\ncaf\xe9"):
        fifo = tmp_path / f"fifo{len(content)}"
        os.mkfifo(fifo)
        writer = threading.Thread(target=fifo.write_bytes, args=(content,))
        writer.start()
        argv = ["score", "--model", saved, "--queries", tmp_path / "q.txt", "--candidates", fifo]
        if b"\xe9" in content:
            assert f"{fifo}, line 2: byte 0xe9 is not valid UTF-8" in refused(entry.main, argv)
        else:
            run_score(*argv[1:], "--output", tmp_path / "out.jsonl")
            rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
            assert {row["row"]: row["candidate"] for row in rows} == dict(enumerate(["one", "two", "", "last"]))
        writer.join()


def test_standard_output_is_utf_8_and_may_be_cut_off(saved, tmp_path, monkeypatch, capsys):
    """Through a pipe of which two lines are read, as `| head -n 2` does, in a terminal of another encoding."""
    (tmp_path / "queries.txt").write_text("a \u2264 b\n" * 3000, encoding="utf-8")
    (tmp_path / "candidates.txt").write_text("a \u2264 b\n" * 9, encoding="utf-8")
    seen, (ours, theirs) = [], os.pipe()

    def head():
        with open(ours, "rb") as file:
            seen.extend(file.readline() for _ in range(2))

    reader = threading.Thread(target=head)
    reader.start()
    argv = ["score", "--model", saved, "--queries", tmp_path / "queries.txt", "--top_k", 5]
    with pytest.raises(SystemExit) as stop, open(theirs, "w", encoding="latin-1") as pipe:  # whose end flushes
        monkeypatch.setattr(sys, "stdout", pipe)
        entry.main([str(word) for word in [*argv, "--candidates", tmp_path / "candidates.txt"]])
    reader.join()
    assert stop.value.code == 141
    assert seen[1].decode("utf-8").split("\t")[1] == "a \u2264 b"
    assert "Traceback" not in capsys.readouterr().err


def test_refusals_of_the_commands(saved, student, tmp_path, refused, monkeypatch):
    queries = tmp_path / "q.txt"
    queries.write_text("one\n")
    model = student()
    with torch.no_grad():
        model.network.siamese_head.fc_layers[0].bias += 1
    CandidateIndex.build(model, TEXTS, tmp_path / "foreign")
    score = ["score", "--model", saved, "--queries", queries, "--candidates", queries]

    def line(argv: list, **changes: object) -> str:
        return refused(entry.main, [*argv, *as_flags(changes)])  # of a flag given twice the last one counts

    assert "none.txt: cannot read the texts" in line(score, queries=tmp_path / "none.txt")
    assert "(Is a directory)" in line(score, queries=tmp_path)
    assert "no index of candidates" in line(score, candidates=tmp_path)
    assert "another model" in line(score, candidates=tmp_path / "foreign")
    assert "can be read once" in line(score, queries="-", candidates="-")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", None)
        assert "--output: standard output is closed" in line(score)
    assert "no student" in line(score, model=tmp_path)
    assert "is not a label of mrpc: give one of 0, 1" in line(score, rank_label="entailment")
    assert "is a folder" in line(score, output=tmp_path)
    assert "0 is below 1" in line(score, top_k=0)
    index = ["index", "--model", saved, "--candidates", queries, "--output", tmp_path / "index"]
    assert "holds other files" in line(index, output=tmp_path)
    assert "no index of candidates" in refused(entry.main, [*index, "--append"])
    assert "--half" in refused(entry.main, [*index, "--append", "--half"])
    export = ["export", "--trainer_checkpoint", queries, "--output", tmp_path / "exported"]
    assert "not a checkpoint" in line(export)
    assert "there is no file" in line(export, trainer_checkpoint=tmp_path / "none.pt")
    assert "is a file" in line(export, output=queries)
    assert not (tmp_path / "exported").exists()


def test_the_example_encodes_and_scores(student_flags, checkpoints, capsys):
    dse_train_runner.main(student_flags(epochs=1))
    capsys.readouterr()
    load_dse_checkpoint_example.main(["--task_name", "mrpc", "--trainer_checkpoint", str(checkpoints()[-1])])
    output = capsys.readouterr().out
    model = DSESiameseClassifier.from_checkpoint(checkpoints()[-1])
    sentences = load_dse_checkpoint_example.SENTENCES
    assert f"Embedding: {torch.from_numpy(model.encode(sentences))[0]}" in output
    assert f"Score: {model.score([sentences])[0]}" in output


def test_the_readmes_lines_for_sentence_transformers(student, tmp_path):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    model = student()
    model.save_pretrained(tmp_path / "student")
    readme = (ROOT / "README.md").read_text()
    code = next(block for block in readme.split("```python\n")[1:] if "SentenceTransformer(" in block).split("```")[0]
    names: dict[str, object] = {}
    exec(code.replace('"FOLDER"', repr(str(tmp_path / "student"))), names)  # the README's own lines
    theirs = names["sentence_transformer"].encode(TEXTS)
    np.testing.assert_allclose(theirs, model.encode(TEXTS), rtol=1e-5, atol=1e-5)
