"""`python -m dse reproduce`: the stages of a small comparison, what is skipped, and the numbers of the tables."""

import json
import math
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers import NAMED, own_task, write_task
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

import dse_train_runner
import finetune_bert
import run_distillation_logits_creator
from dse import __main__ as entry
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.experiments import presets, reproduction, results, stages
from dse.experiments.baselines import SentenceBert
from dse.experiments.synthetic import make_pair
from dse.storage import states
from dse.storage.student_folder import read_config
from dse.system.errors import RunError
from dse.system.files import sha256_file
from dse.training import trainer

TINY = presets.Preset(
    {"mrpc": (1, 2), "snli": (1,), "sts-b": (1,)},
    teacher={"learning_rate": "2e-3", "num_train_epochs": 8, "train_batch_size": 8},
    student={"lr": "1e-3", "epochs": 2, "pooler_num_top_hidden_layers": 2, "batch_size": 8},
    max_seq_length=48,
)


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """Tiny MRPC (with Microsoft's test file), SNLI and STS-B in one folder."""
    folder = tmp_path_factory.mktemp("glue_data")
    for name in TINY.seeds:
        task = get_task(name)
        write_task(folder / task.folder, task, rows=48)
    shutil.copy(folder / "MRPC" / "dev.tsv", folder / "MRPC" / "msr_paraphrase_test.txt")
    return folder


def use_tiny_preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "small", TINY)
    monkeypatch.setattr(reproduction, "has_sentence_transformers", lambda: False)


def record_calls(monkeypatch) -> list[str]:
    """Names of the scripts that are run, in order."""
    seen = []
    for script in (finetune_bert, run_distillation_logits_creator, dse_train_runner):
        monkeypatch.setattr(
            script, "run", lambda args, own=script.run, name=script.PROG: (seen.append(name), own(args))[1]
        )
    return seen


def reproduce(argv: list[str]) -> None:
    entry.main(["reproduce", *map(str, argv)])


def flags_for(glue, bert, folder) -> list[str]:
    return ["--data_dir", str(glue), "--bert_model", str(bert), "--output_dir", str(folder), "--call", "snli=SICK"]


@pytest.fixture
def flags(glue, bert, tmp_path, monkeypatch):
    use_tiny_preset(monkeypatch)
    monkeypatch.setattr(results, "draw", lambda *_: None)  # which takes longer than all else
    return flags_for(glue, bert, tmp_path / "results")


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch)


@pytest.fixture(scope="module")
def whole(glue, bert, tmp_path_factory):
    """The whole comparison, run once: its folder, and the scripts that made it."""
    folder = tmp_path_factory.mktemp("whole") / "results"
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiny_preset(monkeypatch)
        seen = record_calls(monkeypatch)
        reproduce(flags_for(glue, bert, folder))
    return folder, seen


@pytest.fixture
def finished(whole, flags, tmp_path):
    """A copy of its folder, to which the flags go on."""
    return shutil.copytree(whole[0], tmp_path / "results")


def degradation_by_hand(folder):
    """Of each task the mean over its seeds, then the mean over tasks."""
    by_task: dict = {}
    for run, metric in [
        ("mrpc_seed1", "f1"),
        ("mrpc_seed2", "f1"),
        ("snli_seed1", "accuracy"),
        ("sts-b_seed1", "pearson"),
    ]:
        teacher, student = (
            json.loads((folder / run / f"{stage}.json").read_text())["metrics"]["dev"][metric]
            for stage in ("teacher", "dse")
        )
        if teacher:  # nothing can be compared with a 0
            by_task.setdefault(run[:4], []).append((teacher - student) / teacher)
    return np.mean([np.mean(values) for values in by_task.values()])


def coefficient_flag(folder, stage):
    """The value after the flag in the stage's command; None where it is not given."""
    command = json.loads((folder / f"{stage}.json").read_text())["command"]
    return command[command.index("--distillation_coeff") + 1] if "--distillation_coeff" in command else None


def test_the_whole_comparison_and_a_second_call(whole, finished, flags, calls):
    folder = finished
    assert whole[1] == [
        "finetune_bert.py", "run_distillation_logits_creator.py", *["dse_train_runner.py"] * 3,
    ] * 4  # fmt: skip
    found = json.loads((folder / "results.json").read_text())
    assert next(iter(found)) == "average_relative_degradation"
    assert found["complete"] is True
    assert found["average_relative_degradation"] == pytest.approx(degradation_by_hand(folder))
    assert set(found["tasks"]) == {"MRPC", "SICK", "STS-B"}

    names = [*(f"{name}_by_epoch.png" for name in found["tasks"]), "speed.png"]
    assert sorted(path.name for path in folder.glob("plots/*")) == (sorted(names) if results.can_plot() else [])

    # Records say what was run, and tell the same as the scripts.
    record = json.loads((folder / "mrpc_seed2" / "dse.json").read_text())
    best = next((folder / "mrpc_seed2" / "dse").glob("*/best"))
    epoch = read_config(best)["origin"]["epoch"]
    assert record["best_epoch"] == epoch
    assert record["metrics"]["dev"]["f1"] == pytest.approx(record["history"][epoch]["validation"]["f1_0.5"])
    assert record["metrics"]["test"] == record["metrics"]["dev"]  # its test file is a copy of dev
    assert record["seconds"] > sum(each["seconds"] for each in record["history"])  # measuring counts too
    assert record["command"][0] == "dse_train_runner.py"
    assert not list((folder / "mrpc_seed2").glob("*/*/*.pt")), "checkpoints of a student that is done"
    students = ("dse", "labels_only", "logits_only")
    assert [coefficient_flag(folder / "mrpc_seed1", stage) for stage in students] == [None, "0.0", "1.0"]
    scored = {"teacher", "dse", "labels_only", "logits_only"}
    assert set(found["tasks"]["SICK"]["pairs_per_second"]) == scored
    assert set(found["tasks"]["MRPC"]["pairs_per_second"]) == {*scored, "encoder"}
    assert "| SICK | dev accuracy |" in (folder / "results.md").read_text()

    # Nothing is done twice, though the folder was moved; what was spoiled, and what was made from it, is.
    reproduce(flags)
    assert calls == []
    before = (folder / "results.md").read_bytes()
    assert before.replace(bytes(folder), bytes(whole[0])) == (whole[0] / "results.md").read_bytes()
    logits = folder / "snli_seed1" / "logits" / "teacher_logits.pt"
    logits.write_bytes(logits.read_bytes()[:-1])
    reproduce(flags)
    assert calls == ["run_distillation_logits_creator.py"], "the same bits again, so that the students stand"
    assert (folder / "results.md").read_bytes() == before

    # A subset in the same folder leaves the others in the tables; a file that was there before its script is no news.
    reproduce([*flags, "--tasks", "snli"])
    assert "| MRPC |" in (folder / "results.md").read_text()
    assert calls == ["run_distillation_logits_creator.py"]
    assert json.loads((folder / "results.json").read_text())["complete"] is True


def test_finding_has_a_table_of_its_own(finished):
    """With means over the seeds, and no column for the teacher."""
    mrr = json.loads((finished / "results.json").read_text())["tasks"]["MRPC"]["table"]["test"]["mrr"]
    models = ("dse", "labels_only", "logits_only", "sentence_bert", "encoder")
    row = f"| MRPC | test MRR | {' | '.join(results.show(mrr[model]) for model in models)} |"
    assert (finished / "results.md").read_text().count(row) == 1
    records = [json.loads((finished / f"mrpc_seed{seed}" / "dse.json").read_text()) for seed in (1, 2)]
    assert mrr["dse"]["mean"] == pytest.approx(np.mean([record["metrics"]["test"]["mrr"] for record in records]))


def test_the_encoder_as_downloaded(finished, glue, bert):
    """Its column is the correlation of cosines that transformers' own BERT gives."""
    record = json.loads((finished / "sts-b_seed1" / "encoder.json").read_text())
    rows = read_examples(get_task("sts-b"), glue / "STS-B", "dev")
    tokenizer, encoder = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()

    def embed(text):
        with torch.no_grad():
            return encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    cosines = [torch.cosine_similarity(*map(embed, pair), dim=0).item() for pair in zip(*rows.sides, strict=True)]
    assert record["metrics"]["dev"]["pearson"] == pytest.approx(np.corrcoef(cosines, rows.labels)[0, 1], abs=1e-5)
    finding = {"mrr", "recall_at_1", "recall_at_10"}
    for name, others in (("mrpc", {"tuned_f1", "tuned_accuracy"}), ("snli", set())):  # a cosine tells no three classes
        record = json.loads((finished / f"{name}_seed1" / "encoder.json").read_text())
        assert set(record["metrics"]["dev"]) == finding | others


def test_variants(whole, finished, flags, calls):
    reproduce([*flags, "--tasks", "mrpc", "--seeds", "1", "--variants"])
    assert calls == ["dse_train_runner.py"] * len(presets.VARIANTS)
    commands = {stage: json.loads((finished / "mrpc_seed1" / f"{stage}.json").read_text())["command"]
                for stage in ("dse", "defaults", "from_teacher", "top_layer")}  # fmt: skip
    assert "--lr" in commands["dse"] and "--lr" not in commands["defaults"]
    assert commands["from_teacher"][-1] == "--resume"
    assert str(finished / "mrpc_seed1" / "teacher") in commands["from_teacher"]
    assert commands["top_layer"].count("--pooler_num_top_hidden_layers") == 1
    before, found = (json.loads((folder / "results.json").read_text())["tasks"] for folder in (whole[0], finished))
    assert found["SICK"]["variants"] == {}
    assert found["MRPC"]["left_out"] == before["MRPC"]["left_out"], "seed 2 lacks nothing of the other tables"
    row = found["MRPC"]["variants"]["dev"]["f1"]
    assert list(row) == [*presets.STUDENTS, *presets.VARIANTS]
    assert {value["n"] for value in row.values()} == {1}, "seed 2 has no variants"
    lines = (finished / "results.md").read_text().splitlines()
    assert any(line.startswith("| MRPC, student | dev f1, threshold of dev | dev f1 | test f1, thr") for line in lines)
    assert (
        f"| without `--head_lr` | {results.show(found['MRPC']['variants']['dev']['tuned_f1']['one_rate'])} "
        in "\n".join(lines)
    )


def test_an_unfinished_seed_in_the_folder(finished, flags, monkeypatch, caplog, capsys):
    """As two calls that were stopped leave it: what lacks is told, and no mean takes another seed than its row's."""
    drawn = []
    monkeypatch.setattr(results, "can_plot", lambda: True)
    monkeypatch.setattr(results, "draw", lambda found, folder: drawn.append(folder))
    reproduce([*flags, "--tasks", "snli"])
    assert drawn == [finished]
    assert "results.json, results.md and plots in" in caplog.text
    for stage in ("dse", "rates"):
        (finished / "mrpc_seed2" / f"{stage}.json").unlink()
    (finished / "rte_seed7" / "teacher").mkdir(parents=True)
    (finished / "notes_seed1").mkdir()
    caplog.clear()
    reproduce([*flags, "--tasks", "snli"])
    assert drawn == [finished]
    assert f"results.json, results.md in {finished}" in caplog.text
    assert f"not complete: {finished / 'mrpc_seed2'} lacks dse, rates; the command with" in caplog.text
    found = json.loads((finished / "results.json").read_text())
    models = ["teacher", "logits", "dse", "labels_only", "logits_only", "rates"]
    assert found["complete"] is False
    assert found["missing"] == {"mrpc_seed2": ["dse", "rates"], "rte_seed7": models}
    assert found["tasks"]["MRPC"]["left_out"] == {"2": ["dse"]}
    assert found["tasks"]["SICK"]["left_out"] == {}
    teacher = json.loads((finished / "mrpc_seed1" / "teacher.json").read_text())["metrics"]["dev"]["f1"]
    assert found["tasks"]["MRPC"]["table"]["dev"]["f1"]["teacher"] == {"mean": teacher, "sd": None, "n": 1}
    text = (finished / "results.md").read_text()
    assert text.startswith(f"Not complete: mrpc_seed2 lacks dse, rates; rte_seed7 lacks {', '.join(models)}. `")
    assert "the seeds that have all their columns: MRPC 2 (without DSE) left out." in text


def test_a_stop_in_a_student_goes_on_from_its_state(flags, tmp_path, monkeypatch, calls, capsys):
    flags = [*flags, "--tasks", "mrpc", "--seeds", "3"]
    update, made = trainer.Trainer.update, []

    def stop_at(self, *of_update, at=52):
        update(self, *of_update)
        made.append(1)
        if len(made) == at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(trainer.Trainer, "update", stop_at)
    with pytest.raises(SystemExit) as stop:
        reproduce(flags)
    assert stop.value.code == 143
    (line,) = [line for line in capsys.readouterr().err.splitlines() if " is not done: " in line]
    place = tmp_path / "results" / "mrpc_seed3" / "dse"
    assert line == (
        f"python -m dse reproduce: stopped by SIGTERM: {place} is not done: "
        "the same command continues with what is left"
    )
    assert len(list((tmp_path / "results/mrpc_seed3/dse").glob("*/*_state_*.pt"))) > 0
    calls.clear()
    reproduce(flags)
    assert calls == ["dse_train_runner.py"] * 3
    # 48 pairs: 8 epochs of 6 updates for the teacher; 2 epochs of 3 for each of three students, none of them twice.
    assert len(made) == 8 * 6 + 3 * 2 * 3
    assert json.loads((tmp_path / "results" / "results.json").read_text())["complete"] is True
    assert not list((tmp_path / "results" / "mrpc_seed3").glob("*.seconds"))

    # The same for a stage that is done again.
    weights = next((tmp_path / "results" / "mrpc_seed3" / "dse").glob("*/best/model.safetensors"))
    weights.write_bytes(b"spoiled")
    made[:] = [1] * 50  # so that it is stopped after two updates of its six
    with pytest.raises(SystemExit):
        reproduce(flags)
    reproduce(flags)
    assert len(made) == 50 + 6


def test_another_teacher_is_followed_by_other_logits_and_students(finished, flags, calls, edit_json):
    flags, folder = [*flags, "--tasks", "sts-b"], finished / "sts-b_seed1"
    before = json.loads((folder / "dse.json").read_text())
    # A teacher that all its own files agree on, as another machine might make it.
    weights, training = folder / "teacher" / "model.safetensors", folder / "teacher" / "training.json"
    tensors = load_file(weights)
    tensors["classifier.bias"] += torch.tensor([0.5])
    save_file(tensors, weights, metadata={"format": "pt"})
    hashes = json.loads(training.read_text())["sha256"]
    edit_json(training, sha256={**hashes, weights.name: sha256_file(weights)})
    files = json.loads((folder / "teacher.json").read_text())["files"]
    now = {f"teacher/{path.name}": sha256_file(path) for path in (weights, training)}
    edit_json(folder / "teacher.json", files={**files, **now})
    reproduce(flags)
    assert calls == ["run_distillation_logits_creator.py", *["dse_train_runner.py"] * 3]
    after = json.loads((folder / "dse.json").read_text())
    assert after["inputs"] != before["inputs"]
    assert after["history"] != before["history"]


def test_a_kill_while_a_spoiled_stage_is_cleared_away(finished, flags, monkeypatch, calls):
    flags = [*flags, "--tasks", "sts-b"]
    weights = finished / "sts-b_seed1" / "teacher" / "model.safetensors"
    weights.write_bytes(b"spoiled")

    def killed(place):
        (place / "training.json").unlink()
        raise RuntimeError("killed")

    with monkeypatch.context() as during:
        during.setattr(stages.shutil, "rmtree", killed)
        with pytest.raises(RuntimeError, match="killed"):
            reproduce(flags)
    reproduce(flags)
    assert calls == ["finetune_bert.py"], "the same weights again, so that what was made from them stands"


class FakeSentenceBert:
    """Scores that are better in epoch 1 than in 0 and 2, and a state like the real one's."""

    rate = 0.5

    def __init__(self, folder, task, max_seq_length, seed, device):
        self.epochs = 0

    def prepare(self, pairs):
        assert pairs == 48

    def train_epoch(self, rows, epoch):
        assert epoch == self.epochs
        self.epochs += 1
        return 0.1

    def score(self, rows):
        noise = np.random.default_rng(0).normal(size=len(rows)) * abs(self.epochs - 2)
        return (np.array(rows.labels) + noise)[:, None].astype(np.float32)

    def embed(self, texts):
        return torch.eye(len(texts))

    def save(self, path, history):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(history))
        if FakeSentenceBert.stop_after == len(history):
            signal.raise_signal(signal.SIGINT)

    def load(self, path):
        history = json.loads(path.read_text())
        self.epochs = len(history)
        return history


def test_sentence_bert_is_stopped_and_goes_on_and_its_best_epoch_counts(finished, flags, tmp_path, monkeypatch, capsys):
    flags = [*flags, "--tasks", "mrpc", "--seeds", "1"]  # all but Sentence-BERT is there, of before it was installed
    monkeypatch.setattr(reproduction, "has_sentence_transformers", lambda: True)
    monkeypatch.setattr(stages, "version", lambda package: "1")
    monkeypatch.setattr(stages, "SentenceBert", FakeSentenceBert)
    monkeypatch.setattr(FakeSentenceBert, "stop_after", 3, raising=False)
    with pytest.raises(SystemExit) as stop:
        reproduce(flags)
    assert stop.value.code == 130
    assert "continues with what is left" in capsys.readouterr().err
    monkeypatch.setattr(FakeSentenceBert, "stop_after", None)
    reproduce(flags)
    record = json.loads((tmp_path / "results" / "mrpc_seed1" / "sentence_bert.json").read_text())
    assert [each["epoch"] for each in record["history"]] == [0, 1, 2, 3]
    assert record["best_epoch"] == 1
    found = record["metrics"]["dev"]
    assert (found["tuned_f1"], found["tuned_accuracy"]) == (1.0, 1.0)
    assert found["mrr"] < 0.1, "all its texts are at right angles"
    assert "| MRPC | dev f1, threshold of dev |" in (tmp_path / "results" / "results.md").read_text()
    assert not (tmp_path / "results" / "mrpc_seed1" / "sentence_bert" / "state.pt").exists()


@pytest.mark.parametrize("name", TINY.seeds)
def test_sentence_bert_itself(glue, bert, tmp_path, name):
    """Where sentence-transformers is installed: resumed training ends with the same bits."""
    pytest.importorskip("sentence_transformers")
    task = get_task(name)
    rows = read_examples(task, glue / task.folder, "train")

    def make():
        made = SentenceBert(bert, task, 48, 1, torch.device("cpu"))
        made.prepare(len(rows), epochs=2)
        return made

    whole = make()
    losses, scores = zip(*((whole.train_epoch(rows, epoch), whole.score(rows)) for epoch in (0, 1)), strict=True)
    assert np.abs(scores[0] - scores[1]).max() > 1e-4, "embeddings of the epoch before"
    begun = make()
    assert begun.train_epoch(rows, 0) == losses[0]
    begun.save(tmp_path / "state.pt", [{"epoch": 0}])
    resumed = make()
    assert resumed.load(tmp_path / "state.pt") == [{"epoch": 0}]
    assert resumed.train_epoch(rows, 1) == losses[1]
    np.testing.assert_array_equal(resumed.score(rows), whole.score(rows))
    assert whole.score(rows).shape == (48, 3 if name == "snli" else 1)
    assert whole.rate == 0.0


def test_another_encoder_is_refused_though_its_weights_are_the_same(finished, flags, refused, copied, bert, edit_json):
    other = copied(bert)
    edit_json(other / "config.json", hidden_dropout_prob=0.5)
    assert "was made with bert" in refused(reproduce, [*flags, "--bert_model", other])


SLOWER = TINY._replace(teacher={**TINY.teacher, "learning_rate": "5e-4"})


def test_other_settings_are_refused_with_both_values(finished, flags, refused, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "small", SLOWER)
    line = refused(reproduce, flags)
    assert "2e-3" in line and "5e-4" in line and "--output_dir" in line


def test_what_a_script_refuses_is_told_in_the_commands_terms(flags, tmp_path, refused, monkeypatch, capsys):
    """A teacher under way, of which the disk is full, and whose settings are others then."""
    flags, place = [*flags, "--tasks", "mrpc", "--seeds", "1"], tmp_path / "results" / "mrpc_seed1" / "teacher"
    save, calls = states.save_tensors, []

    def full(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RunError("state: cannot be written")
        save(*args)

    monkeypatch.setattr(states, "save_tensors", full)
    with pytest.raises(SystemExit) as stop:
        reproduce(flags)
    assert stop.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    goes_on = "the same command continues with what is left"
    assert last == f"python -m dse reproduce: error: {place} is not done (state: cannot be written): {goes_on}"
    monkeypatch.setitem(presets.PRESETS, "small", SLOWER)
    line = refused(reproduce, flags)
    assert line.startswith(
        f"python -m dse reproduce: error: --output_dir: {place} cannot be made (finetune_bert.py refuses its flags: "
        "--learning_rate: 0.0005 now, 0.002 in the run"
    )
    assert line.endswith("; move it away, and it begins anew, or name another --output_dir")
    assert "continues with what is left" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--tasks", "mrpd"], "--tasks: mrpd given; known: mrpc, qqp"),
        (["--tasks", "cola", "--seeds", "1"], "--tasks: cola has one sentence per row"),
        (["--tasks", "diagnostic", "--seeds", "1"], "--tasks: diagnostic has no training set"),
        (["--preset", "large"], "has less than the preset large needs, 128 positions and 4 layers"),
        (["--tasks", "qqp"], "--seeds: the preset small has none for qqp"),
        (["--tasks", "rte", "--seeds", "1"], "RTE is not a folder"),
        (["--call", "snli"], "is not TASK=NAME"),
        (["--call", "mrpc=SICK"], "is given twice"),
        (["--call", "mrpc=STS-B"], "is given twice"),
        (["--call", "mrpd=SICK"], "mrpd is not a task"),
        (["--tasks", ","], "--tasks: none given"),
        (["--tasks", "mrpc,mrpc"], "given twice"),
        (["--seeds", "1", "1"], "given twice"),
        (["--seeds", "1", "99999999999999999999999"], "--seeds"),
        (["--seeds", "-1"], "-1 is below 0"),
        (["--bert_model", "./nowhere"], "there is no folder ./nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(flags, refused, calls, extra, words):
    assert words in refused(reproduce, [*flags, *extra])
    assert calls == []


@pytest.mark.parametrize(
    ("name", "file"),
    [("snli", "test.tsv"), ("mnli", "dev_mismatched.tsv"), ("mnli", "dev_matched.tsv"), ("mrpc", "train.tsv")],
)
def test_a_missing_data_file_is_refused_before_any_work(glue, flags, refused, calls, copied, name, file):
    data, task = copied(glue, "glue"), get_task(name)
    write_task(data / task.folder, task)
    (data / task.folder / file).unlink()
    line = refused(reproduce, [*flags, "--data_dir", data, "--tasks", f"sts-b,{name}", "--seeds", "1"])
    assert f"{data / task.folder / file}: cannot read the data of {name} (No such file or directory)" in line
    assert calls == []


def test_an_epoch_whose_metric_is_0_is_drawn_and_an_undefined_one_is_a_gap(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed").Figure
    drawn = {}
    monkeypatch.setattr(figure, "savefig", lambda self, path, dpi: drawn.update({path.name: self.axes[0].lines}))

    def run(stage: str, key: str, *values: float | None) -> dict:
        history = [{"epoch": epoch, "validation": {"acc": 0.25, key: value}} for epoch, value in enumerate(values)]
        return {"task": "mrpc", "stage": stage, "history": history}

    runs = [
        run("teacher", "f1", 0.0, 0.75),
        run("dse", "f1_0.5", 0.5, 0.0),
        run("sentence_bert", "tuned_f1", None, 0.5),
    ]
    table = {"dev": {"f1": {"teacher": {"mean": 0.375, "sd": None, "n": 1}}}}
    task = {"task": "mrpc", "metric": "f1", "metric_with_threshold_of_dev": "f1", "table": table,
            "pairs_per_second": {"teacher": 9.0, "dse": 99.0}}  # fmt: skip
    results.draw({"tasks": {"MRPC": task}, "runs": runs}, tmp_path)
    assert sorted(drawn) == ["MRPC_by_epoch.png", "speed.png"]
    curves = [(line.get_label(), line.get_xydata().tolist()) for line in drawn["MRPC_by_epoch.png"]]
    assert curves[0] == ("teacher", [[0, 0.0], [1, 0.75]])
    assert curves[1] == ("DSE", [[0, 0.5], [1, 0.0]])
    assert (curves[2][0], curves[2][1][1]) == ("Sentence-BERT way", [1, 0.5])
    assert math.isnan(curves[2][1][0][1])
    points = [line.get_xydata().tolist() for line in drawn["speed.png"]]
    assert points == [[[9.0, 0.375]]]


def test_the_estimate_follows_what_was_measured(flags, tmp_path):
    class Fake:
        def __init__(self, records):
            self.records, self.stages = records, ["teacher", "dse"]

        def record(self, stage):
            return self.records.get(stage)

        def expected_seconds(self, stage):
            return {"teacher": 10.0, "dse": 40.0}[stage]

    new, begun = Fake({}), Fake({"teacher": {"seconds": 25.0}})
    assert reproduction.seconds_left([new], [(new, "teacher"), (new, "dse")]) == 50.0
    assert reproduction.seconds_left([new, begun], [(begun, "dse")]) == 100.0  # two and a half times as long


def test_an_own_task_beside_its_data(flags, tmp_path):
    """Its JSON file stands for it; a share of its pairs serves as dev."""
    place = tmp_path / "mine"
    place.mkdir()
    rng = random.Random(0)
    rows = ["\t".join([a, b, ("no", "yes")[label]]) for label, a, b in (make_pair(rng) for _ in range(60))]
    (place / "train.tsv").write_text("\n".join(["q\ta\tgood", *rows]) + "\n")
    path = own_task(place, **NAMED)
    reproduce([*flags, "--tasks", path, "--seeds", 3])
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    assert found["complete"]
    assert list(found["tasks"]) == ["MINE"]
    record = json.loads((tmp_path / "results" / "mine_seed3" / "dse.json").read_text())
    assert found["tasks"]["MINE"]["table"]["dev"]["f1"]["dse"]["mean"] == record["metrics"]["dev"]["f1"]
    assert "| MINE | dev f1 |" in (tmp_path / "results" / "results.md").read_text()
