"""Files from the net that can be trusted: fetched with patience, compared with the record, unpacked within bounds.

`fetch` lets a file grow as NAME.part. NAME.json beside it says which address, and which state of the file there (its
ETag or date), the bytes came from, so that after a broken connection, or in a later run, a Range request goes on at
the end; If-Range has the server start over when its file changed. Only a whole file that agrees with its record
takes the name; one that does not is kept as NAME.<hash>.bad. `unzip` looks at every member before it writes the first.

Proxies and certificates are those of requests (HTTPS_PROXY, REQUESTS_CA_BUNDLE, .netrc). Addresses are logged and
stored without user names, passwords and queries.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import stat
import time
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
import urllib3.exceptions
from tqdm import tqdm

from dse.system.errors import InputError, one_line
from dse.system.files import read_json, sha256_file, write_text

logger = logging.getLogger(__name__)

TIME_OUT = (20, 60)  # seconds: to connect, and between two pieces
PAUSES = (1, 2, 4, 8, 16)  # seconds before the next try; from the first again whenever a try got further
LONGEST_PAUSE = 60  # seconds, when the server asks for one (Retry-After)
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers that may be other ones soon
MOST_FILES = 1000  # in an archive


class DownloadError(Exception):
    """A file could not be had, or cannot be trusted. The message is one line."""


class _Broken(Exception):
    """This try failed, the next one may not; `wait` seconds are what the server asked for."""

    def __init__(self, why: str, wait: float = 0) -> None:
        super().__init__(why)
        self.wait = wait


def shown(url: str) -> str:
    """An address without user name, password and query, as logs may show it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def fetch(url: str, path: Path, most: int, size: int | None = None, sha256: str | None = None) -> tuple[str, str]:
    """Download a file, going on with what an earlier try left beside `path`.

    Args:
        url: http or https address.
        path: where the file goes; its folder exists.
        most: bytes at which to stop reading: the file cannot be that long.
        size: recorded bytes; None: no record.
        sha256: recorded hash; None: no record.

    Returns the SHA-256 obtained, and the address that the bytes came from, after redirects. Raises DownloadError when
    the file cannot be had, is longer than `most`, or is not the recorded one, and for a redirect from https to http;
    OSError when it cannot be written or finds no room.
    """
    part = path.with_name(path.name + ".part")
    if path.exists():  # whole, but the run that fetched it ended before it was used
        path.replace(part)
    if size is not None and part.exists() and part.stat().st_size > size:
        part.unlink()
    in_pieces = _receive_patiently(url, part, most, size)
    found = sha256_file(part)
    if sha256 is not None and found != sha256 and in_pieces:
        logger.warning("%s: its pieces do not make the recorded file; once more, from the start", shown(url))
        part.unlink()
        _receive_patiently(url, part, most, size)
        found = sha256_file(part)
    if sha256 is not None and found != sha256:
        raise DownloadError(
            f"{shown(url)}: {_bytes_of(part):,} bytes with SHA-256 {found}, but recorded are {size:,} bytes with "
            f"{sha256}; kept as {keep_aside(part, path.name)}; a mirror that repacks needs --no_verify"
        )
    part.replace(path)
    return found, _note(part).get("at", shown(url))


def _receive_patiently(url: str, part: Path, most: int, size: int | None) -> bool:
    """Try until `part` is whole; did it take more than one answer, now or earlier?"""
    failures, furthest = 0, _progress(url, part, recorded=size is not None)[0]
    in_pieces = furthest > 0
    while True:
        try:
            _receive(url, part, most, size)
            return in_pieces
        except _Broken as error:
            have = _progress(url, part, recorded=size is not None)[0]
            in_pieces |= have > 0
            if have > furthest:
                failures, furthest = 0, have
            if failures == len(PAUSES):
                got = f", {have:,} bytes are kept: the same command goes on there" if have else ""
                raise DownloadError(f"{shown(url)}: {error}; given up after {failures + 1} tries{got}") from error
            pause = max(PAUSES[failures], min(error.wait, LONGEST_PAUSE))
            failures += 1
            logger.warning("%s: %s; try %d of %d in %g s", shown(url), error, failures + 1, len(PAUSES) + 1, pause)
            time.sleep(pause)


def keep_aside(path: Path, name: str) -> Path:
    """Rename a file that must not be used to <name>.<start of its hash>.bad beside it; forget where it came from."""
    aside = path.with_name(f"{name}.{sha256_file(path)[:12]}.bad")
    path.replace(aside)
    _note_of(path.with_name(name + ".part")).unlink(missing_ok=True)
    return aside


def forget(path: Path) -> None:
    """Remove a fetched file that is not needed any more, with its note."""
    for each in (path, path.with_name(path.name + ".part"), path.with_name(path.name + ".json")):
        each.unlink(missing_ok=True)


def check_space(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) where `needed` bytes find no room."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        why = f"{needed / 1e6:,.1f} MB are needed, and {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, why, str(folder))


def _bytes_of(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _note_of(part: Path) -> Path:
    return part.with_suffix(".json")


def _progress(url: str, part: Path, recorded: bool) -> tuple[int, str]:
    """Bytes of `part` that a request for `url` can go on from, and the server's word for their state ('': none).

    Without that word, only a recorded hash would notice that the file at `url` changed in between.
    """
    note = _note(part)
    state = str(note.get("state", ""))
    return (_bytes_of(part), state) if note.get("from") == shown(url) and (state or recorded) else (0, "")


def _note(part: Path) -> dict[str, str]:
    """What is noted of the bytes of `part`; nothing where that cannot be read."""
    try:
        return read_json(_note_of(part), "a note")
    except InputError:
        return {}


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Sort what requests and urllib3 raise into tries that may be repeated and those that need not."""
    network = urllib3.exceptions
    try:
        yield
    except (requests.RequestException, network.HTTPError) as error:
        why = _innermost(error)
        passing = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
        if "certificate" in why.lower():
            raise DownloadError(f"{shown(url)}: {why}; REQUESTS_CA_BUNDLE names the certificates to trust") from error
        if isinstance(error, (*passing, network.ProtocolError, network.TimeoutError, network.SSLError)):
            raise _Broken(why) from error
        raise DownloadError(f"{shown(url)}: {why}") from error
    except (ValueError, TypeError) as error:  # of addresses, passwords and headers that neither library expects
        why = f"an address or an answer that cannot be read ({type(error).__name__})"
        raise DownloadError(f"{shown(url)}: {why}") from error


def _innermost(error: BaseException) -> str:
    """What an error was caused by, in one line, without passwords that addresses may carry."""
    while True:
        inner = [cause for cause in (getattr(error, "reason", None), *error.args) if isinstance(cause, BaseException)]
        if not inner:
            break
        error = inner[-1]
    if isinstance(error, requests.exceptions.InvalidURL | urllib3.exceptions.LocationValueError):
        return "no valid address"
    return re.sub(r"\?[^\s'\")]*", "?...", re.sub(r"//[^/\s]*@", "//", one_line(error)))


def _receive(url: str, part: Path, most: int, size: int | None) -> None:
    """One try to make `part` whole. Raises _Broken when another one may get further."""
    have, state = _progress(url, part, recorded=size is not None)
    if have and have == size:
        return
    headers = {"Accept-Encoding": "identity"}  # ranges count the file's own bytes
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": state} if state else {})
    options = {"stream": True, "timeout": TIME_OUT, "hooks": {"response": _stay_encrypted}}
    with _network_errors(url), requests.get(url, headers=headers, **options) as response:
        if response.status_code == 416 and have:
            if response.headers.get("Content-Range", "").strip() == f"bytes */{have}":
                return  # nothing is left to send
            part.unlink()
            raise _Broken(f"the server has no byte {have:,}: from the start")
        if response.status_code not in (200, 206):
            _refuse(url, response)
        if response.status_code == 200:
            _check_before_the_start(response, have, size)
            have = 0
        elif not (have and _goes_on(response, have, state)):
            part.unlink(missing_ok=True)
            raise _Broken("the server does not go on with the same file: from the start")
        _append(url, response, part, have, most)
        _check_end(url, response, part, size)


def _stay_encrypted(response: requests.Response, **_: Any) -> None:
    """Refuse a redirect from https to http before it is followed."""
    target = urljoin(response.url, response.headers.get("Location", ""))
    if response.is_redirect and response.url.startswith("https:") and urlsplit(target).scheme != "https":
        raise DownloadError(f"{shown(response.url)}: redirected to {shown(target)}, which is not https: not followed")


def _check_before_the_start(response: requests.Response, have: int, size: int | None) -> None:
    """Do not give up what we have for an answer, such as an error page, that cannot be the recorded file."""
    length = response.headers.get("Content-Length", "")
    if have and size is not None and length.isdecimal() and int(length) != size and "ETag" not in response.headers:
        raise _Broken(f"the server sends {int(length):,} bytes in place of {size:,}")


def _check_end(url: str, response: requests.Response, part: Path, size: int | None) -> None:
    """Raise _Broken for an answer that ended too early; urllib3 has compared the body with Content-Length."""
    asked = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", "").strip())
    expected = int(asked[1]) if asked else size
    sure = "Content-Length" in response.headers or response.headers.get("Transfer-Encoding") == "chunked"
    if expected is not None and _bytes_of(part) < expected and (asked or not sure):
        raise _Broken(f"the answer ended at {_bytes_of(part):,} of {expected:,} bytes")
    if expected is None and not sure:
        logger.warning("%s: the server did not say how long it is, so it may be cut off", shown(url))


def _goes_on(response: requests.Response, have: int, state: str) -> bool:
    """Is this partial answer the rest of what we have? Not every server heeds If-Range."""
    return response.headers.get("Content-Range", "").startswith(f"bytes {have}-") and (
        not state or _state_of(response) in ("", state)
    )


def _state_of(response: requests.Response) -> str:
    """What names the state of the server's file: a strong ETag, else the date, else nothing."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _refuse(url: str, response: requests.Response) -> None:
    why = f"{response.status_code} {response.reason or ''}".strip()
    if response.status_code not in PASSING:
        raise DownloadError(f"{shown(url)}: the server answers {why}")
    after = response.headers.get("Retry-After", "")
    raise _Broken(f"the server answers {why}", wait=int(after) if after.isdecimal() else 0)


def _append(url: str, response: requests.Response, part: Path, have: int, most: int) -> None:
    """Write the answer's body to the end of the first `have` bytes of `part`."""
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"  # although asked not to
    length = response.headers.get("Content-Length", "")
    total = have + int(length) if length.isdecimal() and not encoded else None
    too_long = DownloadError(f"{shown(url)}: longer than the {most:,} bytes that this file can have: not read on")
    if total is not None:
        if total > most:
            raise too_long
        check_space(part.parent, total - _bytes_of(part))
    with open(part, "ab" if have else "wb") as file:
        if not have:
            _write_note(url, response, part, encoded)
        bar = tqdm(desc=part.stem, initial=have, total=total, unit="B", unit_scale=True, disable=None, leave=False)
        with bar:
            # read1 gives what has come: when the connection breaks, nothing that came is lost
            while piece := response.raw.read1(1 << 16, decode_content=True):
                file.write(piece)
                bar.update(len(piece))
                if file.tell() > most:
                    file.truncate(0)  # nothing to go on with
                    raise too_long


def _write_note(url: str, response: requests.Response, part: Path, encoded: bool) -> None:
    """Say what the bytes of `part` come from; a body that was decoded on the way cannot be gone on with."""
    note = {"from": None if encoded else shown(url), "state": _state_of(response), "at": shown(response.url)}
    write_text(_note_of(part), json.dumps(note))


def unzip(archive: Path, folder: str, into: Path, most: int, only: Collection[str] = ()) -> None:
    """Write an archive's regular files below `folder` to `into`, that folder's name left out.

    Args:
        archive: a zip file, stored or deflated.
        folder: the one folder of the archive that is wanted; what lies beside it is left out.
        into: an empty or missing folder.
        most: bytes that the files may have together.
        only: names of files right below `folder`, when not all are wanted.

    Raises DownloadError: before anything is written for absolute paths, `..`, links and other special files anywhere
    in the archive, and for more bytes than `most`; for spoiled contents (CRC) with some files written. OSError where
    there is no room.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = _members(zipped, folder, only)
            _check_amount(zipped, members, into, most)
            for info, place in members:
                target = into / place
                target.parent.mkdir(parents=True, exist_ok=True)
                # zipfile reads no more than the size that was counted, and compares the CRC
                with zipped.open(info) as source, open(target, "xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                    file.flush()
                    os.fsync(file.fileno())
    except (OSError, DownloadError):
        raise
    except Exception as error:  # zipfile and zlib raise many kinds for a spoiled file
        raise DownloadError(f"{archive.name}: no whole zip archive ({one_line(error)})") from error


def _members(zipped: zipfile.ZipFile, folder: str, only: Collection[str]) -> list[tuple[zipfile.ZipInfo, Path]]:
    """The wanted files and their places below `folder`, once every member was found harmless."""
    wanted, beside = [], []
    for info in zipped.infolist():
        place = PureWindowsPath(info.filename)  # knows both kinds of slashes, and drives
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive does not say
        if place.anchor or ".." in place.parts:
            raise DownloadError(f"archive refused: {info.filename!r} would lie outside the task's folder")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DownloadError(f"archive refused: {info.filename!r} is a link or another special file")
        if info.is_dir():
            continue
        if place.parts[:1] == (folder,) and len(place.parts) > 1:
            if not only or place.parts[1:] in {(name,) for name in only}:
                wanted.append((info, Path(*place.parts[1:])))
        else:
            beside.append(info.filename)
    places = [place for _, place in wanted]
    if len(set(places)) < len(places) or not {parent for place in places for parent in place.parents}.isdisjoint(
        places
    ):
        raise DownloadError("archive refused: two of its files have one name")
    missing = set(only) - {str(place) for place in places}
    if missing or not wanted:
        names = [repr(name) for name in [*(info.filename for info, _ in wanted), *beside][:3]]
        expected = ", ".join(f"{folder}/{name}" for name in sorted(missing)) or f"files below {folder}/"
        raise DownloadError(f"archive refused: {expected} expected, found {', '.join(names) or 'no files'}")
    if beside:
        logger.info("%d files beside %s/ in the archive left out, such as %r", len(beside), folder, beside[0])
    return wanted


def _check_amount(zipped: zipfile.ZipFile, members: list[tuple[zipfile.ZipInfo, Path]], into: Path, most: int) -> None:
    total = sum(info.file_size for info, _ in members)
    if total > most or len(zipped.infolist()) > MOST_FILES:
        raise DownloadError(
            f"archive refused: it would unpack to {total:,} bytes in {len(members):,} files; "
            f"this task can have no more than {most:,} bytes in {MOST_FILES:,}"
        )
    for info, _ in members:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DownloadError(f"archive refused: {info.filename!r} is neither stored nor deflated")
        if info.header_offset < 0:
            raise DownloadError(f"archive refused: {info.filename!r} would begin before the file")
    check_space(into.parent, total)
