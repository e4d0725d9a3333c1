"""The teacher: a BERT cross-encoder, which reads both texts of a pair together."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertForSequenceClassification

from dse.data.tasks import BINARY, Task, ranked_label
from dse.networks.encoder import PooledBert
from dse.networks.poolers import POOLERS
from dse.networks.pretrained import bert_config, load_bert
from dse.system.errors import InputError

logger = logging.getLogger(__name__)


class Teacher(PooledBert):
    """The parts of a BertForSequenceClassification, under their names in its state dict: row to logits."""

    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__(model.bert, POOLERS["cls"], 1, model.dropout, model.classifier)
        self.save_pretrained = model.save_pretrained  # to a folder that transformers loads

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.bert.device


def load_teacher(folder: Path, task: Task, fine_tuned: bool) -> Teacher:
    """A cross-encoder, float32, from the folder of a BERT; the task's labels name its logits.

    With `fine_tuned` its classifier is used as it is; raises InputError if it is not one for this task's labels. In a
    binary task, one logit z, as other programs train it, is that of the label that ranks; the other one's becomes 0.
    Otherwise a new classifier, N(0, initializer_range) and bias 0, takes the place of any in the folder.
    """
    config, labels = bert_config(folder, "the teacher"), list(task.labels) or ["score"]
    if config.get("type_vocab_size", 2) < 2 and task.text_b is not None:
        raise InputError(f"{folder}: type_vocab_size is 1, but a teacher of pairs needs 2: use another BERT")
    if fine_tuned and (labels := _labels_of(folder, config, task, labels))[1:] == [] and task.kind == BINARY:
        logger.info("%s gives one logit, which is taken for that of %r", folder, labels[0])
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model, new = load_bert(BertForSequenceClassification, folder, num_labels=len(labels), **names)
    model.config.finetuning_task = task.name
    if fine_tuned and new:
        missing = ", ".join(sorted(new))
        raise InputError(f"{folder}: not a fine-tuned teacher: {missing} missing; finetune_bert.py makes one")
    if not fine_tuned:
        nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
        nn.init.zeros_(model.classifier.bias)
    if len(labels) < task.num_logits:
        model.classifier = _with_a_zero(model.classifier, task.labels.index(labels[0]))
    return Teacher(model)


@torch.no_grad()
def _with_a_zero(classifier: nn.Linear, place: int) -> nn.Linear:
    """A classifier of two logits, the one at `place` as that of one gives it, and 0: the same log-odds."""
    both = nn.Linear(classifier.in_features, 2)
    for name, values in both.named_parameters():
        values[place], values[1 - place] = getattr(classifier, name)[0], 0.0
    return both


def _labels_of(folder: Path, config: dict[str, Any], task: Task, labels: list[str]) -> list[str]:
    """The labels of a teacher's logits: the task's or, of one logit in a binary task, the label that ranks.

    Raises InputError for labels in another order, whose logits would mean something else.
    """
    names = [name for _, name in sorted((config.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    made_for = config.get("finetuning_task")
    if len(names) == 1 and task.kind == BINARY:
        if names == ["score"] and made_for is not None:
            raise InputError(f"{folder}: gives the scores of {made_for}, a regression, and not logits of {task.name}")
        labels = [str(ranked_label(task))]
    elif names and len(names) != len(labels):
        needs = f"{len(labels)}: {', '.join(labels)}"
        raise InputError(f"{folder}: gives {len(names)} logits, but {task.name} needs {needs}")
    elif all(name.startswith("LABEL_") for name in names):  # or none: transformers leaves out LABEL_0 and LABEL_1
        if task.labels:
            logger.warning("%s does not name its labels: check that their order is %s", folder, labels)
    elif names != labels:
        raise InputError(f"{folder}: its labels in order are {names}, but those of {task.name} are {labels}")
    if made_for not in (None, task.name):
        logger.warning("%s was fine-tuned on %s, but is used for %s", folder, made_for, task.name)
    return labels
