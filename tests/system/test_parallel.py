"""Two processes on the CPU against one: losses, weights, logits in order; torchrun's end all when one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import as_flags, random_student, separate_rows
from processes import LONG, ended, start_ranks
from safetensors.torch import load_file

import dse_train_runner
import finetune_bert
import run_distillation_logits_creator
from dse.networks.batches import Batches
from dse.networks.inference import infer_pairs
from dse.storage.checkpoint import Checkpoint
from dse.system import parallel
from dse.system.device import select_device
from dse.system.errors import InputError, RunError

CPU = torch.device("cpu")
SCRIPTS = {"finetune_bert": finetune_bert, "run_distillation_logits_creator": run_distillation_logits_creator,
           "dse_train_runner": dse_train_runner}  # fmt: skip


def run_script(script: str, argv: list[str]) -> None:
    SCRIPTS[script].main(argv)


def run_in_two(script: str, argv: list[str], log: Path) -> str:
    """Run a script in two processes to its end; what was logged."""
    ranks = start_ranks(run_script, script, argv, log=log)
    return [ended(rank, log) for rank in ranks][-1]


@pytest.fixture
def stages(bert, copied, edit_json, data, tmp_path, logits):
    """A function from a folder's name to the three stages into it: 24 pairs, 20 updates, no dropout.

    The teacher's batches have 23 pairs and 1, of which one process gets none; the student's, 9, 9 and 6, make one
    update. It learns from logits that are there already, so that each stage is compared by itself.
    """
    plain = copied(bert, "plain")
    edit_json(plain / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    shared = {"task_name": "mrpc", "data_dir": copied(data("mrpc"), "data"), "do_lower_case": True}

    def into(name: str) -> list:
        folder = tmp_path / name
        teacher = {"bert_model": plain, "do_train": True, "do_eval": True, "max_seq_length": 48, "no_parallel": True,
                   "train_batch_size": 23, "num_train_epochs": 10, "learning_rate": 1e-4,
                   "output_dir": folder / "teacher"}  # fmt: skip
        creator = {"train_features_path": folder / "features", "bert_checkpoint_dir": folder / "teacher",
                   "max_seq_length": 48, "batch_size": 1, "output_dir": folder, "save_every": 2}  # fmt: skip
        student = {"distillation_logits_path": logits("mrpc"), "bert_model": plain, "max_seq_length": 32,
                   "pooler_num_top_hidden_layers": 2, "fc_dims": [8, 1], "batch_size": 9, "epochs": 20,
                   "siamese_head_type": "residual",
                   "gradient_accumulation_steps": 3, "lr": 1e-4, "store_checkpoints": True,
                   "checkpoint_dir": folder / "checkpoints"}  # fmt: skip
        return [
            (script, as_flags({**shared, **flags}))
            for script, flags in zip(SCRIPTS, (teacher, creator, student), strict=True)
        ]

    return into


def newest(folder: Path) -> dict:
    states = (folder / "checkpoints").glob("*/*.pt")
    return vars(Checkpoint.read(max(states, key=lambda path: path.stat().st_mtime_ns)))


def test_two_processes_give_what_one_gives(stages, tmp_path):
    for stage in stages("one"):
        run_script(*stage)
    logged = [run_in_two(*stage, tmp_path / stage[0]) for stage in stages("two")]
    assert logged[0].count("teacher saved in") == 1, "another process than the first wrote, or logged"

    one, two = (tmp_path / name for name in ("one", "two"))
    trainings = [json.loads((folder / "teacher" / "training.json").read_text()) for folder in (one, two)]
    assert_same_history(*(training["history"] for training in trainings))
    weights = [load_file(folder / "teacher" / "model.safetensors") for folder in (one, two)]
    assert_same_weights(*weights)
    logits = [torch.load(folder / "teacher_logits.pt", weights_only=True) for folder in (one, two)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert len(np.unique(logits[0][:, 0])) > 12, "an order could not be told from another"
    students = [newest(folder) for folder in (one, two)]
    assert_same_history(*(student["trainer"]["history"] for student in students))
    assert_same_weights(*(student["model"] for student in students))
    assert len(students[1]["trainer"]["rng"]["cpu"]) == 2
    assert not (two / "teacher_logits.partial").exists()


def assert_same_history(one: list, two: list) -> None:
    """Losses and other metrics of 20 updates, in training and in validation."""
    assert len(one) == len(two)
    assert one[-1]["updates"] == two[-1]["updates"] == 20
    for a, b in zip(one, two, strict=True):
        for part in ("train", "validation"):
            assert a[part] == pytest.approx(b[part], abs=1e-5)
    losses = [record["train"]["loss"] for record in one]
    assert max(losses) - min(losses) > 1e-3, "nothing was learned that could differ"


def assert_same_weights(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_one_that_is_killed_ends_all_and_the_run_goes_on(stages, tmp_path):
    """A student of torchrun's two processes, one of which is killed after some updates; then --resume."""
    argv = stages("killed")[2][1]
    argv[argv.index("--epochs") + 1] = "4000"
    argv += ["--save_every", "1", "--resume"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with open(tmp_path / "log", "w") as log:  # a pipe would fill, and hold the run up
        process = subprocess.Popen(
            [*launcher, dse_train_runner.__file__, *argv], stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        deadline = time.monotonic() + LONG
        while "epoch 5 of" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        assert process.wait(timeout=LONG) != 0
    finally:
        process.terminate()
    errors = (tmp_path / "log").read_text()
    assert "lost the connection to another" in errors or "Signal 9" in errors
    reached = len(newest(tmp_path / "killed")["trainer"]["history"])
    argv[argv.index("--epochs") + 1] = str(reached + 2)
    assert f"continuing after {reached} epochs" in run_in_two("dse_train_runner", argv, tmp_path / "resumed")
    assert len(newest(tmp_path / "killed")["trainer"]["history"]) == reached + 2


def test_alone_nothing_changes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (parallel.rank(), parallel.size(), parallel.is_first(), parallel.launched()) == (0, 1, True, False)
    rows = np.arange(5)
    assert parallel.rows_of_rank(rows) is rows
    assert parallel.summed(rows) is rows
    assert parallel.highest(7) == parallel.of_first(7) == 7
    model = torch.nn.Linear(1, 1)
    assert parallel.synchronized(model) is model
    parallel.join(torch.device("cpu"))
    assert parallel.size() == 1


@pytest.mark.parametrize("given", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": ""}])
def test_a_clusters_variables_are_not_torchruns(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert not parallel.launched()
    assert (parallel.rank(), parallel.size()) == (0, 1)


def test_processes_that_go_on_from_different_states_are_told(monkeypatch):
    parallel.agree([3, 2, 1], "what they continue from")
    monkeypatch.setattr(parallel, "_by_rank", lambda numbers, _: np.array([numbers, [4, 2, 1]]))
    with pytest.raises(RunError, match=r"differ in what they continue from; this one has \[3, 2, 1\]"):
        parallel.agree([3, 2, 1], "what they continue from")


def test_several_gpus_are_pointed_out(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert select_device(False, 1) == torch.device("cuda", 1)
    assert "`torchrun --nproc_per_node 3`" in caplog.text
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "2"), ("MASTER_ADDR", "host"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for rank in ("2", "3"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        if rank == "2":
            assert select_device(False, 0) == torch.device("cuda", 2)
        else:
            with pytest.raises(InputError, match="process 3 of this machine has no GPU, since there are 3"):
                select_device(False, 0)
    assert chosen == [torch.device("cuda", 1), torch.device("cuda", 2)]


@pytest.mark.parametrize(("device", "given"), [("cpu", ("gloo", None)), ("cuda:1", ("nccl", torch.device("cuda:1")))])
def test_the_process_group_knows_its_gpu(device, given, monkeypatch):
    """Barriers then take it, and do not guess."""
    calls = []
    monkeypatch.setattr(parallel, "_device", None)
    monkeypatch.setattr(parallel, "launched", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda name, timeout, device_id: calls.append((name, device_id))
    )
    parallel.join(torch.device(device))
    assert calls == [given]
    assert parallel._device == torch.device(device)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("NCCL error: unhandled cuda error. Cuda failure 'out of memory'", RuntimeError),
        ("NCCL error: remote process exited or there was a network error", RunError),
    ],
)
def test_memory_that_runs_out_is_not_a_lost_connection(said, kind, monkeypatch):
    with pytest.raises(Exception, match="NCCL error") as raised, parallel.process_group():
        monkeypatch.setattr(parallel, "_device", CPU)
        raise RuntimeError(said)
    assert type(raised.value) is kind


def score_pairs(places: list[Path]) -> None:
    """One pair, of which a process has none, and 11, scored by the processes together."""
    with parallel.process_group():
        parallel.join(CPU)
        for count, place in zip((1, 11), places, strict=True):
            if not parallel.is_first():
                place = place.with_suffix(".other.npy")
            np.save(place, outputs_of(count))


def outputs_of(count: int) -> np.ndarray:
    features = separate_rows()
    features.first, features.second, features.labels = (
        values[:count] for values in (features.first, features.second, features.labels)
    )
    return infer_pairs(random_student(), Batches(features, "packed", 16), 3, CPU, "pairs", show=False)


def test_more_processes_than_pairs(tmp_path):
    places = [tmp_path / f"{count}.npy" for count in (1, 11)]
    for rank in start_ranks(score_pairs, places, log=tmp_path / "log"):
        ended(rank, tmp_path / "log")
    for count, place in zip((1, 11), places, strict=True):
        for each in (place, place.with_suffix(".other.npy")):
            np.testing.assert_allclose(np.load(each), outputs_of(count), atol=1e-6)
