"""The Markdown pages: what in them is made from the published runs, and the commands that they tell users to type.

    python tests/pages.py                                   write every table and line anew
    python tests/pages.py --results results/results.json    take the results of `reproduce` first, and draw its figure

A page has `<!-- made:NAME -->`, what is made, and `<!-- /made -->`.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import ROOT

sys.path.insert(0, str(ROOT))

from dse.experiments import benchmarks, benchmarks_scoring, gpu_report, results, transfer
from dse.system.device import count_of
from dse.system.files import write_json
from dse.training.reporting import markdown_table

PUBLISHED = ROOT / "dse" / "experiments" / "published"
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "dse").rglob("*.md"))]
MADE_PART = re.compile(r"(<!-- made:([\w-]+) -->\n?)(.*?)(<!-- /made -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    """A published JSON file."""
    return json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))


def trained(*names: str) -> str:
    return benchmarks.rates_table(*map(read, names))


def machine_line() -> str:
    found = read("scoring")["settings"]["machine"]
    versions = ", ".join(f"{name.replace('_', '-')} {number}" for name, number in found["versions"].items())
    return f"Measured on {found['processor']}, {count_of(found['threads'])}, with {versions}."


def minutes_line() -> str:
    minutes = read("results")["tasks"]["MRPC"]["minutes"]
    teacher, logits, student = (f"{minutes[stage]['mean']:.0f}" for stage in ("teacher", "logits", "dse"))
    return f"With a 6-layer BERT on one CPU core, steps 2 to 4 took {teacher}, {logits} and {student} minutes."


SCORINGS = ("scoring", "scoring_concat", "scoring_dot")
TRIED_METRICS = {
    "STS-B, dev Pearson": ("sts-b", "dev", "pearson"),
    "STS-B, dev MRR": ("sts-b", "dev", "mrr"),
    "MRPC, dev f1": ("mrpc", "dev", "tuned_f1"),
    "MRPC, test f1": ("mrpc", "test", "tuned_f1"),
    "MRPC, test accuracy": ("mrpc", "test", "tuned_accuracy"),
    "MRPC, test MRR": ("mrpc", "test", "mrr"),
}


def tried_table() -> str:
    """What was tried beside the recipe: a row for each way, with its seeds' mean and spread."""
    tried, columns = read("tried"), TRIED_METRICS.values()

    def cell(name: str, task: str, split: str, metric: str) -> str:
        of_task = [run for run in tried["runs"] if (run["trial"], run["task"]) == (name, task)]
        return results.show(results.spreads({"": [run["metrics"][split].get(metric) for run in of_task]}, set())[""])

    rows = [(words, *(cell(name, *column) for column in columns)) for name, words in tried["names"].items()]
    return markdown_table(("student", *TRIED_METRICS), rows)


MADE: dict[str, Callable[[], str]] = {
    "quality-line": lambda: results.in_one_line(read("results")),
    "speed-line": lambda: benchmarks_scoring.in_one_line(read("scoring")),
    "minutes-line": minutes_line,
    "summary": lambda: results.quality_table(read("results"), headlines_only=True),
    "introduction": lambda: results.introduction(read("results")).partition("`: ")[2],  # what was run stands below
    "quality": lambda: results.quality_table(read("results")),
    "finding": lambda: results.finding_table(read("results")),
    "compared": lambda: results.compared_table(read("results")),
    "minutes": lambda: results.minutes_table(read("results")),
    "tried": tried_table,
    "variants": lambda: results.variants_table(read("variants")),  # of the concat head
    "transfer": lambda: transfer.to_markdown(read("transfer")["results"]),
    "memory": benchmarks.memory_table,
    "gpu-line": lambda: gpu_report.in_one_line(read("gpu")),
    "gpu": lambda: gpu_report.summary(read("gpu")),
    "gpu-checks": lambda: gpu_report.checks_table(read("gpu")),
    "gpu-updates": lambda: gpu_report.updates_table(read("gpu")),
    "gpu-kernels": lambda: gpu_report.kernels_table(read("gpu")),
    "gpu-encoding": lambda: gpu_report.encoding_table(read("gpu")),
    "gpu-searches": lambda: gpu_report.searches_table(read("gpu")),
    "gpu-states": lambda: gpu_report.states_line(read("gpu")),
    "machine": machine_line,
    "rates": lambda: trained("training_mrpc", "training_sts-b", "inference"),
    "openvino": lambda: trained("inference_openvino_fp32", "inference_openvino_bf16"),
    "scoring": lambda: benchmarks_scoring.scoring_table(*map(read, SCORINGS)),
}


def made_anew(page: str) -> str:
    """A page's text with all that is made in it made anew."""

    def make(found: re.Match[str]) -> str:
        opening, name, _, closing = found.groups()
        return opening + MADE[name]() + ("\n" if opening.endswith("\n") else "") + closing

    return MADE_PART.sub(make, page)


def prose(page: str) -> str:
    """A page's text without code blocks, links' targets and what is made in it."""
    return re.sub(r"```.*?```|\]\([^)]*\)", "", MADE_PART.sub("", page), flags=re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    """The code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def statements(block: str) -> list[str]:
    """The commands of a shell block: continued lines and here-documents as one."""
    found, ending = [""], None
    for line in block.splitlines():
        found[-1] += line + "\n"
        if ending is None and (document := re.search(r"<<'(\w+)'", line)):
            ending = document[1]
        elif line == ending:
            ending = None
        if ending is None and not line.endswith("\\"):
            found.append("")
    return [statement.strip() for statement in found if statement.strip()]


def shell(line: str, folder: Path, variables: dict[str, str]) -> str:
    """What bash prints for a line in a folder."""
    command = ["bash", "-euc", line]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=True).stdout


def calls(statement: str, folder: Path, variables: dict[str, str]) -> list[list[str]]:
    """The words of each call of python, pip or torchrun, as the shell expands them; all else in a statement is run."""
    stub = """() { printf '%s\\0' "${FUNCNAME[0]}" "$@" $'\\n'; }; """
    stubs = "".join(name + stub for name in ("python", "pip", "torchrun"))
    found = shell(stubs + statement, folder, variables).split("\n\0")
    return [call.split("\0")[:-1] for call in found if call]


def assigned(statement: str, folder: Path, variables: dict[str, str]) -> dict[str, str]:
    """The variable that a statement sets, unless it has a value."""
    name, equals, _ = statement.partition("=$(")
    if not equals or not name.isupper() or name in variables:
        return {}
    return {name: shell(f'{statement}\nprintf %s "${name}"', folder, variables)}


def publish(path: Path) -> None:
    """Take the results of `reproduce` without what no table needs, and draw its figure."""
    found = json.loads(path.read_text(encoding="utf-8"))
    kept = ("task", "seed", "stage", "finished", "seconds", "best_epoch", "versions")
    found["runs"] = [{name: run[name] for name in kept if name in run} for run in found["runs"]]
    write_json(PUBLISHED / "results.json", found)
    results.draw_speed(found, PUBLISHED / "speed.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path)
    if (given := parser.parse_args().results) is not None:
        publish(given)
    for page in PAGES:
        page.write_text(made_anew(page.read_text(encoding="utf-8")), encoding="utf-8")
