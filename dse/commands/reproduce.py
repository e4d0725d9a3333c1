"""Check the paper's claims: teacher, DSE, controls and Sentence-BERT on several tasks and seeds, in one table.

    python -m dse reproduce --preset small --data_dir glue_data --bert_model M --output_dir results

Runs the scripts for each task and seed and writes results.json, results.md and, once all in them is done and where
matplotlib is installed, plots to --output_dir. What is done there and sound is skipped, so it can be stopped and called
again.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dse import cli
from dse.data.tasks import TASKS, Task, get_task
from dse.data.tokenizers import load_tokenizer, saved_casing, tokenizer_key
from dse.experiments import reproduction
from dse.experiments.reproduction import PRESETS, STAGES, Encoder, Experiment, seconds_left
from dse.experiments.results import can_plot, collect, write_results
from dse.networks.config import check_fits_bert
from dse.networks.pretrained import bert_config, bert_hashes, find_bert
from dse.system import parallel, signals
from dse.system.errors import InputError, RunError
from dse.system.files import check_writable
from dse.training.reporting import duration

PROG = "python -m dse reproduce"
GOES_ON = "the same command goes on with what is left"
logger = logging.getLogger("dse.reproduce")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; exits with code 2 and one line for those that cannot be."""
    parser = cli.Parser(prog=PROG, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--preset", choices=("small", "large"), default="small", help="small: hours on 2 cores; large: the paper's")
    add("--data_dir", default="glue_data", help="folder with a folder for each task")
    add("--bert_model", default=cli.DEFAULT_BERT, help="pre-trained encoder: hub name or folder")
    add("--output_dir", default="results", help="where everything goes, and is found again")
    add("--tasks", type=comma_list, help="e.g. mrpc,sts-b; not given: the preset's")
    add("--seeds", type=fixed_seed, nargs="+", help="for every task; not given: the preset's")
    cli.add_call_flag(parser)
    return parser.parse_args(argv)


def comma_list(text: str) -> list[str]:
    """A flag's type: words with commas between them."""
    return [word for word in text.split(",") if word]


def fixed_seed(text: str) -> int:
    """A flag's type: a seed that torch takes; not -1, since the same command must go on with it."""
    number = cli.seed(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def chosen(args: argparse.Namespace) -> list[tuple[Task, int]]:
    """Each task with each of its seeds. Raises InputError for what cannot be meant."""
    preset = PRESETS[args.preset]
    names = list(preset.seeds) if args.tasks is None else args.tasks
    unknown = [name for name in names if name.lower() not in TASKS]
    if unknown or not names:
        raise InputError(f"--tasks: {', '.join(unknown) or 'none'} given; known: {', '.join(TASKS)}")
    found = []
    for task in (get_task(name) for name in names):
        if task.text_b is None:
            raise InputError(f"--tasks: {task.name} has one sentence per row, and DSE scores pairs; leave it out")
        if task.train is None:
            raise InputError(f"--tasks: {task.name} has no training set; leave it out")
        if not (args.seeds or task.name in preset.seeds):
            raise InputError(f"--seeds: the preset {args.preset} has none for {task.name}; give some")
        found += [(task, seed) for seed in args.seeds or preset.seeds[task.name]]
    if len(set(found)) < len(found):
        raise InputError("--tasks, --seeds: one is given twice; the same run twice has no spread")
    called = [name for name, _ in args.call]
    strangers = set(called) - set(TASKS)
    shown = {dict(args.call).get(name, name.upper()) for name in TASKS}  # of all, since the folder may hold others
    if strangers or len(set(called)) < len(called) or len(shown) < len(TASKS):
        raise InputError(f"--call: {', '.join(strangers) or 'a name'} is no task, or stands there twice")
    return found


def make_works(args: argparse.Namespace) -> list[Experiment]:
    """Every task with every seed, refusing what cannot work."""
    pairs, preset = chosen(args), PRESETS[args.preset]
    folder = find_bert(args.bert_model, "--bert_model")
    bert = bert_config(folder, "--bert_model")
    try:
        check_fits_bert(bert, reproduction.MAX_SEQ_LENGTH, preset.top_layers)
    except InputError as error:
        needs = f"{reproduction.MAX_SEQ_LENGTH} positions and {preset.top_layers} layers"
        raise InputError(f"--bert_model: {folder} has less than the preset {args.preset} needs, {needs}") from error
    lower_case = saved_casing(folder, "--bert_model") is not False
    tokenizer = load_tokenizer(folder, lower_case, "--bert_model")
    encoder = Encoder(folder.resolve(), {**bert_hashes(folder), "tokenizer": tokenizer_key(tokenizer)}, lower_case)
    stages = list(STAGES)
    if not reproduction.has_sentence_transformers():
        stages.remove("sentence_bert")
        logger.warning("Sentence-BERT is left out: pip install sentence-transformers, and call this again, for its row")
    works = []
    for task, seed in pairs:
        place = Path(args.output_dir) / f"{task.name}_seed{seed}"
        works.append(Experiment(preset, task, seed, Path(args.data_dir) / task.folder, encoder, place, stages))
    for work in works:
        work.check_settings()
    return works


def run(args: argparse.Namespace, command: str) -> None:
    """Do the stages that are left; `command` is the line that was typed, for the tables."""
    # 1. Refuse what cannot work, and read the data, before any work.
    if parallel.launched():
        raise InputError("torchrun: this command runs its stages in one process; run the scripts themselves with it")
    check_writable(args.output_dir, "--output_dir")
    cli.set_up_logging()
    works = make_works(args)
    if not can_plot():
        logger.warning("no plots: pip install matplotlib, and call this again, for them")

    # 2. What is left, stage by stage; the results so far after each.
    def write(left: list[tuple[Experiment, str]]) -> tuple[dict[str, list[str]], bool]:
        about = {"command": command, "preset": args.preset}
        results = collect(Path(args.output_dir), works, left, dict(args.call), about)
        return results["missing"], write_results(results, Path(args.output_dir))

    left = [(work, stage) for work in works for stage in work.left()]
    for work in works:
        for stage in set(work.stages) - {stage for other, stage in left if other is work}:
            work.tidy(stage)  # where a kill came before it
    for done, (work, stage) in enumerate(left):
        if stage not in work.left():  # what it was made from was made again, to the same bits
            continue
        logger.info(
            "%d of %d stages left, about %s; now: %s of %s with seed %d",
            len(left) - done, sum(len(work.stages) for work in works), duration(seconds_left(works, left[done:])),
            stage, work.task.name, work.seed,
        )  # fmt: skip
        do(work, stage)
        write(left[done + 1 :])

    # 3. The tables.
    missing, drawn = write([])
    print(f"\n{(Path(args.output_dir) / 'results.md').read_text(encoding='utf-8')}")
    for name, stages in missing.items():
        logger.warning("not complete: %s lacks %s; the command with its --tasks and --seeds goes on with it",
                       Path(args.output_dir) / name, ", ".join(stages))  # fmt: skip
    logger.info("results.json, results.md%s in %s", " and plots" if drawn else "", args.output_dir)


def do(work: Experiment, stage: str) -> None:
    """Do a stage; what ends it early is told in this command's terms, since a script's advice names its own flags."""
    place = work.folder / stage
    try:
        work.do(stage)
    except signals.Stopped as stop:
        stop.advice = f"{place} is not done: {GOES_ON}"
        raise
    except InputError as error:
        mend = "move it away, and it begins anew, or name another --output_dir"
        raise InputError(f"--output_dir: {place} cannot be made ({error}); {mend}") from error
    except RunError as error:
        raise RunError(f"{place} is not done ({error}): {GOES_ON}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; exits with code 2 and one line when the input cannot be used."""
    with cli.clear_errors(PROG):
        run(parse_arguments(argv), shlex.join([*PROG.split(), *(sys.argv[2:] if argv is None else argv)]))
