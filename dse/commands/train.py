"""Train a student from a file of pairs: teacher, logits and student in one command, which can be stopped and repeated.

    python -m dse train --data pairs.csv --output my_run

The file is a table with a header (.csv, .jsonl, or TSV; .gz may follow). Columns, kind of task and labels are found in
it unless flags name them, and said in the log. The pairs are copied to <output>/data, beside task.json, which describes
them to every script and command; the student is in <output>/student.
"""

import argparse
import shlex
import shutil
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from dse import cli
from dse.commands import logger
from dse.data.processors import in_share, read_examples, read_pairs
from dse.data.tasks import BINARY, DEFAULT_DEV_SHARE, KINDS, TASKS, describe, get_task
from dse.experiments.presets import PRESETS
from dse.experiments.reproduction import Encoder, Experiment, open_encoder
from dse.experiments.synthetic import with_negatives
from dse.system import parallel
from dse.system.device import select_device
from dse.system.errors import InputError
from dse.system.files import (
    check_file,
    check_writable,
    json_text,
    read_json,
    replace_folder,
    sha256_file,
    write_json,
    write_text,
)
from dse.training.reporting import show_number

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
RECIPES = {"recommended": PRESETS["small"], "paper": PRESETS["large"]}
STAGES = ["teacher", "logits", "dse"]
NAME = "pairs"  # of the task
DATA, STUDENT = "data", "student"  # folders in --output
TASK, CANDIDATES, MADE_FROM = "task.json", "candidates.jsonl", "made_from.json"  # files beside the data
COLUMNS = ("text_a", "text_b", "label")  # of pairs with negatives


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    add("--data", required=True, help="file of pairs with a header: .csv, .jsonl or TSV, .gz of each")
    add("--dev", help="file of the same form to validate on (default: a share of the pairs)")
    add("--dev_share", type=cli.inner_share, default=DEFAULT_DEV_SHARE, help="of the pairs, for dev without a dev file")
    add("--text_a", help="column of the first text, such as the question (default: found)")
    add("--text_b", help="column of the second text (default: found)")
    add("--label", help="column of the label or score (default: found)")
    add("--kind", choices=KINDS, help="what the labels are (default: found)")
    add("--labels", nargs="+", help="the labels; of two the negative one first (default: found)")
    add("--negatives", type=cli.whole_number(1), metavar="N",
        help="for pairs that all match: make N that do not for each, half from the texts that are nearest")  # fmt: skip
    add(
        "--symmetric",
        action="store_true",
        help="for texts that may change places: the score is the mean of both orders",
    )
    add("--output", default="outputs/train", help="folder for all that is made; a later call continues there")
    add("--recipe", choices=RECIPES, default="recommended", help="settings: those of the README, or the paper's")
    add("--bert_model", default=ENCODER, help="pre-trained encoder: hub name or folder")
    add("--max_seq_length", type=cli.whole_number(4), default=128, help="token ids per text, with [CLS] and [SEP]")
    add("--seed", type=cli.whole_number(0), default=1, help="random seed")


def write_data(args: argparse.Namespace, folder: Path, encoder: Encoder) -> None:
    """Copy the pairs into a folder, with negatives if wanted, and describe them in its task.json."""
    paths = {"train": Path(args.data), **({"dev": Path(args.dev)} if args.dev else {})}
    if args.negatives is not None and (args.kind or args.labels):
        raise InputError("--negatives: makes a binary task of labels 0 and 1; leave --kind and --labels out")
    given = (args.text_a, args.text_b, args.label, args.kind, args.labels, args.negatives is not None)
    line = {"name": NAME, "dev": None, **describe(paths["train"], *given)}
    if args.negatives is not None:
        line |= write_negatives(args, paths, line, folder, encoder)
    elif "label" not in line:
        raise InputError(
            f"{paths['train']}: has no column of labels; name it with --label, or give --negatives 4 if all match"
        )
    else:
        for split, path in paths.items():
            line[split] = split + "".join(path.suffixes[-1 - path.name.lower().endswith(".gz") :])
            shutil.copyfile(path, folder / line[split])
        line |= {} if args.dev else {"dev_share": args.dev_share}
    write_json(folder / TASK, line)
    task = get_task(str(folder / TASK))
    texts = dict.fromkeys(
        chain.from_iterable(read_examples(task, folder, split).sides[-1] for split in ("train", "dev"))
    )
    write_text(folder / CANDIDATES, "".join(json_text({"text": text}, ensure_ascii=False) + "\n" for text in texts))


def write_negatives(
    args: argparse.Namespace, paths: dict[str, Path], line: dict[str, Any], folder: Path, encoder: Encoder
) -> dict[str, Any]:
    """Write train and dev of pairs that all match with others that do not. Returns their part of the task's line."""
    from dse.experiments.baselines import mean_encoder

    pairs = {split: read_pairs(path, line["text_a"], line["text_b"], "--data") for split, path in paths.items()}
    if not args.dev:  # whole first texts, so that a question is in one of the two alone
        both = [[pair for pair in pairs["train"] if in_share(pair[0], args.dev_share) is dev] for dev in (False, True)]
        pairs = dict(zip(("train", "dev"), both, strict=True))
    student = mean_encoder(
        encoder.folder, encoder.lower_case, TASKS["mrpc"], args.max_seq_length, select_device(False, 0)
    )
    units, known = partial(student.encode, normalize=True), list(chain.from_iterable(pairs.values()))
    for split, some in pairs.items():
        rows = with_negatives(some, args.negatives, units, args.seed, known) if some else []
        counts = Counter(label for *_, label in rows)
        if not counts[0]:
            raise InputError(
                f"--negatives: {paths['train']} has too few pairs to make negatives for {split}; give more"
            )
        logger.info("%s: %d pairs match, %d were made that do not", split, counts[1], counts[0])
        lines = (json_text(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"{split}.jsonl", "".join(lines))
    columns = dict(zip(COLUMNS, COLUMNS, strict=True))
    return {"kind": BINARY, "labels": ["0", "1"], "train": "train.jsonl", "dev": "dev.jsonl", **columns}


def prepare(args: argparse.Namespace, encoder: Encoder) -> Path:
    """The folder of the data, which is made unless it is there. Raises InputError if it is of other data or flags."""
    folder = Path(args.output) / DATA
    flags = ("text_a", "text_b", "label", "kind", "labels", "negatives", "dev_share", "seed")
    made_from = {flag: getattr(args, flag) for flag in flags}
    if args.negatives is not None:  # which the encoder chooses
        made_from |= {"bert_model": encoder.hashes, "max_seq_length": args.max_seq_length}
    made_from |= {flag: sha256_file(path) for flag, path in (("data", args.data), ("dev", args.dev)) if path}
    if (folder / MADE_FROM).is_file():
        before = read_json(folder / MADE_FROM, "what the data was made from")
        if changed := [flag for flag in made_from | before if before.get(flag) != made_from.get(flag)]:
            raise InputError(f"--output: {args.output} was made with another --{changed[0]}; name another folder")
        return folder
    if folder.exists():
        raise InputError(f"--output: {folder} exists, but this command did not make it; name another folder")
    with replace_folder(folder) as beside:
        write_data(args, beside, encoder)
        write_json(beside / MADE_FROM, made_from)
    return folder


def run(args: argparse.Namespace) -> None:
    """Prepare the data, do the stages that are left, and tell how to go on."""
    # 1. Refuse what cannot work, and prepare the data.
    if parallel.launched():
        raise InputError("torchrun: this command runs its stages in one process; run the scripts themselves with it")
    for flag in ("data", "dev"):
        if path := getattr(args, flag):
            check_file(path, f"--{flag}", "a table with a header")
    check_writable(args.output, "--output")
    preset = RECIPES[args.recipe]._replace(max_seq_length=args.max_seq_length)
    preset = preset._replace(symmetric=(NAME,) if args.symmetric else ())
    encoder = open_encoder(args.bert_model, preset, "this command")
    from dse.experiments import stages
    from dse.storage.student_folder import check_replaceable, find_student

    output = Path(args.output)
    check_replaceable(output / STUDENT, "--output")
    data = prepare(args, encoder)
    name = str(data / TASK)
    work = Experiment(preset, get_task(name), args.seed, data, encoder, output, STAGES, name)
    work.check_settings("--output")

    # 2. Teacher, logits, student.
    for stage in work.left():
        stages.do_for_command(work, stage, "--output")
    best = stages.student_folder(work.folder, "dse")
    with replace_folder(output / STUDENT) as beside:
        shutil.copytree(find_student(best), beside, dirs_exist_ok=True)

    # 3. How well they do, and what comes next.
    print(f"\n{'on dev':<10}" + "".join(f"{metric:>16}" for metric in shown_metrics(work)))
    for stage, who in (("teacher", "teacher"), ("dse", "student")):
        values = work.record(stage)["metrics"]["dev"]
        shown = (show_number(values[metric]) if metric in values else "-" for metric in shown_metrics(work))
        print(f"{who:<10}" + "".join(f"{cell:>16}" for cell in shown))
    query = shlex.quote(" ".join(work.sets["dev"].first[0].split()))
    print(
        f"\nstudent: {output / STUDENT}\nthe best answers to a question, from the second texts of the pairs:\n\n"
        f"  echo {query} | python -m dse score --model {output / STUDENT} --queries - --top_k 3 "
        f"--candidates {data / CANDIDATES}"
    )


def shown_metrics(work: Experiment) -> list[str]:
    """The student's metrics on dev, but for those of thresholds that are not tuned."""
    found = work.record("dse")["metrics"]["dev"]
    return [metric for metric in found if f"tuned_{metric}" not in found]
