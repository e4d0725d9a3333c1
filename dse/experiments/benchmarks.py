"""Measuring side by side: the same work laid out in several ways, beside the machine's own matrix products.

Variants take turns, round after round, and each one's fastest round counts, so other work on the machine hits all of
them alike. Useful work is that of real tokens in the encoder's layers, not what is computed on padding:

    FLOP = 2 x parameters of the layers x tokens, and in training 3 times that (forward, and two products backward)

On CUDA the clock is read once the GPU has done its work, memory is the GPU's, and a profile tells what the GPU does.
"""

import argparse
import contextlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from timeit import repeat, timeit
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dse.data.features import cached_features, in_batches, joint_features, separate_features
from dse.data.processors import Examples, read_examples
from dse.data.tasks import Task
from dse.experiments.baselines import openvino, sentence_transformer
from dse.experiments.reproduction import has_sentence_transformers
from dse.networks.batches import Batches
from dse.networks.config import DSEConfig
from dse.networks.encoder import products
from dse.networks.inference import TOKENS_PER_STEP, by_length, embed_texts
from dse.networks.pretrained import OpenedBert
from dse.networks.student import new_network
from dse.networks.teacher import load_teacher
from dse.system.device import training_bytes, training_seconds
from dse.system.libc import forget_peak_memory, peak_memory
from dse.training.epoch_plan import EpochPlan
from dse.training.kinds import kind_of
from dse.training.optimization import make_optimizer
from dse.training.reporting import markdown_table
from dse.training.trainer import Trainer

logger = logging.getLogger(__name__)

_PEAK_SECONDS = 0.02  # of one repeat, at least
Variants = dict[str, Callable[[], object]]  # what is measured, by name
Turns = tuple[dict[str, float], dict[str, float], float]  # of take_turns
# GiB, and the data sheets' dense TFLOP/s in 16 bits
_GPUS = {"T4": (16, 65), "L4": (24, 121), "A100": (40, 312), "H100": (80, 989), "H200": (141, 989)}
_BERT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096, "vocab_size": 30522,
               "max_position_embeddings": 512, "type_vocab_size": 2}  # fmt: skip
_TOKENS = {"MRPC": 3668 * 54, "QQP": 363_846 * 30}  # pairs x tokens of a pair, about
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by precision
PADDINGS = {"max": "padded to max_seq_length", "batch": "padded to the batch", "packed": "packed (ours)"}  # headings
USE_OF_GPU = ("launches a step", "kernels", "copies to the GPU", "copies from it", "GPU idle")  # headings


def take_turns(variants: Variants, rounds: int, peak: Callable[[], float] = lambda: 0.0, device: str = "cpu") -> Turns:
    """Fastest seconds and peak memory (MiB, of the process or GPU) of each variant, and the highest `peak`."""
    forget, taken = forget_peak_memory, peak_memory
    if device == "cuda":
        variants = {name: partial(_to_its_end, run) for name, run in variants.items()}
        forget, taken = torch.cuda.reset_peak_memory_stats, lambda: torch.cuda.max_memory_allocated() / 2**20
    # A quick one runs up to five times a round, so that each has the same chance of a quiet moment.
    once = {name: timeit(run, number=1) for name, run in variants.items()}
    repeats = {name: min(5, max(1, round(max(once.values()) / seconds))) for name, seconds in once.items()}
    fastest, memory, highest = dict.fromkeys(variants, float("inf")), dict.fromkeys(variants, 0.0), 0.0
    for _ in range(rounds):
        highest = max(highest, peak())
        for name, run in variants.items():
            if device == "cuda":
                _warm(run)
            forget()
            fastest[name] = min(fastest[name], *repeat(run, number=1, repeat=repeats[name]))
            memory[name] = max(memory[name], taken())
    return fastest, memory, highest


def _to_its_end(run: Callable[[], object]) -> None:
    run()
    torch.cuda.synchronize()


def _warm(run: Callable[[], object]) -> None:
    """Run twice, after which a Trainer has captured its passes."""
    run()
    run()


def on_gpu(device: str, variants: Variants, seconds: dict[str, float], counts: dict[str, int]) -> dict[str, Any]:
    """The entry `gpu`: `use_of_gpu` of variants, by name, from a profile of one run each. No entry on a CPU.

    counts: steps (updates, passes or queries) in a run of each variant.
    """
    found = {}
    for name, steps in counts.items() if device == "cuda" else ():
        _warm(variants[name])
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            _to_its_end(variants[name])
        found[name] = use_of_gpu(profiler.events(), seconds[name], steps)
    return {"gpu": found} if found else {}


def use_of_gpu(events: list[Any], seconds: float, steps: int) -> dict[str, float]:
    """Launches, kernels and copies in a step, and the share of a run's time in which the GPU is idle.

    events: of the profile of a run of so many steps, which takes `seconds` without it.
    """
    events = [event for event in events if not event.is_user_annotation]
    ours = [event for event in events if event.device_type.name == "CUDA"]
    busy = until = 0.0  # microseconds
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in ours):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {
        "launches": sum("Launch" in event.name for event in events) / steps,  # by the host, of a kernel or a graph
        "kernels": sum(not event.name.startswith(("Memcpy", "Memset")) for event in ours) / steps,
        "copies_to_gpu": sum("HtoD" in event.name for event in ours) / steps,
        "copies_to_host": sum("DtoH" in event.name for event in ours) / steps,
        "idle_share": max(0.0, 1 - busy / 1e6 / seconds),
    }


@contextlib.contextmanager
def computing_in(precision: str, device: str) -> Iterator[None]:
    """Let torch's products in the block have the precision that an encoder of ours has (networks/encoder.py)."""
    half = torch.autocast(device, _HALF.get(precision), enabled=precision in _HALF)
    with products(precision, torch.device(device)), half:
        yield


def useful_gflop(encoder: nn.Module, tokens: int, training: bool) -> float:
    """The useful work of the encoder's layers on `tokens` tokens, GFLOP."""
    return (6 if training else 2) * sum(parameter.numel() for parameter in encoder.parameters()) * tokens / 1e9


def matmul_peak(
    bert: dict[str, Any], tokens: int, training: bool, device: str = "cpu", precision: str = "auto"
) -> float:
    """GFLOP a second of a layer's matrix products alone, at `tokens` rows: forward and, in training, backward."""
    hidden, inner = bert["hidden_size"], bert["intermediate_size"]
    random = partial(torch.randn, device=device, dtype=_HALF.get(precision, torch.float32))
    seconds = flops = 0.0
    for count, width, out in ((4, hidden, hidden), (1, hidden, inner), (1, inner, hidden)):
        inputs, weight, gradient = random(tokens, width), random(out, width), random(tokens, out)
        factors = [(inputs, weight.t())]
        if training:
            factors += [(gradient, weight), (gradient.t(), inputs)]
        with computing_in(precision, device):
            seconds += count * sum(_product_seconds(a, b) for a, b in factors)
        flops += count * len(factors) * 2 * tokens * width * out
    return flops / seconds / 1e9


def _product_seconds(a: Tensor, b: Tensor) -> float:
    def multiply(calls: int) -> None:
        for _ in range(calls):
            torch.mm(a, b)
        if a.is_cuda:
            torch.cuda.synchronize()

    multiply(1)  # not measured
    calls = max(1, round(_PEAK_SECONDS / timeit(partial(multiply, 1), number=1)))
    return min(repeat(partial(multiply, calls), number=1, repeat=5)) / calls


def compared(turns: Turns, gflop: dict[str, float]) -> dict[str, Any]:
    """What `take_turns` measured, as numbers of useful work by padding, and their ratios to ours."""
    seconds, memory, peak = turns
    rates = {name: work / seconds[name] for name, work in gflop.items()}
    ways = {"theirs": "sentence_transformers", "openvino": "openvino"}
    return {
        **{f"ratio_to_{name}": seconds[way] / seconds["packed"] for way, name in ways.items() if way in seconds},
        "ratio_to_fixed_padding": rates["packed"] / rates["max"],
        "ratio_to_batch_padding": rates["packed"] / rates["batch"],
        "fraction_of_matmul_peak": rates["packed"] / peak,
        "matmul_peak_gflops": peak,
        "useful_gflops": rates,
        "peak_memory_mib": {name: memory[name] for name in gflop},
    }


def rates_table(*measured: dict[str, Any]) -> str:
    """Useful GFLOP/s of `training` and `inference`, a row per network, and what packed batches are to other ways."""
    keys = {key for found in measured for numbers in found.values() for key in numbers}
    with_gpu, others = "gpu" in keys, {"openvino": "against its OpenVINO"} if "ratio_to_openvino" in keys else {}
    header = (
        "useful GFLOP/s", *PADDINGS.values(), "ours against max_seq_length", "against the batch",
        "against sentence-transformers", *others.values(),
        "matrix products alone", "ours of these", "peak memory, MiB", *(USE_OF_GPU if with_gpu else ()),
    )  # fmt: skip
    rows = []
    for found in measured:
        settings = found["settings"]
        task = settings["task_name"].upper() + (f", {half}" if (half := settings.get("precision")) in _HALF else "")
        for role, numbers in found.items():
            if role != "settings":
                theirs = [numbers.get(f"ratio_to_{way}") for way in ("sentence_transformers", *others)]
                rows.append((
                    f"{role}, {task}", *(f"{numbers['useful_gflops'][padding]:.1f}" for padding in PADDINGS),
                    f"{numbers['ratio_to_fixed_padding']:.1f}x", f"{numbers['ratio_to_batch_padding']:.1f}x",
                    *("-" if ratio is None else f"{ratio:.2f}x" for ratio in theirs),
                    f"{numbers['matmul_peak_gflops']:.1f}",
                    f"{numbers['fraction_of_matmul_peak']:.0%}".replace("%", " %"),
                    " / ".join(f"{numbers['peak_memory_mib'][padding]:,.0f}" for padding in PADDINGS),
                    *(use_cells(numbers.get("gpu"), PADDINGS) if with_gpu else ()),
                ))  # fmt: skip
    return markdown_table(header, rows)


def use_cells(gpu: dict[str, Any] | None, names: Iterable[str]) -> tuple[str, ...]:
    """The cells under USE_OF_GPU, the variants side by side; `gpu` is the entry of that name, None of a CPU."""
    if gpu is None:
        return ("-",) * len(USE_OF_GPU)
    shown = ("{launches:,.0f}", "{kernels:,.0f}", "{copies_to_gpu:.1f}", "{copies_to_host:.1f}", "{idle_share:.0%}")
    return tuple(" / ".join(cell.format(**gpu[name]) for name in names).replace("%", " %") for cell in shown)


def memory_table(share: float = 0.3) -> str:
    """What a training of BERT-large needs on several GPUs, computed; it reaches `share` of their peaks."""
    needs, minutes = partial(training_bytes, _BERT_LARGE), f"minutes at {share:.0%} of the peak".replace("%", " %")
    header = ("GPU", "memory, GiB", "weights, gradients, moments, GiB", "pairs of 128 tokens in a pass, 32 / 16 bits",
              f"3 epochs of {' / '.join(_TOKENS)}, {minutes}")  # fmt: skip
    rows = []
    for gpu, (memory, peak) in _GPUS.items():
        always = needs(0, "tf32")
        pairs = [(0.9 * memory * 2**30 - always) / (needs(128, name) - always) for name in ("tf32", "bf16")]
        times = [training_seconds(_BERT_LARGE, 3 * tokens, peak * 1e12, share) / 60 for tokens in _TOKENS.values()]
        cells = (f"{always / 2**30:.1f}", " / ".join(f"{int(count):,}" for count in pairs))
        rows.append((gpu, str(memory), *cells, " / ".join(f"{time:.1f}" for time in times)))
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
    targets = kind.targets(torch.zeros(len(labels), task.num_logits)).to(args.device)
    separate, joint = (make(task, examples, bert.tokenizer, length) for make in (separate_features, joint_features))
    student = new_network(bert.folder, DSEConfig.from_flags(args, bert.config))
    teacher = load_teacher(bert.folder, task, fine_tuned=False)
    student.precision = teacher.precision = args.precision
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
    model.to(args.device)
    batches = Batches(features, "packed", args.max_seq_length)
    plan = EpochPlan(batches, args.batch_size, args.gradient_accumulation_steps, args.random_seed)
    optimizer = make_optimizer(model, 1e-9, 10**6, 0.1)
    trainers: dict[str, Trainer] = {}  # one at a time: with a captured pass, gradients have to stay where they are
    first = [rows for group in plan.groups(0) for rows in group][: args.steps]
    groups = in_batches(first, args.gradient_accumulation_steps)

    def train(padding: str) -> None:
        if padding not in trainers:
            trainers.clear()
            model.train().zero_grad()
            batches.padding = padding
            trainers[padding] = Trainer(model, plan, loss, lambda outputs, labels: {}, optimizer)
        for group in groups:
            trainers[padding].train_group(group)

    tokens, rows, *_ = features.rows_of(np.concatenate(first))
    count = int(tokens.lengths[rows].sum())
    logger.info("%s: %d batches of %d pairs, %d tokens each", role, len(first), args.batch_size, count / len(first))
    per_pass = round(count / sum(len(plan.passes(group)) for group in groups))
    variants: Variants = {padding: partial(train, padding) for padding in PADDINGS}
    if for_theirs and has_sentence_transformers():
        variants["theirs"] = their_training(args, bert, for_theirs, groups)
    peak = partial(matmul_peak, bert.config, per_pass, True, args.device, args.precision)
    turns = take_turns(variants, args.rounds, peak, args.device)
    gflop = dict.fromkeys(PADDINGS, useful_gflop(encoder.encoder, count, training=True))
    return {
        **compared(turns, gflop),
        **on_gpu(args.device, variants, turns[0], dict.fromkeys(PADDINGS, len(groups))),
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

    model = sentence_transformer(bert.folder, args.max_seq_length, args.device)
    loss, optimizer = losses.CosineSimilarityLoss(model), torch.optim.AdamW(model.parameters(), lr=1e-9)
    labels = torch.as_tensor(examples.labels).float()
    labels = (labels / labels.max().clamp(min=1.0)).to(args.device)

    def inputs(texts: list[str], rows: np.ndarray) -> dict[str, Tensor]:
        return util.batch_to_device(model.preprocess([texts[row] for row in rows]), model.device)

    batches = [[([inputs(side, rows) for side in examples.sides], labels[rows]) for rows in group] for group in groups]

    def train() -> None:
        model.train()
        for group in batches:
            for sides, scores in group:
                with computing_in(args.precision, args.device):
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
    model, device = new_network(bert.folder, DSEConfig.from_flags(args, bert.config)).eval(), torch.device(args.device)
    model.to(device).precision = args.precision
    lengths = features.texts.lengths
    in_file_order = in_batches(np.arange(len(lengths)), args.batch_size)
    part = in_file_order[:: max(1, len(in_file_order) // (4 * args.steps))]

    @torch.inference_mode()
    def embed(padding: str, batches: list[np.ndarray]) -> None:
        laid_out = Batches(features, padding, args.max_seq_length)
        for texts in batches:
            model.embed(**laid_out.of_texts(texts, device))

    packed = Batches(features, "packed", args.max_seq_length)
    variants: Variants = {
        "max": partial(embed, "max", part),
        "batch": partial(embed, "batch", in_file_order),
        "packed": partial(embed_texts, model, packed, 10**6, device, "encode"),
    }
    if has_sentence_transformers():
        texts = list(dict.fromkeys([*first, *second]))
        encode = sentence_transformer(bert.folder, args.max_seq_length, args.device).encode
        ways = {"theirs": computing_in(args.precision, args.device)(encode)}
        others = {} if args.device != "cpu" else openvino(bert.folder, args.max_seq_length, args.precision)
        ways |= {name: other.encode for name, other in others.items()}
        variants |= {name: partial(way, texts, batch_size=32, show_progress_bar=False) for name, way in ways.items()}
    most = TOKENS_PER_STEP[args.device]
    peak = partial(matmul_peak, bert.config, most, False, args.device, args.precision)
    turns = take_turns(variants, args.rounds, peak, args.device)
    tokens = {"max": lengths[np.concatenate(part)].sum(), "batch": lengths.sum(), "packed": lengths.sum()}
    layers = model.encoder.encoder
    gflop = {padding: useful_gflop(layers, int(count), training=False) for padding, count in tokens.items()}
    passes = {"max": len(part), "batch": len(in_file_order), "packed": len(by_length(lengths, most))}
    return {"encoding": {**compared(turns, gflop), **on_gpu(args.device, variants, turns[0], passes)}}


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
