"""Measuring side by side: the same work laid out in several ways, beside the machine's own matrix products.

Variants take turns, round after round, and each one's fastest round counts: what else the machine does then hits all
of them. Useful work is that of real tokens in the encoder's layers, whatever is computed on padding:

    FLOP = 2 x parameters of the layers x tokens, and in training 3 times that (forward, and two products backward)
"""

import argparse
import importlib.util
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
) -> tuple[dict[str, dict[str, float]], float]:
    """Fastest seconds and peak memory (MiB, of the process) of each variant, and the highest of `peak`, in turn too.

    Each variant runs once before, unmeasured. A quick one runs several times a round, up to five, about as long as the
    slowest, so that each has the same chance of a quiet moment.
    """
    once = {name: _seconds(run) for name, run in variants.items()}
    repeats = {name: min(5, max(1, round(max(once.values()) / seconds))) for name, seconds in once.items()}
    results = {name: {"seconds": float("inf"), "peak_memory_mib": 0.0} for name in variants}
    highest = 0.0
    for _ in range(rounds):
        highest = max(highest, peak())
        for name, run in variants.items():
            forget_peak_memory()
            result = results[name]
            result["seconds"] = min(result["seconds"], *(_seconds(run) for _ in range(repeats[name])))
            result["peak_memory_mib"] = max(result["peak_memory_mib"], peak_memory())
    return results, highest


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def layer_parameters(encoder: nn.Module) -> int:
    """Parameters of the encoder's layers: what useful work is counted by."""
    return sum(parameter.numel() for parameter in encoder.parameters())


def useful_gflops(encoder: nn.Module, tokens: int, seconds: float, training: bool) -> float:
    """Useful GFLOP a second."""
    return (6 if training else 2) * layer_parameters(encoder) * tokens / seconds / 1e9


def matmul_peak(bert: dict[str, Any], tokens: int, training: bool) -> float:
    """GFLOP a second of a layer's matrix products alone, at `tokens` rows: forward and, in training, backward.

    Each product's best of five, and their rates weighted by the time that they take in a layer.
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


def sentence_transformer_steps(
    model: Any, pairs: list[tuple[list[str], list[str], Tensor]], accumulation_steps: int
) -> Callable[[], None]:
    """Training steps on batches of (first texts, second texts, scores): cosine-similarity loss, AdamW.

    The texts are tokenized beforehand, so that its tokenizer's time does not count.
    """
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses

    loss = losses.CosineSimilarityLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    batches = [([util.batch_to_device(model.preprocess(side), model.device) for side in sides], labels)
               for *sides, labels in pairs]  # fmt: skip

    def run() -> None:
        model.train()
        for i, (features, labels) in enumerate(batches):
            (loss([dict(side) for side in features], labels) / accumulation_steps).backward()
            if (i + 1) % accumulation_steps == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return run


def report(
    title: str,
    results: dict[str, dict[str, float]],
    rates: dict[str, float],
    peak: float,
    of_theirs: dict[str, float] | None,
) -> dict[str, Any]:
    """Print one table of useful rates; what the JSON says of it."""
    beside = {}
    print(f"\n{title:<28}{'useful GFLOP/s':>16}{'of the peak':>13}{'ours is':>9}{'peak memory':>14}")
    for name, rate in rates.items():
        ratio = f"{rates['packed'] / rate:.2f}x"
        memory = f"{results[name]['peak_memory_mib']:,.0f} MiB"
        print(f"{PADDINGS[name]:<28}{rate:>16.1f}{rate / peak:>13.0%}{ratio:>9}{memory:>14}")
    if of_theirs is not None:
        beside["ratio_to_sentence_transformers"] = of_theirs["seconds"] / results["packed"]["seconds"]
        print(f"{'sentence-transformers':<28}{'':>16}{'':>13}{beside['ratio_to_sentence_transformers']:>8.2f}x")
    print(f"{'matrix products alone':<28}{peak:>16.1f}")
    return {
        **beside,
        "ratio_to_fixed_padding": rates["packed"] / rates["max"],
        "ratio_to_batch_padding": rates["packed"] / rates["batch"],
        "fraction_of_matmul_peak": rates["packed"] / peak,
        "matmul_peak_gflops": peak,
        "useful_gflops": rates,
        "peak_memory_mib": {name: result["peak_memory_mib"] for name, result in results.items()},
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
            lambda outputs, rows: kind_of(task).student_loss(outputs, labels[rows], targets[rows], 0.5),
        ),
        "teacher": (
            teacher, teacher.bert, joint, joint.costs,
            lambda logits, rows: kind_of(task).teacher_loss(logits, labels[rows]),
        ),
    }  # fmt: skip
    theirs = None
    if importlib.util.find_spec("sentence_transformers"):
        theirs = sentence_transformer_training(args, given, examples)
    return {
        role: train_role(args, given, role, *parts, theirs if role == "student" else None)
        for role, parts in roles.items()
    }


def first_batches(args: argparse.Namespace, pairs: int) -> list[np.ndarray]:
    """The batches with which training of that seed begins."""
    return in_batches(epoch_order(pairs, args.random_seed, 0), args.batch_size)[: args.steps]


def train_role(
    args: argparse.Namespace, given: Given, role: str, model: Any, bert: Any, features: Any, tokens: Any,
    loss: Any, theirs: Callable[[], None] | None,
) -> dict[str, Any]:  # fmt: skip
    """Time the Trainer's own batches and updates of a student or a teacher with each padding, and `theirs`."""
    plan = EpochPlan(
        Batches(features, "packed", args.max_seq_length), args.batch_size, args.gradient_accumulation_steps,
        args.random_seed,
    )  # fmt: skip
    trainer = Trainer(
        model, plan, loss, lambda outputs, labels: {}, make_optimizer(model, 1e-9, 10**6, 0.1), torch.device("cpu")
    )
    batches = first_batches(args, len(features))

    def steps_with(padding: str) -> Any:
        """Training on all batches once, padded so."""

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
    results, peak = take_turns(variants, args.rounds, lambda: matmul_peak(given.bert, per_pass, training=True))
    of_theirs = results.pop("theirs", None)
    rates = {name: useful_gflops(bert.encoder, count, result["seconds"], True) for name, result in results.items()}
    seconds = {padding: result["seconds"] / len(batches) for padding, result in results.items()}
    return {
        **report(f"{role} training", results, rates, peak, of_theirs),
        "seconds_per_step": seconds,
        "tokens_per_step": count / len(batches),
        "tokens_per_packed_pass": per_pass,
    }


def sentence_transformer_training(args: argparse.Namespace, given: Given, examples: Examples) -> Callable[[], None]:
    """sentence-transformers on the student's batches."""
    batches = first_batches(args, len(examples.first))
    labels = torch.as_tensor(examples.labels).float()
    scores = labels / max(1.0, float(labels.max()))
    pairs = [([examples.first[i] for i in rows], [examples.second[i] for i in rows], scores[rows]) for rows in batches]
    model = sentence_transformer(given.folder, args.max_seq_length)
    return sentence_transformer_steps(model, pairs, args.gradient_accumulation_steps)


def inference(args: argparse.Namespace, given: Given) -> dict[str, Any]:
    """Embeddings of the distinct sentences of the first pairs; padding to max_seq_length is measured on a part."""
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
    if importlib.util.find_spec("sentence_transformers"):
        theirs = sentence_transformer(given.folder, args.max_seq_length)
        texts = list(dict.fromkeys([*first, *second]))
        variants["theirs"] = lambda: theirs.encode(texts, batch_size=32, show_progress_bar=False)
    results, peak = take_turns(
        variants, args.rounds, lambda: matmul_peak(given.bert, TOKENS_PER_STEP["cpu"], training=False)
    )
    of_theirs = results.pop("theirs", None)
    tokens = {"max": sum(int(lengths[texts].sum()) for texts in part), "batch": lengths.sum(), "packed": lengths.sum()}
    encoder = model.encoder.encoder
    rates = {name: useful_gflops(encoder, int(tokens[name]), results[name]["seconds"], False) for name in results}
    return report("inference", results, rates, peak, of_theirs)


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
            print(
                f"{start + ' start':<28}{read - started:>10.2f}{ended - read:>14.2f}{rate:>16,.0f}{memory:>12,.0f} MiB"
            )
            numbers |= {f"{start}_start_seconds": ended - started, f"{start}_start_memory_mib": memory}
            numbers.setdefault("texts_per_second", rate)  # of the first start
            numbers |= {"pairs": len(examples.first), "texts": texts}
            del examples, made
    return numbers
