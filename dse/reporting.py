"""What is told of a training: log lines, one JSON line per epoch, curves."""

import importlib.util
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dse.files import InputError

logger = logging.getLogger(__name__)
Record = dict[str, Any]  # of an epoch: epoch, train metrics, validation metrics if any, updates, rate, seconds


def format_metrics(metrics: dict[str, float]) -> str:
    """Metrics on one line, four decimals."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def format_record(record: Record) -> str:
    """An epoch's record on one line."""
    parts = [f"{record['seconds']:.1f} s, rate {record['rate']:.3g}"]
    parts += [f"{part}: {format_metrics(record[part])}" for part in ("train", "validation") if part in record]
    return "; ".join(parts)


def append_json_line(path: Path, record: Record) -> None:
    """Add an epoch's record to a .jsonl file; NaN, which JSON lacks, becomes null. Where it cannot be, it warns."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(record)) + "\n")
    except OSError as error:
        logger.warning("%s: cannot be written (%s)", path, error.strerror)


def without_nan(value: Any) -> Any:
    """The same for JSON: NaN and infinities become None."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
