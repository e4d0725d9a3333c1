"""Bad input: one clear line, exit code 2, nothing done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import LONG

import download_glue_data
import dse_train_runner
import finetune_bert
import load_dse_checkpoint_example
import run_distillation_logits_creator
from dse.system import files

ROOT = Path(__file__).parents[1]
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
    "no hub name either": ({"bert_model": "no_such_model"}, "no_such_model is not a local folder, and the hub did not"),
    "a model that is a file": ({"bert_model": __file__}, "is a file; expected the folder of a BERT"),
    "a folder that is no model": ({"bert_model": str(ROOT)}, "is not a model folder: no config.json"),
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
    spoil_weights: "is truncated or not a safetensors file",
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
    "rows": "floats of shape (24, 2), (rows, labels), found (torch.float32, (23, 2))",
    "width": "floats of shape (24, 2), (rows, labels), found (torch.float32, (24, 3))",
    "dict": "expected floats of shape (24, 2), (rows, labels), found dict",
    "integers": "found (torch.int64, (24, 2))",
    "nan": "holds NaN or infinite logits",
    "task": "(task: rte there, mrpc here)",
    "labels": "(labels: ['1', '0'] there, ['0', '1'] here)",
    "columns": "(columns: [4, 3, 0] there, [3, 4, 0] here)",
    "data": "'sha256': 'ffff",
}


@pytest.mark.parametrize(("how", "message"), LOGITS.items(), ids=LOGITS)
def test_logits(how, message, refused_student, logits, copied, edit_json):
    folder = copied(logits("mrpc").parent)
    spoiled_logits(folder, edit_json, how)
    assert message in refused_student(distillation_logits_path=folder / "mrpc_logits.pt")


def test_logits_of_another_task_of_the_same_shape(refused_student, logits):
    line = refused_student("rte", distillation_logits_path=logits("mrpc"))
    assert "(task: mrpc there, rte here)" in line


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


def test_a_json_line_per_epoch_is_json(tmp_path):
    from dse.training.reporting import append_json_line

    append_json_line(tmp_path / "log.jsonl", {"epoch": 0, "train": {"pearson": float("nan")}})
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"epoch": 0, "train": {"pearson": None}}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError), files.atomic_write(tmp_path / "file") as beside:
        beside.write_text("ne")
        raise RuntimeError
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
