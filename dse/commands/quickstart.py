"""Run stages 2 to 5 on made-up data with a tiny BERT, offline, in about a minute.

The scripts run through their own `main`, with the flags that the log shows.
"""

import argparse
import shlex
from itertools import chain
from pathlib import Path
from timeit import repeat
from typing import Any

import numpy as np

import dse_train_runner
import finetune_bert
import load_dse_checkpoint_example
import run_distillation_logits_creator
from dse.commands import logger
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.experiments.synthetic import write_pairs, write_tiny_bert
from dse.system.files import check_writable

TRAIN_PAIRS, DEV_PAIRS = 3000, 600


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--output_dir", default="outputs/quickstart", help="folder for everything that is made")


def run_stages(folder: Path) -> Path:
    """Run stages 2 to 5. Returns the student's best checkpoint."""
    from dse.storage.checkpoint import Checkpoint

    def stage(script: Any, *flags: object) -> None:
        argv = [str(flag) for flag in flags]
        logger.info("stage: %s %s", script.PROG, shlex.join(argv))
        script.main(argv)

    data, bert, teacher = folder / "data", folder / "tiny_bert", folder / "teacher"
    common = ("--task_name", "mrpc", "--do_lower_case", "--max_seq_length", 48)
    stage(
        finetune_bert, *common, "--data_dir", data, "--bert_model", bert, "--output_dir", teacher,
        "--overwrite_output_dir", "--do_train", "--do_eval", "--eval_batch_size", 128,
        "--train_batch_size", 16, "--learning_rate", 6e-4, "--num_train_epochs", 8,
    )  # fmt: skip
    stage(
        run_distillation_logits_creator, *common, "--data_dir", data, "--bert_checkpoint_dir", teacher,
        "--train_features_path", data / "train_tiny_bert_48_mrpc", "--output_dir", folder / "logits",
    )  # fmt: skip
    stage(
        dse_train_runner, *common, "--data_dir", data, "--bert_model", bert,
        "--distillation_logits_path", folder / "logits" / "teacher_logits.pt", "--pooler_num_top_hidden_layers", 2,
        "--fc_dims", 64, 1, "--lr", 1e-3, "--epochs", 6, "--store_checkpoints",
        "--checkpoint_dir", folder / "checkpoints", "--file_log", "--log_dir", folder / "logs",
    )  # fmt: skip
    newest = max((folder / "checkpoints").glob("*/*.pt"), key=lambda path: path.stat().st_mtime_ns)
    best = newest.parent / (Checkpoint.read(newest).best or {})["file"]
    stage(load_dse_checkpoint_example, *common, "--trainer_checkpoint", best)
    return best


def print_table(folder: Path, best: Path) -> None:
    """Print accuracy, f1 and pairs scored per second, the best of a few repeats, on the dev set."""
    import torch

    from dse.experiments.predictions import load_scorer
    from dse.models import DSESiameseClassifier
    from dse.networks.inference import score_stored
    from dse.training.kinds import kind_of

    task, cpu = get_task("mrpc"), torch.device("cpu")
    rows = read_examples(task, folder / "data", "dev")
    labels = np.array(rows.labels)
    student = DSESiameseClassifier.from_checkpoint(best)
    embeddings = student.encode(chain(*rows.sides))
    first, second = np.arange(2 * len(rows)).reshape(2, -1)
    teacher, _ = load_scorer(str(folder / "teacher"), task, cpu, batch_size=128)
    ways = {
        "majority class": lambda: np.full((len(rows), 1), 1 if labels.mean() >= 0.5 else -1),
        "teacher": lambda: teacher(rows),
        "student": lambda: score_stored(student.network, embeddings, first, second, cpu),
    }
    lines = []  # printed together, after what the teacher logs
    for name, score in ways.items():
        metrics = kind_of(task).metrics(score(), labels)
        shown = "-" if name == "majority class" else f"{len(rows) / min(repeat(score, number=1, repeat=3)):,.0f}"
        lines.append(f"{name:<16}{metrics['accuracy_0.5']:>10.3f}{metrics['f1_0.5']:>8.3f}{shown:>24}")
    print(f"\n{'SYNTHETIC data':<16}{'accuracy':>10}{'f1':>8}{'pairs scored a second':>24}")
    print(*lines, sep="\n")


def print_ranks(folder: Path, best: Path) -> None:
    """Print the student's best of all second sentences of dev for a first one whose pair matches."""
    from dse.models import DSESiameseClassifier

    rows = read_examples(get_task("mrpc"), folder / "data", "dev")
    query = rows.first[(rows.labels or []).index(1)]
    print(f"\nThe best of {len(rows)} candidates for the query: {query}")
    model = DSESiameseClassifier.from_checkpoint(best)
    for hit in model.rank(query, rows.second or [], top_k=3, probabilities=True):
        print(f"  {hit.score:.3f}  {hit.text}")


def run(args: argparse.Namespace) -> None:
    """Make data and BERT, run the stages, print the table, rank candidates for a query."""
    folder = Path(args.output_dir)
    check_writable(folder, "--output_dir")
    import torch

    torch.set_num_threads(1)  # for a model this small, more of them wait for each other
    write_pairs(folder / "data" / "train.tsv", TRAIN_PAIRS, seed=1)
    write_pairs(folder / "data" / "dev.tsv", DEV_PAIRS, seed=2)
    write_tiny_bert(folder / "tiny_bert", seed=3)
    best = run_stages(folder)
    print_table(folder, best)
    print("\nThe sentences are made up (dse/experiments/synthetic.py): the table shows that it works, not how well."
          "\nThe student's rate is for scoring stored embeddings, each computed once.")  # fmt: skip
    print_ranks(folder, best)
    print(f"\nAll files: {folder}. Go on with one of these; -h lists the flags of each:"
          "\n  python -m dse train --data YOUR_PAIRS.csv --output my_run"
          f"\n  python -m dse score --model {best.parent} --queries QUERIES.txt --candidates CANDIDATES.txt"
          "\n  python download_glue_data.py --tasks MRPC")  # fmt: skip
