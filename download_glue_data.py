#!/usr/bin/env python3
"""Stage 1: download the GLUE tasks, and SNLI, into the layout that the other scripts read.

    python download_glue_data.py --data_dir glue_data --tasks MRPC,STS

MRPC is made of Microsoft's raw files: downloaded, or taken from --path_to_mrpc (msr_paraphrase_train.txt,
msr_paraphrase_test.txt and, if there, dev_ids.tsv). Sizes and SHA-256 are compared with recorded ones before anything
is unpacked; SNLI has no record. Downloads and half-made folders live in <data_dir>/.download; a task's folder appears
whole, with a download.json that says where its files came from and what they are, or not at all. allnli needs no step
of its own: it reads SNLI and MNLI (--data_dir glue_data).
"""

import argparse
import errno
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import filelock

from dse import cli
from dse.data.download import DownloadError, fetch, forget, keep_aside, shown, unzip
from dse.system.errors import InputError, RunError
from dse.system.files import atomic_write, check_writable, read_json, sha256_file, utc_stamp, write_json
from dse.system.text_files import read_lines

PROG = "download_glue_data.py"
BASE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
SNLI_URL = "https://nlp.stanford.edu/projects/snli/snli_1.0.zip"
RECORD = "download.json"
SNLI_MOST = 2_000_000_000  # bytes; its three text files have about 500 million
logger = logging.getLogger("dse.download_glue_data")


class Source(NamedTuple):
    """A file to fetch: its address below the base, recorded bytes and SHA-256."""

    place: str
    size: int | None
    sha256: str | None

    @property
    def name(self) -> str:
        return Path(self.place).name

    @property
    def most(self) -> int:
        """Bytes that it can unpack to: text deflates to no less than about a tenth."""
        return SNLI_MOST if self.size is None else 20 * self.size + 1_000_000


_RAW = "../../senteval/senteval_data/"
SOURCES = {
    "CoLA": [Source("CoLA.zip", 376971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")],
    "SST": [Source("SST-2.zip", 7439277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")],
    "MRPC": [
        Source(
            f"{_RAW}msr_paraphrase_train.txt",
            1047044,
            "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
        ),
        Source(
            f"{_RAW}msr_paraphrase_test.txt",
            441275,
            "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
        ),
        Source("mrpc_dev_ids.tsv", 6222, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"),
    ],
    "QQP": [Source("QQP-clean.zip", 41696084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0")],
    "STS": [Source("STS-B.zip", 802872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")],
    "MNLI": [Source("MNLI.zip", 312783507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633")],
    "SNLI": [Source(SNLI_URL, None, None)],
    "QNLI": [Source("QNLIv2.zip", 10627589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")],
    "RTE": [Source("RTE.zip", 697150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")],
    "WNLI": [Source("WNLI.zip", 28999, "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46")],
    "diagnostic": [Source("AX.tsv", 222257, "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd")],
}
FOLDERS = {task: {"SST": "SST-2", "STS": "STS-B"}.get(task, task) for task in SOURCES}
MRPC_RAW = ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")
SAVED_AS = {"mrpc_dev_ids.tsv": "dev_ids.tsv", "AX.tsv": "diagnostic.tsv"}  # files that are kept as they come

# the rows and the header line of every file that the other scripts read
_PAIR, _QUESTION = "index sentence1 sentence2", "index question sentence"
_MRPC, _MRPC_TEST = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "index\t#1 ID\t#2 ID\t#1 String\t#2 String"
_PARSES = "sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse sentence1 sentence2"
_MNLI, _LABELS = f"index promptID pairID genre {_PARSES}", "label1 label2 label3 label4 label5 gold_label"
_STS = "index genre filename year old_index source1 source2 sentence1 sentence2"
_SNLI = f"index captionID pairID {_PARSES} {_LABELS}"
_QQP = "id qid1 qid2 question1 question2 is_duplicate"
FILES = {
    "CoLA": {"train": (8551, ""), "dev": (1043, ""), "test": (1063, "index sentence")},
    "SST": {"train": (67349, "sentence label"), "dev": (872, "sentence label"), "test": (1821, "index sentence")},
    "MRPC": {"train": (3668, _MRPC), "dev": (408, _MRPC), "test": (1725, _MRPC_TEST)},
    "QQP": {"train": (363846, _QQP), "dev": (40430, _QQP), "test": (390965, "id question1 question2")},
    "STS": {"train": (5749, f"{_STS} score"), "dev": (1500, f"{_STS} score"), "test": (1379, _STS)},
    "MNLI": {
        "train": (392702, f"{_MNLI} label1 gold_label"),
        "dev_matched": (9815, f"{_MNLI} {_LABELS}"),
        "dev_mismatched": (9832, f"{_MNLI} {_LABELS}"),
        "test_matched": (9796, _MNLI),
        "test_mismatched": (9847, _MNLI),
    },
    "SNLI": {"train": (549367, _SNLI), "dev": (9842, _SNLI), "test": (9824, _SNLI)},
    "QNLI": {"train": (104743, f"{_QUESTION} label"), "dev": (5463, f"{_QUESTION} label"), "test": (5463, _QUESTION)},
    "RTE": {"train": (2490, f"{_PAIR} label"), "dev": (277, f"{_PAIR} label"), "test": (3000, _PAIR)},
    "WNLI": {"train": (635, f"{_PAIR} label"), "dev": (71, f"{_PAIR} label"), "test": (146, _PAIR)},
    "diagnostic": {"diagnostic": (1104, _PAIR)},
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROG, description="Download GLUE and SNLI.")
    add = parser.add_argument
    add("--data_dir", default="glue_data", help="where the tasks' folders go")
    add("--tasks", default="all", help=f"all, or a comma list of {' '.join(SOURCES)}")
    add("--path_to_mrpc", default="", help="folder with MRPC's raw files; empty: download them")
    add("--base_url", default=BASE_URL, help="a mirror, with MRPC's raw files in ../../senteval/senteval_data/")
    add("--snli_url", default=SNLI_URL, help="where snli_1.0.zip is")
    add("--no_verify", action="store_true", help="for mirrors that repack: take what differs from the recorded hashes")
    args = parser.parse_args(argv)
    known = {task.lower(): task for task in SOURCES}
    wanted = list(SOURCES) if args.tasks.lower() == "all" else [task.strip() for task in args.tasks.split(",")]
    unknown = [task for task in wanted if task.lower() not in known]
    if unknown:
        parser.error(f"--tasks: unknown {', '.join(map(repr, unknown))}; known: all, {', '.join(SOURCES)}")
    args.tasks = list(dict.fromkeys(known[task.lower()] for task in wanted))
    area = Path(args.data_dir) / ".download"
    if args.path_to_mrpc and area.is_dir() and area.samefile(args.path_to_mrpc):
        parser.error(f"--path_to_mrpc: downloads are removed from {area}; move the raw files elsewhere")
    for name in MRPC_RAW if args.path_to_mrpc and "MRPC" in args.tasks else ():
        if not (Path(args.path_to_mrpc) / name).is_file():
            parser.error(f"--path_to_mrpc: no {name} in {args.path_to_mrpc}; expected {' and '.join(MRPC_RAW)} there")
    check_url(args.base_url, "--base_url")
    check_url(args.snli_url, "--snli_url")
    if urlsplit(args.base_url).query or urlsplit(args.base_url).fragment:
        raise InputError("--base_url: file names are appended to it, so it cannot have a query (?...) or a fragment")
    args.base_url = args.base_url.rstrip("/") + "/"
    return args


def check_url(url: str, flag: str) -> None:
    """Raise InputError unless `url` is an http(s) address; it is not shown, since it may hold a password."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80) and " " not in url
        usable = usable and "@" not in parts.path  # a password with a slash in it
    except ValueError:  # a port that is no number, say
        usable = False
    if not usable:
        raise InputError(f"{flag}: no address such as {BASE_URL}: http:// or https://, a host, a path")


def line_start(cells: list[str]) -> str:
    return repr("\t".join(cells)[:80])


def write_lines(path: Path, lines: Iterator[str] | list[str]) -> None:
    with atomic_write(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def split_mrpc(raw: dict[str, Path], folder: Path) -> None:
    """Write train.tsv, dev.tsv and test.tsv below `folder` from the raw files, given by name."""

    def rows_of(name: str, columns: int, start: int) -> Iterator[list[str]]:
        for number, line in enumerate(read_lines(raw[name], "MRPC's raw file"), 1):
            if number > start and line.strip():
                cells = line.strip().split("\t")
                if len(cells) != columns:
                    raise InputError(
                        f"{raw[name].name}, line {number}: {columns} columns expected: {line_start(cells)}"
                    )
                yield cells

    dev_ids = {tuple(cells) for cells in rows_of("dev_ids.tsv", 2, start=0)}
    header = next(read_lines(raw[MRPC_RAW[0]], "MRPC's raw file", keep_mark=True), "")
    splits: dict[str, list[str]] = {"train.tsv": [header], "dev.tsv": [header]}
    for cells in rows_of(MRPC_RAW[0], 5, start=1):
        splits["dev.tsv" if tuple(cells[1:3]) in dev_ids else "train.tsv"].append("\t".join(cells))
    splits["test.tsv"] = [_MRPC_TEST]
    for i, cells in enumerate(rows_of(MRPC_RAW[1], 5, start=1)):
        splits["test.tsv"].append("\t".join([str(i), *cells[1:]]))
    for name in MRPC_RAW:
        if (first := next(read_lines(raw[name], "MRPC's raw file"), "")) != _MRPC:
            raise InputError(f"{name}, line 1: has the header {line_start([first])}, expected {line_start([_MRPC])}")
    for name, lines in splits.items():
        write_lines(folder / name, lines)


def convert_snli(path: Path) -> Iterator[str]:
    """The lines of snli_1.0_*.txt, whose columns go by their names, in GLUE's order.

    Rows without a gold label are left out; labels of single annotators that a row lacks are empty.
    """
    lines = read_lines(path, "SNLI's text file")
    names = next(lines, "").split("\t")
    kept = f"captionID pairID {_PARSES}".split()
    lacking = [name for name in (*kept, "gold_label") if name not in names]
    if {"sentence1", "sentence2", "gold_label"} & set(lacking):
        raise InputError(f"{path.name}, line 1: no column {', '.join(lacking)} in the header: {line_start(names)}")
    if lacking:
        logger.warning("%s has no %s: left empty", path.name, ", ".join(lacking))
    needed = 1 + max(names.index(name) for name in (*kept, "gold_label") if name in names)
    kept += [name for name in _LABELS.split() if name in names]
    yield "\t".join(["index", *kept])
    index, more = 0, 0
    for number, line in enumerate(lines, 2):
        cells = line.split("\t")
        if not line:
            continue
        if len(cells) < needed:
            raise InputError(f"{path.name}, line {number}: at least {needed} columns expected: {line_start(cells)}")
        row = dict(zip(names, cells + [""] * len(names), strict=False))
        if row["gold_label"] != "-":
            yield "\t".join([str(index), *(row.get(name, "") for name in kept)])
            index += 1
            more += len(cells) > len(names)
    if more:
        logger.warning("%s: %d rows have more than the header's %d cells: the rest is cut", path.name, more, len(names))


def fetch_sources(task: str, area: Path, args: argparse.Namespace) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """Have the task's files: a path for each name, and what to record of where they come from."""
    raw, origins = {}, []
    for source in SOURCES[task]:
        name = SAVED_AS.get(source.name, source.name)
        own = Path(args.path_to_mrpc) / name
        if task == "MRPC" and args.path_to_mrpc and own.is_file():
            path, place, sha256 = own, own.name, sha256_file(own)
            if sha256 != source.sha256:
                logger.warning("%s: SHA-256 %s, but recorded is %s; used as it is", own, sha256, source.sha256)
        else:
            url = args.snli_url if task == "SNLI" else urljoin(args.base_url, source.place)
            path = area / source.name
            logger.info("%s: from %s", source.name, shown(url))
            if args.no_verify or source.size is None:
                sha256, place = fetch(url, path, source.most)  # a mirror may have repacked it without compression
            else:
                sha256, place = fetch(url, path, 2 * source.size + 1_000_000, source.size, source.sha256)
            if source.sha256 is None:
                logger.warning("%s: SNLI has no recorded checksum; SHA-256 obtained %s", source.name, sha256)
            else:
                same = sha256 == source.sha256
                what = "as recorded" if same else f"NOT the recorded {source.sha256}"
                level = logging.INFO if same else logging.WARNING
                logger.log(level, "%s: %d bytes, SHA-256 %s, %s", source.name, path.stat().st_size, sha256, what)
        raw[name] = path
        origins.append(
            {"from": place, "bytes": path.stat().st_size, "sha256": sha256, "recorded_sha256": source.sha256}
        )
    return raw, origins


def build_or_keep_aside(task: str, raw: dict[str, Path], made: Path, area: Path) -> str:
    """`build` and `compare`; useless downloads are kept aside, so that the next run fetches them anew."""
    try:
        build(task, raw, made)
        lacking = [f"{split}.tsv" for split in FILES[task] if not (made / f"{split}.tsv").is_file()]
        if lacking:
            raise DownloadError(f"{', '.join(path.name for path in raw.values())}: no {', '.join(lacking)} in it")
        return compare(task, made, made_here=True)
    except (DownloadError, InputError) as error:
        recorded = {source.sha256 for source in SOURCES[task]}
        suspects = [path for path in raw.values() if path.parent == area and sha256_file(path) not in recorded]
        aside = [keep_aside(path, path.name) for path in suspects]
        kept = f"; kept as {', '.join(map(str, aside))}" if aside else ""
        raise DownloadError(f"{error}{kept}") from error


def build(task: str, raw: dict[str, Path], made: Path) -> None:
    """Make the task's folder `made` of its fetched files."""
    source = SOURCES[task][0]
    if task == "SNLI":
        texts = {f"snli_1.0_{split}.txt": split for split in FILES[task]}
        unzip(raw[source.name], "snli_1.0", made.with_name("texts"), source.most, only=texts)
        for name, split in texts.items():
            write_lines(made / f"{split}.tsv", convert_snli(made.with_name("texts") / name))
    elif source.name.endswith(".zip"):
        unzip(raw[source.name], FOLDERS[task], made, source.most)
    else:  # files as they are, MRPC's raw ones included
        for name, path in raw.items():
            shutil.copyfile(path, made / name)
    if task == "MRPC":
        split_mrpc(raw, made)


def differences(task: str, folder: Path) -> tuple[list[str], list[str]]:
    """How headers and row counts of the task's files differ from the expected ones, each with both.

    The first list has what no script can use: a foreign header (SNLI's is written here; more columns do no harm), or no
    rows.
    """
    useless, found = [], []
    for split, (rows, header) in FILES[task].items():
        path = folder / f"{split}.tsv"
        if not path.is_file():
            found.append(f"no {path.name}")
            continue
        names = header.split("\t") if "\t" in header else header.split()
        lines = (line.split("\t") for line in read_lines(path, f"a file of {task}"))
        try:
            first = next(lines, []) if names else [""] * 4  # CoLA
            count = sum(len(cells) >= len(first) and cells != [""] for cells in lines)
        except InputError as error:  # no UTF-8
            found.append(str(error).removeprefix(f"{folder}/"))
            continue
        if names and first != names:
            why = f"{path.name} has the header {' | '.join(first)[:200]!r}, expected {' | '.join(names)!r}"
            (found if task == "SNLI" or first[: len(names)] == names else useless).append(why)
        if count != rows:
            (found if count else useless).append(f"{path.name} has {count:,} rows, expected {rows:,}")
    return useless, found


def compare(task: str, folder: Path, made_here: bool = False) -> str:
    """`differences`, each a warning; what to say of them in the closing table.

    Raises DownloadError for a folder made here that no script can use; one of the user's is theirs.
    """
    useless, found = differences(task, folder)
    if useless and made_here:
        raise DownloadError("; ".join(useless))
    unlike = useless + found
    for difference in unlike:
        logger.warning("%s: %s", FOLDERS[task], difference)
    return "; ".join(unlike) or "headers and rows as expected"


def what_is_there(task: str, folder: Path) -> str | None:
    """What to say of a task's folder that needs no download; None when it needs one.

    Raises DownloadError for a folder that is neither: its files may be the user's, so they are left alone.
    """
    again = f"move {folder} away to have it made anew"
    names = [f"{split}.tsv" for split in FILES[task]]
    lacking = [name for name in names if not (folder / name).exists()]
    if (folder / RECORD).is_file():
        record = read_json(folder / RECORD, "the record of a download")
        try:
            there = {name: sha256 for name, sha256 in record["files"].items() if (folder / name).exists()}
            unlike = any(origin["recorded_sha256"] not in (None, origin["sha256"]) for origin in record["sources"])
        except (AttributeError, KeyError, TypeError) as error:
            raise DownloadError(f"{folder / RECORD} is no record of a download: {again}") from error
        changed = [name for name, sha256 in there.items() if sha256_file(folder / name) != sha256]
        if changed:
            raise DownloadError(f"{', '.join(changed)} changed since the download: {again}")
        if lacking:
            return None  # an interrupted move, or files were removed
        removed = len(record["files"]) - len(there)  # files that no script reads
        return (
            "unchanged since the download"
            + (", which differed from the recorded hashes" if unlike else "")
            + (f"; {removed} other files were removed" if removed else "")
        )
    if lacking == names:
        return None
    if lacking:
        raise DownloadError(f"there is a folder {folder}, but no {', '.join(lacking)} in it: {again}")
    return f"not made by this script; {compare(task, folder)}"


def write_record(task: str, origins: list[dict[str, Any]], made: Path) -> None:
    names = sorted(path for path in made.rglob("*") if path.is_file())
    files = {path.relative_to(made).as_posix(): sha256_file(path) for path in names}
    record = {"task": task, "made_utc": utc_stamp(), "sources": origins, "files": files}
    write_json(made / RECORD, record)


def put_in_place(made: Path, folder: Path) -> None:
    """Give a finished folder its name, or add its files to those of the user; none of them is overwritten."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
    if not folder.exists():
        made.rename(folder)
        return
    files = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
    for name in files:
        if name != Path(RECORD) and (folder / name).exists() and sha256_file(folder / name) != sha256_file(made / name):
            raise DownloadError(f"there is another {name} in {folder} already: move it away")
    for name in sorted(files, key=lambda name: name != Path(RECORD)):  # the record first: it tells whether files lack
        for left in (folder / name).parent.glob(f".{name.name}.*.part"):  # by a run that was killed here
            left.unlink()
        if name == Path(RECORD) or not (folder / name).exists():
            with atomic_write(folder / name) as beside:
                shutil.copyfile(made / name, beside)


def get_task(task: str, args: argparse.Namespace) -> tuple[str, str]:
    """Have the task's folder below --data_dir; what became of it, in a word and in detail."""
    folder = Path(args.data_dir) / FOLDERS[task]
    area = Path(args.data_dir) / ".download"
    area.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(area / f"{task}.lock"):
        # 1. Is it there?
        if (there := what_is_there(task, folder)) is not None:
            clean_up(task, area)
            return "already there", there

        # 2. Fetch and verify; nothing is unpacked before all files are there.
        raw, origins = fetch_sources(task, area, args)

        # 3. Unpack or convert, beside; compare with what the task has, and record where it came from.
        clean_up(task, area, downloads=False)
        made = area / f"{task}.making" / FOLDERS[task]
        made.mkdir(parents=True)
        try:
            found = build_or_keep_aside(task, raw, made, area)
            write_record(task, origins, made)

            # 4. It appears, whole.
            put_in_place(made, folder)
        finally:
            clean_up(task, area, downloads=False)
        clean_up(task, area)
    return "done", found


def clean_up(task: str, area: Path, downloads: bool = True) -> None:
    """Remove what this run, or one that was killed, left of making the task."""
    shutil.rmtree(area / f"{task}.making", ignore_errors=True)
    for source in SOURCES[task] if downloads else ():
        forget(area / source.name)


def one_at_a_time(path: Path) -> filelock.AcquireReturnProxy:
    """A held lock, which ends with its process; waits, and says so, while another run has it."""
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("another run is at %s: waiting for it to end", path.stem)
        return lock.acquire()


def run(args: argparse.Namespace) -> None:
    # 1. Refuse what cannot work.
    check_writable(args.data_dir, "--data_dir")
    cli.set_up_logging()
    if args.no_verify:
        logger.warning("--no_verify: files that differ from the recorded sizes and SHA-256 are taken all the same")

    # 2. One task after the other; one that fails does not stop the others.
    outcomes: dict[str, tuple[str, str]] = {}
    stopped = 0
    for task in args.tasks:
        try:
            outcomes[task] = get_task(task, args)
        except (DownloadError, InputError, RunError) as error:
            outcomes[task] = "failed", " ".join(str(error).split())
        except OSError as error:
            room = "; with more room, the same command goes on" if error.errno == errno.ENOSPC else ""
            outcomes[task] = "failed", f"{error}{room}"
        except KeyboardInterrupt as stop:
            outcomes[task] = "interrupted", "the same command goes on"
            stopped = getattr(stop, "exit_code", 130)  # 143 for SIGTERM
            break

    # 3. What became of each.
    for task, (outcome, detail) in outcomes.items():
        print(cli.printable(f"{task:<10}  {outcome:<13}  {detail}"))
    words = {outcome for outcome, _ in outcomes.values()}
    if "interrupted" in words:
        raise SystemExit(stopped)
    if "failed" in words:
        raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage; exits with code 2 when the input cannot be used, 1 when a task failed, 130 or 143 when stopped."""
    with cli.clear_errors(PROG):
        run(parse_arguments(argv))


if __name__ == "__main__":
    main()
