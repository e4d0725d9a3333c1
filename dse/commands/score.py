"""Score candidates for each query with a student's trained head, and write each query's best.

    python -m dse score --model FOLDER --queries FILE --candidates FILE_OR_INDEX --top_k 10 --output FILE

Each line of a UTF-8 file is a query or candidate, even an empty one. The output has a row per query and hit, best
first: query_row and row count lines from 0, and rank counts from 1. The score is the log-odds of the rank label, or the
score of a regression; a last column, id, has the ids of candidates that have some. In TSV, a tab or line end in a text
becomes a space; JSON lines keep texts as they are.
"""

import argparse
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dse import cli
from dse.commands import load_student, logger
from dse.data.tasks import ranked_label
from dse.system.errors import InputError
from dse.system.files import check_output_file, json_text, write_text
from dse.system.text_files import check_texts, texts_of, tsv_line

COLUMNS = ("query_row", "query", "rank", "row", "score", "candidate")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    cli.add_student_flag(parser)
    add("--queries", required=True, help="file with one query per line; - for standard input")
    add("--candidates", required=True, help="file with one candidate per line (- for standard input), table, or index")
    cli.add_columns_flags(parser)
    add("--top_k", type=cli.whole_number(1), default=10, help="hits per query")
    add("--rerank", help="cross-encoder that re-orders the best and gives their scores: folder or hub name")
    add(
        "--rerank_top",
        type=cli.whole_number(1),
        default=50,
        help="hits per query that --rerank reads; at least --top_k",
    )
    nearest = "score only the N candidates nearest by cosine, or, with auto, as few as a query needs (default: all)"
    add("--shortlist", type=cli.whole_number_or("auto", 1), metavar="N", help=nearest)
    usual = "the task's rank_label, else entailment, else a binary task's second label"
    add("--rank_label", help=f"label whose probability ranks candidates (default: {usual})")
    add("--output", default="-", help="output file; - for standard output")
    add("--format", choices=("tsv", "jsonl"), help="output format (default: by --output's ending, else tsv)")
    cli.add_inference_flags(parser)


def hit_lines(queries: list[str], found: Iterable[Any], as_json: bool, with_ids: bool = False) -> Iterator[str]:
    """A line per query and hit, after a header line in TSV."""
    columns = (*COLUMNS, *(["id"] if with_ids else []))
    if not as_json:
        yield tsv_line(columns)
    for query_row, (query, hits) in enumerate(zip(queries, found, strict=True)):
        for rank, hit in enumerate(hits, 1):
            values = (query_row, query, rank, hit.row, hit.score, hit.text, hit.id)[: len(columns)]
            if as_json:
                yield json_text(dict(zip(columns, values, strict=True)), ensure_ascii=False) + "\n"
            else:
                yield tsv_line(values)


def run(args: argparse.Namespace) -> None:
    """Score the candidates for each query, and write each query's best."""
    # 1. Refuse what cannot work.
    if args.queries == args.candidates == "-":
        raise InputError("--candidates: standard input can be read only once; give a file for this flag or --queries")
    check_texts(args.queries, "--queries")
    if args.rerank and args.rerank_top < args.top_k:
        raise InputError(f"--rerank_top: {args.rerank_top} is below --top_k, {args.top_k}: give as many, or more")
    wanted, is_index = args.rerank_top if args.rerank else args.top_k, Path(args.candidates).is_dir()
    if isinstance(args.shortlist, int) and args.shortlist < wanted:
        raise InputError(f"--shortlist: {args.shortlist} is below the hits per query, {wanted}: give as many, or more")
    if not is_index:
        check_texts(args.candidates, "--candidates", args.text_column, args.id_column)
    if args.output != "-":
        check_output_file(args.output, "--output", (args.queries, args.candidates))
    elif sys.stdout is None:
        raise InputError("--output: standard output is closed; give a file")
    from dse.experiments.predictions import rerank, teacher_scorer
    from dse.index import CandidateIndex

    model = load_student(args)
    label = ranked_label(model.task, args.rank_label)
    if args.rerank:
        of_teacher = (args.rerank, model.task, model.device, args.batch_size, cli.precision_of(args), "--rerank", True)
        teacher = teacher_scorer(*of_teacher)
    logger.info("ranking by %s", "score" if label is None else f"the probability of {label!r}")

    # 2. Queries, candidates, and the best of them.
    queries = list(texts_of(args.queries, "--queries")[0])
    if is_index:
        index = CandidateIndex.open(args.candidates, model)
    else:
        texts, ids = texts_of(args.candidates, "--candidates", args.text_column, args.id_column)
        index = CandidateIndex.build(model, texts, batch_size=args.batch_size, ids=ids)
    logger.info("%d queries, %d candidates", len(queries), len(index))
    found: Any = index.search(queries, wanted, label, show_progress=None, shortlist=args.shortlist)
    if args.rerank:
        both = tqdm(zip(queries, found, strict=True), "rerank", len(queries), disable=None, leave=False)
        found = [rerank(model.task, teacher, query, hits, label)[: args.top_k] for query, hits in both]

    # 3. Write.
    as_json = args.format == "jsonl" or (args.format is None and args.output.endswith((".jsonl", ".ndjson")))
    lines = hit_lines(queries, found, as_json, index.files.has_ids)
    if args.output != "-":
        write_text(args.output, "".join(lines))
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    sys.stdout.writelines(lines)
