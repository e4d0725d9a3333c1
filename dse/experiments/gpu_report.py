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
        with self.caught(name):
            torch.manual_seed(0)
            section()
        self.found["seconds"][name] = round(time.monotonic() - started, 1)
        print(f"{name}: {self.found['seconds'][name]} s", flush=True)
        write_json(self.path, self.found)

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


def summary(found: dict[str, Any]) -> str:
    """A few rows of what a check found, for the README."""
    by_name = {(row["section"], row["what"]): row for row in found["rows"]}
    wanted = {
        "update of a student, bf16": ("updates", "student, bf16, packed: share of the peak"),
        "the same with `--dropout 0`": ("updates", "student without dropout, bf16, packed: share of the peak"),
        "the same padded, `--padding batch`": ("updates", "student, bf16, batch: share of the peak"),
        "update of a student, tf32": ("updates", "student, tf32, packed: share of the peak"),
        "update of a student, fp32": ("updates", "student, fp32, packed: share of the peak"),
        "update of a teacher, bf16": ("updates", "teacher, bf16, packed: share of the peak"),
        "encoding 4,096 texts, bf16": ("encode", "bf16, 32768 tokens: share of the peak"),
    }
    rows = []
    for name, key in wanted.items():
        row = by_name[key]
        ms = row["more"].get("ms") or 1e3 * row["more"]["seconds"]
        rows.append((name, f"{ms:.1f}", f"{row['value']:.0%}".replace("%", " %")))
    one = by_name["search", "queries 1: resident, gain"]
    rows.append(("a query against 100,000 candidates", f"{1e3 * one['more']['seconds']:.0f}", "-"))
    return markdown_table(("BERT-large, 2 x 16 pairs of MRPC's lengths", "ms", "of the card's matrix peak"), rows)


def in_one_line(found: dict[str, Any]) -> str:
    """Which card it was, and how many checks held."""
    checks = [row for row in found["rows"] if row["goal"] is None and row["held"] is not None]
    held = sum(row["held"] for row in checks)
    machine = found["machine"]
    return (
        f"On an {machine['gpu']} with torch {machine['versions']['torch']}, {held} of {len(checks)} checks hold, such "
        "as embeddings, the original's trainings, resumed runs and searches against the CPU's."
    )
