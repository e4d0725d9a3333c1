"""Bad input to every script and command: one clear line, exit code 2, nothing done."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import NAMED, as_flags, command_main, contents, cut, flip
from processes import LONG, ROOT
from transformers import BertTokenizer

import download_glue_data
import dse_train_runner
import finetune_bert
import load_dse_checkpoint_example
import run_distillation_logits_creator
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier
from dse.system.files import sha256_file, sha256_json

Spoil = Callable[[Path], None]
UNWRITABLE = f"{__file__}/nowhere"  # below a file, where even root makes no folder
LONG_NAME = "n" * 250  # a name of its own, and too long with what is added
TOO_LONG = "is too long for a file's name, or its path is"
NOT_UTF8 = os.fsdecode(b"caf\xe9")
SECRET = "hunter2"  # which no line may show
HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
GOOD = "1\t1\t2\ta\tb\n"
OTHERS = ("rte", "mnli", "sts-b")  # tasks beside mrpc whose data and logits are there


@pytest.fixture(scope="session")
def world(tmp_path_factory, bert, data, logits) -> Path:
    """A folder with whatever the programs take, all of it sound: data, models, logits, a checkpoint, an index."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(bert, folder / "bert")
    for name, place in (("mrpc", "data"), *zip(OTHERS, OTHERS, strict=True)):
        shutil.copytree(data(name), folder / place)
        for suffix in (".pt", ".json"):
            stem = "logits" if name == "mrpc" else name
            shutil.copyfile(logits(name).with_suffix(suffix), folder / f"{stem}{suffix}")
    finetune_bert.main(argv_of(folder, "finetune", output_dir=folder / "teacher"))
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
                     "num_train_epochs": 1, "output_dir": folder / "new_teacher"},
        "logits": {**data, "train_features_path": folder / "features", "bert_checkpoint_dir": folder / "teacher",
                   "max_seq_length": 48, "output_dir": folder / "out"},
        "train": {**data, "distillation_logits_path": folder / "logits.pt", "bert_model": folder / "bert",
                  "max_seq_length": 32, "pooler_num_top_hidden_layers": 2, "fc_dims": [8, 1], "epochs": 1, "lr": 1e-3,
                  "store_checkpoints": True, "checkpoint_dir": folder / "checkpoints"},
        "example": {"task_name": "mrpc", "trainer_checkpoint": folder / "checkpoint.pt"},
        "export": {"trainer_checkpoint": folder / "checkpoint.pt", "output": folder / "exported"},
        "index": {"model": folder / "student", "candidates": folder / "texts.txt", "output": folder / "new_index"},
        "score": {"model": folder / "student", "queries": folder / "texts.txt", "candidates": folder / "index"},
        "benchmark training": {**data, "bert_model": folder / "bert", "max_seq_length": 32,
                               "pooler_num_top_hidden_layers": 2},
        "transfer": {"model": folder / "student", "data_dir": folder},
        "predict": {"model": folder / "student", "task_name": "mrpc", "data_dir": folder / "data"},
        "reproduce": {"bert_model": folder / "bert", "data_dir": folder},
        "quickstart": {},
    }[program]  # fmt: skip
    return as_flags({**flags, **changes})


MAINS: dict[str, Callable[[list[str]], None]] = {
    "download": download_glue_data.main,
    "finetune": finetune_bert.main,
    "logits": run_distillation_logits_creator.main,
    "train": dse_train_runner.main,
    "example": load_dse_checkpoint_example.main,
}


def rows(*lines: str, file: str = "train.tsv") -> Spoil:
    """Replace a data file by a header and these lines."""
    return text(f"data/{file}", (HEADER + "".join(lines)).encode("utf-8", "surrogateescape"))


def text(name: str, content: bytes | str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def without(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def on(name: str, spoil: Spoil) -> Spoil:
    return lambda folder: spoil(folder / name)


def edited(name: str, **changes: object) -> Spoil:
    """Entries of a JSON file changed; the hash in it, if there is one, made to fit."""

    def edit(folder: Path) -> None:
        value = {**json.loads((folder / name).read_text()), **changes}
        if "sha256" in value and name != "logits.json":
            del value["sha256"]
            value["sha256"] = sha256_json(value)
        (folder / name).write_text(json.dumps(value))

    return edit


def replaced(name: str, old: str, new: str) -> Spoil:
    return on(name, lambda path: path.write_text(path.read_text().replace(old, new)))


def saved(name: str, value: object) -> Spoil:
    return lambda folder: torch.save(value, folder / name)


def logits_alone(value: object) -> Spoil:
    """Logits without the file that describes them."""

    def spoil(folder: Path) -> None:
        torch.save(value, folder / "logits.pt")
        (folder / "logits.json").unlink()

    return spoil


def logits_cut_by_their_maker(folder: Path) -> None:
    cut(folder / "logits.pt")
    edited("logits.json", sha256=sha256_file(folder / "logits.pt"))(folder)


def vocabulary_txt(content: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "bert" / "tokenizer.json").unlink()
        (folder / "bert" / "vocab.txt").write_bytes(content)

    return spoil


def score_in_words(folder: Path) -> None:
    lines = (folder / "sts-b" / "dev.tsv").read_text().splitlines()
    lines[3] = lines[3].rsplit("\t", 1)[0] + "\thigh"
    (folder / "sts-b" / "dev.tsv").write_text("\n".join(lines))


def strange_header(header: str) -> Spoil:
    """An own task, and its file with these two columns."""

    def spoil(folder: Path) -> None:
        (folder / "mine.json").write_text(json.dumps(NAMED))
        (folder / "data" / "train.tsv").write_text(f"{header}\nx\ty\n")

    return spoil


def other_task(name: str, **changes: object) -> dict[str, object]:
    return {"task_name": name, "data_dir": name, "distillation_logits_path": f"{name}.pt", **changes}


MINE = {"task_name": "mine.json"}
CHECKPOINT = {"trainer_checkpoint": "checkpoint.pt"}
# (programs, what is spoiled in a copy of the world, changed flags, part of the line); paths are below the world
CASES: list[tuple[str, Spoil | None, dict[str, object], str]] = [
    # rows
    ("finetune train", without("data/train.tsv"), {}, "cannot read the data of mrpc (No such file or directory)"),
    ("finetune train", text("data/train.tsv", ""), {}, "train.tsv: is empty"),
    ("finetune train", rows(), {}, "train.tsv: has no rows of data"),
    ("finetune train", rows("1\t2\n"), {}, "train.tsv, line 2: at least 5 columns expected, found 2"),
    ("finetune", rows("1\t1\t2\ta\n"), {}, "train.tsv, line 2: at least 5 columns expected, found 4"),
    ("finetune", rows(GOOD, "\n", GOOD), {}, "train.tsv, line 3: at least 5 columns expected"),
    ("finetune train", rows(GOOD, "maybe\t1\t2\ta\tb\n"), {},
     "train.tsv, line 3: label 'maybe' is not one of mrpc's: 0, 1"),
    ("finetune train", rows(GOOD, "1\t1\t2\t\udcff\tb\n"), {}, "train.tsv, line 3: byte 0xff is not valid UTF-8"),
    ("logits", rows("1\t1\t2\ta\n"), {}, "line 2: at least 5 columns expected, found 4"),
    ("logits", without("data/train.tsv"), {}, "cannot read the data of mrpc (No such file or directory)"),
    ("train", rows("2\t1\t2\ta\tb\n", file="dev.tsv"), {}, "dev.tsv, line 2: label '2' is not one of mrpc's"),
    ("train", rows(GOOD), {}, "(rows: 24 there, 1 here)"),
    ("train", without("data/dev.tsv"), {}, "cannot read the data of mrpc"),
    ("train", score_in_words, other_task("sts-b"), "dev.tsv, line 4: score 'high' is not a number"),
    ("benchmark training", rows("1\t1\n"), {}, "at least 5 columns expected, found 2"),
    # flags of the download
    ("download", None, {"tasks": "MRCP"}, "unknown 'MRCP'"),
    ("download", None, {"tasks": "MRPC,SQUAD"}, "unknown 'SQUAD'; known: all, CoLA"),
    ("download", None, {"tasks": ""}, "--tasks"),
    ("download", None, {"path_to_mrpc": "/no/such"}, "no msr_paraphrase_train.txt in /no/such"),
    ("download", None, {"path_to_mrpc": "."}, "no msr_paraphrase_train.txt in"),
    ("download", None, {"path_to_mrpc": "a\0b"}, "has a NUL character"),
    ("download", None, {"data_dir": UNWRITABLE}, "cannot write in"),
    *[("download", None, {flag: url}, f"--{flag}: not an address such as https://")
      for flag in ("base_url", "snli_url")
      for url in ("glue", "glue/data", "ftp://host/x", "file:///x", "http://", "http://host:port/",
                  f"http://user:pass/{SECRET}@host", f"http://user:12/{SECRET}@host/")],
    ("download", None, {"base-url": f"http://user:{SECRET}@host/"}, "--base-url"),
    ("download", None, {"base_url": f"https://host/glue?sig={SECRET}"}, "--base_url"),
    # flags of the teacher
    ("finetune train", None, {"task_name": "mrcp"}, "unknown task 'mrcp'; known: mrpc, qqp"),
    ("finetune", None, {"task_name": ""}, "unknown task ''"),
    ("finetune", None, {"task_name": "no.json"}, "no.json: cannot read the task description"),
    ("finetune", None, {"task_name": "no\x07\u202e.json"}, r"no\x07\u202e.json: cannot read the task"),
    ("finetune", None, {"task_name=a\0b.json": True}, r"'--task_name=a\x00b.json' has a NUL character"),
    ("finetune", None, {"data_dir": "/no/such"}, "--data_dir: /no/such is not a folder"),
    ("finetune", None, {"data_dir": "a\0b"}, r"'a\x00b' has a NUL character"),
    ("finetune", None, {"bert_model": "./no/such"}, "--bert_model: there is no folder ./no/such"),
    ("finetune", None, {"bert_model": "no_such_model"}, "no_such_model is not a local folder, and the hub did not"),
    ("finetune", None, {"bert_model": __file__}, "is a file; expected the folder of a BERT"),
    ("finetune", None, {"bert_model": str(ROOT)}, "is not a model folder: no config.json"),
    ("finetune", None, {"bert_modell": "x"}, "unrecognized arguments: --bert_modell x"),
    ("finetune", None, {"\x1b]0;x\x07": True}, r"unrecognized arguments: --\x1b]0;x\x07"),
    ("finetune", None, {"max_seq_length": 3}, "--max_seq_length: 3 is below 4"),
    ("finetune", None, {"max_seq_length": 65}, "65 is above the model's 64 positions"),
    ("finetune", None, {"max_seq_length": "long"}, "--max_seq_length: 'long' is not a whole number"),
    ("finetune", None, {"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps: 0 is below 1"),
    ("finetune", None, {"train_batch_size": 8, "gradient_accumulation_steps": 9}, "leaves no pair per step"),
    ("finetune", None, {"warmup_proportion": 1.5}, "--warmup_proportion: 1.5 is outside [0, 1]"),
    ("finetune", None, {"num_train_epochs": 2.5}, "2.5 is not a whole number of epochs"),
    ("finetune", None, {"num_train_epochs": -1}, "--num_train_epochs: -1 is not above 0"),
    ("finetune", None, {"learning_rate": 0}, "--learning_rate: 0 is not above 0"),
    ("finetune", None, {"learning_rate": "fast"}, "'fast' is not a number"),
    ("finetune", None, {"learning_rate": "inf"}, "--learning_rate: 'inf' is not a number"),
    ("finetune", None, {"save_every": 0}, "--save_every: 0 is below 1"),
    ("finetune", None, {"padding": "none"}, "--padding: invalid choice: 'none'"),
    ("finetune", None, {"do_train": False}, "give --do_train, --do_eval or both"),
    ("finetune", None, {"do_train": False, "do_eval": True}, "not a fine-tuned teacher: classifier.bias"),
    ("finetune", None, {"output_dir": UNWRITABLE}, "--output_dir: cannot write in"),
    ("finetune", None, {"file_log": True, "log_dir": UNWRITABLE}, "--log_dir: cannot write in"),
    ("finetune", None, {"output_dir": "teacher"}, "is not empty; give --overwrite_output_dir"),
    ("finetune", text("full/notes.txt", "mine"), {"output_dir": "full"}, "is not empty; give --overwrite_output_dir"),
    ("finetune", None, {"output_dir": "teacher", "resume": True, "learning_rate": 0.25},
     "--learning_rate: 0.25 now, 5e-05 in the run"),
    ("finetune", strange_header("q\x1b[2J\ta"), MINE, r"no column 'q' in the header, which has q\x1b[2J, a"),
    ("finetune", strange_header("\x9b1m\tq"), MINE, r"which has \x9b1m, q"),
    ("finetune", text("mine.json", "[]"), MINE, "must be a JSON object, found a list"),
    ("finetune", text("mine.json", '{"kind": "ternary"}'), MINE, "kind"),
    # flags of the logits
    ("logits", None, {"task_name": "cola"}, "cola has one sentence per row"),
    ("logits", None, {"task_name": "rte", "data_dir": "rte"},
     "its labels in order are ['0', '1'], but those of rte are"),
    ("logits", None, {"task_name": "mnli", "data_dir": "mnli"},
     "gives 2 logits, but mnli needs 3: contradiction, ent"),
    ("logits", None, {"bert_checkpoint_dir": ""}, "--bert_checkpoint_dir"),
    ("logits", None, {"bert_checkpoint_dir": "bert-base-uncased"},
     "--bert_checkpoint_dir: bert-base-uncased is not a local folder, and the hub"),
    ("logits", None, {"bert_checkpoint_dir": "/no/such"}, "--bert_checkpoint_dir: there is no folder"),
    ("logits", None, {"bert_checkpoint_dir": "bert"},
     "not a fine-tuned teacher: classifier.bias, classifier.weight missing"),
    ("logits", None, {"train_features_path": "."}, "is a folder; expected the file of a feature cache"),
    ("logits", None, {"train_features_path": __file__},
     "is not a feature cache of this project, so it is not overwritten"),
    ("logits", None, {"output_dir": UNWRITABLE}, "--output_dir: cannot write in"),
    ("logits", None, {"max_seq_length": 99}, "99 is above the model's 64 positions"),
    ("logits", None, {"batch_size": 0}, "--batch_size: 0 is below 1"),
    ("logits", None, {"batch_size": 1.5}, "--batch_size: '1.5' is not a whole number"),
    # flags of the student
    ("train", None, {"task_name": "cola"}, "cola has one sentence per row, but DSE scores pairs"),
    ("train", None, {"task_name": "sst-2"}, "sst-2 has one sentence per row"),
    ("train", None, {"task_name": "diagnostic", "fc_dims": 3}, "diagnostic has no train file"),
    ("train", None, other_task("rte", distillation_logits_path="logits.pt"), "(task: mrpc there, rte here)"),
    ("train", None, {"fc_dims": []}, "--fc_dims: expected at least one argument"),
    ("train", None, {"fc_dims": [8, 2]}, "the last size is 2, but mrpc (binary) needs 1: try --fc_dims 8 1"),
    ("train", None, {"fc_dims": [8, 3]}, "the last size is 3, but mrpc (binary) needs 1"),
    ("train", None, {"fc_dims": [0, 1]}, "--fc_dims: 0 is below 1"),
    ("train", None, {"pooler_type": "mean"}, "--pooler_type: invalid choice: 'mean' (choose from"),
    ("train", None, {"siamese_head_type": "cosine"}, "invalid choice: 'cosine' (choose from 'concat', 'dot', "),
    ("train", None, {"freeze_bert": True, "siamese_head_type": "tanh"}, "invalid choice: 'tanh'"),
    ("train", None, {"pooler_num_top_hidden_layers": 3}, "3 is above the model's 2 layers: give 2 or less"),
    ("train", None, {"pooler_num_top_hidden_layers": 13}, "13 is above the model's 2 layers"),
    ("train", None, {"pooler_num_top_hidden_layers": 0}, "0 is below 1"),
    ("train", None, {"additional_embedding_layer_size": -2}, "-2 is not a size: give 1 or more, or -1"),
    ("train", None, {"random_seed": 2**63}, "is above 9223372036854775807"),
    ("train", None, {"train_features_path": "x", "dev_features_path": "x"}, "x is used for two sets"),
    ("train", None, {"max_seq_length": 1000}, "1000 is above the model's 64 positions"),
    ("train", None, {"gradient_accumulation_steps": 0}, "0 is below 1"),
    ("train", None, {"lr": "1e-5x"}, "--lr: '1e-5x' is not a number"),
    ("train", None, {"patience": 0}, "--patience: 0 is below 1"),
    ("train", None, {"distillation_coeff": -0.1}, "--distillation_coeff: -0.1 is outside [0, 1]"),
    ("train", None, {"distillation_coeff": "nan"}, "'nan' is not a number"),
    ("train", None, {"warmup_proportion": 2}, "--warmup_proportion: 2 is outside [0, 1]"),
    ("train", None, {"tune_positive_thresholds": [0.5, 0]}, "0 is outside (0, 1)"),
    ("train", None, {"tune_positive_thresholds": 1}, "1 is outside (0, 1)"),
    ("train", None, {"tune_positive_thresholds": [0.5, 1.5]}, "1.5 is outside (0, 1)"),
    ("train", None, {"experiment_name": ""}, "'' becomes part of file names"),
    ("train", None, {"experiment_name": "a/b"}, "'a/b' becomes part of file names"),
    ("train", None, {"experiment_name": ".."}, "'..' becomes part of file names"),
    ("train", None, {"checkpoint_dir": UNWRITABLE}, "--checkpoint_dir: cannot write in"),
    ("train", None, {"plot_metrics": True, "plots_dir": UNWRITABLE}, "--plots_dir: cannot write in"),
    ("train", None, {"dev_features_path": f"{UNWRITABLE}/dev"}, "the feature cache"),
    ("train", None, {"distillation_logits_path": "no.pt"},
     "there is no file no.pt; run_distillation_logits_creator.py"),
    ("train", None, {"distillation_logits_path": __file__}, "not a whole logits file"),
    ("train", None, {"trainer_checkpoint": "no.pt"}, "--trainer_checkpoint: there is no file no.pt"),
    ("train", None, {"trainer_checkpoint": __file__}, "is truncated or not a checkpoint of dse_train_runner.py"),
    ("train", None, {"resume": True, "trainer_checkpoint": "no.pt"}, "--trainer_checkpoint: there is no file"),
    ("train", None, other_task("rte", **CHECKPOINT), "--task_name: rte now, mrpc in the run"),
    ("train", None, {"lr": 0.5, **CHECKPOINT}, "--lr: 0.5 now, 0.001 in the run"),
    ("train", None, {"fc_dims": [16, 1], **CHECKPOINT}, "--fc_dims: [16, 1] now, [8, 1] in the run"),
    ("train", None, {"freeze_bert": True, **CHECKPOINT}, "--freeze_bert: True now, False in the run"),
    ("train", None, {"patience": 3, **CHECKPOINT}, "--patience: 3 now, None in the run"),
    # flags of the example and the commands
    ("example", None, {"task_name": "rte"},
     "rte ['entailment', 'not_entailment'] was given, but the checkpoint is of mrpc ['0', '1']"),
    ("example", None, {"fc_dims": [9, 1]},
     "--fc_dims: [9, 1] was given, but the checkpoint was trained with [8, 1]"),
    ("example", None, {"max_seq_length": 64},
     "--max_seq_length: 64 was given, but the checkpoint was trained with 32"),
    ("example", None, {"siamese_head_type": "dot"}, "dot was given, but the checkpoint was trained with concat"),
    ("example", None, {"bert_model": "other"},
     "--bert_model: other was given, but the checkpoint was trained with"),
    ("example", None, {"freeze_bert": True},
     "--freeze_bert: True was given, but the checkpoint was trained with False"),
    ("export", None, {"output": __file__}, "is a file; give a folder"),
    ("index", None, {"half": True, "append": True}, "--half: is decided when an index is made"),
    ("index", None, {"candidates": "/no/such"}, "/no/such: cannot read the texts, a UTF-8 file"),
    ("index", None, {"model": "a\0b"}, r"'a\x00b' has a NUL character"),
    ("score", None, {"top_k": 0}, "--top_k: 0 is below 1"),
    ("score", None, {"rank_label": "entailment"}, "--rank_label: 'entailment' is not a label of mrpc"),
    ("score", None, {"queries": "-", "candidates": "-"}, "standard input can be read only once"),
    ("benchmark training", None, {"steps": 0}, "--steps: 0 is below 2"),
    # names
    ("finetune", lambda folder: (folder / LONG_NAME).symlink_to("bert"), {"bert_model": LONG_NAME},
     f"--bert_model or --task_name: .*{TOO_LONG}"),
    ("finetune", None, {"task_name": "mnli", "data_dir": "mnli", "output_dir": f"{LONG_NAME}nnn"},
     f"--output_dir: .*{TOO_LONG}"),
    ("finetune", None, {"output_dir": LONG_NAME * 2}, f"--output_dir: .*{TOO_LONG}"),
    ("finetune", None, {"output_dir": "/".join([LONG_NAME] * 17)}, f"--output_dir: .*{TOO_LONG}"),
    ("finetune", None, {"data_dir": LONG_NAME * 2}, "too long"),
    ("finetune", None, {"bert_model": LONG_NAME * 2}, "too long"),
    ("train", None, {"experiment_name": "é" * 120}, f"--checkpoint_dir: .*{TOO_LONG}"),  # 240 bytes
    ("train", None, {"train_features_path": LONG_NAME}, f"the features' paths: .*{TOO_LONG}"),
    ("train", None, {"distillation_logits_path": LONG_NAME * 2}, "too long"),
    ("logits", None, {"bert_checkpoint_dir": LONG_NAME}, f"--output_dir: .*{TOO_LONG}"),
    ("finetune", None, {"output_dir": NOT_UTF8}, r"caf\udce9' is not valid UTF-8"),
    ("finetune", None, {"data_dir": NOT_UTF8}, r"caf\udce9' is not valid UTF-8"),
    ("train", None, {"checkpoint_dir": NOT_UTF8}, "is not valid UTF-8"),
    ("train", None, {"experiment_name": NOT_UTF8}, "is not valid UTF-8"),
    *[(programs, None, {flag: name}, words)
      for programs, flag in (("export index score transfer", "output"), ("benchmark training", "output"),
                             ("predict reproduce quickstart", "output_dir"))
      for name, words in ((LONG_NAME * 2, "is too long for a file's name"), (NOT_UTF8, "is not valid UTF-8"))],
    # models
    ("finetune", text("bert/config.json", "{"), {}, "config.json: the model's configuration is not valid"),
    ("finetune train", edited("bert/config.json", model_type="roberta"), {}, "holds a roberta; expected a BERT"),
    ("finetune train", on("bert/model.safetensors", cut), {}, "is truncated or not a safetensors file"),
    ("finetune train", without("bert/model.safetensors"), {}, "has no weights; expected model.safetensors"),
    ("finetune train", without("bert/tokenizer.json"), {},
     "has no vocabulary; expected tokenizer.json or vocab.txt"),
    ("finetune train", vocabulary_txt(b"[PAD]\n\xff\n"), {}, "cannot be loaded ("),
    ("finetune train", vocabulary_txt(b""), {}, "does not fit its model: 0 entries"),
    ("finetune train", edited("bert/tokenizer.json", normalizer={"type": "Lowercase"}), {},
     "tokenizer with normalizer Lowercase, which does not honour --do_lower_case"),
    ("finetune train", edited("bert/tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []}), {},
     "has a BPE tokenizer"),
    ("finetune train", edited("bert/config.json", vocab_size=20), {},
     "does not fit its model: 102 entries for 20 embeddings"),
    ("logits", on("teacher/model.safetensors", flip), {}, "is corrupt or changed: its SHA-256 in training.json is"),
    ("logits", without("teacher/model.safetensors"), {}, "has no weights"),
    ("logits", text("features", "mine"), {}, "is not a feature cache of this project, so it is not overwritten"),
    # logits
    ("train", on("logits.pt", flip), {}, "not the tensor that logits.json describes"),
    ("train", on("logits.pt", cut), {}, "not the tensor that logits.json describes"),
    ("train", logits_cut_by_their_maker, {}, "not a whole logits file"),
    ("train", logits_alone(torch.ones(23, 2)), {},
     "floats of shape (24, 2), (rows, labels), found (torch.float32, (23, 2))"),
    ("train", logits_alone(torch.ones(24, 3)), {},
     "floats of shape (24, 2), (rows, labels), found (torch.float32, (24, 3))"),
    ("train", logits_alone({"logits": 1}), {}, "expected floats of shape (24, 2), (rows, labels), found dict"),
    ("train", logits_alone(torch.ones(24, 2).long()), {}, "found (torch.int64, (24, 2))"),
    ("train", logits_alone(torch.full((24, 2), float("nan"))), {}, "holds NaN or infinite logits"),
    ("train", edited("logits.json", task="rte"), {}, "(task: rte there, mrpc here)"),
    ("train", edited("logits.json", labels=["1", "0"]), {},
     "(labels: ['1', '0'] there, ['0', '1'] here)"),
    ("train", edited("logits.json", columns=[4, 3, 0]), {},
     "(columns: [4, 3, 0] there, [3, 4, 0] here)"),
    ("train", edited("logits.json", data=[{"file": "train.tsv", "sha256": "f" * 64}]), {}, "'sha256': 'ffff"),
    ("train", text("logits.json", "no"), {}, "the description of the logits is not valid JSON"),
    # checkpoints, students, indexes
    ("train", on("checkpoint.pt", flip), CHECKPOINT, "is truncated or not a checkpoint"),
    ("train example", on("checkpoint.pt", cut), CHECKPOINT, "is truncated or not a checkpoint"),
    ("train", saved("checkpoint.pt", [1]), CHECKPOINT, "was not written by dse_train_runner.py"),
    ("train example", saved("checkpoint.pt", {"weights": torch.ones(1)}), CHECKPOINT,
     "was not written by dse_train_runner.py"),
    ("example", without("checkpoint.pt"), {}, "--trainer_checkpoint: there is no file"),
    ("export", on("checkpoint.pt", flip), {}, "is truncated or not"),
    ("index", text("texts.txt", b"fine\ncaf\xe9\n"), {}, "texts.txt, line 2: byte 0xe9 is not valid UTF-8"),
    ("index", text("new_index/mine.txt", "mine"), {}, "holds other files (mine.txt)"),
    ("index", on("student/model.safetensors", flip), {}, "model.safetensors: corrupt or of another student"),
    ("score", replaced("student/config.json", "dse_version", "dse_versioj"), {},
     "config.json: corrupt or changed (its hash differs)"),
    ("score", edited("student/config.json", max_seq_length=31), {}, "this index was made by another model"),
    ("score", on("index/vectors.bin", flip), {}, "vectors.bin: corrupt in rows 0 to 1"),
    ("score", on("index/vectors.bin", cut), {}, "vectors.bin: missing or truncated"),
    ("score", on("index/index.json", flip), {}, "index"),
    ("score", without("index/index.json"), {}, "no index of candidates: index.json is missing"),
    ("score", text("texts.txt", b"\xff"), {}, "texts.txt, line 1: byte 0xff is not valid UTF-8"),
]  # fmt: skip
NO_GPU = [
    ("finetune logits train", None, {"fp16": True}, "--precision fp16: needs a CUDA device"),
    ("finetune logits train", None, {"precision": "tf32"}, "--precision tf32: needs a CUDA device"),
    ("finetune logits train", None, {"fp16": True, "bf16": True}, "--bf16: give only one of --precision, --fp16"),
    ("finetune logits train", None, {"precision": "fp32", "fp16": True}, "--fp16: give only one of --precision"),
]


def each_alone(cases: list, marks: tuple = ()) -> list:
    """A test for each program of a line."""
    found = []
    for programs, spoil, changes, words in cases:
        for program in [programs] if programs in WHOLE else programs.split():
            name = f"{program}-{words[:60]}".encode("ascii", "backslashreplace").decode()
            found.append(pytest.param(program, spoil, changes, words, id=name, marks=marks))
    return found


WHOLE = ("benchmark training",)
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.mark.parametrize(
    ("program", "spoil", "changes", "words"), [*each_alone(CASES), *each_alone(NO_GPU, (WITHOUT_GPU,))]
)
def test_refused(program, spoil, changes, words, world, tmp_path, monkeypatch, capsys):
    folder = world
    if spoil is not None:
        folder = Path(shutil.copytree(world, tmp_path / "world"))
        spoil(folder)
    monkeypatch.chdir(folder)
    before, places = contents(folder), set(folder.rglob("*"))
    capsys.readouterr()
    argv = argv_of(folder, program, **changes)
    main = MAINS.get(program) or command_main(*program.split())
    with pytest.raises(SystemExit) as stop:
        main(argv)
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if "error: " in line]
    assert stop.value.code == 2
    assert len(lines) == 1
    start, _, end = words.partition(".*")
    assert start in lines[0]
    assert end in lines[0].partition(start)[2]
    assert lines[0].isprintable()
    assert SECRET not in output.err + output.out
    assert "Traceback" not in output.err + output.out
    new = [path for path in set(folder.rglob("*")) - places if not path.name.startswith(("train_", "dev_"))]  # caches
    assert new == []
    found = contents(folder)
    assert {name: found.get(name) for name in before} == before


def test_a_casing_that_does_not_reach_the_normalizer(refused, student_flags, monkeypatch):
    """transformers' own failing, as AutoTokenizer shows it for some tokenizer classes: the flag is ignored."""
    load = BertTokenizer.from_pretrained
    monkeypatch.setattr(BertTokenizer, "from_pretrained", lambda folder, do_lower_case: load(folder))
    assert "cannot be loaded as cased (no --do_lower_case): its normalizer is" in refused(
        dse_train_runner.main, student_flags(do_lower_case=False)
    )


def test_plotting_without_matplotlib(refused, student_flags, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--plot_metrics: matplotlib is not installed" in refused(
        dse_train_runner.main, student_flags(plot_metrics=True)
    )


SCRIPTS = ("download_glue_data", "finetune_bert", "run_distillation_logits_creator", "dse_train_runner",
           "load_dse_checkpoint_example")  # fmt: skip


def test_help_and_refusals_come_without_torch(bert, data):
    """In one new process: -h of all scripts, then a refusal of flags, of data and of a model folder."""
    code = f"""
import importlib, sys
def left_with(script, argv):
    try:
        importlib.import_module(script).main(argv)
    except SystemExit as stop:
        return stop.code
codes = [left_with(script, ["-h"]) for script in {SCRIPTS!r}]
common = ["--task_name", "mrpc", "--do_train", "--output_dir", "/tmp/none", "--bert_model"]
codes.append(left_with("finetune_bert", common + ["x", "--data_dir", "x", "--max_seq_length", "1"]))
codes.append(left_with("finetune_bert", common + ["x", "--data_dir", "/no"]))
codes.append(left_with("finetune_bert", common + ["./x", "--data_dir", {str(data("mrpc"))!r}]))
common = [{str(bert)!r}, "--data_dir", {str(data("mrpc"))!r}, "--max_seq_length", "99"]
codes.append(left_with("finetune_bert", ["--task_name", "mrpc", "--do_train", "--output_dir", "/tmp/none",
                                         "--bert_model"] + common))
print(codes, "torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LONG)
    assert run.stdout.splitlines()[-1] == f"{[0] * 5 + [2] * 4} False", run.stderr
    assert run.stdout.count("usage: ") == 5
