#!/usr/bin/env python3
"""Stage 2: fine-tune a BERT cross-encoder on a task. It becomes the teacher.

    python finetune_bert.py --bert_model bert-large-uncased-whole-word-masking --task_name mrpc --do_train --do_eval \\
        --do_lower_case --data_dir glue_data/MRPC --output_dir outputs/large_uncased_finetuned_mrpc

Writes the teacher to --output_dir, a folder that transformers' `from_pretrained` loads, with training.json (how it was
made, and hashes) and eval_results.txt. The same command with --resume continues a training that was stopped, from the
newest state in <output_dir>/training_state. With --do_eval alone, --bert_model must be a folder that this script made.
"""

import argparse
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dse import cli
from dse.data.cache import cache_name
from dse.data.processors import Examples, read_examples, with_labels
from dse.data.tasks import Task, get_task, task_to_dict
from dse.data.tokenizers import tokenizer_key
from dse.networks.pretrained import STATE, OpenedBert, bert_hashes, files_of_teacher, last_part, open_bert
from dse.system import parallel, signals
from dse.system.device import describe_device, seed_everything, select_device
from dse.system.errors import InputError
from dse.system.files import check_name, check_writable, utc_stamp
from dse.training.reporting import Record, format_metrics, results_dirs, write_results

if TYPE_CHECKING:
    from dse.networks.batches import Batches
    from dse.networks.teacher import Teacher
    from dse.training.run import Identity
    from dse.training.trainer import Trainer

PROG = "finetune_bert.py"
STALE = ("vocab.txt", "special_tokens_map.json", "added_tokens.json")  # a tokenizer's: read if present, never written
logger = logging.getLogger("dse.finetune_bert")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROG, doc=__doc__)
    add, count = parser.add_argument, cli.whole_number(1)
    cli.add_task_flags(parser)
    add("--bert_model", required=True, help="hub name or folder of a BERT")
    add("--output_dir", required=True, help="folder for the teacher and its results")
    add("--cache_dir", default="", help="cache of downloaded models (default: the hub library's)")
    add("--max_seq_length", type=cli.whole_number(4), default=128, help="token ids per pair, with [CLS] and [SEP]s")
    add("--do_train", action="store_true", help="train and save the teacher")
    add("--do_eval", action="store_true", help="evaluate on the dev set, after each epoch when training")
    add("--do_lower_case", action="store_true", help="lower-case the text, for an uncased model")
    add("--train_batch_size", type=count, default=32, help="pairs per update")
    add("--eval_batch_size", type=count, default=8, help="full-length pairs per evaluation step; more if shorter")
    add("--learning_rate", type=cli.positive, default=5e-5, help="peak learning rate")
    add("--num_train_epochs", type=cli.whole_epochs, default=3.0, help="number of epochs")
    add("--warmup_proportion", type=cli.share, default=0.1, help="share of the updates over which the rate grows")
    add("--no_cuda", action="store_true", help="use the CPU even if there is a GPU")
    add("--no_parallel", action="store_true", help="no effect, kept from the original; use torchrun for several GPUs")
    add("--gpu_id", type=cli.whole_number(0), default=0, help="number of the GPU, from 0")
    add("--overwrite_output_dir", action="store_true", help="train into a folder that is not empty")
    add("--seed", type=cli.seed, default=42, help="random seed; -1 draws a new one for each run")
    add("--gradient_accumulation_steps", type=count, default=1, help="batches per update")
    add("--gradient_checkpointing", action="store_true", help="use less memory and more time")
    cli.add_resume_flags(parser)
    cli.add_precision_flags(parser)
    cli.add_padding_flag(parser)
    cli.add_log_flags(parser)
    add("--save_checkpoint_every_epoch", action="store_true", help="write the teacher after every epoch")
    args = parser.parse_args(argv)
    if not (args.do_train or args.do_eval):
        parser.error("nothing to do: give --do_train, --do_eval or both")
    if args.train_batch_size < args.gradient_accumulation_steps:
        parser.error(
            f"--train_batch_size {args.train_batch_size} is divided by --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}, which leaves no pair per step: raise the first or lower the second"
        )
    return args


def check_output_dir(args: argparse.Namespace, task: Task) -> None:
    output_dir = Path(args.output_dir)
    longest = f"{STATE}/teacher_state_epoch_{args.num_train_epochs}_update_{2**32}.pt"
    for folder in results_dirs(output_dir, task.also_validate).values():
        check_writable(folder, "--output_dir", longest)
    # What the next stage names after this folder.
    check_name(output_dir.parent / f"{last_part(args.output_dir)}_logits.partial", "--output_dir")
    check_name(feature_caches(args, task, ["train"])["train"][0], "--data_dir, --bert_model or --task_name")
    free = args.overwrite_output_dir or args.resume or not args.do_train
    if not free and output_dir.is_dir() and any(output_dir.iterdir()):
        hint = "--resume to continue the training in it, " if (output_dir / STATE).is_dir() else ""
        raise InputError(
            f"--output_dir: {output_dir} is not empty; give {hint}--overwrite_output_dir to train into it, "
            "or another folder"
        )
    stale = [name for name in STALE if (output_dir / name).is_file()]
    if args.do_train and set(stale) - files_of_teacher(output_dir):
        raise InputError(f"--output_dir: {output_dir} holds {', '.join(stale)}, which would change the teacher's "
                         "tokenizer: move them away, or give another folder")  # fmt: skip


def feature_caches(args: argparse.Namespace, task: Task, splits: Iterable[str]) -> dict[str, tuple[Path, bool]]:
    """The path of each split's feature cache, beside the data, and False: the user did not choose it."""
    bert, length, folder = last_part(args.bert_model), args.max_seq_length, Path(args.data_dir)
    return {split: (folder / cache_name(split, bert, length, task.name, "joint"), False) for split in splits}


def identity_of(args: argparse.Namespace, task: Task, data: dict[str, Examples], bert: OpenedBert) -> "Identity":
    """What identifies the training when it is resumed."""
    from dse.training.run import Identity

    free = ("resume", "save_every", "overwrite_output_dir", "task_name", "cache_dir")
    return Identity(
        task_to_dict(task),
        {flag: value for flag, value in vars(args).items() if flag not in free},
        {split: rows.files for split, rows in data.items()},
        bert_hashes(bert.folder) if args.do_train else None,
        tokenizer=tokenizer_key(bert.tokenizer),
    )


def make_trainer(args: argparse.Namespace, task: Task, teacher: "Teacher", batches: "Batches", seed: int) -> "Trainer":
    from dse.training.epoch_plan import EpochPlan, count_updates
    from dse.training.kinds import kind_of, measure_teacher
    from dse.training.optimization import make_optimizer
    from dse.training.trainer import Trainer

    steps, batch_size = args.gradient_accumulation_steps, args.train_batch_size // args.gradient_accumulation_steps
    if batch_size * steps != args.train_batch_size:
        told = (args.train_batch_size, steps, batch_size * steps)
        logger.warning("--train_batch_size %d does not divide evenly into %d batches: each update uses %d pairs", *told)
    updates = count_updates(len(batches), batch_size, steps) * int(args.num_train_epochs)
    logger.info("%d pairs, %d per batch, %d updates in all", len(batches), batch_size, updates)
    return Trainer(
        teacher,
        EpochPlan(batches, batch_size, steps, seed),
        loss=lambda logits, labels, rows: kind_of(task).teacher_loss(logits, labels),
        measure=partial(measure_teacher, task),
        optimizer=make_optimizer(teacher, args.learning_rate, updates, args.warmup_proportion),
    )


def evaluate(
    args: argparse.Namespace, task: Task, teacher: "Teacher", batches: "dict[str, Batches]", split: str
) -> dict[str, float]:
    from dse.networks.inference import infer
    from dse.training.kinds import measure_teacher

    logits = infer(teacher, batches[split], args.eval_batch_size, teacher.device, f"evaluate {split}")
    return measure_teacher(task, logits, batches[split].features.labels)


def write_all_results(sets: dict[str, Path], history: list[Record] | None, measure: Callable[[str], Record]) -> str:
    """Write eval_results.txt for each evaluated set into its folder. Returns the metrics on dev in words."""
    last: Record = history[-1] if history else {"updates": 0, "train": {"loss": None}}
    found: dict[str, Record] = {}
    for split, folder in sets.items():
        found[split] = (split == "dev" and last.get("validation")) or measure(split)
        write_results(folder, found[split], last["updates"], last["train"]["loss"])
    return format_metrics(found["dev"]) if found else "no evaluation was requested"


def tell_next(args: argparse.Namespace, task: Task, metrics: str) -> None:
    logger.info("done: %s", metrics)
    if args.do_train and task.text_b is not None:
        cli.tell_next(
            f"teacher: {args.output_dir}", "python", "run_distillation_logits_creator.py", "--task_name",
            args.task_name, "--data_dir", args.data_dir, "--bert_checkpoint_dir", args.output_dir,
        )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    # 1. Refuse what cannot work, and read the data, before anything heavy is loaded.
    task, output_dir = get_task(args.task_name, args.dev_share), Path(args.output_dir)
    check_output_dir(args, task)
    log_file = Path(args.log_dir) / f"run_classifier_{task.name}_{utc_stamp()}.log" if args.file_log else None
    cli.set_up_logging(log_file)
    sets = results_dirs(output_dir, task.also_validate) if args.do_eval else {}
    splits = [*(["train"] if args.do_train else []), *sets]
    data = {split: with_labels(read_examples(task, args.data_dir, split)) for split in splits}
    bert = open_bert(args.bert_model, "--bert_model", args.do_lower_case, args.max_seq_length, cache_dir=args.cache_dir)

    # 2. The training: a new one, one that is under way, or one that is at its end.
    from dse.networks.teacher import load_teacher
    from dse.training.epoch_plan import cached_batches
    from dse.training.teacher_run import TeacherRun

    training = TeacherRun(
        output_dir, args.task_name, identity_of(args, task, data, bert), bert.tokenizer, int(args.num_train_epochs),
        resumes=args.resume, every_epoch=args.save_checkpoint_every_epoch, log_file=log_file,
    )  # fmt: skip
    history = training.finished(args.overwrite_output_dir) if args.do_train else None
    trains = args.do_train and history is None

    # 3. Device, seed, model, batches.
    device = select_device(args.no_cuda, args.gpu_id, cli.precision_of(args))
    parallel.join(device)
    seed = seed_everything(args.seed)
    folder = bert.folder if trains or not args.do_train else output_dir
    teacher = load_teacher(folder, task, fine_tuned=not trains).to(device)
    teacher.precision = cli.precision_of(args)
    logger.info("device %s, seed %d, task %s", describe_device(device, teacher.precision), seed, task.name)
    batches = cached_batches("joint", task, data, bert.tokenizer, feature_caches(args, task, data), args)
    if args.gradient_checkpointing:
        teacher.bert.activation_checkpointing_enable()

    # 4. Train, evaluating on dev after each epoch.
    measure = partial(evaluate, args, task, teacher, batches)
    if trains:
        training.resume(make_trainer(args, task, teacher, batches["train"], seed))
        with signals.advice("run the same command with --resume to continue"):
            history = training.train(partial(measure, "dev") if args.do_eval else None, args.save_every)
    elif args.do_train:
        logger.warning("nothing to train: the teacher in %s is already finished", args.output_dir)

    # 5. Results of the last epoch's teacher.
    with signals.advice(f"run the same command{' with --resume' if trains else ''} to continue"):
        metrics = write_all_results(sets, history, measure)
    if trains:
        training.states.finish()  # the teacher is there, with its results
    tell_next(args, task, metrics)


main = cli.program(PROG, parse_arguments, run)


if __name__ == "__main__":
    main()
