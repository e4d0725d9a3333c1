"""Check the paper's claims: teacher, DSE, controls and Sentence-BERT on several tasks and seeds, in one table.

    python -m dse reproduce --preset small --data_dir glue_data --bert_model M --output_dir results

Runs the scripts for each task and seed, and writes results.json and results.md to --output_dir; once all is done, plots
too, if matplotlib is installed. It skips what is done there and sound, so you can stop it and call it again.
"""

import argparse
from pathlib import Path

from dse import cli
from dse.commands import logger
from dse.data.tasks import TASKS, Task, get_task
from dse.experiments import reproduction, results
from dse.experiments.presets import PRESETS, STAGES, VARIANTS
from dse.experiments.reproduction import Experiment, Left, open_encoder
from dse.system import parallel
from dse.system.errors import InputError
from dse.system.files import check_writable
from dse.training.reporting import duration


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="small: hours on 2 cores; large: the paper's tasks")
    add("--data_dir", default="glue_data", help="folder with a folder for each task")
    add("--bert_model", default=cli.DEFAULT_BERT, help="pre-trained encoder: hub name or folder")
    add("--output_dir", default="results", help="folder for all that is made; a later call continues there")
    add("--tasks", type=lambda text: list(filter(None, text.split(","))),
        help="comma list, such as mrpc,sts-b, or JSON files beside their data; not given: the preset's")  # fmt: skip
    # not -1, a new seed each time: the same command must go on with it
    add("--seeds", type=cli.whole_number(0), nargs="+", help="seeds of every task; not given: the preset's")
    add("--variants", action="store_true", help="also train students that differ from DSE's in one setting")
    cli.add_call_flag(parser)


def chosen(args: argparse.Namespace) -> list[tuple[str, Task, int]]:
    """Each task, by its name or JSON file, with each of its seeds. Raises InputError for flags that make no sense."""
    preset = PRESETS[args.preset]
    names = list(preset.seeds) if args.tasks is None else args.tasks
    unknown = [name for name in names if name.lower() not in TASKS and not name.lower().endswith(".json")]
    if unknown or not names:
        raise InputError(f"--tasks: {', '.join(unknown) or 'none'} given; known: {', '.join(TASKS)}, or a JSON file")
    found = []
    for name, task in ((name, get_task(name)) for name in names):
        if task.text_b is None:
            raise InputError(f"--tasks: {task.name} has one sentence per row, and DSE scores pairs; leave it out")
        if task.train is None:
            raise InputError(f"--tasks: {task.name} has no training set; leave it out")
        if not (args.seeds or task.name in preset.seeds):
            raise InputError(f"--seeds: the preset {args.preset} has none for {task.name}; give some")
        found += [(name, task, seed) for seed in args.seeds or preset.seeds[task.name]]
    if len({(task.name, seed) for _, task, seed in found}) < len(found):
        raise InputError("--tasks, --seeds: one is given twice; the same run twice has no spread")
    called = dict(args.call)
    strangers = called.keys() - TASKS.keys()
    shown = {called.get(name, name.upper()) for name in TASKS}  # of all, since the folder may hold others
    if strangers or len(called) < len(args.call) or len(shown) < len(TASKS):
        raise InputError(f"--call: {', '.join(strangers) or 'a name'} is not a task, or is given twice")
    return found


def make_works(args: argparse.Namespace) -> list[Experiment]:
    """Every task with every seed. Raises InputError for what cannot work."""
    runs, preset = chosen(args), PRESETS[args.preset]
    encoder = open_encoder(args.bert_model, preset, f"the preset {args.preset}")
    left_out = set() if args.variants else set(VARIANTS)
    if not reproduction.has_sentence_transformers():
        left_out.add("sentence_bert")
        logger.warning("Sentence-BERT is left out; for its row, pip install sentence-transformers and run this again")
    works = []
    for name, task, seed in runs:
        data = Path(args.data_dir) / task.folder if task.name in TASKS else Path(name).parent
        stages, place = [stage for stage in STAGES if stage not in left_out], f"{task.name}_seed{seed}"
        works.append(Experiment(preset, task, seed, data, encoder, Path(args.output_dir, place), stages, name))
        works[-1].check_settings("--output_dir")
    return works


def run(args: argparse.Namespace) -> None:
    """Do the stages that are left, and write the tables after each."""
    # 1. Refuse what cannot work, and read the data, before any work.
    if parallel.launched():
        raise InputError("torchrun: this command runs its stages in one process; run the scripts themselves with it")
    output_dir = Path(args.output_dir)
    check_writable(output_dir, "--output_dir")
    works = make_works(args)
    from dse.experiments import stages

    if not results.can_plot():
        logger.warning("no plots; for them, pip install matplotlib and run this again")

    # 2. What is left, stage by stage; the results so far after each.
    def write(left: Left) -> tuple[dict[str, list[str]], bool]:
        about = {"command": args.command, "preset": args.preset}
        found = results.collect(output_dir, works, left, dict(args.call), about)
        return found["missing"], results.write_results(found, output_dir)

    every = [(work, stage) for work in works for stage in work.stages]
    left = [(work, stage) for work in works for stage in work.left()]
    for work, stage in every:
        if (work, stage) not in left:
            stages.tidy(work, stage)  # in case a kill came before it
    for done, (work, stage) in enumerate(left):
        if stage not in work.left():  # what it was made from was made again, to the same bits
            continue
        time = duration(reproduction.seconds_left(works, left[done:]))
        logger.info("%d of %d stages left, about %s; now: %s of %s with seed %d",
                    len(left) - done, len(every), time, stage, work.task.name, work.seed)  # fmt: skip
        stages.do_for_command(work, stage, "--output_dir")
        write(left[done + 1 :])

    # 3. The tables.
    missing, drawn = write([])
    print(f"\n{(output_dir / 'results.md').read_text(encoding='utf-8')}")
    for name, lacking in missing.items():
        logger.warning("not complete: %s lacks %s; the command with its --tasks and --seeds continues there",
                       output_dir / name, ", ".join(lacking))  # fmt: skip
    logger.info("results.json, results.md%s in %s", " and plots" if drawn else "", output_dir)
