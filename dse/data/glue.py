"""The recipes of stage 1: where GLUE's and SNLI's files are, how a task's folder is made, and what it must hold."""

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

import filelock

from dse.data.download import Download, DownloadError, forget, keep_aside, shown, unzip
from dse.system.errors import InputError
from dse.system.files import atomic_write, read_json, sha256_file, utc_stamp, write_json
from dse.system.text_files import read_lines

BASE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
SNLI_URL = "https://nlp.stanford.edu/projects/snli/snli_1.0.zip"
AREA, RECORD = ".download", "download.json"
logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """A file to fetch: its address relative to the base, and its recorded bytes and SHA-256 (None: no record)."""

    place: str
    size: int | None
    sha256: str | None

    @property
    def name(self) -> str:
        """The last part of the address."""
        return Path(self.place).name

    @property
    def most(self) -> int:
        """Bytes that it can unpack to: text deflates to a tenth at best; SNLI's three text files have 500 million."""
        return 2_000_000_000 if self.size is None else 20 * self.size + 1_000_000


class Mirror(NamedTuple):
    """Where the files come from."""

    base_url: str  # of GLUE's files, with a slash at its end
    snli_url: str  # of snli_1.0.zip
    path_to_mrpc: str  # folder with MRPC's raw files; empty: download them
    verify: bool  # refuse a file that differs from its record; False for mirrors that repack


MRPC_RAW = _TRAIN, _TEST = ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")
_RAW = "../../senteval/senteval_data/"
SOURCES = {
    "CoLA": [Source("CoLA.zip", 376971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")],
    "SST": [Source("SST-2.zip", 7439277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")],
    "MRPC": [
        Source(_RAW + _TRAIN, 1047044, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"),
        Source(_RAW + _TEST, 441275, "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"),
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
SAVED_AS = {"mrpc_dev_ids.tsv": "dev_ids.tsv", "AX.tsv": "diagnostic.tsv"}  # files that are kept as they come

# The rows and the header line of every file that the other scripts read
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


def get_task(task: str, data_dir: Path, mirror: Mirror) -> tuple[str, str]:
    """Make sure that a task's folder is in `data_dir`; return the outcome, in a word and in detail.

    Raises DownloadError if files cannot be fetched or used, or are in the way; OSError, RunError if the disk refuses.
    """
    folder, area = data_dir / FOLDERS[task], data_dir / AREA
    making = area / f"{task}.making"
    area.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(area / f"{task}.lock"):
        shutil.rmtree(making, ignore_errors=True)  # left by a run that was killed
        outcome, found = "already there", what_is_there(task, folder)
        if found is None:
            raw, origins = fetch_sources(task, area, mirror)  # all, before anything is unpacked
            made = making / FOLDERS[task]
            made.mkdir(parents=True)
            try:
                outcome, found = "done", make_folder(task, raw, origins, made)
                put_in_place(made, folder)
            finally:
                shutil.rmtree(making, ignore_errors=True)
        for source in SOURCES[task]:
            forget(area / source.name)
    return outcome, found


def one_at_a_time(path: Path) -> filelock.AcquireReturnProxy:
    """Return a held lock, which ends with its process. Log it, and wait, while another run holds the lock."""
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("another run is working on %s: waiting for it to end", path.stem)
        return lock.acquire()


def what_is_there(task: str, folder: Path) -> str | None:
    """Describe a folder that needs no download; None if it needs one. Raises DownloadError for one that is neither."""
    again, lacking = f"move {folder} away to have it made again", _lacking(task, folder)
    if not (folder / RECORD).is_file():
        if len(lacking) == len(FILES[task]):
            return None
        if lacking:
            raise DownloadError(f"{folder} exists, but has no {', '.join(lacking)}: {again}")
        return f"not made by this script; {compare(task, folder)}"
    record = read_json(folder / RECORD, "the record of a download")
    try:
        hashes = {name: sha256 for name, sha256 in record["files"].items() if (folder / name).exists()}
        unlike = any(origin["recorded_sha256"] not in (None, origin["sha256"]) for origin in record["sources"])
    except (AttributeError, KeyError, TypeError) as error:
        raise DownloadError(f"{folder / RECORD} is not a record of a download: {again}") from error
    if changed := [name for name, sha256 in hashes.items() if sha256_file(folder / name) != sha256]:
        raise DownloadError(f"{', '.join(changed)} changed since the download: {again}")
    if lacking:
        return None  # an interrupted move, or files were removed
    removed = len(record["files"]) - len(hashes)  # files that no script reads
    note = ", which differed from the recorded hashes" if unlike else ""
    return f"unchanged since the download{note}" + (f"; {removed} other files were removed" if removed else "")


def _lacking(task: str, folder: Path) -> list[str]:
    return [f"{split}.tsv" for split in FILES[task] if not (folder / f"{split}.tsv").is_file()]


def fetch_sources(task: str, area: Path, mirror: Mirror) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """Fetch a task's files: return a path for each name, and what to record about where each comes from."""
    raw, origins = {}, []
    for source in SOURCES[task]:
        name = SAVED_AS.get(source.name, source.name)
        path = Path(mirror.path_to_mrpc, name)
        if task == "MRPC" and mirror.path_to_mrpc and path.is_file():
            sha256, place = sha256_file(path), name
        else:
            path = area / source.name
            url = mirror.snli_url if task == "SNLI" else urljoin(mirror.base_url, source.place)
            logger.info("%s: from %s", source.name, shown(url))
            download = Download(url, path, source.most)  # a mirror may have repacked it without compression
            if mirror.verify and source.size is not None:
                download = Download(url, path, 2 * source.size + 1_000_000, source.size, source.sha256)
            sha256, place = download.fetch()
        size = path.stat().st_size
        level = logging.INFO if sha256 == source.sha256 else logging.WARNING
        logger.log(level, "%s: %d bytes, SHA-256 %s, recorded: %s", path, size, sha256, source.sha256 or "none")
        raw[name] = path
        origins.append({"from": place, "bytes": size, "sha256": sha256, "recorded_sha256": source.sha256})
    return raw, origins


def make_folder(task: str, raw: dict[str, Path], origins: list[dict[str, Any]], made: Path) -> str:
    """Fill the folder `made` from a task's fetched files and record them; return what `compare` finds.

    Raises DownloadError for unusable files. Downloads that match no record are renamed, so that they are fetched again.
    """
    try:
        build(task, raw, made)
        if lacking := _lacking(task, made):
            raise DownloadError(f"{', '.join(path.name for path in raw.values())}: no {', '.join(lacking)} in it")
        found = compare(task, made, made_here=True)
    except (DownloadError, InputError) as error:
        why = str(error)
        for path, origin in zip(raw.values(), origins, strict=True):
            if path.parent == made.parents[1] and origin["sha256"] != origin["recorded_sha256"]:
                why += f"; kept as {keep_aside(path)}"
        raise DownloadError(why) from error
    files = {name.as_posix(): sha256_file(made / name) for name in _files_below(made)}
    write_json(made / RECORD, {"task": task, "made_utc": utc_stamp(), "sources": origins, "files": files})
    return found


def build(task: str, raw: dict[str, Path], made: Path) -> None:
    """Write a task's files to the folder `made`, from its fetched files, given by name."""
    source = SOURCES[task][0]
    splits: Mapping[str, Iterable[str]] = {}
    if task == "SNLI":
        texts, names = made.with_name("texts"), {split: f"snli_1.0_{split}.txt" for split in FILES[task]}
        unzip(raw[source.name], "snli_1.0", texts, source.most, only=names.values())
        splits = {split: convert_snli(texts / name) for split, name in names.items()}
    elif source.name.endswith(".zip"):
        unzip(raw[source.name], FOLDERS[task], made, source.most)
    else:  # files as they are, MRPC's raw ones included
        for name, path in raw.items():
            shutil.copyfile(path, made / name)
        splits = split_mrpc(raw) if task == "MRPC" else {}
    for split, lines in splits.items():
        with atomic_write(made / f"{split}.tsv") as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)


def split_mrpc(raw: dict[str, Path]) -> dict[str, list[str]]:
    """The lines of MRPC's train, dev and test files, from the raw files, given by name."""
    dev_ids = {tuple(cells) for cells in _mrpc_rows(raw["dev_ids.tsv"], 2)}
    header = next(read_lines(raw[_TRAIN], "MRPC's raw file", keep_mark=True), "")
    splits = {"train": [header], "dev": [header], "test": [_MRPC_TEST]}
    for cells in _mrpc_rows(raw[_TRAIN], 5, _MRPC):
        splits["dev" if tuple(cells[1:3]) in dev_ids else "train"].append("\t".join(cells))
    for i, cells in enumerate(_mrpc_rows(raw[_TEST], 5, _MRPC)):
        splits["test"].append("\t".join([str(i), *cells[1:]]))
    return splits


def _mrpc_rows(path: Path, columns: int, header: str = "") -> Iterator[list[str]]:
    """The cells of a raw file's rows. Raises InputError for a row of another length and, at the end, another header."""
    lines = read_lines(path, "MRPC's raw file")
    first = next(lines, "") if header else ""
    for number, line in enumerate(lines, 2 if header else 1):
        if line.strip():
            cells = line.strip().split("\t")
            if len(cells) != columns:
                raise InputError(f"{path.name}, line {number}: expected {columns} columns, found {line[:80]!r}")
            yield cells
    if first != header:
        raise InputError(f"{path.name}, line 1: has the header {first[:80]!r}, expected {header!r}")


def convert_snli(path: Path) -> Iterator[str]:
    """The lines of snli_1.0_*.txt that have a gold label, in GLUE's order of columns; what a row lacks is empty."""
    lines = read_lines(path, "SNLI's text file")
    header = next(lines, "")
    names, wanted = header.split("\t"), f"captionID pairID {_PARSES}".split()
    needed = {*wanted, "gold_label"} & {*names}
    lacking = ", ".join(name for name in (*wanted, "gold_label") if name not in names)
    if not {"sentence1", "sentence2", "gold_label"} <= needed:
        raise InputError(f"{path.name}, line 1: no column {lacking} in the header: {header[:80]!r}")
    if lacking:
        logger.warning("%s has no %s: these columns are left empty", path.name, lacking)
    kept = wanted + [name for name in _LABELS.split() if name in names]
    yield "\t".join(["index", *kept])
    index = more = 0
    for number, line in enumerate(lines, 2):
        cells = line.split("\t")
        row = dict(zip(names, cells, strict=False))
        if line and not row.keys() >= needed:
            raise InputError(f"{path.name}, line {number}: ends before {names[len(cells)]}: {line[:80]!r}")
        if line and row["gold_label"] != "-":
            yield "\t".join([str(index), *(row.get(name, "") for name in kept)])
            index += 1
            more += len(cells) > len(names)
    if more:
        logger.warning("%s: %d rows have more than the header's %d cells: the rest is cut", path.name, more, len(names))


def compare(task: str, folder: Path, made_here: bool = False) -> str:
    """Compare headers and row counts with the expected ones; warn of differences, and return them for the final table.

    Raises DownloadError if a file made here has no rows or, except for SNLI, a header that begins differently.
    """
    useless, harmless = list[str](), list[str]()
    for split, (rows, header) in FILES[task].items():
        path, names = folder / f"{split}.tsv", header.split("\t" if "\t" in header else None)
        lines = (line.split("\t") for line in read_lines(path, f"a file of {task}"))
        try:
            first = next(lines, []) if names else [""] * 4  # CoLA
            count = sum(len(cells) >= len(first) and cells != [""] for cells in lines)
        except InputError as error:  # not UTF-8
            harmless.append(str(error).removeprefix(f"{folder}/"))
            continue
        if names and first != names:
            why = f"{path.name} has the header {' | '.join(first)[:200]!r}, expected {' | '.join(names)!r}"
            (harmless if task == "SNLI" or first[: len(names)] == names else useless).append(why)
        if count != rows:
            (harmless if count else useless).append(f"{path.name} has {count:,} rows, expected {rows:,}")
    if useless and made_here:
        raise DownloadError("; ".join(useless))
    for difference in useless + harmless:
        logger.warning("%s: %s", FOLDERS[task], difference)
    return "; ".join(useless + harmless) or "headers and rows as expected"


def put_in_place(made: Path, folder: Path) -> None:
    """Give a finished folder its name, or add its files to the user's folder, where nothing is overwritten."""
    empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if empty or not folder.exists():
        made.replace(folder)
        return
    names = _files_below(made)
    missing = [name for name in names if not (folder / name).exists()]
    for name in names:
        if name not in missing and sha256_file(folder / name) != sha256_file(made / name):
            raise DownloadError(f"{folder} already has a different {name}: move it away")
    for name in (Path(RECORD), *missing):  # the record first: it tells whether files are missing
        for left in (folder / name).parent.glob(f".{name.name}.*.part"):  # by a run that was killed here
            left.unlink()
        with atomic_write(folder / name) as beside:
            shutil.copyfile(made / name, beside)


def _files_below(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path != folder / RECORD)
