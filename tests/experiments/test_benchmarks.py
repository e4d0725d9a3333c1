"""The benchmark command: what it counts, and that its JSON says what its table does. No test here is timed."""

import json
import timeit
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import as_flags, one_turn
from transformers import BertConfig, BertModel

from dse import __main__ as entry
from dse import index as index_module
from dse.experiments import baselines, benchmarks, benchmarks_scoring
from dse.networks.encoder import PooledBert
from dse.system.device import bert_parameters, training_bytes, training_seconds
from dse.training.trainer import Trainer


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
        ways = ("cross-encoder", "head on blocks", "index in one pass", "index (ours)", "shortlist (ours)")
        shown = " | ".join(f"{seconds[name]:.3g}" for name in ways)
        assert f"| `{head}` | {count} | {shown} | 100.0 % ({each['many_queries']} queries) | " in output
        assert 0 <= each["max_relative_difference"] <= 1e-5
        assert each["shortlist_recall"] == 1  # it takes all
        assert f" | {seconds['build']:.3g} |" in output
    assert 1e-6 < numbers["max_relative_difference_float16"] < 1e-2
    sizes = {count: each["seconds"]["cross-encoder"] for count, each in numbers["candidates"].items()}
    assert sizes["30"] == pytest.approx(sizes["7"] * 30 / 7)
    assert benchmarks_scoring.in_one_line(numbers).startswith("One query against 30 stored candidates takes ")


def test_more_candidates_are_mixtures_of_two():
    """Of (1, 0) and (0, 1): the shares of the two, which sum to 1."""
    (first, texts), *others = benchmarks_scoring.candidates(np.eye(2, dtype=np.float32), ["a", "b"], 5000)
    assert (first.tolist(), texts) == ([[1, 0], [0, 1]], ["a", "b"])
    mixed, named = np.concatenate([part[0] for part in others]), [text for part in others for text in part[1]]
    assert np.allclose(mixed.sum(axis=1), 1) and 0.2 < np.mean((mixed > 0) & (mixed < 1)) < 0.8
    assert named == [f"mixture {row}" for row in range(2, 5000)]
    ((first, texts),) = benchmarks_scoring.candidates(np.eye(2, dtype=np.float32), ["a", "b"], 1)
    assert (first.tolist(), texts) == ([[1, 0]], ["a"])


def test_a_shortlists_share_is_of_the_ten_best(run, monkeypatch):
    monkeypatch.setattr(index_module, "_best_of_enough", partial(index_module._best_of_nearest, 10))
    numbers, output = run("scoring", candidates=[7, 40], siamese_head_type="concat")
    assert numbers["candidates"]["7"]["shortlist_recall"] == 1
    share = numbers["candidates"]["40"]["shortlist_recall"]
    assert 0 < share < 1  # an untrained concat head finds others than the nearest
    assert f"| {100 * share:.1f} % (" in output


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


def event(name: str, start: float, end: float, device: str = "CUDA", annotation: bool = False) -> SimpleNamespace:
    """An event of a profile, in microseconds."""
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, time_range=span, device_type=SimpleNamespace(name=device), is_user_annotation=annotation
    )


def test_what_the_gpu_does_in_a_step():
    """Two steps in 100 us. The GPU is busy for 10 + 20 + 10: one kernel lies within another, one overlaps."""
    events = [
        event("gemm", 50, 60), event("layer_norm", 10, 20), event("softmax", 30, 45), event("gelu", 35, 40),
        event("add", 40, 50), event("Memcpy HtoD (Pinned -> Device)", 0, 4), event("Memset (Device)", 4, 6),
        event("Memcpy DtoH (Device -> Pageable)", 90, 94), *[event(name, 0, 100, device="CPU")
          for name in ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync")],
        event("Optimizer.step#BertAdam.step", 0, 100, annotation=True),
    ]  # fmt: skip
    used = benchmarks.use_of_gpu(events, 100e-6, 2)
    busy = 10 + 30 + 4 + 2 + 4
    assert used == pytest.approx(
        {"launches": 1.5, "kernels": 2.5, "copies_to_gpu": 0.5, "copies_to_host": 0.5, "idle_share": 1 - busy / 100}
    )
    assert benchmarks.use_of_gpu(events, 20e-6, 2)["idle_share"] == 0


def test_encoding_is_compared_with_sentence_transformers_on_openvino(run, monkeypatch):
    """Where it is installed, in the encoder's precision; it has no fp16."""
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    real, asked = baselines.sentence_transformer, []
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: name in ("optimum", "optimum.intel"))

    def made(folder, length, device="cpu", **ways):
        asked.append(ways)
        return real(folder, length, device)

    monkeypatch.setattr(baselines, "sentence_transformer", made)
    numbers, output = run("inference")
    other, _ = run("inference", precision="bf16")
    hints = [ways["model_kwargs"]["ov_config"]["INFERENCE_PRECISION_HINT"] for ways in asked]
    assert (hints, {ways["backend"] for ways in asked}) == (["f32", "bf16"], {"openvino"})
    headings = output[output.index("| useful GFLOP/s") :].splitlines()[0].split(" | ")
    place = headings.index("against its OpenVINO")
    assert headings[place - 1] == "against sentence-transformers"
    cells = next(line for line in output.splitlines() if line.startswith("| encoding")).split(" | ")
    assert cells[place] == f"{numbers['encoding']['ratio_to_openvino']:.2f}x"
    assert "ratio_to_openvino" in other["encoding"]
    assert baselines.openvino("bert", 48, "fp16") == {}
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    assert baselines.openvino("bert", 48, "fp32") == {}
    assert cells[0] == "| encoding, MRPC"
    assert "| encoding, MRPC, bf16 |" in benchmarks.rates_table(numbers, other)


def test_tables_tell_of_the_gpu_where_there_is_one(run, monkeypatch):
    monkeypatch.setattr(benchmarks, "has_sentence_transformers", lambda: False)
    used = {"launches": 1234.4, "kernels": 56.0, "copies_to_gpu": 1.0, "copies_to_host": 0.25, "idle_share": 0.126}
    columns = " | launches a step | kernels | copies to the GPU | copies from it | GPU idle |"
    cpu, output = run("inference")
    assert columns not in output
    gpu = json.loads(json.dumps(cpu))
    gpu["encoding"]["gpu"] = dict.fromkeys(benchmarks.PADDINGS, used)
    header, _, *rows = benchmarks.rates_table(gpu, cpu).splitlines()
    assert header.endswith(columns)
    three = [" / ".join([cell] * 3) for cell in ("1,234", "56", "1.0", "0.2", "13 %")]
    assert rows[0].endswith(" | " + " | ".join(three) + " |")
    assert rows[1].endswith(" | - | - | - | - | - |")
    cpu, output = run("scoring", candidates=[7])
    assert columns not in output
    cpu["candidates"]["7"]["gpu"] = dict.fromkeys((benchmarks_scoring.NAIVE, benchmarks_scoring.OURS), used)
    assert "| 1,234 / 1,234 | 56 / 56 | 1.0 / 1.0 | 0.2 / 0.2 | 13 % / 13 % |" in benchmarks_scoring.scoring_table(cpu)


def test_on_a_gpu_the_clock_waits_for_it(monkeypatch):
    """Each call queues work of a second, for which only `synchronize` waits; memory is the GPU's."""
    clock, queued = [0.0], [0.0]

    def synchronize():
        clock[0] += queued[0]
        queued[0] = 0.0

    for name in ("timeit", "repeat"):
        monkeypatch.setattr(benchmarks, name, partial(getattr(timeit, name), timer=lambda: clock[0]))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)

    def queue():
        queued[0] += 1.0

    assert benchmarks.take_turns({"a": queue}, 1, device="cuda") == ({"a": 1.0}, {"a": 3.0}, 0.0)


@pytest.mark.parametrize(
    ("precision", "device", "inside", "kind"),
    [
        ("auto", "cuda", "high", None),
        ("tf32", "cuda", "high", None),
        ("fp32", "cuda", "highest", None),
        ("auto", "cpu", "highest", None),
        ("bf16", "cpu", "highest", torch.bfloat16),
    ],
)
def test_the_precision_of_others_products(precision, device, inside, kind, monkeypatch):
    before = torch.get_float32_matmul_precision()
    with benchmarks.computing_in(precision, device):
        assert torch.get_float32_matmul_precision() == inside
        assert torch.is_autocast_enabled(device) == (kind is not None)
        if device == "cpu":
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (kind or torch.float32)
    assert torch.get_float32_matmul_precision() == before
    dtypes = set()
    monkeypatch.setattr(benchmarks, "_product_seconds", lambda a, b: dtypes.update((a.dtype, b.dtype)) or 1.0)
    benchmarks.matmul_peak({"hidden_size": 2, "intermediate_size": 3}, 5, True, "cpu", precision)
    assert dtypes == {kind or torch.float32}


@pytest.mark.parametrize(
    ("what", "changes", "told"),
    [
        ("inference", {"device": "cuda"}, "--device cuda: torch finds no GPU that it can use"),
        ("features", {"device": "cuda"}, "token ids are made on the CPU"),
        ("features", {"precision": "bf16"}, "token ids are made on the CPU"),
    ],
)
def test_a_device_that_cannot_be_measured(what, changes, told, run, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run(what, **changes)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_the_precision_reaches_the_encoders(run, monkeypatch):
    """Student, teacher, and the student and the cross-encoder of scoring."""
    seen = []
    original = PooledBert.forward

    def forward(self, *args, **inputs):
        seen.append((type(self).__name__, getattr(self, "precision", None)))
        return original(self, *args, **inputs)

    monkeypatch.setattr(PooledBert, "forward", forward)
    for module in (benchmarks, benchmarks_scoring):
        monkeypatch.setattr(module, "take_turns", one_turn)
    monkeypatch.setattr(benchmarks, "has_sentence_transformers", lambda: False)
    for what in ("training", "inference", "scoring"):
        seen.clear()
        run(what, precision="bf16", candidates=[7])
        assert {precision for _, precision in seen} == {"bf16"}, what
        assert ("Teacher" in dict(seen)) == (what != "inference")


def test_each_padding_is_trained_with_its_own_batches(run, monkeypatch):
    """Three trainers in a round, one after the other, each with its own batches; none has another's gradients."""
    seen = []
    original = Trainer.train_group

    def train_group(self, group):
        before = all(parameter.grad is None for parameter in self.model.parameters())
        seen.append((self, self.plan.batches.padding, before))
        original(self, group)

    monkeypatch.setattr(Trainer, "train_group", train_group)
    monkeypatch.setattr(benchmarks, "has_sentence_transformers", lambda: False)
    monkeypatch.setattr(benchmarks, "take_turns", one_turn)
    run("training", gradient_accumulation_steps=1)
    assert [padding for _, padding, _ in seen] == ["max", "max", "batch", "batch", "packed", "packed"] * 2
    assert [trainer for trainer, *_ in seen[::2]] == [trainer for trainer, *_ in seen[1::2]]
    assert len({id(trainer) for trainer, *_ in seen}) == 6
    assert all(before for *_, before in seen)


def test_memory_and_time_of_bert_large():
    """24 layers of 4 x 1024 x 1025 + 2 x 1024 x 4096 + 5120 + 4096; 30522 + 512 + 2 + 2 rows of 1024; a pooler."""
    large = benchmarks._BERT_LARGE
    layer, pooler = 4 * 1024 * 1025 + 2 * 1024 * 4096 + 5120 + 4096, 1024 * 1025
    assert bert_parameters(large) == (24 * layer, 24 * layer + 31038 * 1024 + pooler) == (302_309_376, 335_141_888)
    assert training_bytes(large, 0, "fp32") == 16 * 335_141_888
    assert training_bytes(large, 10, "bf16") - training_bytes(large, 0, "bf16") == 34 * 1024 * 24 * 10
    assert training_bytes(large, 10, "tf32") - training_bytes(large, 0, "bf16") == 68 * 1024 * 24 * 10
    assert training_seconds(large, 1e6, 1e14, 0.5) == pytest.approx(6 * 302_309_376 * 1e6 / 5e13)
    # 40 GiB less a tenth: 36 - 5 GiB hold 311 x 128 tokens of 0.797 MiB, or 155 of twice that.
    # 3 epochs of 198,072 tokens are 1.078e15 FLOP: 11.5 s at 30 % of 312 TFLOP/s. QQP has 55 times as many tokens.
    assert "| A100 | 40 | 5.0 | 155 / 311 | 0.2 / 10.6 |" in benchmarks.memory_table()


def test_parameters_are_those_of_a_bert():
    config = BertConfig(**benchmarks._BERT_LARGE | {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
                                                    "vocab_size": 100, "num_attention_heads": 2})  # fmt: skip
    bert = BertModel(config)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (bert.encoder, bert)]
    assert bert_parameters(config.to_dict()) == tuple(counts)
