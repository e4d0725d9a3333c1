"""Measure training, inference or features on given data and model, beside padding and the matrix product's peak.

    python -m dse benchmark training --task_name mrpc --data_dir glue_data/MRPC --bert_model MODEL --do_lower_case

Prints a table; `--output FILE` writes JSON.
"""

import argparse
import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dse import cli
from dse.config import DSEConfig, check_fits_bert
from dse.files import check_writable, write_text
from dse.pretrained import bert_config, find_bert, load_tokenizer
from dse.processors import Examples, check_sentence_pairs, get_task, read_examples

PROG = "python -m dse benchmark"
PADDINGS = {"max": "padded to max_seq_length", "batch": "padded to the batch", "packed": "packed (ours)"}
logger = logging.getLogger("dse.benchmark")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROG, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=("training", "inference", "features"), help="what to measure")
    add("--task_name", required=True, help="GLUE task, or a JSON file that describes your own")
    add("--data_dir", required=True, help="folder of the task's files")
    add("--output", default="", help="JSON file for the results")
    add(
        "--batch_size",
        type=cli.whole_number(1),
        default=16,
        help="pairs per training step, sentences of padded inference",
    )
    add("--gradient_accumulation_steps", type=cli.whole_number(1), default=2, help="batches per update")
    add("--steps", type=cli.whole_number(2), default=8, help="batches per measurement, the same for every variant")
    add("--rounds", type=cli.whole_number(1), default=3, help="measurements of each variant, which take turns")
    add("--random_seed", type=cli.seed, default=42, help="of the batches")
    add("--pairs", type=cli.whole_number(1), default=1000, help="of the training file, for inference")
    cli.add_architecture_flags(parser)
    return parser.parse_args(argv)


def report(title: str, results: dict[str, dict[str, float]], rates: dict[str, float], peak: float) -> dict[str, Any]:
    """Print one table of useful rates; what the JSON says of it."""
    print(f"\n{title:<28}{'useful GFLOP/s':>16}{'of the peak':>13}{'ours is':>9}{'peak memory':>14}")
    for name, rate in rates.items():
        ratio = f"{rates['packed'] / rate:.2f}x"
        memory = f"{results[name]['peak_memory_mib']:,.0f} MiB"
        print(f"{PADDINGS[name]:<28}{rate:>16.1f}{rate / peak:>13.0%}{ratio:>9}{memory:>14}")
    print(f"{'matrix products alone':<28}{peak:>16.1f}")
    return {
        "ratio_to_fixed_padding": rates["packed"] / rates["max"],
        "ratio_to_batch_padding": rates["packed"] / rates["batch"],
        "fraction_of_matmul_peak": rates["packed"] / peak,
        "matmul_peak_gflops": peak,
        "useful_gflops": rates,
        "peak_memory_mib": {name: result["peak_memory_mib"] for name, result in results.items()},
    }


def training(args: argparse.Namespace, given: SimpleNamespace) -> dict[str, Any]:
    """Student and teacher: whole steps, from token ids to the update."""
    import torch

    from dse.distillation import distillation_targets, student_loss, teacher_loss
    from dse.features import joint_features, separate_features
    from dse.models import load_teacher, new_student, teacher_logits

    task, config = given.task, DSEConfig.from_flags(args, given.bert)
    separate, joint = (
        make(task, given.examples, given.tokenizer, args.max_seq_length) for make in (separate_features, joint_features)
    )
    labels = torch.from_numpy(separate.labels)
    targets = distillation_targets(task.kind, torch.zeros(len(labels), task.num_logits))
    student, teacher = new_student(given.folder, config), load_teacher(given.folder, task, fine_tuned=False)
    roles = {
        "student": (
            student, student.dse_model.bert.bert, separate, separate.texts.lengths[separate.first]
            + separate.texts.lengths[separate.second], lambda inputs: student(**inputs),
            lambda outputs, rows: student_loss(task.kind, outputs, labels[rows], targets[rows], 0.5),
        ),
        "teacher": (
            teacher, teacher.bert, joint, joint.costs, lambda inputs: teacher_logits(teacher, inputs),
            lambda logits, rows: teacher_loss(task.kind, logits, labels[rows]),
        ),
    }  # fmt: skip
    results = {role: train_role(args, given, role, *parts) for role, parts in roles.items()}
    if importlib.util.find_spec("sentence_transformers"):
        results["student"] |= train_sentence_transformer(args, given, separate, results["student"])
    return results


def train_role(
    args: argparse.Namespace, given: SimpleNamespace, role: str, model: Any, bert: Any, features: Any, tokens: Any,
    forward: Any, loss: Any,
) -> dict[str, Any]:  # fmt: skip
    import torch

    from dse.benchmarks import matmul_peak, random_batches, take_turns, useful_gflops
    from dse.features import in_batches
    from dse.optimization import make_optimizer
    from dse.trainer import Trainer

    trainer = Trainer(
        model, forward, loss, lambda outputs, labels: {}, features, make_optimizer(model, 1e-9, 10**6, 0.1),
        batch_size=args.batch_size, accumulation_steps=args.gradient_accumulation_steps, seed=args.random_seed,
        device=torch.device("cpu"),
    )  # fmt: skip
    batches = random_batches(len(features), args.batch_size, args.steps, args.random_seed)
    features.max_seq_length = args.max_seq_length

    def steps_with(padding: str) -> Any:
        def run() -> None:
            features.padding = padding
            model.train()
            for group in in_batches(batches, args.gradient_accumulation_steps):
                for rows in group:
                    trainer.backward(rows, len(group))
                trainer.update()

        return run

    count = sum(int(tokens[rows].sum()) for rows in batches)
    logger.info("%s: %d batches of %d pairs, %d tokens each", role, len(batches), args.batch_size, count / len(batches))
    per_step = round(count / len(batches))
    variants = {padding: steps_with(padding) for padding in PADDINGS}
    results, peak = take_turns(variants, args.rounds, lambda: matmul_peak(given.bert, per_step, training=True))
    rates = {name: useful_gflops(bert.encoder, count, result["seconds"], True) for name, result in results.items()}
    seconds = {padding: result["seconds"] / len(batches) for padding, result in results.items()}
    return {
        **report(f"{role} training", results, rates, peak),
        "seconds_per_step": seconds,
        "tokens_per_step": count / len(batches),
    }


def train_sentence_transformer(
    args: argparse.Namespace, given: SimpleNamespace, features: Any, ours: dict[str, Any]
) -> dict[str, Any]:
    import torch

    from dse.benchmarks import random_batches, sentence_transformer, sentence_transformer_steps, take_turns

    batches = random_batches(len(features), args.batch_size, args.steps, args.random_seed)
    first, second = given.examples.first, given.examples.second
    scores = torch.from_numpy(features.labels).float() / max(1, int(features.labels.max()))
    pairs = [([first[i] for i in rows], [second[i] for i in rows], scores[rows]) for rows in batches]
    model = sentence_transformer(given.folder, args.max_seq_length)
    steps = sentence_transformer_steps(model, pairs, args.gradient_accumulation_steps)
    seconds = take_turns({"theirs": steps}, args.rounds)[0]["theirs"]["seconds"] / len(batches)
    ratio = seconds / ours["seconds_per_step"]["packed"]
    print(f"{'sentence-transformers':<28}{'':>16}{'':>13}{ratio:>8.2f}x")
    return {"ratio_to_sentence_transformers": ratio}


def inference(args: argparse.Namespace, given: SimpleNamespace) -> dict[str, Any]:
    """Embeddings of the distinct sentences of the first pairs; padding to max_seq_length is measured on a part."""
    import numpy as np
    import torch

    from dse.benchmarks import matmul_peak, take_turns, useful_gflops
    from dse.evaluation import TOKENS_PER_STEP, embed_texts
    from dse.features import in_batches, separate_features
    from dse.models import new_student

    first, second = (side[: args.pairs] for side in (given.examples.first, given.examples.second))
    features = separate_features(given.task, Examples(first, second), given.tokenizer, args.max_seq_length)
    features.max_seq_length = args.max_seq_length
    model = new_student(given.folder, DSEConfig.from_flags(args, given.bert)).eval()
    lengths, cpu = features.texts.lengths, torch.device("cpu")
    in_file_order = in_batches(np.arange(len(lengths)), args.batch_size)
    part = in_file_order[:: max(1, len(in_file_order) // (4 * args.steps))]

    def padded_with(padding: str, batches: list[Any]) -> Any:
        def run() -> None:
            features.padding = padding
            with torch.inference_mode():
                for texts in batches:
                    model.embed(**features.text_batch(texts))

        return run

    def packed() -> None:
        features.padding = "packed"
        embed_texts(model, features, 10**6, cpu, "encode")

    variants = {"max": padded_with("max", part), "batch": padded_with("batch", in_file_order), "packed": packed}
    if importlib.util.find_spec("sentence_transformers"):
        from dse.benchmarks import sentence_transformer

        theirs = sentence_transformer(given.folder, args.max_seq_length)
        texts = list(dict.fromkeys([*first, *second]))
        variants["theirs"] = lambda: theirs.encode(texts, batch_size=32, show_progress_bar=False)
    results, peak = take_turns(
        variants, args.rounds, lambda: matmul_peak(given.bert, TOKENS_PER_STEP["cpu"], training=False)
    )
    of_theirs = results.pop("theirs", None)
    tokens = {"max": sum(int(lengths[texts].sum()) for texts in part), "batch": lengths.sum(), "packed": lengths.sum()}
    encoder = model.dse_model.bert.bert.encoder
    rates = {name: useful_gflops(encoder, int(tokens[name]), results[name]["seconds"], False) for name in results}
    numbers = report("inference", results, rates, peak)
    if of_theirs is not None:
        numbers["ratio_to_sentence_transformers"] = of_theirs["seconds"] / results["packed"]["seconds"]
        print(f"{'sentence-transformers':<28}{'':>16}{'':>13}{numbers['ratio_to_sentence_transformers']:>8.2f}x")
    return numbers


def features(args: argparse.Namespace, given: SimpleNamespace) -> dict[str, Any]:
    """From the data's files to token ids: texts a second, memory, and how long a first and a second start take."""
    from dse.benchmarks import forget_peak_memory, peak_memory
    from dse.features import cached_features

    numbers: dict[str, Any] = {}
    print(f"\n{'features':<28}{'read, s':>10}{'token ids, s':>14}{'texts a second':>16}{'memory above':>16}")
    with tempfile.TemporaryDirectory() as folder:
        for start in ("first", "second"):
            forget_peak_memory()
            before, started = peak_memory(), time.perf_counter()
            examples = read_examples(given.task, args.data_dir, "train")
            read = time.perf_counter()
            made = cached_features(
                "separate", given.task, examples, given.tokenizer, args.max_seq_length, Path(folder) / "f", True
            )
            ended, memory, texts = time.perf_counter(), peak_memory() - before, len(made.texts.offsets) - 1
            rate = texts / (ended - read)
            print(
                f"{start + ' start':<28}{read - started:>10.2f}{ended - read:>14.2f}{rate:>16,.0f}{memory:>12,.0f} MiB"
            )
            numbers |= {f"{start}_start_seconds": ended - started, f"{start}_start_memory_mib": memory}
            numbers.setdefault("texts_per_second", rate)  # of the first start
            del examples, made
    return {**numbers, "pairs": given.pairs, "texts": texts}


def run(args: argparse.Namespace) -> None:
    # 1. Refuse what cannot work.
    task = get_task(args.task_name)
    check_sentence_pairs(task)
    if args.output:
        check_writable(Path(args.output).parent, "--output")
    cli.set_up_logging()
    folder = find_bert(args.bert_model, "--bert_model")
    bert = bert_config(folder, "--bert_model")
    check_fits_bert(bert, args.max_seq_length, args.pooler_num_top_hidden_layers)
    tokenizer = load_tokenizer(folder, args.do_lower_case, "--bert_model")
    examples = read_examples(task, args.data_dir, "train")
    given = SimpleNamespace(task=task, examples=examples, folder=folder, bert=bert, tokenizer=tokenizer)
    given.pairs = len(examples)
    if args.what == "features":  # which reads for itself
        del examples, given.examples

    # 2. Measure and tell.
    import torch

    device = cli.select_device(True, 0)
    cli.seed_everything(args.random_seed)
    logger.info("%s of %s on %s, torch %s", args.what, task.name, cli.describe_device(device), torch.__version__)
    numbers = {"training": training, "inference": inference, "features": features}[args.what](args, given)
    if args.output:
        settings = {"threads": torch.get_num_threads(), "torch": torch.__version__, **vars(args)}
        write_text(args.output, json.dumps({**numbers, "settings": settings}, indent=2) + "\n")
        logger.info("written to %s", args.output)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; exits with code 2 and one line when the input cannot be used."""
    with cli.clear_errors(PROG):
        run(parse_arguments(argv))
