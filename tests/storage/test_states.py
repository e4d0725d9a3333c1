"""States of a run: kept, spoiled, left by a kill, on a full disk."""

import contextlib
import os
import subprocess

import numpy as np
import pytest
import torch
from helpers import SHORT_RUN, stop_at, stopped

import dse_train_runner
import finetune_bert
from dse.storage import states
from dse.storage.checkpoint import Checkpoint
from dse.storage.states import States
from dse.system import files
from dse.system.errors import InputError


def test_no_flipped_bit_of_a_state_gives_other_values(tmp_path):
    files.save_tensors(tmp_path / "x.pt", {"weights": torch.arange(40.0), "name": "x"})
    whole = (tmp_path / "x.pt").read_bytes()
    for place in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[place // 8] ^= 1 << place % 8
        (tmp_path / "y.pt").write_bytes(changed)
        try:
            found = files.load_tensors(tmp_path / "y.pt", "spoiled")
        except InputError:
            continue
        assert torch.equal(found["weights"], torch.arange(40.0))
        assert found["name"] == "x"
    for place in (0, len(whole) // 2, len(whole) - 23):
        (tmp_path / "y.pt").write_bytes(whole[:place])
        with pytest.raises(InputError, match="spoiled"):
            files.load_tensors(tmp_path / "y.pt", "spoiled")


def test_a_tensor_of_another_program_is_compared_with_its_archives_sums(tmp_path):
    torch.save(torch.arange(40.0), tmp_path / "x.pt")
    assert torch.equal(files.load_tensors(tmp_path / "x.pt", "spoiled"), torch.arange(40.0))
    content = bytearray((tmp_path / "x.pt").read_bytes())
    content[content.index(np.float32(17).tobytes())] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    assert not torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), torch.arange(40.0))
    with pytest.raises(InputError, match="spoiled"):
        files.load_tensors(tmp_path / "x.pt", "spoiled")


def test_a_tensor_that_the_archives_directory_calls_a_folder_is_refused(tmp_path):
    """One bit that no sum of the archive covers; torch would load whatever its new memory holds."""
    torch.save(torch.arange(40.0), tmp_path / "x.pt")
    content = bytearray((tmp_path / "x.pt").read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0"))
    content[entry + 38] ^= 0x10  # the lowest byte of its external attributes
    (tmp_path / "x.pt").write_bytes(content)
    assert torch.load(tmp_path / "x.pt", weights_only=True).shape == (40,)
    with pytest.raises(InputError, match="spoiled"):
        files.load_tensors(tmp_path / "x.pt", "spoiled")


def test_a_snapshot_does_not_change_with_what_it_was_taken_of():
    layer = torch.nn.Linear(2, 1)
    torch.nn.init.ones_(layer.weight)
    state = {"model": layer.state_dict(), "history": [{"loss": 0.5}], "step": (torch.zeros(1), 3), "rng": torch.ones(2)}
    taken = states.snapshot(state, torch.device("cpu"))
    torch.nn.init.zeros_(layer.weight)
    state["history"][0]["loss"] = 0.25
    state["history"].append({})
    state["step"][0].add_(1)
    state["rng"] = None
    assert taken["model"]["weight"].tolist() == [[1.0, 1.0]]
    assert taken["model"]._metadata == layer.state_dict()._metadata  # as load_state_dict wants it
    assert (taken["history"], taken["step"], taken["rng"].tolist()) == ([{"loss": 0.5}], (0.0, 3), [1.0, 1.0])


def test_states_keep_two_and_the_best(tmp_path):
    kept = States(tmp_path, "x", own=True)
    for position, name, best in (
        ((1, 0), "x_epoch_0.pt", 0),
        ((1, 5), "", 0),
        ((1, 10), "", 0),
        ((2, 0), "x_epoch_1.pt", 0),
        ((2, 5), "", 0),
    ):
        kept.save(position, {"at": position}, name, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x_epoch_0.pt", "x_epoch_1.pt", "x_state_epoch_2_update_5.pt",
    ]  # fmt: skip
    path, state = States(tmp_path, "x").newest(lambda path: files.load_tensors(path, "spoiled"))
    assert (path.name, state) == ("x_state_epoch_2_update_5.pt", {"at": (2, 5)})
    kept.finish(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_epoch_0.pt", "x_epoch_1.pt"]
    kept.finish()
    assert not tmp_path.exists()


def test_a_full_disk(student_flags, tmp_path, monkeypatch, capsys):
    """A real one: a small tmpfs, mounted by root alone, that fills between two checkpoints."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    save, calls = states.save_tensors, []

    def save_in_what_is_left(path, entries):
        calls.append(1)
        if len(calls) == 3:  # from here on there is room for nothing
            with contextlib.suppress(OSError), open(place / "filler", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        save(path, entries)

    try:
        monkeypatch.setattr(states, "save_tensors", save_in_what_is_left)
        code, line = stopped(
            dse_train_runner.main, student_flags(checkpoint_dir=place / "checkpoints", epochs=9), capsys
        )
        assert code == 1
        assert "cannot be written (No space left on device; 0 MiB are free there)" in line
        left = sorted((place / "checkpoints").glob("*/*.pt"))
        assert {path.name[-10:] for path in left} == {"epoch_0.pt", "epoch_1.pt"}
        assert all(Checkpoint.read(path).model for path in left)
        assert not list((place / "checkpoints").glob("*/.*.part"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_what_kills_left_of_states_goes_with_the_next_state(
    student_flags, teacher_flags, tmp_path, monkeypatch, capsys
):
    """Of the first save of a run that has no other file, and of later ones, though it was a minute ago."""
    number = 2**22 + 1
    first = tmp_path / "checkpoints" / "bert_distillation_2020_01_01-00_00_00"
    first.mkdir(parents=True)
    (first / f".bert_distillation_state_epoch_0_update_2.pt.{number}.part").write_bytes(bytes(1000))
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        stopped(dse_train_runner.main, [*student_flags(**SHORT_RUN), "--resume"], capsys)
    assert not first.exists()
    (run,) = (tmp_path / "checkpoints").iterdir()
    left = run / f".bert_distillation_state_epoch_1_update_1.pt.{number}.part"
    (run / f".best.{number}.part").mkdir()
    left.write_bytes(bytes(1000))
    with monkeypatch.context() as patched:
        stop_at(patched, 1)
        stopped(dse_train_runner.main, [*student_flags(**SHORT_RUN), "--resume"], capsys)
    assert not list(run.glob(".*.part"))
    with monkeypatch.context() as patched:
        stop_at(patched, 1)
        stopped(finetune_bert.main, teacher_flags(), capsys)
    left = tmp_path / "teacher" / "training_state" / f".teacher_state_epoch_0_update_2.pt.{number}.part"
    left.write_bytes(bytes(1000))
    with monkeypatch.context() as patched:
        stop_at(patched, 1)
        stopped(finetune_bert.main, [*teacher_flags(), "--resume"], capsys)
    assert not left.exists()
