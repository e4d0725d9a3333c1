"""The teacher: a BERT cross-encoder."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from dse.data.tasks import Task
from dse.networks.packed_bert import first_states, is_plain, padded_inputs
from dse.networks.pretrained import bert_config
from dse.networks.student import _load
from dse.system.errors import InputError

logger = logging.getLogger(__name__)


def teacher_logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Logits (batch, labels) of a BertForSequenceClassification, from padded or packed inputs."""
    if "packed" not in inputs:
        return model(**inputs).logits
    batch = inputs["packed"]
    if not is_plain(model):
        return torch.cat([model(**some).logits for some in padded_inputs(batch)]).index_select(0, batch.order)
    pooled = model.bert.pooler(first_states(model.bert, batch).unsqueeze(1))
    return model.classifier(model.dropout(pooled))


def load_teacher(folder: Path, task: Task, fine_tuned: bool) -> BertForSequenceClassification:
    """A cross-encoder, float32: BERT, its tanh pooler, dropout and a linear layer to the task's logits.

    Args:
        fine_tuned: True for a folder that finetune_bert.py made for this task, whose classifier is used as it
            is; raises InputError for any other. False for training: the classifier starts from
            N(0, initializer_range), bias 0, even where the folder has one.
    """
    labels = list(task.labels) or ["score"]
    types = bert_config(folder, "the teacher").get("type_vocab_size", 2)
    if types < 2 and task.text_b is not None:
        raise InputError(f"{folder}: type_vocab_size is {types}, and a teacher of pairs needs 2: take another BERT")
    if fine_tuned:
        _check_teacher_task(folder, task, labels)
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    model, new = _load(BertForSequenceClassification, folder, num_labels=len(labels), **names)
    model.config.finetuning_task = task.name
    if fine_tuned:
        if new:
            raise InputError(
                f"{folder}: no fine-tuned teacher: {', '.join(sorted(new))} missing; finetune_bert.py makes one"
            )
        return model
    if any("pooler." in name for name in new):
        logger.warning("%s has no tanh pooler: the teacher starts from a random one", folder)
    nn.init.normal_(model.classifier.weight, std=model.config.initializer_range)
    nn.init.zeros_(model.classifier.bias)
    return model


def _check_teacher_task(folder: Path, task: Task, labels: list[str]) -> None:
    """Labels in another order would give logits that mean something else."""
    config = bert_config(folder, "the teacher")
    names = [name for _, name in sorted((config.get("id2label") or {}).items(), key=lambda item: int(item[0]))]
    if names and len(names) != len(labels):
        raise InputError(
            f"{folder}: gives {len(names)} logits, and {task.name} needs {len(labels)}: {', '.join(labels)}"
        )
    if all(name.startswith("LABEL_") for name in names):  # or none: transformers leaves out LABEL_0 and LABEL_1
        if task.labels:
            logger.warning("%s does not name its labels: whether they are in the order %s is not known", folder, labels)
    elif names != labels:
        raise InputError(f"{folder}: its labels in order are {names}, those of {task.name} are {labels}")
    if config.get("finetuning_task") not in (None, task.name):
        logger.warning("%s was fine-tuned on %s and is used for %s", folder, config["finetuning_task"], task.name)
