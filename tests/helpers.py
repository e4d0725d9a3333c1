"""What tests of several layers share: flags, files, tasks, texts and small models. Fixtures are in conftest.py."""

import json
import logging
import os
import random
import signal
from pathlib import Path
from timeit import timeit

import numpy as np
import pytest
import torch
from processes import ROOT
from transformers import BertConfig, BertModel, BertTokenizer

from dse import __main__
from dse.data.features import Ragged, SeparateFeatures
from dse.data.processors import Examples
from dse.data.tasks import REGRESSION, TASKS, Task, get_task
from dse.experiments.synthetic import make_pair
from dse.index import CandidateIndex
from dse.networks.config import HEAD_TYPES, DSEConfig
from dse.networks.pretrained import bert_config
from dse.networks.student import SiameseNetwork, empty_network
from dse.storage import states
from dse.storage.checkpoint import Checkpoint
from dse.system.errors import InputError
from dse.training import trainer

# Flags, programs and how they end


def as_flags(values: dict[str, object]) -> list[str]:
    """{"epochs": 2, "fp16": True, "seed": None} to ["--epochs", "2", "--fp16"]."""
    flags: list[str] = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        flags.append(f"--{name}")
        if value is not True:
            flags += [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    return flags


def moved(argv: list[str], changes: dict[str, object]) -> list[str]:
    """The flags with other values."""
    argv = list(argv)
    for flag, value in changes.items():
        argv[argv.index(f"--{flag}") + 1] = str(value)
    return argv


def command_main(*command: str):
    """The main of a command, such as `index` or `benchmark training`."""
    return lambda argv: __main__.main([*command, *argv])


def stopped(main, argv: list[str], capsys) -> tuple[int, str]:
    """The exit code and the one line of a script that a signal or an error ended."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if ".py: " in line]
    assert len(lines) == 1
    return stop.value.code, lines[0]


def stop_at(monkeypatch, number: int, call: str = "update", sent: int = signal.SIGTERM) -> None:
    """Send this process a signal within the trainer's n-th update, or its n-th writing of a state, from here on."""
    owner, name = {"update": (trainer.Trainer, "update"), "write": (states, "save_tensors")}[call]
    original, calls = getattr(owner, name), []

    def counted(*args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), sent)
        return original(*args)

    monkeypatch.setattr(owner, name, counted)


# Files and folders

SHORT_RUN = {"gradient_accumulation_steps": 1, "save_every": 2}
# Heads: names for tests, and the flags of the architecture.
HEADS = {name: {"siamese_head_type": name} for name in HEAD_TYPES}
HEADS["symmetric"] = {"siamese_head_type": "residual", "symmetric": True}
STAMP = r"\d{4}_\d\d_\d\d-\d\d_\d\d_\d\d"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path, place: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def results_of(folder: Path) -> dict[str, str]:
    lines = (folder / "eval_results.txt").read_text().splitlines()
    assert lines == sorted(lines)
    return dict(line.split(" = ") for line in lines)


def assert_same_run(first: Path, second: Path) -> None:
    """Bit for bit the same weights, optimizer, random state and metrics; other times may have passed."""
    a, b = (vars(Checkpoint.read(path)) for path in (first, second))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    moments = [
        [tensor for state in c["trainer"]["optimizer"]["state"].values() for tensor in state.values()] for c in (a, b)
    ]
    assert len(moments[0]) == 2 * len(a["model"])
    assert all(torch.equal(x, y) for x, y in zip(*moments, strict=True))
    assert torch.equal(*(c["trainer"]["rng"]["cpu"][0] for c in (a, b)))
    for x, y in zip(a["trainer"]["history"], b["trainer"]["history"], strict=True):
        assert {**x, "seconds": 0} == {**y, "seconds": 0}


# Tasks, rows and texts

REAL = ROOT.parent / "shared" / "data" / "glue_data"
REAL_MRPC = REAL / "MRPC"
MRPC, SST_2, MNLI = get_task("mrpc"), get_task("sst-2"), get_task("mnli")
PAIR_TASKS = ("mrpc", "qqp", "qnli", "rte", "wnli", "sts-b", "mnli", "mnli-mm", "snli", "allnli")
NAMED = {"kind": "binary", "labels": ["no", "yes"], "text_a": "q", "text_b": "a", "label": "good"}
OWN_TASK = {  # the label of what is wanted comes first
    "kind": "binary", "labels": ["match", "other"], "rank_label": "match",
    "text_a": "left", "text_b": "right", "label": "verdict", "test": "test.tsv",
}  # fmt: skip
DEEP = "[" * 100_000
PAIRS = [make_pair(random.Random(seed))[1:] for seed in range(9)]
TEXTS = [text for pair in PAIRS for text in pair]
TRIO = ["the doctor sold a car .", "a physician traded a vehicle .", "soon"]
ODD_TEXTS = [
    "the doctor bought a car",
    "dóctor Lamp",
    "日本 the",
    "a\u200bcar\x07 sold",
    "[UNK] x[SEP]y [MASK] thief",
    "lamp" * 30,
]
CANDIDATES = [make_pair(random.Random(seed))[2] for seed in range(23)]
QUERIES = [make_pair(random.Random(seed))[1] for seed in (100, 101, 102)]
TWO_ROWS = Examples(["a car", "the town"], ["a ship", "the city"], [1, 0], [{"file": "train.tsv", "sha256": "1" * 64}])


def write_task(folder: Path, task: Task, rows: int = 24) -> Path:
    """Write all labelled files of a task below `folder`, made-up sentences in the task's columns."""
    if task.parts:
        for part in task.parts:
            write_task(folder / TASKS[part].folder, TASKS[part], rows)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    files = [task.train, task.dev, *(file for _, file in task.also_validate)]
    for seed, file in enumerate(filter(None, files)):
        rng = random.Random(seed)
        lines = ["\t".join(f"column{i}" for i in range(11))] if task.header else []
        for _ in range(rows):
            positive, first, second = make_pair(rng)
            cells = [""] * 11
            cells[task.text_a] = first
            if task.text_b is not None:
                cells[task.text_b] = second
            if task.kind == REGRESSION:
                cells[task.label] = f"{2.0 + 2 * positive + rng.random():.2f}"
            else:
                cells[task.label] = task.labels[positive if len(task.labels) == 2 else rng.randrange(3)]
            lines.append("\t".join(cells))
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def own_task(tmp_path, **line) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"kind": "binary", "labels": ["no", "yes"], "text_a": 0, "label": -1, **line}))
    return path


def outcome(work, caplog) -> object:
    """What `work` gives, with the warnings if there are any, or how it is refused."""
    with caplog.at_level(logging.WARNING, "dse"):
        try:
            value = work()
        except InputError as error:
            assert "\n" not in str(error)
            return str(error)
    return (value, caplog.text) if caplog.text else value


def check_outcome(found: object, expected: object) -> None:
    if isinstance(expected, str):
        assert isinstance(found, str), found
        assert expected in found
    elif isinstance(expected, tuple):
        assert found[0] == expected[0]
        assert expected[1] in found[1]
        assert found[1].count("WARNING") == 1
    else:
        assert found == expected


def names_of(table) -> list[str]:
    return [line[0] for line in table]


# Tokenizers and models

CLS, SEP, PAD = 2, 3, 0
WORDS, RULES = "tokenizer.json", "tokenizer_config.json"
BERT_FILES = {"config": "config.json", "words": WORDS, "rules": RULES}
LENGTHS = [3, 12, 7, 7, 2, 9, 4, 5, 12, 3, 6]  # in two groups, both with padding


def set_entries(folder: Path, entries: dict[str, object]) -> None:
    """Set entries by `<one of BERT_FILES>.<dotted name>`; the file is made if need be. None takes one out."""
    for name, value in entries.items():
        file, *above, last = name.split(".")
        path = folder / BERT_FILES[file]
        content = place = json.loads(path.read_text()) if path.exists() else {}
        for key in above:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
        path.write_text(json.dumps(content, default=lambda value: None))


def change_folder(folder: Path, changes) -> Path:
    for each in changes if isinstance(changes, list) else [changes]:
        each(folder) if callable(each) else set_entries(folder, each)
    return folder


def with_tokens(*tokens: str):
    """A change that adds tokens, the first one a special one, and resizes the embeddings."""

    def change(folder: Path) -> None:
        tokenizer = BertTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": [tokens[0]]})
        tokenizer.add_tokens(list(tokens[1:]))
        model = BertModel.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return change


def config_of(bert, **changes) -> DSEConfig:
    values = {"pooler_num_top_hidden_layers": 2, "fc_dims": (8, 1), **changes}
    return DSEConfig(bert=bert_config(bert, "--bert_model"), **values)


def random_bert(**changes) -> dict:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = {"vocab_size": 50, "max_position_embeddings": 16, "initializer_range": 0.3}
    return BertConfig(**{**config, **sizes, **none, **changes}).to_dict()


def random_student(pooler: str = "concat_top_mean", layers: int = 2, **changes) -> SiameseNetwork:
    torch.manual_seed(1)
    flags = {"pooler_type": pooler, "pooler_num_top_hidden_layers": layers, "fc_dims": (5, 1)}
    model = empty_network(DSEConfig(bert=random_bert(**changes), **flags))
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def ragged_rows(lengths: list[int]) -> Ragged:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(rng.integers(1, 50, offsets[-1]).astype(np.int32), offsets)


def separate_rows(lengths: list[int] = LENGTHS) -> SeparateFeatures:
    texts = np.arange(len(lengths), dtype=np.int32)
    return SeparateFeatures(ragged_rows(lengths), texts, texts[::-1].copy(), np.zeros(len(lengths), np.int64), pad_id=0)


def one_turn(variants, rounds, peak=lambda: 0.0, device="cpu"):
    """As `take_turns`, each variant once; what it measures has tests of its own."""
    return {name: timeit(run, number=1) for name, run in variants.items()}, dict.fromkeys(variants, 0.0), peak() or 1.0


def pair_scores(model, queries: list[str], candidates: list[str]) -> np.ndarray:
    """The second way: every pair through the head as in training, (queries, candidates, outputs)."""
    scores = model.score([(query, candidate) for query in queries for candidate in candidates])
    return scores.reshape(len(queries), len(candidates), -1)


def made_up(
    student, task: str = "mrpc", spread: float = 1.0, scale: float = 60.0, count: int = 200, **options
) -> CandidateIndex:
    """An index of embeddings that differ by so much, and a residual head with that scale of its cosine."""
    model = student(task, siamese_head_type="residual", **options)
    head = model.network.siamese_head
    outputs = len(head.scale)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        head.start_at(torch.linspace(scale, scale / 2, outputs), torch.linspace(-99.0, -98.0, outputs))
        head.fc_layers[-1].weight.copy_(torch.from_numpy(rng.normal(size=head.fc_layers[-1].weight.shape)))
    size = model.network.config.embedding_size
    rows = rng.normal(size=(1, size)) + spread * rng.normal(size=(count, size))
    return CandidateIndex.from_embeddings(model, [(rows.astype(np.float32), [f"row {i}" for i in range(count)])])
