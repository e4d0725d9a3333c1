"""What a check of a GPU found: told line by line, kept as JSON, and as Markdown."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from dse.system.errors import one_line
from dse.system.files import write_json
from dse.training.reporting import markdown_table


class Report:
    """What was found, told line by line and kept in a JSON file, so that a run that is killed has told something."""

    def __init__(self, path: str | Path, about: dict[str, Any]) -> None:
        self.path, self.section, self.rows = path, "", list[dict[str, Any]]()
        self.found: dict[str, Any] = {**about, "seconds": {}, "rows": self.rows}

    def add(
        self, what: str, value: Any, limit: float | None = None, goal: float | None = None, held: bool | None = None,
        **more: Any,
    ) -> None:  # fmt: skip
        """A number that must be at most `limit`, or that should reach `goal`, or a word; `more` goes with it."""
        if not isinstance(value, str):
            value = float(value)
            held = value <= limit if limit is not None else value >= goal if goal is not None else held
        row = {"section": self.section, "what": what, "value": value, "limit": limit, "goal": goal, "held": held}
        self.rows.append({**row, "more": {name: x if isinstance(x, str) else float(x) for name, x in more.items()}})
        print("  ".join(filter(None, _cells(self.rows[-1]))), flush=True)

    @contextmanager
    def caught(self, what: str) -> Iterator[None]:
        """An error that ends the block is told as a check that failed."""
        try:
            yield
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{one_line(error)} ({Path(frame.filename).name}:{frame.lineno})"
            self.add(what, why, held=False, trace=traceback.format_exc())
        gc.collect()
        with suppress(RuntimeError):  # of a GPU whose last error stays: each later section tells it
            torch.cuda.empty_cache()

    def run(self, name: str, section: Callable[[], None]) -> None:
        """Run a section, and write the file."""
        self.section, started = name, time.monotonic()
        try:
            with self.caught(name):
                torch.manual_seed(0)
                section()
        finally:  # of a run that is stopped, too
            self.found["seconds"][name] = round(time.monotonic() - started, 1)
            write_json(self.path, self.found)
        print(f"{name}: {self.found['seconds'][name]} s", flush=True)

    def table(self) -> str:
        """All rows as a Markdown table."""
        header = ("section", "what", "value", "limit", "held", "more")
        return markdown_table(header, [[cell.replace("|", "/") for cell in _cells(row)] for row in self.rows])

    def failed(self) -> list[str]:
        """What did not hold, goals aside."""
        rows = [row for row in self.rows if row["held"] is False and row["goal"] is None]
        return [f"{row['section']}: {row['what']}" for row in rows]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text."""

    def show(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else value

    limit = f"goal >= {row['goal']:g}" if row["goal"] is not None else ""
    limit = f"<= {row['limit']:g}" if row["limit"] is not None else limit
    held = {None: "", True: "held", False: "FAILED" if row["goal"] is None else "missed"}[row["held"]]
    more = (f"{name.replace('_', ' ')} {show(x)}" for name, x in row["more"].items() if name != "trace")
    return row["section"], row["what"], show(row["value"]), limit, held, ", ".join(more)


def _row(found: dict[str, Any], section: str, what: str) -> dict[str, Any]:
    """A row's numbers by name, its value as `value`; {} if there is none."""
    rows = (row for row in found["rows"] if (row["section"], row["what"]) == (section, what))
    return next(({"value": row["value"], **row["more"]} for row in rows), {})


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def in_one_line(found: dict[str, Any]) -> str:
    """Which card it was, and how many checks held."""
    checks = [row["held"] for row in found["rows"] if row["goal"] is None and row["held"] is not None]
    gpu, versions = found["machine"]["gpu"], found["machine"]["versions"]
    return f"On an {gpu} with torch {versions['torch']}, {sum(checks)} of {len(checks)} checks hold."


def checks_table(found: dict[str, Any]) -> str:
    """How many checks of each section held, and which was nearest to its limit."""
    rows = []
    for section in found["seconds"]:
        checks = [row for row in found["rows"] if row["section"] == section and row["held"] is not None]
        checks = [row for row in checks if row["goal"] is None]
        limited = [row for row in checks if row["limit"]]
        if checks:
            worst = max(limited, key=lambda row: row["value"] / row["limit"], default=None)
            told = f"{worst['what']}: {worst['value']:.1e} of {worst['limit']:g}" if worst else "-"
            rows.append((section, f"{sum(row['held'] for row in checks)} of {len(checks)}", told))
    return markdown_table(("section", "held", "nearest to its limit"), rows)


def updates_table(found: dict[str, Any]) -> str:
    """Updates of student and teacher by precision and layout."""
    rows = []
    ending = ": share of the peak"
    for row in found["rows"]:
        if row["section"] == "updates" and row["what"].endswith(ending):
            name, more = row["what"].removesuffix(ending), row["more"]
            used = _row(found, "transfers", f"{name}: reads by the host")
            cells = ["-"] * 3
            if used:
                cells = [f"{used[count]:,.0f}" for count in ("launches", "kernels")] + [_percent(used["idle_share"])]
            rate, memory = f"{more['useful_TFLOPs']:.0f}", f"{more['GiB_reserved']:.1f}"
            rows.append((name, f"{more['ms']:.1f}", rate, _percent(row["value"]), memory, *cells))
    header = ("update", "ms", "useful TFLOP/s", "of the matrix peak", "GiB", "launches", "kernels", "GPU idle")
    return markdown_table(header, rows)


def kernels_table(found: dict[str, Any]) -> str:
    """Milliseconds of the GPU in an update, by what its kernels are for."""
    kinds, ending, rows = ("products", "attention", "lists", "rest"), ": ms of the device", []
    for row in found["rows"]:
        if row["section"] == "transfers" and row["what"].endswith(f", packed{ending}"):
            cells = (f"{row['more'].get(kind, 0.0):.1f}" for kind in kinds)
            rows.append((row["what"].removesuffix(ending), *cells, f"{row['value']:.1f}"))
    return markdown_table(("ms of an update", *kinds, "in all"), rows)


def states_line(found: dict[str, Any]) -> str:
    """What it costs to write a state."""
    turns = ("first", "second")
    first, second = (_row(found, "states", f"{turn} save: seconds that the update is held up") for turn in turns)
    return (
        f"A state of {first['GiB']:.1f} GiB holds up the training for {first['value']:.1f} s the first time, when "
        f"memory is set aside for it, and for {second['value']:.2f} s later. It is on the disk after "
        f"{second['on_disk_after']:.1f} s."
    )


def encoding_table(found: dict[str, Any]) -> str:
    """Shares of the matrix peak in encoding, by precision and tokens in a step."""
    shares = [row for row in found["rows"] if row["section"] == "encode"]
    names = [row["what"].partition(" tokens")[0].split(", ") for row in shares]
    places = list(dict.fromkeys(size for _, size in names))
    rows = {precision: [precision] for precision, _ in names}
    for row, (precision, _) in zip(shares, names, strict=True):
        rows[precision].append(_percent(row["value"]))
    return markdown_table(("precision", *(f"{int(size):,} tokens" for size in places)), list(rows.values()))


def searches_table(found: dict[str, Any]) -> str:
    """Seconds of searches, by where the candidates are."""
    rows = []
    for count in (1, 64):
        before = _row(found, "search", f"queries {count}: copied for each call, seconds")["value"]
        ways = [_row(found, "search", f"queries {count}: {way}, gain") for way in ("streamed", "resident")]
        rows.append((str(count), *(f"{seconds:.3f}" for seconds in (before, *(way["seconds"] for way in ways)))))
    header = ("queries", "copied for each call, s", "streamed, s", "kept on the GPU, s")
    return markdown_table(header, rows)


def summary(found: dict[str, Any]) -> str:
    """A few rows, for the README."""
    wanted = {
        "student's update, bf16": "student, bf16, packed",
        "with `--dropout 0`": "student without dropout, bf16, packed",
        "with `--padding batch`": "student, bf16, batch",
    }
    rows = []
    for name, what in wanted.items():
        row = _row(found, "updates", f"{what}: share of the peak")
        rows.append((name, f"{row['ms']:.0f}", _percent(row["value"])))
    encoding = _row(found, "encode", "bf16, 32768 tokens: share of the peak")
    rows.append(("4,096 texts encoded, bf16", f"{1e3 * encoding['seconds']:.0f}", _percent(encoding["value"])))
    query = _row(found, "search", "queries 1: resident, gain")
    rows.append(("a query, 100,000 candidates", f"{1e3 * query['seconds']:.0f}", "-"))
    return markdown_table(("BERT-large, 2 x 16 pairs like MRPC's", "ms", "of the matrix peak"), rows)
