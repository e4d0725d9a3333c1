"""Measuring side by side: the same work laid out in several ways, beside the machine's own matrix products.

Variants take turns, round after round, and each one's fastest round counts, so other work on the machine hits all of
them alike. Useful work is that of real tokens in the encoder's layers, not what is computed on padding:

    FLOP = 2 x parameters of the layers x tokens, and in training 3 times that (forward, and two products backward)
"""

import argparse
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from timeit import repeat, timeit
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dse.data.features import cached_features, in_batches, joint_features, separate_features
from dse.data.processors import Examples, read_examples
from dse.data.tasks import Task
from dse.experiments.baselines import sentence_transformer
from dse.experiments.reproduction import has_sentence_transformers
from dse.networks.batches import Batches
from dse.networks.config import DSEConfig
from dse.networks.encoder import products
from dse.networks.inference import TOKENS_PER_STEP, embed_texts
from dse.networks.pretrained import OpenedBert
from dse.networks.student import new_network
from dse.networks.teacher import load_teacher
from dse.system.libc import forget_peak_memory, peak_memory
from dse.training.epoch_plan import EpochPlan
from dse.training.kinds import kind_of
from dse.training.optimization import make_optimizer
from dse.training.reporting import markdown_table
from dse.training.trainer import Trainer

logger = logging.getLogger(__name__)

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PEAK_SECONDS = 0.02  # of one repeat, at least
Variants = dict[str, Callable[[], object]]  # what is measured, by name
Turns = tuple[dict[str, float], dict[str, float], float]  # of take_turns
PADDINGS = {"max": "padded to max_seq_length", "batch": "padded to the batch", "packed": "packed (ours)"}  # headings


def take_turns(variants: Variants, rounds: int, peak: Callable[[], float] = lambda: 0.0) -> Turns:
    """Fastest seconds and peak memory (MiB, of the process) of each variant, and the highest `peak` of the rounds."""
    # A quick one runs up to five times a round, so that each has the same chance of a quiet moment.
    once = {name: timeit(run, number=1) for name, run in variants.items()}
    repeats = {name: min(5, max(1, round(max(once.values()) / seconds))) for name, seconds in once.items()}
    fastest, memory, highest = dict.fromkeys(variants, float("inf")), dict.fromkeys(variants, 0.0), 0.0
    for _ in range(rounds):
        highest = max(highest, peak())
        for name, run in variants.items():
            forget_peak_memory()
            fastest[name] = min(fastest[name], *repeat(run, number=1, repeat=repeats[name]))
            memory[name] = max(memory[name], peak_memory())
    return fastest, memory, highest


def useful_gflop(encoder: nn.Module, tokens: int, training: bool) -> float:
    """The useful work of the encoder's layers on `tokens` tokens, GFLOP."""
    return (6 if training else 2) * sum(parameter.numel() for parameter in encoder.parameters()) * tokens / 1e9


def matmul_peak(bert: dict[str, Any], tokens: int, training: bool) -> float:
    """GFLOP a second of a layer's matrix products alone, at `tokens` rows: forward and, in training, backward."""
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
    product = partial(torch.mm, a, b)
    product()  # not measured
    calls = max(1, round(_PEAK_SECONDS / timeit(product, number=1)))
    return min(repeat(product, number=calls, repeat=5)) / calls


def compared(turns: Turns, gflop: dict[str, float]) -> dict[str, Any]:
    """What `take_turns` measured, as numbers of useful work by padding, and their ratios to ours."""
    seconds, memory, peak = turns
    rates = {name: work / seconds[name] for name, work in gflop.items()}
    theirs = {"ratio_to_sentence_transformers": seconds["theirs"] / seconds["packed"]} if "theirs" in seconds else {}
    return {
        **theirs,
        "ratio_to_fixed_padding": rates["packed"] / rates["max"],
        "ratio_to_batch_padding": rates["packed"] / rates["batch"],
        "fraction_of_matmul_peak": rates["packed"] / peak,
        "matmul_peak_gflops": peak,
        "useful_gflops": rates,
        "peak_memory_mib": {name: memory[name] for name in gflop},
    }


def rates_table(*measured: dict[str, Any]) -> str:
    """Useful GFLOP/s of `training` and `inference`, a row per network, and what packed batches are to other ways."""
    header = (
        "useful GFLOP/s", *PADDINGS.values(), "ours against max_seq_length", "against the batch",
        "against sentence-transformers", "matrix products alone", "ours of these", "peak memory, MiB",
    )  # fmt: skip
    rows = []
    for found in measured:
        task = found["settings"]["task_name"].upper()
        for role, numbers in found.items():
            if role != "settings":
                theirs = numbers.get("ratio_to_sentence_transformers")
                rows.append((
                    f"{role}, {task}", *(f"{numbers['useful_gflops'][padding]:.1f}" for padding in PADDINGS),
                    f"{numbers['ratio_to_fixed_padding']:.1f}x", f"{numbers['ratio_to_batch_padding']:.1f}x",
                    "-" if theirs is None else f"{theirs:.2f}x", f"{numbers['matmul_peak_gflops']:.1f}",
                    f"{numbers['fraction_of_matmul_peak']:.0%}".replace("%", " %"),
                    " / ".join(f"{numbers['peak_memory_mib'][padding]:,.0f}" for padding in PADDINGS),
                ))  # fmt: skip
    return markdown_table(header, rows)


def features_table(*measured: dict[str, Any]) -> str:
    """Seconds and memory of `features`, a row for each start."""
    header = ("features", "read, s", "token ids, s", "texts a second", "memory above, MiB")
    rows = [
        (
            f"{found['settings']['task_name'].upper()}, {start} start, {found['pairs']:,} pairs",
            *(f"{numbers[name]:.2f}" for name in ("read_seconds", "token_id_seconds")),
            *(f"{numbers[name]:,.0f}" for name in ("texts_per_second", "memory_mib")),
        )
        for found in measured
        for start, numbers in found["starts"].items()
    ]
    return markdown_table(header, rows)


def training(args: argparse.Namespace, task: Task, bert: OpenedBert) -> dict[str, Any]:
    """Student and teacher: whole steps, from token ids to the update."""
    kind, length = kind_of(task), args.max_seq_length
    examples = read_examples(task, args.data_dir, "train")
    labels = torch.tensor(examples.labels)
    targets = kind.targets(torch.zeros(len(labels), task.num_logits))
    separate, joint = (make(task, examples, bert.tokenizer, length) for make in (separate_features, joint_features))
    student = new_network(bert.folder, DSEConfig.from_flags(args, bert.config))
    teacher = load_teacher(bert.folder, task, fine_tuned=False)
    measure = partial(train_role, args, bert)
    return {
        "student training": measure("student", student, student.encoder, separate, examples,
                           lambda outputs, labels, rows: kind.student_loss(outputs, labels, targets[rows], 0.5)),
        "teacher training": measure("teacher", teacher, teacher.bert, joint, None,
                           lambda logits, labels, rows: kind.teacher_loss(logits, labels)),
    }  # fmt: skip


def train_role(
    args: argparse.Namespace, bert: OpenedBert, role: str, model: Any, encoder: Any, features: Any,
    for_theirs: Examples | None, loss: Any,
) -> dict[str, Any]:  # fmt: skip
    """Time the Trainer's own updates with each padding, and sentence-transformers' on the same batches of examples."""
    batches = Batches(features, "packed", args.max_seq_length)
    plan = EpochPlan(batches, args.batch_size, args.gradient_accumulation_steps, args.random_seed)
    optimizer = make_optimizer(model, 1e-9, 10**6, 0.1)
    trainer = Trainer(model, plan, loss, lambda outputs, labels: {}, optimizer)
    first = [rows for group in plan.groups(0) for rows in group][: args.steps]
    groups = in_batches(first, args.gradient_accumulation_steps)

    def train(padding: str) -> None:
        batches.padding = padding
        model.train()
        for group in groups:
            trainer.train_group(group)

    tokens, rows, *_ = features.rows_of(np.concatenate(first))
    count = int(tokens.lengths[rows].sum())
    logger.info("%s: %d batches of %d pairs, %d tokens each", role, len(first), args.batch_size, count / len(first))
    per_pass = round(count / sum(len(plan.passes(group)) for group in groups))
    variants: Variants = {padding: partial(train, padding) for padding in PADDINGS}
    if for_theirs and has_sentence_transformers():
        variants["theirs"] = their_training(args, bert, for_theirs, groups)
    turns = take_turns(variants, args.rounds, lambda: matmul_peak(bert.config, per_pass, training=True))
    gflop = dict.fromkeys(PADDINGS, useful_gflop(encoder.encoder, count, training=True))
    return {
        **compared(turns, gflop),
        "seconds_per_step": {padding: turns[0][padding] / len(first) for padding in PADDINGS},
        "tokens_per_step": count / len(first),
        "tokens_per_packed_pass": per_pass,
    }


def their_training(
    args: argparse.Namespace, bert: OpenedBert, examples: Examples, groups: list[list[np.ndarray]]
) -> Callable[[], None]:
    """sentence-transformers' training on batches of rows, by update, tokenized beforehand: cosine loss, AdamW."""
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses

    model = sentence_transformer(bert.folder, args.max_seq_length)
    loss, optimizer = losses.CosineSimilarityLoss(model), torch.optim.AdamW(model.parameters(), lr=1e-9)
    labels = torch.as_tensor(examples.labels).float()
    labels /= labels.max().clamp(min=1.0)

    def inputs(texts: list[str], rows: np.ndarray) -> dict[str, Tensor]:
        return util.batch_to_device(model.preprocess([texts[row] for row in rows]), model.device)

    batches = [[([inputs(side, rows) for side in examples.sides], labels[rows]) for rows in group] for group in groups]

    def train() -> None:
        model.train()
        for group in batches:
            for sides, scores in group:
                (loss([dict(side) for side in sides], scores) / len(group)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return train


def inference(args: argparse.Namespace, task: Task, bert: OpenedBert) -> dict[str, Any]:
    """Embed the distinct sentences of the first pairs; padding to max_seq_length is measured on a part of them."""
    examples = read_examples(task, args.data_dir, "train")
    first, second = (side[: args.pairs] for side in examples.sides)
    features = separate_features(task, Examples(first, second), bert.tokenizer, args.max_seq_length)
    model = new_network(bert.folder, DSEConfig.from_flags(args, bert.config)).eval()
    lengths = features.texts.lengths
    in_file_order = in_batches(np.arange(len(lengths)), args.batch_size)
    part = in_file_order[:: max(1, len(in_file_order) // (4 * args.steps))]

    @torch.inference_mode()
    def embed(padding: str, batches: list[np.ndarray]) -> None:
        laid_out = Batches(features, padding, args.max_seq_length)
        for texts in batches:
            model.embed(**laid_out.of_texts(texts))

    packed = Batches(features, "packed", args.max_seq_length)
    variants: Variants = {
        "max": partial(embed, "max", part),
        "batch": partial(embed, "batch", in_file_order),
        "packed": partial(embed_texts, model, packed, 10**6, torch.device("cpu"), "encode"),
    }
    if has_sentence_transformers():
        theirs, texts = sentence_transformer(bert.folder, args.max_seq_length), list(dict.fromkeys([*first, *second]))
        variants["theirs"] = partial(theirs.encode, texts, batch_size=32, show_progress_bar=False)
    turns = take_turns(variants, args.rounds, lambda: matmul_peak(bert.config, TOKENS_PER_STEP["cpu"], training=False))
    tokens = {"max": lengths[np.concatenate(part)].sum(), "batch": lengths.sum(), "packed": lengths.sum()}
    layers = model.encoder.encoder
    gflop = {padding: useful_gflop(layers, int(count), training=False) for padding, count in tokens.items()}
    return {"encoding": compared(turns, gflop)}


def features(args: argparse.Namespace, task: Task, bert: OpenedBert) -> dict[str, Any]:
    """From the data's files to token ids: texts a second, memory, and how long a first and a second start take."""
    starts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for start in ("first", "second"):
            forget_peak_memory()
            before, began = peak_memory(), time.perf_counter()
            rows = read_examples(task, args.data_dir, "train")
            read = time.perf_counter()
            made: Any = cached_features("separate", task, rows, bert.tokenizer, args.max_seq_length, f"{place}/f", True)
            ended, pairs, texts = time.perf_counter(), len(rows), len(made.texts.offsets) - 1
            starts[start] = {
                "read_seconds": read - began,
                "token_id_seconds": ended - read,
                "texts_per_second": texts / (ended - read),
                "memory_mib": peak_memory() - before,
            }
            del rows, made
    return {"pairs": pairs, "texts": texts, "starts": starts}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of the fastest of so many runs."""
    best = float("inf")
    for _ in range(times):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def profiled(work: Callable[[], object], device: torch.device) -> tuple[Counter[str], float]:
    """How often each event came, by name, and the seconds in which the device had something to do."""
    # torch's own workaround where it captures graphs: ending and starting CUPTI anew crashes with them.
    os.environ.update(DISABLE_CUPTI_LAZY_REINIT="1", TEARDOWN_CUPTI="0")
    of_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *of_gpu]) as found:
        work()
        synchronize(device)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not (getattr(event, "is_user_annotation", False) or event.name.startswith("Optimizer."))
    )
    busy = ended = 0.0  # microseconds; kernels of several streams overlap
    for start, end in spans:
        busy += max(0.0, end - max(start, ended))
        ended = max(ended, end)
    return Counter({event.key: event.count for event in found.key_averages()}), busy / 1e6


def count_of(counts: Counter[str], *beginnings: str) -> int:
    """How many events have names that begin so."""
    return sum(count for name, count in counts.items() if name.startswith(beginnings))


@cache
def device_peak(device: torch.device, precision: str, size: int) -> float:
    """TFLOP/s of a device's own product of two square matrices, half as wide for fp32."""
    width = size // 2 if precision == "fp32" else size
    a, b = (torch.randn(width, width, device=device, dtype=_HALF.get(precision)) for _ in range(2))
    with products(precision, device):
        fastest(lambda: a @ b, device, 3)  # not measured
        return 2 * width**3 / fastest(lambda: a @ b, device, 8) / 1e12
