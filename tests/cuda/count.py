"""Launches, host reads and copies of a training update at BERT-large's depth, and of a search, on emulated CUDA.

    python tests/cuda/count.py [--glue GLUE_DATA --tokenizer FOLDER]      prints the tables

The stages' scripts themselves run, on a BERT of 24 layers and tiny width. Without real data, texts have made-up words
and about 27 tokens.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]

import emulation
import numpy as np
import torch
from transformers import BertConfig, BertModel

import dse_train_runner
import finetune_bert
from dse.data.processors import read_examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.experiments.synthetic import make_pair, write_tiny_bert
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier
from dse.networks.config import HEAD_TYPES, DSEConfig
from dse.networks.pretrained import bert_config
from dse.networks.student import empty_network
from dse.storage.logits import logits_identity, save_logits
from dse.system.files import write_text
from dse.training.trainer import Trainer

LAYERS, HIDDEN = 24, 32
PAIRS = 128  # 4 updates of 2 x 16, of which the first and the last are not counted
KINDS = ("launch", "read", "h2d", "d2h")
CASES = [(role, precision, padding) for role in ("student", "teacher") for precision in ("fp32", "bf16")
         for padding in ("batch", "packed")]  # fmt: skip


def write_data(folder: Path, pairs: int = PAIRS) -> None:
    """Training pairs and 16 of dev in MRPC's layout: texts of 1 to 3 sentences, 27 tokens in the mean."""
    rng = random.Random(0)
    for name, rows in (("train", pairs), ("dev", 16)):
        lines = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"]
        for i in range(rows):
            parts = [make_pair(rng) for _ in range(3)]
            texts = [" ".join(part[side] for part in parts[: rng.randint(1, 3)]) for side in (1, 2)]
            lines.append(f"{parts[0][0]}\t{2 * i}\t{2 * i + 1}\t{texts[0]}\t{texts[1]}\n")
        write_text(folder / f"{name}.tsv", "".join(lines))


def write_real_data(folder: Path, glue: Path) -> None:
    """The same from the first rows of the real MRPC."""
    for name, rows in (("train", PAIRS), ("dev", 16)):
        lines = (glue / "MRPC" / f"{name}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(folder / f"{name}.tsv", "".join(lines[: rows + 1]))


def write_bert(folder: Path, tokenizer: Path | None = None, layers: int = LAYERS) -> None:
    """A tiny BERT of BERT-large's depth, with another tokenizer if one is given."""
    write_tiny_bert(folder, 0, HIDDEN, layers, positions=512)
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / name, folder / name)
        config = BertConfig.from_pretrained(folder)
        config.vocab_size = 30522
        BertModel(config).save_pretrained(folder)


def counted_updates(main: Callable[[list[str]], None], argv: list[str]) -> list[dict[str, Any]]:
    """What `emulation.found` gives for each update, from its beginning to the next one's, but for first and last."""
    marks, train_group = [], Trainer.train_group

    def marked(self: Trainer, *group: Any) -> None:
        marks.append(emulation.found())
        emulation.reset()
        train_group(self, *group)

    Trainer.train_group = marked  # type: ignore[method-assign]
    try:
        main(argv)
    finally:
        Trainer.train_group = train_group  # type: ignore[method-assign]
    return marks[2:]


def updates_of(role: str, precision: str, padding: str, data: Path, bert: Path, folder: Path) -> list[dict[str, Any]]:
    """The counts of a training's updates; `folder` is for what it writes."""
    argv = ["--task_name", "mrpc", "--do_lower_case", "--data_dir", data, "--bert_model", bert, "--padding", padding]
    argv += ["--gradient_accumulation_steps", 2, "--max_seq_length", 128, "--log_dir", folder / "logs"]
    argv += [f"--{precision}"] if precision != "fp32" else []
    if role == "teacher":
        argv += ["--do_train", "--train_batch_size", 32, "--num_train_epochs", 1, "--output_dir", folder / "teacher"]
        return counted_updates(finetune_bert.main, [str(flag) for flag in argv])
    task, logits = get_task("mrpc"), folder / "logits.pt"
    examples = read_examples(task, data, "train")
    save_logits(logits, torch.zeros(len(examples), 2), logits_identity(task, examples.files, len(examples)))
    argv += ["--distillation_logits_path", logits, "--batch_size", 16, "--epochs", 1, "--fc_dims", 64, 1]
    argv += ["--checkpoint_dir", folder / "checkpoints"]
    return counted_updates(dse_train_runner.main, [str(flag) for flag in argv])


def search_counts(model: DSESiameseClassifier, queries: int, candidates: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The counts of the first search and of another one, without the queries' embedding."""
    rng = np.random.default_rng(0)
    width = model.network.config.embedding_size
    vectors = rng.standard_normal((candidates, width)).astype(np.float32)
    index = CandidateIndex.from_embeddings(model, [(vectors, [f"text {i}" for i in range(candidates)])])
    embedded = torch.from_numpy(rng.standard_normal((queries, width)).astype(np.float32)).to(model.device)
    model.encode = lambda *_, **__: embedded  # type: ignore[method-assign]
    for name in ("first", "next"):
        emulation.reset()
        index.search(["a query"] * queries, 10)
        yield name, emulation.found()


def a_student(bert: Path, head: str) -> DSESiameseClassifier:
    """An untrained student on emulated CUDA."""
    config = DSEConfig(bert_config(bert, "bert"), siamese_head_type=head, fc_dims=(64, 1))
    tokenizer = load_tokenizer(bert, True, "bert")
    return DSESiameseClassifier(empty_network(config).eval(), tokenizer, get_task("mrpc"), 128).to(emulation.CUDA)


def _row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--most", type=int, default=8, help="operators and places to list")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        emulation.install(emulation.compile_guard(folder))
        write_real_data(folder, args.glue) if args.glue else write_data(folder)
        write_bert(folder / "bert", args.tokenizer)
        details = []
        print("| network | precision | padding | launches | host reads | h2d copies | d2h copies |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for case in CASES:
            updates = updates_of(*case, folder, folder / "bert", folder / "-".join(case))
            numbers = [max(update["counts"].get(kind, 0) for update in updates) for kind in KINDS]
            print(_row(*case, *numbers), flush=True)
            details.append((case, updates[0]))
        print("\n| head | queries | search | launches | host reads | h2d copies | d2h copies |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for head in HEAD_TYPES:
            for queries in (1, 64):
                for which, one in search_counts(a_student(folder / "bert", head), queries, 40_960):
                    print(_row(head, queries, which, *(one["counts"].get(kind, 0) for kind in KINDS)))
        for case, update in details:
            print("\n" + " ".join(case))
            for operator, count in Counter(update["launches"]).most_common(args.most):
                print(f"    {count:6} {operator}")
            for kind, place, count in update["where"][: args.most]:
                print(f"    {count:6} {kind} {place}")


if __name__ == "__main__":
    main()
