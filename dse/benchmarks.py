"""Measuring side by side: the same work laid out in several ways, beside the machine's own matrix products.

Variants take turns, round after round, and each one's fastest round counts: what else the machine does then hits all
of them. Useful work is that of real tokens in the encoder's layers, whatever is computed on padding:

    FLOP = 2 x parameters of the layers x tokens, and in training 3 times that (forward, and two products backward)
"""

import contextlib
import ctypes
import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PEAK_REPEATS = 5
_PEAK_SECONDS = 0.02  # of one repeat, at least


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
            result["seconds"] = min(result["seconds"], *(_seconds(run) for _ in range(repeats[name])), float("inf"))
            result["peak_memory_mib"] = max(result["peak_memory_mib"], peak_memory())
    return results, highest


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def forget_peak_memory() -> None:
    """Give freed memory back, and have Linux count the process's peak from here."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Peak resident memory of the process since `forget_peak_memory`, MiB; elsewhere than on Linux since its start."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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


def sentence_transformer(bert_folder: Path, max_seq_length: int) -> Any:
    """The same encoder with mean pooling in sentence-transformers (tried with 6.2), which must be installed."""
    from sentence_transformers import SentenceTransformer, models

    encoder = models.Transformer(str(bert_folder), max_seq_length=max_seq_length)
    return SentenceTransformer(
        modules=[encoder, models.Pooling(encoder.get_embedding_dimension(), pooling_mode="mean")], device="cpu"
    )


def sentence_transformer_steps(
    model: Any, pairs: list[tuple[list[str], list[str], Tensor]], accumulation_steps: int
) -> Callable[[], None]:
    """Training steps on batches of (first texts, second texts, scores): cosine-similarity loss, AdamW.

    The texts are tokenized beforehand, so that its tokenizer's time does not count.
    """
    from sentence_transformers import losses, util

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


def random_batches(rows: int, batch_size: int, count: int, seed: int) -> list[np.ndarray]:
    """Batches of rows as training draws them."""
    order = np.random.default_rng(seed).permutation(rows)
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(count) if (i + 1) * batch_size <= rows]
