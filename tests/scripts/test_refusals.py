"""Bad input: one clear line, exit code 2, nothing done."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import NAMED, as_flags, command_main, names_of
from processes import LONG, ROOT

import download_glue_data
import dse_train_runner
import finetune_bert
import load_dse_checkpoint_example
import run_distillation_logits_creator
from dse import __main__ as commands
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier
from dse.system import files
from dse.system.errors import InputError
from dse.system.files import sha256_json

UNWRITABLE = f"{__file__}/nowhere"  # below a file, where even root makes no folder


@pytest.fixture
def refused_teacher(refused, teacher_flags):
    return lambda name="mrpc", **changes: refused(finetune_bert.main, teacher_flags(name, **changes))


@pytest.fixture
def refused_student(refused, student_flags):
    return lambda name="mrpc", **changes: refused(dse_train_runner.main, student_flags(name, **changes))


@pytest.fixture
def creator_flags(data, teacher_flags, tmp_path):
    """Flags of run_distillation_logits_creator.py over a teacher made for the test."""
    from conftest import as_flags

    finetune_bert.main(teacher_flags(num_train_epochs=1, do_eval=False))

    def flags(**changes):
        values = {"task_name": "mrpc", "data_dir": data("mrpc"), "do_lower_case": True, "max_seq_length": 48}
        values |= {"train_features_path": tmp_path / "features", "bert_checkpoint_dir": tmp_path / "teacher"}
        return as_flags({**values, "output_dir": tmp_path / "logits", **changes})

    return flags


TEACHER = {
    "task": ({"task_name": "mrcp"}, "unknown task 'mrcp'; known: mrpc, qqp"),
    "own task that is not there": ({"task_name": "no.json"}, "no.json: cannot read the task description"),
    "no data folder": ({"data_dir": "/no/such"}, "--data_dir: /no/such is not a folder"),
    "no model folder": ({"bert_model": "./no/such"}, "--bert_model: there is no folder ./no/such"),
    "no hub name either": ({"bert_model": "no_such_model"}, "no_such_model is no local folder, and the hub did not"),
    "a model that is a file": ({"bert_model": __file__}, "is a file; expected the folder of a BERT"),
    "a folder that is no model": ({"bert_model": str(ROOT)}, "is no model folder: no config.json"),
    "length below 4": ({"max_seq_length": 3}, "--max_seq_length: 3 is below 4"),
    "length above the positions": ({"max_seq_length": 65}, "65 is above the model's 64 positions"),
    "accumulation": ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps: 0 is below 1"),
    "accumulation above the batch": ({"gradient_accumulation_steps": 9}, "leaves no pair per step"),
    "warm-up": ({"warmup_proportion": 1.5}, "--warmup_proportion: 1.5 is outside [0, 1]"),
    "epochs": ({"num_train_epochs": 2.5}, "2.5 is not a whole number of epochs"),
    "rate": ({"learning_rate": 0}, "--learning_rate: 0 is not above 0"),
    "rate that is no number": ({"learning_rate": "fast"}, "'fast' is not a number"),
    "nothing to do": ({"do_train": False, "do_eval": False}, "give --do_train, --do_eval or both"),
    "unwritable output": ({"output_dir": UNWRITABLE}, "--output_dir: cannot write in"),
    "unwritable log": ({"file_log": True, "log_dir": UNWRITABLE}, "--log_dir: cannot write in"),
    "evaluation of an untrained model": ({"do_train": False}, "not a fine-tuned teacher: classifier.bias"),
}


STUDENT = {
    "task": ({"task_name": "mrcp"}, "unknown task 'mrcp'"),
    "single sentences": ({"task_name": "cola"}, "cola has one sentence per row, and DSE scores pairs"),
    "single sentences too": ({"task_name": "sst-2"}, "sst-2 has one sentence per row"),
    "a task without training data": ({"task_name": "diagnostic", "fc_dims": 3}, "diagnostic has no train file"),
    "last size": ({"fc_dims": [8, 2]}, "the last size is 2, mrpc (binary) needs 1: try --fc_dims 8 1"),
    "size 0": ({"fc_dims": [0, 1]}, "--fc_dims: 0 is below 1"),
    "pooler": ({"pooler_type": "mean"}, "--pooler_type: invalid choice: 'mean' (choose from"),
    "head": ({"siamese_head_type": "cosine"}, "invalid choice: 'cosine' (choose from 'concat', 'dot')"),
    "layers": ({"pooler_num_top_hidden_layers": 3}, "3 is above the model's 2 layers: give 2 or less"),
    "no layers": ({"pooler_num_top_hidden_layers": 0}, "0 is below 1"),
    "additional layer": ({"additional_embedding_layer_size": -2}, "-2 is not a size: give 1 or more, or -1"),
    "seed": ({"random_seed": 2**63}, "is above 9223372036854775807"),
    "one cache for two sets": ({"train_features_path": "x", "dev_features_path": "x"}, "x serves two sets"),
    "length": ({"max_seq_length": 1000}, "1000 is above the model's 64 positions"),
    "accumulation": ({"gradient_accumulation_steps": 0}, "0 is below 1"),
    "coefficient": ({"distillation_coeff": -0.1}, "--distillation_coeff: -0.1 is outside [0, 1]"),
    "coefficient NaN": ({"distillation_coeff": "nan"}, "'nan' is not a number"),
    "warm-up": ({"warmup_proportion": 2}, "--warmup_proportion: 2 is outside [0, 1]"),
    "threshold 0": ({"tune_positive_thresholds": [0.5, 0]}, "0 is outside (0, 1)"),
    "threshold 1": ({"tune_positive_thresholds": 1}, "1 is outside (0, 1)"),
    "experiment": ({"experiment_name": "a/b"}, "'a/b' becomes part of file names"),
    "experiment above": ({"experiment_name": ".."}, "'..' becomes part of file names"),
    "unwritable checkpoints": ({"checkpoint_dir": UNWRITABLE}, "--checkpoint_dir: cannot write in"),
    "unwritable plots": ({"plot_metrics": True, "plots_dir": UNWRITABLE}, "--plots_dir: cannot write in"),
    "unwritable cache": ({"dev_features_path": f"{UNWRITABLE}/dev"}, "the feature cache"),
    "no logits": ({"distillation_logits_path": "no.pt"}, "there is no file no.pt; run_distillation_logits_creator.py"),
    "foreign logits": ({"distillation_logits_path": __file__}, "no whole logits file"),
    "no checkpoint": ({"trainer_checkpoint": "no.pt"}, "--trainer_checkpoint: there is no file no.pt"),
    "foreign checkpoint": ({"trainer_checkpoint": __file__}, "is truncated or not a checkpoint of dse_train_runner.py"),
}


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@pytest.mark.parametrize(("changes", "message"), TEACHER.values(), ids=TEACHER)
def test_teacher(changes, message, refused_teacher, tmp_path):
    assert message in refused_teacher(**changes)
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(("changes", "message"), STUDENT.values(), ids=STUDENT)
def test_student(changes, message, refused_student, tmp_path):
    assert message in refused_student(**changes)
    assert not (tmp_path / "checkpoints").exists()


@NO_GPU
def test_fp16_without_cuda(refused_teacher, refused_student):
    for refused_line in (refused_teacher(fp16=True), refused_student(fp16=True)):
        assert "--fp16: needs a CUDA device" in refused_line
    for refused_line in (refused_teacher(fp16=True, bf16=True), refused_student(fp16=True, bf16=True)):
        assert "--bf16: give it or --fp16, not both" in refused_line


BAD_DATA = {
    "missing": (None, "cannot read the data of mrpc (No such file or directory)"),
    "empty": (b"", "no rows of data in it"),
    "only a header": (b"header\n", "no rows of data in it"),
    "too few columns": (b"header\n1\t2\n", "train.tsv, line 2: at least 5 columns expected, found 2"),
    "label": (b"header\n2\t\t\ta\tb\n", "train.tsv, line 2: label '2' is not one of mrpc's: 0, 1"),
    "no UTF-8": (b"header\n1\t\t\t\xe9\tb\n", "train.tsv, line 2: byte 0xe9 is not valid UTF-8"),
}


@pytest.mark.parametrize(("content", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_data(content, message, refused_teacher, refused_student, data, copied):
    folder = copied(data("mrpc"))
    (folder / "train.tsv").unlink()
    if content is not None:
        (folder / "train.tsv").write_bytes(content)
    assert message in refused_teacher(data_dir=folder)
    assert message in refused_student(data_dir=folder)


def test_a_score_that_is_no_number(refused_student, data, copied):
    folder = copied(data("sts-b"))
    text = (folder / "dev.tsv").read_text().splitlines()
    text[3] = text[3].rsplit("\t", 1)[0] + "\thigh"
    (folder / "dev.tsv").write_text("\n".join(text))
    assert "dev.tsv, line 4: score 'high' is not a number" in refused_student("sts-b", data_dir=folder)


def test_training_into_a_folder_that_is_not_empty(refused_teacher, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "is not empty; give --overwrite_output_dir" in refused_teacher(output_dir=tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def spoil_config(folder, edit):
    edit(folder / "config.json", model_type="roberta")


def spoil_weights(folder, edit):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])


def remove_weights(folder, edit):
    (folder / "model.safetensors").unlink()


def remove_vocabulary(folder, edit):
    (folder / "tokenizer.json").unlink()


def other_normalizer(folder, edit):
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


def other_tokenizer(folder, edit):
    edit(folder / "tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": []})


def small_vocabulary(folder, edit):
    edit(folder / "config.json", vocab_size=20)


def spoiled_vocabulary(folder, edit):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")


def empty_vocabulary(folder, edit):
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_bytes(b"")


MODELS = {
    spoiled_vocabulary: "cannot be loaded (",
    empty_vocabulary: "does not fit its model: 0 entries",
    spoil_config: "holds a roberta; expected a BERT",
    spoil_weights: "is truncated or no safetensors file",
    remove_weights: "has no weights; expected model.safetensors",
    remove_vocabulary: "has no vocabulary; expected tokenizer.json or vocab.txt",
    other_normalizer: "tokenizer with normalizer Lowercase, which does not honour --do_lower_case",
    other_tokenizer: "has a BPE tokenizer",
    small_vocabulary: "does not fit its model: 102 entries for 20 embeddings",
}


@pytest.mark.parametrize(("spoil", "message"), MODELS.items())
def test_models(spoil, message, refused_teacher, refused_student, bert, copied, edit_json):
    folder = copied(bert)
    spoil(folder, edit_json)
    assert message in refused_teacher(bert_model=folder)
    assert message in refused_student(bert_model=folder)


def test_a_casing_that_does_not_reach_the_normalizer(refused_student, monkeypatch):
    """transformers' own failing, as AutoTokenizer shows it for some tokenizer classes: the flag is ignored."""
    from transformers import BertTokenizer

    load = BertTokenizer.from_pretrained
    monkeypatch.setattr(BertTokenizer, "from_pretrained", lambda folder, do_lower_case: load(folder))
    assert "does not honour no --do_lower_case (cased): its normalizer is" in refused_student(do_lower_case=False)


def test_logits_creator(creator_flags, refused, tmp_path, data):
    cases = [
        ({"task_name": "cola"}, "cola has one sentence per row"),
        ({"task_name": "rte", "data_dir": data("rte")}, "its labels in order are ['0', '1'], those of rte are"),
        ({"task_name": "mnli", "data_dir": data("mnli")}, "gives 2 logits, and mnli needs 3: contradiction, ent"),
        ({"bert_checkpoint_dir": "bert-base-uncased"}, "--bert_checkpoint_dir: there is no folder bert-base-uncased"),
        ({"bert_checkpoint_dir": tmp_path / "no"}, "--bert_checkpoint_dir: there is no folder"),
        ({"train_features_path": __file__}, "is not a feature cache of this project, so it is not overwritten"),
        ({"output_dir": UNWRITABLE}, "--output_dir: cannot write in"),
        ({"max_seq_length": 99}, "99 is above the model's 64 positions"),
        ({"batch_size": 0}, "--batch_size: 0 is below 1"),
    ]
    for changes, message in cases:
        assert message in refused(run_distillation_logits_creator.main, creator_flags(**changes))
    assert not (tmp_path / "logits").exists()


def test_a_teacher_folder_without_classifier(creator_flags, refused, bert):
    line = refused(run_distillation_logits_creator.main, creator_flags(bert_checkpoint_dir=bert))
    assert "not a fine-tuned teacher: classifier.bias, classifier.weight missing" in line


def spoiled_logits(folder: Path, edit, how: str) -> None:
    path = folder / "mrpc_logits.pt"
    about = path.with_suffix(".json")
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:700])
        edit(about, sha256=files.sha256_file(path))
    elif how == "flipped":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif how in ("rows", "width", "dict", "nan", "integers"):
        shape = {"rows": (23, 2), "width": (24, 3)}.get(how, (24, 2))
        value = {"logits": 1} if how == "dict" else torch.full(shape, float("nan") if how == "nan" else 1.0)
        torch.save(value.long() if how == "integers" else value, path)
        about.unlink()
    else:
        others = {"task": "rte", "labels": ["1", "0"], "columns": [4, 3, 0]}
        others["data"] = [{"file": "train.tsv", "sha256": "f" * 64}]
        edit(about, **{how: others[how]})


LOGITS = {
    "truncated": "no whole logits file",
    "flipped": "not the tensor that mrpc_logits.json describes",
    "rows": "logits of shape (23, 2), but the training data needs (24, 2)",
    "width": "logits of shape (24, 3), but the training data needs (24, 2)",
    "dict": "expected a tensor of floats of shape (24, 2), found a dict",
    "integers": "found a tensor of torch.int64",
    "nan": "holds NaN or infinite logits",
    "task": "the task: rte there, mrpc here",
    "labels": "the labels in order: ['1', '0'] there, ['0', '1'] here",
    "columns": "the columns of the two texts and the label: [4, 3, 0] there, [3, 4, 0] here",
    "data": "'sha256': 'ffff",
}


@pytest.mark.parametrize(("how", "message"), LOGITS.items(), ids=LOGITS)
def test_logits(how, message, refused_student, logits, copied, edit_json):
    folder = copied(logits("mrpc").parent)
    spoiled_logits(folder, edit_json, how)
    assert message in refused_student(distillation_logits_path=folder / "mrpc_logits.pt")


def test_logits_of_another_task_of_the_same_shape(refused_student, logits):
    line = refused_student("rte", distillation_logits_path=logits("mrpc"))
    assert "the task: mrpc there, rte here" in line


@pytest.fixture
def trained(student_flags, checkpoints) -> Path:
    dse_train_runner.main(student_flags(epochs=1))
    return checkpoints()[-1]


def test_checkpoints(trained, refused, refused_student, tmp_path):
    short = tmp_path / "short.pt"
    short.write_bytes(trained.read_bytes()[:-1000])
    foreign = tmp_path / "foreign.pt"
    torch.save({"weights": torch.ones(1)}, foreign)
    for path, message in (
        (short, "is truncated or not a checkpoint"),
        (foreign, "was not written by dse_train_runner.py"),
    ):
        argv = ["--task_name", "mrpc", "--trainer_checkpoint", path]
        assert message in refused(load_dse_checkpoint_example.main, argv)
        assert message in refused_student(trainer_checkpoint=path)


def test_a_checkpoint_of_another_task(trained, refused, refused_student):
    message = "rte ['entailment', 'not_entailment'] was given, but the checkpoint is of mrpc ['0', '1']"
    argv = ["--task_name", "rte", "--trainer_checkpoint", trained]
    assert message in refused(load_dse_checkpoint_example.main, argv)
    assert "--task_name: rte now, mrpc in the run" in refused_student("rte", trainer_checkpoint=trained)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fc_dims", "9", "1"], "--fc_dims: [9, 1] was given, but the checkpoint was trained with [8, 1]"),
        (["--max_seq_length", "64"], "--max_seq_length: 64 was given, but the checkpoint was trained with 32"),
        (["--siamese_head_type", "dot"], "dot was given, but the checkpoint was trained with concat"),
        (["--bert_model", "other"], "--bert_model: other was given, but the checkpoint was trained with"),
        (["--freeze_bert"], "--freeze_bert: True was given, but the checkpoint was trained with False"),
    ],
)
def test_the_example_with_flags_that_disagree(flags, message, trained, refused):
    argv = ["--task_name", "mrpc", "--trainer_checkpoint", trained, *flags]
    assert message in refused(load_dse_checkpoint_example.main, argv)


def test_going_on_with_changed_flags(trained, refused_student, student_flags):
    for changes, message in (
        ({"lr": 0.5}, "--lr: 0.5 now, 0.001 in the run"),
        ({"fc_dims": [16, 1]}, "--fc_dims: [16, 1] now, [8, 1] in the run"),
        ({"freeze_bert": True}, "--freeze_bert: True now, False in the run"),
        ({"patience": 3}, "--patience: 3 now, None in the run"),
    ):
        assert message in refused_student(trainer_checkpoint=trained, **changes)
    dse_train_runner.main(student_flags(epochs=2, trainer_checkpoint=trained))  # --epochs may change


def test_going_on_with_harmless_spellings(trained, student_flags, data, checkpoints):
    spelled = {"data_dir": f"{data('mrpc')}/", "task_name": "MRPC"}
    dse_train_runner.main(student_flags(**spelled, epochs=2, trainer_checkpoint=trained))
    assert checkpoints()[-1].name.endswith("_epoch_1.pt")


def test_going_on_from_a_checkpoint_that_is_not_the_newest(trained, refused_student, student_flags, checkpoints):
    older = trained.rename(trained.with_name(trained.name.replace("epoch_0", "epoch_00")))
    newer = older.with_name(older.name.replace("epoch_00", "epoch_5"))
    newer.write_bytes(older.read_bytes())
    assert f"{older} is not the newest, {newer} is" in refused_student(trainer_checkpoint=older, epochs=2)


def test_going_on_with_nothing_to_do_says_so(trained, student_flags, caplog):
    dse_train_runner.main(student_flags(epochs=1, trainer_checkpoint=trained))
    assert "nothing to train: 1 epochs are done, --epochs is 1" in caplog.text


def test_an_own_task_whose_columns_changed(student_flags, refused_student, data, tmp_path, checkpoints):
    path = tmp_path / "mine.json"
    task = {"kind": "binary", "labels": ["0", "1"], "text_a": 3, "text_b": 4, "label": 0}
    path.write_text(json.dumps(task))
    bare = tmp_path / "bare.pt"
    torch.save(torch.zeros(24, 2), bare)
    flags = {"data_dir": data("mrpc"), "distillation_logits_path": bare, "epochs": 1}
    dse_train_runner.main(student_flags(str(path), **flags))
    path.write_text(json.dumps({**task, "text_a": 4, "text_b": 3}))
    line = refused_student(str(path), **{**flags, "epochs": 2}, trainer_checkpoint=checkpoints()[-1])
    assert "--task_name: text_a is 4 now, and was 3 in the run" in line


def test_going_on_with_changed_data(trained, refused_student, data, logits, student_flags, tmp_path):
    dev = data("mrpc") / "dev.tsv"
    original = dev.read_bytes()
    try:
        dev.write_bytes(original.replace(b"doctor", b"medic"))
        assert "--data_dir: the dev data is [{" in refused_student(trainer_checkpoint=trained)
    finally:
        dev.write_bytes(original)


def test_plotting_without_matplotlib(refused_student, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--plot_metrics: matplotlib is not installed" in refused_student(plot_metrics=True)


def test_download(refused, tmp_path):
    line = refused(download_glue_data.main, ["--tasks", "MRPC,SQUAD", "--data_dir", tmp_path])
    assert "unknown 'SQUAD'; known: all, CoLA" in line
    line = refused(download_glue_data.main, ["--tasks", "MRPC", "--path_to_mrpc", tmp_path, "--data_dir", tmp_path])
    assert "no msr_paraphrase_train.txt in" in line
    assert "cannot write in" in refused(download_glue_data.main, ["--data_dir", UNWRITABLE])
    for url in (
        "glue/data",
        "ftp://host/x",
        "file:///x",
        "http://",
        "http://host:port/",
        "http://user:pass/word@host",
        "http://user:12/word@host/",
    ):
        for flag in ("--base_url", "--snli_url"):
            line = refused(download_glue_data.main, [flag, url, "--data_dir", tmp_path])
            assert f"{flag}: not an address such as https://" in line
            assert "word" not in line
    assert "word" not in refused(download_glue_data.main, ["--base-url", "http://user:word@host/"])
    line = refused(download_glue_data.main, ["--base_url", "https://host/glue?sig=word", "--data_dir", tmp_path])
    assert "--base_url" in line and "word" not in line


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


# What reaches the terminal

# (name, script, flags, header of train.tsv, part of the line); MINE is the own task above, DATA its folder
MINE, DATA = "mine.json", "."


LINES = [
    (
        "a header",
        finetune_bert,
        ["--task_name", MINE],
        "q\x1b[2J\ta",
        r"no column 'q' in the header, which has q\x1b[2J, a",
    ),
    ("a column of the JSON", finetune_bert, ["--task_name", MINE], "\x9b1m\tq", r"which has \x9b1m, q"),
    ("a path", finetune_bert, ["--task_name", "no\x07\u202e.json"], "", r"no\x07\u202e.json: cannot read the task"),
    ("an unknown flag", finetune_bert, ["--\x1b]0;x\x07"], "", r"unrecognized arguments: --\x1b]0;x\x07"),
    ("NUL in a path", finetune_bert, ["--data_dir", "a\0b"], "", r"'a\x00b' has a NUL character"),
    ("NUL in a task", finetune_bert, ["--task_name=a\0b.json"], "", r"'--task_name=a\x00b.json' has a NUL character"),
    ("NUL in a folder", download_glue_data, ["--path_to_mrpc", "a\0b"], "", "has a NUL character"),
    ("NUL of a command", commands, ["index", "--model", "a\0b"], "", r"'a\x00b' has a NUL character"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "script", "flags", "header", "expected"), LINES, ids=names_of(LINES))
def test_lines_for_the_terminal(name, script, flags, header, expected, refused, tmp_path, monkeypatch, bert):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MINE).write_text(json.dumps(NAMED))
    (tmp_path / "train.tsv").write_text(f"{header}\nx\ty\n")
    if script is finetune_bert:
        common = {"task_name": MINE, "data_dir": DATA, "bert_model": bert, "do_train": True, "output_dir": "out"}
        flags = [*as_flags(common), *flags]
    line = refused(script.main, flags)
    assert expected in line
    assert line.isprintable()


LONG_NAME = "n" * 250  # a name of its own, and too long with what is added


NOT_UTF8 = os.fsdecode(b"caf\xe9")


def test_18_names_that_are_too_long_for_their_files(teacher_flags, student_flags, refused, bert, tmp_path):
    """Before any work, though only the names of states, logits and caches would be too long: 255 bytes, in UTF-8."""
    (tmp_path / LONG_NAME).symlink_to(bert)
    student = {"experiment_name": "é" * 120}  # 240 bytes
    logits = [
        "--task_name",
        "mrpc",
        "--data_dir",
        "x",
        "--train_features_path",
        tmp_path / "x",
        "--output_dir",
        tmp_path,
    ]
    for main, argv, flag in (
        (finetune_bert.main, teacher_flags(bert_model=tmp_path / LONG_NAME), "--bert_model or --task_name: "),
        (finetune_bert.main, teacher_flags("mnli", output_dir=tmp_path / f"{LONG_NAME}nnn"), "--output_dir: "),
        (finetune_bert.main, teacher_flags(output_dir=tmp_path / f"{LONG_NAME}{LONG_NAME}"), "--output_dir: "),
        (finetune_bert.main, teacher_flags(output_dir=tmp_path / "/".join([LONG_NAME] * 17)), "--output_dir: "),
        (dse_train_runner.main, student_flags(**student), "--checkpoint_dir: "),
        (dse_train_runner.main, student_flags(train_features_path=tmp_path / LONG_NAME), "the features' paths: "),
        (
            run_distillation_logits_creator.main,
            [*logits, "--bert_checkpoint_dir", tmp_path / LONG_NAME],
            "--output_dir: ",
        ),
    ):
        line = refused(main, argv)
        assert flag in line
        assert "is too long for a file's name, or its path is" in line
    assert not any(path.name != LONG_NAME for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "flag", "others"),
    [
        ("export", "--output", ["--trainer_checkpoint", __file__]),
        ("index", "--output", ["--model", "x", "--candidates", __file__]),
        ("score", "--output", ["--model", "x", "--candidates", __file__, "--queries", __file__]),
        ("transfer", "--output", ["--model", "x", "--data_dir", "."]),
        ("benchmark", "--output", ["scoring", "--task_name", "mrpc", "--data_dir", "x"]),
        ("predict", "--output_dir", ["--model", "x", "--task_name", "mrpc", "--data_dir", "x"]),
        ("reproduce", "--output_dir", ["--bert_model", "x"]),
        ("quickstart", "--output_dir", []),
    ],
)
def test_18_commands(name, flag, others, refused, tmp_path):
    for bad, message in ((LONG_NAME * 2, "is too long for a file's name"), (NOT_UTF8, "is not valid UTF-8")):
        assert message in refused(command_main(name), [*others, flag, tmp_path / bad])
    assert not any(tmp_path.iterdir())


def test_18_names_that_are_not_utf8(teacher_flags, student_flags, refused, data, tmp_path):
    """Of outputs, and of inputs too: the model card tells them. From a folder of such a name too."""
    for changes in ({"output_dir": tmp_path / NOT_UTF8}, {"data_dir": tmp_path / NOT_UTF8}):
        assert "caf\\udce9' is not valid UTF-8" in refused(finetune_bert.main, teacher_flags(**changes))
    for changes in ({"checkpoint_dir": tmp_path / NOT_UTF8}, {"experiment_name": NOT_UTF8}):
        assert "is not valid UTF-8" in refused(dse_train_runner.main, student_flags(**changes))
    (tmp_path / NOT_UTF8).mkdir()
    before = Path.cwd()
    try:
        os.chdir(tmp_path / NOT_UTF8)
        with pytest.raises(InputError, match=r"--x: .*is not valid UTF-8"):
            files.check_writable("here", "--x")
    finally:
        os.chdir(before)


def test_18_an_input_whose_name_is_too_long(teacher_flags, student_flags, refused):
    for changes in ({"data_dir": LONG_NAME * 2}, {"bert_model": LONG_NAME * 2}):
        assert "too long" in refused(finetune_bert.main, teacher_flags(**changes))
    assert "too long" in refused(dse_train_runner.main, student_flags(distillation_logits_path=LONG_NAME * 2))


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
    ("train", rows(GOOD), {}, "the number of rows: 24 there, 1 here"),
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
    ("finetune", on("bert/model.safetensors", cut), NEW, "is truncated or no safetensors file"),
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
    ("score", without("index/index.json"), {}, "no index of candidates (index.json is missing)"),
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
