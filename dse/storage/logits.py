"""The file of teacher logits, with proof of what it belongs to."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dse.data.tasks import Task
from dse.system.errors import InputError
from dse.system.files import load_tensors, read_json, save_tensors, sha256_file, write_json

logger = logging.getLogger(__name__)


def save_logits(path: str | Path, logits: Tensor, about: dict[str, Any]) -> None:
    """Write the tensor and, beside it, the JSON of `logits_identity` with the tensor file's hash.

    Raises InputError for NaN or infinite logits, of a teacher whose training diverged.
    """
    path = Path(path)
    if not bool(logits.isfinite().all()):
        raise InputError(f"{path}: not written: the teacher gives NaN or infinite logits; train it at a lower rate")
    save_tensors(path, logits.to(torch.float32).cpu().contiguous())
    write_json(path.with_suffix(".json"), {**about, "sha256": sha256_file(path)})


def logits_identity(task: Task, files: list[dict[str, str]], rows: int) -> dict[str, Any]:
    """What logits and the training that uses them must agree on."""
    return {
        "task": task.name,
        "labels": list(task.labels),
        "columns": [task.text_a, task.text_b, task.label],
        "rows": rows,
        "width": task.num_logits,
        "data": files,
    }


def load_logits(path: str | Path, expected: dict[str, Any]) -> Tensor:
    """Read a logits file, float32, (rows, width), after checking that it belongs to this training.

    `expected` is the training's `logits_identity`. Raises InputError, naming both sides, for logits of another one, and
    for a file that is not a whole tensor. A tensor without JSON, as the original writes it, is taken with a warning.
    """
    path, again = Path(path), "make the logits again with run_distillation_logits_creator.py"
    beside = path.with_suffix(".json")
    if beside.is_file():
        about = read_json(beside, "the description of the logits")
        for key, value in expected.items():
            if about.get(key) != value:
                raise InputError(
                    f"{path}: made for another training ({key}: {about.get(key)} there, {value} here); {again}"
                )
        if about.get("sha256") != sha256_file(path):
            raise InputError(f"{path}: not the tensor that {beside.name} describes; {again}")
    else:
        logger.warning("%s: no %s beside it, so only rows and width can be checked", path, beside.name)
    logits = load_tensors(path, f"{path}: not a whole logits file; {again}")
    wanted = (expected["rows"], expected["width"])
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or tuple(logits.shape) != wanted:
        found = (logits.dtype, tuple(logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"{path}: expected floats of shape {wanted}, (rows, labels), found {found}; {again}")
    if not bool(logits.isfinite().all()):
        raise InputError(f"{path}: holds NaN or infinite logits; {again} from a sound teacher")
    return logits.to(torch.float32)
