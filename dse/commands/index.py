"""Embed candidates once and store them in an index, which `python -m dse score` takes.

    python -m dse index --model FOLDER --candidates FILE --output FOLDER

Each line of a UTF-8 file is a candidate, even an empty one, or each row of a table (.csv, .jsonl), whose ids are kept.
Rows are numbered from 0 in file order.
"""

import argparse
from pathlib import Path

from dse import cli
from dse.commands import load_student, logger
from dse.system.errors import InputError
from dse.system.files import check_writable
from dse.system.text_files import check_texts, texts_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    cli.add_student_flag(parser)
    add("--candidates", required=True, help="file with one candidate per line, or a table; - for standard input")
    cli.add_columns_flags(parser)
    add("--output", required=True, help="folder of the index; an earlier index there is replaced")
    add("--append", action="store_true", help="add to the index at --output instead")
    add("--half", action="store_true", help="store 16 bits: half the space, scores off by less than 0.1 %%")
    cli.add_inference_flags(parser)


def run(args: argparse.Namespace) -> None:
    """Embed the candidates into a new index, or append them to one."""
    if args.append and args.half:
        raise InputError("--half: is decided when an index is made; leave it out with --append")
    check_texts(args.candidates, "--candidates")
    output = Path(args.output).resolve()
    check_writable(output.parent, "--output", output.name)
    from dse.index import CandidateIndex
    from dse.storage.index_files import check_index_place

    check_index_place(Path(args.output), "--output")
    model = load_student(args)
    texts, ids = texts_of(args.candidates, "--candidates", args.text_column, args.id_column)
    if args.append:
        index = CandidateIndex.open(args.output, model)
        before = len(index)
        index.append(texts, args.batch_size, ids=ids)
        logger.info("%d candidates added to the %d in %s", len(index) - before, before, args.output)
    else:
        dtype = "float16" if args.half else "float32"
        index = CandidateIndex.build(model, texts, args.output, dtype, args.batch_size, ids=ids)
        logger.info("%d candidates, embeddings of size %d, %s: %s", len(index), index.width, dtype, args.output)
