"""What is told of a training: log lines, one JSON line per epoch, curves."""

import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dse.system.errors import InputError
from dse.system.files import json_text

logger = logging.getLogger(__name__)
Record = dict[str, Any]  # of an epoch: epoch, train metrics, validation metrics if any, updates, rate, seconds


def format_metrics(metrics: dict[str, float | None], threshold: float | None = None) -> str:
    """Metrics on one line, four decimals; of several thresholds those of one (`at_threshold`)."""
    return ", ".join(f"{name} {show_number(value)}" for name, value in at_threshold(metrics, threshold).items())


def show_number(value: float | None) -> str:
    """Four decimals; "undefined" for NaN, which JSON gives back as None."""
    return "undefined" if value is None or math.isnan(value) else f"{value:.4f}"


def winning_threshold(metrics: dict[str, float]) -> float | None:
    """The threshold with the best f1, of equals the one nearest to 0.5; None for metrics without thresholds.

    >>> winning_threshold({"loss": 0.3, "f1_0.1": 0.9, "f1_0.4": 0.9, "f1_0.5": 0.8})
    0.4
    """
    found = {float(name.removeprefix("f1_")): f1 for name, f1 in metrics.items() if name.startswith("f1_")}
    return max(found, key=lambda threshold: (found[threshold], -abs(threshold - 0.5)), default=None)


def at_threshold(metrics: dict[str, Any], threshold: float | None = None) -> dict[str, Any]:
    """The metrics without those of all thresholds but one; None: the winning one.

    >>> at_threshold({"loss": 0.3, "accuracy_0.4": 0.7, "f1_0.4": 0.8, "accuracy_0.5": 0.6, "f1_0.5": 0.9})
    {'loss': 0.3, 'accuracy_0.5': 0.6, 'f1_0.5': 0.9}
    """
    kept = str(winning_threshold(metrics) if threshold is None else threshold)
    others = {name.removeprefix("f1_") for name in metrics if name.startswith("f1_")} - {kept}
    return {name: value for name, value in metrics.items() if name.rpartition("_")[2] not in others}


def format_record(record: Record) -> str:
    """An epoch's record on one line."""
    parts = [f"{record['seconds']:.1f} s, rate {record['rate']:.3g}"]
    threshold = winning_threshold(record.get("validation", {}))
    parts += [f"{p}: {format_metrics(record[p], threshold)}" for p in ("train", "validation") if p in record]
    return "; ".join(parts)


def append_json_line(path: Path, record: Record) -> None:
    """Add an epoch's record to a .jsonl file; NaN, which JSON lacks, becomes null. Where it cannot be, it warns."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json_text(record) + "\n")
    except OSError as error:
        logger.warning("%s: cannot be written (%s)", path, error.strerror)


def check_can_plot(flag: str) -> None:
    """Raise InputError where matplotlib, which only plots need, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"{flag}: matplotlib is not installed: pip install matplotlib, or leave the flag out")


def plot_metrics(history: list[Record], folder: Path, experiment: str) -> None:
    """Write `<experiment>_<metric>.png` per metric: train and validation by epoch. Where it cannot be, it warns."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    try:
        _plot(Figure, history, folder, experiment)
    except OSError as error:
        logger.warning("%s: no plots (%s)", folder, error.strerror)


def _plot(figure_class: Any, history: list[Record], folder: Path, experiment: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {name for record in history for part in ("train", "validation") for name in record.get(part, {})}
    for name in sorted(names):
        figure = figure_class(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="epoch", ylabel=name, title=f"{experiment}: {name}")
        for part in ("train", "validation"):
            points = [(record["epoch"], record[part][name]) for record in history if name in record.get(part, {})]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=part)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        figure.savefig(folder / f"{experiment}_{name}.png", dpi=100)


def markdown_table(header: Sequence[str], rows: list[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def duration(seconds: float) -> str:
    """ "2 h 05 min" or "7 min"."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
