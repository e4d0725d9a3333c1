"""Embed candidates once and store them in an index, which `python -m dse score` takes.

    python -m dse index --model FOLDER --candidates FILE --output FOLDER

Each line of a UTF-8 file is a candidate, even an empty one, or each row of a table (.csv, .jsonl), whose ids are kept.
Rows are numbered from 0 in file order. --export writes what a vector database needs to find the nearest candidates: the
top layer's embeddings with length 1, float32 (candidates, size), and a line for each with its id or, without ids, its
row. Without --candidates, it does so for the index at --output.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dse import cli
from dse.commands import load_student, logger
from dse.system.errors import InputError
from dse.system.files import atomic_write, check_output_file, check_writable, write_text
from dse.system.text_files import check_texts, texts_of, tsv_line

if TYPE_CHECKING:
    from dse.index import CandidateIndex


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    add = parser.add_argument
    cli.add_student_flag(parser)
    add("--candidates", help="file with one candidate per line, or a table; - for standard input")
    cli.add_columns_flags(parser)
    add("--output", required=True, help="folder of the index; an earlier index there is replaced")
    add("--append", action="store_true", help="add to the index at --output instead")
    add("--half", action="store_true", help="store 16 bits: half the space, scores off by less than 0.1 %%")
    add("--export", metavar="FILE.npy", help="also write unit vectors there, and ids to FILE.ids.txt")
    cli.add_inference_flags(parser)


def export(index: "CandidateIndex", path: Path) -> None:
    """Write the unit vectors of an index's candidates, and their ids."""
    import numpy as np

    from dse.storage.index_files import BLOCK

    size = index.model.network.config.top_size
    with atomic_write(path) as beside:
        units = np.lib.format.open_memmap(beside, "w+", "<f4", (len(index), size))
        for start in range(0, len(index), BLOCK):
            some = index.files.block(start)[:, -size:].astype(np.float64)
            lengths = np.linalg.norm(some, axis=1, keepdims=True)
            units[start : start + BLOCK] = some / np.maximum(lengths, np.finfo(np.float32).tiny)
        units.flush()
    names = (index.id(row) if index.files.has_ids else row for row in range(len(index)))
    write_text(path.with_suffix(".ids.txt"), "".join(tsv_line([name]) for name in names))
    logger.info("%d unit vectors of size %d: %s; ids: %s", *units.shape, path, path.with_suffix(".ids.txt"))


def run(args: argparse.Namespace) -> None:
    """Embed the candidates into a new index, or append them to one; export them."""
    if args.candidates is None and (args.append or not args.export):
        raise InputError("--candidates: is needed, unless --export is given for an existing index")
    if args.half and (args.append or args.candidates is None):
        raise InputError(
            "--half: is decided when an index is made; leave it out with --append and without --candidates"
        )
    if args.export:
        for path in (Path(args.export), Path(args.export).with_suffix(".ids.txt")):
            check_output_file(path, "--export", [args.candidates] if args.candidates else [])
            if path.resolve().parent == Path(args.output).resolve():
                raise InputError(f"--export: {path} is in the index; name another folder")
    if args.candidates is not None:
        check_texts(args.candidates, "--candidates", args.text_column, args.id_column)
    output = Path(args.output).resolve()
    check_writable(output.parent, "--output", output.name)
    from dse.index import CandidateIndex
    from dse.storage.index_files import check_index_place

    check_index_place(Path(args.output), "--output")
    model = load_student(args)
    if args.candidates is None or args.append:
        index = CandidateIndex.open(args.output, model)
    if args.candidates is not None:
        texts, ids = texts_of(args.candidates, "--candidates", args.text_column, args.id_column)
    if args.append:
        before = len(index)
        index.append(texts, args.batch_size, ids=ids)
        logger.info("%d candidates added to the %d in %s", len(index) - before, before, args.output)
    elif args.candidates is not None:
        dtype = "float16" if args.half else "float32"
        index = CandidateIndex.build(model, texts, args.output, dtype, args.batch_size, ids=ids)
        logger.info("%d candidates, embeddings of size %d, %s: %s", len(index), index.width, dtype, args.output)
    if args.export:
        export(index, Path(args.export))
