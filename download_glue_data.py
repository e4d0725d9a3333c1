#!/usr/bin/env python3
"""Stage 1: download the GLUE tasks, and SNLI, into the layout that the other scripts read.

    python download_glue_data.py --data_dir glue_data --tasks MRPC,STS

Files are downloaded to <data_dir>/.download. A task's folder appears once it is complete, with a download.json that
says where its files came from. allnli needs no download of its own: it reads SNLI and MNLI.
"""

import argparse
import contextlib
import errno
import logging
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from dse import cli
from dse.data.glue import AREA, BASE_URL, MRPC_RAW, SNLI_URL, SOURCES, Mirror, get_task
from dse.system.errors import InputError, RunError
from dse.system.files import check_writable

PROG = "download_glue_data.py"
logger = logging.getLogger("dse.download_glue_data")


def task_list(text: str) -> list[str]:
    """A flag's type: `all`, or a comma-separated list of tasks, in any case."""
    known = {task.lower(): task for task in SOURCES}
    names = list(known) if text.lower() == "all" else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name.lower() not in known]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(map(repr, unknown))}; known: all, {', '.join(SOURCES)}")
    return list(dict.fromkeys(known[name.lower()] for name in names))


def address(text: str) -> str:
    """A flag's type: an http(s) address; the error does not show it, since it may hold a password."""
    with contextlib.suppress(ValueError):  # for a port that is not a number, for example
        parts, refused = urlsplit(text), " " in text
        refused |= "@" in parts.path  # a password with a slash in it
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not refused:
            return text
    raise argparse.ArgumentTypeError(f"not an address such as {BASE_URL}: give http:// or https://, a host and a path")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags and refuse what cannot work."""
    parser = cli.Parser(prog=PROG, doc=__doc__)
    add = parser.add_argument
    add("--data_dir", default="glue_data", help="folder for the tasks' folders")
    add("--tasks", type=task_list, default="all", help=f"all, or a comma-separated list of {' '.join(SOURCES)}")
    add("--path_to_mrpc", default="", help="folder with Microsoft's raw MRPC files (default: they are downloaded)")
    place = "address of GLUE's files; MRPC's raw files are in ../../senteval/senteval_data/ from there"
    add("--base_url", type=address, default=BASE_URL, help=place)
    add("--snli_url", type=address, default=SNLI_URL, help="address of snli_1.0.zip")
    add("--no_verify", action="store_true", help="accept files that differ from the record (for mirrors that repack)")
    args = parser.parse_args(argv)
    args.base_url = args.base_url.rstrip("/") + "/"
    if urlsplit(args.base_url).query or urlsplit(args.base_url).fragment:
        parser.error("--base_url: file names are appended to it, so it cannot have a query (?...) or a fragment")
    area, raw = Path(args.data_dir) / AREA, args.path_to_mrpc
    if raw and area.is_dir() and Path(raw).exists() and area.samefile(raw):
        parser.error(f"--path_to_mrpc: {area} is for downloads, which are removed later; move the raw files elsewhere")
    for name in MRPC_RAW if raw and "MRPC" in args.tasks else ():
        if not (Path(raw) / name).is_file():
            parser.error(f"--path_to_mrpc: no {name} in {raw}; expected {' and '.join(MRPC_RAW)} there")
    return args


def run(args: argparse.Namespace) -> None:
    """Get the tasks; raises InputError for a data folder that cannot be written, SystemExit if a task failed."""
    # 1. Refuse what cannot work.
    check_writable(args.data_dir, "--data_dir")
    cli.set_up_logging()
    if args.no_verify:
        logger.warning("--no_verify: files that differ from the recorded sizes and SHA-256 are accepted")

    # 2. One task after the other; one that fails does not stop the others.
    mirror = Mirror(args.base_url, args.snli_url, args.path_to_mrpc, verify=not args.no_verify)
    outcomes: dict[str, tuple[str, str]] = {}
    code = 0
    for task in args.tasks:
        try:
            outcomes[task] = get_task(task, Path(args.data_dir), mirror)
        except (InputError, RunError, OSError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC
            room = "; make room and run the same command to continue" if full else ""
            outcomes[task], code = ("failed", " ".join(str(error).splitlines()) + room), 1
        except KeyboardInterrupt as stop:
            outcomes[task] = "interrupted", "run the same command to continue"
            code = getattr(stop, "exit_code", 130)  # 143 for SIGTERM
            break

    # 3. What became of each.
    for task, (outcome, detail) in outcomes.items():
        print(cli.printable(f"{task:<10}  {outcome:<13}  {detail}"))
    if code:
        raise SystemExit(code)


main = cli.program(PROG, parse_arguments, run)  # exit code 2: refused, 1: a task failed, 130 or 143: stopped


if __name__ == "__main__":
    main()
