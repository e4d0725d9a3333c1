#!/usr/bin/env python3
"""Stage 1: download the GLUE tasks, and SNLI, into the layout that the other scripts read.

    python download_glue_data.py --data_dir glue_data --tasks MRPC,STS

MRPC is made of Microsoft's raw files: downloaded, or taken from --path_to_mrpc (msr_paraphrase_train.txt,
msr_paraphrase_test.txt). Sizes and SHA-256 are compared with recorded ones before anything is unpacked; SNLI has no
record. A task's folder appears whole or not at all.
"""

import argparse
import io
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urljoin

from dse import cli
from dse.files import InputError, check_writable, sha256_file

PROG = "download_glue_data.py"
BASE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
SNLI_URL = "https://nlp.stanford.edu/projects/snli/snli_1.0.zip"
TIME_OUT = (20, 60)  # seconds to connect, and between two pieces
logger = logging.getLogger("dse.download_glue_data")

# task: (file below BASE_URL, folder that it unpacks to, bytes, SHA-256)
ZIPS = {
    "CoLA": ("CoLA.zip", "CoLA", 376971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "SST": ("SST-2.zip", "SST-2", 7439277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "QQP": ("QQP-clean.zip", "QQP", 41696084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "STS": ("STS-B.zip", "STS-B", 802872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    "MNLI": ("MNLI.zip", "MNLI", 312783507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "QNLI": ("QNLIv2.zip", "QNLI", 10627589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "RTE": ("RTE.zip", "RTE", 697150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
    "WNLI": ("WNLI.zip", "WNLI", 28999, "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"),
}
# file below BASE_URL, bytes, SHA-256
DIAGNOSTIC = ("AX.tsv", 222257, "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd")
MRPC_DEV_IDS = ("mrpc_dev_ids.tsv", 6222, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")
MRPC_RAW = {
    "msr_paraphrase_train.txt": (
        "../../senteval/senteval_data/msr_paraphrase_train.txt",
        1047044,
        "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
    ),
    "msr_paraphrase_test.txt": (
        "../../senteval/senteval_data/msr_paraphrase_test.txt",
        441275,
        "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
    ),
}
TASKS = ("CoLA", "SST", "MRPC", "QQP", "STS", "MNLI", "SNLI", "QNLI", "RTE", "WNLI", "diagnostic")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROG, description="Download GLUE and SNLI.")
    parser.add_argument("--data_dir", default="glue_data", help="where the tasks' folders go")
    parser.add_argument("--tasks", default="all", help=f"all, or a comma list of {' '.join(TASKS)}")
    parser.add_argument("--path_to_mrpc", default="", help="folder with MRPC's raw files; empty: download them")
    args = parser.parse_args(argv)
    known = {task.lower(): task for task in TASKS}
    wanted = list(TASKS) if args.tasks.lower() == "all" else [task.strip() for task in args.tasks.split(",")]
    unknown = [task for task in wanted if task.lower() not in known]
    if unknown:
        parser.error(f"--tasks: unknown {', '.join(map(repr, unknown))}; known: all, {', '.join(TASKS)}")
    args.tasks = [known[task.lower()] for task in wanted]
    for name in MRPC_RAW if args.path_to_mrpc and "MRPC" in args.tasks else ():
        if not (Path(args.path_to_mrpc) / name).is_file():
            parser.error(f"--path_to_mrpc: no {name} in {args.path_to_mrpc}; expected {' and '.join(MRPC_RAW)} there")
    return args


def fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Download to `path`, with a progress bar; raises OSError when size or hash are not the recorded ones."""
    import requests
    from tqdm import tqdm

    with requests.get(url, stream=True, timeout=TIME_OUT) as response:
        response.raise_for_status()
        total = int(response.headers.get("Content-Length", 0)) or None
        bar = tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False)
        with bar, open(path, "wb") as file:
            for piece in response.iter_content(1 << 16):
                file.write(piece)
                bar.update(len(piece))
    found = sha256_file(path)
    if sha256 is None:
        logger.warning("%s: no recorded checksum; SHA-256 obtained %s", url, found)
    elif (path.stat().st_size, found) != (size, sha256):
        raise OSError(
            f"{url} gave {path.stat().st_size} bytes, SHA-256 {found}; recorded are {size} bytes, SHA-256 {sha256}"
        )


def get_zip(task: str, work: Path) -> Path:
    """The task's unpacked folder below `work`."""
    name, folder, size, sha256 = ZIPS[task]
    fetch(urljoin(BASE_URL, name), work / name, size, sha256)
    with zipfile.ZipFile(work / name) as archive:  # zipfile drops absolute paths and `..` itself
        archive.extractall(work / "unpacked")
    return work / "unpacked" / folder


def get_diagnostic(work: Path) -> Path:
    (work / "diagnostic").mkdir()
    name, size, sha256 = DIAGNOSTIC
    fetch(urljoin(BASE_URL, name), work / "diagnostic" / "diagnostic.tsv", size, sha256)
    return work / "diagnostic"


def get_mrpc(path_to_mrpc: str, work: Path) -> Path:
    """MRPC's train, dev and test made of the raw files and the recorded dev ids."""
    folder = work / "MRPC"
    folder.mkdir()
    for name, (place, size, sha256) in MRPC_RAW.items():
        if path_to_mrpc:
            shutil.copyfile(Path(path_to_mrpc) / name, folder / name)
        else:
            fetch(urljoin(BASE_URL, place), folder / name, size, sha256)
    if path_to_mrpc and (Path(path_to_mrpc) / "dev_ids.tsv").is_file():
        shutil.copyfile(Path(path_to_mrpc) / "dev_ids.tsv", folder / "dev_ids.tsv")
    else:
        fetch(urljoin(BASE_URL, MRPC_DEV_IDS[0]), folder / "dev_ids.tsv", *MRPC_DEV_IDS[1:])
    split_mrpc(folder)
    return folder


def split_mrpc(folder: Path) -> None:
    """Write train.tsv, dev.tsv and test.tsv from msr_paraphrase_*.txt and dev_ids.tsv in the same folder."""

    def lines_of(name: str) -> list[str]:
        return (folder / name).read_text(encoding="utf-8").removesuffix("\n").split("\n")

    dev_ids = {tuple(line.split("\t")) for line in lines_of("dev_ids.tsv")}
    header, *rows = lines_of("msr_paraphrase_train.txt")  # the header keeps its byte-order mark
    splits: dict[str, list[str]] = {"train.tsv": [header], "dev.tsv": [header]}
    for row in rows:
        cells = row.strip().split("\t")
        splits["dev.tsv" if tuple(cells[1:3]) in dev_ids else "train.tsv"].append("\t".join(cells))
    splits["test.tsv"] = ["index\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    for i, row in enumerate(lines_of("msr_paraphrase_test.txt")[1:]):
        splits["test.tsv"].append("\t".join([str(i), *row.strip().split("\t")[1:]]))
    for name, lines in splits.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def get_snli(work: Path) -> Path:
    """SNLI in GLUE's layout: rows without a gold label are left out, the gold label moves to the end."""
    fetch(SNLI_URL, work / "snli.zip")
    (work / "SNLI").mkdir()
    with zipfile.ZipFile(work / "snli.zip") as archive:
        for split in ("train", "dev", "test"):
            with archive.open(f"snli_1.0/snli_1.0_{split}.txt") as raw:
                lines = convert_snli(io.TextIOWrapper(raw, encoding="utf-8", newline=None).read().split("\n"))
            (work / "SNLI" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return work / "SNLI"


def convert_snli(lines: list[str]) -> list[str]:
    """The lines of snli_1.0_*.txt, whose columns go by their names, in GLUE's order."""
    names = lines[0].split("\t")
    kept = ["captionID", "pairID", "sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse"]
    kept += ["sentence2_parse", "sentence1", "sentence2"]
    kept += [name for name in (f"label{i}" for i in range(1, 6)) if name in names] + ["gold_label"]
    out = ["\t".join(["index", *kept])]
    for line in filter(None, lines[1:]):
        cells = dict(zip(names, line.split("\t"), strict=False))
        if cells["gold_label"] != "-":
            out.append("\t".join([str(len(out) - 1), *(cells.get(name, "") for name in kept)]))
    return out


def get_task(task: str, args: argparse.Namespace) -> str:
    """Make the task's folder below --data_dir; what became of it, in a word."""
    data_dir = Path(args.data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    folder_name = ZIPS[task][1] if task in ZIPS else task
    target = data_dir / folder_name
    if any(target.glob("*.tsv")) and (task != "MRPC" or (target / "train.tsv").exists()):
        return "already there"
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=f".{folder_name}-") as work:
        if task in ZIPS:
            made = get_zip(task, Path(work))
        elif task == "MRPC":
            made = get_mrpc(args.path_to_mrpc, Path(work))
        else:
            made = get_snli(Path(work)) if task == "SNLI" else get_diagnostic(Path(work))
        if target.exists():  # MRPC's raw files may lie where its splits belong
            for path in made.iterdir():
                path.replace(target / path.name)
        else:
            made.rename(target)
    return "done"


def run(args: argparse.Namespace) -> None:
    # 1. Refuse what cannot work.
    check_writable(args.data_dir, "--data_dir")
    cli.set_up_logging()

    # 2. One task after the other; one that fails does not stop the others.
    outcomes = {}
    for task in args.tasks:
        try:
            outcomes[task] = get_task(task, args)
        except (OSError, zipfile.BadZipFile, KeyError, UnicodeDecodeError, InputError) as error:
            outcomes[task] = f"failed: {' '.join(str(error).split())}"

    # 3. What became of each.
    for task, outcome in outcomes.items():
        print(f"{task:<10} {outcome}")
    if any(outcome.startswith("failed") for outcome in outcomes.values()):
        raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage; exits with code 2 when the input cannot be used, 1 when a task failed."""
    with cli.clear_errors(PROG):
        run(parse_arguments(argv))


if __name__ == "__main__":
    main()
