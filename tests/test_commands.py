"""`python -m dse`, the quickstart, the made-up data, and MRPC from raw files."""

import random
from pathlib import Path

import pytest

import download_glue_data
from dse import __main__ as entry
from dse import synthetic
from dse.commands import quickstart
from dse.processors import get_task, read_examples

REAL_MRPC = Path(__file__).parents[2] / "shared" / "data" / "glue_data" / "MRPC"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main(["-h"])
    assert stop.value.code == 0
    assert "quickstart  Run stages 2 to 5 on made-up data" in capsys.readouterr().out


def test_quickstart_runs_every_stage_and_says_that_the_data_is_synthetic(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "TRAIN_PAIRS", 64)  # whether it learns is the command's own affair, at full size
    monkeypatch.setattr(quickstart, "DEV_PAIRS", 40)
    entry.main(["quickstart", "--output_dir", str(tmp_path)])
    output = capsys.readouterr().out
    table = {line[:16].strip(): line[16:].split() for line in output.splitlines() if line[16:].strip()}
    labels = read_examples(get_task("mrpc"), tmp_path / "data", "dev").labels
    share = sum(labels) / len(labels)
    assert float(table["majority class"][0]) == pytest.approx(max(share, 1 - share), abs=6e-4)
    assert {"teacher", "student"} <= table.keys()
    assert "made up" in output
    for name in ("teacher/model.safetensors", "logits/teacher_logits.pt", "data/train.tsv"):
        assert (tmp_path / name).is_file()


def test_made_up_pairs_are_what_their_labels_say():
    """The second way: look every word up and compare concepts."""
    concept_of = {
        word: (s, c) for s, slot in enumerate(synthetic.SLOTS) for c, concept in enumerate(slot) for word in concept
    }
    assert len(concept_of) == sum(len(concept) for slot in synthetic.SLOTS for concept in slot), (
        "a word in two concepts"
    )
    rng, seen = random.Random(0), set()
    for _ in range(200):
        label, *sentences = synthetic.make_pair(rng)
        first, second = ({concept_of[word] for word in text.split() if word in concept_of} for text in sentences)
        assert len(first) == len(second) == 5
        assert len(first - second) == (0 if label else 2)
        seen.add(label)
    assert seen == {0, 1}


HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
RAW_TRAIN = HEADER.replace("\n", "\r\n") + '1\t10\t20\t"a" b\tc\r\n0\t20\t10\td\te\r\n1\t30\t40\tf\tg \r\n'
RAW_TEST = HEADER + "1\t5\t6\th\ti\n0\t7\t8\tj\tk\n"


def test_mrpc_from_raw_files_by_hand(tmp_path, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "msr_paraphrase_train.txt").write_text(RAW_TRAIN, encoding="utf-8", newline="")
    (raw / "msr_paraphrase_test.txt").write_text(RAW_TEST, encoding="utf-8", newline="")
    (raw / "dev_ids.tsv").write_text("10\t20\n40\t30\n")  # ordered: neither 20 10 nor 30 40
    download_glue_data.main(["--tasks", "mrpc", "--data_dir", str(tmp_path / "glue"), "--path_to_mrpc", str(raw)])
    made = {path.name: path.read_bytes().decode() for path in (tmp_path / "glue" / "MRPC").glob("*.tsv")}
    assert made["dev.tsv"] == HEADER + '1\t10\t20\t"a" b\tc\n'
    assert made["train.tsv"] == HEADER + "0\t20\t10\td\te\n1\t30\t40\tf\tg\n"
    assert made["test.tsv"] == "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t5\t6\th\ti\n1\t7\t8\tj\tk\n"
    assert capsys.readouterr().out.split() == ["MRPC", "done"]
    download_glue_data.main(["--tasks", "MRPC", "--data_dir", str(tmp_path / "glue"), "--path_to_mrpc", str(raw)])
    assert capsys.readouterr().out.split() == ["MRPC", "already", "there"]


@pytest.mark.skipif(not REAL_MRPC.is_dir(), reason="the real data is not here")
def test_mrpc_from_the_real_raw_files(tmp_path):
    argv = ["--tasks", "MRPC", "--data_dir", str(tmp_path), "--path_to_mrpc", str(REAL_MRPC)]
    download_glue_data.main(argv)
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        assert (tmp_path / "MRPC" / name).read_bytes() == (REAL_MRPC / name).read_bytes()


def test_snli_by_hand():
    lines = ["gold_label\tsentence1_binary_parse\tsentence1\tsentence2\tcaptionID\tpairID\tlabel1"]
    lines += ["neutral\t( a )\tA.\tB.\tc1\tp1\tneutral", "-\t( x )\tX.\tY.\tc2\tp2\tneutral"]
    lines += ["entailment\t( d )\tD.\tE.\tc3\tp3\tentailment", ""]
    header, *rows = download_glue_data.convert_snli(lines)
    parses = "sentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
    assert header == f"index\tcaptionID\tpairID\t{parses}\tsentence1\tsentence2\tlabel1\tgold_label"
    assert rows == [
        "0\tc1\tp1\t( a )\t\t\t\tA.\tB.\tneutral\tneutral",
        "1\tc3\tp3\t( d )\t\t\t\tD.\tE.\tentailment\tentailment",
    ]
