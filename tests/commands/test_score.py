"""The commands that index candidates and score them."""

import io
import json
import os
import re
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import TEXTS, as_flags

import finetune_bert
from dse import __main__ as entry
from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.experiments.predictions import load_scorer
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier


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
    assert "can be read only once" in line(score, queries="-", candidates="-")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", None)
        assert "--output: standard output is closed" in line(score)
    assert "no student" in line(score, model=tmp_path)
    assert "is not a label of mrpc: give one of 0, 1" in line(score, rank_label="entailment")
    assert "is a folder" in line(score, output=tmp_path)
    assert "--output: " in (found := line(score, output=tmp_path / "." / "q.txt"))
    assert "q.txt is an input of this command, or another flag's output; give another place" in found
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


def test_candidates_of_a_table_with_ids(saved, tmp_path, capsys):
    """They are found with their ids, from the file and from an index, to which more are appended."""
    rows = [{"sku": f"s{i}", "text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, some in (("first.csv", rows[:5]), ("more.csv", rows[5:])):
        lines = ["sku,what", *(f'{row["sku"]},"{row["text"]}"' for row in some)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    columns = ("--text_column", "what", "--id_column", "sku")
    base = ("index", "--model", saved, "--output", str(tmp_path / "index"))
    entry.main([*base, "--candidates", str(tmp_path / "first.csv"), *columns])
    entry.main([*base, "--candidates", str(tmp_path / "more.csv"), *columns, "--append"])
    (tmp_path / "queries.txt").write_text(TEXTS[0] + "\n")
    flags = ("--model", saved, "--queries", tmp_path / "queries.txt", "--top_k", 4)
    capsys.readouterr()
    outputs = []
    for candidates in ((tmp_path / "index",), (tmp_path / "all.jsonl", "--id_column", "sku")):
        run_score(*flags, "--candidates", *candidates)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    hits = [line.split("\t") for line in outputs[0].splitlines()]
    assert hits[0][-2:] == ["candidate", "id"]
    assert all((row, text, own) == (row, TEXTS[int(row)], f"s{row}") for _, _, _, row, _, text, own in hits[1:])
    run_score(*flags, "--candidates", tmp_path / "all.jsonl")
    assert "id" not in capsys.readouterr().out.splitlines()[0].split("\t")


def test_shortlists(saved, tmp_path, capsys, refused):
    """The hits are those of a search; auto takes all of so few, in an index or not."""
    (tmp_path / "c.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "q.txt").write_text(TEXTS[0] + "\n")
    entry.main(
        ["index", "--model", saved, "--candidates", str(tmp_path / "c.txt"), "--output", str(tmp_path / "index")]
    )
    base = ["--model", saved, "--queries", str(tmp_path / "q.txt"), "--top_k", "4", "--candidates"]
    capsys.readouterr()
    outputs = []
    for name, *flags in (("index",), ("index", "--shortlist", "auto"), ("c.txt", "--shortlist", "auto"),
                         ("index", "--shortlist", 4)):  # fmt: skip
        run_score(*base, tmp_path / name, *flags)
        outputs.append([line.split("\t")[3] for line in capsys.readouterr().out.splitlines()[1:]])
    index = CandidateIndex.open(tmp_path / "index", DSESiameseClassifier.from_pretrained(saved))
    hits = [index.search(TEXTS[0], 4, shortlist=size) for size in (None, None, None, 4)]
    assert outputs == [[str(hit.row) for hit in found] for found in hits]
    assert outputs[0] != outputs[3]
    for wrong, line in (("3", "--shortlist: 3 is below the hits per query, 4"), ("all", "'all' is not a whole number")):
        argv = ["score", *base, str(tmp_path / "index"), "--shortlist", wrong]
        assert line in refused(entry.main, argv)


@pytest.mark.parametrize("with_ids", [False, True])
def test_unit_vectors_for_a_vector_database(with_ids, saved, tmp_path, refused):
    """Of a new index, and of one that is there; the nearest of them are those of a shortlist."""
    lines = ["text,id", *(f'"{text}",s{row}' for row, text in enumerate(TEXTS))]
    (tmp_path / "c.csv").write_text(
        "\n".join(lines if with_ids else [line.rpartition(",")[0] for line in lines]) + "\n"
    )
    base = ["index", "--model", saved, "--output", str(tmp_path / "index"), "--export"]
    entry.main([*base, str(tmp_path / "one.npy"), "--candidates", str(tmp_path / "c.csv")])
    entry.main([*base, str(tmp_path / "two.npy")])
    for end in (".npy", ".ids.txt"):
        assert (tmp_path / f"one{end}").read_bytes() == (tmp_path / f"two{end}").read_bytes()
    assert (tmp_path / "one.ids.txt").read_text().split() == [
        f"s{i}" if with_ids else str(i) for i in range(len(TEXTS))
    ]
    units, model = np.load(tmp_path / "one.npy"), DSESiameseClassifier.from_pretrained(saved)
    size = model.network.config.top_size
    expected = model.encode(TEXTS)[:, -size:]
    np.testing.assert_allclose(units, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-5)
    for wrong in (["--output", "x"], ["--output", "x", "--append", "--export", "y.npy"]):
        assert "--candidates: is needed, unless --export" in refused(entry.main, ["index", "--model", saved, *wrong])
    line = "--export: .*units.npy is in the index; name another folder"
    assert re.search(line, refused(entry.main, [*base, str(tmp_path / "index" / "units.npy")]))
    (tmp_path / "u.ids.txt").write_text("a text\n")
    argv = [*base, str(tmp_path / "u.npy"), "--candidates", str(tmp_path / "u.ids.txt")]
    assert "--export: " in (line := refused(entry.main, argv))
    assert "u.ids.txt is an input of this command" in line
    assert "holds no index of candidates" in refused(
        entry.main, [*base[:4], str(tmp_path / "none"), *base[5:], "y.npy"]
    )


def test_lines_of_a_tsv_are_texts_with_a_warning(saved, tmp_path, capsys, caplog):
    (tmp_path / "c.tsv").write_text("id\ttext\n1\tone\n2\ttwo\n")
    (tmp_path / "q.txt").write_text("a query\n")
    base = ("--model", saved, "--queries", tmp_path / "q.txt", "--candidates", tmp_path / "c.tsv")
    run_score(*base)
    assert "is one text; a table needs --text_column" in caplog.text
    assert len(capsys.readouterr().out.splitlines()) == 4
    caplog.clear()
    run_score(*base, "--text_column", "text")
    assert "table needs" not in caplog.text
    assert {line.split("\t")[5] for line in capsys.readouterr().out.splitlines()[1:]} == {"one", "two"}


@pytest.mark.parametrize(
    ("content", "flags", "line"),
    [
        ('{"a": "b"}\n', (), "--candidates: .* has no column 'text', or two: a; rename one"),
        ('{"a": "b"}\n', ("--text_column", "a", "--id_column", "c"), "has no column 'c', or two"),
        ('{"text": "b"}\n{"id": 1}\n', (), r"c\.jsonl, line 2: a text or an id is missing"),
        ('{"text": "b"}\n{"text": "c', (), r"c\.jsonl, line 2: is not JSON"),
    ],
)
def test_tables_of_candidates_that_cannot_be_read(content, flags, line, saved, tmp_path, refused, monkeypatch):
    """They are read before anything is embedded."""
    monkeypatch.setattr("dse.commands.score.load_student", None)
    (tmp_path / "c.jsonl").write_text(content)
    base = ["--model", saved, "--queries", str(tmp_path / "c.jsonl"), "--candidates", str(tmp_path / "c.jsonl")]
    (tmp_path / "q.txt").write_text("a query\n")
    base[3] = str(tmp_path / "q.txt")
    assert re.search(line, refused(lambda argv: entry.main(["score", *argv]), [*base, *flags]))


def test_a_cross_encoder_re_orders_the_best(saved, teacher_flags, tmp_path, capsys, refused):
    """The order of its own log-odds among the hits that it reads; others do not come in."""
    finetune_bert.main(teacher_flags(num_train_epochs=3))
    (tmp_path / "candidates.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "queries.txt").write_text("\n".join(TEXTS[:2]) + "\n")
    flags = ("--model", saved, "--queries", tmp_path / "queries.txt", "--candidates", tmp_path / "candidates.txt")
    outputs = []
    for more in (("--top_k", 6), ("--top_k", 4, "--rerank", tmp_path / "teacher", "--rerank_top", 6)):
        capsys.readouterr()
        run_score(*flags, *more)
        outputs.append([line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]])
    score, _ = load_scorer(str(tmp_path / "teacher"), get_task("mrpc"), torch.device("cpu"))
    for query in "01":
        plain, ordered = ([hit for hit in hits if hit[0] == query] for hits in outputs)
        texts = [hit[5] for hit in plain]
        logits = score(Examples([plain[0][1]] * 6, texts))[:, 0]
        best = np.argsort(-logits, kind="stable")[:4]
        assert [hit[5] for hit in ordered] == [texts[place] for place in best]
        np.testing.assert_allclose([float(hit[4]) for hit in ordered], logits[best], rtol=1e-4, atol=1e-5)
        assert [hit[2] for hit in ordered] == ["1", "2", "3", "4"]
    (tmp_path / "candidates.txt").write_text("")
    run_score(*flags, "--rerank", tmp_path / "teacher")
    assert capsys.readouterr().out.splitlines() == [
        "\t".join(("query_row", "query", "rank", "row", "score", "candidate"))
    ]
    argv = ["score", *map(str, flags), "--rerank", "x", "--rerank_top", "3"]
    assert "--rerank_top: 3 is below --top_k, 10" in refused(entry.main, argv)
