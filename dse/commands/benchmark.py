"""Measure training, inference, features or scoring beside other ways to do the same, in one run.

    python -m dse benchmark training --task_name mrpc --data_dir glue_data/MRPC --bert_model MODEL --do_lower_case

Prints a Markdown table; `--output FILE` writes JSON.
"""

import argparse

from dse import cli
from dse.commands import logger
from dse.data.tasks import check_sentence_pairs, get_task
from dse.networks.pretrained import open_bert
from dse.system.device import describe_device, machine, seed_everything, select_device
from dse.system.errors import InputError
from dse.system.files import check_output_file, utc_stamp, write_json
from dse.training.reporting import check_can_plot


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    add("what", choices=("training", "inference", "features", "scoring"), help="what to measure")
    cli.add_task_flags(parser)
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where training, inference and scoring are measured")
    cli.add_precision_flag(parser)
    add("--output", default="", help="JSON file for the numbers and the settings")
    add("--batch_size", type=cli.whole_number(1), default=16, help="pairs per step; of padded inference, sentences")
    add("--gradient_accumulation_steps", type=cli.whole_number(1), default=2, help="batches per update")
    add("--steps", type=cli.whole_number(2), default=8, help="batches per measurement, the same for every way")
    add("--rounds", type=cli.whole_number(1), default=3, help="measurements of each way; the ways take turns")
    add("--random_seed", type=cli.seed, default=42, help="seed of the order of the pairs")
    add("--model", default="", help="scoring: a student's folder; empty: an untrained student")
    add("--candidates", type=cli.whole_number(1), nargs="+", default=[1000, 10_000, 100_000],
        help="scoring: numbers of candidates")  # fmt: skip
    add("--plot", default="", help="scoring: PNG file for a plot of seconds by candidates (needs matplotlib)")
    add("--pairs", type=cli.whole_number(1), default=1000, help="inference: pairs, from the start of the training file")
    cli.add_architecture_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for, print it, and write it to --output."""
    task = get_task(args.task_name)
    check_sentence_pairs(task)
    if args.what == "features" and (args.device, args.precision) != ("cpu", None):
        raise InputError("--device, --precision: token ids are made on the CPU, from text; leave these flags out")
    if args.output:
        check_output_file(args.output, "--output")
    if args.plot:
        check_can_plot("--plot")
        check_output_file(args.plot, "--plot", [args.output] if args.output else [])
    layers = args.pooler_num_top_hidden_layers
    bert = open_bert(args.bert_model, "--bert_model", args.do_lower_case, args.max_seq_length, layers)
    import torch

    from dse.experiments import benchmarks, benchmarks_scoring

    measure, table = {
        "training": (benchmarks.training, benchmarks.rates_table),
        "inference": (benchmarks.inference, benchmarks.rates_table),
        "features": (benchmarks.features, benchmarks.features_table),
        "scoring": (benchmarks_scoring.scoring, benchmarks_scoring.scoring_table),
    }[args.what]
    args.precision = cli.precision_of(args)
    device = select_device(args.device == "cpu", 0, args.precision)
    if device.type != args.device:
        raise InputError("--device cuda: torch finds no GPU that it can use; leave it out to measure the CPU")
    seed_everything(args.random_seed)
    logger.info(
        "%s of %s on %s, torch %s", args.what, task.name, describe_device(device, args.precision), torch.__version__
    )
    found = {**measure(args, task, bert), "settings": {**vars(args), "finished": utc_stamp(), "machine": machine()}}
    print(f"\n{table(found)}")
    if args.output:
        write_json(args.output, found)
        logger.info("written to %s", args.output)
