"""What a reproduction found, from the records of its stages: results.json, results.md and plots.

Degradation is (teacher - student) / teacher; a task's is the mean over seeds, the average that over tasks. Spreads are
standard deviations over seeds (n - 1), and there is none of a single seed. Differences are taken seed by seed.
"""

import importlib.util
import logging
import math
import platform
from collections.abc import Callable, Sequence
from operator import sub
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dse.files import without_nan, write_json, write_text
from dse.processors import Task, get_task
from dse.reporting import duration, markdown_table
from dse.reproduction import OPTIONAL, STAGES, Work, headline, read_record

logger = logging.getLogger(__name__)

PAPER = 0.046
MODELS = {  # of the rows, by stage
    "teacher": "teacher",
    "dse": "DSE",
    "labels_only": "control: labels alone",
    "logits_only": "control: logits alone",
    "sentence_bert": "Sentence-BERT way",
}
TIMED = tuple(stage for stage in STAGES if stage != "rates")
_WORDS = {"tuned_f1": "f1, threshold of dev", "tuned_accuracy": "accuracy, threshold of dev", "pearson": "Pearson",
          "spearman": "Spearman"}  # fmt: skip
Spread = dict[str, Any]  # mean, sd (None of one), n


def degradation(teacher: float, student: float) -> float | None:
    """(teacher - student) / teacher; None of a teacher at 0."""
    return None if teacher == 0 else (teacher - student) / teacher


def spread(values: Sequence[float]) -> Spread | None:
    """Mean, standard deviation and number of values; None where there are none."""
    if not values:
        return None
    return {"mean": mean(values), "sd": stdev(values) if len(values) > 1 else None, "n": len(values)}


def summarize_task(task: Task, records: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The numbers of a task.

    Args:
        records: by seed, the records of the stages that are done.
    """

    def values(stage: str, split: str, name: str) -> list[float]:
        found = [of_seed[stage]["metrics"].get(split, {}).get(name) for of_seed in records if stage in of_seed]
        return [value for value in found if value is not None]

    def paired(one: str, other: str, split: str, name: str, compare: Callable[[float, float], Any]) -> Spread | None:
        of_both = [(of_seed[one], of_seed[other]) for of_seed in records if one in of_seed and other in of_seed]
        pairs = [[record["metrics"].get(split, {}).get(name) for record in both] for both in of_both]
        compared = [compare(a, b) for a, b in pairs if a is not None and b is not None]
        return spread([value for value in compared if value is not None])

    metrics = [record["metrics"] for of_seed in records for record in of_seed.values() if "metrics" in record]
    names = {
        split: list(dict.fromkeys(name for each in metrics for name in each.get(split, {})))
        for split in ("dev", "test")
    }
    plain, tuned = headline(task), headline(task, tuned=True)
    return {
        "task": task.name,
        "metric": plain,
        "metric_with_threshold_of_dev": tuned,
        "table": {
            split: {name: {stage: spread(values(stage, split, name)) for stage in MODELS} for name in names[split]}
            for split in names
        },
        "degradation": {
            split: paired("teacher", "dse", split, plain, degradation) for split in names
        },
        "dse_minus_labels_only": {split: paired("dse", "labels_only", split, tuned, sub) for split in names},
        "dse_minus_sentence_bert": {split: paired("dse", "sentence_bert", split, tuned, sub) for split in names},
        "minutes": {
            stage: spread([seed[stage]["seconds"] / 60 for seed in records if stage in seed]) for stage in TIMED
        },
        "pairs_per_second": next((seed["rates"]["pairs_per_second"] for seed in records if "rates" in seed), {}),
    }  # fmt: skip


def average_degradation(tasks: dict[str, dict[str, Any]], split: str) -> float | None:
    """The mean over the tasks that have it."""
    found = [task["degradation"][split]["mean"] for task in tasks.values() if task["degradation"][split]]
    return mean(found) if found else None


def read_runs(output_dir: Path, works: list[Work]) -> list[dict[str, Any]]:
    """The records in the folder: of this call's works, and of other calls with the same preset and encoder."""
    preset, encoder = works[0].preset, works[0].encoder
    runs = []
    for folder in sorted(output_dir.glob("*_seed*")):
        for stage in STAGES:
            record = read_record(folder / f"{stage}.json")
            if record is None:
                continue
            settings = record["settings"]
            flags = preset.flags(stage, get_task(settings["task"]))
            if settings["bert"] == encoder.hashes and settings.get("flags", flags) == flags:
                runs.append({"task": settings["task"], "seed": settings["seed"], **record})
    order = [(work.task.name, work.seed) for work in works]
    return sorted(runs, key=lambda run: order.index(where) if (where := (run["task"], run["seed"])) in order else -1)


def collect(output_dir: Path, works: list[Work], names: dict[str, str], about: dict[str, Any]) -> dict[str, Any]:
    """All of results.json.

    Args:
        output_dir: of the records; stages that are not done are left out.
        works: of this call.
        names: what tasks are called, if otherwise.
        about: command, preset and whether all is done.
    """
    runs = read_runs(output_dir, works)
    by_task: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
    for run in runs:
        by_task.setdefault(run["task"], {}).setdefault(run["seed"], {})[run["stage"]] = run
    tasks = {
        names.get(name, name.upper()): summarize_task(get_task(name), list(by_seed.values()))
        for name, by_seed in by_task.items()
    }
    shown = [of_seed for by_seed in by_task.values() for of_seed in by_seed.values()]
    # Another call's task or seed in the tables may be half done.
    whole = all({*STAGES} - {*OPTIONAL} <= of_seed.keys() for of_seed in shown)
    return without_nan({
        "average_relative_degradation": average_degradation(tasks, "dev"),
        "average_relative_degradation_test": average_degradation(tasks, "test"),
        "paper": PAPER,
        **about,
        "complete": about["complete"] and whole,
        "machine": machine(),
        "tasks": tasks,
        "runs": runs,
    })  # fmt: skip


def machine() -> dict[str, Any]:
    """Where the command ran last."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"system": platform.platform(), "threads": torch.get_num_threads(), "gpu": gpu}


def can_plot() -> bool:
    """Is matplotlib, which only plots need, installed?"""
    return importlib.util.find_spec("matplotlib") is not None


def write_results(results: dict[str, Any], folder: Path) -> None:
    """results.json, results.md, and the plots where matplotlib is installed."""
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", to_markdown(results))
    if results["complete"] and can_plot():
        draw(results, folder)


def show(value: Spread | None, percent: bool = False) -> str:
    """ "0.861 ± 0.004", "+1.2 % ± 0.3 %", or "-" for nothing."""
    if value is None:
        return "-"
    numbers = [value["mean"], *([] if value["sd"] is None else [value["sd"]])]
    if percent:
        return " ± ".join(f"{100 * number:{'' if i else '+'}.1f} %" for i, number in enumerate(numbers))
    return " ± ".join(f"{number:.3f}" for number in numbers)


def signed(value: Spread | None) -> str:
    """A difference, with its sign."""
    return show(value) if value is None or value["mean"] < 0 else f"+{show(value)}"


def to_markdown(results: dict[str, Any]) -> str:
    """results.md: quality, degradation and differences, minutes."""
    tasks = results["tasks"]
    quality = [
        (name, f"{split} {_WORDS.get(metric, metric)}", *(show(values[stage]) for stage in MODELS))
        for name, task in tasks.items()
        for split, metrics in task["table"].items()
        for metric, values in metrics.items()
    ]
    compared = [
        (name, *(show(task["degradation"][split], percent=True) for split in ("dev", "test")),
         *(signed(task[key][split]) for key in ("dse_minus_labels_only", "dse_minus_sentence_bert")
           for split in ("dev", "test")))
        for name, task in tasks.items()
    ]  # fmt: skip
    averages = [results["average_relative_degradation"], results["average_relative_degradation_test"]]
    shown = ["-" if value is None else f"{100 * value:+.1f} %" for value in averages]
    of = [sum(task["degradation"][split] is not None for task in tasks.values()) for split in ("dev", "test")]
    compared.append((f"average of {of[0]} and {of[1]}", *shown, "", "", "", ""))
    compared.append(("the paper, BERT-large, five tasks", f"{100 * PAPER:+.1f} %", "", "", "", "", ""))
    minutes = [
        (name, *("-" if task["minutes"][stage] is None else f"{task['minutes'][stage]['mean']:.1f}" for stage in TIMED))
        for name, task in tasks.items()
    ]
    sides = ("dev", "test")
    return "\n\n".join([
        introduction(results),
        markdown_table(("task", "metric", *MODELS.values()), quality),
        markdown_table(
            ("task", *(f"degradation, {side}" for side in sides), *(f"DSE - labels alone, {side}" for side in sides),
             *(f"DSE - Sentence-BERT, {side}" for side in sides)), compared,
        ),
        markdown_table(("minutes per run", *(MODELS.get(stage, stage) for stage in TIMED)), minutes),
    ]) + "\n"  # fmt: skip


def introduction(results: dict[str, Any]) -> str:
    """What was run, where, with which seeds, and how long all of it took."""
    runs, seeds = results["runs"], {}
    for run in runs:
        seeds.setdefault(run["task"], {})[str(run["seed"])] = None
    names = {task["task"]: name for name, task in results["tasks"].items()}
    of_tasks = "; ".join(f"{names[task]} {', '.join(of_task)}" for task, of_task in seeds.items())
    versions = sorted({f"{name} {number}" for run in runs for name, number in run["versions"].items()})
    took = duration(sum(run["seconds"] for run in runs))
    where = results["machine"]["gpu"] or f"CPU, {results['machine']['threads']} threads"
    state = "" if results["complete"] else "Not complete: what has been done so far. "
    return (
        f"{state}`{results['command']}`: {took} in all, {where}, {', '.join(versions)}. Mean ± standard deviation over "
        f"seeds ({of_tasks}). Epochs of students and of Sentence-BERT are chosen on dev, a teacher's is its last."
    )


def draw(results: dict[str, Any], folder: Path) -> None:
    """plots/<task>_by_epoch.png (metric on dev) and plots/<task>_speed.png (metric against pairs scored per second)."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    (folder / "plots").mkdir(exist_ok=True)
    for name, task in results["tasks"].items():
        metric, runs = task["metric"], [run for run in results["runs"] if run["task"] == task["task"]]
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="epoch", ylabel=f"{metric} on dev", title=name)
        for run in (run for run in runs if run["stage"] in MODELS):
            points = [(epoch["epoch"], on_dev(epoch["validation"], metric) or math.nan) for epoch in run["history"]]
            color = f"C{list(MODELS).index(run['stage'])}"
            axes.plot(*zip(*points, strict=True), marker="o", color=color, alpha=0.7, label=MODELS[run["stage"]])
        axes.xaxis.get_major_locator().set_params(integer=True)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one of all seeds
        axes.legend(handles.values(), handles.keys())
        figure.savefig(folder / "plots" / f"{name}_by_epoch.png", dpi=100)

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="pairs scored per second", ylabel=f"{metric} on dev", title=name, xscale="log")
        for stage, rate in task["pairs_per_second"].items():
            value = task["table"]["dev"][metric][stage]
            if value is None:  # NaN
                continue
            axes.errorbar(rate, value["mean"], yerr=value["sd"], marker="o", capsize=3, label=MODELS[stage])
        axes.legend()
        figure.savefig(folder / "plots" / f"{name}_speed.png", dpi=100)


def on_dev(metrics: dict[str, float], metric: str) -> float:
    """A metric of an epoch's record: teachers, students and Sentence-BERT name it differently."""
    names = (metric, f"{metric}_0.5", f"tuned_{metric}", {"accuracy": "acc"}.get(metric))
    return next(metrics[name] for name in names if name in metrics)
