"""Run stages 2 to 5 on made-up data with a tiny BERT, offline, in about a minute.

The scripts run through their own `main`, with the flags that the log shows. The data is synthetic
(dse/experiments/synthetic.py): the numbers show that the pipeline works, and nothing about real language.
"""

import argparse
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from timeit import repeat
from typing import Any

import dse_train_runner
import finetune_bert
import load_dse_checkpoint_example
import run_distillation_logits_creator
from dse import cli
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.experiments.synthetic import write_pairs, write_tiny_bert
from dse.system.files import check_writable

PROG = "python -m dse quickstart"
TRAIN_PAIRS, DEV_PAIRS = 3000, 600
REPEATS = 3
logger = logging.getLogger("dse.quickstart")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags. Exits with code 2 and one line if one is wrong."""
    parser = cli.Parser(prog=PROG, description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="outputs/quickstart", help="folder of everything that is made")
    return parser.parse_args(argv)


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
    best = newest.parent / Checkpoint.read(newest).best["file"]
    stage(load_dse_checkpoint_example, *common, "--trainer_checkpoint", best)
    return best


def rate_of(pairs: int, score: Callable[[], object]) -> float:
    """Pairs scored per second, best of a few repeats."""
    return pairs / min(repeat(score, number=1, repeat=REPEATS))


def compare(folder: Path, best: Path) -> list[tuple[str, float, float, float | None]]:
    """Rows of the closing table: name, accuracy, f1 and pairs scored per second, on the dev set."""
    import torch

    from dse.data.features import joint_features, separate_features
    from dse.networks.batches import Batches, pad
    from dse.networks.inference import infer
    from dse.networks.teacher import load_teacher
    from dse.storage.checkpoint import Checkpoint
    from dse.training.kinds import measure_student, measure_teacher

    task = get_task("mrpc")
    examples = read_examples(task, folder / "data", "dev")
    cpu = torch.device("cpu")
    student = Checkpoint.read(best).student()
    network = student.network
    teacher = load_teacher(folder / "teacher", task, fine_tuned=True).eval()
    joint, separate = (make(task, examples, student.tokenizer, 48) for make in (joint_features, separate_features))

    def teach() -> Any:
        return infer(teacher, Batches(joint), 128, cpu, "teacher")

    with torch.inference_mode():
        embeddings = network.embed(*pad(separate.texts, separate.first, separate.pad_id))
        others = network.embed(*pad(separate.texts, separate.second, separate.pad_id))
        of_teacher = measure_teacher(task, teach(), joint.labels)
        outputs = network.siamese_head(embeddings, others).numpy()
        of_student = measure_student(task, (0.5,), outputs, separate.labels)
        student_rate = rate_of(len(separate), lambda: network.siamese_head(embeddings, others))
    positive = float(separate.labels.mean())
    majority_f1 = 2 * positive / (1 + positive) if positive >= 0.5 else 0.0
    return [
        ("majority class", max(positive, 1 - positive), majority_f1, None),
        ("teacher", of_teacher["acc"], of_teacher["f1"], rate_of(len(joint), teach)),
        ("student", of_student["accuracy_0.5"], of_student["f1_0.5"], student_rate),
    ]


def run(args: argparse.Namespace) -> None:
    """Make data and BERT, run the stages, print the table."""
    folder = Path(args.output_dir)
    check_writable(folder, "--output_dir")
    cli.set_up_logging()
    write_pairs(folder / "data" / "train.tsv", TRAIN_PAIRS, seed=1)
    write_pairs(folder / "data" / "dev.tsv", DEV_PAIRS, seed=2)
    write_tiny_bert(folder / "tiny_bert", seed=3)
    best = run_stages(folder)
    print(f"\n{'SYNTHETIC data':<16}{'accuracy':>10}{'f1':>8}{'pairs scored a second':>24}")
    for name, accuracy, f1, rate in compare(folder, best):
        print(f"{name:<16}{accuracy:>10.3f}{f1:>8.3f}{'-' if rate is None else f'{rate:,.0f}':>24}")
    print(
        "\nThe sentences are made up (dse/experiments/synthetic.py): this shows that the pipeline works, not how good "
        "it is.\nThe student's rate is for stored embeddings, each made once."
        f"\n\ndata        {folder / 'data'}\nteacher     {folder / 'teacher'}"
        f"\nlogits      {folder / 'logits' / 'teacher_logits.pt'}"
        f"\nstudent     {best}\nlogs        {folder / 'logs'}"
    )


main = cli.program(PROG, parse_arguments, run)
