"""What a student is made of: the names a user may choose, and the checks that need no tensor.

The module loads no torch, so that flags are refused at once.
"""

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Any

from dse.data.tasks import Task
from dse.networks.poolers import POOLERS, Pooler
from dse.system.errors import InputError

MAX_SEQ_LENGTH = 128  # the scripts' default
HEAD_TYPES = ("concat", "dot", "residual")  # heads.HEADS has a class for each
MOST_DROPOUT = 65535 / 65536  # packed batches draw 16 bits per element (packed_bert.py)
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")  # of the encoder (encoder.py)
PADDINGS = ("packed", "batch", "max")  # how batches are laid out (batches.py)


@dataclass(frozen=True)
class DSEConfig:
    """A student's architecture; a checkpoint carries it, so that loading needs no flags."""

    bert: dict[str, Any]  # the encoder's configuration, as in its config.json
    pooler_type: str = "concat_top_mean"
    pooler_num_top_hidden_layers: int = 4
    siamese_head_type: str = "concat"
    additional_embedding_layer_size: int = -1  # -1: none
    fc_dims: tuple[int, ...] = (512, 1)
    freeze_bert: bool = False
    symmetric: bool = False  # do outputs become the mean of those of (u, v) and (v, u)?

    @classmethod
    def from_flags(cls, args: argparse.Namespace, bert: dict[str, Any]) -> "DSEConfig":
        """The architecture that the flags of cli.add_architecture_flags describe, over that BERT."""
        flags = {field.name: getattr(args, field.name) for field in fields(cls) if field.name != "bert"}
        return cls.from_dict({**flags, "bert": bert})

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "DSEConfig":
        """The architecture that `to_dict` wrote. Raises KeyError or TypeError if entries are missing or unknown."""
        return cls(**{**entries, "fc_dims": tuple(entries["fc_dims"])})

    def to_dict(self) -> dict[str, Any]:
        """The architecture as JSON values, as checkpoints and folders store it."""
        return {**asdict(self), "fc_dims": list(self.fc_dims)}

    @property
    def pooler(self) -> Pooler:
        """What turns hidden states into a vector."""
        return POOLERS[self.pooler_type]

    @property
    def pooled_size(self) -> int:
        """Width of the pooled vector, before any additional layer."""
        return self.bert["hidden_size"] * (self.pooler_num_top_hidden_layers if self.pooler.side_by_side else 1)

    @property
    def embedding_size(self) -> int:
        """Width of a sentence's embedding."""
        added = self.additional_embedding_layer_size
        return self.pooled_size if added == -1 else added

    @property
    def top_size(self) -> int:
        """How many of an embedding's last columns are the top layer's; all of them if layers are not side by side."""
        added = self.additional_embedding_layer_size != -1
        return self.embedding_size if added or not self.pooler.side_by_side else self.bert["hidden_size"]


def check_fc_dims(fc_dims: list[int], task: Task) -> None:
    """Raise InputError unless the head's last layer is as wide as the task's outputs."""
    if fc_dims[-1] != (needed := task.num_student_outputs):
        raise InputError(
            f"--fc_dims: the last size is {fc_dims[-1]}, but {task.name} ({task.kind}) needs {needed}: "
            f"try --fc_dims {' '.join(map(str, [*fc_dims[:-1], needed]))}"
        )


def check_fits_bert(bert: dict[str, Any], max_seq_length: int, num_top_layers: int = 1) -> None:
    """Raise InputError when a length or a number of layers is more than this BERT has."""
    positions, layers = bert.get("max_position_embeddings", 512), bert.get("num_hidden_layers", 12)
    for flag, asked, most, what in (
        ("--max_seq_length", max_seq_length, positions, "positions"),
        ("--pooler_num_top_hidden_layers", num_top_layers, layers, "layers"),
    ):
        if asked > most:
            raise InputError(f"{flag}: {asked} is above the model's {most} {what}: give {most} or less")
