"""What a reproduction found, from the records of its stages: results.json, results.md and plots.

Degradation is (teacher - student) / teacher; a task's is the mean over its seeds, the average is that over tasks.
Spreads are standard deviations over seeds (n - 1); a single seed has none. Differences are taken seed by seed. All
columns of a row are means over the same seeds: a seed that lacks a column which others have is left out of the row.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from itertools import product
from operator import sub
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dse.data.tasks import BINARY, REGRESSION, TASKS, Task
from dse.experiments.presets import OPTIONAL, STAGES, STUDENTS, TEACHER, VARIANTS, as_words
from dse.experiments.reproduction import Experiment, Left, read_record
from dse.system.device import count_of, machine
from dse.system.files import without_nan, write_json, write_text
from dse.training.reporting import duration, markdown_table

PAPER = 0.046
MODELS = {  # of the rows, by stage
    "teacher": "teacher",
    "dse": "DSE",
    "labels_only": "control: labels alone",
    "logits_only": "control: logits alone",
    "sentence_bert": "Sentence-BERT way",
    "encoder": "encoder as downloaded",
}
TRAINED = tuple(stage for stage in MODELS if stage != "encoder")
SPLITS = ("dev", "test")
TIMED = ("teacher", "logits", *STUDENTS, "sentence_bert")
_WORDS = {"tuned_f1": "f1, threshold of dev", "tuned_accuracy": "accuracy, threshold of dev", "pearson": "Pearson",
          "spearman": "Spearman", "mrr": "MRR", "recall_at_1": "recall@1", "recall_at_10": "recall@10"}  # fmt: skip
FINDING = ("mrr", "recall_at_1", "recall_at_10")
Spread = dict[str, Any]  # mean, sd (None of one), n
Records = dict[str, dict[str, Any]]  # by stage, of those that are done
Runs = list[dict[str, Any]]  # the records with their task and seed


def degradation(teacher: float, student: float) -> float | None:
    """(teacher - student) / teacher; None for a teacher at 0."""
    return None if teacher == 0 else (teacher - student) / teacher


_COMPARISONS = {  # by key: heading, the two models, whether dev chooses their thresholds, and how they are compared
    "degradation": ("degradation", "teacher", "dse", False, degradation),
    "dse_minus_labels_only": ("DSE - labels alone", "dse", "labels_only", True, sub),
    "dse_minus_sentence_bert": ("DSE - Sentence-BERT", "dse", "sentence_bert", True, sub),
}


def headline(task: Task, tuned: bool = False) -> str:
    """The metric of degradation: f1, Pearson or accuracy; with `tuned`, above the threshold of dev if there is one."""
    if task.kind == REGRESSION:
        return "pearson"
    name = "f1" if "f1" in task.metrics else "accuracy"
    return f"tuned_{name}" if tuned and task.kind == BINARY else name


def spreads(columns: dict[Any, list[float | None]], left_out: set[int]) -> dict[Any, Spread | None]:
    """Each column's spread over the seeds that all non-empty columns have; the places of others join `left_out`.

    >>> spreads({"teacher": [0.5, 0.75], "dse": [0.5, None], "sentence_bert": [None, None]}, set())["teacher"]
    {'mean': 0.5, 'sd': None, 'n': 1}
    """
    found = [values for values in columns.values() if set(values) - {None}]
    by_seed = list(enumerate(zip(*found, strict=True)))
    whole = [place for place, values in by_seed if None not in values]
    left_out.update(place for place, values in by_seed if None in values and set(values) - {None})

    def spread(values: list[float | None]) -> Spread | None:
        kept = [value for place in whole if (value := values[place]) is not None]
        return {"mean": mean(kept), "sd": stdev(kept) if len(kept) > 1 else None, "n": len(kept)} if kept else None

    return {column: spread(values) for column, values in columns.items()}


def summarize_task(task: Task, by_seed: dict[int, Records]) -> dict[str, Any]:
    """The numbers of a task from the records of each seed."""
    seeds, left_out = list(by_seed.values()), set[int]()
    row = partial(spreads, left_out=left_out)

    def values(stage: str, split: str, name: str) -> list[float | None]:
        return [records.get(stage, {}).get("metrics", {}).get(split, {}).get(name) for records in seeds]

    def compared(key: str, split: str) -> list[float | None]:
        _, one, other, tuned, compare = _COMPARISONS[key]
        pairs = zip(*(values(stage, split, headline(task, tuned)) for stage in (one, other)), strict=True)
        return [None if None in pair else compare(*pair) for pair in pairs]

    metrics = [record["metrics"] for records in seeds for record in records.values() if "metrics" in record]
    names = {split: list(dict.fromkeys(name for each in metrics for name in each.get(split, {}))) for split in SPLITS}
    chosen = dict.fromkeys((headline(task, tuned=True), headline(task)))
    comparisons = row({(key, split): compared(key, split) for key in _COMPARISONS for split in SPLITS})
    done = {stage for records in seeds for stage in records if stage in MODELS}
    return {
        "task": task.name,
        "metric": headline(task),
        "metric_with_threshold_of_dev": headline(task, tuned=True),
        "table": {
            split: {name: row({stage: values(stage, split, name) for stage in MODELS}) for name in names[split]}
            for split in SPLITS
        },
        **{key: {split: comparisons[key, split] for split in SPLITS} for key in _COMPARISONS},
        "variants": {  # means over the seeds that have them all
            split: {name: spreads({stage: values(stage, split, name) for stage in (STUDENTS | VARIANTS)}, set())
                    for name in chosen if name in names[split]}
            for split in SPLITS if any(records.keys() & VARIANTS for records in seeds)
        },
        "minutes": row({stage: [seed[stage]["seconds"] / 60 if stage in seed else None for seed in seeds]
                        for stage in TIMED}),
        "pairs_per_second": next((seed["rates"]["pairs_per_second"] for seed in seeds if "rates" in seed), {}),
        "left_out": {  # seeds, of some rows, with the models that they lack
            str(seed): [stage for stage in MODELS if stage in done - records.keys()]
            for place, (seed, records) in enumerate(by_seed.items()) if place in left_out
        },
    }  # fmt: skip


def tasks_of(works: list[Experiment]) -> dict[str, Task]:
    """The tasks that a table can have, by name: GLUE's, and users' own of this call."""
    return {**{work.task.name: work.task for work in works}, **TASKS}


def read_runs(output_dir: Path, works: list[Experiment]) -> Runs:
    """The records in the folder: of this call's works, and of other calls with the same preset and encoder."""
    preset, encoder = works[0].preset, works[0].encoder
    tasks, runs = tasks_of(works), []
    for folder, stage in product(sorted(output_dir.glob("*_seed*")), STAGES):
        record = read_record(folder / f"{stage}.json")
        if record and (task := tasks.get((settings := record["settings"])["task"])):
            flags = preset.flags(stage, task)
            if settings["bert"] == encoder.hashes and settings.get("flags", flags) == flags:
                runs.append({"task": settings["task"], "seed": settings["seed"], **record})
    order = [(work.task.name, work.seed) for work in works]
    return sorted(runs, key=lambda run: order.index(where) if (where := (run["task"], run["seed"])) in order else -1)


def missing_stages(output_dir: Path, works: list[Experiment], left: Left, runs: Runs) -> dict[str, list[str]]:
    """What is not done, by the folder of its task and seed: what this call has `left`, and what others began here."""
    missing: dict[str, list[str]] = {}
    for work, stage in left:
        missing.setdefault(work.folder.name, []).append(stage)
    done = {(f"{run['task']}_seed{run['seed']}", run["stage"]) for run in runs}
    ours, shown = {work.folder.name for work in works}, {name for name, _ in done}
    for name in sorted(folder.name for folder in output_dir.glob("*_seed*")):
        # A folder with records of which none is in the tables belongs to another preset or encoder.
        begun = name in shown or (name.rpartition("_seed")[0] in TASKS and not any((output_dir / name).glob("*.json")))
        lacks = [stage for stage in STAGES if stage not in OPTIONAL and (name, stage) not in done]
        if begun and lacks and name not in ours:
            missing[name] = lacks
    return missing


def collect(
    output_dir: Path, works: list[Experiment], left: Left, names: dict[str, str], about: dict[str, Any]
) -> dict[str, Any]:
    """All of results.json, from the records in `output_dir`; `names` of tasks that are shown under another one."""
    runs = read_runs(output_dir, works)
    missing = missing_stages(output_dir, works, left, runs)
    by_task: dict[str, dict[int, Records]] = {}
    for run in runs:
        by_task.setdefault(run["task"], {}).setdefault(run["seed"], {})[run["stage"]] = run
    known = tasks_of(works)
    tasks = {names.get(name, name.upper()): summarize_task(known[name], seeds) for name, seeds in by_task.items()}
    dev, test = ([task["degradation"][split]["mean"] for task in tasks.values() if task["degradation"][split]]
                 for split in SPLITS)  # fmt: skip
    return without_nan({
        "average_relative_degradation": mean(dev) if dev else None,
        "average_relative_degradation_test": mean(test) if test else None,
        "paper": PAPER,
        **about,
        "complete": not missing,
        "missing": missing,
        "machine": machine(),  # of the last call
        "tasks": tasks,
        "runs": runs,
    })  # fmt: skip


def can_plot() -> bool:
    """Whether matplotlib, which only plots need, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def write_results(results: dict[str, Any], folder: Path) -> bool:
    """Write results.json and results.md; draw the plots, and return True, once all is done and matplotlib is there."""
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", to_markdown(results))
    if draws := results["complete"] and can_plot():
        draw(results, folder)
    return draws


def show(value: Spread | None, form: str = ".3f") -> str:
    """ "0.861 ± 0.004", with the form "+.1%" "+1.2 % ± 0.3 %"; "-" for nothing."""
    if value is None:
        return "-"
    spread = [format(value["sd"], form.lstrip("+"))] if value["sd"] else []  # 0: no seed changes it
    return " ± ".join([format(value["mean"], form), *spread]).replace("%", " %")


def to_markdown(results: dict[str, Any]) -> str:
    """results.md: what was run; quality, finding, differences, minutes; variants, where they were made."""
    variants = variants_table(results) if any(task["variants"] for task in results["tasks"].values()) else ""
    tables = [make(results) for make in (quality_table, finding_table, compared_table, minutes_table)]
    parts = [introduction(results), *tables, variants]
    return "\n\n".join(filter(None, parts)) + "\n"


def quality_table(results: dict[str, Any], headlines_only: bool = False) -> str:
    """Each metric of pairs of each task, a column for each model; with `headlines_only`, one metric of each split."""
    return _metrics_table(results, list(MODELS), lambda task, metric: (
        metric not in FINDING and (not headlines_only or metric == task["metric_with_threshold_of_dev"])
    ))  # fmt: skip


def finding_table(results: dict[str, Any]) -> str:
    """How each model finds true partners (predictions.find_partners); a teacher has to read too many pairs for it."""
    return _metrics_table(results, list(MODELS)[1:], lambda task, metric: metric in FINDING)


def _metrics_table(results: dict[str, Any], models: list[str], wanted: Callable[[dict[str, Any], str], bool]) -> str:
    rows = [
        (name, f"{split} {_WORDS.get(metric, metric)}", *(show(values.get(stage)) for stage in models))
        for name, task in results["tasks"].items()
        for split, metrics in task["table"].items()
        for metric, values in metrics.items()
        if wanted(task, metric)
    ]
    return markdown_table(("task", "metric", *(MODELS[stage] for stage in models)), rows)


def compared_table(results: dict[str, Any]) -> str:
    """Degradation and differences of each task, and the average degradation beside the paper's."""
    tasks, forms = results["tasks"], {key: "+.1%" if key == "degradation" else "+.3f" for key in _COMPARISONS}
    rows = [
        (name, *(show(task[key][split], form) for key, form in forms.items() for split in SPLITS))
        for name, task in tasks.items()
    ]
    averages = [results[f"average_relative_degradation{end}"] for end in ("", "_test")]
    shown = ["-" if value is None else f"{100 * value:+.1f} %" for value in averages]
    of = [sum(task["degradation"][split] is not None for task in tasks.values()) for split in SPLITS]
    rows.append((f"average of {of[0]} and {of[1]}", *shown, *[""] * 4))
    rows.append(("the paper, BERT-large, five tasks", f"{100 * PAPER:+.1f} %", *[""] * 5))
    headings = [f"{heading}, {split}" for heading, *_ in _COMPARISONS.values() for split in SPLITS]
    return markdown_table(("task", *headings), rows)


def minutes_table(results: dict[str, Any]) -> str:
    """Minutes of each stage, means over seeds."""
    rows = [
        (name, *(show(each and {**each, "sd": None}, ".1f") for each in task["minutes"].values()))
        for name, task in results["tasks"].items()
    ]
    return markdown_table(("minutes per run", *(MODELS.get(stage, stage) for stage in TIMED)), rows)


def variants_table(results: dict[str, Any]) -> str:
    """What one other setting makes of DSE's student: a table for each task whose variants were trained."""
    tables = []
    for name, task in results["tasks"].items():
        columns = {(split, metric): row for split, rows in task["variants"].items() for metric, row in rows.items()}
        header = (f"{name}, student", *(f"{split} {_WORDS.get(metric, metric)}" for split, metric in columns))
        trained = [stage for stage in (STUDENTS | VARIANTS) if any(row.get(stage) for row in columns.values())]
        rows = [(told(stage), *(show(row[stage]) for row in columns.values())) for stage in trained]
        tables += [markdown_table(header, rows)] if columns else []
    return "\n\n".join(tables)


def told(stage: str) -> str:
    """How a student's flags differ from those of the preset, in words.

    >>> told("labels_only"), told("one_rate")
    ('`--distillation_coeff 0.0`', 'without `--head_lr`')
    """
    changes = (STUDENTS | VARIANTS)[stage]
    added = [
        word for name, value in changes.items() if value not in (None, TEACHER) for word in as_words({name: value})
    ]
    without = " ".join(f"`--{name}`" for name, value in changes.items() if value is None)
    parts = [f"`{' '.join(added)}`" if added else "", f"without {without}" if without else "",
             "`--bert_model` is the teacher" if TEACHER in changes.values() else ""]  # fmt: skip
    return ", ".join(filter(None, parts)) or "DSE"


def in_one_line(results: dict[str, Any]) -> str:
    """DSE against its teacher on the dev sets, and the average degradation."""
    parts = []
    for name, task in results["tasks"].items():
        metric = task["metric_with_threshold_of_dev"]
        teacher, student = (show(task["table"]["dev"][metric][model]) for model in ("teacher", "dse"))
        word = _WORDS.get(metric, metric).partition(",")[0]
        parts.append(f"{word} {student} on {name} (teacher: {teacher})")
    lost = 100 * results["average_relative_degradation"]
    return (
        f"On dev sets, DSE reaches {', '.join(parts)}. The average relative degradation is {lost:+.1f} % (the paper's, "
        f"with BERT-large on five tasks: {100 * PAPER:+.1f} %)."
    )


def introduction(results: dict[str, Any]) -> str:
    """What was run, where, with which seeds, and how long all of it took."""
    runs, tasks = results["runs"], results["tasks"]
    seeds = "; ".join(
        f"{name} {', '.join(dict.fromkeys(str(run['seed']) for run in runs if run['task'] == task['task']))}"
        for name, task in tasks.items()
    )
    versions = sorted({f"{name} {number}" for run in runs for name, number in run["versions"].items()})
    took = duration(sum(run["seconds"] for run in runs))
    where = results["machine"]["gpu"] or f"{results['machine']['processor']}, {count_of(results['machine']['threads'])}"
    lacks = [f"{name} lacks {', '.join(stages)}" for name, stages in results["missing"].items()]
    state = f"Not complete: {'; '.join(lacks)}. " if lacks else ""
    left_out = [
        f"{name} {seed} (without {', '.join(MODELS[stage] for stage in lacking) or 'some metric'})"
        for name, task in tasks.items() for seed, lacking in task["left_out"].items()
    ]  # fmt: skip
    of_all = f"Rows are means over the seeds that have all their columns: {'; '.join(left_out)} left out. "
    return (
        f"{state}`{results['command']}`: {took} in all, {where}, {', '.join(versions)}. Mean ± standard deviation over "
        f"seeds ({seeds}). {of_all if left_out else ''}Students and Sentence-BERT count with their best epoch on dev, "
        "a teacher with its last."
    )


def draw(results: dict[str, Any], folder: Path) -> None:
    """plots/<task>_by_epoch.png, the metric on dev, and plots/speed.png."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    (folder / "plots").mkdir(exist_ok=True)
    for name, task in results["tasks"].items():
        metric = task["metric"]
        keys = (metric, f"{metric}_0.5", f"tuned_{metric}", "acc")  # as the stages name it; "acc": a teacher's accuracy
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="epoch", ylabel=f"{metric} on dev", title=name)
        for run in (run for run in results["runs"] if run["task"] == task["task"] and run["stage"] in TRAINED):
            on_dev = [next(epoch["validation"][key] for key in keys if key in epoch["validation"])
                      for epoch in run["history"]]  # fmt: skip
            color = f"C{list(MODELS).index(run['stage'])}"
            # A value that is undefined is None here, and leaves a gap.
            axes.plot(range(len(on_dev)), on_dev, marker="o", color=color, alpha=0.7, label=MODELS[run["stage"]])
        axes.locator_params("x", integer=True)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one of all seeds
        axes.legend(handles.values(), handles.keys())
        figure.savefig(folder / "plots" / f"{name}_by_epoch.png", dpi=100)
    draw_speed(results, folder / "plots" / "speed.png")


def draw_speed(results: dict[str, Any], path: Path) -> None:
    """Quality on dev (threshold of dev) against pairs scored per second, a panel for each task."""
    from matplotlib.figure import Figure

    tasks = results["tasks"]
    figure = Figure(figsize=(3.6 * len(tasks) + 0.4, 3.4), layout="constrained")
    for number, (name, task) in enumerate(tasks.items(), 1):
        metric = task["metric_with_threshold_of_dev"]
        axes = figure.add_subplot(1, len(tasks), number, title=name, xscale="log", xlabel="pairs scored per second")
        axes.set_ylabel(f"{_WORDS.get(metric, metric)}, dev")
        for place, (stage, label) in enumerate(MODELS.items()):
            value, rate = task["table"]["dev"][metric].get(stage), task["pairs_per_second"].get(stage)
            if value and rate:  # None: undefined, or not measured
                axes.errorbar(
                    rate, value["mean"], yerr=value["sd"], marker="o", capsize=3, color=f"C{place}", label=label
                )
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=100)
