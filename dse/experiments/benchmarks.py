"""Measuring side by side: the same work laid out in several ways, beside the machine's own matrix products.

Variants take turns, round after round, and each one's fastest round counts, so other work on the machine hits all of
them alike. Useful work is that of real tokens in the encoder's layers, not what is computed on padding:

    FLOP = 2 x parameters of the layers x tokens, and in training 3 times that (forward, and two products backward)
"""

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dse.data.features import cached_features, in_batches, joint_features, separate_features
from dse.data.processors import Examples, read_examples
from dse.data.tasks import Task
from dse.experiments.baselines import sentence_transformer
from dse.experiments.reproduction import has_sentence_transformers
from dse.networks.batches import Batches
from dse.networks.config import DSEConfig
from dse.networks.inference import TOKENS_PER_STEP, embed_texts
from dse.networks.student import new_network
from dse.networks.teacher import load_teacher
from dse.system.libc import forget_peak_memory, peak_memory
from dse.training.epoch_plan import EpochPlan, epoch_order
from dse.training.kinds import kind_of
from dse.training.optimization import make_optimizer
from dse.training.trainer import Trainer

logger = logging.getLogger(__name__)

PEAK_REPEATS = 5
_PEAK_SECONDS = 0.02  # of one repeat, at least
PADDINGS = {"max": "padded to max_seq_length", "batch": "padded to the batch", "packed": "packed (ours)"}


@dataclass
class Given:
    """What is measured: a task's data and a BERT."""

    task: Task
    folder: Path  # of the BERT
    bert: dict[str, Any]  # its configuration
    tokenizer: Any


def take_turns(
    variants: dict[str, Callable[[], object]], rounds: int, peak: Callable[[], float] = lambda: 0.0
) -> tuple[dict[str, float], dict[str, float], float]:
    """Fastest seconds and peak memory (MiB, of the process) of each variant, and the highest value of `peak`, which
    takes its turns with them.

    Each variant first runs once unmeasured. A quick one runs up to five times a round, about as long as the slowest, so
    that each has the same chance of a quiet moment.
    """
    once = {name: _seconds(run) for name, run in variants.items()}
    repeats = {name: min(5, max(1, round(max(once.values()) / seconds))) for name, seconds in once.items()}
    fastest, memory, highest = dict.fromkeys(variants, float("inf")), dict.fromkeys(variants, 0.0), 0.0
    for _ in range(rounds):
        highest = max(highest, peak())
        for name, run in variants.items():
            forget_peak_memory()
            fastest[name] = min(fastest[name], *(_seconds(run) for _ in range(repeats[name])))
            memory[name] = max(memory[name], peak_memory())
    return fastest, memory, highest


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def useful_gflop(encoder: nn.Module, tokens: int, training: bool) -> float:
    """The useful work of the encoder's layers on `tokens` tokens, GFLOP."""
    return (6 if training else 2) * sum(parameter.numel() for parameter in encoder.parameters()) * tokens / 1e9


def matmul_peak(bert: dict[str, Any], tokens: int, training: bool) -> float:
    """GFLOP a second of a layer's matrix products alone, at `tokens` rows: forward and, in training, backward.

    The best of five of each product, weighted by the time that it takes in a layer.
    """
    hidden, inner = bert["hidden_size"], bert["intermediate_size"]
    seconds = flops = 0.0
    for count, width, out in ((4, hidden, hidden), (1, hidden, inner), (1, inner, hidden)):
        inputs, weight, gradient = torch.randn(tokens, width), torch.randn(out, width), torch.randn(tokens, out)
        products = [(inputs, weight.t())]
        if training:
            products += [(gradient, weight), (gradient.t(), inputs)]
        seconds += count * sum(_product_seconds(a, b) for a, b in products)
        flops += count * len(products) * 2 * tokens * width * out
    return flops / seconds / 1e9


def _product_seconds(a: Tensor, b: Tensor) -> float:
    torch.mm(a, b)
    started = time.perf_counter()
    torch.mm(a, b)
    calls = max(1, round(_PEAK_SECONDS / (time.perf_counter() - started)))
    best = float("inf")
    for _ in range(PEAK_REPEATS):
        started = time.perf_counter()
        for _ in range(calls):
            torch.mm(a, b)
        best = min(best, (time.perf_counter() - started) / calls)
    return best


def report(
    title: str, seconds: dict[str, float], memory: dict[str, float], peak: float, gflop: dict[str, float]
) -> dict[str, Any]:
    """Print one table of useful rates, and return what the JSON says of it.

    Args:
        seconds, memory, peak: of `take_turns`, by padding, with "theirs" if sentence-transformers is measured too.
        gflop: useful work, by padding.
    """
    rates, beside = {name: work / seconds[name] for name, work in gflop.items()}, {}
    print(f"\n{title:<28}{'useful GFLOP/s':>16}{'of the peak':>13}{'ours is':>9}{'peak memory':>14}")
    for name, rate in rates.items():
        ratio, used = f"{rates['packed'] / rate:.2f}x", f"{memory[name]:,.0f} MiB"
        print(f"{PADDINGS[name]:<28}{rate:>16.1f}{rate / peak:>13.0%}{ratio:>9}{used:>14}")
    if "theirs" in seconds:
        beside["ratio_to_sentence_transformers"] = seconds["theirs"] / seconds["packed"]
        print(f"{'sentence-transformers':<28}{'':>16}{'':>13}{beside['ratio_to_sentence_transformers']:>8.2f}x")
    print(f"{'matrix products alone':<28}{peak:>16.1f}")
    return {
        **beside,
        "ratio_to_fixed_padding": rates["packed"] / rates["max"],
        "ratio_to_batch_padding": rates["packed"] / rates["batch"],
        "fraction_of_matmul_peak": rates["packed"] / peak,
        "matmul_peak_gflops": peak,
        "useful_gflops": rates,
        "peak_memory_mib": {name: memory[name] for name in gflop},
    }


def training(args: argparse.Namespace, given: Given) -> dict[str, Any]:
    """Student and teacher: whole steps, from token ids to the update."""
    task, config = given.task, DSEConfig.from_flags(args, given.bert)
    examples = read_examples(task, args.data_dir, "train")
    separate, joint = (
        make(task, examples, given.tokenizer, args.max_seq_length) for make in (separate_features, joint_features)
    )
    labels = torch.from_numpy(separate.labels)
    targets = kind_of(task).targets(torch.zeros(len(labels), task.num_logits))
    student, teacher = new_network(given.folder, config), load_teacher(given.folder, task, fine_tuned=False)
    roles = {
        "student": (
            student, student.encoder, separate, separate.texts.lengths[separate.first]
            + separate.texts.lengths[separate.second],
            lambda outputs, labels, rows: kind_of(task).student_loss(outputs, labels, targets[rows], 0.5),
        ),
        "teacher": (
            teacher, teacher.bert, joint, joint.costs,
            lambda logits, labels, rows: kind_of(task).teacher_loss(logits, labels),
        ),
    }  # fmt: skip
    others = {"student": their_training(args, given, examples)} if has_sentence_transformers() else {}
    return {role: train_role(args, given, role, *parts, others.get(role)) for role, parts in roles.items()}


def first_batches(args: argparse.Namespace, pairs: int) -> list[np.ndarray]:
    """The batches with which a training with this seed begins."""
    return in_batches(epoch_order(pairs, args.random_seed, 0), args.batch_size)[: args.steps]


def train_role(
    args: argparse.Namespace, given: Given, role: str, model: Any, bert: Any, features: Any, tokens: Any,
    loss: Any, theirs: Callable[[], None] | None,
) -> dict[str, Any]:  # fmt: skip
    """Time a student's or teacher's training on the Trainer's own batches with each padding, and `theirs`."""
    plan = EpochPlan(
        Batches(features, "packed", args.max_seq_length), args.batch_size, args.gradient_accumulation_steps,
        args.random_seed,
    )  # fmt: skip
    trainer = Trainer(
        model, plan, loss, lambda outputs, labels: {}, make_optimizer(model, 1e-9, 10**6, 0.1), torch.device("cpu")
    )
    batches = first_batches(args, len(features))

    def steps_with(padding: str) -> Any:
        """Training on all batches once, with this padding."""

        def run() -> None:
            plan.batches.padding = padding
            model.train()
            for group in in_batches(batches, args.gradient_accumulation_steps):
                for parts in plan.passes(group):
                    trainer.backward(parts, len(group))
                trainer.update()

        return run

    count = sum(int(tokens[rows].sum()) for rows in batches)
    logger.info("%s: %d batches of %d pairs, %d tokens each", role, len(batches), args.batch_size, count / len(batches))
    passes = sum(len(plan.passes(group)) for group in in_batches(batches, args.gradient_accumulation_steps))
    per_pass = round(count / passes)
    variants = {padding: steps_with(padding) for padding in PADDINGS} | ({"theirs": theirs} if theirs else {})
    turns = take_turns(variants, args.rounds, lambda: matmul_peak(given.bert, per_pass, training=True))
    gflop = dict.fromkeys(PADDINGS, useful_gflop(bert.encoder, count, training=True))
    return {
        **report(f"{role} training", *turns, gflop),
        "seconds_per_step": {padding: turns[0][padding] / len(batches) for padding in PADDINGS},
        "tokens_per_step": count / len(batches),
        "tokens_per_packed_pass": per_pass,
    }


def their_training(args: argparse.Namespace, given: Given, examples: Examples) -> Callable[[], None]:
    """sentence-transformers' training on the student's batches: cosine-similarity loss, AdamW.

    The texts are tokenized beforehand, so its tokenizer's time does not count.
    """
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses

    model = sentence_transformer(given.folder, args.max_seq_length)
    loss, optimizer = losses.CosineSimilarityLoss(model), torch.optim.AdamW(model.parameters(), lr=1e-9)
    labels, batches = torch.as_tensor(examples.labels).float(), []
    for rows in first_batches(args, len(examples)):
        texts = ([side[i] for i in rows] for side in (examples.first, examples.second))
        sides = [util.batch_to_device(model.preprocess(side), model.device) for side in texts]
        batches.append((sides, labels[rows] / max(1.0, float(labels.max()))))

    def run() -> None:
        model.train()
        for i, (sides, scores) in enumerate(batches):
            (loss([dict(side) for side in sides], scores) / args.gradient_accumulation_steps).backward()
            if (i + 1) % args.gradient_accumulation_steps == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return run


def inference(args: argparse.Namespace, given: Given) -> dict[str, Any]:
    """Embed the distinct sentences of the first pairs; padding to max_seq_length is measured on a part of them."""
    examples = read_examples(given.task, args.data_dir, "train")
    first, second = (side[: args.pairs] for side in (examples.first, examples.second))
    features = separate_features(given.task, Examples(first, second), given.tokenizer, args.max_seq_length)
    model = new_network(given.folder, DSEConfig.from_flags(args, given.bert)).eval()
    lengths, cpu = features.texts.lengths, torch.device("cpu")
    in_file_order = in_batches(np.arange(len(lengths)), args.batch_size)
    part = in_file_order[:: max(1, len(in_file_order) // (4 * args.steps))]

    def padded_with(padding: str, batches: list[Any]) -> Any:
        def run() -> None:
            laid_out = Batches(features, padding, args.max_seq_length)
            with torch.inference_mode():
                for texts in batches:
                    model.embed(**laid_out.of_texts(texts))

        return run

    def packed() -> None:
        embed_texts(model, Batches(features, "packed", args.max_seq_length), 10**6, cpu, "encode")

    variants = {"max": padded_with("max", part), "batch": padded_with("batch", in_file_order), "packed": packed}
    if has_sentence_transformers():
        theirs = sentence_transformer(given.folder, args.max_seq_length)
        texts = list(dict.fromkeys([*first, *second]))
        variants["theirs"] = lambda: theirs.encode(texts, batch_size=32, show_progress_bar=False)
    turns = take_turns(variants, args.rounds, lambda: matmul_peak(given.bert, TOKENS_PER_STEP["cpu"], training=False))
    tokens = {"max": sum(int(lengths[texts].sum()) for texts in part), "batch": lengths.sum(), "packed": lengths.sum()}
    encoder = model.encoder.encoder
    gflop = {padding: useful_gflop(encoder, int(count), training=False) for padding, count in tokens.items()}
    return report("inference", *turns, gflop)


def features(args: argparse.Namespace, given: Given) -> dict[str, Any]:
    """From the data's files to token ids: texts a second, memory, and how long a first and a second start take."""
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
            seconds = f"{read - started:>10.2f}{ended - read:>14.2f}"
            print(f"{start + ' start':<28}{seconds}{rate:>16,.0f}{memory:>12,.0f} MiB")
            numbers |= {f"{start}_start_seconds": ended - started, f"{start}_start_memory_mib": memory}
            numbers.setdefault("texts_per_second", rate)  # of the first start
            numbers |= {"pairs": len(examples), "texts": texts}
            del examples, made
    return numbers
