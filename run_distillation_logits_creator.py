#!/usr/bin/env python3
"""Stage 3: write the teacher's logits for every training pair, in the order of the training file.

    python run_distillation_logits_creator.py --task_name mrpc --data_dir glue_data/MRPC --do_lower_case \\
        --train_features_path glue_data/MRPC/train_bert-large-uncased-whole-word-masking_128_mrpc \\
        --bert_checkpoint_dir outputs/large_uncased_finetuned_mrpc

Writes <output_dir>/<last part of bert_checkpoint_dir>_logits.pt, a bare float32 tensor (rows, labels), and
beside it a .json that says which task, data and teacher the logits belong to. Outputs so far are kept in a .partial
beside them, once a minute; the same command goes on from there.
"""

import argparse
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dse import cli
from dse.data.cache import check_cache_path
from dse.data.processors import read_examples
from dse.data.tasks import check_sentence_pairs, get_task
from dse.data.tokenizers import load_tokenizer
from dse.networks.config import check_fits_bert
from dse.networks.pretrained import bert_config, find_bert, last_part, read_training, weight_files
from dse.system import parallel
from dse.system.device import describe_device, select_device
from dse.system.files import check_writable, sha256_file, utc_stamp

PROG = "run_distillation_logits_creator.py"
logger = logging.getLogger("dse.run_distillation_logits_creator")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROG, description="Write the teacher's logits for the training pairs.")
    add = parser.add_argument
    cli.add_task_flags(parser)
    add("--train_features_path", required=True, help="cache of finetune_bert.py's features; made if absent")
    add("--bert_checkpoint_dir", required=True, help="the teacher: a folder that finetune_bert.py made")
    add("--do_lower_case", action="store_true", help="uncased model")
    cli.add_device_flags(parser)
    add("--output_dir", default="outputs/logits", help="folder of the logits file")
    add("--max_seq_length", type=cli.whole_number(4), default=128, help="token ids per pair, with [CLS] and [SEP]s")
    add("--batch_size", type=cli.whole_number(1), default=256, help="pairs of full length per step")
    add("--save_every", type=cli.whole_number(1), help="steps between two writes of .partial; not given: once a minute")
    cli.add_padding_flag(parser)
    return parser.parse_args(argv)


def teacher_identity(folder: Path) -> dict[str, str]:
    """The teacher by content: name and SHA-256 of its weights' files."""
    return {"name": last_part(str(folder)), **{path.name: sha256_file(path) for path in weight_files(folder)}}


def teacher_commands(folder: Path) -> list[Any]:
    """The command that made the teacher, where its folder tells."""
    training = read_training(folder)
    return [] if training is None else [["finetune_bert.py", {"task_name": training["task_name"], **training["run"]}]]


def run(args: argparse.Namespace) -> None:
    # 1. Refuse what cannot work, and read the data, before anything heavy is loaded.
    task = get_task(args.task_name)
    check_sentence_pairs(task)
    path = Path(args.output_dir) / f"{last_part(args.bert_checkpoint_dir)}_logits.pt"
    check_writable(args.output_dir, "--output_dir", path.with_suffix(".partial").name)
    check_cache_path(args.train_features_path, "joint")
    cli.set_up_logging()
    examples = read_examples(task, args.data_dir, "train")
    teacher_dir = find_bert(args.bert_checkpoint_dir, "--bert_checkpoint_dir", hub=False)
    check_fits_bert(bert_config(teacher_dir, "--bert_checkpoint_dir"), args.max_seq_length)
    tokenizer = load_tokenizer(teacher_dir, args.do_lower_case, "--bert_checkpoint_dir")

    # 2. Features and teacher.
    import torch

    from dse.data.features import cached_features
    from dse.networks.batches import Batches, padding_for
    from dse.networks.inference import PartialOutputs, infer
    from dse.networks.teacher import load_teacher
    from dse.storage.logits import logits_identity, save_logits
    from dse.training.kinds import kind_of
    from dse.training.metrics import tell_agreement

    device = select_device(args.disable_gpu, args.gpu_id)
    parallel.join(device)
    belongs = logits_identity(task, examples.files, len(examples))
    belongs |= {"teacher": teacher_identity(teacher_dir), "max_seq_length": args.max_seq_length}
    teacher = load_teacher(teacher_dir, task, fine_tuned=True).to(device)
    padding = padding_for(device, args.padding)
    cache = args.train_features_path
    features = cached_features("joint", task, examples, tokenizer, args.max_seq_length, cache, True)
    logger.info("device %s, %d pairs of %s", describe_device(device), len(features), task.name)

    # 3. Logits, in file order.
    work = {
        **belongs, "tokens": hashlib.sha256(features.tokens.ids).hexdigest(), "torch": torch.__version__,
        "batch_size": args.batch_size, "padding": padding, "device": device.type,
    }  # fmt: skip
    progress = PartialOutputs(path.with_suffix(".partial"), work, args.save_every)
    batches = Batches(features, padding, args.max_seq_length)
    logits = torch.from_numpy(infer(teacher, batches, args.batch_size, device, "teacher logits", progress))
    if not parallel.is_first():
        return
    outputs = kind_of(task).targets(logits).numpy()
    tell_agreement(task, outputs, features.labels, "the teacher", "the training labels")

    # 4. The file, and what it belongs to.
    commands = [*teacher_commands(teacher_dir), [PROG, vars(args)]]
    about = {**belongs, "do_lower_case": args.do_lower_case, "created": utc_stamp(), "commands": commands}
    save_logits(path, logits, about)
    progress.remove()
    logger.info("logits %s written to %s", tuple(logits.shape), path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage; exits with code 2 and one line when the input cannot be used."""
    with cli.clear_errors(PROG):
        run(parse_arguments(argv))


if __name__ == "__main__":
    main()
