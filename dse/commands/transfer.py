"""What a student's embeddings are worth on other tasks: cosines on STS-B, logistic regression on frozen embeddings.

    python -m dse transfer --model FOLDER --data_dir glue_data

Beside two baselines: the mean of the encoder as downloaded, and a bag of words. Every classification task whose train
and dev files lie in --data_dir counts (test sets too, where their labels are at hand). Prints a Markdown table.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dse import cli
from dse.commands import load_student
from dse.data.processors import labelled_test, read_examples
from dse.data.tasks import TASKS
from dse.networks.pretrained import find_bert
from dse.system.errors import InputError
from dse.system.files import check_output_file, write_json

if TYPE_CHECKING:
    from dse.experiments.transfer import Embedder
    from dse.models import DSESiameseClassifier

PROG = "python -m dse transfer"
BASELINES = ("encoder as downloaded", "bag of words")
logger = logging.getLogger("dse.transfer")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; exits with code 2 and one line for those that cannot be."""
    parser = cli.Parser(prog=PROG, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a student's folder (`best` of a run, or `python -m dse export`) or hub name")
    add("--data_dir", default="glue_data", help="folder with a folder for each task")
    add("--bert_model", default="", help="the encoder as downloaded; empty: the one of the student's training")
    add("--max_rows", type=cli.whole_number(10), default=20_000, help="training rows of a task, from its start")
    add("--output", default="", help="JSON file for the numbers")
    cli.add_call_flag(parser)
    cli.add_inference_flags(parser)
    return parser.parse_args(argv)


def bert_of(args: argparse.Namespace, student: "DSESiameseClassifier") -> Path:
    """Folder of the pre-trained encoder."""
    commands = (student.origin or {}).get("commands", [])
    name = args.bert_model or next((flags["bert_model"] for _, flags in commands[::-1] if "bert_model" in flags), "")
    if not name:
        raise InputError("--bert_model: the student does not tell which encoder it began with; give it")
    return find_bert(name, "--bert_model")


def run(args: argparse.Namespace) -> None:
    """Measure every task at hand with every kind of embeddings; the table."""
    # 1. Refuse what cannot work, and read the data.
    data_dir = Path(args.data_dir)
    if not data_dir.is_dir():
        raise InputError(f"--data_dir: {data_dir} is no folder; expected one with GLUE's folders, MRPC and so on")
    if args.output:
        check_output_file(args.output, "--output")
    cli.set_up_logging()
    from dse.experiments import transfer

    sts = TASKS["sts-b"]
    similar = read_examples(sts, data_dir / sts.folder, "dev") if transfer.is_at_hand(sts, data_dir) else None
    data = {}
    for task in transfer.tasks_at_hand(data_dir):
        folder = data_dir / task.folder
        train = transfer.first_rows(read_examples(task, folder, "train"), args.max_rows)
        transfer.check_trainable(task, train)
        test = labelled_test(task, folder)
        data[task] = train, {"dev": read_examples(task, folder, "dev"), **({} if test is None else {"test": test})}
    if not data and similar is None:
        raise InputError(f"--data_dir: {data_dir} has no task's train and dev files; download_glue_data.py gets them")
    student = load_student(args)
    encoder = transfer.encoder_embedder(bert_of(args, student), student, args.batch_size)

    # 2. Each task, with each kind of embeddings.
    found: dict[str, dict[str, Any]] = {}
    names = dict(args.call)
    embedders: dict[str, Embedder] = {
        "DSE": transfer.student_embedder(student, args.batch_size), BASELINES[0]: encoder,
    }  # fmt: skip
    if similar is not None:
        words = transfer.bag_of_words(similar.first + similar.second)
        found[names.get(sts.name, sts.folder)] = {
            name: {"dev": transfer.cosine_correlations(embed, similar)}
            for name, embed in {**embedders, BASELINES[1]: words}.items()
        }
    for task, (train, sets) in data.items():
        words = transfer.bag_of_words(train.first + (train.second or []))
        logger.info("%s: %s", task.name, ", ".join(f"{s} {len(rows)}" for s, rows in {"train": train, **sets}.items()))
        kinds = tqdm({**embedders, BASELINES[1]: words}.items(), desc=task.name, disable=None, leave=False)
        found[names.get(task.name, task.folder)] = {
            name: transfer.probe(embed, task, train, sets) for name, embed in kinds
        }

    # 3. The table.
    print("\n" + transfer.to_markdown(found))
    if args.output:
        about = {"model": args.model, "task": student.task.name, "max_rows": args.max_rows}
        write_json(args.output, {**about, "results": found})


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; exits with code 2 and one line when the input cannot be used."""
    with cli.clear_errors(PROG):
        run(parse_arguments(argv))
