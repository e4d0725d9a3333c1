"""The numbers of the tables."""

import math

import pytest

from dse.data.tasks import get_task
from dse.experiments import results
from dse.training.reporting import duration


def test_summary_by_hand():
    def of(dev: float, test: float) -> dict:
        metrics = {split: {"f1": v, "tuned_f1": v + 0.01} for split, v in (("dev", dev), ("test", test))}
        return {"metrics": metrics, "seconds": 60.0}

    by_seed = {
        1: {"teacher": of(0.80, 0.8), "dse": of(0.76, 0.8), "labels_only": of(0.74, 0.7)},
        2: {"teacher": of(0.90, 0.8), "dse": of(0.90, 0.6), "labels_only": of(0.85, 0.7)},
        5: {"teacher": of(0.0, 0.0), "labels_only": of(0.5, 0.0)},  # not done yet
    }
    assert results.degradation(0.8, 0.0) == 1.0
    assert results.degradation(0.0, 0.8) is None
    found = results.summarize_task(get_task("mrpc"), by_seed)
    assert found["degradation"]["dev"]["mean"] == pytest.approx((0.05 + 0) / 2)
    assert found["degradation"]["dev"]["sd"] == pytest.approx(0.05 / math.sqrt(2))
    assert found["degradation"]["test"]["mean"] == pytest.approx((0 + 0.25) / 2)
    assert found["dse_minus_labels_only"]["dev"]["mean"] == pytest.approx((0.02 + 0.05) / 2)
    assert found["dse_minus_sentence_bert"]["dev"] is None
    of_dse = found["table"]["dev"]["f1"]["dse"]
    assert of_dse == {"mean": pytest.approx(0.83), "sd": pytest.approx(0.14 / math.sqrt(2)), "n": 2}
    # The third seed has no student of both, so that nothing of it is in a row with one.
    assert found["table"]["dev"]["f1"]["teacher"]["mean"] == pytest.approx((0.8 + 0.9) / 2)
    assert found["table"]["dev"]["f1"]["labels_only"]["mean"] == pytest.approx((0.74 + 0.85) / 2)
    assert found["table"]["dev"]["f1"]["sentence_bert"] is None
    assert (found["minutes"]["dse"], found["minutes"]["teacher"]["n"]) == ({"mean": 1.0, "sd": 0.0, "n": 2}, 2)
    assert found["left_out"] == {"5": ["dse"]}

    by_seed[5]["dse"] = of(0.4, 0.0)  # a teacher at 0 has no degradation, but the row of DSE has three values now
    found = results.summarize_task(get_task("mrpc"), by_seed)
    assert (found["degradation"]["dev"]["n"], found["table"]["test"]["f1"]["dse"]["n"]) == (2, 3)
    assert found["dse_minus_labels_only"]["test"] == {
        "mean": pytest.approx((0.1 - 0.1) / 2, abs=1e-9), "sd": pytest.approx(0.2 / math.sqrt(2)), "n": 2
    }  # fmt: skip
    assert found["left_out"] == {"5": []}
    by_seed[5]["teacher"], by_seed[5]["dse"] = of(0.8, 0.5), of(0.4, 0.0)
    found = results.summarize_task(get_task("mrpc"), by_seed)
    assert found["degradation"]["test"]["mean"] == pytest.approx(1.25 / 3)
    assert found["left_out"] == {}


def test_how_numbers_are_shown():
    assert results.show({"mean": 0.8612, "sd": 0.0041, "n": 2}) == "0.861 ± 0.004"
    assert results.show({"mean": -0.0123, "sd": None, "n": 1}, "+.1%") == "-1.2 %"
    assert results.show({"mean": 0.0123, "sd": 0.002, "n": 2}, "+.1%") == "+1.2 % ± 0.2 %"
    assert results.show({"mean": 0.01, "sd": None, "n": 1}, "+.3f") == "+0.010"
    assert results.show({"mean": -0.01, "sd": 0.002, "n": 2}, "+.3f") == "-0.010 ± 0.002"
    assert results.show(None) == "-"
    assert duration(60 * 125) == "2 h 05 min"
    assert duration(50) == "1 min"
