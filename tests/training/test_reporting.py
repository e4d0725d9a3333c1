"""Lines and files that tell how a training goes."""

import json

from dse.training.reporting import append_json_line, format_metrics


def test_a_line_of_many_thresholds_shows_the_best():
    metrics = {"loss": 0.25, **{f"{name}_{t}": v for t, v in ((0.1, 0.5), (0.2, 0.75)) for name in ("recall", "f1")}}
    assert format_metrics(metrics | {"mm_loss": 1}) == "loss 0.2500, recall_0.2 0.7500, f1_0.2 0.7500, mm_loss 1.0000"
    assert format_metrics({"pearson": float("nan"), "spearman": None}) == "pearson undefined, spearman undefined"


def test_a_json_line_per_epoch_is_json(tmp_path):
    append_json_line(tmp_path / "log.jsonl", {"epoch": 0, "train": {"pearson": float("nan")}})
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"epoch": 0, "train": {"pearson": None}}
