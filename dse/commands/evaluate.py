"""Measure a student or teacher on labelled pairs: metrics with 95 % intervals, per label, confusions, scores by row.

    python -m dse evaluate --model FOLDER --task_name mrpc --data_dir glue_data/MRPC --split dev
    python -m dse evaluate --model my_run/student --data more_pairs.csv --rows rows.tsv

--data is a file with the columns of the model's own task. Intervals are those of a percentile bootstrap over rows.
--rows has a line per row: its number in the file, from 0, id (--id_column), texts, label, predicted label, score and
probability. The last two are the log-odds and the probability of the rank label or, in tasks of three labels or more,
of the predicted one; a regression has a score alone. Rows without a label do not count in the metrics.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dse import cli
from dse.commands import logger
from dse.data.processors import Examples, column_of, read_examples, split_files
from dse.data.tasks import Task, check_threshold, get_task
from dse.system.device import describe_device, select_device
from dse.system.errors import InputError
from dse.system.files import check_file, check_output_file, json_text, write_json, write_text
from dse.system.text_files import tsv_line


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    add("--model", required=True, help="a student, as `score` takes it, or the folder of a teacher")
    add("--data", help="file with the columns of the model's task; or give --task_name and --data_dir")
    add("--task_name", help="GLUE task, or a JSON file that describes your own (default: the model's, with --data)")
    add("--data_dir", help="folder of the task's files")
    add("--split", default="dev", help="dev, test, train, mm: which of the task's files")
    add("--threshold", type=cli.threshold, help="binary: second label above this probability (default: the model's)")
    add("--teacher", help="folder of a teacher: the share of rows on which the model agrees with it is shown, too")
    add("--resamples", type=cli.whole_number(100), default=1000, help="of the bootstrap")
    add("--output", default="", help="JSON file for the metrics")
    add("--rows", default="", help="file for scores by row: JSON lines if it ends in .jsonl, else TSV")
    add("--id_column", help="with --data: column of the rows' ids")
    cli.add_inference_flags(parser)


def read_rows(args: argparse.Namespace) -> tuple[Task, Examples, list[str] | None]:
    """The task, the rows with and without labels, and their ids."""
    from dse.experiments.predictions import task_of

    if bool(args.data) is bool(args.data_dir):
        raise InputError("--data: give either this flag, or --task_name and --data_dir")
    if args.id_column and not args.data:
        raise InputError("--id_column: is for --data; leave it out")
    if args.data_dir:
        if not args.task_name:
            raise InputError("--task_name: is needed with --data_dir")
        task = get_task(args.task_name)
        return task, read_examples(task, args.data_dir, args.split), None
    check_file(args.data, "--data", "a file with the columns of the model's task")
    path, task = Path(args.data), get_task(args.task_name) if args.task_name else task_of(args.model)
    if task.parts:
        raise InputError(f"--data: {task.name} is made of several tasks; give --task_name with one of them")
    # Read as a training file is, which keeps rows without label; a skipped row would shift the ids of those after it.
    of_file = replace(task, train=path.name, dev=path.name, skip_short_rows=False)
    rows = read_examples(of_file, path.parent, "train")
    return task, rows, column_of(path, args.id_column, "--id_column") if args.id_column else None


def run(args: argparse.Namespace) -> None:
    """Score the rows, print what is measured, and write what was asked for."""
    # 1. Refuse what cannot work, and read the rows.
    task, rows, ids = read_rows(args)
    names = [args.data] if args.data else split_files(task).values()
    used = [Path(args.data_dir or "") / name for name in names if name]
    for flag in ("output", "rows"):
        if path := getattr(args, flag):
            check_output_file(path, f"--{flag}", used)
            used.append(Path(path))
    check_threshold(task, args.threshold)
    known = rows.labelled
    if not known.any():
        raise InputError(f"--split: {rows.files[0]['file']} has no labels; `predict` or `score` needs none")
    from dse.experiments.predictions import evaluate, load_scorer
    from dse.training.kinds import kind_of

    # 2. Outputs and metrics.
    precision = cli.precision_of(args)
    device = select_device(args.disable_gpu, args.gpu_id, precision)
    score, threshold = load_scorer(args.model, task, device, args.batch_size, precision)
    threshold = threshold if args.threshold is None else args.threshold
    if args.teacher:
        teacher, _ = load_scorer(args.teacher, task, device, args.batch_size, precision, "--teacher")
    logger.info("%d rows of %s, %d with a label, on %s", len(rows), task.name, int(known.sum()),
                describe_device(device, precision))  # fmt: skip
    outputs, labels = score(rows), np.array(rows.labels)
    found = evaluate(task, outputs[known], labels[known], threshold, args.resamples)
    if args.teacher:
        decided = kind_of(task).decisions(teacher(rows))
        found["teacher_agreement"] = kind_of(task).agreement(outputs, decided, threshold)

    # 3. Print, and write.
    print("\n" + to_text(task, found))
    if args.output:
        write_json(args.output, {"command": args.command, "task": task.name, "rows": int(known.sum()), **found})
    if args.rows:
        lines = row_lines(task, rows, ids, outputs, threshold, args.rows.endswith((".jsonl", ".ndjson")))
        write_text(args.rows, "".join(lines))
        logger.info("%d rows: %s", len(rows), args.rows)


def to_text(task: Task, found: dict[str, Any]) -> str:
    """What was measured, as tables."""
    lines = [f"{'':<24}{'value':>8}{'95 % interval':>20}"]
    for name, (value, low, high) in found["metrics"].items():
        lines.append(f"{name:<24}{value:>8.4f}{f'{low:.4f} to {high:.4f}':>20}")
    if "teacher_agreement" in found:
        lines.append(f"{'teacher_agreement':<24}{found['teacher_agreement']:>8.4f}")
    if task.labels:
        lines += ["", f"{'label':<24}{'precision':>10}{'recall':>10}{'f1':>10}{'rows':>8}"]
        lines += [f"{label:<24}{of['precision']:>10.4f}{of['recall']:>10.4f}{of['f1']:>10.4f}{of['rows']:>8}"
                  for label, of in found["labels"].items()]  # fmt: skip
        lines += ["", "rows with a label (down) by predicted label (across)"]
        lines += [f"{'':<24}" + "".join(f"{label[:14]:>15}" for label in task.labels)]
        for label, counts in zip(task.labels, found["confusions"], strict=True):
            lines.append(f"{label:<24}" + "".join(f"{count:>15}" for count in counts))
    return "\n".join(lines)


def row_lines(
    task: Task, rows: Examples, ids: list[str] | None, outputs: np.ndarray, threshold: float, as_json: bool
) -> Iterator[str]:
    """A line for each row, after a header line in TSV."""
    from dse.experiments.predictions import answers, scores_of

    predicted = answers(task, outputs, threshold)
    (scores, probabilities), known = scores_of(task, outputs), rows.labelled
    for row, texts in enumerate(zip(*rows.sides, strict=True)):
        label = (rows.labels or [])[row]
        named = None if not known[row] else task.labels[label] if task.labels else label
        entries: dict[str, Any] = {"row": rows.places[row] if rows.places else row}
        entries |= {} if ids is None else {"id": ids[row]}
        entries |= dict(zip(("text_a", "text_b"), texts, strict=False))
        entries |= {"label": named, "predicted": predicted[row], "score": float(scores[row])}
        entries |= {} if probabilities is None else {"probability": float(probabilities[row])}
        if as_json:
            yield json_text(entries, ensure_ascii=False) + "\n"
            continue
        if row == 0:
            yield tsv_line(entries)
        yield tsv_line(entries.values())
