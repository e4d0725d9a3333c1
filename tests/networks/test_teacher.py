"""The teacher's classifier."""

import pytest
import torch

from dse.data.tasks import get_task
from dse.networks.teacher import load_teacher


def test_the_teachers_classifier_starts_from_the_configs_range(bert):
    torch.manual_seed(0)
    teacher = load_teacher(bert, get_task("mnli"), fine_tuned=False)
    weight = teacher.classifier.weight
    assert weight.shape == (3, 32)
    assert weight.std().item() == pytest.approx(teacher.bert.config.initializer_range, rel=0.2)  # 0.1
    assert not teacher.classifier.bias.any()
    assert teacher.bert.config.id2label == {0: "contradiction", 1: "entailment", 2: "neutral"}
