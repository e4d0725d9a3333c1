"""Measuring what the student is for: one query against very many stored candidates.

The cross-encoder reads every pair (measured on a part, per pair); the head takes blocks of stored embeddings, as in
training, and so does the index. Embedding the candidates happens once and is reported apart. Where more candidates are
asked for than the task has sentences, the others are mixtures of two sentences' embeddings.
"""

import argparse
import importlib.util
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from dse.data.features import joint_features
from dse.data.processors import Examples, read_examples
from dse.data.tasks import Task
from dse.experiments.benchmarks import USE_OF_GPU, Variants, on_gpu, take_turns, use_cells
from dse.index import CandidateIndex, rank_scores
from dse.models import DSESiameseClassifier
from dse.networks.batches import Batches
from dse.networks.config import DSEConfig
from dse.networks.inference import infer
from dse.networks.pretrained import OpenedBert
from dse.networks.student import new_network
from dse.networks.teacher import load_teacher
from dse.storage.index_files import BLOCK, Part, stored
from dse.system.errors import InputError
from dse.system.files import atomic_write
from dse.system.libc import anonymous_memory
from dse.training.reporting import markdown_table

logger = logging.getLogger(__name__)

MANY_QUERIES, PAIRS_AT_ONCE = (8, 64), 3_200_000  # queries at once, least and most; pairs that they score, about
CROSS_ENCODER_PAIRS = 512
TEACHER, NAIVE, OURS, NEAREST = "cross-encoder", "head on blocks", "index (ours)", "shortlist (ours)"
ONE_PASS = "index in one pass"  # float32 alone


@torch.inference_mode()
def naive_outputs(query: str, index: CandidateIndex) -> Tensor:
    """The head as it is trained, [u, v, u * v, |u - v|] made for every pair, a block of candidates at a time."""
    head, u = index.model.network.siamese_head, index.model.encode(query, convert_to="tensor")
    # Made first: small results kept between the large steps would keep these from using the same memory again.
    outputs = u.new_empty(len(index), index.model.network.config.fc_dims[-1])
    for start in range(0, len(index), BLOCK):
        v = stored(index.files, start).to(u.device, torch.float32)
        outputs[start : start + len(v)] = head(u.expand_as(v), v)
    return outputs


def watched(memory: dict[str, float], name: str, run: Callable[..., object], *args: object) -> None:
    """Run, and keep in `memory` the most anonymous memory taken above that at its start, MiB, as far as seen."""
    before, done = anonymous_memory(), threading.Event()
    memory.setdefault(name, 0.0)

    def look() -> None:
        while not done.wait(0.003):
            memory[name] = max(memory[name], anonymous_memory() - before)

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    run(*args)
    done.set()
    watch.join()


def candidates(embeddings: np.ndarray, sentences: list[str], count: int) -> Iterator[Part]:
    """So many embeddings with their texts: those of the sentences, then mixtures of two of them."""
    yield embeddings[:count], sentences[:count]
    rng, known = np.random.default_rng(0), len(sentences)
    for start in range(known, count, BLOCK):
        size = min(BLOCK, count - start)
        (one, other), share = rng.integers(known, size=(2, size)), rng.random((size, 1), dtype=np.float32)
        mixed = share * embeddings[one] + (1 - share) * embeddings[other]
        yield mixed, [f"mixture {row}" for row in range(start, start + size)]


def scoring(args: argparse.Namespace, task: Task, bert: OpenedBert) -> dict[str, Any]:
    """Measure each number of candidates."""
    if args.model:
        model = DSESiameseClassifier.from_pretrained(args.model)
        if model.task != task:
            own = model.task.name
            raise InputError(f"--model: this is a student of {own}; give --task_name {own}, found {task.name}")
    else:
        network = new_network(bert.folder, DSEConfig.from_flags(args, bert.config)).eval()
        model = DSESiameseClassifier(network, bert.tokenizer, task, args.max_seq_length)
    model.to(args.device).network.precision = args.precision
    examples = read_examples(task, args.data_dir, "train")
    query, sentences = examples.first[0], list(dict.fromkeys(chain(*reversed(examples.sides))))
    some = sentences[:CROSS_ENCODER_PAIRS]
    seconds_per_pair = cross_encoder_seconds(args, task, bert, Examples([query] * len(some), some))
    sentences, asked = sentences[: max(args.candidates)], read_examples(task, args.data_dir, "dev").first
    started = time.perf_counter()
    embeddings = model.encode(sentences, show_progress=False)
    each = (time.perf_counter() - started) / len(sentences)
    head = model.network.config.siamese_head_type
    numbers: dict[str, Any] = {"head": head, "embedding_seconds_per_sentence": each, "candidates": {}}
    with tempfile.TemporaryDirectory(prefix="dse-benchmark-") as folder:
        for count in args.candidates:
            parts = partial(candidates, embeddings, sentences, count)
            started = time.perf_counter()
            index = CandidateIndex.from_embeddings(model, parts(), Path(folder) / str(count))
            built = time.perf_counter() - started
            least, most = MANY_QUERIES
            many = asked[: max(least, min(most, PAIRS_AT_ONCE // count))]
            numbers["candidates"][str(count)] = found = one_size(args, index, query, many, seconds_per_pair)
            found["seconds"]["build"] = built
            if head == "dot" and args.device == "cpu" and importlib.util.find_spec("faiss"):  # of the CPU
                found["ratio_to_faiss"] = against_faiss(args, index, query)
            if count == min(args.candidates):
                halved = CandidateIndex.from_embeddings(model, parts(), dtype="float16")
                half = relative_difference(halved.score(query), index.score(query))
                numbers["max_relative_difference_float16"] = half
    if args.plot:
        plot(numbers, Path(args.plot))
    return numbers


def cross_encoder_seconds(args: argparse.Namespace, task: Task, bert: OpenedBert, pairs: Examples) -> float:
    """Seconds per pair of a cross-encoder of --bert_model, packed and by length."""
    batches = Batches(joint_features(task, pairs, bert.tokenizer, args.max_seq_length), "packed", args.max_seq_length)
    teacher = load_teacher(bert.folder, task, fine_tuned=False).to(args.device)  # untrained takes as long
    teacher.precision = args.precision
    read = partial(infer, teacher, batches, 10**6, torch.device(args.device), "teacher")
    seconds = take_turns({TEACHER: read}, args.rounds, device=args.device)[0][TEACHER]
    logger.info("cross-encoder: %d pairs, %.0f a second", len(pairs), len(pairs) / seconds)
    return seconds / len(pairs)


def relative_difference(scores: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest expected score."""
    return float(np.abs(scores - expected).max() / np.abs(expected).max())


def one_size(
    args: argparse.Namespace, index: CandidateIndex, query: str, many: list[str], per_pair: float
) -> dict[str, Any]:
    """Measure one number of candidates: one query, and many at once."""
    count, memory, never = len(index), dict[str, float](), lambda device: False
    expected = rank_scores(naive_outputs(query, index), index.model.task).cpu().numpy()
    difference = relative_difference(index.score(query), expected)  # warm, and every block compared with its sum
    variants: Variants = {
        NAIVE: partial(watched, memory, NAIVE, naive_outputs, query, index),
        OURS: partial(watched, memory, OURS, index.search, query, 10),
        ONE_PASS: partial(watched, memory, ONE_PASS, patch("dse.index.has_bfloat16", never)(index.search), query, 10),
        NEAREST: partial(watched, memory, NEAREST, partial(index.search, shortlist="auto"), query, 10),
    }
    turns = take_turns(variants, args.rounds, device=args.device)
    # In fewer rounds, as it takes 64 times as long.
    best = dict[str, Any]()
    at_once: Variants = {"many": partial(watched, memory, "many", lambda: best.update(of_all=index.search(many, 10)))}
    of_many, *_ = take_turns(at_once, min(2, args.rounds), device=args.device)
    seconds = turns[0]
    used = on_gpu(args.device, variants, seconds, dict.fromkeys(variants, 1))
    seconds |= {"many": of_many["many"] / len(many), TEACHER: per_pair * count}
    best["of_nearest"] = index.search(many, 10, shortlist="auto")
    of_all, of_nearest = ([{hit.row for hit in hits} for hits in best[name]] for name in ("of_all", "of_nearest"))
    shares = [len(best & near) / len(best) for best, near in zip(of_all, of_nearest, strict=True)]
    logger.info("%d candidates: %.4g s a query", count, seconds[OURS])
    return {
        "seconds": seconds,
        "ratio_to_naive_head": seconds[NAIVE] / seconds[OURS],
        "ratio_to_cross_encoder": seconds[TEACHER] / seconds[OURS],
        "ratio_of_one_query_to_each_of_many": seconds[OURS] / seconds["many"],
        "max_relative_difference": difference,
        "shortlist_recall": float(np.mean(shares)),
        "many_queries": len(many),
        "anonymous_mib": memory,
        **used,
    }


def against_faiss(args: argparse.Namespace, index: CandidateIndex, query: str) -> float:
    """The ratio of seconds for one query: faiss's flat inner-product search to ours (dot head)."""
    import faiss

    flat = faiss.IndexFlatIP(index.width)
    flat.add(np.ascontiguousarray(index.vectors(0, len(index)), dtype=np.float32))
    u = index.model.encode([query])
    seconds, *_ = take_turns({"faiss": lambda: flat.search(u, 10), OURS: lambda: index.search(query, 10)}, args.rounds)
    return seconds["faiss"] / seconds[OURS]


def scoring_table(*measured: dict[str, Any]) -> str:
    """Seconds for one query, a row per head and number of candidates."""
    header: tuple[str, ...] = (
        "head", "candidates", "cross-encoder, s", "head on blocks, s", "index in one pass, s", "index, s",
        "shortlist, s", "its share of the ten best", "index against the cross-encoder", "against the head on blocks",
        "against faiss", "each of many queries at once, s", "largest difference of a score", "memory above, MiB",
        "to build, s",
    )  # fmt: skip
    with_gpu = any("gpu" in numbers for found in measured for numbers in found["candidates"].values())
    header += USE_OF_GPU if with_gpu else ()
    rows = [
        (
            f"`{found['head']}`", f"{int(count):,}",
            *(shown(numbers["seconds"][name]) for name in (TEACHER, NAIVE, ONE_PASS, OURS, NEAREST)),
            f"{100 * numbers['shortlist_recall']:.1f} % ({numbers['many_queries']} queries)",
            f"{numbers['ratio_to_cross_encoder']:,.0f}x", f"{numbers['ratio_to_naive_head']:.1f}x",
            f"{numbers['ratio_to_faiss']:.1f}x" if "ratio_to_faiss" in numbers else "-",
            f"{numbers['seconds']['many']:.3g}", f"{numbers['max_relative_difference']:.0e}",
            f"{numbers['anonymous_mib'][OURS]:,.0f}", f"{numbers['seconds']['build']:.3g}",
            *(use_cells(numbers.get("gpu"), (NAIVE, OURS)) if with_gpu else ()),
        )
        for found in measured
        for count, numbers in found["candidates"].items()
    ]  # fmt: skip
    return markdown_table(header, rows)


def shown(seconds: float) -> str:
    """Three digits; whole seconds from 1,000 on.

    >>> shown(0.08861), shown(5860.2)
    ('0.0886', '5,860')
    """
    return f"{seconds:.3g}" if seconds < 1000 else f"{seconds:,.0f}"


def in_one_line(found: dict[str, Any]) -> str:
    """What one query against the most candidates costs, and what it was to embed them."""
    count, numbers = max(found["candidates"].items(), key=lambda item: int(item[0]))
    return (
        f"One query against {int(count):,} stored candidates takes {numbers['seconds'][OURS]:.2g} s, "
        f"{numbers['ratio_to_cross_encoder']:,.0f} times as fast as a cross-encoder of the same size, or "
        f"{numbers['seconds'][NEAREST]:.2g} s with a shortlist ({100 * numbers['shortlist_recall']:.0f} % of the ten "
        f"best, {numbers['many_queries']} queries). Embedding a candidate takes "
        f"{1000 * found['embedding_seconds_per_sentence']:.1f} ms, once."
    )


def plot(numbers: dict[str, Any], path: Path) -> None:
    """Seconds per query by number of candidates, both axes logarithmic, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="candidates", ylabel="seconds per query")
    for name in (TEACHER, NAIVE, OURS, NEAREST):
        points = [(int(count), each["seconds"][name]) for count, each in numbers["candidates"].items()]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.legend()
    axes.grid(visible=True, which="both", alpha=0.3)
    with atomic_write(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
