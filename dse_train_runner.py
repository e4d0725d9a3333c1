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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dse import cli
from dse.data.cache import cache_name, check_cache_path
from dse.data.processors import Examples, read_examples
from dse.data.tasks import Task, check_sentence_pairs, get_task, task_to_dict
from dse.data.tokenizers import load_tokenizer, tokenizer_to_files
from dse.networks.config import DSEConfig, check_fc_dims, check_fits_bert
from dse.networks.pretrained import bert_config, bert_hashes, find_bert, last_part
from dse.system import parallel, signals
from dse.system.device import describe_device, seed_everything, select_device
from dse.system.errors import InputError
from dse.system.files import check_file, check_name, check_writable, read_json, sha256_file, utc_stamp
from dse.training.reporting import (
    Record,
    append_json_line,
    check_can_plot,
    format_metrics,
    plot_metrics,
    winning_threshold,
)

if TYPE_CHECKING:
    import torch

    from dse.data.features import Features
    from dse.models import DSESiameseClassifier
    from dse.storage.states import States
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


@dataclass
class RunStart:
    """What a run starts from: the pre-trained encoder, or a state of the run."""

    tokenizer: Any
    stamp: str  # names the run's folders
    config: DSEConfig
    bert_folder: Path | None = None
    states: "States | None" = None
    path: Path | None = None  # of the state
    epochs: int | None = None  # --epochs of the run that wrote it
    checkpoint: dict[str, Any] | None = None  # the state, until it is loaded


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


def start_fresh(args: argparse.Namespace, stamp: str, data: dict[str, Any]) -> RunStart:
    folder = find_bert(args.bert_model, "--bert_model")
    bert = bert_config(folder, "--bert_model")
    check_fits_bert(bert, args.max_seq_length, args.pooler_num_top_hidden_layers)
    tokenizer = load_tokenizer(folder, args.do_lower_case, "--bert_model")
    data["bert"] = bert_hashes(folder)
    return RunStart(tokenizer, stamp, DSEConfig.from_flags(args, bert), bert_folder=folder)


def start_again(args: argparse.Namespace, task: Task, data: dict[str, Any]) -> RunStart | None:
    """From --trainer_checkpoint, or with --resume from the run's newest whole state; None where there is none."""
    from dse.data.tokenizers import tokenizer_from_files
    from dse.storage.checkpoint import check_same_run, find_run, load_checkpoint, take_over

    def check(checkpoint: dict[str, Any]) -> None:
        check_same_run(checkpoint, task, run_flags(args), data)

    if args.trainer_checkpoint:
        path = Path(args.trainer_checkpoint)
        checkpoint = load_checkpoint(path)
        check(checkpoint)
        states = take_over(path, checkpoint, args.experiment_name)
    else:
        found = find_run(Path(args.checkpoint_dir), args.experiment_name, check)
        if found is None:
            logger.info("--resume: no state of %s in %s: starting anew", args.experiment_name, args.checkpoint_dir)
            return None
        states, path, checkpoint = found
    data["bert"] = checkpoint["data"].get("bert")  # None: of a version that did not store it
    best = checkpoint["best"]
    if best is not None and not states.files.setdefault((best["epoch"] + 1, 0), path.parent / best["file"]).is_file():
        logger.warning("the best checkpoint so far, %s, is not beside %s", best["file"], path)
    return RunStart(
        tokenizer_from_files(checkpoint["tokenizer"]),
        checkpoint["stamp"],
        DSEConfig.from_dict(checkpoint["architecture"]),
        states=states,
        path=path,
        epochs=checkpoint["run"]["epochs"],
        checkpoint=checkpoint,
    )


def commands_of(logits: Path) -> list[Any]:
    """The commands that made the logits and their teacher, as far as the JSON beside the logits tells."""
    about = logits.with_suffix(".json")
    return read_json(about, "the description of the logits").get("commands", []) if about.is_file() else []


def run_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that a checkpoint remembers: those that another value of would make another run."""
    others = ("trainer_checkpoint", "resume", "save_every", "task_name")
    return {flag: value for flag, value in vars(args).items() if flag not in others}


def make_features(
    args: argparse.Namespace, task: Task, examples: dict[str, Examples], tokenizer: Any, padding: str
) -> dict[str, "Features"]:
    """Separate features of each split, from caches whose names the user gave or that lie beside the data."""
    from dse.data.features import cached_features

    paths = features_paths(args, task)
    return {
        split: cached_features("separate", task, rows, tokenizer, args.max_seq_length, *paths[split], padding)
        for split, rows in examples.items()
    }


def make_model(args: argparse.Namespace, start: RunStart) -> "DSESiameseClassifier":
    from dse.models import new_student
    from dse.networks.student import set_dropout
    from dse.storage.checkpoint import student_from_checkpoint

    if start.checkpoint is not None:
        model, _ = student_from_checkpoint(start.checkpoint)
    else:
        model = new_student(start.bert_folder, start.config)
    if args.dropout is not None:
        set_dropout(model, args.dropout)
    if args.gradient_checkpointing:
        model.dse_model.bert.bert.activation_checkpointing_enable()
    return model


def make_trainer(
    args: argparse.Namespace,
    task: Task,
    model: "DSESiameseClassifier",
    features: "Features",
    logits: "torch.Tensor",
    device: "torch.device",
    seed: int,
) -> "Trainer":
    import torch

    from dse.training.losses import distillation_targets, student_loss
    from dse.training.metrics import measure_student
    from dse.training.optimization import make_optimizer
    from dse.training.trainer import Trainer, count_updates

    # The original's schedule counts batches, though updates are fewer; the paper's numbers rest on it.
    per_update = args.gradient_accumulation_steps if args.schedule_in_updates else 1
    t_total = count_updates(len(features), args.batch_size, per_update) * args.epochs
    labels = torch.from_numpy(features.labels).to(device)
    targets = distillation_targets(task.kind, logits).to(device)
    return Trainer(
        model,
        forward=lambda inputs: model(**inputs),
        loss=lambda outputs, rows: student_loss(
            task.kind, outputs, labels[rows], targets[rows], args.distillation_coeff
        ),
        measure=measure_student(task, args.tune_positive_thresholds, targets.cpu(), args.distillation_coeff),
        features=features,
        optimizer=make_optimizer(model, args.lr, t_total, args.warmup_proportion, args.head_lr, "siamese_head."),
        batch_size=args.batch_size,
        accumulation_steps=args.gradient_accumulation_steps,
        seed=seed,
        device=device,
        precision=cli.precision_of(args),
    )


def make_validate(
    args: argparse.Namespace, task: Task, trainer: "Trainer", features: dict[str, "Features"]
) -> Callable[[], dict[str, float]]:
    """Metrics on dev and, with a prefix, on the task's other validation sets (mm_…, test_…)."""
    from dse.networks.inference import infer_pairs
    from dse.training.metrics import measure_student

    measure = measure_student(task, args.tune_positive_thresholds)

    def validate() -> dict[str, float]:
        metrics = {}
        for split, rows in features.items():
            if split == "train":
                continue
            outputs = infer_pairs(trainer.model, rows, args.val_batch_size, trainer.device, f"validate {split}")
            prefix = "" if split == "dev" else f"{split}_"
            metrics |= {prefix + name: value for name, value in measure(outputs, rows.labels).items()}
        return metrics

    return validate


def score_of(task: Task, record: Record) -> tuple[str, float]:
    """Name and value of the score that ranks checkpoints; the loss where the correlation is undefined."""
    from dse.training.metrics import best_score

    return best_score(task.kind, record["validation"])


def best_record(task: Task, history: list[Record]) -> Record | None:
    """The validated epoch with the best score, the first of equals; None where none was validated.

    Epochs without a score rank last, by their loss.
    """

    def rank(record: Record) -> tuple[bool, float]:
        name, value = score_of(task, record)
        return name != "loss", -value if name == "loss" else value

    return max((record for record in history if "validation" in record), key=rank, default=None)


def warn_of_no_score(task: Task, history: list[Record]) -> None:
    """Warn, once in a run, that the last epoch has no score."""
    names = [score_of(task, record)[0] for record in history if "validation" in record]
    if names.count("loss") == 1 and names[-1] == "loss":
        logger.warning(
            "the correlation on dev is undefined, as all scores or all outputs are the same: the loss ranks such epochs"
        )


def best_epoch(task: Task, history: list[Record]) -> int | None:
    record = best_record(task, history)
    return None if record is None else record["epoch"]


def out_of_patience(task: Task, history: list[Record], patience: int | None) -> bool:
    validated = [record["epoch"] for record in history if "validation" in record]
    if patience is None or not validated:
        return False
    return sum(epoch > best_epoch(task, history) for epoch in validated) >= patience


def make_entries(
    args: argparse.Namespace, task: Task, trainer: "Trainer", start: RunStart, data: dict[str, Any]
) -> Callable[[str], dict[str, Any]]:
    """A function from the name of a checkpoint under way, or "", to all that a checkpoint or state holds now."""
    from dse.storage.checkpoint import HEADER

    unchanging = {
        **HEADER,
        "architecture": trainer.model.config.to_dict(),
        "tokenizer": tokenizer_to_files(start.tokenizer),
        "task": task_to_dict(task, ranks=True),
        "data": data,
        "run": {"task_name": args.task_name, **run_flags(args)},
        "stamp": start.stamp,
    }

    def entries(name: str = "") -> dict[str, Any]:
        epoch, best = best_epoch(task, trainer.history), None
        if epoch is not None and args.store_checkpoints:
            newest = epoch + 1 == len(trainer.history) and name
            threshold = winning_threshold(best_record(task, trainer.history)["validation"])
            best = {"epoch": epoch, "file": newest or start.states.files[epoch + 1, 0].name, "threshold": threshold}
        return {**unchanging, "model": trainer.model.state_dict(), "trainer": trainer.state_dict(), "best": best}

    return entries


def make_after_epoch(
    args: argparse.Namespace,
    task: Task,
    trainer: "Trainer",
    start: RunStart,
    data: dict[str, Any],
    save: Callable[[], Path],
    entries: Callable[[str], dict[str, Any]],
    log_file: Path | None,
) -> Callable[[Record], bool]:
    """After each epoch: checkpoint or state, JSON line, plots; True ends the training early."""
    from dse.storage.checkpoint import origin_of, save_best, settings_of

    def after_epoch(record: Record) -> bool:
        best = best_epoch(task, trainer.history)
        warn_of_no_score(task, trainer.history)
        if args.store_checkpoints and "validation" in record:
            name, value = score_of(task, record)
            file = f"{args.experiment_name}_{utc_stamp()}_{name}_{value:.3f}_epoch_{record['epoch']}.pt"
            trainer.saved = start.states.save((record["epoch"] + 1, 0), entries(file), file, best)
            logger.info("checkpoint %s", trainer.saved)
            if best == record["epoch"] and parallel.is_first():
                run = {"task_name": args.task_name, **run_flags(args)}
                trainer.model.settings = settings_of(start.tokenizer, task, args.max_seq_length, trainer.history)
                trainer.model.origin = origin_of(run, trainer.seed, trainer.history, data, start.stamp)
                save_best(trainer.model, start.states.folder)
        else:
            trainer.saved = save()
        if parallel.is_first():
            if log_file is not None:
                append_json_line(log_file.with_suffix(".jsonl"), record)
            if args.plot_metrics:
                folder = Path(args.plots_dir) / f"{args.experiment_name}_{start.stamp}"
                plot_metrics(trainer.history, folder, args.experiment_name)
        stop = out_of_patience(task, trainer.history, args.patience)
        if stop:
            logger.info("no better score in %d validations: stopped early", args.patience)
        return stop

    return after_epoch


def train(
    args: argparse.Namespace,
    task: Task,
    trainer: "Trainer",
    start: RunStart,
    data: dict[str, Any],
    validate: Callable[[], dict[str, float]],
    log_file: Path | None,
) -> None:
    """Train to the end of --epochs, or of --patience, keeping states."""
    from dse.storage.checkpoint import mend_best, new_run_folder
    from dse.storage.states import States

    if start.states is None:
        folder = Path(args.checkpoint_dir) / "of the first process"
        if parallel.is_first():
            folder, start.stamp = new_run_folder(Path(args.checkpoint_dir), args.experiment_name, start.stamp)
        start.states = States(folder, args.experiment_name, own=True)
    entries = make_entries(args, task, trainer, start, data)

    def save() -> Path:
        position = len(trainer.history), trainer.position
        best = best_epoch(task, trainer.history) if args.store_checkpoints else None
        return start.states.save(position, entries(), best_epoch=best)

    wanted_more = len(trainer.history) >= args.epochs != start.epochs  # by the run that is gone on with
    if out_of_patience(task, trainer.history, args.patience):
        wanted_more = False
        logger.warning("nothing to train: the run had stopped early, out of --patience %d", args.patience)
    elif len(trainer.history) >= args.epochs:
        logger.warning("nothing to train: %d epochs are done, --epochs is %d", len(trainer.history), args.epochs)
    else:
        after_epoch = make_after_epoch(args, task, trainer, start, data, save, entries, log_file)
        trainer.fit(args.epochs, validate, args.validate_every, after_epoch, save, args.save_every)
    best = best_epoch(task, trainer.history) if args.store_checkpoints else None
    if not wanted_more:  # else more may be wanted again: what is there stays
        start.states.finish(best)
    if best is not None and parallel.is_first():
        mend_best(start.states.folder, start.states.files[best + 1, 0], best, start.stamp)


def report_best(task: Task, history: list[Record]) -> None:
    best = best_record(task, history)
    if best is None:
        return
    name, value = score_of(task, best)
    threshold = winning_threshold(best["validation"])
    where = "" if threshold is None else f" with threshold {threshold}"
    logger.info("best %s %.4f at epoch %d%s", name, value, best["epoch"], where)
    logger.info("its train metrics: %s", format_metrics(best["train"], threshold))
    logger.info("its validation metrics: %s", format_metrics(best["validation"], threshold))


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
    again = args.trainer_checkpoint or args.resume
    start = (start_again(args, task, data) if again else None) or start_fresh(args, stamp, data)

    # 2. Teacher logits that belong to this data; features; device and seed.
    from dse.networks.batches import padding_for
    from dse.storage.logits import load_logits, logits_identity

    logits = load_logits(
        args.distillation_logits_path, logits_identity(task, examples["train"].files, len(examples["train"]))
    )
    device = select_device(args.disable_gpu, args.gpu_id, cli.precision_of(args))
    parallel.join(device)
    features = make_features(args, task, examples, start.tokenizer, padding_for(device, args.padding))
    seed = seed_everything(args.random_seed)

    # 3. Student and trainer.
    model = make_model(args, start).to(device)
    trainer = make_trainer(args, task, model, features["train"], logits, device, seed)
    if start.checkpoint is not None:
        trainer.load_state_dict(start.checkpoint["trainer"])
        trainer.saved, start.checkpoint = start.path, None
        logger.info(
            "going on after %d epochs and %d updates of the next, from %s",
            len(trainer.history), trainer.position, start.path,
        )  # fmt: skip
    logger.info(
        "device %s, seed %d, task %s, %s, embeddings of %d",
        describe_device(device), trainer.seed, task.name,
        ", ".join(f"{split} {len(rows)}" for split, rows in features.items()), start.config.embedding_size,
    )  # fmt: skip

    # 4. Train.
    validate = make_validate(args, task, trainer, features)
    if args.run_evaluation_before_fine_tune:
        logger.info("before training: %s", format_metrics(validate()))
    with signals.advice("the same command with --resume goes on"):
        train(args, task, trainer, start, data, validate, log_file)

    # 5. The best epoch.
    report_best(task, trainer.history)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage; exits with code 2 and one line when the input cannot be used."""
    with cli.clear_errors(PROG):
        run(parse_arguments(argv))


if __name__ == "__main__":
    main()
