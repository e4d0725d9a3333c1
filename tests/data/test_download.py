"""download_glue_data.py against a server on this machine, which misbehaves as told; MRPC and SNLI made by hand."""

import email.utils
import gzip
import hashlib
import http.server
import io
import json
import logging
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from pathlib import Path

import pytest
import requests
from helpers import REAL_MRPC
from processes import LONG, ROOT

import download_glue_data
import finetune_bert
from dse.data import download
from dse.data import glue as recipes
from dse.data.download import DownloadError
from dse.experiments.synthetic import make_pair
from dse.system.errors import RunError


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (path to bytes) with ranges and ETags; `faults[path]` are used up, one per request.

    A fault is a status, ("cut", n) or ("stall", n) after n bytes, ("headers", {...}) to send besides, or
    ("redirect", address), ("short", n): a partial answer of n bytes that says so, ("page", text, headers),
    ("reason", status, words).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.asked, self.released = {}, {}, [], threading.Event()
        self.ranges, self.state, self.length = True, "ETag", True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/glue/data/"

    def ranges_asked(self, path: str) -> list[str | None]:
        return [headers.get("Range") for asked, headers in self.asked if asked == path]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        path = re.sub(r"^http://[^/]+", "", self.path)  # as a proxy is asked
        server.asked.append((path, self.headers))
        faults = server.faults.get(path, [])
        fault = faults.pop(0) if faults else None
        content = server.files.get(path)
        if isinstance(fault, int) or content is None:
            self.send_error(fault or 404)
            return
        if fault and fault[0] == "redirect":
            self.send_response(302)
            self.send_header("Location", fault[1])
            self.end_headers()
            return
        if fault and fault[0] == "reason":
            self.send_response(*fault[1:])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault and fault[0] == "page":
            self.send_response(200)
            for name, value in fault[2].items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(fault[1])
            return
        etag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
        state = {"ETag": etag, "Last-Modified": email.utils.formatdate(seconds_of(content), usegmt=True)}
        start = self.first_byte(server, state)
        if start > 0 and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        short = bool(fault) and fault[0] == "short"
        end = start + fault[1] if short else len(content)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if server.state:
            self.send_header(server.state, state[server.state])
        if server.length:
            self.send_header("Content-Length", str(end - start))
        if fault and fault[0] == "headers":
            for name, value in fault[1].items():
                self.send_header(name, value)
        self.end_headers()
        part = fault[1] if fault and fault[0] in ("cut", "stall") else len(content)
        self.wfile.write(content[start : min(start + part, end)])
        if fault and fault[0] == "stall":
            self.wfile.flush()
            server.released.wait(LONG)

    def first_byte(self, server, state) -> int:
        asked = self.headers.get("Range")
        if not (server.ranges and asked):
            return 0
        condition = self.headers.get("If-Range")
        changed = condition is not None and server.ranges != "careless" and condition not in state.values()
        return 0 if changed else int(re.fullmatch(r"bytes=(\d+)-", asked)[1])


def seconds_of(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:3], "big")  # some second of 1970


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSES", (0, 0, 0))
    running = Server()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.released.set()
    running.shutdown()
    running.server_close()


def zip_of(files: dict[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


def wnli(rows_of_train: int = 635) -> dict[str, bytes]:
    """Files with WNLI's headers and as many rows as it has; random letters, so that the zip has some length."""
    rng, files = random.Random(rows_of_train), {}
    for split, rows, label in (("train", rows_of_train, "\t1"), ("dev", 71, "\t0"), ("test", 146, "")):
        lines = ["index\tsentence1\tsentence2" + ("\tlabel" if label else "")]
        lines += [f"{i}\t{rng.getrandbits(256):x}\t{rng.getrandbits(256):x}{label}" for i in range(rows)]
        files[f"WNLI/{split}.tsv"] = "".join(line + "\n" for line in lines).encode()
    return files


@pytest.fixture
def recorded(server, monkeypatch):
    """Serve WNLI.zip, and record it in place of the real one."""

    def serve(files: dict[str, bytes] | None = None) -> bytes:
        content = zip_of(files or wnli())
        server.files["/glue/data/WNLI.zip"] = content
        source = recipes.Source("WNLI.zip", len(content), hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(recipes.SOURCES, "WNLI", [source])
        return content

    return serve


@pytest.fixture
def get(server, tmp_path, capsys):
    """Run the script on WNLI, or `tasks`: its exit code, and its table as {task: [outcome, detail]}."""

    def run(*flags: object, tasks: str = "WNLI", base_url: str | None = None) -> tuple[int, dict[str, list[str]]]:
        argv = ["--tasks", tasks, "--data_dir", tmp_path / "glue", "--base_url", base_url or server.url, *flags]
        code = 0
        try:
            download_glue_data.main([str(flag) for flag in argv])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        run.said += captured.out + captured.err
        table = [re.split(r"  +", line, maxsplit=2) for line in captured.out.splitlines()]
        return code, {task: rest for task, *rest in table}

    run.said = ""
    return run


@pytest.fixture
def glue(tmp_path):
    return tmp_path / "glue"


def files_below(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def leave_note(server, glue: Path, state: str = "") -> None:
    """As a killed run does beside WNLI.zip's bytes."""
    note = {"from": f"{server.url}WNLI.zip", "state": state}
    (glue / ".download" / "WNLI.zip.json").write_text(json.dumps(note))


def whole(glue: Path, files: dict[str, bytes]) -> bool:
    """Is WNLI there with these files, their record, and nothing else?"""
    found = files_below(glue)
    return found.pop("WNLI/download.json", None) is not None and found == files


DONE = (0, {"WNLI": ["done", "headers and rows as expected"]})


# What goes well


def test_a_task_is_downloaded_once(server, recorded, get, glue):
    content = recorded()
    assert get() == DONE
    assert whole(glue, wnli())
    record = json.loads((glue / "WNLI" / "download.json").read_text())
    sha256 = hashlib.sha256(content).hexdigest()
    origin = {"from": f"{server.url}WNLI.zip", "bytes": len(content), "sha256": sha256, "recorded_sha256": sha256}
    assert record["sources"] == [origin]
    hashes = {f"{name[5:]}": hashlib.sha256(text).hexdigest() for name, text in wnli().items()}
    assert record["files"] == hashes
    assert get() == (0, {"WNLI": ["already there", "unchanged since the download"]})
    assert len(server.asked) == 1


def serve_small_tasks(server) -> None:
    """MRPC's raw files, STS-B.zip and AX.tsv with made-up sentences."""
    rng = random.Random(0)

    def pairs(rows):
        return [make_pair(rng) for _ in range(rows)]

    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    raw = [f"{label}\t{i}\t{i + 100}\t{a}\t{b}\n" for i, (label, a, b) in enumerate(pairs(24))]
    sts_header = "index genre filename year old_index source1 source2 sentence1 sentence2 score".replace(" ", "\t")
    sts = [f"{i}\tg\tf\ty\t{i}\tnone\tnone\t{a}\t{b}\t{4.0 * label:.3f}\n" for i, (label, a, b) in enumerate(pairs(24))]
    test = [line.rsplit("\t", 1)[0] + "\n" for line in (sts_header, *sts)]
    server.files |= {
        "/senteval/senteval_data/msr_paraphrase_train.txt": (header + "".join(raw)).encode(),
        "/senteval/senteval_data/msr_paraphrase_test.txt": (header + "".join(raw[:3])).encode(),
        "/glue/data/mrpc_dev_ids.tsv": "".join(f"{i}\t{i + 100}\n" for i in range(8)).encode(),
        "/glue/data/AX.tsv": b"index\tsentence1\tsentence2\n0\ta b\tc d\n",
        "/glue/data/STS-B.zip": zip_of(
            {
                "STS-B/train.tsv": f"{sts_header}\n{''.join(sts)}".encode(),
                "STS-B/dev.tsv": f"{sts_header}\n{''.join(sts[:8])}".encode(),
                "STS-B/test.tsv": "".join(test).encode(),
            }
        ),
    }


def test_fine_tuning_starts_on_what_was_downloaded(server, get, glue, teacher_flags, tmp_path):
    serve_small_tasks(server)
    code, table = get("--no_verify", tasks="MRPC,STS,diagnostic")
    assert code == 0
    assert table["MRPC"][0] == table["STS"][0] == table["diagnostic"][0] == "done"
    assert "train.tsv has 16 rows, expected 3,668" in table["MRPC"][1]
    assert len((glue / "MRPC" / "dev.tsv").read_text().splitlines()) == 9
    assert (glue / "diagnostic" / "diagnostic.tsv").read_bytes() == server.files["/glue/data/AX.tsv"]
    for name, folder, metric in (("mrpc", "MRPC", "acc_and_f1"), ("sts-b", "STS-B", "pearson")):
        finetune_bert.main(teacher_flags(name, data_dir=glue / folder, output_dir=tmp_path / name))
        assert f"{metric} = " in (tmp_path / name / "eval_results.txt").read_text()


def test_no_verify_takes_another_file_and_says_so(server, get, glue, caplog):
    server.files["/glue/data/WNLI.zip"] = content = zip_of(wnli(rows_of_train=9))
    code, table = get("--no_verify")
    assert (code, table["WNLI"]) == (0, ["done", "train.tsv has 9 rows, expected 635"])
    sha256 = hashlib.sha256(content).hexdigest()
    recorded = recipes.SOURCES["WNLI"][0].sha256
    assert f"SHA-256 {sha256}, recorded: {recorded}" in caplog.text
    assert get()[1] == {
        "WNLI": ["already there", "unchanged since the download, which differed from the recorded hashes"]
    }


def test_a_mirror_without_a_slash_at_its_end_and_all_tasks(server, recorded, get):
    recorded()
    assert get(base_url=server.url.rstrip("/")) == DONE
    code, table = get(tasks="all", base_url=server.url.rstrip("/"))
    assert code == 1
    assert list(table) == list(recipes.SOURCES)
    assert table["WNLI"][0] == "already there"
    assert table["CoLA"][0] == "failed"


# Connections


@pytest.mark.parametrize("state", ["ETag", "Last-Modified", None])
def test_a_cut_connection_goes_on_where_it_stopped(server, recorded, get, glue, state):
    content = recorded()
    server.state = state
    server.faults["/glue/data/WNLI.zip"] = [("cut", 10_000), ("cut", 5_000)]
    assert get() == DONE
    assert whole(glue, wnli())
    assert len(content) > 15_000
    assert server.ranges_asked("/glue/data/WNLI.zip") == [None, "bytes=10000-", "bytes=15000-"]
    etag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
    date = email.utils.formatdate(seconds_of(content), usegmt=True)
    assert server.asked[1][1].get("If-Range") == {"ETag": etag, "Last-Modified": date, None: None}[state]


def test_a_cut_without_a_length_is_noticed(server, recorded, get, glue):
    recorded()
    server.length = False
    server.faults["/glue/data/WNLI.zip"] = [("cut", 10_000)]
    assert get() == DONE
    assert server.ranges_asked("/glue/data/WNLI.zip") == [None, "bytes=10000-"]


def test_a_server_without_ranges_is_asked_from_the_start(server, recorded, get, glue):
    recorded()
    server.ranges = False
    server.faults["/glue/data/WNLI.zip"] = [("cut", 10_000)]
    assert get() == DONE
    assert whole(glue, wnli())


@pytest.mark.parametrize("ranges", [True, "careless"])
@pytest.mark.parametrize("state", ["ETag", "Last-Modified", None])
def test_a_file_that_changes_in_between_is_not_mixed(server, get, glue, ranges, state):
    """Without a recorded hash: by If-Range, by what a careless server says of its state, or from the start."""
    old, new = (zip_of(wnli(rows), zipfile.ZIP_STORED) for rows in (635, 634))
    server.files["/glue/data/WNLI.zip"], server.ranges, server.state = new, ranges, state
    area = glue / ".download"
    area.mkdir(parents=True)
    (area / "WNLI.zip.part").write_bytes(old[:10_000])
    states = {
        "ETag": f'"{hashlib.sha256(old).hexdigest()[:8]}"',
        "Last-Modified": email.utils.formatdate(seconds_of(old), usegmt=True),
        None: "",
    }
    leave_note(server, glue, states[state])
    code, table = get("--no_verify")
    assert (code, table["WNLI"][0]) == (0, "done")
    assert whole(glue, wnli(634))
    assert server.ranges_asked("/glue/data/WNLI.zip")[0] == ("bytes=10000-" if state else None)


@pytest.mark.parametrize("flags", [(), ("--no_verify",)])
def test_a_partial_answer_that_is_short_is_gone_on_with(server, recorded, get, glue, flags):
    recorded()
    server.faults["/glue/data/WNLI.zip"] = [("cut", 10_000), ("short", 5_000)]
    assert get(*flags) == DONE
    assert whole(glue, wnli())
    assert server.ranges_asked("/glue/data/WNLI.zip") == [None, "bytes=10000-", "bytes=15000-"]


def test_pages_of_a_network_in_place_of_the_file(server, recorded, get, glue):
    """One after a broken connection costs nothing; one at the start, of unknown length, costs the start."""
    recorded()
    page = b"<p>Sign in"
    server.faults["/glue/data/WNLI.zip"] = [("cut", 10_000), ("page", page, {"Content-Length": "10"})]
    assert get() == DONE
    assert server.ranges_asked("/glue/data/WNLI.zip") == [None, "bytes=10000-", "bytes=10000-"]
    shutil.rmtree(glue)
    server.asked.clear()
    server.faults["/glue/data/WNLI.zip"] = [("page", page, {})]
    assert get() == DONE
    assert server.ranges_asked("/glue/data/WNLI.zip") == [None, "bytes=10-", None]
    assert list((glue / ".download").glob("*.bad")) == []


NONSENSE = {
    "bad address": ("redirect", "http://[::1/x"),
    "bytes in an address": ("redirect", "/caf\xe9/"),
    "endless number": ("page", b"x", {"Content-Length": "9" * 5000}),
}


@pytest.mark.parametrize("fault", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_of_a_server_stops_no_other_task(server, recorded, get, fault):
    recorded()
    server.files["/glue/data/RTE.zip"] = b"x"
    server.faults["/glue/data/RTE.zip"] = [fault] * 5
    code, table = get(tasks="RTE,WNLI")
    assert (code, table["RTE"][0]) == (1, "failed")
    assert table["WNLI"] == DONE[1]["WNLI"]


def test_bytes_from_another_address_are_not_gone_on_with(server, get, glue):
    content = server.files["/glue/data/WNLI.zip"] = zip_of(wnli())
    (glue / ".download").mkdir(parents=True)
    (glue / ".download" / "WNLI.zip.part").write_bytes(bytes(10_000))
    leave_note(server, glue, f'"{hashlib.sha256(content).hexdigest()[:8]}"')
    note = glue / ".download" / "WNLI.zip.json"
    note.write_text(note.read_text().replace("/glue/", "/other/"))
    assert get("--no_verify") == DONE
    assert server.ranges_asked("/glue/data/WNLI.zip") == [None]


def test_a_server_that_stalls(server, recorded, get, glue, monkeypatch, caplog):
    recorded()
    monkeypatch.setattr(download, "TIME_OUT", (2, 0.3))
    server.faults["/glue/data/WNLI.zip"] = [("stall", 10_000)]
    assert get() == DONE
    assert "Read timed out" in caplog.text
    assert server.ranges_asked("/glue/data/WNLI.zip") == [None, "bytes=10000-"]


def test_tries_end(server, recorded, get, glue):
    recorded()
    server.faults["/glue/data/WNLI.zip"] = [("cut", 10_000), 503, ("cut", 5_000), *[503] * 9]
    code, table = get()
    assert code == 1
    assert "the server answers 503 Service Unavailable; gave up after 4 tries" in table["WNLI"][1]
    assert len(server.asked) == 6  # the third got further, so the count began anew
    server.faults.clear()
    assert get() == DONE
    assert server.ranges_asked("/glue/data/WNLI.zip")[-1] == "bytes=15000-"


@pytest.mark.parametrize("cut", [False, True])
def test_the_address_after_redirects_is_recorded(cut, server, recorded, get, glue):
    content = recorded()
    to = f"{server.url.replace('//', '//user:geheim@').removesuffix('glue/data/')}elsewhere/WNLI.zip?token=geheim"
    server.files["/elsewhere/WNLI.zip?token=geheim"] = content
    server.faults["/elsewhere/WNLI.zip?token=geheim"] = [("cut", 10_000)] * cut
    server.faults["/glue/data/WNLI.zip"] = [("redirect", to)] * 2
    assert get() == DONE
    record = (glue / "WNLI" / "download.json").read_text()
    assert json.loads(record)["sources"][0]["from"] == server.url.replace("glue/data/", "elsewhere/WNLI.zip")
    assert "geheim" not in record
    assert server.ranges_asked("/elsewhere/WNLI.zip?token=geheim") == [None, "bytes=10000-"][: 1 + cut]


@pytest.mark.parametrize("target", ["http://other.invalid/x", "HTTP://other.invalid/x", "http:x"])
def test_a_redirect_from_https_to_http_is_not_followed(target, get, monkeypatch):
    asked = []

    def answer(adapter, request, **_):
        asked.append(request.url)
        response = requests.Response()
        response.status_code, response.url, response.request = 302, request.url, request
        response.headers["Location"] = target
        response.raw = io.BytesIO()
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", answer)
    code, table = get(base_url="https://glue.invalid/")
    assert (code, asked) == (1, ["https://glue.invalid/WNLI.zip"])
    assert table["WNLI"][1].startswith("https://glue.invalid/WNLI.zip: redirected to http:")
    assert table["WNLI"][1].endswith("which is not https: not followed")


def test_control_characters_of_a_server_do_not_reach_the_terminal(server, recorded, get):
    recorded()
    words = "Not\x1b[2J\x9b1mFound\x08"
    server.faults["/glue/data/WNLI.zip"] = [("reason", 503, words), ("reason", 404, words)]
    code, table = get()
    assert (code, table["WNLI"][0]) == (1, "failed")
    assert table["WNLI"][1].endswith(r"the server answers 404 Not\x1b[2J\x9b1mFound\x08")
    assert r"the server answers 503 Not\x1b[2J\x9b1mFound\x08; try 2" in get.said
    assert not set("\x1b\x9b\x08") & set(get.said)


def test_nobody_answers(server, get):
    server.server_close()
    code, table = get()
    assert code == 1
    assert "refused" in table["WNLI"][1]


def test_500_twice_then_fine_with_growing_pauses(server, recorded, get, monkeypatch):
    recorded()
    pauses = []
    monkeypatch.setattr(download, "PAUSES", (1, 2, 4))
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    server.faults["/glue/data/WNLI.zip"] = [500, 500]
    assert get() == DONE
    assert pauses == [1, 2]


def test_404_is_asked_once_and_stops_no_other_task(server, recorded, get, glue):
    recorded()
    code, table = get(tasks="RTE,WNLI")
    assert code == 1
    assert table == {"RTE": ["failed", f"{server.url}RTE.zip: the server answers 404 Not Found"], **DONE[1]}
    assert [path for path, _ in server.asked] == ["/glue/data/RTE.zip", "/glue/data/WNLI.zip"]
    assert not (glue / "RTE").exists()


def test_a_body_that_is_compressed_unasked(server, get, glue):
    serve_small_tasks(server)
    text = server.files["/glue/data/AX.tsv"]
    server.files["/glue/data/AX.tsv"] = gzip.compress(text)
    server.faults["/glue/data/AX.tsv"] = [("headers", {"Content-Encoding": "gzip"})]
    assert get("--no_verify", tasks="diagnostic")[0] == 0
    assert (glue / "diagnostic" / "diagnostic.tsv").read_bytes() == text


@pytest.mark.parametrize("length", [True, False])
def test_an_endless_body_is_not_read_on(server, get, glue, monkeypatch, length):
    source = recipes.Source("WNLI.zip", 100, "0" * 64)
    monkeypatch.setitem(recipes.SOURCES, "WNLI", [source])
    server.length = length
    server.files["/glue/data/WNLI.zip"] = bytes(3_000_000)
    code, table = get()
    assert code == 1
    assert "longer than the 1,000,200 bytes" in table["WNLI"][1]
    found = files_below(glue)
    assert "WNLI/train.tsv" not in found
    assert found.get(".download/WNLI.zip.part") == (None if length else b"")  # seen at once, or after the limit


def test_no_credentials_anywhere(server, recorded, get, glue, caplog, monkeypatch):
    """User names, passwords and queries of addresses and proxies are used and never shown."""
    caplog.set_level(logging.DEBUG, "dse")
    recorded()
    server.faults["/glue/data/WNLI.zip"] = [500, ("cut", 10_000), 404]
    outcomes = [get(base_url=server.url.replace("//", "//user:geheim@"))[0] for _ in range(2)]
    assert outcomes == [1, 0]
    assert all(headers["Authorization"].startswith("Basic ") for _, headers in server.asked)
    monkeypatch.setenv("http_proxy", f"http://user:geheim@127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    server.files["/snli.zip?token=geheim"] = b"x"
    server.faults["/snli.zip?token=geheim"] = [404, ("redirect", "nowhere://user:geheim@host/x?token=geheim")]
    for why in ("the server answers 404", "InvalidSchema: No connection adapters were found for 'nowhere://host/x?..."):
        code, table = get("--snli_url", "http://user:geheim@glue.invalid/snli.zip?token=geheim", tasks="SNLI")
        assert code == 1
        assert table["SNLI"][1].startswith(f"http://glue.invalid/snli.zip: {why}")
        assert server.asked[-1][1]["Proxy-Authorization"].startswith("Basic ")
    server.shutdown()
    server.server_close()  # the proxy is gone
    assert get(tasks="RTE", base_url="http://user:geheim@glue.invalid/")[0] == 1
    assert "glue.invalid" in get.said
    assert "geheim" not in get.said + caplog.text
    assert not any(b"geheim" in content for content in files_below(glue).values())


# Files that are not what they should be


def test_a_wrong_hash_is_kept_aside(server, recorded, get, glue):
    content = recorded()
    wrong = content[:-1] + b"!"
    server.files["/glue/data/WNLI.zip"] = wrong
    code, table = get()
    assert code == 1
    for value in (f"{len(content):,} bytes", *(hashlib.sha256(each).hexdigest() for each in (content, wrong))):
        assert value in table["WNLI"][1]
    aside = f".download/WNLI.zip.{hashlib.sha256(wrong).hexdigest()[:12]}.bad"
    assert files_below(glue) == {aside: wrong}
    assert aside in table["WNLI"][1]
    server.files["/glue/data/WNLI.zip"] = content
    assert get() == DONE
    assert server.ranges_asked("/glue/data/WNLI.zip") == [None, None]


def test_a_truncated_zip(server, get, glue):
    content = zip_of(wnli())
    server.files["/glue/data/WNLI.zip"] = content[: len(content) // 2]
    code, table = get("--no_verify")
    assert code == 1
    assert "WNLI.zip: not a complete zip archive (BadZipFile: File is not a zip file); kept as" in table["WNLI"][1]
    assert not (glue / "WNLI").exists()
    server.files["/glue/data/WNLI.zip"] = content
    assert get("--no_verify")[0] == 0


def entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr, info.compress_type = 3, mode << 16, zipfile.ZIP_DEFLATED
    return info


ABSOLUTE = f"/tmp/harmful-archive-{uuid.uuid4()}"
HARMFUL = {
    "parent": ({"WNLI/../../../x": b"x"}, "would lie outside"),
    "parent outside the folder": ({"../x": b"x"}, "would lie outside"),
    "absolute": ({ABSOLUTE: b"x"}, "would lie outside"),
    "Windows parent": ({"WNLI\\..\\..\\x": b"x"}, "would lie outside"),
    "Windows drive": ({"C:\\x": b"x"}, "would lie outside"),
    "link": ({entry("WNLI/x", stat.S_IFLNK | 0o777): b"/etc/passwd"}, "is a link"),
    "link beside": ({entry("x", stat.S_IFLNK | 0o777): b"/etc/passwd"}, "is a link"),
    "named pipe": ({entry("WNLI/x", stat.S_IFIFO | 0o644): b""}, "special file"),
    "bomb": ({"WNLI/x": bytes(3_000_000)}, "would unpack to 3,"),
    "many files": ({f"WNLI/{i}": b"" for i in range(1001)}, "1,004 files"),
}


@pytest.mark.parametrize("kind", HARMFUL)
def test_a_harmful_archive_is_refused_before_anything_is_written(server, get, tmp_path, glue, kind):
    files, why = HARMFUL[kind]
    content = zip_of({**wnli(), **files})
    server.files["/glue/data/WNLI.zip"] = content
    code, table = get("--no_verify")
    assert code == 1
    assert "archive refused: " in table["WNLI"][1]
    assert why in table["WNLI"][1]
    assert list(files_below(tmp_path).values()) == [content]  # kept aside, and nothing else
    assert not Path(ABSOLUTE).exists()


def test_other_archives_that_are_refused(server, get, glue):
    stored = zip_of(wnli(), zipfile.ZIP_STORED)
    archives = {
        "neither stored nor deflated": zip_of(wnli(), zipfile.ZIP_BZIP2),
        "expected files below WNLI/, found 'train.tsv'": zip_of({"train.tsv": b"x"}),
        "Bad CRC-32 for file 'WNLI/train.tsv'": stored[:500] + bytes([stored[500] ^ 1]) + stored[501:],
        "two of its files have the same name": zip_of({**wnli(), "WNLI/train.tsv/x": b""}),
        "found no files": zip_of({}),
        "WNLI.zip: no train.tsv, dev.tsv, test.tsv in it": zip_of({"WNLI/README": b"x"}),
    }
    for why, content in archives.items():
        server.files["/glue/data/WNLI.zip"] = content
        code, table = get("--no_verify")
        assert code == 1
        assert why in table["WNLI"][1]
        assert not (glue / "WNLI").exists()


def test_what_lies_beside_the_folder_is_left_out(server, get, glue):
    extra = {"__MACOSX/WNLI/._train.tsv": b"x", "WNLI/": b"", "README": b"x"}
    server.files["/glue/data/WNLI.zip"] = zip_of({**extra, **wnli(), "WNLI\\original\\a.txt": b"kept"})
    assert get("--no_verify") == DONE
    assert whole(glue, {**wnli(), "WNLI/original/a.txt": b"kept"})


def test_damaged_archives_of_every_kind_are_refused(tmp_path):
    """Bytes of a good archive replaced at random: refused in words, or what it unpacks to is right (CRC)."""
    good, rng = zip_of({"WNLI/a.tsv": b"one\n" * 50, "WNLI/b.tsv": b"two\n" * 50}), random.Random(0)
    refusals = 0
    for i in range(300):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        (tmp_path / "a.zip").write_bytes(bad)
        try:
            download.unzip(tmp_path / "a.zip", "WNLI", tmp_path / str(i), most=10_000)
        except DownloadError:
            refusals += 1
        else:
            assert set(files_below(tmp_path / str(i)).values()) <= {b"one\n" * 50, b"two\n" * 50}
    assert refusals > 200


# Ends in the middle


class Full:
    """A file on a disk that fills up."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, piece):
        self.file.write(piece[: self.room])
        if len(piece) > self.room:
            raise OSError(28, "No space left on device")
        self.room -= len(piece)


@pytest.mark.parametrize("suffix", [".part", ".tsv"])
def test_no_space_left(server, recorded, get, glue, monkeypatch, suffix):
    """While downloading, and while unpacking."""
    recorded()

    def open_on_full_disk(path, mode="r"):
        return Full(open(path, mode), 20_000) if str(path).endswith(suffix) else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(download, "open", open_on_full_disk, raising=False)
        code, table = get()
    assert code == 1
    assert table["WNLI"][1] == "[Errno 28] No space left on device; make room and run the same command to continue"
    assert not (glue / "WNLI").exists()
    assert get() == DONE
    assert whole(glue, wnli())
    assert server.ranges_asked("/glue/data/WNLI.zip") == [None, "bytes=20000-"][: 1 + (suffix == ".part")]


def test_too_little_space_is_seen_before_the_download(server, recorded, get, glue, monkeypatch):
    recorded()
    usage = shutil.disk_usage(glue.parent)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, table = get()
    assert code == 1
    assert table["WNLI"][1].startswith(
        f"[Errno 28] 0.1 MB are needed, but 0.0 MB are free: '{glue}/.download'; make room"
    )


def test_too_little_space_to_unpack_keeps_the_archive(server, recorded, get, monkeypatch):
    content = recorded()
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=len(content)))
        assert get()[1]["WNLI"][0] == "failed"
    assert get() == DONE
    assert len(server.asked) == 1


def start(server, glue: Path, log: Path) -> subprocess.Popen:
    """The script on WNLI as a process of its own, stderr to `log`."""
    argv = [sys.executable, ROOT / "download_glue_data.py", "--data_dir", glue, "--base_url", server.url]
    argv += ["--tasks", "WNLI", "--no_verify"]
    with open(log, "w") as errors:
        return subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, stderr=errors, text=True)


def wait_for(condition, seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_in_the_middle_and_a_second_run(server, get, glue, tmp_path, how):
    server.files["/glue/data/WNLI.zip"] = zip_of(wnli())
    server.faults["/glue/data/WNLI.zip"] = [("stall", 10_000)]
    process = start(server, glue, tmp_path / "log")
    part = glue / ".download" / "WNLI.zip.part"
    wait_for(lambda: part.exists() and (glue / ".download" / "WNLI.zip.json").exists())
    time.sleep(0.2)
    process.send_signal(how)
    output, _ = process.communicate(timeout=LONG)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[how]
    if how != signal.SIGKILL:
        assert output == "WNLI        interrupted    run the same command to continue\n"
        assert "Traceback" not in (tmp_path / "log").read_text()
    assert not (glue / "WNLI").exists()
    assert get("--no_verify") == DONE
    assert whole(glue, wnli())


def test_killed_while_unpacking(server, recorded, get, glue):
    """The archive is there and verified, and so is half of a folder."""
    content = recorded()
    making = glue / ".download" / "WNLI.making" / "WNLI"
    making.mkdir(parents=True)
    (making / "train.tsv").write_bytes(b"half")
    (making / "rest.tsv").write_bytes(b"rest")
    (glue / ".download" / "WNLI.zip").write_bytes(content)
    leave_note(server, glue)
    assert get() == DONE
    assert whole(glue, wnli())
    assert server.asked == []


@pytest.mark.parametrize(("extra", "requests"), [(b"", ["bytes=N-"]), (b"?", ["bytes=N-", None])])
def test_killed_after_the_download_without_a_record(server, get, glue, extra, requests):
    """The server is asked what comes after the end: nothing (416), or it never had that many bytes."""
    content = server.files["/glue/data/WNLI.zip"] = zip_of(wnli())
    part = content + extra
    (glue / ".download").mkdir(parents=True)
    (glue / ".download" / "WNLI.zip").write_bytes(part)
    leave_note(server, glue, f'"{hashlib.sha256(content).hexdigest()[:8]}"')
    assert get("--no_verify") == DONE
    assert whole(glue, wnli())
    expected = [asked and asked.replace("N", str(len(part))) for asked in requests]
    assert server.ranges_asked("/glue/data/WNLI.zip") == expected


def test_a_file_that_cannot_be_written_stops_its_task_alone(get, monkeypatch):
    def made(task, *_):
        if task == "WNLI":
            raise RunError("WNLI: cannot be written (Read-only file system)")
        return "done", "fine"

    monkeypatch.setattr(download_glue_data, "get_task", made)
    failed = ["failed", "WNLI: cannot be written (Read-only file system)"]
    assert get(tasks="WNLI,RTE") == (1, {"WNLI": failed, "RTE": ["done", "fine"]})


def test_interrupted_while_unpacking(server, recorded, get, glue, monkeypatch):
    recorded()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "copyfileobj", interrupt)
        assert get(tasks="WNLI,RTE") == (130, {"WNLI": ["interrupted", "run the same command to continue"]})
    assert not (glue / "WNLI").exists()
    assert get() == DONE
    assert len(server.asked) == 1


def test_two_runs_at_once(server, glue, tmp_path):
    server.files["/glue/data/WNLI.zip"] = zip_of(wnli())
    server.faults["/glue/data/WNLI.zip"] = [("stall", 10_000)]
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    processes = [start(server, glue, log) for log in logs]
    wait_for(lambda: sum("another run is working on WNLI: waiting" in log.read_text() for log in logs) == 1)
    wait_for(lambda: server.asked)
    server.released.set()
    outputs = [process.communicate(timeout=LONG)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(re.split("  +", output)[1] for output in outputs) == ["already there", "done"]
    assert server.ranges_asked("/glue/data/WNLI.zip") == [None, "bytes=10000-"]
    assert whole(glue, wnli())


# The user's own folders


def test_a_changed_file_is_neither_skipped_nor_overwritten(recorded, get, glue):
    recorded()
    get()
    (glue / "WNLI" / "dev.tsv").write_text("mine\n")
    code, table = get()
    assert code == 1
    assert table["WNLI"] == [
        "failed",
        f"dev.tsv changed since the download: move {glue}/WNLI away to have it made again",
    ]
    assert (glue / "WNLI" / "dev.tsv").read_text() == "mine\n"


def test_a_removed_file_is_put_back_beside_the_others(server, recorded, get, glue):
    recorded()
    get()
    (glue / "WNLI" / "dev.tsv").unlink()
    (glue / "WNLI" / ".dev.tsv.123.part").write_text("half, of a run that was killed while it put it back")
    (glue / "WNLI" / "train_cache").write_text("mine")
    assert get() == DONE
    assert whole(glue, {**wnli(), "WNLI/train_cache": b"mine"})


def test_what_a_killed_run_left_is_removed_and_an_empty_folder_is_taken(server, recorded, get, glue):
    content = recorded()
    (glue / "WNLI").mkdir(parents=True)
    assert get() == DONE
    (glue / ".download" / "WNLI.zip").write_bytes(content)  # killed before it was removed
    (glue / ".download" / "WNLI.making").mkdir()
    assert get()[1]["WNLI"][0] == "already there"
    assert whole(glue, wnli())
    assert not (glue / ".download" / "WNLI.making").exists()


def test_files_that_no_script_reads_may_be_removed(server, get, glue):
    server.files["/glue/data/WNLI.zip"] = zip_of({**wnli(), "WNLI/original/a.txt": b"x"})
    get("--no_verify")
    shutil.rmtree(glue / "WNLI" / "original")
    assert get()[1]["WNLI"][1].endswith("; 1 other files were removed")


def test_an_archive_with_a_record_of_its_own(server, get, glue):
    server.files["/glue/data/WNLI.zip"] = zip_of({**wnli(), "WNLI/download.json": b"{}"})
    assert get("--no_verify") == DONE
    assert json.loads((glue / "WNLI" / "download.json").read_text())["task"] == "WNLI"
    assert get()[1]["WNLI"][0] == "already there"


def test_a_folder_of_the_user(server, recorded, get, glue):
    recorded()
    (glue / "WNLI").mkdir(parents=True)
    (glue / "WNLI" / "train.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n")
    code, table = get()
    assert (code, table["WNLI"][0]) == (1, "failed")
    assert "exists, but has no dev.tsv, test.tsv: move" in table["WNLI"][1]
    for name in ("dev", "test"):
        (glue / "WNLI" / f"{name}.tsv").write_bytes(wnli()[f"WNLI/{name}.tsv"])
    before = files_below(glue)
    assert get() == (
        0,
        {"WNLI": ["already there", "not made by this script; train.tsv has 1 rows, expected 635"]},
    )
    assert files_below(glue) == before
    assert server.asked == []


def test_a_record_that_is_not_one(recorded, get, glue):
    recorded()
    get()
    for text in ("{}", "[]", '{"files": {}, "sources": [1]}', "{"):
        (glue / "WNLI" / "download.json").write_text(text)
        code, table = get()
        assert (code, table["WNLI"][0]) == (1, "failed")
        assert "download.json" in table["WNLI"][1]


def test_rows_that_differ_are_warned_of(server, get, glue, caplog):
    files = wnli(rows_of_train=9)
    files["WNLI/test.tsv"] += b"146\tone column too few\n"
    files["WNLI/dev.tsv"] = files["WNLI/dev.tsv"][:-2] + b"\xff\n"
    server.files["/glue/data/WNLI.zip"] = zip_of(files)
    code, table = get("--no_verify")
    dev = "dev.tsv, line 72: byte 0xff is not valid UTF-8; save the text as UTF-8"
    train = "train.tsv has 9 rows, expected 635"
    assert (code, table["WNLI"]) == (0, ["done", f"{train}; {dev}"])  # the short row does not count
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"WNLI: {train}" in warnings


PAGE = b"<!DOCTYPE html><html><body>Sign in to this network</body></html>\n"


FOREIGN = "dev.tsv has the header 'index | a | b | label', expected 'index | sentence1 | sentence2 | label'"


@pytest.mark.parametrize(
    ("task", "file", "content", "why"),
    [
        ("WNLI", "dev.tsv", wnli()["WNLI/dev.tsv"].replace(b"sentence1\tsentence2", b"a\tb"), FOREIGN),
        ("WNLI", "test.tsv", b"index\tsentence1\tsentence2\n\n", "test.tsv has 0 rows, expected 146"),
        ("WNLI", "train.tsv", b"", "train.tsv has the header '', expected 'index | sentence1 |"),
        ("WNLI", "train.tsv", PAGE, "train.tsv has the header '<!DOCTYPE html><html><body>Sign in to"),
        ("CoLA", "train.tsv", PAGE * 9, "train.tsv has 0 rows, expected 8,551"),
    ],
    ids=["names", "header alone", "empty", "page", "page for a file without header"],
)
def test_a_foreign_header_or_no_rows_is_a_failure(task, file, content, why, server, get, glue):
    sound = wnli() if task == "WNLI" else {
        "CoLA/train.tsv": b"gj04\t1\t\tA.\n", "CoLA/dev.tsv": b"gj04\t0\t*\tB.\n",
        "CoLA/test.tsv": b"index\tsentence\n0\tC.\n",
    }  # fmt: skip
    bad = server.files[f"/glue/data/{task}.zip"] = zip_of({**sound, f"{task}/{file}": content})
    code, table = get("--no_verify", tasks=task)
    assert (code, table[task][0]) == (1, "failed")
    assert why in table[task][1]
    assert list(files_below(glue).values()) == [bad]  # kept aside
    server.files[f"/glue/data/{task}.zip"] = zip_of(sound)
    assert get("--no_verify", tasks=task)[0] == 0


def test_an_extra_column_is_not_a_foreign_header(server, get, glue):
    """A mirror's test file with labels."""
    rows = b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n"
    server.files["/glue/data/WNLI.zip"] = zip_of({**wnli(), "WNLI/test.tsv": rows})
    code, table = get("--no_verify", tasks="WNLI")
    assert (code, table["WNLI"][0]) == (0, "done")
    assert "test.tsv has the header 'index | sentence1 | sentence2 | label'" in table["WNLI"][1]


def test_a_foreign_header_in_a_folder_of_the_user_is_warned_of(recorded, get, glue):
    (glue / "WNLI").mkdir(parents=True)
    for name, content in wnli().items():
        (glue / name).write_bytes(content.replace(b"sentence1\tsentence2", b"a\tb") if "dev" in name else content)
    assert get() == (0, {"WNLI": ["already there", f"not made by this script; {FOREIGN}"]})


# MRPC and SNLI

HEADER = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"


RAW_TRAIN = HEADER.replace("\n", "\r\n") + '1\t10\t20\t"a" b\tc\r\n0\t20\t10\td\te\r\n1\t30\t40\tf\tg \r\n'


RAW_TEST = HEADER + "1\t5\t6\th\ti\n0\t7\t8\tj\tk\n"


def test_mrpc_from_raw_files_by_hand(server, get, glue, tmp_path, caplog):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "msr_paraphrase_train.txt").write_text(RAW_TRAIN, encoding="utf-8", newline="")
    (raw / "msr_paraphrase_test.txt").write_text(RAW_TEST, encoding="utf-8", newline="")
    (raw / "dev_ids.tsv").write_text("10\t20\n40\t30\n")  # ordered: neither 20 10 nor 30 40
    assert get("--path_to_mrpc", raw, tasks="mrpc")[1]["MRPC"][0] == "done"
    made = {path.name: path.read_bytes().decode() for path in (glue / "MRPC").glob("*.tsv")}
    assert made["dev.tsv"] == HEADER + '1\t10\t20\t"a" b\tc\n'
    assert made["train.tsv"] == HEADER + "0\t20\t10\td\te\n1\t30\t40\tf\tg\n"
    assert made["test.tsv"] == "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t5\t6\th\ti\n1\t7\t8\tj\tk\n"
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv"):  # theirs, so only a warning
        sha256 = hashlib.sha256((raw / name).read_bytes()).hexdigest()
        size = (raw / name).stat().st_size
        assert f"{raw / name}: {size} bytes, SHA-256 {sha256}, recorded: " in caplog.text
    assert server.asked == []  # dev_ids.tsv lies beside them
    assert get("--path_to_mrpc", raw, tasks="MRPC")[1]["MRPC"][0] == "already there"


def test_mrpc_with_the_dev_ids_of_the_server_in_the_raw_files_own_folder(server, get, glue):
    serve_small_tasks(server)
    (glue / "MRPC").mkdir(parents=True)
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"):
        (glue / "MRPC" / name).write_bytes(server.files[f"/senteval/senteval_data/{name}"])
    assert get("--path_to_mrpc", glue / "MRPC", "--no_verify", tasks="MRPC")[0] == 0
    assert [path for path, _ in server.asked] == ["/glue/data/mrpc_dev_ids.tsv"]
    assert len((glue / "MRPC" / "train.tsv").read_text().splitlines()) == 17


def test_a_page_in_place_of_mrpc(server, get, glue):
    serve_small_tasks(server)
    server.files["/senteval/senteval_data/msr_paraphrase_test.txt"] = b"<html>\n<p>Sign in to this network.\n"
    code, table = get("--no_verify", tasks="MRPC")
    assert code == 1
    assert "msr_paraphrase_test.txt, line 2: expected 5 columns, found '<p>Sign in" in table["MRPC"][1]
    serve_small_tasks(server)
    assert get("--no_verify", tasks="MRPC")[0] == 0


@pytest.mark.parametrize("name", recipes.MRPC_RAW)
@pytest.mark.parametrize(("content", "why"), [
    (PAGE, "{}, line 1: has the header '<!DOCTYPE html><html><body>Sign in to"),
    (b"", "{}, line 1: has the header '', expected 'Quality"),
    (HEADER.encode(), ".tsv has 0 rows, expected "),
    ((HEADER + "\n").encode(), ".tsv has 0 rows, expected "),
    (b"1\t10\t20\ta b\tc\n0\t20\t10\td\te\n", "{}, line 1: has the header '1\\t10"),
], ids=["page", "empty", "header alone", "header and a blank line", "no header"])  # fmt: skip
def test_raw_files_of_mrpc_that_are_not_such(name, content, why, server, get, glue, tmp_path):
    serve_small_tasks(server)
    for raw in recipes.MRPC_RAW:
        (tmp_path / raw).write_bytes(content if raw == name else server.files[f"/senteval/senteval_data/{raw}"])
    code, table = get("--path_to_mrpc", tmp_path, "--no_verify", tasks="MRPC")
    assert (code, table["MRPC"][0]) == (1, "failed")
    assert why.format(name) in table["MRPC"][1]
    assert not (glue / "MRPC").exists()
    assert (tmp_path / name).read_bytes() == content  # the user's


def test_a_spoiled_raw_file_of_the_user_costs_no_verified_download(server, get, glue, tmp_path, monkeypatch):
    serve_small_tasks(server)
    ids = server.files["/glue/data/mrpc_dev_ids.tsv"]
    sources = recipes.SOURCES["MRPC"]
    recorded = recipes.Source("mrpc_dev_ids.tsv", len(ids), hashlib.sha256(ids).hexdigest())
    monkeypatch.setitem(recipes.SOURCES, "MRPC", [*sources[:2], recorded])
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"):
        (tmp_path / name).write_text("header\nspoiled\n")
    assert get("--path_to_mrpc", tmp_path, tasks="MRPC")[0] == 1
    assert files_below(glue)[".download/mrpc_dev_ids.tsv"] == ids


def test_raw_files_among_the_downloads_are_not_removed(server, glue, refused):
    serve_small_tasks(server)
    (glue / ".download").mkdir(parents=True)
    argv = ["--tasks", "MRPC", "--data_dir", glue, "--path_to_mrpc", glue / ".download", "--base_url", server.url]
    assert "move the raw files elsewhere" in refused(download_glue_data.main, argv)


@pytest.mark.skipif(not REAL_MRPC.is_dir(), reason="the real data is not here")
def test_mrpc_from_the_real_raw_files(server, get, glue):
    """From the server too, so that the real hashes are compared."""
    expected = ["done", "headers and rows as expected"]
    assert get("--path_to_mrpc", REAL_MRPC, tasks="MRPC")[1]["MRPC"] == expected
    shutil.move(glue / "MRPC", glue / "from_folder")
    for name in ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt"):
        server.files[f"/senteval/senteval_data/{name}"] = (REAL_MRPC / name).read_bytes()
    server.files["/glue/data/mrpc_dev_ids.tsv"] = (REAL_MRPC / "dev_ids.tsv").read_bytes()
    assert get(tasks="MRPC")[1]["MRPC"] == expected
    for folder in ("MRPC", "from_folder"):
        for name in ("train.tsv", "dev.tsv", "test.tsv"):
            assert (glue / folder / name).read_bytes() == (REAL_MRPC / name).read_bytes()


SNLI_RAW = (
    "gold_label\tsentence1_binary_parse\tsentence1\tsentence2\tcaptionID\tpairID\tlabel1\tlabel2\n"
    "neutral\t( a )\tA.\tB.\tc1\tp1\tneutral\tneutral\n"
    "-\t( x )\tX.\tY.\tc2\tp2\tneutral\tcontradiction\n"
    "entailment\t( d )\tD.\tE.\tc3\tp3\tentailment\n"
)


def test_snli_by_hand(server, get, glue, caplog):
    files = {f"snli_1.0/snli_1.0_{split}.txt": SNLI_RAW.encode() for split in ("train", "dev", "test")}
    beside = {"snli_1.0/Icon\r": b"", "snli_1.0/snli_1.0_train.jsonl": b"{}", "__MACOSX/snli_1.0/._x": b"x"}
    content = zip_of({**files, **beside})
    server.files["/snli.zip"] = content
    url = server.url.replace("/glue/data/", "/snli.zip")
    code, table = get("--snli_url", url, tasks="SNLI")
    assert (code, table["SNLI"][0]) == (0, "done")
    assert "train.tsv has 2 rows, expected 549,367" in table["SNLI"][1]
    assert (
        f"snli_1.0.zip: {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}, recorded: none"
        in caplog.text
    )
    assert (
        "snli_1.0_dev.txt has no sentence2_binary_parse, sentence1_parse, sentence2_parse: these columns are left empty"
        in caplog.text
    )
    parses = "sentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
    expected = (
        f"index\tcaptionID\tpairID\t{parses}\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label\n"
        "0\tc1\tp1\t( a )\t\t\t\tA.\tB.\tneutral\tneutral\tneutral\n"
        "1\tc3\tp3\t( d )\t\t\t\tD.\tE.\tentailment\t\tentailment\n"
    )
    made = files_below(glue)
    del made["SNLI/download.json"]
    assert made == {f"SNLI/{split}.tsv": expected.encode() for split in ("train", "dev", "test")}


def test_snli_with_rows_of_more_cells_than_its_header(server, get, caplog):
    raw = SNLI_RAW + "neutral\t( a )\tA\tB.\tC.\tc1\tp1\tneutral\tneutral\n"
    files = {f"snli_1.0/snli_1.0_{split}.txt": raw.encode() for split in ("train", "dev", "test")}
    server.files["/snli.zip"] = zip_of(files)
    assert get("--snli_url", server.url.replace("/glue/data/", "/snli.zip"), tasks="SNLI")[0] == 0
    assert "snli_1.0_dev.txt: 1 rows have more than the header's 8 cells: the rest is cut" in caplog.text


def test_snli_with_a_short_row_or_without_a_column(server, get):
    url = server.url.replace("/glue/data/", "/snli.zip")
    for raw, why in (
        (SNLI_RAW + "neutral\t( a )\tA.\n", "line 5: ends before sentence2: 'neutral"),
        (SNLI_RAW.replace("gold_label", "label"), "line 1: no column"),
    ):
        files = {f"snli_1.0/snli_1.0_{split}.txt": raw.encode() for split in ("train", "dev", "test")}
        server.files["/snli.zip"] = zip_of(files)
        code, table = get("--snli_url", url, tasks="SNLI")
        assert code == 1
        assert why in table["SNLI"][1]
