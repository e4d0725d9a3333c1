"""Score queries against candidates with a student's trained head, and write the best of each.

    python -m dse score --model FOLDER --queries FILE --candidates FILE_OR_INDEX --top_k 10 --output FILE

Each line of a UTF-8 file is a query or candidate, even an empty one. The output has a row per query and hit, best
first: query_row and row count lines from 0, and rank counts from 1. The score is the log-odds of the rank label, whose
probability is sigmoid(score), or the score of a regression. In TSV, a tab or line end in a text becomes a space; JSON
lines keep texts as they are.
"""

import argparse
import contextlib
import io
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from dse import cli
from dse.commands import load_student
from dse.data.tasks import ranked_label
from dse.system.errors import InputError
from dse.system.files import atomic_write, check_output_file, json_text
from dse.system.text_files import check_texts, texts_of

PROG = "python -m dse score"
COLUMNS = ("query_row", "query", "rank", "row", "score", "candidate")
logger = logging.getLogger("dse.score")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags. Exits with code 2 and one line if one is wrong."""
    parser = cli.Parser(prog=PROG, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a student's folder (`python -m dse export`) or hub name")
    add("--queries", required=True, help="file with a query per line; - for standard input")
    add("--candidates", required=True, help="file with a candidate per line (- for standard input), or an index")
    add("--top_k", type=cli.whole_number(1), default=10, help="hits per query")
    own = "the task's own, entailment, or a binary task's second"
    add("--rank_label", help=f"label whose probability ranks (not given: {own})")
    add("--output", default="-", help="file; - for standard output")
    add("--format", choices=("tsv", "jsonl"), help="not given: jsonl for such a name, else tsv")
    cli.add_inference_flags(parser)
    return parser.parse_args(argv)


@contextlib.contextmanager
def output_file(path: str) -> Iterator[TextIO]:
    """Standard output, or a file that appears whole."""
    if path == "-":
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        yield sys.stdout
        sys.stdout.flush()
        return
    with atomic_write(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:
        yield file


def write_hits(file: TextIO, queries: list[str], found: list[list[Any]], as_json: bool) -> None:
    """A row per query and hit, after a header line in TSV."""
    if not as_json:
        file.write("\t".join(COLUMNS) + "\n")
    for query_row, (query, hits) in enumerate(zip(queries, found, strict=True)):
        for rank, hit in enumerate(hits, 1):
            values = (query_row, query, rank, hit.row, hit.score, hit.text)
            if as_json:
                line = json_text(dict(zip(COLUMNS, values, strict=True)), ensure_ascii=False)
            else:
                line = "\t".join(re.sub(r"[\t\r\n]", " ", str(value)) for value in values)
            file.write(line + "\n")


def run(args: argparse.Namespace) -> None:
    """Score queries against candidates, and write each query's best."""
    # 1. Refuse what cannot work.
    if args.queries == args.candidates == "-":
        raise InputError("--candidates: standard input can be read once; give --queries or --candidates as a file")
    check_texts(args.queries, "--queries")
    is_index = Path(args.candidates).is_dir()
    if not is_index:
        check_texts(args.candidates, "--candidates")
    if args.output != "-":
        check_output_file(args.output, "--output")
    elif sys.stdout is None:
        raise InputError("--output: standard output is closed; name a file")
    cli.set_up_logging()
    from dse.index import CandidateIndex

    model = load_student(args)
    label = ranked_label(model.task, args.rank_label)
    logger.info("ranked by %s", "score" if label is None else f"the probability of {label!r}")

    # 2. Queries, candidates, and the best of them.
    queries = list(texts_of(args.queries, "--queries"))
    if is_index:
        index = CandidateIndex.open(args.candidates, model)
    else:
        index = CandidateIndex.build(model, texts_of(args.candidates, "--candidates"), batch_size=args.batch_size)
    logger.info("%d queries, %d candidates", len(queries), len(index))
    found = index.search(queries, args.top_k, args.rank_label, show_progress=None)

    # 3. Write.
    as_json = args.format == "jsonl" or (args.format is None and args.output.endswith((".jsonl", ".ndjson")))
    with output_file(args.output) as file:
        write_hits(file, queries, found, as_json)


main = cli.program(PROG, parse_arguments, run)
