#!/usr/bin/env python3
"""Stage 3: write the teacher's logits for every training pair, in the order of the training file.

    python run_distillation_logits_creator.py --task_name mrpc --data_dir glue_data/MRPC --do_lower_case \\
        --train_features_path glue_data/MRPC/train_bert-large-uncased-whole-word-masking_128_mrpc \\
        --bert_checkpoint_dir outputs/large_uncased_finetuned_mrpc

Writes <output_dir>/<last part of bert_checkpoint_dir>_logits.pt, a bare float32 tensor (rows, labels), and a .json that
says what the logits belong to. Once a minute, a .partial stores the outputs so far; the same command continues from it.
"""

import argparse
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from dse import cli
from dse.data.cache import cache_name, check_cache_path
from dse.data.processors import read_examples
from dse.data.tasks import Task, check_sentence_pairs, get_task
from dse.networks.config import MAX_SEQ_LENGTH
from dse.networks.pretrained import last_part, open_bert, read_training, weight_files
from dse.system import parallel
from dse.system.device import describe_device, select_device
from dse.system.files import check_writable, sha256_file, utc_stamp

PROG = "run_distillation_logits_creator.py"
logger = logging.getLogger("dse.run_distillation_logits_creator")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROG, doc=__doc__)
    add = parser.add_argument
    cli.add_task_flags(parser)
    cache = "feature cache that finetune_bert.py wrote; made if missing (default: the one beside the data)"
    add("--train_features_path", default="", help=cache)
    teacher = "the teacher: a folder that finetune_bert.py made, or another BERT cross-encoder's folder or hub name"
    add("--bert_checkpoint_dir", required=True, help=teacher)
    add("--do_lower_case", action="store_true", help="lower-case the text; not needed if the teacher's folder says so")
    cli.add_device_flags(parser)
    add("--output_dir", default="outputs/logits", help="folder for the logits file")
    length = "token ids per pair, with [CLS] and [SEP]s (default: the teacher's, else 128)"
    add("--max_seq_length", type=cli.whole_number(4), help=length)
    add("--batch_size", type=cli.whole_number(1), default=256, help="full-length pairs per step; more if shorter")
    add("--save_every", type=cli.whole_number(1), help="steps between two writes of .partial (default: once a minute)")
    cli.add_precision_flags(parser)
    cli.add_padding_flag(parser)
    return parser.parse_args(argv)


def follow_teacher(args: argparse.Namespace, task: Task) -> None:
    """Set casing, length and cache as in the teacher's training, where flags leave them open and its folder tells."""
    folder = Path(args.bert_checkpoint_dir)
    trained = (read_training(folder) or {"run": {}})["run"]
    args.do_lower_case = args.do_lower_case or trained.get("do_lower_case", False)
    length = trained.get("max_seq_length")
    if args.max_seq_length not in (None, length) and length is not None:
        logger.warning("--max_seq_length: %d, but the teacher was trained with %d", args.max_seq_length, length)
    args.max_seq_length = args.max_seq_length or length or MAX_SEQ_LENGTH
    if not args.train_features_path:
        bert = last_part(trained.get("bert_model", args.bert_checkpoint_dir))
        name = cache_name("train", bert, args.max_seq_length, task.name, "joint")
        args.train_features_path = str(Path(args.data_dir) / name)


def tell_next(args: argparse.Namespace, task: Task, path: Path, bert: str) -> None:
    cli.tell_next(
        f"logits: {path}", "python", "dse_train_runner.py", "--task_name", args.task_name, "--data_dir", args.data_dir,
        "--do_lower_case" * args.do_lower_case, "--bert_model", bert, "--distillation_logits_path", path,
        "--fc_dims", 512, task.num_student_outputs,
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    # 1. Refuse what cannot work, and read the data, before anything heavy is loaded.
    task = get_task(args.task_name, args.dev_share)
    check_sentence_pairs(task)
    cli.set_up_logging()
    follow_teacher(args, task)
    path = Path(args.output_dir) / f"{last_part(args.bert_checkpoint_dir)}_logits.pt"
    check_writable(args.output_dir, "--output_dir", path.with_suffix(".partial").name)
    check_cache_path(args.train_features_path, "joint")
    examples = read_examples(task, args.data_dir, "train")
    of_teacher = (args.bert_checkpoint_dir, "--bert_checkpoint_dir", args.do_lower_case, args.max_seq_length)
    bert = open_bert(*of_teacher)

    # 2. Features and teacher.
    import torch

    from dse.networks.inference import PartialOutputs, infer
    from dse.networks.teacher import load_teacher
    from dse.storage.logits import logits_identity, save_logits
    from dse.training.epoch_plan import cached_batches
    from dse.training.kinds import kind_of, tell_agreement

    device = select_device(args.disable_gpu, args.gpu_id, cli.precision_of(args))
    parallel.join(device)
    teacher = load_teacher(bert.folder, task, fine_tuned=True).to(device)
    teacher.precision = cli.precision_of(args)
    caches = {"train": (Path(args.train_features_path), True)}
    batches = cached_batches("joint", task, {"train": examples}, bert.tokenizer, caches, args)["train"]
    logger.info("device %s, %d pairs of %s", describe_device(device, teacher.precision), len(batches), task.name)

    # 3. Logits, in file order.
    hashes = {file.name: sha256_file(file) for file in weight_files(bert.folder)}
    belongs = logits_identity(task, examples.files, len(examples))
    belongs |= {"teacher": {"name": last_part(str(bert.folder)), **hashes}, "max_seq_length": args.max_seq_length}
    work = {**belongs, "tokens": hashlib.sha256(batches.features.tokens.ids).hexdigest(), "device": device.type}
    work |= {"torch": torch.__version__, "batch_size": args.batch_size, "how": [batches.padding, teacher.precision]}
    progress = PartialOutputs(path.with_suffix(".partial"), work, args.save_every)
    logits = torch.from_numpy(infer(teacher, batches, args.batch_size, device, "teacher logits", progress))
    outputs = kind_of(task).targets(logits).numpy()
    tell_agreement(task, outputs, batches.features.labels, "the teacher", "the training labels")

    # 4. The file, and what it belongs to.
    training = read_training(bert.folder)
    made = [["finetune_bert.py", {"task_name": training["task_name"], **training["run"]}]] if training else []
    about = {**belongs, "do_lower_case": args.do_lower_case, "created": utc_stamp()}
    if parallel.is_first():
        save_logits(path, logits, {**about, "commands": [*made, [PROG, vars(args)]]})
        progress.remove()
        tell_next(args, task, path, training["run"]["bert_model"] if training else "BERT")


main = cli.program(PROG, parse_arguments, run)


if __name__ == "__main__":
    main()
