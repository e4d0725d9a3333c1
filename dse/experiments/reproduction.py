"""The paper's comparison: a teacher, its student, two controls and Sentence-BERT, per task and seed, each done once.

    <output_dir>/mrpc_seed1/teacher.json   the record of a finished stage: settings, results, hashes of inputs and files
    <output_dir>/mrpc_seed1/teacher/       what its script wrote

This module knows what is left; stages.py does it. A stage is done while its record has the same inputs and its files
have their hashes. A folder that was made with other settings is refused.
"""

import importlib.util
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from dse.data.processors import labelled_test, read_examples
from dse.data.tasks import Task
from dse.data.tokenizers import load_tokenizer, saved_casing, tokenizer_key
from dse.experiments.presets import SENTENCE_BERT, STAGES, STUDENTS, VARIANTS, Preset
from dse.networks.config import check_fits_bert
from dse.networks.pretrained import bert_config, bert_hashes, find_bert
from dse.system.errors import InputError, one_line
from dse.system.files import read_json, sha256_file

logger = logging.getLogger(__name__)

FORMAT = "dse stage 1"
# Seconds per training pair and epoch (of a stage without epochs: per pair) for the 6-layer BERT on two cores, in
# proportion to layers x hidden size^2 for other encoders. They count until something was timed.
_SECONDS = {"teacher": 0.02, "logits": 0.005, **dict.fromkeys(STUDENTS | VARIANTS, 0.02), "sentence_bert": 0.13,
            "encoder": 0.001, "rates": 0.01}  # fmt: skip
_MEASURED_ON = 6 * 384**2


class Encoder(NamedTuple):
    """The pre-trained BERT that teacher, students and Sentence-BERT begin with."""

    folder: Path
    hashes: dict[str, str]  # SHA-256 of its weights and configuration, and its tokenizer's key
    lower_case: bool


def open_encoder(name: str, preset: Preset, who: str) -> Encoder:
    """The encoder of --bert_model. Raises InputError if it is too small for the preset, which `who` uses."""
    folder = find_bert(name, "--bert_model")
    try:
        check_fits_bert(bert_config(folder, "--bert_model"), preset.max_seq_length, preset.top_layers)
    except InputError as error:
        needs = f"{preset.max_seq_length} positions and {preset.top_layers} layers"
        raise InputError(f"--bert_model: {folder} has less than {who} needs, {needs}") from error
    lower_case = saved_casing(folder, "--bert_model") is not False
    tokenizer = load_tokenizer(folder, lower_case, "--bert_model")
    return Encoder(folder.resolve(), {**bert_hashes(folder), "tokenizer": tokenizer_key(tokenizer)}, lower_case)


def has_sentence_transformers() -> bool:
    """Whether a version of sentence-transformers that the baseline can use is installed."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return False
    try:
        from sentence_transformers.sentence_transformer import losses  # noqa: F401
    except ImportError as error:
        logger.warning("sentence-transformers %s is not 6.x: %s", version("sentence-transformers"), one_line(error))
        return False
    return True


@dataclass(eq=False)
class Experiment:
    """A task and seed: its data, what its stages are made from, and which of them are done."""

    preset: Preset
    task: Task
    seed: int
    data_dir: Path  # the task's folder
    encoder: Encoder
    folder: Path  # of everything that is made
    stages: list[str]  # those to do, of STAGES
    task_name: str = ""  # as the scripts take it: an own task's JSON file; empty: the task's name

    def __post_init__(self) -> None:
        self.train = read_examples(self.task, self.data_dir, "train")
        test = labelled_test(self.task, self.data_dir)
        self.sets = {"dev": read_examples(self.task, self.data_dir, "dev"), **({} if test is None else {"test": test})}
        others = [read_examples(self.task, self.data_dir, split).files for split, _ in self.task.also_validate]
        self.data = sum(others, self.train.files + self.sets["dev"].files)  # what the scripts read
        self.data_dir = self.data_dir.resolve()  # however it is spelled next time, and the folder too
        self.folder = self.folder.resolve()

    def settings(self, stage: str) -> dict[str, Any]:
        """All that the user chose and that decides what a stage gives: flags, data, encoder."""
        chosen = SENTENCE_BERT if stage == "sentence_bert" else {"flags": self.preset.flags(stage, self.task)}
        return {"task": self.task.name, "seed": self.seed, "data": self.data, "bert": self.encoder.hashes,
                "do_lower_case": self.encoder.lower_case, "max_seq_length": self.preset.max_seq_length,
                **chosen}  # fmt: skip

    def record(self, stage: str) -> dict[str, Any]:
        """The record of a stage; {} if it is not done."""
        return read_record(self.folder / f"{stage}.json")

    def inputs(self, stage: str) -> dict[str, Any]:
        """Hashes of what a stage reads from those before it, which must be done, without the JSON that describes it."""
        return {
            name: {file: key for file, key in self.record(name)["files"].items() if not file.endswith(".json")}
            for name in STAGES[stage]
        }

    def check_settings(self, flag: str) -> None:
        """Raise InputError, naming the flag of the output and both values, if a finished stage had other settings."""
        done = {stage: record for stage in self.stages if (record := self.record(stage))}
        for stage, record in done.items():
            for key, value in self.settings(stage).items():
                if (there := record["settings"].get(key, value)) != value:  # an older record may lack a key
                    made = f"{self.folder / stage} was made with {key} {there}, and now it is {value}"
                    raise InputError(f"{flag}: {made}; name another {flag}, or remove what is there")
            for split in set(self.sets) - set(record.get("metrics", self.sets)):
                logger.warning("%s was done before the labels of %s were there", self.folder / stage, split)

    def left(self) -> list[str]:
        """The stages, in order, that are not done or were made from other files than those that are there."""
        left: list[str] = []
        for stage in self.stages:
            record = self.record(stage)
            if record and not set(STAGES[stage]) & set(left) and record["inputs"] == self.inputs(stage):
                files = {name: sha256_file(path) for name in record["files"] if (path := self.folder / name).is_file()}
                if files == record["files"]:
                    continue
            left.append(stage)
        return left

    def expected_seconds(self, stage: str) -> float:
        """How long a stage takes on the machine of _SECONDS."""
        bert = bert_config(self.encoder.folder, "--bert_model")
        size = bert["num_hidden_layers"] * bert["hidden_size"] ** 2 / _MEASURED_ON
        return _SECONDS[stage] * len(self.train) * self.preset.epochs(stage) * size


Left = list[tuple[Experiment, str]]  # stages that are not done


def seconds_left(works: list[Experiment], left: Left) -> float:
    """An estimate for the stages that are left, from the time that the finished ones took here."""
    done = [(work, stage, record) for work in works for stage in work.stages if (record := work.record(stage))]
    expected = sum(work.expected_seconds(stage) for work, stage, _ in done)
    pace = sum(record["seconds"] for *_, record in done) / expected if done else 1.0
    return pace * sum(work.expected_seconds(stage) for work, stage in left)


def read_record(path: Path) -> dict[str, Any]:
    """The record of a stage; {} if there is none."""
    if not path.is_file():
        return {}
    record = read_json(path, "the record of a stage")
    if record.get("format") != FORMAT:
        raise InputError(f"{path}: not a record that this version reads; name another --output_dir, or move it away")
    return record
