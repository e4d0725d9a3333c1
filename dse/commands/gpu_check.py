"""Check on a GPU that all is computed right, and measure how fast, without downloads.

    python -m dse gpu_check --output gpu.json

Tells each result as it is found, and at the end a Markdown table; the exit code is 1 if a check fails. Goals of speed
that are missed do not count as failed.
"""

import argparse
import contextlib
import subprocess
from functools import partial
from typing import Any

from dse.commands import logger
from dse.system.device import machine, select_device
from dse.system.errors import InputError, RunError
from dse.system.files import check_output_file

SECTIONS = ("agreement", "precision", "golden", "dropout", "resume", "graphs", "nccl", "index", "peaks", "updates",
            "encode", "search", "states", "transfers", "memory")  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--output", required=True, help="JSON file, which is written after every section")
    what = f"run only these sections: {', '.join(SECTIONS)}"
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[], metavar="NAME", help=what)


def driver() -> str:
    """The version of the GPU's driver, as nvidia-smi tells it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return run.stdout.partition("\n")[0].strip()
    return "unknown"


def run(args: argparse.Namespace) -> None:
    """Run the sections. Raises RunError if a check fails."""
    check_output_file(args.output, "--output")
    device = select_device(False, 0)
    if device.type != "cuda":
        raise InputError("gpu_check needs a CUDA device, and torch finds none here: run it on a machine that has one")
    from dse.experiments import gpu_check, gpu_measures, gpu_report

    about: dict[str, Any] = {"machine": machine(), "driver": driver()}
    print(
        f"{about['machine']['gpu']}, driver {about['driver']}, torch {about['machine']['versions']['torch']}",
        flush=True,
    )
    report = gpu_report.Report(args.output, about)
    for name in (name for name in SECTIONS if not args.only or name in args.only):
        report.run(name, partial(gpu_check.SECTIONS[name], report, device, gpu_measures.Sizes()))
    print(f"\n{report.table()}")
    logger.info("written to %s", args.output)
    if failed := report.failed():
        raise RunError(f"{len(failed)} checks failed ({'; '.join(failed)[:300]}); see {args.output}")
