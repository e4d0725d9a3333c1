"""Measure a student's embeddings on other tasks: cosines on STS-B, logistic regression on frozen embeddings.

    python -m dse transfer --model FOLDER --data_dir glue_data

Prints a Markdown table, which also shows two baselines: the mean of the encoder as downloaded, and a bag of words. It
covers every classification task that has train and dev files in --data_dir, and test sets that have labels.
"""

import argparse
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dse import cli
from dse.commands import load_student, logger
from dse.data.tasks import REGRESSION
from dse.networks.pretrained import find_bert
from dse.system.errors import InputError
from dse.system.files import check_output_file, write_json


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    cli.add_student_flag(parser)
    add("--data_dir", default="glue_data", help="folder with a folder for each task")
    add("--bert_model", default="", help="encoder to compare with (default: the one that the student started from)")
    add("--max_rows", type=cli.whole_number(10), default=20_000, help="training rows per task at most, from the start")
    add("--output", default="", help="JSON file for the numbers")
    cli.add_call_flag(parser)
    cli.add_inference_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Measure every kind of embeddings on every task at hand; print the table."""
    # 1. Refuse what cannot work, and read the data.
    data_dir = Path(args.data_dir)
    if not data_dir.is_dir():
        raise InputError(f"--data_dir: {data_dir} is not a folder; expected one with GLUE's folders, MRPC and so on")
    if args.output:
        check_output_file(args.output, "--output")
    from dse.experiments import transfer

    data = transfer.read_tasks(data_dir, args.max_rows)
    if not data:
        raise InputError(f"--data_dir: {data_dir} has no task's train and dev files; download_glue_data.py gets them")
    student = load_student(args)
    began = [flags["bert_model"] for _, flags in student.origin.get("commands", []) if "bert_model" in flags]
    if not (args.bert_model or began):
        raise InputError("--bert_model: the student does not say which encoder it started from; give that encoder")
    bert = find_bert(args.bert_model or began[-1], "--bert_model")
    embedders = {
        "DSE": partial(student.encode, batch_size=args.batch_size),
        "encoder as downloaded": transfer.encoder_embedder(bert, student, args.batch_size),
    }

    # 2. Each task, with each kind of embeddings.
    found: dict[str, dict[str, Any]] = {}
    for task, (train, sets) in data.items():
        counts = sets if task.kind == REGRESSION else {"train": train, **sets}
        logger.info("%s: %s", task.name, ", ".join(f"{split} {len(rows)}" for split, rows in counts.items()))
        kinds = {**embedders, "bag of words": transfer.bag_of_words(list(chain(*train.sides)))}
        found[dict(args.call).get(task.name, task.folder)] = {
            name: transfer.measure(embed, task, train, sets)
            for name, embed in tqdm(kinds.items(), desc=task.name, disable=None, leave=False)
        }

    # 3. The table.
    print("\n" + transfer.to_markdown(found))
    if args.output:
        about = {"model": args.model, "task": student.task.name, "max_rows": args.max_rows}
        write_json(args.output, {**about, "results": found})
