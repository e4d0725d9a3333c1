"""A teacher's run: stops, what is in its folder, what it goes on from."""

import json
import os
import signal

import pytest
from helpers import contents, flip, moved, results_of, stop_at, stopped

import finetune_bert
from dse.data.tokenizers import load_tokenizer, tokenizer_key
from dse.system import files
from dse.training import trainer


def test_a_teacher_goes_on_to_the_same_bits(teacher_flags, tmp_path, monkeypatch, capsys):
    """Stopped in the first epoch, then in the second one's validation, then left alone."""
    flags = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "train_batch_size": 5, "save_every": 2}
    finetune_bert.main(teacher_flags(**flags, output_dir=tmp_path / "unbroken"))
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        code, line = stopped(finetune_bert.main, teacher_flags(**flags), capsys)
    assert (code, "training_state/teacher_state_epoch_0_update_2.pt" in line) == (143, True)
    assert "--resume to continue the training in it" in stopped(finetune_bert.main, teacher_flags(**flags), capsys)[1]
    with monkeypatch.context() as patched:
        stop_at(patched, 6, sent=signal.SIGINT)
        assert stopped(finetune_bert.main, [*teacher_flags(**flags), "--resume"], capsys)[0] == 130
    finetune_bert.main([*teacher_flags(**flags), "--resume"])
    one, other = tmp_path / "teacher", tmp_path / "unbroken"
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert results_of(one) == results_of(other)
    histories = [json.loads((folder / "training.json").read_text())["history"] for folder in (one, other)]
    assert [{**record, "seconds": 0} for record in histories[0]] == [
        {**record, "seconds": 0} for record in histories[1]
    ]


def test_a_teacher_that_is_finished_is_not_trained_again(teacher_flags, tmp_path, caplog):
    finetune_bert.main(teacher_flags())
    before = (tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns, results_of(tmp_path / "teacher")
    (tmp_path / "teacher" / "eval_results.txt").unlink()
    finetune_bert.main([*teacher_flags(), "--resume"])
    assert "nothing to train: the teacher in" in caplog.text
    assert ((tmp_path / "teacher" / "model.safetensors").stat().st_mtime_ns, results_of(tmp_path / "teacher")) == before


def test_what_resume_finds_in_a_teachers_folder(teacher_flags, tmp_path, refused, caplog, edit_json):
    """Another training, a foreign model, a spoiled teacher: refused, and left as they are; overwritten when told to."""
    finetune_bert.main(teacher_flags())
    weights = tmp_path / "teacher" / "model.safetensors"
    before = weights.read_bytes()
    line = refused(finetune_bert.main, [*teacher_flags(num_train_epochs=2, learning_rate=0.5), "--resume"])
    assert "--learning_rate: 0.5 now, 0.001 in the run" in line
    flip(weights, 0.9)
    assert "model.safetensors is corrupt or changed" in refused(finetune_bert.main, [*teacher_flags(), "--resume"])
    weights.write_bytes(before)
    edit_json(tmp_path / "teacher" / "training.json", history=3)
    assert "training.json is corrupt" in refused(finetune_bert.main, [*teacher_flags(), "--resume"])
    (tmp_path / "teacher" / "training.json").write_text('{"sha256": ["mine"]}')
    line = refused(finetune_bert.main, [*teacher_flags(), "--resume"])
    assert "holds other files and no training to continue" in line
    assert weights.read_bytes() == before
    finetune_bert.main([*teacher_flags(seed=7), "--resume", "--overwrite_output_dir"])
    assert "starting a new training" in caplog.text
    assert weights.read_bytes() != before
    finetune_bert.main([*teacher_flags(), "--resume", "--overwrite_output_dir"])
    assert weights.read_bytes() == before


def test_a_training_over_an_older_teacher_goes_on(teacher_flags, tmp_path, monkeypatch, capsys):
    finetune_bert.main(teacher_flags(seed=7))
    finetune_bert.main(teacher_flags(output_dir=tmp_path / "unbroken"))
    flags = [*teacher_flags(), "--overwrite_output_dir"]
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        assert stopped(finetune_bert.main, flags, capsys)[0] == 143
    finetune_bert.main([*flags, "--resume"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("teacher", "unbroken")]
    assert weights[0] == weights[1]


def test_a_teachers_tokenizer_may_not_change(teacher_flags, bert, copied, monkeypatch, capsys, refused):
    model = copied(bert, "changed")
    flags = teacher_flags(bert_model=model)
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        stopped(finetune_bert.main, flags, capsys)
    text = (model / "tokenizer.json").read_text().replace('"doctor"', '"x"').replace('"car"', '"doctor"')
    (model / "tokenizer.json").write_text(text.replace('"x"', '"car"'))
    assert "its tokenizer is not the one that the run started with" in refused(finetune_bert.main, [*flags, "--resume"])


def test_a_stop_after_the_training_says_how_to_end_it(teacher_flags, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(finetune_bert, "write_results", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        code, line = stopped(finetune_bert.main, teacher_flags(), capsys)
    assert (code, line) == (143, "finetune_bert.py: stopped by SIGTERM: run the same command with --resume to continue")
    finetune_bert.main([*teacher_flags(), "--resume"])
    assert (tmp_path / "teacher" / "eval_results.txt").exists()
    assert not (tmp_path / "teacher" / "training_state").exists()


def test_a_spoiled_state_of_a_teacher_is_written_again(teacher_flags, tmp_path, monkeypatch, capsys):
    flags = {"train_batch_size": 6, "save_every": 1}  # 4 updates
    finetune_bert.main(teacher_flags(**flags, output_dir=tmp_path / "unbroken"))
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        stopped(finetune_bert.main, teacher_flags(**flags), capsys)
    newest = tmp_path / "teacher" / "training_state" / "teacher_state_epoch_0_update_2.pt"
    flip(newest)
    with monkeypatch.context() as patched:
        stop_at(patched, 1)
        line = stopped(finetune_bert.main, [*teacher_flags(**flags), "--resume"], capsys)[1]
    assert str(newest) in line
    assert files.load_tensors(newest, "spoiled")["trainer"]["partial"]["updates"] == 2
    finetune_bert.main([*teacher_flags(**flags), "--resume"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("teacher", "unbroken")]
    assert weights[0] == weights[1]


def test_weights_that_are_not_finite_are_not_saved(teacher_flags, tmp_path, capsys, monkeypatch):
    update = trainer.Trainer.update

    def spoil(self, *of_update):
        update(self, *of_update)
        next(iter(self.model.parameters())).data[0] = float("inf")

    monkeypatch.setattr(trainer.Trainer, "update", spoil)
    code, line = stopped(finetune_bert.main, teacher_flags(train_batch_size=24, save_every=1), capsys)
    assert code == 1
    assert "are not finite after update" in line
    assert "last good state: none was written" in line
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize("task", ["mrpc", "mnli"])
def test_only_a_task_with_a_mismatched_set_has_a_second_folder(task, teacher_flags, tmp_path):
    others = tmp_path / "teacher-MM" / "eval_results.txt"
    others.parent.mkdir()
    others.write_text("of another teacher")
    finetune_bert.main(teacher_flags(task, do_eval=False))
    assert others.exists() == (task == "mrpc")


def test_a_folder_beside_that_cannot_be_written_is_nothing_to_mrpc(teacher_flags, tmp_path):
    (tmp_path / "teacher-MM").write_text("a file")
    finetune_bert.main(teacher_flags())
    assert (tmp_path / "teacher" / "eval_results.txt").exists()


def test_a_teacher_goes_on_where_its_inputs_have_other_names(
    teacher_flags, bert, data, copied, tmp_path, monkeypatch, capsys, refused, edit_json, caplog
):
    flags = [*teacher_flags(), "--resume"]
    finetune_bert.main(teacher_flags(output_dir=tmp_path / "unbroken"))
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        stopped(finetune_bert.main, flags, capsys)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    changes = {"data_dir": copied(data("mrpc"), "data"), "bert_model": copied(bert, "bert"),
               "output_dir": tmp_path / "moved", "log_dir": "logs"}  # fmt: skip
    other = copied(bert, "other")
    flip(other / "model.safetensors", 0.9)
    line = refused(finetune_bert.main, moved(flags, {**changes, "bert_model": other}))
    assert f"--bert_model: {other} now, {bert} in the run, which differ in the SHA-256" in line
    finetune_bert.main(moved(flags, changes))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("moved", "unbroken")]
    assert weights[0] == weights[1]
    finetune_bert.main(moved(flags, {**changes, "data_dir": data("mrpc")}))
    assert "nothing to train: the teacher in" in caplog.text


def test_an_earlier_teachers_tokenizer_does_not_change_the_new_ones(
    teacher_flags, bert, tmp_path, monkeypatch, capsys, refused, edit_json
):
    """Files that the new one does not write: an earlier teacher's go, others' are refused, before the training."""
    folder, flags = tmp_path / "teacher", [*teacher_flags(), "--overwrite_output_dir"]
    stale = {"special_tokens_map.json": '{"unk_token": "doctor"}', "vocab.txt": "[PAD]\n[UNK]\n"}

    def put_back() -> None:
        for name, text in {**stale, "notes.txt": "mine"}.items():
            (folder / name).write_text(text)

    finetune_bert.main(flags)
    put_back()
    before = contents(folder)
    assert f"{folder} holds vocab.txt, special_tokens_map.json, which would change" in refused(
        finetune_bert.main, flags
    )
    assert contents(folder) == before
    training = json.loads(before["training.json"])
    edit_json(folder / "training.json", sha256={**training["sha256"], **dict.fromkeys(stale, "of an earlier teacher")})
    finetune_bert.main(flags)
    assert tokenizer_key(load_tokenizer(folder, True, "--output_dir")) == training["tokenizer"]
    assert {path.name for path in folder.iterdir()} & {*stale, "notes.txt"} == {"notes.txt"}
    put_back()
    monkeypatch.setattr(finetune_bert, "STALE", ())
    code, line = stopped(finetune_bert.main, flags, capsys)
    assert (code, "its tokenizer is not the one of the training" in line) == (1, True)
    (folder / "special_tokens_map.json").unlink()
    finetune_bert.main([*flags, "--resume"])
    assert (folder / "eval_results.txt").exists()


def test_a_teachers_record_has_no_nan(teacher_flags, copied, data, tmp_path, caplog):
    """Dev scores that are all the same, in training.json and in what a second --resume makes of it."""
    folder = copied(data("sts-b"), "constant")
    lines = (folder / "dev.tsv").read_text().splitlines()
    dev = [lines[0], *("\t".join([*line.split("\t")[:-1], "2.5"]) for line in lines[1:])]
    (folder / "dev.tsv").write_text("\n".join(dev) + "\n")
    for _ in range(2):
        finetune_bert.main(teacher_flags("sts-b", data_dir=folder, resume=True))
        training = (tmp_path / "teacher" / "training.json").read_text()
        assert json.loads(training, parse_constant=pytest.fail)["history"][0]["validation"]["pearson"] is None
        assert "pearson = nan" in (tmp_path / "teacher" / "eval_results.txt").read_text()
    assert "pearson undefined" in caplog.text
