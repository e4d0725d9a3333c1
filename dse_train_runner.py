#!/usr/bin/env python3
"""Stage 4: train the Siamese student on labels and teacher logits.

    python dse_train_runner.py --task_name mrpc --data_dir glue_data/MRPC --do_lower_case --file_log --epochs 8 \\
        --store_checkpoints --fc_dims 512 1 \\
        --distillation_logits_path outputs/logits/large_uncased_finetuned_mrpc_logits.pt

The best epoch's student is kept in the run folder's `best`, a folder that loads without flags. --store_checkpoints also
keeps the best and the newest checkpoint. The same command with --resume continues a run that was stopped from its
newest state, and ends as if it had never stopped. So does --trainer_checkpoint <newest>.
"""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dse import cli
from dse.data.cache import cache_name, check_cache_path
from dse.data.processors import Examples, has_label, read_examples, with_labels
from dse.data.tasks import Task, check_sentence_pairs, get_task, task_to_dict
from dse.networks.config import DSEConfig, check_fc_dims
from dse.networks.pretrained import bert_hashes, last_part, open_bert
from dse.system import parallel, signals
from dse.system.device import describe_device, seed_everything, select_device
from dse.system.errors import InputError
from dse.system.files import check_file, check_name, check_writable, read_json, sha256_file, utc_stamp
from dse.training.reporting import check_can_plot, format_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from dse.networks.batches import Batches
    from dse.networks.student import SiameseNetwork
    from dse.training.student_run import StudentRun
    from dse.training.trainer import Trainer

PROG = "dse_train_runner.py"
logger = logging.getLogger("dse.dse_train_runner")
_PAIRS_FITTED = 2048  # two numbers need no more


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROG, doc=__doc__)
    add, count = parser.add_argument, cli.whole_number(1)
    cli.add_task_flags(parser)
    logits = "logits file that run_distillation_logits_creator.py wrote; not needed with --distillation_coeff 0"
    add("--distillation_logits_path", default="", help=logits)
    add("--train_features_path", default="", help="cache file of the training features (default: beside the data)")
    add("--dev_features_path", default="", help="cache file of the dev features (default: beside the data)")
    cli.add_architecture_flags(parser)
    add("--experiment_name", type=cli.file_word, default="bert_distillation", help="prefix of all output names")
    cli.add_log_flags(parser)
    add("--store_checkpoints", action="store_true", help="also keep the best and the newest checkpoint")
    add("--checkpoint_dir", default="outputs/checkpoints", help="folder for the run folders, which hold checkpoints")
    add("--plot_metrics", action="store_true", help="plot the metrics by epoch (needs matplotlib)")
    add("--plots_dir", default="outputs/plots", help="folder for the plots")
    cli.add_device_flags(parser)
    add("--trainer_checkpoint", default="", help="continue from this checkpoint, to a total of --epochs")
    cli.add_resume_flags(parser)
    add("--random_seed", type=cli.seed, default=42, help="random seed; -1 draws a new one for each run")
    add("--epochs", type=count, default=5, help="total number of epochs")
    add("--validate_every", type=count, default=1, help="epochs between validations; the last epoch always has one")
    add("--patience", type=count, help="stop after so many validations without a better score")
    add("--batch_size", type=count, default=16, help="pairs per batch, not per update")
    add("--val_batch_size", type=count, default=128, help="full-length pairs per validation step; more if shorter")
    add("--gradient_accumulation_steps", type=count, default=2, help="batches per update")
    add("--gradient_checkpointing", action="store_true", help="use less memory and more time")
    cli.add_precision_flags(parser)
    cli.add_padding_flag(parser)
    add("--lr", type=cli.positive, default=2e-5, help="peak learning rate")
    add("--head_lr", type=cli.positive, help="peak learning rate of the head (default: --lr)")
    add("--warmup_proportion", type=cli.share, default=0.1, help="share of the schedule in which the rate grows")
    add("--schedule_in_updates", action="store_true", help="schedule the rate by updates; the original counts batches")
    add("--dropout", type=cli.dropout_rate, help="dropout rate of encoder and embeddings (default: the encoder's)")
    add("--distillation_coeff", type=cli.share, default=0.5, help="weight of the logits in the loss; labels: the rest")
    tuned = "binary tasks: probability thresholds to try; the best f1 ranks the checkpoints"
    add("--tune_positive_thresholds", type=cli.threshold, nargs="+", default=[0.5], help=tuned)
    add("--run_evaluation_before_fine_tune", action="store_true", help="log an evaluation before training")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace, task: Task, caches: dict[str, tuple[Path, bool]]) -> None:
    """Refuse flags that cannot work, whatever the data is."""
    check_sentence_pairs(task)
    check_fc_dims(args.fc_dims, task)
    hint = "run_distillation_logits_creator.py makes it"
    if args.distillation_logits_path:
        check_file(args.distillation_logits_path, "--distillation_logits_path", hint)
    elif args.distillation_coeff:
        raise InputError(f"--distillation_logits_path: is needed unless --distillation_coeff is 0; {hint}")
    folder, flag = Path(args.checkpoint_dir, f"{args.experiment_name}_{utc_stamp()}"), "--checkpoint_dir"
    if args.trainer_checkpoint:
        folder, flag = Path(args.trainer_checkpoint).parent, "--trainer_checkpoint"
        check_file(args.trainer_checkpoint, flag, "--store_checkpoints writes it")
        if args.resume:
            raise InputError("--resume: finds the newest state itself; give either this flag or --trainer_checkpoint")
    longest = f"{args.experiment_name}_{utc_stamp()}_state_epoch_{args.epochs}_update_{2**32}.pt"
    if args.plot_metrics:
        check_can_plot("--plot_metrics")
        check_writable(args.plots_dir, "--plots_dir", longest)
    check_writable(folder, flag, longest)
    for path, chosen in caches.values():
        check_name(path, "--data_dir, --bert_model, --task_name or the features' paths")
        if chosen:
            check_cache_path(path, "separate")
    paths = [path for path, chosen in caches.values() if chosen]
    if len(set(paths)) < len(paths):
        raise InputError(f"--dev_features_path: {args.dev_features_path} is used for two sets; give each its own path")


def check_labels(args: argparse.Namespace, train: Examples) -> Examples:
    """The rows to train on: all, or without logits those with a label. Raises InputError if none has one but must."""
    known = int(train.labelled.sum())
    if not args.distillation_logits_path or not (known or args.distillation_coeff == 1):
        return with_labels(train)
    if known < len(train):
        what = "%d of %d training rows have no label, and count in the distillation term alone"
        logger.info(what, len(train) - known, len(train))
    return train


def feature_caches(args: argparse.Namespace, task: Task) -> dict[str, tuple[Path, bool]]:
    """The cache of features of train, dev and the other validation sets, and whether the user chose its path."""
    caches = {}
    for split in ["train", "dev", *(split for split, _ in task.also_validate)]:
        chosen = args.train_features_path if split == "train" else args.dev_features_path
        name = cache_name(split, last_part(args.bert_model), args.max_seq_length, task.name, "separate")
        own = chosen if split in ("train", "dev") else f"{chosen}_{split}"
        caches[split] = (Path(own), True) if chosen else (Path(args.data_dir) / name, False)
    return caches


def run_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that a checkpoint stores: all but those that only say where to continue and how often to save."""
    others = ("trainer_checkpoint", "resume", "save_every")
    return {flag: value for flag, value in vars(args).items() if flag not in others}


def find_start(
    args: argparse.Namespace, task: Task, files: dict[str, Any], stamp: str, log_file: Path | None
) -> "StudentRun":
    """Start from --trainer_checkpoint, with --resume from the run's newest intact state, else from the encoder."""
    from dse.training.run import Identity
    from dse.training.student_run import StudentRun, find_run, take_over

    path, flags, found = args.distillation_logits_path, run_flags(args), None
    logits = sha256_file(path) if path else None
    now = Identity(task_to_dict(task), flags, files, logits=logits)
    if args.trainer_checkpoint:
        found = take_over(Path(args.trainer_checkpoint), args.experiment_name, now)
    elif args.resume:
        found = find_run(Path(args.checkpoint_dir), args.experiment_name, now)
        if found is None:
            logger.info("--resume: no state of %s in %s: starting a new run", args.experiment_name, args.checkpoint_dir)
    if found is not None:
        return StudentRun.going_on(found, task, flags, log_file)
    layers = args.pooler_num_top_hidden_layers
    bert = open_bert(args.bert_model, "--bert_model", args.do_lower_case, args.max_seq_length, layers)
    about = Path(path).with_suffix(".json") if path else Path()
    told = read_json(about, "the description of the logits") if about.is_file() else {}
    data = {"files": files, "logits": logits, "commands": told.get("commands", []), "bert": bert_hashes(bert.folder)}
    config = DSEConfig.from_flags(args, bert.config)
    return StudentRun(task, flags, data, bert.tokenizer, config, stamp, bert.folder, log_file=log_file)


def make_network(args: argparse.Namespace, start: "StudentRun") -> "SiameseNetwork":
    from dse.networks.student import empty_network, new_network

    network = new_network(start.bert_folder, start.config) if start.bert_folder else empty_network(start.config)
    if args.dropout is not None:
        network.set_dropout(args.dropout)
    network.precision = cli.precision_of(args)
    if args.gradient_checkpointing:
        network.encoder.activation_checkpointing_enable()
    return network


def start_from_cosine(task: Task, network: "SiameseNetwork", batches: "Batches", seed: int) -> None:
    """Let a residual head begin with the scale and offset of cosines that fit training labels best."""
    from dse.networks.batches import Batches
    from dse.networks.inference import infer_pairs
    from dse.training.epoch_plan import epoch_order
    from dse.training.kinds import fit_cosines

    order = epoch_order(len(batches), seed, 0)
    rows = order[has_label(batches.features.labels[order])][:_PAIRS_FITTED]
    if not len(rows):
        logger.info("the head begins with the cosine, as there are no labels to fit it to")
        return
    some = Batches(batches.features.block(rows), batches.padding, batches.max_seq_length)
    cosines = infer_pairs(network, some, 128, network.device, "cosines")[:, 0]  # which an untrained head gives
    scale, offset = fit_cosines(task, cosines, some.features.labels)
    head: Any = network.siamese_head
    head.start_at(scale, offset)
    numbers = ", ".join(f"{a:.3f} * cosine {b:+.3f}" for a, b in zip(scale.tolist(), offset.tolist(), strict=True))
    logger.info("the head begins with %s, which fits the labels of %d training pairs best", numbers, len(rows))


def make_trainer(
    args: argparse.Namespace,
    task: Task,
    network: "SiameseNetwork",
    batches: "Batches",
    logits: "Tensor | None",
    seed: int,
) -> "Trainer":
    from dse.training.epoch_plan import EpochPlan, count_updates
    from dse.training.kinds import kind_of, measure_student
    from dse.training.optimization import make_optimizer
    from dse.training.trainer import Trainer

    alpha, kind = args.distillation_coeff, kind_of(task)
    # The original's schedule counts batches, though updates are fewer; the paper's numbers rest on it.
    per_update = args.gradient_accumulation_steps if args.schedule_in_updates else 1
    t_total = count_updates(len(batches), args.batch_size, per_update) * args.epochs
    targets = None if logits is None else kind.targets(logits).to(network.device)
    partly = not has_label(batches.features.labels).all()
    return Trainer(
        network,
        EpochPlan(batches, args.batch_size, args.gradient_accumulation_steps, seed),
        loss=lambda outputs, labels, rows: kind.student_loss(
            outputs, labels, None if targets is None else targets[rows], alpha, partly
        ),
        measure=partial(
            measure_student,
            task,
            args.tune_positive_thresholds,
            targets=None if targets is None else targets.cpu(),
            coefficient=alpha,
        ),
        optimizer=make_optimizer(network, args.lr, t_total, args.warmup_proportion, args.head_lr, "siamese_head."),
    )


def validate(
    args: argparse.Namespace, task: Task, network: "SiameseNetwork", batches: "dict[str, Batches]"
) -> dict[str, float]:
    """Metrics on dev and, with a prefix, on the task's other validation sets (mm_…, test_…)."""
    from dse.networks.inference import infer_pairs
    from dse.training.kinds import measure_student

    metrics: dict[str, float] = {}
    for split, rows in batches.items():
        if split != "train":
            outputs = infer_pairs(network, rows, args.val_batch_size, network.device, f"validate {split}")
            found = measure_student(task, args.tune_positive_thresholds, outputs, rows.features.labels)
            metrics |= {name if split == "dev" else f"{split}_{name}": value for name, value in found.items()}
    return metrics


def tell_order_difference(network: "SiameseNetwork", dev: "Batches", batch_size: int) -> None:
    from dse.networks.inference import order_difference

    difference = order_difference(network, dev, batch_size, network.device)
    logger.info(
        "after the last epoch, a dev pair's two orders differ by %.3f on average before they are averaged", difference
    )


def run(args: argparse.Namespace) -> None:
    # 1. Refuse what cannot work, and read the data, before anything heavy is loaded.
    task, stamp = get_task(args.task_name, args.dev_share), utc_stamp()
    caches = feature_caches(args, task)
    check_flags(args, task, caches)
    log_file = Path(args.log_dir) / f"{args.experiment_name}_{stamp}.log" if args.file_log else None
    cli.set_up_logging(log_file)
    examples = {split: read_examples(task, args.data_dir, split) for split in caches}
    examples["train"] = check_labels(args, examples["train"])
    training = find_start(args, task, {split: rows.files for split, rows in examples.items()}, stamp, log_file)

    # 2. Teacher logits that belong to this data; device and seed; batches.
    from dse.storage.logits import load_logits, logits_identity
    from dse.training.epoch_plan import cached_batches

    of_data = logits_identity(task, examples["train"].files, len(examples["train"]))
    logits = load_logits(args.distillation_logits_path, of_data) if args.distillation_logits_path else None
    device = select_device(args.disable_gpu, args.gpu_id, cli.precision_of(args))
    parallel.join(device)
    batches = cached_batches("separate", task, examples, training.tokenizer, caches, args)
    seed = seed_everything(args.random_seed)

    # 3. Student and trainer, where the run stands.
    network = make_network(args, training).to(device)
    if training.bert_folder and args.siamese_head_type == "residual":
        start_from_cosine(task, network, batches["train"], seed)
    trainer = make_trainer(args, task, network, batches["train"], logits, seed)
    training.resume(trainer)
    logger.info(
        "device %s, seed %d, task %s, %s, embeddings of size %d", describe_device(device, network.precision),
        trainer.plan.seed, task.name, ", ".join(f"{split} {len(rows)}" for split, rows in batches.items()),
        training.config.embedding_size,
    )  # fmt: skip

    # 4. Train.
    measure = partial(validate, args, task, network, batches)
    if args.run_evaluation_before_fine_tune:
        logger.info("before training: %s", format_metrics(measure()))
    with signals.advice("run the same command with --resume to continue"):
        training.train(measure, args.save_every)

    # 5. The best epoch.
    training.report_best()
    if training.config.symmetric:
        tell_order_difference(network, batches["dev"], args.val_batch_size)
    cli.tell_next(
        f"student: {training.states.folder}", "python", "-m", "dse", "score", "--model", training.states.folder,
        "--queries", "QUERIES", "--candidates", "CANDIDATES",
    )  # fmt: skip


main = cli.program(PROG, parse_arguments, run)


if __name__ == "__main__":
    main()
