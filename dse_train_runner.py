#!/usr/bin/env python3
"""Stage 4: train the Siamese student on labels and teacher logits.

    python dse_train_runner.py --task_name mrpc --data_dir glue_data/MRPC --do_lower_case --file_log --epochs 8 \\
        --store_checkpoints --fc_dims 512 1 \\
        --distillation_logits_path outputs/logits/large_uncased_finetuned_mrpc_logits.pt

With --store_checkpoints the best and the newest checkpoint are kept. The same command with --resume goes on with a
run that was stopped, from its newest state, and ends as if it had never stopped; so does --trainer_checkpoint <newest>.
"""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dse import cli
from dse.data.cache import cache_name, check_cache_path
from dse.data.processors import Examples, read_examples
from dse.data.tasks import Task, check_sentence_pairs, get_task, task_to_dict
from dse.networks.config import DSEConfig, check_fc_dims
from dse.networks.pretrained import bert_hashes, last_part, open_bert
from dse.system import parallel, signals
from dse.system.device import describe_device, seed_everything, select_device
from dse.system.errors import InputError
from dse.system.files import check_file, check_name, check_writable, read_json, sha256_file, utc_stamp
from dse.training.reporting import check_can_plot, format_metrics

if TYPE_CHECKING:
    import torch

    from dse.networks.batches import Batches
    from dse.networks.student import SiameseNetwork
    from dse.training.student_run import RunStart
    from dse.training.trainer import Trainer

PROG = "dse_train_runner.py"
logger = logging.getLogger("dse.dse_train_runner")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROG, description="Train the Siamese student on labels and teacher logits.")
    add = parser.add_argument
    cli.add_task_flags(parser)
    add("--distillation_logits_path", required=True, help="file of run_distillation_logits_creator.py")
    add("--train_features_path", default="", help="cache of the training features; empty: a name beside the data")
    add("--dev_features_path", default="", help="cache of the dev features; empty: a name beside the data")
    cli.add_architecture_flags(parser)
    add("--experiment_name", type=cli.file_word, default="bert_distillation", help="begins the names of all outputs")
    cli.add_log_flags(parser)
    add("--store_checkpoints", action="store_true", help="keep the best and the newest checkpoint")
    add("--checkpoint_dir", default="outputs/checkpoints", help="folder of the runs' checkpoint folders")
    add("--plot_metrics", action="store_true", help="draw the metrics by epoch (needs matplotlib)")
    add("--plots_dir", default="outputs/plots", help="folder of the runs' plots")
    cli.add_device_flags(parser)
    add("--trainer_checkpoint", default="", help="go on from this checkpoint, to a total of --epochs")
    cli.add_resume_flags(parser)
    add("--random_seed", type=cli.seed, default=42, help="seed; -1: a new one each run")
    add("--epochs", type=cli.whole_number(1), default=5, help="epochs in all")
    add(
        "--validate_every",
        type=cli.whole_number(1),
        default=1,
        help="epochs between validations (and checkpoints); the last epoch has one too",
    )
    add("--patience", type=cli.whole_number(1), help="stop after so many validations without a better score")
    add("--batch_size", type=cli.whole_number(1), default=16, help="pairs per step (not per update)")
    add("--val_batch_size", type=cli.whole_number(1), default=128, help="pairs of full length per step of validation")
    add("--gradient_accumulation_steps", type=cli.whole_number(1), default=2, help="batches per update")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    cli.add_precision_flags(parser)
    cli.add_padding_flag(parser)
    add("--lr", type=cli.positive, default=2e-5, help="peak rate of BertAdam")
    add("--head_lr", type=cli.positive, help="peak rate of the head, which starts untrained; not given: --lr")
    add("--warmup_proportion", type=cli.share, default=0.1, help="share of the schedule with a growing rate")
    add(
        "--schedule_in_updates",
        action="store_true",
        help="let the schedule count updates, not batches as the original's",
    )
    add("--dropout", type=cli.dropout_rate, help="rate in all of the encoder and of its embeddings; not given: its own")
    add("--distillation_coeff", type=cli.share, default=0.5, help="weight of the teacher's logits against the labels")
    add("--tune_positive_thresholds", type=cli.threshold, nargs="+", default=[0.5], help="binary: positive above these")
    add("--run_evaluation_before_fine_tune", action="store_true", help="log an evaluation before training")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace, task: Task) -> None:
    """Refuse what the flags alone tell."""
    longest = f"{args.experiment_name}_{utc_stamp()}_state_epoch_{args.epochs}_update_{2**32}.pt"
    check_sentence_pairs(task)
    check_fc_dims(args.fc_dims, task)
    check_file(
        args.distillation_logits_path, "--distillation_logits_path", "run_distillation_logits_creator.py makes it"
    )
    if args.trainer_checkpoint:
        check_file(args.trainer_checkpoint, "--trainer_checkpoint", "--store_checkpoints writes it")
        if args.resume:
            raise InputError("--resume: finds the state to go on from by itself; give it or --trainer_checkpoint")
    if args.plot_metrics:
        check_can_plot("--plot_metrics")
        check_writable(args.plots_dir, "--plots_dir", longest)
    if args.trainer_checkpoint:
        check_writable(Path(args.trainer_checkpoint).parent, "--trainer_checkpoint", longest)
    else:
        check_writable(Path(args.checkpoint_dir, f"{args.experiment_name}_{utc_stamp()}"), "--checkpoint_dir", longest)
    for path, _ in features_paths(args, task).values():
        check_name(path, "--data_dir, --bert_model, --task_name or the features' paths")
    paths = [path for path, chosen in features_paths(args, task).values() if chosen]
    if len(set(paths)) < len(paths):
        raise InputError(f"--dev_features_path: {args.dev_features_path} serves two sets; name a path of its own")
    for path in paths:
        check_cache_path(path, "separate")


def features_paths(args: argparse.Namespace, task: Task) -> dict[str, tuple[Path, bool]]:
    """Each split's feature cache, and whether the user chose its path."""
    paths = {}
    for split in splits_of(task):
        chosen = args.train_features_path if split == "train" else args.dev_features_path
        if chosen:
            paths[split] = Path(chosen if split in ("train", "dev") else f"{chosen}_{split}"), True
        else:
            name = cache_name(split, last_part(args.bert_model), args.max_seq_length, task.name, "separate")
            paths[split] = Path(args.data_dir) / name, False
    return paths


def splits_of(task: Task) -> list[str]:
    """The training set, the dev set, and the other sets that the task validates on."""
    return ["train", "dev", *(split for split, _ in task.also_validate)]


def commands_of(logits: Path) -> list[Any]:
    """The commands that made the logits and their teacher, as far as the JSON beside the logits tells."""
    about = logits.with_suffix(".json")
    return read_json(about, "the description of the logits").get("commands", []) if about.is_file() else []


def run_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that a checkpoint remembers: those that another value of would make another run."""
    others = ("trainer_checkpoint", "resume", "save_every", "task_name")
    return {"task_name": args.task_name, **{flag: value for flag, value in vars(args).items() if flag not in others}}


def find_start(args: argparse.Namespace, task: Task, data: dict[str, Any], stamp: str) -> "RunStart":
    """From --trainer_checkpoint, with --resume from the run's newest whole state, else from the pre-trained encoder."""
    from dse.training.run import Identity
    from dse.training.student_run import RunStart, find_run, take_over

    flags = run_flags(args)
    del flags["task_name"]  # told by the task
    now = Identity(task_to_dict(task), flags, data["files"], bert=None, logits=data["logits"])
    start = None
    if args.trainer_checkpoint:
        start = take_over(Path(args.trainer_checkpoint), args.experiment_name, now)
    elif args.resume:
        start = find_run(Path(args.checkpoint_dir), args.experiment_name, now)
        if start is None:
            logger.info("--resume: no state of %s in %s: starting anew", args.experiment_name, args.checkpoint_dir)
    if start is not None:
        data["bert"] = start.checkpoint.data.get("bert")  # None: of a version that did not store it
        return start
    layers = args.pooler_num_top_hidden_layers
    bert = open_bert(args.bert_model, "--bert_model", args.do_lower_case, args.max_seq_length, layers)
    data["bert"] = bert_hashes(bert.folder)
    return RunStart(bert.tokenizer, DSEConfig.from_flags(args, bert.config), stamp, bert.folder)


def make_batches(
    args: argparse.Namespace, task: Task, examples: dict[str, Examples], tokenizer: Any, device: "torch.device"
) -> "dict[str, Batches]":
    """Batches of each split, from feature caches whose names the user gave or that lie beside the data."""
    from dse.data.features import cached_features
    from dse.networks.batches import Batches, padding_for

    padding, length, batches = padding_for(device, args.padding), args.max_seq_length, {}
    for split, (path, chosen) in features_paths(args, task).items():
        features = cached_features("separate", task, examples[split], tokenizer, length, path, chosen)
        batches[split] = Batches(features, padding, length)
    return batches


def make_network(args: argparse.Namespace, start: "RunStart") -> "SiameseNetwork":
    from dse.networks.student import empty_network, new_network

    fresh = start.bert_folder is not None
    network = new_network(start.bert_folder, start.config) if fresh else empty_network(start.config)
    if args.dropout is not None:
        network.set_dropout(args.dropout)
    if args.gradient_checkpointing:
        network.encoder.activation_checkpointing_enable()
    return network


def make_trainer(
    args: argparse.Namespace,
    task: Task,
    network: "SiameseNetwork",
    batches: "Batches",
    logits: "torch.Tensor",
    device: "torch.device",
    seed: int,
) -> "Trainer":
    import torch

    from dse.training.epoch_plan import EpochPlan, count_updates
    from dse.training.kinds import kind_of
    from dse.training.metrics import measure_student
    from dse.training.optimization import make_optimizer
    from dse.training.trainer import Trainer

    coefficient = args.distillation_coeff
    # The original's schedule counts batches, though updates are fewer; the paper's numbers rest on it.
    per_update = args.gradient_accumulation_steps if args.schedule_in_updates else 1
    t_total = count_updates(len(batches), args.batch_size, per_update) * args.epochs
    labels = torch.from_numpy(batches.features.labels).to(device)
    kind, targets = kind_of(task), kind_of(task).targets(logits).to(device)
    return Trainer(
        network,
        EpochPlan(batches, args.batch_size, args.gradient_accumulation_steps, seed),
        loss=lambda outputs, rows: kind.student_loss(outputs, labels[rows], targets[rows], coefficient),
        measure=measure_student(task, args.tune_positive_thresholds, targets.cpu(), coefficient),
        optimizer=make_optimizer(network, args.lr, t_total, args.warmup_proportion, args.head_lr, "siamese_head."),
        device=device,
        precision=cli.precision_of(args),
    )


def validate(
    args: argparse.Namespace, task: Task, network: "SiameseNetwork", batches: "dict[str, Batches]"
) -> dict[str, float]:
    """Metrics on dev and, with a prefix, on the task's other validation sets (mm_…, test_…)."""
    from dse.networks.inference import infer_pairs
    from dse.training.metrics import measure_student

    measure, metrics = measure_student(task, args.tune_positive_thresholds), {}
    for split, rows in batches.items():
        if split != "train":
            outputs = infer_pairs(network, rows, args.val_batch_size, network.device, f"validate {split}")
            prefix = "" if split == "dev" else f"{split}_"
            metrics |= {prefix + name: value for name, value in measure(outputs, rows.features.labels).items()}
    return metrics


def run(args: argparse.Namespace) -> None:
    # 1. Refuse what cannot work, and read the data, before anything heavy is loaded.
    task, stamp = get_task(args.task_name), utc_stamp()
    check_flags(args, task)
    log_file = Path(args.log_dir) / f"{args.experiment_name}_{stamp}.log" if args.file_log else None
    cli.set_up_logging(log_file)
    examples = {split: read_examples(task, args.data_dir, split) for split in splits_of(task)}
    files = {split: rows.files for split, rows in examples.items()}
    logits_path = Path(args.distillation_logits_path)
    data = {"files": files, "logits": sha256_file(logits_path), "commands": commands_of(logits_path)}
    start = find_start(args, task, data, stamp)

    # 2. Teacher logits that belong to this data; device and seed; batches.
    from dse.storage.logits import load_logits, logits_identity
    from dse.training.student_run import StudentRun, report_best

    logits = load_logits(logits_path, logits_identity(task, examples["train"].files, len(examples["train"])))
    device = select_device(args.disable_gpu, args.gpu_id, cli.precision_of(args))
    parallel.join(device)
    batches = make_batches(args, task, examples, start.tokenizer, device)
    seed = seed_everything(args.random_seed)

    # 3. Student and trainer, where the run stands.
    network = make_network(args, start).to(device)
    trainer = make_trainer(args, task, network, batches["train"], logits, device, seed)
    training = StudentRun(start, task, run_flags(args), data, log_file)
    training.resume(trainer)
    logger.info(
        "device %s, seed %d, task %s, %s, embeddings of %d", describe_device(device), trainer.plan.seed, task.name,
        ", ".join(f"{split} {len(rows)}" for split, rows in batches.items()), start.config.embedding_size,
    )  # fmt: skip

    # 4. Train.
    measure = partial(validate, args, task, network, batches)
    if args.run_evaluation_before_fine_tune:
        logger.info("before training: %s", format_metrics(measure()))
    with signals.advice("the same command with --resume goes on"):
        training.train(trainer, measure, args.save_every)

    # 5. The best epoch.
    report_best(task, trainer.history)


main = cli.program(PROG, parse_arguments, run)


if __name__ == "__main__":
    main()
