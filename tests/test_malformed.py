"""Malformed rows, flags and files, for every script and command: one clear line, exit code 2, no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import as_flags

import download_glue_data
import dse_train_runner
import finetune_bert
import load_dse_checkpoint_example
import run_distillation_logits_creator
from dse import __main__ as commands
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier
from dse.system.files import sha256_json

HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


@pytest.fixture(scope="session")
def world(tmp_path_factory, bert, data, logits) -> Path:
    """A folder with whatever the programs take, all of it sound: data, models, logits, a checkpoint, an index."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(bert, folder / "bert")
    shutil.copytree(data("mrpc"), folder / "data")
    for suffix in (".pt", ".json"):
        shutil.copyfile(logits("mrpc").with_suffix(suffix), folder / f"logits{suffix}")
    finetune_bert.main(argv_of(folder, "finetune"))
    dse_train_runner.main(argv_of(folder, "train"))
    (run,) = (folder / "checkpoints").iterdir()
    shutil.move(max(run.glob("*.pt")), folder / "checkpoint.pt")
    shutil.move(run / "best", folder / "student")
    (folder / "texts.txt").write_text("one\ntwo\n")
    model = DSESiameseClassifier.from_pretrained(folder / "student")
    CandidateIndex.build(model, ["one", "two"], folder / "index")
    return folder


def argv_of(folder: Path, program: str, **changes: object) -> list[str]:
    """Flags with which a program would work, but for the changes."""
    data = {"task_name": "mrpc", "data_dir": folder / "data", "do_lower_case": True}
    flags = {
        "download": {"data_dir": folder / "glue", "tasks": "MRPC"},
        "finetune": {**data, "bert_model": folder / "bert", "max_seq_length": 48, "do_train": True,
                     "num_train_epochs": 1, "output_dir": folder / "teacher"},
        "logits": {**data, "train_features_path": folder / "features", "bert_checkpoint_dir": folder / "teacher",
                   "max_seq_length": 48, "output_dir": folder / "out"},
        "train": {**data, "distillation_logits_path": folder / "logits.pt", "bert_model": folder / "bert",
                  "max_seq_length": 32, "pooler_num_top_hidden_layers": 2, "fc_dims": [8, 1], "epochs": 1,
                  "store_checkpoints": True, "checkpoint_dir": folder / "checkpoints"},
        "example": {"task_name": "mrpc", "trainer_checkpoint": folder / "checkpoint.pt"},
        "export": {"trainer_checkpoint": folder / "checkpoint.pt", "output": folder / "exported"},
        "index": {"model": folder / "student", "candidates": folder / "texts.txt", "output": folder / "new_index"},
        "score": {"model": folder / "student", "queries": folder / "texts.txt", "candidates": folder / "index"},
        "benchmark training": {**data, "bert_model": folder / "bert", "max_seq_length": 32,
                               "pooler_num_top_hidden_layers": 2},
    }[program]  # fmt: skip
    return as_flags({**flags, **changes})


MAINS: dict[str, Callable[[list[str]], None]] = {
    "download": download_glue_data.main,
    "finetune": finetune_bert.main,
    "logits": run_distillation_logits_creator.main,
    "train": dse_train_runner.main,
    "example": load_dse_checkpoint_example.main,
}


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rows(*lines: str, file: str = "train.tsv") -> Callable[[Path], None]:
    """Replace a data file by a header and these lines."""
    return lambda folder: (folder / "data" / file).write_bytes(
        (HEADER + "".join(lines)).encode("utf-8", "surrogateescape")
    )


def text(name: str, content: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def on(name: str, spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: spoil(folder / name)


def edited(name: str, **changes: object) -> Callable[[Path], None]:
    """Entries of a JSON file changed; the hash in it, if there is one, made to fit."""

    def edit(folder: Path) -> None:
        value = {**json.loads((folder / name).read_text()), **changes}
        if "sha256" in value and name != "logits.json":
            del value["sha256"]
            value["sha256"] = sha256_json(value)
        (folder / name).write_text(json.dumps(value))

    return edit


def saved(name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / name)


NEW = {"output_dir": "new"}
GOOD = "1\t1\t2\ta\tb\n"
# (program, what is spoiled in a copy of the world, changed flags, part of the line)
CASES: list[tuple[str, Callable[[Path], None] | None, dict[str, object], str]] = [
    # rows
    ("finetune", rows("1\t1\t2\ta\n"), NEW, "train.tsv, line 2: at least 5 columns expected, found 4"),
    ("finetune", rows(GOOD, "maybe\t1\t2\ta\tb\n"), NEW, "train.tsv, line 3: label 'maybe' is not one of mrpc's: 0, 1"),
    ("finetune", rows(GOOD, "1\t1\t2\t\udcff\tb\n"), NEW, "train.tsv, line 3: byte 0xff is not valid UTF-8"),
    ("finetune", rows(), NEW, "train.tsv: no rows of data in it"),
    ("finetune", rows(GOOD, "\n", GOOD), NEW, "train.tsv, line 3: at least 5 columns expected"),
    ("logits", rows("1\t1\t2\ta\n"), {}, "line 2: at least 5 columns expected, found 4"),
    ("logits", without("data/train.tsv"), {}, "cannot read the data of mrpc (No such file or directory)"),
    ("train", rows("2\t1\t2\ta\tb\n", file="dev.tsv"), {}, "dev.tsv, line 2: label '2' is not one of mrpc's"),
    ("train", rows(GOOD), {}, "(rows: 24 there, 1 here)"),
    ("train", without("data/dev.tsv"), {}, "cannot read the data of mrpc"),
    ("benchmark training", rows("1\t1\n"), {}, "at least 5 columns expected, found 2"),
    # flags
    ("download", None, {"tasks": "MRCP"}, "unknown 'MRCP'"),
    ("download", None, {"tasks": ""}, "--tasks"),
    ("download", None, {"base_url": "glue"}, "--base_url: not an address such as https://"),
    ("download", None, {"path_to_mrpc": "/no/such"}, "no msr_paraphrase_train.txt in /no/such"),
    ("finetune", None, {"max_seq_length": "long"}, "--max_seq_length: 'long' is not a whole number"),
    ("finetune", None, {"learning_rate": "inf"}, "--learning_rate: 'inf' is not a number"),
    ("finetune", None, {"num_train_epochs": -1}, "--num_train_epochs: -1 is not above 0"),
    ("finetune", None, {"save_every": 0}, "--save_every: 0 is below 1"),
    ("finetune", None, {"padding": "none"}, "--padding: invalid choice: 'none'"),
    ("finetune", None, {"task_name": ""}, "unknown task ''"),
    ("finetune", None, {"bert_modell": "x"}, "unrecognized arguments: --bert_modell x"),
    ("finetune", None, {}, "is not empty; give --overwrite_output_dir"),
    ("finetune", None, {"resume": True, "learning_rate": 0.25}, "--learning_rate: 0.25 now, 5e-05 in the run"),
    ("logits", None, {"batch_size": 1.5}, "--batch_size: '1.5' is not a whole number"),
    ("logits", None, {"bert_checkpoint_dir": ""}, "--bert_checkpoint_dir"),
    ("logits", None, {"train_features_path": ""}, "is a folder; expected the file of a feature cache"),
    ("train", None, {"fc_dims": []}, "--fc_dims: expected at least one argument"),
    ("train", None, {"fc_dims": [8, 3]}, "the last size is 3, mrpc (binary) needs 1"),
    ("train", None, {"lr": "1e-5x"}, "--lr: '1e-5x' is not a number"),
    ("train", None, {"tune_positive_thresholds": [0.5, 1.5]}, "1.5 is outside (0, 1)"),
    ("train", None, {"pooler_num_top_hidden_layers": 13}, "13 is above the model's 2 layers"),
    ("train", None, {"patience": 0}, "--patience: 0 is below 1"),
    ("train", None, {"experiment_name": ""}, "'' becomes part of file names"),
    ("train", None, {"resume": True, "trainer_checkpoint": "checkpoint.pt"}, "--trainer_checkpoint: there is no file"),
    ("train", None, {"freeze_bert": True, "siamese_head_type": "tanh"}, "invalid choice: 'tanh'"),
    ("example", None, {"task_name": "rte"}, "rte ['entailment', 'not_entailment'] was given, but the checkpoint is of"),
    ("example", None, {"fc_dims": [7, 1]}, "[7, 1] was given, but the checkpoint was trained with [8, 1]"),
    ("export", None, {"output": __file__}, "is a file; name a folder"),
    ("index", None, {"half": True, "append": True}, "--half: is decided when an index is made"),
    ("index", None, {"candidates": "/no/such"}, "/no/such: cannot read the texts, a UTF-8 file"),
    ("score", None, {"top_k": 0}, "--top_k: 0 is below 1"),
    ("score", None, {"rank_label": "entailment"}, "--rank_label: 'entailment' is not a label of mrpc"),
    ("score", None, {"queries": "-", "candidates": "-"}, "standard input can be read once"),
    ("benchmark training", None, {"steps": 0}, "--steps: 0 is below 2"),
    # files
    ("finetune", text("bert/config.json", "{"), NEW, "config.json: the model's configuration is not valid"),
    ("finetune", on("bert/model.safetensors", cut), NEW, "is truncated or not a safetensors file"),
    ("finetune", text("mine.json", "[]"), {"task_name": "mine.json"}, "must be a JSON object, found a list"),
    ("finetune", text("mine.json", '{"kind": "ternary"}'), {"task_name": "mine.json"}, "kind"),
    ("logits", on("teacher/model.safetensors", flipped), {}, "is spoiled: its SHA-256 in training.json is"),
    ("logits", without("teacher/model.safetensors"), {}, "has no weights"),
    ("logits", text("features", "mine"), {}, "is not a feature cache of this project, so it is not overwritten"),
    ("train", on("logits.pt", flipped), {}, "not the tensor that logits.json describes"),
    ("train", on("logits.pt", cut), {}, "not the tensor that logits.json describes"),
    ("train", edited("logits.json", labels=["1", "0"]), {}, "['1', '0'] there, ['0', '1'] here"),
    ("train", text("logits.json", "no"), {}, "the description of the logits is not valid JSON"),
    ("train", on("checkpoint.pt", flipped), {"trainer_checkpoint": "checkpoint.pt"}, "is truncated or not"),
    ("train", saved("checkpoint.pt", [1]), {"trainer_checkpoint": "checkpoint.pt"}, "was not written by"),
    ("example", on("checkpoint.pt", cut), {}, "is truncated or not"),
    ("example", without("checkpoint.pt"), {}, "--trainer_checkpoint: there is no file"),
    ("export", on("checkpoint.pt", flipped), {}, "is truncated or not"),
    ("index", text("texts.txt", b"fine\ncaf\xe9\n"), {}, "texts.txt, line 2: byte 0xe9 is not valid UTF-8"),
    ("index", text("new_index/mine.txt", "mine"), {}, "holds other files (mine.txt)"),
    ("index", on("student/model.safetensors", flipped), {}, "model.safetensors: spoiled or of another student"),
    ("score", on("student/config.json", flipped), {}, "config.json: spoiled or changed (its hash differs)"),
    ("score", edited("student/config.json", max_seq_length=31), {}, "this index was made by another model"),
    ("score", on("index/vectors.bin", flipped), {}, "vectors.bin: spoiled, in rows 0 to 1"),
    ("score", on("index/vectors.bin", cut), {}, "vectors.bin: missing or truncated"),
    ("score", on("index/index.json", flipped), {}, "index"),
    ("score", without("index/index.json"), {}, "no index of candidates: index.json is missing"),
    ("score", text("texts.txt", b"\xff"), {}, "texts.txt, line 1: byte 0xff is not valid UTF-8"),
]  # fmt: skip


def test_there_are_sixty():
    assert len(CASES) >= 60
    assert {case[0] for case in CASES} == {*MAINS, "export", "index", "score", "benchmark training"}


@pytest.mark.parametrize(("program", "spoil", "changes", "message"), CASES, ids=[f"{c[0]}-{c[3][:40]}" for c in CASES])
def test_refused(program, spoil, changes, message, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = world
    if spoil is not None:
        folder = Path(shutil.copytree(world, tmp_path / "world"))
        (folder / "new_index").mkdir(exist_ok="mine.txt" in message)
        spoil(folder)
        monkeypatch.chdir(folder)
    elif "checkpoint.pt" in str(changes):
        changes = {**changes, "trainer_checkpoint": "nowhere.pt"}
    before = sorted(path for path in folder.rglob("*"))
    capsys.readouterr()
    argv = argv_of(folder, program, **changes)
    main = MAINS.get(program) or (lambda flags: commands.main([*program.split(), *flags]))
    with pytest.raises(SystemExit) as stop:
        main(argv)
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if "error: " in line]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in output.err + output.out
    assert [path for path in sorted(folder.rglob("*")) if path not in before and "train_" not in path.name] == []
