"""The Markdown pages: their length, their links and flags, what is made in them, and their commands, which run."""

import argparse
import contextlib
import importlib.util
import itertools
import os
import random
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pages
import pytest
import yaml
from helpers import TEXTS, one_turn, write_task
from pages import PAGES, README, ROOT

import dse
from dse import __main__ as entry
from dse import cli
from dse.data.tasks import get_task
from dse.experiments import benchmarks, benchmarks_scoring
from dse.experiments.synthetic import make_pair, write_tiny_bert
from dse.models import DSESiameseClassifier

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
COMMANDS = sorted(path.stem for path in (ROOT / "dse" / "commands").glob("[a-z]*.py"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# What needs a network, GPUs or processes of its own, or has tests and CI of its own: only its flags are checked.
NOT_RUN = ("pip", "torchrun", "pytest", "download_glue_data.py", "quickstart", "reproduce", "gpu_check", "1000000")


@pytest.fixture(params=PAGES, ids=NAMES)
def page(request) -> str:
    return request.param.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_length(path):
    assert len(path.read_text(encoding="utf-8").split()) <= (2000 if path == README else 1200)


def test_what_is_made_is_that_of_the_published_runs(page):
    assert page == pages.made_anew(page), "run python tests/pages.py"


@pytest.mark.parametrize("name", ["README.md", *(f"dse/experiments/{name}.md" for name in ("RESULTS", "SPEED", "GPU"))])
def test_no_measured_number_is_typed_by_hand(name):
    """Decimals in the prose stand in what is made on the same page, or are versions and identifiers."""
    text = (ROOT / name).read_text(encoding="utf-8")
    made = " ".join(found[2] for found in pages.MADE_PART.findall(text))
    decimals = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")
    assert set(decimals.findall(pages.prose(text))) - set(decimals.findall(made)) <= {"3.11", "1908.05161"}


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links(path):
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}, target


def parser_of(*command: str) -> argparse.ArgumentParser:
    """The parser of a script, or of a command of `python -m dse`."""
    kept: list[argparse.ArgumentParser] = []

    class Stop(Exception):
        pass

    def keep(self, *_):
        kept.append(self)
        raise Stop

    if command[0] in COMMANDS:
        parser = cli.Parser(prog=command[0])
        importlib.import_module(f"dse.commands.{command[0]}").add_flags(parser)
        return parser
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stop):
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        importlib.import_module(command[0].removesuffix(".py")).parse_arguments([])
    return kept[0]


def test_flags_in_the_prose(page):
    known = {flag for name in (*SCRIPTS, *COMMANDS) for flag in parser_of(name)._option_string_actions}
    found = set(re.findall(r"`[^`]*?(--[a-z_0-9]+)", pages.prose(page)))
    theirs = {"--kills", "--nproc_per_node", "--shutdown_timeout"}  # of the soak and of torchrun
    gone = {"--local_rank", "--loss_scale", "--server_ip", "--server_port"}
    assert found - theirs - gone <= known
    assert not gone & known


def write_place(place: Path) -> None:
    """A folder with all that the commands need, tiny: data, texts, and encoders under the names of hub models."""
    for name in ("mrpc", "sts-b", "snli"):
        task = get_task(name)
        write_task(place / "glue_data" / task.folder, task)
    lines = (place / "glue_data" / "MRPC" / "dev.tsv").read_text().splitlines()
    (place / "glue_data" / "MRPC" / "test.tsv").write_text("\n".join(lines) + "\n")
    (place / "my_data").mkdir()
    for seed, name in enumerate(("train", "dev")):
        rows = [make_pair(random.Random(100 * seed + row)) for row in range(24)]
        cells = "".join(f"{first}\t{second}\t{('no', 'yes')[label]}\n" for label, first, second in rows)
        (place / "my_data" / f"{name}.tsv").write_text(f"question\tanswer\tmatches\n{cells}")
    cells = (f'"{first}","{second}",{("no", "yes")[label]}' for label, first, second in rows)
    (place / "pairs.csv").write_text("\n".join(["question,answer,matches", *cells]) + "\n")
    texts = [make_pair(random.Random(row)) for row in range(12)]
    (place / "questions.txt").write_text("".join(f"{first}\n" for _, first, _ in texts[:3]))
    for name in ("answers", "more_answers"):
        (place / f"{name}.txt").write_text("".join(f"{second}\n" for _, _, second in texts))
    write_tiny_bert(place / "bert-base-uncased", seed=0, hidden_size=16, layers=4, positions=128)
    shutil.copytree(place / "bert-base-uncased", place / "bert-large-uncased-whole-word-masking")


def check(words: list[str]) -> None:
    """Parse the flags of what is not run, and look for the files that pip is given."""
    if words[0] == "pip":
        assert words[1] == "install"
        assert all((ROOT / file).is_file() for flag, file in itertools.pairwise(words) if flag == "-r")
    elif words[1:3] != ["-m", "pytest"]:
        place = next(place for place, word in enumerate(words) if word in (*SCRIPTS, *COMMANDS))
        parser_of(words[place]).parse_args(words[place + 1 :])


def run(words: list[str]) -> None:
    if words[1:3] == ["-m", "dse"]:
        entry.main(words[3:])
    else:
        importlib.import_module(words[1].removesuffix(".py")).main(words[2:])


def test_every_command_runs(tmp_path, monkeypatch):
    """In the order of the pages; what one makes, the next ones take."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("_PEAK_SECONDS", 1e-4), ("take_turns", one_turn)):
        monkeypatch.setattr(benchmarks, name, value)
    for name, value in (("MANY_QUERIES", (1, 1)), ("CROSS_ENCODER_PAIRS", 4), ("take_turns", one_turn)):
        monkeypatch.setattr(benchmarks_scoring, name, value)
    write_place(tmp_path)
    variables = {"PATH": os.environ["PATH"], "BERT": "bert-base-uncased"}
    ran = set()
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for statement in itertools.chain.from_iterable(map(pages.statements, pages.blocks(text, "bash"))):
            variables |= pages.assigned(statement, tmp_path, variables)
            for words in pages.calls(statement, tmp_path, variables):
                if set(words) & set(NOT_RUN):
                    check(words)
                else:
                    run(words)
                    ran.add(next(word for word in words if word in (*SCRIPTS, *COMMANDS)))
        for block in pages.blocks(text, "python"):
            if "sentence_transformers" not in block or importlib.util.find_spec("sentence_transformers"):
                exec(block, names := {})
        if path == README:
            shutil.copytree("my_run/student", "results/mrpc_seed1/dse/run/best")
    assert ran == {*SCRIPTS, *COMMANDS} - set(NOT_RUN)
    assert len(Path("hits.tsv").read_text().splitlines()) == 1 + 3 * 3
    for made in ("outputs/large_uncased_finetuned_mrpc/eval_results.txt", "predictions/MRPC.tsv", "hits.jsonl",
                 "outputs/logits/large_uncased_finetuned_mrpc_logits.json", "candidates_index"):  # fmt: skip
        assert Path(made).exists(), made
    if "sentence_transformer" in names:
        student = DSESiameseClassifier.from_pretrained("my_student")
        theirs = names["sentence_transformer"].encode(TEXTS)
        np.testing.assert_allclose(theirs, student.encode(TEXTS), rtol=1e-5, atol=1e-5)


def test_the_citation_is_that_of_the_bibtex():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cited["preferred-citation"]
    (bibtex,) = pages.blocks(README.read_text(encoding="utf-8"), "bibtex")
    entries = dict(re.findall(r"(\w+)\s*= \{(.*)\}", bibtex))
    assert entries["title"] == paper["title"]
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert entries["author"].split(" and ") == authors
    assert entries["booktitle"] == paper["collection-title"]
    assert (int(entries["year"]), entries["doi"]) == (paper["year"], paper["doi"])
    assert (int(entries["volume"]), int(entries["number"])) == (paper["volume"], paper["issue"])
    assert entries["pages"] == f"{paper['start']}--{paper['end']}"
    assert cited["version"] == dse.__version__


def test_the_package_has_the_stages_and_one_source_of_version_and_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert [f"{name}.py" for name in sorted(project["tool"]["setuptools"]["py-modules"])] == SCRIPTS
    assert project["project"]["dynamic"] == ["version", "dependencies"]
    dynamic = project["tool"]["setuptools"]["dynamic"]
    assert dynamic == {"version": {"attr": "dse.__version__"}, "dependencies": {"file": "requirements.txt"}}
