"""Predict a task's test set with a teacher or a student, in the format of GLUE's leaderboard.

    python -m dse predict --model FOLDER --task_name mrpc --data_dir glue_data/MRPC --output_dir predictions

Writes <output_dir>/MRPC.tsv (GLUE_FILES has the other names; your own task gives <name>.tsv). It has a line per row of
the test file, in order: `index` from 0, and `prediction`, which is the label's name or a score.
"""

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dse import cli
from dse.commands import logger
from dse.data.processors import column_of, read_examples
from dse.data.tasks import BINARY, check_threshold, get_task
from dse.system.device import describe_device, select_device
from dse.system.errors import InputError
from dse.system.files import check_output_file, write_text
from dse.system.text_files import tsv_line

GLUE_FILES = {
    "cola": "CoLA", "sst-2": "SST-2", "mrpc": "MRPC", "qqp": "QQP", "sts-b": "STS-B", "mnli": "MNLI-m",
    "mnli-mm": "MNLI-mm", "qnli": "QNLI", "rte": "RTE", "wnli": "WNLI", "diagnostic": "AX",
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    add("--model", required=True, help="a student, as `score` takes it, or the folder of a teacher")
    cli.add_task_flags(parser)
    add("--output_dir", required=True, help="folder for the file; a file of the same name is replaced")
    add("--threshold", type=cli.threshold, help="binary: second label above this probability (default: the model's)")
    add(
        "--scores",
        action="store_true",
        help="a third column, score, as `evaluate` writes it; not for GLUE's leaderboard",
    )
    add("--id_column", help="column of the test file whose cells take the place of the row numbers")
    cli.add_inference_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Read the test set, predict, and write GLUE's file."""
    # 1. Refuse what cannot work, and read the rows, before anything heavy is loaded.
    task = get_task(args.task_name)
    path = Path(args.output_dir) / f"{GLUE_FILES.get(task.name, task.name)}.tsv"
    if task.test is None:
        raise InputError(f"--task_name: {task.name} has no test file to predict")
    check_output_file(path, "--output_dir", [Path(args.data_dir) / task.test])
    check_threshold(task, args.threshold)
    # Every row needs an answer: a skipped one would shift the numbers of those after it.
    rows = read_examples(replace(task, skip_short_rows=False), args.data_dir, "test")
    ids = column_of(Path(args.data_dir) / task.test, args.id_column, "--id_column") if args.id_column else None
    from dse.experiments.predictions import answers, load_scorer, scores_of
    from dse.training.kinds import tell_agreement

    # 2. Predict.
    precision = cli.precision_of(args)
    device = select_device(args.disable_gpu, args.gpu_id, precision)
    score, threshold = load_scorer(args.model, task, device, args.batch_size, precision)
    threshold = threshold if args.threshold is None else args.threshold
    above = f", {task.labels[1]!r} above a probability of {threshold}" if task.kind == BINARY else ""
    logger.info("%d rows of %s on %s%s", len(rows), task.name, describe_device(device, precision), above)
    outputs = score(rows)
    predictions = answers(task, outputs, threshold)
    if rows.labels is not None:
        tell_agreement(task, outputs, np.array(rows.labels), "the model", "the file's labels", threshold)

    # 3. Write.
    columns: dict[str, Any] = {"index": range(len(rows)) if ids is None else ids, "prediction": predictions}
    columns |= {"score": scores_of(task, outputs)[0]} if args.scores else {}
    write_text(path, "".join(map(tsv_line, [columns, *zip(*columns.values(), strict=True)])))
    counts = Counter(predictions).most_common() if task.labels else []
    logger.info("%s: %s", path, ", ".join(f"{label} {count}" for label, count in counts) or f"{len(rows)} scores")
