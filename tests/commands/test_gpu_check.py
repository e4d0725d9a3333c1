"""The check of a GPU: what is refused, the table and the exit code, and every section run dry on the CPU."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dse import __main__ as entry
from dse.commands import gpu_check as command
from dse.experiments import gpu_check, gpu_measures
from dse.experiments.gpu_measures import Sizes
from dse.experiments.gpu_report import Report
from dse.experiments.synthetic import random_features
from dse.networks import packed_bert
from dse.training.trainer import Trainer

CPU = torch.device("cpu")
TINY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
SIZES = Sizes(
    small={"vocab_size": 30522, **TINY}, large={"vocab_size": 30522, **TINY}, pairs=32, few=3, updates=1, matrix=32,
    places=(512, 16384), draws=1 << 16, sentences=150, candidates=5000, width=16, queries=2, rows=100,
)  # fmt: skip


@pytest.fixture
def report(tmp_path) -> Report:
    return Report(tmp_path / "gpu.json", {"machine": "this one"})


def dry(report: Report, name: str) -> dict[str, dict]:
    """A section's rows on the CPU, by what they are of."""
    report.run(name, lambda: gpu_check.SECTIONS[name](report, CPU, SIZES))
    return {row["what"]: row for row in report.rows}


def test_refused_without_a_gpu(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(entry.main, ["gpu_check", "--output", tmp_path / "gpu.json"])
    assert "gpu_check needs a CUDA device, and torch finds none here" in line
    line = refused(entry.main, ["gpu_check", "--output", tmp_path / "gpu.json", "--only", "nothing"])
    assert "argument --only: invalid choice: 'nothing'" in line
    assert "is a folder" in refused(entry.main, ["gpu_check", "--output", tmp_path])


def test_the_command_knows_all_sections():
    assert tuple(gpu_check.SECTIONS) == command.SECTIONS


def made_up_sections(limit: float) -> dict:
    def first(report, device, sizes):
        report.add("a distance", np.float32(0.25), limit=limit, graphs=3)
        report.add("a rate", 0.5, goal=0.75, seconds=12.5)
        report.add("a word", "not run")

    def second(report, device, sizes):
        raise ValueError("it broke\nin two lines")

    return {"agreement": first, "graphs": second, "index": first}


@pytest.mark.parametrize(("limit", "only", "failed"), [(0.25, ["index"], None), (0.125, ["index"], "1 checks failed"),
                         (0.25, ["index", "graphs"], "1 checks failed (graphs: graphs)")])  # fmt: skip
def test_table_file_and_exit_code(limit, only, failed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "select_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(gpu_check, "SECTIONS", made_up_sections(limit))
    argv = ["gpu_check", "--output", str(tmp_path / "gpu.json"), "--only", *only]
    with pytest.raises(SystemExit) if failed else contextlib.nullcontext() as stop:
        entry.main(argv)
    out, err = capsys.readouterr()
    assert stop is None or stop.value.code == 1
    assert failed is None or failed in err
    lines = [line for line in out.splitlines() if line.startswith("|")]
    word = "held" if limit == 0.25 else "FAILED"
    assert lines[:2] == ["| section | what | value | limit | held | more |", "| --- | --- | --- | --- | --- | --- |"]
    assert lines[-3:] == [
        f"| index | a distance | 0.25 | <= {limit:g} | {word} | graphs 3 |",
        "| index | a rate | 0.5 | goal >= 0.75 | missed | seconds 12.5 |",
        "| index | a word | not run |  |  |  |",
    ]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["seconds"]) == [name for name in command.SECTIONS if name in only]
    if "graphs" in only:  # told, and the next section ran
        row = found["rows"][0]
        assert row["value"].startswith("ValueError: it broke (test_gpu_check.py:")
        assert row["held"] is False
        assert "raise ValueError" in row["more"]["trace"]
        assert lines[2].endswith("| FAILED |  |")


def test_no_number_does_not_hold(report):
    report.add("a distance", float("nan"), limit=1.0)
    assert report.failed() == [": a distance"]


@pytest.mark.parametrize("name", [name for name in gpu_check.SECTIONS if name != "memory"])
def test_a_section_runs_dry(name, report, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_measures, "_WAYS", (gpu_measures._PACKED, gpu_measures._PADDED))  # of updates
    golden, cases = tmp_path / "golden", "training_cases.json"  # two of the trainings; test_golden.py has all
    golden.mkdir()
    for path in gpu_check.GOLDEN.iterdir():
        (golden / path.name).symlink_to(path)
    (golden / cases).unlink()
    two = dict(list(json.loads((gpu_check.GOLDEN / cases).read_text()).items())[:2])
    (golden / cases).write_text(json.dumps(two))
    monkeypatch.setattr(gpu_check, "GOLDEN", golden)
    assert dry(report, name)
    assert report.failed() == []
    assert json.loads(report.path.read_text())["rows"] == report.rows


def test_a_backward_pass_that_drops_others_fails(report, monkeypatch):
    class Product(torch.autograd.Function):
        """shares @ v, whose gradient for v takes the shares of other places."""

        @staticmethod
        def forward(ctx, shares, v):
            ctx.shares = shares.roll(1, -1)
            return shares @ v

        @staticmethod
        def backward(ctx, gradient):
            return torch.zeros_like(ctx.shares), ctx.shares.transpose(-1, -2) @ gradient

    def attention(q, k, v, bias, rate):
        shares = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(-1)
        return Product.apply(torch.nn.functional.dropout(shares, rate), v)

    monkeypatch.setattr(packed_bert, "scaled_dot_product_attention", attention)
    dry(report, "dropout")
    kinds = ("float32", "bfloat16")
    assert report.failed() == [f"dropout: attention, {kind}: gradient with the same mask" for kind in kinds]


def test_dropout_of_the_factors(report, monkeypatch):
    monkeypatch.setattr(gpu_check, "keep_factors", lambda shapes, *_: [torch.ones(shape) for shape in shapes])
    assert dry(report, "dropout")["factors, rate 0.1: deviations"]["held"] is False


@pytest.mark.parametrize("fails", [True, False])
def test_memory(fails, report, monkeypatch):
    """A stage that ends for lack of memory, and one that does not, though it should."""

    @contextlib.contextmanager
    def limited(device):
        def lacks(self, group):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        with pytest.MonkeyPatch.context() as patch:
            if fails:
                patch.setattr(Trainer, "train_group", lacks)
            yield

    monkeypatch.setattr(gpu_check, "limited_memory", limited)
    rows = dry(report, "memory")
    assert report.failed() == ([] if fails else ["memory: one line tells it", "memory: exit code 1"])
    assert (
        not fails or "error: out of memory (OutOfMemoryError: CUDA out of memory." in rows["one line tells it"]["value"]
    )


def test_a_resumed_training_that_draws_other_numbers_fails(report, monkeypatch):
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    rows = dry(report, "resume")
    assert rows["two trainings with one seed"]["held"] is True
    assert rows["stopped and resumed"]["held"] is False


def test_embeddings_that_differ_fail(report, monkeypatch):
    made = iter(range(1000))
    outputs = gpu_check.outputs_of

    def worse(model, features, padding="packed"):
        return outputs(model, features, padding) * (1 + 1e-4 * next(made))

    monkeypatch.setattr(gpu_check, "outputs_of", worse)
    assert len(dry(report, "agreement")) == len(report.failed()) == 12


def test_golden_trainings_are_told_where_there_are_none(report, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "GOLDEN", tmp_path / "nowhere")
    assert dry(report, "golden")["trainings"]["value"] == "not run: there is no tests/golden"


def test_distance():
    assert gpu_check.distance([3.0, 4.0], [0.0, 4.0]) == 0.75


def test_random_texts_are_as_long_as_those_of_mrpc():
    separate, joint = random_features(2000)
    lengths = separate.texts.lengths
    assert (lengths.min(), lengths.max()) == (10, 50)
    assert lengths.mean() == pytest.approx(27, abs=0.5)
    first, second = lengths[separate.first], lengths[separate.second]
    np.testing.assert_array_equal(joint.tokens.lengths, first + second - 1)
    np.testing.assert_array_equal(joint.first_lengths, first)


def test_sizes_are_of_bert_large():
    model = gpu_measures.student_of(replace(SIZES, small={**Sizes().large, "num_hidden_layers": 4}).small, CPU)
    count = sum(parameter.numel() for parameter in model.encoder.encoder.layer[0].parameters())
    assert count == 4 * (1024 * 1024 + 1024) + 2 * 4096 * 1024 + 4096 + 1024 + 2 * 2 * 1024
