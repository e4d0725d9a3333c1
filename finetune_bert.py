#!/usr/bin/env python3
"""Stage 2: fine-tune a BERT cross-encoder on a task. It becomes the teacher.

    python finetune_bert.py --bert_model bert-large-uncased-whole-word-masking --task_name mrpc --do_train --do_eval \\
        --do_lower_case --data_dir glue_data/MRPC --output_dir outputs/large_uncased_finetuned_mrpc

Writes to --output_dir a folder that transformers' `from_pretrained` loads, training.json (how it was made, and hashes)
and eval_results.txt. The same command with --resume goes on with a training that was stopped, from the newest state in
<output_dir>/training_state. With --do_eval alone, --bert_model names a folder that this script made.
"""

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dse import cli
from dse.data.cache import cache_name
from dse.data.processors import Examples, read_examples
from dse.data.tasks import Task, get_task, task_from_dict, task_to_dict
from dse.data.tokenizers import load_tokenizer, tokenizer_in, tokenizer_key
from dse.networks.config import check_fits_bert
from dse.networks.pretrained import (
    TRAINING,
    TRAINING_FORMAT,
    bert_config,
    bert_hashes,
    check_hashes,
    find_bert,
    last_part,
    read_training,
)
from dse.system import parallel, signals
from dse.system.device import describe_device, seed_everything, select_device
from dse.system.errors import InputError, RunError
from dse.system.files import (
    check_name,
    check_writable,
    load_tensors,
    sha256_file,
    utc_stamp,
    write_folder_whole,
    write_json,
    write_text,
)

PROG = "finetune_bert.py"
STATE = "training_state"  # folder of the states in the output folder
HEADER = {"format": "dse teacher state", "version": 1}
STALE = ("vocab.txt", "special_tokens_map.json", "added_tokens.json")  # of a tokenizer, read where there, not written
logger = logging.getLogger("dse.finetune_bert")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROG, description="Fine-tune a BERT cross-encoder, the teacher.")
    add = parser.add_argument
    add("--data_dir", required=True, help="folder of the task's files")
    add("--bert_model", required=True, help="hub name or folder of a BERT")
    add("--task_name", required=True, help="GLUE task, or a JSON file that describes your own")
    add("--output_dir", required=True, help="where the teacher and its results go")
    add("--cache_dir", default="", help="where downloaded models are kept; empty: the hub library's place")
    add("--max_seq_length", type=cli.whole_number(4), default=128, help="token ids per pair, with [CLS] and [SEP]s")
    add("--do_train", action="store_true", help="train and save the teacher")
    add("--do_eval", action="store_true", help="evaluate on the dev set, after each epoch when training")
    add("--do_lower_case", action="store_true", help="uncased model")
    add("--train_batch_size", type=cli.whole_number(1), default=32, help="pairs per update")
    add(
        "--eval_batch_size", type=cli.whole_number(1), default=8, help="pairs of full length per step of the evaluation"
    )
    add("--learning_rate", type=cli.positive, default=5e-5, help="peak rate of BertAdam")
    add("--num_train_epochs", type=cli.whole_epochs, default=3.0, help="epochs")
    add("--warmup_proportion", type=cli.share, default=0.1, help="share of the updates with a growing rate")
    add("--no_cuda", action="store_true", help="use the CPU though there is a GPU")
    add("--no_parallel", action="store_true", help="accepted for the original's sake; torchrun alone uses several GPUs")
    add("--gpu_id", type=cli.whole_number(0), default=0, help="which GPU")
    add("--overwrite_output_dir", action="store_true", help="train into a folder that is not empty")
    add("--seed", type=cli.seed, default=42, help="seed; -1: a new one each run")
    add("--gradient_accumulation_steps", type=cli.whole_number(1), default=1, help="batches per update")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    cli.add_resume_flags(parser)
    cli.add_precision_flags(parser)
    cli.add_padding_flag(parser)
    cli.add_log_flags(parser)
    add("--save_checkpoint_every_epoch", action="store_true", help="refresh --output_dir after each epoch")
    args = parser.parse_args(argv)
    if not (args.do_train or args.do_eval):
        parser.error("nothing to do: give --do_train, --do_eval or both")
    if args.train_batch_size < args.gradient_accumulation_steps:
        parser.error(
            f"--train_batch_size {args.train_batch_size} is divided by --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}, which leaves no pair per step: raise the first or lower the second"
        )
    return args


def results_dirs(args: argparse.Namespace, task: Task) -> dict[str, Path]:
    """Where the results on each set that is evaluated go: dev and, of MNLI, mm, its mismatched dev set."""
    folder = Path(args.output_dir)
    if "mm" not in dict(task.also_validate):
        return {"dev": folder}
    named = folder.resolve() if folder.name in ("", "..") else folder
    return {"dev": folder, "mm": named.parent / f"{named.name}-MM"}


def check_output_dir(args: argparse.Namespace, task: Task) -> None:
    output_dir = Path(args.output_dir)
    for folder in results_dirs(args, task).values():
        check_writable(folder, "--output_dir", f"{STATE}/teacher_state_epoch_{args.num_train_epochs}_update_{2**32}.pt")
    logits = f"{last_part(args.output_dir)}_logits.partial"  # of the next stage, named after this folder
    check_name(output_dir.parent / logits, "--output_dir")
    cache = cache_name("train", last_part(args.bert_model), args.max_seq_length, task.name, "joint")
    check_name(Path(args.data_dir) / cache, "--data_dir, --bert_model or --task_name")
    free = args.overwrite_output_dir or args.resume or not args.do_train
    if not free and output_dir.is_dir() and any(output_dir.iterdir()):
        hint = "--resume to go on with the training in it, " if (output_dir / STATE).is_dir() else ""
        raise InputError(
            f"--output_dir: {output_dir} is not empty; give {hint}--overwrite_output_dir to train into it, "
            "or another folder"
        )

    stale = [name for name in STALE if (output_dir / name).is_file()]
    if args.do_train and set(stale) - files_of_earlier(args):
        raise InputError(f"--output_dir: {output_dir} holds {', '.join(stale)}, which would change the teacher's "
                         "tokenizer: move them away, or name another folder")  # fmt: skip


def files_of_earlier(args: argparse.Namespace) -> set[str]:
    """The files of the teacher that is in the output folder, as its training.json lists them."""
    return set((read_training(Path(args.output_dir)) or {"sha256": {}})["sha256"])


def read_data(args: argparse.Namespace, task: Task) -> dict[str, Examples]:
    """The splits that the flags ask for; `mm` is MNLI's mismatched dev set."""
    splits = ["train"] if args.do_train else []
    splits += results_dirs(args, task) if args.do_eval else []
    return {split: read_examples(task, args.data_dir, split) for split in splits}


def make_features(
    args: argparse.Namespace, task: Task, data: dict[str, Examples], tokenizer: Any, padding: str
) -> dict[str, Any]:
    from dse.data.features import cached_features

    bert_name, length = last_part(args.bert_model), args.max_seq_length
    features = {}
    for split, examples in data.items():
        path = Path(args.data_dir) / cache_name(split, bert_name, length, task.name, "joint")
        features[split] = cached_features("joint", task, examples, tokenizer, length, path, False, padding)
    return features


def make_trainer(args: argparse.Namespace, task: Task, model: Any, features: Any, device: Any, seed: int) -> Any:
    import torch

    from dse.networks.teacher import teacher_logits
    from dse.training.losses import teacher_loss
    from dse.training.metrics import measure_teacher
    from dse.training.optimization import make_optimizer
    from dse.training.trainer import Trainer, count_updates

    batch_size = args.train_batch_size // args.gradient_accumulation_steps
    if batch_size * args.gradient_accumulation_steps != args.train_batch_size:
        logger.warning(
            "--train_batch_size %d is no multiple of %d: an update takes %d pairs",
            args.train_batch_size, args.gradient_accumulation_steps, batch_size * args.gradient_accumulation_steps,
        )  # fmt: skip
    updates = count_updates(len(features), batch_size, args.gradient_accumulation_steps) * int(args.num_train_epochs)
    labels = torch.from_numpy(features.labels).to(device)
    logger.info("%d pairs, %d per batch, %d updates in all", len(features), batch_size, updates)
    return Trainer(
        model,
        forward=lambda inputs: teacher_logits(model, inputs),
        loss=lambda logits, rows: teacher_loss(task.kind, logits, labels[rows]),
        measure=measure_teacher(task),
        features=features,
        optimizer=make_optimizer(model, args.learning_rate, updates, args.warmup_proportion),
        batch_size=batch_size,
        accumulation_steps=args.gradient_accumulation_steps,
        seed=seed,
        device=device,
        precision=cli.precision_of(args),
    )


def evaluate(
    args: argparse.Namespace, task: Task, model: Any, features: Any, device: Any, split: str
) -> dict[str, float]:
    from dse.networks.inference import infer
    from dse.networks.teacher import teacher_logits
    from dse.training.metrics import measure_teacher

    logits = infer(
        model, lambda inputs: teacher_logits(model, inputs), features, args.eval_batch_size, device, f"evaluate {split}"
    )
    return measure_teacher(task)(logits, features.labels)


def run_of(
    args: argparse.Namespace, task: Task, data: dict[str, Examples], bert_folder: Path, tokenizer: Any
) -> dict[str, Any]:
    """What makes a training this one: task, flags, data, encoder, tokenizer."""
    others = ("resume", "save_every", "overwrite_output_dir", "task_name", "cache_dir")
    flags = {flag: value for flag, value in vars(args).items() if flag not in others}
    return {
        "task_name": args.task_name,
        "task": task_to_dict(task),
        "run": flags,
        "data": {split: rows.files for split, rows in data.items()},
        "bert": bert_hashes(bert_folder) if args.do_train else None,
        "tokenizer": tokenizer_key(tokenizer),
    }


def check_same_run(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise InputError, naming both values, where a state or a finished training is of another run."""
    from dse.storage.checkpoint import check_same_bert, check_same_data, check_same_flags

    if there["task"] != here["task"]:
        raise InputError(f"--task_name: {here['task']['name']} now, {there['task']['name']} in the run")
    check_same_flags(there["run"], here["run"])
    then, now = there["run"]["bert_model"], here["run"]["bert_model"]
    check_same_bert(then, now, there.get("bert"), here["bert"])
    check_same_data(there["data"], here["data"])
    if there["tokenizer"] != here["tokenizer"]:
        raise InputError("--bert_model: its tokenizer is not the one that the run began with")


def load_state(path: Path) -> dict[str, Any]:
    state = load_tensors(path, f"{path} is truncated, spoiled or no state of {PROG}")
    if not isinstance(state, dict) or any(state.get(key) != value for key, value in HEADER.items()):
        raise InputError(f"{path} is no state of this version of {PROG}")
    return state


def find_state(args: argparse.Namespace, here: dict[str, Any]) -> tuple[Any, Path | None, dict[str, Any]]:
    """The states in the output folder; with --resume, the newest whole one of this training, where there is one."""
    from dse.storage.states import States

    states = States(Path(args.output_dir) / STATE, "teacher", own=True)
    found = states.newest(load_state) if args.resume else None
    if found is None:
        return states, None, {}
    check_same_run(found[1], here)
    return states, *found


def finished_training(args: argparse.Namespace, here: dict[str, Any]) -> dict[str, Any] | None:
    """training.json of a teacher that this very command has finished; None where there is none."""
    folder = Path(args.output_dir)
    there = read_training(folder)
    if there is None:
        if not args.overwrite_output_dir and folder.is_dir() and {path.name for path in folder.iterdir()} - {STATE}:
            raise InputError(
                f"--output_dir: {folder} holds other files and no training to go on with; give "
                "--overwrite_output_dir to train into it, or another folder"
            )
        return None
    try:
        check_same_run(there, here)
    except InputError:
        if args.overwrite_output_dir:
            return None
        raise
    if len(there["history"]) < args.num_train_epochs:  # of --save_checkpoint_every_epoch
        return None
    check_hashes(folder, "--output_dir")
    return there


def save_teacher(args: argparse.Namespace, model: Any, tokenizer: Any, about: dict[str, Any]) -> None:
    """Write the teacher and training.json, which has its files' hashes and comes last."""
    if not parallel.is_first():
        return
    with write_folder_whole(args.output_dir, last=TRAINING) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        hashes = {path.name: sha256_file(path) for path in sorted(beside.iterdir())}
        training = {"format": TRAINING_FORMAT, **about, "sha256": hashes}
        write_json(beside / TRAINING, training)
        for name in files_of_earlier(args) - hashes.keys():  # they would be read along with this one's
            (Path(args.output_dir) / name).unlink(missing_ok=True)
    if tokenizer_key(tokenizer_in(Path(args.output_dir))) != about["tokenizer"]:
        raise RunError(
            f"{args.output_dir}: its tokenizer is not the one of the training, because of other files there: move "
            "these away, and go on from the last state"
        )
    for folder in results_dirs(args, task_from_dict(about["task"])).values():
        (folder / "eval_results.txt").unlink(missing_ok=True)  # of the teacher that was replaced
    logger.info("teacher saved in %s", args.output_dir)


def train(
    args: argparse.Namespace, trainer: Any, tokenizer: Any, here: dict[str, Any], found: Any, validate: Any, log: Any
) -> list[dict[str, Any]]:
    """Train to the end from what was `found`, keeping states; the records of all epochs."""
    from dse.training.reporting import append_json_line

    states, trainer.saved, state = found
    if state:
        trainer.model.load_state_dict(state["model"])
        trainer.load_state_dict(state["trainer"])
        state.clear()
        logger.info("going on after %d epochs and %d updates of the next, from %s",
                    len(trainer.history), trainer.position, trainer.saved)  # fmt: skip
    else:
        states.finish()  # of a training that is not gone on with

    def save() -> Path:
        entries = {**HEADER, **here, "model": trainer.model.state_dict(), "trainer": trainer.state_dict()}
        return states.save((len(trainer.history), trainer.position), entries)

    def after_epoch(record: dict[str, Any]) -> None:
        trainer.saved = save()
        if args.save_checkpoint_every_epoch and len(trainer.history) < args.num_train_epochs:
            save_teacher(args, trainer.model, tokenizer, {**here, "history": trainer.history})
        if log is not None and parallel.is_first():
            append_json_line(log.with_suffix(".jsonl"), record)

    epochs = int(args.num_train_epochs)
    history = trainer.fit(epochs, validate, after_epoch=after_epoch, save=save, save_every=args.save_every)
    save_teacher(args, trainer.model, tokenizer, {**here, "history": history})
    return history


def write_results(folder: Path, metrics: dict[str, float], updates: int, train_loss: float | None) -> None:
    if not parallel.is_first():
        return
    metrics = {name: math.nan if value is None else value for name, value in metrics.items()}  # as JSON gave it back
    results = {**metrics, "eval_loss": metrics["loss"], "global_step": updates, "loss": train_loss}
    lines = [f"{key} = {value}" for key, value in sorted(results.items())]
    write_text(folder / "eval_results.txt", "\n".join(lines) + "\n")
    logger.info("%s: %s", folder / "eval_results.txt", ", ".join(lines))


def write_all_results(
    args: argparse.Namespace, task: Task, model: Any, features: dict[str, Any], device: Any, history: list[Any]
) -> dict[str, float]:
    """eval_results.txt for dev and, of MNLI, for its mismatched set; the metrics on dev."""
    if not args.do_eval:
        return {}
    last = history[-1] if history else {"updates": 0, "train": {"loss": None}}
    metrics = last.get("validation") or evaluate(args, task, model, features["dev"], device, "dev")
    write_results(Path(args.output_dir), metrics, last["updates"], last["train"]["loss"])
    if "mm" in features:
        mismatched = evaluate(args, task, model, features["mm"], device, "mm")
        write_results(results_dirs(args, task)["mm"], mismatched, last["updates"], last["train"]["loss"])
    return metrics


def run(args: argparse.Namespace) -> None:
    # 1. Refuse what cannot work, and read the data, before anything heavy is loaded.
    task = get_task(args.task_name)
    check_output_dir(args, task)
    log_file = Path(args.log_dir) / f"run_classifier_{task.name}_{utc_stamp()}.log" if args.file_log else None
    cli.set_up_logging(log_file)
    data = read_data(args, task)
    bert_folder = find_bert(args.bert_model, "--bert_model", args.cache_dir)
    check_fits_bert(bert_config(bert_folder, "--bert_model"), args.max_seq_length)
    tokenizer = load_tokenizer(bert_folder, args.do_lower_case, "--bert_model")

    here = run_of(args, task, data, bert_folder, tokenizer)
    found = find_state(args, here)
    finished = finished_training(args, here) if args.do_train and args.resume and not found[2] else None

    # 2. Device, seed, features, model.
    from dse.networks.batches import padding_for
    from dse.networks.teacher import load_teacher
    from dse.training.reporting import format_metrics

    device = select_device(args.no_cuda, args.gpu_id, cli.precision_of(args))
    parallel.join(device)
    seed = seed_everything(args.seed)
    logger.info("device %s, seed %d, task %s", describe_device(device), seed, task.name)
    trains = args.do_train and finished is None
    if trains and args.resume and not found[2]:
        logger.info("--resume: no state in %s: starting anew", args.output_dir)
    folder = bert_folder if trains or not args.do_train else Path(args.output_dir)
    model = load_teacher(folder, task, fine_tuned=not trains).to(device)
    features = make_features(args, task, data, tokenizer, padding_for(device, args.padding))
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()

    # 3. Train, evaluating on dev after each epoch.
    history = finished["history"] if finished is not None else []
    if trains:
        trainer = make_trainer(args, task, model, features["train"], device, seed)
        validate = (lambda: evaluate(args, task, model, features["dev"], device, "dev")) if args.do_eval else None
        with signals.advice("the same command with --resume goes on"):
            history = train(args, trainer, tokenizer, here, found, validate, log_file)
    elif args.do_train:
        logger.warning("nothing to train: the teacher in %s is finished", args.output_dir)

    # 4. Results of the last epoch's teacher.
    with signals.advice(f"the same command{' with --resume' if trains else ''} goes on"):
        metrics = write_all_results(args, task, model, features, device, history)
    if trains:
        found[0].finish()  # the teacher is there, with its results
    logger.info("done: %s", format_metrics(metrics) or "no evaluation asked for")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage; exits with code 2 and one line when the input cannot be used."""
    with cli.clear_errors(PROG):
        run(parse_arguments(argv))


if __name__ == "__main__":
    main()
