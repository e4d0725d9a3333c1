"""Downloads that can be trusted: retried, compared with a record, and unpacked within limits.

A file grows as NAME.part. NAME.json says which state of which address its bytes came from, so that a later run can
continue. A file that differs from its record is kept as NAME.<hash>.bad. requests chooses proxies and certificates.
"""

import errno
import json
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urljoin, urlsplit
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import requests
from requests.exceptions import ContentDecodingError, InvalidURL
from tqdm import tqdm
from urllib3.exceptions import DecodeError, HTTPError, LocationValueError

from dse.system.errors import InputError, RunError, one_line
from dse.system.files import read_json, sha256_file, write_text

logger = logging.getLogger(__name__)

TIME_OUT = (20, 60)  # seconds: to connect, and between two pieces
PAUSES = (1, 2, 4, 8, 16)  # seconds before the next try; from the first again whenever a try got further
LONGEST_PAUSE = 60  # seconds, when the server asks for one (Retry-After)
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that may pass
LASTING_ERRORS = ValueError, requests.TooManyRedirects, ContentDecodingError, DecodeError  # the others may pass
MOST_FILES = 1000  # in an archive


class DownloadError(RunError):
    """A file cannot be fetched or trusted. `wait`: the least seconds until a retry may succeed; None: none can."""

    def __init__(self, why: str, wait: int | None = None) -> None:
        super().__init__(why)
        self.wait = wait


def shown(url: str) -> str:
    """An address without user name, password and query, as logs may show it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def keep_aside(path: Path) -> Path:
    """Rename a fetched file that must not be used to NAME.<start of its hash>.bad; remove its note."""
    _beside(path, ".json").unlink(missing_ok=True)
    return path.replace(_beside(path, f".{sha256_file(path)[:12]}.bad"))


def forget(path: Path) -> None:
    """Remove a fetched file that is no longer needed, with its note."""
    for ending in ("", ".part", ".json"):
        _beside(path, ending).unlink(missing_ok=True)


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) if the disk has less room than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        why = f"{needed / 1e6:,.1f} MB are needed, but {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, why, str(folder))


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


@dataclass(frozen=True)
class Download:
    """A file to fetch."""

    url: str  # http or https
    path: Path  # where it goes, in a folder that exists
    most: int  # bytes at which to stop reading: the file cannot be that long
    size: int | None = None  # recorded bytes, if there is a record
    sha256: str | None = None  # recorded hash

    def fetch(self) -> tuple[str, str]:
        """Download the file, continuing with what an earlier try left beside `path`.

        Returns its SHA-256, and the address that the bytes came from, after redirects. Raises DownloadError if the file
        cannot be fetched, is longer than `most`, or is not the recorded one, and for a redirect from https to http;
        OSError if it cannot be written or does not fit on the disk.
        """
        if self.path.exists():  # complete, but the run that fetched it ended before it was used
            self.path.replace(self.part)
        name, failures = shown(self.url), 0
        have = furthest = self.progress()[0]
        while True:
            try:
                self.receive()
                found = self.check(in_pieces=have > 0)
                self.part.replace(self.path)
                return found, self.note().get("at", name)
            except (DownloadError, requests.RequestException, HTTPError, ValueError, TypeError) as cause:
                error, have = _explained(cause), self.progress()[0]
                if error.wait is None:
                    raise DownloadError(f"{name}: {error}") from cause
                failures = 1 if have > furthest else failures + 1
                furthest = max(have, furthest)
                if failures > len(PAUSES):
                    kept = f", kept {have:,} bytes: run the same command to continue" if have else ""
                    raise DownloadError(f"{name}: {error}; gave up after {failures} tries{kept}") from cause
                pause = max(PAUSES[failures - 1], min(error.wait, LONGEST_PAUSE))
                logger.warning("%s: %s; try %d of %d in %g s", name, error, failures + 1, len(PAUSES) + 1, pause)
                time.sleep(pause)

    @property
    def part(self) -> Path:
        """The file while it grows."""
        return _beside(self.path, ".part")

    def received(self) -> int:
        """Bytes of the part."""
        return self.part.stat().st_size if self.part.exists() else 0

    def note(self) -> dict[str, Any]:
        """What is noted about the part's bytes; nothing if the note cannot be read."""
        try:
            return read_json(_beside(self.path, ".json"), "a note")
        except InputError:
            return {}

    def progress(self) -> tuple[int, str]:
        """Bytes of the part to continue from, and their state ('': none; then only a recorded hash shows a change)."""
        note, have = self.note(), self.received()
        state = str(note.get("state", ""))
        usable = state if self.size is None else have <= self.size
        return (have, state) if usable and note.get("from") == shown(self.url) else (0, "")

    def check(self, in_pieces: bool) -> str:
        """The part's SHA-256. Raises if it is not the recorded one; bytes of several answers are then fetched again."""
        found = sha256_file(self.part)
        if self.sha256 in (None, found):
            return found
        if in_pieces:
            self.part.unlink()
            raise DownloadError("the pieces do not make up the recorded file: starting over", wait=0)
        came, recorded = f"{self.received():,} bytes with SHA-256 {found}", f"{self.size:,} bytes with {self.sha256}"
        what = f"{came}, but the record says {recorded}; kept as {keep_aside(self.part.replace(self.path))}"
        raise DownloadError(f"{what}; a mirror that repacks its files needs --no_verify")

    def receive(self) -> None:
        """Try once to complete the part."""
        have, state = self.progress()
        if have and have == self.size:
            return
        headers = {"Accept-Encoding": "identity"}  # ranges count the file's own bytes
        if have:
            headers |= {"Range": f"bytes={have}-"} | ({"If-Range": state} if state else {})
        options: dict[str, Any] = {"stream": True, "timeout": TIME_OUT, "hooks": {"response": _stay_encrypted}}
        with requests.get(self.url, headers=headers, **options) as response:
            complete = response.status_code == 416 and response.headers.get("Content-Range", "") == f"bytes */{have}"
            if not (have and complete):
                self.append(response, self.start_of(response, have, state))

    def start_of(self, response: requests.Response, have: int, state: str) -> int:
        """The position in the file at which an answer's body begins. Raises if the answer is useless."""
        status = response.status_code
        if status == 200:
            # Do not give up what we have for an answer, such as an error page, that cannot be the recorded file.
            length = _number(response, "Content-Length")
            if have and self.size is not None and length not in (None, self.size) and "ETag" not in response.headers:
                raise DownloadError(f"the server sends {length:,} bytes instead of {self.size:,}", wait=0)
            return 0
        same = not state or _state_of(response) in ("", state)  # not every server heeds If-Range
        if status == 206 and have and same and response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            return have
        if status == 206 or (status == 416 and have):
            self.part.unlink(missing_ok=True)
            raise DownloadError("the server does not continue the same file: starting over", wait=0)
        wait = (_number(response, "Retry-After") or 0) if status in PASSING else None
        raise DownloadError(f"the server answers {status} {response.reason or ''}".strip(), wait)

    def append(self, response: requests.Response, start: int) -> None:
        """Write an answer's body to the part, after its first `start` bytes. Raises if it is too long or too short."""
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"  # although asked not to
        length, total = _number(response, "Content-Length"), self.size
        if known := re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", "")):
            total = int(known[1])
        elif length is not None and not encoded:
            total = start + length
        too_long = DownloadError(f"longer than the {self.most:,} bytes that this file can have: stopped reading")
        if (total or 0) > self.most:
            raise too_long
        check_space(self.part.parent, (total or 0) - self.received())
        options = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
        bar = tqdm(desc=self.path.name, initial=start, total=total, **options)
        with bar, open(self.part, "ab" if start else "wb") as file:
            if not start:  # a body that was decoded on the way cannot be continued
                note = {"from": None if encoded else shown(self.url), "state": _state_of(response)}
                write_text(_beside(self.path, ".json"), json.dumps(note | {"at": shown(response.url)}))
            # read1 gives what has come: if the connection breaks, nothing that came is lost
            while piece := response.raw.read1(1 << 16, decode_content=True):
                file.write(piece)
                bar.update(len(piece))
                if file.tell() > self.most:
                    file.truncate(0)  # leaves nothing to continue
                    raise too_long
        if total is None and length is None and response.headers.get("Transfer-Encoding") != "chunked":
            logger.warning("%s: the server did not say how long the file is, so it may be cut off", shown(self.url))
        if self.received() < (total or 0):
            raise DownloadError(f"the answer ended at {self.received():,} of {total:,} bytes", wait=0)


def _explained(error: Exception) -> DownloadError:
    """What this module, requests or urllib3 raised, as a DownloadError."""
    if isinstance(error, DownloadError):
        return error
    if not isinstance(error, requests.RequestException | HTTPError):
        # for addresses, passwords and headers that neither library expects
        return DownloadError(f"an address or an answer that cannot be read ({type(error).__name__})")
    why = _innermost(error)
    if "certificate" in why.lower():
        return DownloadError(f"{why}; REQUESTS_CA_BUNDLE names the certificates to trust")
    return DownloadError(why, wait=None if isinstance(error, LASTING_ERRORS) else 0)


def _innermost(error: BaseException) -> str:
    """The innermost cause of an error, in one line, without passwords that addresses may carry."""
    while inner := [each for each in (getattr(error, "reason", None), *error.args) if isinstance(each, BaseException)]:
        error = inner[-1]
    if isinstance(error, InvalidURL | LocationValueError):
        return "not a valid address"
    return re.sub(r"\?[^\s'\")]*", "?...", re.sub(r"//[^/\s]*@", "//", one_line(error)))


def _stay_encrypted(response: requests.Response, **_: Any) -> None:
    """Refuse a redirect from https to http before it is followed."""
    target = urljoin(response.url, response.headers.get("Location", ""))
    if response.is_redirect and response.url.startswith("https:") and urlsplit(target).scheme != "https":
        raise DownloadError(f"redirected to {shown(target)}, which is not https: not followed")


def _number(response: requests.Response, name: str) -> int | None:
    """The value of an answer's header, if it is a number."""
    value = response.headers.get(name, "")
    return int(value) if value.isdecimal() else None


def _state_of(response: requests.Response) -> str:
    """What names the state of the server's file: a strong ETag, else the date, else nothing."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def unzip(archive: Path, folder: str, into: Path, most: int, only: Collection[str] = ()) -> None:
    """Write the files below `folder` in a zip archive, or `only` those names, to `into`, an empty or missing folder.

    Raises DownloadError, before anything is written, for unsafe members anywhere in the archive and more than `most`
    bytes, and later for damaged contents (CRC) and two files of the same name; OSError if the disk has no room.
    """
    try:
        with ZipFile(archive) as zipped:
            members = _members(zipped, folder, most, only)
            check_space(into.parent, sum(info.file_size for info, _ in members))
            for info, place in members:
                target = into / place
                target.parent.mkdir(parents=True, exist_ok=True)
                # zipfile reads no more than the size that was counted, and compares the CRC
                with zipped.open(info) as source, open(target, "xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
    except (FileExistsError, NotADirectoryError) as error:
        raise DownloadError("archive refused: two of its files have the same name") from error
    except DownloadError as error:
        raise DownloadError(f"archive refused: {error}") from error
    except Exception as error:  # zipfile and zlib raise many kinds for a damaged file
        if isinstance(error, OSError):
            raise
        raise DownloadError(f"{archive.name}: not a complete zip archive ({one_line(error)})") from error


def _members(zipped: ZipFile, folder: str, most: int, only: Collection[str]) -> list[tuple[ZipInfo, Path]]:
    """The wanted files and their places below `folder`. Raises DownloadError unless every member is harmless."""
    wanted, beside = [], []
    for info in zipped.infolist():
        place = PureWindowsPath(info.filename)  # knows both kinds of slashes, and drives
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive does not say
        refusals = {
            "would lie outside the task's folder": place.anchor or ".." in place.parts,
            "is a link or another special file": kind not in (0, stat.S_IFREG, stat.S_IFDIR),
            "is neither stored nor deflated": info.compress_type not in (ZIP_STORED, ZIP_DEFLATED),
            "would begin before the archive": info.header_offset < 0,
        }
        if why := [why for why, applies in refusals.items() if applies]:
            raise DownloadError(f"{info.filename!r} {why[0]}")
        below = Path(*place.parts[1:])
        if place.parts[:1] != (folder,) or below == Path():
            beside += [] if info.is_dir() else [info.filename]
        elif not (info.is_dir() or (only and str(below) not in only)):
            wanted.append((info, below))
    missing = sorted(set(only) - {str(place) for _, place in wanted})
    if missing or not wanted:
        found = ", ".join(map(repr, [*(info.filename for info, _ in wanted), *beside][:3]))
        expected = ", ".join(f"{folder}/{name}" for name in missing) or f"files below {folder}/"
        raise DownloadError(f"expected {expected}, found {found or 'no files'}")
    total = sum(info.file_size for info, _ in wanted)
    if total > most or len(zipped.infolist()) > MOST_FILES:
        limits = f"at most {most:,} bytes in {MOST_FILES:,}"
        raise DownloadError(f"it would unpack to {total:,} bytes in {len(wanted):,} files; this task can have {limits}")
    if beside:
        logger.info("left out %d files beside %s/ in the archive, such as %r", len(beside), folder, beside[0])
    return wanted
