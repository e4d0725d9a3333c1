"""Check the paper's claims: teacher, DSE, controls and Sentence-BERT on several tasks and seeds, in one table.

    python -m dse reproduce --preset small --data_dir glue_data --bert_model M --output_dir results

Runs the scripts for each task and seed and writes results.json, results.md and, where matplotlib is installed, plots to
--output_dir. What is done there and sound is skipped, so it can be stopped and called again.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dse import cli, parallel, stopping
from dse.config import check_fits_bert
from dse.files import InputError, check_writable, sha256_file
from dse.pretrained import bert_config, find_bert, load_tokenizer, saved_casing, weight_files
from dse.processors import check_sentence_pairs, get_task
from dse.reporting import duration

if TYPE_CHECKING:
    from dse.reproduction import Work

PROG = "python -m dse reproduce"
GOES_ON = "the same command goes on with what is left"
logger = logging.getLogger("dse.reproduce")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROG, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=("small", "large"), default="small", help="small: hours on 2 cores; large: the paper's")
    add("--data_dir", default="glue_data", help="folder with a folder for each task")
    add("--bert_model", default=cli.DEFAULT_BERT, help="pre-trained encoder: hub name or folder")
    add("--output_dir", default="results", help="where everything goes, and is found again")
    add("--tasks", type=comma_list, help="e.g. mrpc,sts-b; not given: the preset's")
    add("--seeds", type=cli.whole_number(0), nargs="+", help="for every task; not given: the preset's")
    cli.add_call_flag(parser)
    return parser.parse_args(argv)


def comma_list(text: str) -> list[str]:
    """A flag's type: words with commas between them."""
    return [word for word in text.split(",") if word]


def make_works(args: argparse.Namespace) -> "list[Work]":
    """Every task with every seed, refusing what cannot work."""
    from dse.reproduction import MAX_SEQ_LENGTH, PRESETS, Work

    preset = PRESETS[args.preset]
    bert = find_bert(args.bert_model, "--bert_model")
    check_fits_bert(bert_config(bert, "--bert_model"), MAX_SEQ_LENGTH, preset.top_layers)
    lower_case = saved_casing(bert, "--bert_model") is not False
    load_tokenizer(bert, lower_case, "--bert_model")
    hashes = {path.name: sha256_file(path) for path in weight_files(bert)}
    works = []
    for task in [get_task(name) for name in args.tasks or preset.seeds]:
        check_sentence_pairs(task)
        seeds = args.seeds or preset.seeds.get(task.name)
        if not seeds:
            raise InputError(f"--seeds: the preset {args.preset} has none for {task.name}; give some")
        data_dir = Path(args.data_dir) / task.folder
        for seed in seeds:
            folder = Path(args.output_dir) / f"{task.name}_seed{seed}"
            works.append(Work(preset, task, seed, data_dir, bert, hashes, lower_case, folder))
    for work in works:
        work.check_settings()
    return works


def run(args: argparse.Namespace, command: str) -> None:
    # 1. Refuse what cannot work, and read the data, before any work.
    if parallel.launched():
        raise InputError("torchrun: this command runs its stages in one process; run the scripts themselves with it")
    check_writable(args.output_dir, "--output_dir")
    cli.set_up_logging()
    works = make_works(args)
    from dse.reproduction import has_sentence_transformers, seconds_left
    from dse.results import can_plot, collect, write_results

    if not has_sentence_transformers():
        logger.warning("no row for Sentence-BERT: pip install sentence-transformers, and call this again, for it")
    if not can_plot():
        logger.warning("no plots: pip install matplotlib, and call this again, for them")

    # 2. What is left, stage by stage; the results so far after each.
    def write(complete: bool) -> None:
        about = {"complete": complete, "command": command, "preset": args.preset}
        write_results(collect(works, dict(args.call), about), Path(args.output_dir))

    left = [(work, stage) for work in works for stage in work.left()]
    for done, (work, stage) in enumerate(left):
        if stage not in work.left():  # what it was made from was made again, to the same bits
            continue
        logger.info(
            "%d of %d stages left, about %s; now: %s of %s with seed %d",
            len(left) - done, sum(len(work.stages) for work in works), duration(seconds_left(works, left[done:])),
            stage, work.task.name, work.seed,
        )  # fmt: skip
        do(work, stage)
        write(complete=done + 1 == len(left))

    # 3. The tables.
    write(complete=True)
    print(f"\n{(Path(args.output_dir) / 'results.md').read_text(encoding='utf-8')}")
    logger.info("results.json, results.md%s in %s", " and plots" if can_plot() else "", args.output_dir)


def do(work: "Work", stage: str) -> None:
    """Do a stage; a script that ends early has said why."""
    try:
        with stopping.advice(GOES_ON):
            work.do(stage)
    except SystemExit:
        print(f"{PROG}: {work.folder / stage} is not done: {GOES_ON}", file=sys.stderr)
        raise


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; exits with code 2 and one line when the input cannot be used."""
    with cli.clear_errors(PROG):
        run(parse_arguments(argv), shlex.join([*PROG.split(), *(sys.argv[2:] if argv is None else argv)]))
