"""Folders of students: what is written, loaded, refused; the model card."""

import json

import numpy as np
import pytest
import torch
from helpers import HEADS, PAIRS, TEXTS
from processes import ended, start

import dse_train_runner
from dse import __main__ as entry
from dse.data.tasks import Task, get_task
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier
from dse.storage.checkpoint import Checkpoint
from dse.storage.student_folder import command_line, read_config
from dse.system.errors import InputError
from dse.system.files import sha256_json


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


@pytest.mark.parametrize("head", HEADS)
def test_the_runner_leaves_the_best_epoch_and_export_makes_the_same(student_flags, checkpoints, tmp_path, head):
    """Checkpoint, folder and index give the same scores."""
    dse_train_runner.main(student_flags(epochs=4, lr=3e-3, **HEADS[head]))
    best = checkpoints()[-1].parent / Checkpoint.read(checkpoints()[-1]).best["file"]
    entry.main(["export", "--trainer_checkpoint", str(best), "--output", str(tmp_path / "exported")])
    for name in ("config.json", "README.md", "model.safetensors", "tokenizer.json"):
        assert (best.parent / "best" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes(), name
    model = DSESiameseClassifier.from_pretrained(best.parent / "best")
    scores, index = model.score(PAIRS), CandidateIndex.build(model, [second for _, second in PAIRS])
    np.testing.assert_array_equal(scores, DSESiameseClassifier.from_checkpoint(best).score(PAIRS))
    of_index = index.score([first for first, _ in PAIRS]).diagonal()
    np.testing.assert_allclose(of_index, scores, rtol=0, atol=1e-5 * np.abs(scores).max())
    card = (best.parent / "best" / "README.md").read_text()
    record = Checkpoint.read(best).trainer["history"][-1]
    assert f"epoch {record['epoch']}" in card
    assert f"| f1_0.5 | {record['validation']['f1_0.5']:.4f} |" in card
    assert "--lr 0.003" in card
    assert ("the mean of both orders" in card) is (head == "symmetric")


def test_the_cards_command_is_the_runs(student_flags):
    """Its words, parsed, give the flags again, zeros among them."""
    zeros = {"dropout": 0, "distillation_coeff": 0.0, "random_seed": 0}
    args = dse_train_runner.parse_arguments(student_flags(fp16=True, file_log=True, **zeros))
    words = command_line("dse_train_runner.py", {"task_name": "mrpc", **dse_train_runner.run_flags(args)}).split()
    assert words[:2] == ["python", "dse_train_runner.py"]
    assert dse_train_runner.parse_arguments(words[2:]) == args


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

    assert "corrupt" in refusal(flip("model.safetensors"), "a")
    assert "is missing" in refusal(lambda folder: (folder / "model.safetensors").unlink(), "b")
    assert "config.json is missing" in refusal(lambda folder: (folder / "config.json").unlink(), "c")
    assert "holds no student" in refusal(lambda folder: edit_json(folder / "config.json", format=None), "d")
    assert "version 3" in refusal(lambda folder: edit_json(folder / "config.json", version=3), "e")
    assert "corrupt or changed" in refusal(lambda folder: edit_json(folder / "config.json", task=None), "f")
    assert "corrupt or changed" in refusal(lambda folder: edit_json(folder / "config.json", max_seq_length=31), "g")
    assert "do not fit" in refusal(lambda folder: rewrite_config(folder, architecture={}), "k")
    assert "do not fit" in refusal(lambda folder: rewrite_config(folder, task="x"), "l")
    assert "tokenizer" in refusal(lambda folder: (folder / "tokenizer.json").write_text("{}"), "h")
    text = (tmp_path / "student" / "tokenizer.json").read_text().replace('"doctor"', '"doktor"')
    assert "not the one" in refusal(lambda folder: (folder / "tokenizer.json").write_text(text), "i")
    assert "valid JSON" in refusal(flip("config.json", 0), "j")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(InputError, match="is not a local folder, and the hub did not provide a student"):
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


def test_folders_of_before_have_the_threshold_of_before(student, edit_json, tmp_path):
    student().save_pretrained(tmp_path / "student")
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    del config["threshold"], config["sha256"]
    (tmp_path / "student" / "config.json").write_text(json.dumps({**config, "sha256": sha256_json(config)}))
    assert DSESiameseClassifier.from_pretrained(tmp_path / "student").threshold == 0.5


def test_a_card_tells_no_place_of_the_users(student_flags, checkpoints, tmp_path, bert):
    dse_train_runner.main(student_flags(epochs=1))
    card = (checkpoints()[-1].parent / "best" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert str(bert.parent) not in card
    assert f"--bert_model {bert.name} " in card


def test_a_card_where_nothing_says_what_ranks(student, tmp_path):
    model = student("snli")
    model.task = Task("mine", "multiclass", ("good", "bad", "neither"))
    model.save_pretrained(tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text()
    assert "- candidates are ranked by the probability of the label that `rank_label` names\n" in card


def test_a_student_is_found_wherever_one_may_be_expected(student_flags, checkpoints):
    """A run's folder stands for its best epoch, a checkpoint for its own."""
    dse_train_runner.main(student_flags())
    run, texts = checkpoints()[-1].parent, ["A sentence.", "Another one."]
    best = DSESiameseClassifier.from_pretrained(run / "best").encode(texts)
    epoch = read_config(run / "best")["origin"]["epoch"]
    (of_best,) = (path for path in checkpoints() if path.stem.endswith(f"_epoch_{epoch}"))
    for place in (run, str(of_best), str(run)):
        assert (DSESiameseClassifier.from_pretrained(place).encode(texts) == best).all()
    (run / "best").rename(run / "best_epoch_1")  # where it is if `best` could not be replaced
    assert (DSESiameseClassifier.from_pretrained(run).encode(texts) == best).all()


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("empty", "holds no student"),
        ("text.pt", "the student: .*text.pt is truncated or not a checkpoint"),
        ("text.txt", "is a file, not a student's folder or a checkpoint"),
    ],
)
def test_what_is_not_a_student_is_refused(place, line, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("text.pt", "text.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=line):
        DSESiameseClassifier.from_pretrained(tmp_path / place)
