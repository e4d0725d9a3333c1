"""What a training reports: log lines, one JSON line per epoch, curves."""

import importlib.util
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dse.data.tasks import at_threshold, winning_threshold
from dse.system import parallel
from dse.system.errors import InputError
from dse.system.files import json_text, write_text

logger = logging.getLogger(__name__)
RESULTS = "eval_results.txt"  # of a teacher
Record = dict[str, Any]  # of an epoch: epoch, train metrics, validation metrics if any, updates, rate, seconds


def format_metrics(metrics: dict[str, Any], threshold: float | None = None) -> str:
    """Metrics on one line, four decimals; of several thresholds, only one (`at_threshold`)."""
    return ", ".join(f"{name} {show_number(value)}" for name, value in at_threshold(metrics, threshold).items())


def show_number(value: float | None) -> str:
    """Four decimals; "undefined" for NaN, which JSON gives back as None."""
    return "undefined" if value is None or math.isnan(value) else f"{value:.4f}"


def format_record(record: Record) -> str:
    """An epoch's record on one line."""
    parts = [f"{record['seconds']:.1f} s, rate {record['rate']:.3g}"]
    threshold = winning_threshold(record.get("validation", {}))
    parts += [f"{p}: {format_metrics(record[p], threshold)}" for p in ("train", "validation") if p in record]
    return "; ".join(parts)


def append_json_line(path: Path, record: Record) -> None:
    """Add an epoch's record to a .jsonl file; NaN, which JSON lacks, becomes null. Warns if that fails."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json_text(record) + "\n")
    except OSError as error:
        logger.warning("%s: cannot be written (%s)", path, error.strerror)


def results_dirs(folder: Path, also_validate: Sequence[Sequence[str]]) -> dict[str, Path]:
    """The folder of the results on each evaluated set: dev and, for MNLI, mm, its mismatched dev set."""
    if "mm" not in [split for split, _ in also_validate]:
        return {"dev": folder}
    named = folder.resolve() if folder.name in ("", "..") else folder
    return {"dev": folder, "mm": named.parent / f"{named.name}-MM"}


def write_results(folder: Path, metrics: dict[str, Any], updates: int, train_loss: float | None) -> None:
    """Write eval_results.txt: sorted `key = value` lines."""
    if not parallel.is_first():
        return
    metrics = {name: math.nan if value is None else value for name, value in metrics.items()}  # as JSON gave it back
    results = {**metrics, "eval_loss": metrics["loss"], "global_step": updates, "loss": train_loss}
    lines = [f"{key} = {value}" for key, value in sorted(results.items())]
    write_text(folder / RESULTS, "\n".join(lines) + "\n")
    logger.info("%s: %s", folder / RESULTS, ", ".join(lines))


def check_can_plot(flag: str) -> None:
    """Raise InputError if matplotlib, which only plots need, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"{flag}: matplotlib is not installed: pip install matplotlib, or leave the flag out")


def plot_metrics(history: list[Record], folder: Path, experiment: str) -> None:
    """Write `<experiment>_<metric>.png` per metric: train and validation by epoch. Warns if that fails."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    parts = ("train", "validation")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted({name for record in history for part in parts for name in record.get(part, {})}):
            figure = Figure(figsize=(6, 4), layout="constrained")
            axes = figure.add_subplot(xlabel="epoch", ylabel=name, title=f"{experiment}: {name}")
            for part in parts:
                points = [(record["epoch"], record[part][name]) for record in history if name in record.get(part, {})]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", label=part)
            axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # the default locator's
            axes.legend()
            figure.savefig(folder / f"{experiment}_{name}.png", dpi=100)
    except OSError as error:
        logger.warning("%s: plots cannot be written (%s)", folder, error.strerror)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def duration(seconds: float) -> str:
    """ "2 h 05 min" or "7 min"."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
