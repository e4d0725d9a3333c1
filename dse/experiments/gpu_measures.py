"""How fast a GPU does this project's work, beside its own matrix products; and what the checks of it run on.

Encoders are of BERT's sizes with random weights, and texts are as long as MRPC's, so that nothing is downloaded. A
section is a function of a report, a device and sizes; gpu_check.py runs them all.
"""

import os
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from timeit import repeat
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification

from dse.data.features import in_batches
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.experiments.benchmarks import use_of_gpu, useful_gflop
from dse.experiments.gpu_report import Report
from dse.experiments.synthetic import make_pair, random_features, write_tiny_bert
from dse.index import CandidateIndex, rank_scores
from dse.models import DSESiameseClassifier
from dse.networks.batches import Batches
from dse.networks.config import DSEConfig
from dse.networks.encoder import products
from dse.networks.inference import TOKENS_PER_STEP, embed_texts
from dse.networks.pretrained import bert_config
from dse.networks.student import SiameseNetwork, empty_network, new_network
from dse.networks.teacher import Teacher
from dse.storage import index_files
from dse.storage.index_files import BLOCK
from dse.storage.states import States
from dse.training.epoch_plan import EpochPlan
from dse.training.kinds import KINDS
from dse.training.optimization import make_optimizer
from dse.training.run import Run
from dse.training.trainer import Trainer

LONGEST = 128
# What a kernel is for, by parts of its name: "lists" are the optimizer's, norms, and conversions of all weights.
_KERNELS = {"products": ("nvjet", "gemm", "cutlass_"), "attention": ("fmha", "softmax"), "lists": ("multi_tensor",)}
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PACKED, _PADDED = ("bf16", "packed", True), ("bf16", "batch", False)
_WAYS = (  # of an update: precision, padding, and whether passes are captured
    _PACKED, ("bf16", "packed", False), _PADDED, ("fp16", "packed", True), ("tf32", "packed", True),
    ("fp32", "packed", True),
)  # fmt: skip
_GOALS = {("student", "bf16", "packed", True): 0.35, ("student", "fp32", "packed", True): 0.6}  # share of the peak


def _bert(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
    return {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads}


@dataclass(frozen=True)
class Sizes:
    """How much is run. The values are for a GPU; a dry run on the CPU takes tiny ones."""

    small: dict[str, Any] = field(default_factory=lambda: _bert(256, 6, 4))  # a BERT's configuration
    large: dict[str, Any] = field(default_factory=lambda: _bert(1024, 24, 16))
    pairs: int = 2048
    few: int = 8  # pairs that the CPU encodes with the large BERT
    updates: int = 12
    matrix: int = 8192
    places: tuple[int, ...] = (4096, 16384, 32768)  # of a step of inference
    draws: int = 1 << 22  # of dropout
    sentences: int = 10_000
    candidates: int = 100_000
    width: int = 4096  # of candidates
    queries: int = 64
    rows: int = 3000  # of a training that lacks memory


def student_of(bert: dict[str, Any], device: torch.device, **architecture: Any) -> SiameseNetwork:
    """A student over a BERT with random weights, made on the device."""
    with torch.device(device):
        return empty_network(DSEConfig(BertConfig(**bert).to_dict(), **architecture))


def teacher_of(bert: dict[str, Any], device: torch.device) -> Teacher:
    """A teacher over a BERT with random weights, made on the device."""
    with torch.device(device):
        return Teacher(BertForSequenceClassification(BertConfig(**bert)))


def text_student(device: torch.device, width: int, head: str = "concat") -> DSESiameseClassifier:
    """A tiny untrained student of made-up sentences, with embeddings of that width; not concat: symmetric."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_tiny_bert(folder, seed=0)
        bert, symmetric = bert_config(folder, "made up"), head != "concat"
        config = DSEConfig(bert, "concat_top_mean", 2, head, width, (512, 1), symmetric=symmetric)
        network = new_network(folder, config).eval()
        torch.nn.init.normal_(network.siamese_head.fc_layers[-1].weight, std=0.02)  # 0 in a residual head
        network.precision = "fp32"
        return DSESiameseClassifier(network, load_tokenizer(folder, True, "made up"), get_task("mrpc"), 48).to(device)


def trainer_of(
    model: Any, features: Any, precision: str = "fp32", padding: str = "packed", graphs: bool = True,
    rate: float = 1e-9,
) -> Any:  # fmt: skip
    """A trainer of a student or teacher, 2 x 16 pairs per update."""
    model.precision = precision
    model.zero_grad(set_to_none=True)
    binary, targets = KINDS["binary"], torch.zeros(len(features), 1, device=model.device)

    def loss(outputs: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        if isinstance(model, Teacher):
            return binary.teacher_loss(outputs, labels)
        return binary.student_loss(outputs, labels, targets[rows], 0.5)

    plan = EpochPlan(Batches(features, padding, LONGEST), 16, 2, 0)
    model.train()
    return Trainer(model, plan, loss, lambda outputs, labels: {}, make_optimizer(model, rate, 1000, 0.1), graphs)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of the fastest of so many runs."""
    synchronize(device)

    def whole() -> None:
        work()
        synchronize(device)

    return min(repeat(whole, number=1, repeat=times))


@cache
def peak(device: torch.device, precision: str, size: int) -> float:
    """TFLOP/s of the device's own product of two square matrices, half as wide for fp32."""
    width = size // 2 if precision == "fp32" else size
    a, b = (torch.randn(width, width, device=device, dtype=_HALF.get(precision)) for _ in range(2))
    with products(precision, device):
        fastest(lambda: a @ b, device, 3)  # not measured
        return 2 * width**3 / fastest(lambda: a @ b, device, 8) / 1e12


def peaks(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Matrix products alone, which other numbers are shares of."""
    for precision in ("bf16", "fp16", "tf32", "fp32"):
        report.add(f"matrix products, {precision}, TFLOP/s", peak(device, precision, sizes.matrix))


def updates(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Updates of BERT-large: useful work (real tokens in the layers) as a share of the peak."""
    for role, model, features in _roles(device, sizes):
        seconds = {}
        for way in _WAYS:
            with report.caught(f"{role}, {_named(way)}"):
                seconds[way] = _update(report, role, model, features, way, sizes)
        if _PACKED in seconds and _PADDED in seconds:
            report.add(f"{role}, bf16: seconds padded / packed", seconds[_PADDED] / seconds[_PACKED], goal=1.3)
        if isinstance(model, SiameseNetwork):
            model.set_dropout(0.0)
            _update(report, f"{role} without dropout", model, features, _PACKED, sizes)


def transfers(report: Report, device: torch.device, sizes: Sizes) -> None:
    """How often an update of BERT-large waits for the GPU and copies to it, its launches, and when the GPU is idle."""
    for role, model, features in _roles(device, sizes):
        for way in (*_WAYS[:3], _WAYS[-1]):
            trainer, name = trainer_of(model, features, *way), f"{role}, {_named(way)}"
            groups = trainer.plan.groups(0)[: 3 if way[2] else 1]  # a profile of many launches takes long to read
            train = _train(trainer, groups)
            train()
            seconds = fastest(train, device, 2)
            # torch's own workaround where it captures graphs: to end CUPTI and start it anew crashes with them.
            os.environ.update(DISABLE_CUPTI_LAZY_REINIT="1", TEARDOWN_CUPTI="0")
            kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
            with profile(activities=kinds) as profiler:
                train()
                synchronize(device)
            events: Any = profiler.events()
            used: Any = use_of_gpu(events, seconds, len(groups))
            waits = sum(event.name.startswith(("cudaStreamSync", "cudaEventSync")) for event in events) / len(groups)
            report.add(f"{name}: reads by the host", max(waits, used["copies_to_host"]), limit=3, **used)
            report.add(f"{name}: copies to the device", used["copies_to_gpu"], limit=10)
            whole, spent = _by_kind(events, len(groups))
            report.add(f"{name}: ms of the device", whole, None, None, None, **spent)


def _by_kind(events: Any, updates: int) -> tuple[float, dict[str, float]]:
    """Milliseconds of the device in an update, in all and by what its kernels are for."""
    spent: Counter[str] = Counter()
    for event in events:
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            kinds = (kind for kind, parts in _KERNELS.items() if any(part in event.name for part in parts))
            spent[next(kinds, "rest")] += event.time_range.elapsed_us() / 1e3 / updates
    return sum(spent.values()), dict(spent)


def _roles(device: torch.device, sizes: Sizes) -> Iterator[tuple[str, Any, Any]]:
    separate, joint = random_features(sizes.pairs)
    yield "student", student_of(sizes.large, device), separate
    yield "teacher", teacher_of(sizes.large, device), joint


def _named(way: tuple[str, str, bool]) -> str:
    return f"{way[0]}, {way[1]}{', no graphs' if way[1] == 'packed' and not way[2] else ''}"


def _train(trainer: Trainer, groups: list[Any]) -> Callable[[], None]:
    def train() -> None:
        for group in groups:
            trainer.train_group(group)

    return train


def _update(report: Report, role: str, model: Any, features: Any, way: tuple[str, str, bool], sizes: Sizes) -> float:
    """Tell of one way to make an update. Returns its seconds."""
    trainer, device = trainer_of(model, features, *way), model.device
    groups = trainer.plan.groups(0)[: sizes.updates]
    train, memory = _train(trainer, groups), [0.0, 0.0]
    first = fastest(train, device, 1)
    train()  # passes are captured when their shapes come again
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = fastest(train, device, 2) / len(groups)
    if device.type == "cuda":  # graphs hold memory that does not count as allocated when they are replayed
        memory = [torch.cuda.max_memory_allocated(device) / 2**30, torch.cuda.max_memory_reserved(device) / 2**30]
    tokens, rows, *_ = features.rows_of(np.concatenate([rows for group in groups for rows in group]))
    real = int(tokens.lengths[rows].sum()) / len(groups)
    encoder = model.encoder if isinstance(model, SiameseNetwork) else model.bert
    rate = useful_gflop(encoder.encoder, int(real), training=True) / seconds / 1e3
    report.add(
        f"{role}, {_named(way)}: share of the peak", rate / peak(device, way[0], sizes.matrix),
        goal=_GOALS.get((role, *way)), ms=1e3 * seconds, first_ms=1e3 * first / len(groups), tokens=real,
        useful_TFLOPs=rate, GiB=memory[0], GiB_reserved=memory[1],
    )  # fmt: skip
    return seconds


def encode(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Embeddings of BERT-large by tokens per step, as shares of the peak."""
    model, features = student_of(sizes.large, device), random_features(sizes.pairs)[0]
    texts = Batches(features, "packed", LONGEST)
    gflop = useful_gflop(model.encoder.encoder, int(features.texts.lengths.sum()), training=False)
    for precision in ("bf16", "fp16", "tf32", "fp32"):
        model.precision = precision
        for places in sizes.places:
            with patch.dict(TOKENS_PER_STEP, {device.type: places}):
                run = partial(embed_texts, model, texts, 10**6, device, "encode", show=False)
                seconds = fastest(run, device, 2)
            goal = 0.5 if (precision, places) == ("bf16", 16384) else None
            share = gflop / seconds / 1e3 / peak(device, precision, sizes.matrix)
            report.add(f"{precision}, {places} tokens: share of the peak", share, goal=goal, seconds=seconds)


def search(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Queries against stored candidates, against copying them from pageable memory for each call."""
    model = text_student(device, sizes.width)
    parts = (
        (torch.randn(len(texts), sizes.width, device=device).cpu().numpy(), texts)
        for texts in in_batches(["a candidate"] * sizes.candidates, BLOCK)
    )
    index = CandidateIndex.from_embeddings(model, parts)
    for count in (1, sizes.queries):
        queries = [make_pair(random.Random(number))[1] for number in range(count)]
        before = fastest(partial(_as_before, index, queries), device, 2)
        report.add(f"queries {count}: copied for each call, seconds", before)
        for name, free in (("resident", 0.6), ("streamed", 0.0)):
            with holding(free):
                opened = CandidateIndex(model, index.files)
                run = partial(opened.search, queries)
                first, seconds = fastest(run, device, 1), fastest(run, device, 3)
            goal = 5.0 if (count, name) == (1, "resident") else None
            report.add(f"queries {count}: {name}, gain", before / seconds, goal=goal, seconds=seconds, first=first)


def holding(share: float) -> Any:
    """A context in which an index keeps its candidates on the GPU up to that share of the free memory."""
    return patch.object(index_files, "_OF_FREE_MEMORY", share)


def _as_before(index: CandidateIndex, texts: list[str]) -> None:
    """Scores as they were before the GPU kept candidates: block by block from pageable memory, query by query."""
    model = index.model
    queries = model.encode(texts, convert_to="tensor", show_progress=False)
    first, *rest = ((layer.weight, layer.bias) for layer in model.network.siamese_head.fc_layers)
    of_u, of_v, of_product, of_difference = (block.contiguous() for block in first[0].chunk(4, dim=1))
    with torch.inference_mode():
        constants = queries @ of_u.t() + first[1]
        for start in range(0, len(index), BLOCK):
            with warnings.catch_warnings(action="ignore"):  # not writable
                some = torch.from_numpy(index.vectors(start, start + BLOCK)).to(model.device)
            outputs = []
            for u, constant in zip(queries, constants, strict=True):
                hidden = functional.linear(some, torch.addcmul(of_v, of_product, u), constant)
                hidden += functional.linear((some - u).abs_(), of_difference)
                for layer in rest:
                    hidden = functional.linear(hidden.relu_(), *layer)
                outputs.append(hidden)
            rank_scores(torch.stack(outputs), model.task).cpu()


class _Saved(Run):
    """A run that saves states, and nothing else."""

    def entries(self, name: str = "") -> dict[str, Any]:
        return {"model": self.trainer.model.state_dict(), "trainer": self.trainer.state_dict()}


def states(report: Report, device: torch.device, sizes: Sizes) -> None:
    """How long a state of BERT-large holds up training, and when it is on the disk."""
    trainer = trainer_of(student_of(sizes.large, device), random_features(sizes.pairs)[0], "bf16")
    train = _train(trainer, trainer.plan.groups(0)[:5])
    usual = [fastest(train, device, 1) for _ in range(3)][-1]
    with tempfile.TemporaryDirectory() as place:
        run = _Saved()
        run.states = States(Path(place), "check")
        run.resume(trainer)
        for turn in ("first", "second"):
            trainer.so_far.updates += 5
            synchronize(device)
            started = time.perf_counter()
            run.save()
            held = time.perf_counter() - started
            meanwhile = fastest(train, device, 1)
            run.wait()
            written = time.perf_counter() - started
            size = max(path.stat().st_size for path in Path(place).glob("*.pt"))
            report.add(f"{turn} save: seconds that the update is held up", held, on_disk_after=written,
                       updates_usual=usual, updates_meanwhile=meanwhile, GiB=size / 2**30)  # fmt: skip


MEASURES = (peaks, updates, encode, search, states, transfers)  # profiling slows down what follows it
