#!/usr/bin/env python3
"""Stage 5: load a student, embed sentences and score their pair with it. Copy from here.

    python load_dse_checkpoint_example.py --task_name mrpc --trainer_checkpoint <path_to_saved_checkpoint>

A checkpoint carries its architecture, casing and tokenizer; if flags for them are given, they must agree with it.
Without a checkpoint the encoder is the pre-trained one and the head is untrained.
"""

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dse import cli
from dse.data.tasks import Task, check_sentence_pairs, get_task
from dse.networks.config import DSEConfig, check_fc_dims
from dse.networks.pretrained import open_bert
from dse.system.errors import InputError
from dse.system.files import same_value

if TYPE_CHECKING:
    from dse.models import DSESiameseClassifier

PROG = "load_dse_checkpoint_example.py"
SENTENCES = ("The student embeds each sentence alone.", "Every sentence is embedded on its own by the student.")
logger = logging.getLogger("dse.load_dse_checkpoint_example")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog=PROG, doc=__doc__)
    parser.add_argument("--task_name", required=True, help="GLUE task, or a JSON file that describes your own")
    parser.add_argument("--trainer_checkpoint", default="", help="checkpoint that dse_train_runner.py wrote")
    cli.add_architecture_flags(parser, given_only=True)
    return parser.parse_args(argv)


def load_trained(path: str, task: Task, given: dict[str, Any]) -> "DSESiameseClassifier":
    """The student of a checkpoint; flags that disagree with it are refused."""
    from dse.models import DSESiameseClassifier
    from dse.storage.checkpoint import Checkpoint

    checkpoint = Checkpoint.read(path)
    checkpoint.check_task(task)
    for flag, value in given.items():
        if not same_value(checkpoint.run[flag], value):
            raise InputError(
                f"--{flag}: {value} was given, but the checkpoint was trained with {checkpoint.run[flag]}; "
                "leave the flag out, since the checkpoint has its value"
            )
    return DSESiameseClassifier(**vars(checkpoint.student()))


def build_untrained(task: Task, given: dict[str, Any]) -> "DSESiameseClassifier":
    """A student with a pre-trained encoder and an untrained head, by the flags and their defaults."""
    parser = cli.Parser()
    cli.add_architecture_flags(parser)
    args = parser.parse_args([], argparse.Namespace(**given))
    check_fc_dims(args.fc_dims, task)
    layers = args.pooler_num_top_hidden_layers
    bert = open_bert(args.bert_model, "--bert_model", args.do_lower_case, args.max_seq_length, layers)

    from dse.models import DSESiameseClassifier
    from dse.networks.student import new_network

    logger.warning("no --trainer_checkpoint: the encoder is pre-trained, but the head is UNTRAINED")
    network = new_network(bert.folder, DSEConfig.from_flags(args, bert.config)).eval()
    return DSESiameseClassifier(network, bert.tokenizer, task, args.max_seq_length)


def run(args: argparse.Namespace) -> None:
    # 1. What was asked for.
    task = get_task(args.task_name)
    check_sentence_pairs(task)
    cli.set_up_logging()
    given = {name: value for name, value in vars(args).items() if name not in ("task_name", "trainer_checkpoint")}

    # 2. The student: from the checkpoint alone, or with an untrained head.
    path = args.trainer_checkpoint
    model = load_trained(path, task, given) if path else build_untrained(task, given)

    # 3. Sentences to embeddings, and a pair of them to its score.
    embeddings = model.encode(SENTENCES, convert_to="tensor")
    scores = model.score([SENTENCES])
    for sentence, embedding in zip(SENTENCES, embeddings, strict=True):
        print(f"Sentence: {sentence}")
        print(f"Embedding: {embedding}")
    print(f"Score: {scores[0]}")
    if task.labels:  # the score of a binary task is a logit of its second label
        probabilities = zip(task.labels, model.predict([SENTENCES], probabilities="all")[0], strict=True)
        print("Probabilities: " + ", ".join(f"{name} {probability:.4f}" for name, probability in probabilities))


main = cli.program(PROG, parse_arguments, run)


if __name__ == "__main__":
    main()
