"""A tiny BERT and tiny data in every task's layout, made once per session; nothing is downloaded."""

import gc
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from dse import index as index_module
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.experiments.synthetic import write_tiny_bert
from dse.models import DSESiameseClassifier
from dse.networks import heads
from dse.networks.config import DSEConfig
from dse.networks.pretrained import bert_config
from dse.networks.student import new_network
from dse.storage import index_files
from dse.storage.logits import logits_identity, save_logits

pytest.register_assert_rewrite("helpers")
from helpers import as_flags, write_task  # noqa: E402

gc.freeze()  # what the imports made stays, and collections, of which benchmarks make many, need not look at it
torch.set_num_threads(1)  # for models this small; on a busy machine threads wait for each other for minutes


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    """A tiny uncased BERT: 2 layers, hidden size 32, dropout 0.05."""
    folder = tmp_path_factory.mktemp("models") / "tiny_bert"
    write_tiny_bert(folder, seed=0, hidden_size=32)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A function from a task's name to a folder of its tiny data, made once. Tests that spoil it copy it first."""
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = write_task(tmp_path_factory.mktemp("data") / name, get_task(name))
        return made[name]

    return folder_of


@pytest.fixture(scope="session")
def logits(tmp_path_factory, data):
    """A function from a task's name to random teacher logits that belong to its tiny data."""
    folder = tmp_path_factory.mktemp("logits")

    def path_of(name: str) -> Path:
        path = folder / f"{name}_logits.pt"
        if not path.exists():
            task = get_task(name)
            examples = read_examples(task, data(name), "train")
            values = torch.randn(len(examples), task.num_logits, generator=torch.Generator().manual_seed(0))
            save_logits(path, values, logits_identity(task, examples.files, len(examples)))
        return path

    return path_of


@pytest.fixture
def student_flags(bert, data, logits, tmp_path):
    """A function from a task's name to flags with which dse_train_runner trains a tiny student in a second."""

    def flags(name: str = "mrpc", **changes: object) -> list[str]:
        values: dict[str, object] = {
            "task_name": name,
            "data_dir": changes.get("data_dir") or data(name),
            "distillation_logits_path": changes.get("distillation_logits_path") or logits(name),
            "bert_model": bert,
            "do_lower_case": True,
            "max_seq_length": 32,
            "pooler_num_top_hidden_layers": 2,
            "fc_dims": [8, get_task(name).num_student_outputs],
            "epochs": 2,
            "batch_size": 8,
            "lr": 1e-3,
            "store_checkpoints": True,
            "checkpoint_dir": tmp_path / "checkpoints",
            "log_dir": tmp_path / "logs",
            **changes,
        }
        return as_flags(values)

    return flags


@pytest.fixture
def student(bert):
    """A function that makes an untrained student of a task, the same one each time, ready for texts."""

    def make(name: str = "mrpc", **changes: object):
        torch.manual_seed(3)
        task, config = get_task(name), bert_config(bert, "bert")
        architecture = {"pooler_num_top_hidden_layers": 2, "fc_dims": (8, task.num_student_outputs), **changes}
        network = new_network(bert, DSEConfig(config, **architecture)).eval()
        if network.config.siamese_head_type == "residual":  # its last layer is 0 before training
            torch.nn.init.normal_(network.siamese_head.fc_layers[-1].weight)
        return DSESiameseClassifier(network, load_tokenizer(bert, True, "bert"), task, 32)

    return make


@pytest.fixture
def teacher_flags(bert, data, tmp_path):
    """The same for finetune_bert.py."""

    def flags(name: str = "mrpc", **changes: object) -> list[str]:
        values: dict[str, object] = {
            "task_name": name,
            "data_dir": data(name),
            "bert_model": bert,
            "do_lower_case": True,
            "max_seq_length": 48,
            "do_train": True,
            "do_eval": True,
            "train_batch_size": 8,
            "num_train_epochs": 1,
            "learning_rate": 1e-3,
            "output_dir": tmp_path / "teacher",
            "log_dir": tmp_path / "logs",
            **changes,
        }
        return as_flags(values)

    return flags


@pytest.fixture
def refused(capsys):
    """A function that runs a script's main and gives the one line with which it refuses, after checking exit code 2."""

    def line_of(main, argv: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(flag) for flag in argv])
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
        assert len(lines) == 1
        return lines[0]

    return line_of


@pytest.fixture
def copied(tmp_path):
    """A function that copies a folder so that a test can spoil it."""

    def copy(folder: Path, name: str = "copy") -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy


@pytest.fixture
def edit_json():
    """A function that changes entries of a JSON file; None removes one."""

    def edit(path: Path, **changes: object) -> None:
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return edit


@pytest.fixture
def checkpoints(tmp_path):
    """A function that lists the checkpoints below the test's folder, by epoch."""

    def listed(folder: str = "checkpoints") -> list[Path]:
        paths = (tmp_path / folder).glob("*/*.pt")
        return sorted(paths, key=lambda path: int(path.stem.rsplit("_", 1)[1]))

    return listed


@pytest.fixture(scope="module")
def tokenizer(bert):
    return load_tokenizer(bert, True, "--bert_model")


@pytest.fixture
def told(caplog):
    """A function that does some work and gives the lines that were logged of dev.tsv, with their levels."""

    def lines(work) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "dse"):
            work()
        records = [(record.levelname, record.getMessage()) for record in caplog.records]
        return [f"{level} {line}" for level, line in records if line.startswith("dev.tsv: ")]

    return lines


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 5 rows, made 8 at a time, two queries at once: nothing ends where something else does."""
    places = ((index_files, "BLOCK", 5), (index_module, "BLOCK", 5), (index_module, "_EMBED_AT_ONCE", 8),
              (index_files, "_NEAREST_AT_ONCE", 2))  # fmt: skip
    for module, name, value in (*places, (index_module, "_QUERIES", 2), (heads, "_PART", 40)):
        monkeypatch.setattr(module, name, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First of all, begin what takes long in processes of its own."""
    items.sort(key=lambda item: item.name != "test_the_scenarios_begin")
