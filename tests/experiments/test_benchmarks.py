"""The benchmark command: what it counts, and that its JSON says what its table does. No test here is timed."""

import json
import timeit
from functools import partial

import pytest
import torch
from helpers import as_flags

from dse import __main__ as entry
from dse.experiments import benchmarks, benchmarks_scoring


@pytest.fixture
def run(bert, data, tmp_path, monkeypatch, capsys):
    """Run the benchmark on tiny data: its JSON and its output."""
    monkeypatch.setattr(benchmarks, "_PEAK_SECONDS", 1e-4)

    def measured(what: str, **changes: object) -> tuple[dict, str]:
        flags = {
            "task_name": "mrpc",
            "data_dir": data("mrpc"),
            "bert_model": bert,
            "do_lower_case": True,
            "max_seq_length": 48,
            "pooler_num_top_hidden_layers": 2,
            "fc_dims": [4, 1],
            "batch_size": 6,
            "steps": 2,
            "rounds": 1,
            "output": tmp_path / "benchmark.json",
            **changes,
        }
        entry.main(["benchmark", what, *as_flags(flags)])
        return json.loads((tmp_path / "benchmark.json").read_text()), capsys.readouterr().out

    return measured


def assert_ratios(numbers: dict, output: str) -> None:
    rates = numbers["useful_gflops"]
    assert numbers["ratio_to_fixed_padding"] == pytest.approx(rates["packed"] / rates["max"])
    assert numbers["ratio_to_batch_padding"] == pytest.approx(rates["packed"] / rates["batch"])
    assert numbers["fraction_of_matmul_peak"] == pytest.approx(rates["packed"] / numbers["matmul_peak_gflops"])
    cells = [f"{rates[padding]:.1f}" for padding in ("max", "batch", "packed")]
    ratios = [f"{numbers[f'ratio_to_{other}_padding']:.1f}x" for other in ("fixed", "batch")]
    assert " | ".join([*cells, *ratios]) in output
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize("task", ["mrpc", "sts-b", "snli"])
def test_training(run, data, task):
    numbers, output = run("training", task_name=task, data_dir=data(task), fc_dims=[4, 3 if task == "snli" else 1])
    for role in ("student training", "teacher training"):
        assert_ratios(numbers[role], output)
        assert f"| {role}, {task.upper()} | " in output
    assert numbers["settings"]["batch_size"] == 6
    assert numbers["settings"]["machine"]["threads"] == torch.get_num_threads()


def test_inference(run):
    numbers, output = run("inference")
    assert_ratios(numbers["encoding"], output)


def test_features(run, data):
    numbers, output = run("features")
    rows = [line.split("\t") for line in (data("mrpc") / "train.tsv").read_text().splitlines()[1:]]
    assert numbers["pairs"] == len(rows)
    assert numbers["texts"] == len({row[i] for row in rows for i in (3, 4)})
    for start, found in numbers["starts"].items():
        assert found["texts_per_second"] == pytest.approx(numbers["texts"] / found["token_id_seconds"])
        read, made = f"{found['read_seconds']:.2f}", f"{found['token_id_seconds']:.2f}"
        assert f"| MRPC, {start} start, {len(rows)} pairs | {read} | {made} | " in output


@pytest.mark.parametrize(("task", "head"), [("mrpc", "concat"), ("sts-b", "dot"), ("snli", "concat")])
def test_scoring(run, data, task, head, tmp_path):
    numbers, output = run(
        "scoring", task_name=task, data_dir=data(task), siamese_head_type=head, candidates=[7, 30],
        fc_dims=[4, 3 if task == "snli" else 1],
    )  # fmt: skip
    for count, each in numbers["candidates"].items():
        seconds = each["seconds"]
        assert each["ratio_to_naive_head"] == pytest.approx(seconds["head on blocks"] / seconds["index (ours)"])
        assert each["ratio_to_cross_encoder"] == pytest.approx(seconds["cross-encoder"] / seconds["index (ours)"])
        shown = (f"{seconds[name]:.3g}" for name in ("cross-encoder", "head on blocks", "index (ours)"))
        assert f"| `{head}` | {count} | {' | '.join(shown)} | " in output
        assert 0 <= each["max_relative_difference"] <= 1e-5
    assert 1e-6 < numbers["max_relative_difference_float16"] < 1e-2
    sizes = {count: each["seconds"]["cross-encoder"] for count, each in numbers["candidates"].items()}
    assert sizes["30"] == pytest.approx(sizes["7"] * 30 / 7)
    assert benchmarks_scoring.in_one_line(numbers).startswith("One query against 30 stored candidates takes ")


def test_scoring_with_a_saved_student_and_a_plot(run, student, data, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    student().save_pretrained(tmp_path / "student")
    options = {"candidates": [7, 20], "plot": tmp_path / "plot.png", "model": tmp_path / "student"}
    numbers, _ = run("scoring", **options)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert numbers["candidates"]["20"]["max_relative_difference"] <= 1e-5
    with pytest.raises(SystemExit):
        run("scoring", task_name="sts-b", data_dir=data("sts-b"), **options)


def test_the_peak_counts_a_layers_products(monkeypatch):
    """H = 2, I = 3, 5 tokens, a second each: 4 of 2*5*2*2, 2 of 2*5*2*3 in 6 s; backward has two more of each."""
    monkeypatch.setattr(benchmarks, "_product_seconds", lambda a, b: 1.0)
    for training in (False, True):
        peak = benchmarks.matmul_peak({"hidden_size": 2, "intermediate_size": 3}, 5, training)
        assert peak == pytest.approx((4 * 40 + 2 * 60) / 6 / 1e9)


def test_useful_work():
    layers = torch.nn.ModuleList([torch.nn.Linear(3, 4)])  # 16 parameters
    assert benchmarks.useful_gflop(layers, tokens=10, training=True) == pytest.approx(6 * 16 * 10 / 1e9)
    assert benchmarks.useful_gflop(layers, tokens=10, training=False) == pytest.approx(2 * 16 * 10 / 1e9)


def test_variants_take_turns_and_the_fastest_round_counts(monkeypatch):
    """Each call takes as long on a made-up clock as it says; the first of each is not measured."""
    clock, calls = [0.0], []
    takes = {"a": iter([2.0, 3.0, 2.5]), "b": iter([1.0, 5.0, 6.0, 7.0, 4.0])}  # b runs twice a round
    for name in ("timeit", "repeat"):
        monkeypatch.setattr(benchmarks, name, partial(getattr(timeit, name), timer=lambda: clock[0]))

    def variant(name):
        def call():
            calls.append(name)
            clock[0] += next(takes[name])

        return call

    peaks = iter([4.0, 3.0])
    seconds, _, peak = benchmarks.take_turns({name: variant(name) for name in takes}, 2, lambda: next(peaks))
    assert seconds == {"a": 2.5, "b": 4.0}
    assert "".join(calls) == "ab" + "abb" + "abb"
    assert peak == 4.0


def test_sentence_transformers_beside(run):
    """Where it is installed, both of its ratios are there and sensible; the tests do not require it."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    numbers, output = run("inference")
    assert f"| {numbers['encoding']['ratio_to_sentence_transformers']:.2f}x |" in output
    numbers, output = run("training")
    assert f"| {numbers['student training']['ratio_to_sentence_transformers']:.2f}x |" in output
    assert "ratio_to_sentence_transformers" not in numbers["teacher training"]
