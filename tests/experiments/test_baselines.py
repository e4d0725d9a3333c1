"""Sentence-BERT, the baseline of the reproduction."""

import pytest
from torch import nn

from dse.experiments.baselines import SentenceBert


def test_sentence_berts_schedule_and_decay():
    """Without sentence-transformers: 320 pairs in 4 epochs are 40 updates, a tenth of which are warm-up."""
    baseline = SentenceBert.__new__(SentenceBert)
    baseline.loss = nn.ModuleDict({"layer": nn.Linear(2, 3), "LayerNorm": nn.LayerNorm(3)})
    baseline.prepare(320, epochs=4)
    rates = []
    for _ in range(41):
        rates.append(baseline.rate)
        baseline.optimizer.step()
        baseline.schedule.step()
    assert rates[:5] == pytest.approx([0.0, 1.25e-5, 2.5e-5, 3.75e-5, 5e-5])
    assert rates[5:] == pytest.approx([5e-5 * (36 - n) / 36 for n in range(1, 37)])
    groups = [(group["weight_decay"], [tuple(p.shape) for p in group["params"]])
              for group in baseline.optimizer.param_groups]  # fmt: skip
    assert groups == [(0.01, [(3, 2)]), (0.0, [(3,), (3,), (3,)])]
    baseline.prepare(33, epochs=1)  # two updates: no warm-up
    assert baseline.rate == 5e-5
