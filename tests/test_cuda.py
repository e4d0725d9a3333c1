"""The CUDA path on a machine without a GPU: tests/cuda emulates one. Each scenario has a process of its own."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention
import count
import emulation
import numpy as np
import pytest
import scenarios
import torch
from processes import ended, start, start_ranks
from torch.nn import functional

from dse.experiments.synthetic import write_pairs, write_tiny_bert

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="emulated CUDA needs g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="emulated CUDA needs a CPU build of torch"),
]
CLOSE = {"rtol": 0, "atol": 1e-5}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
Scenario = Callable[[], dict[str, Any]]


@pytest.fixture(scope="session")
def guard(tmp_path_factory) -> Path:
    return emulation.compile_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """Pairs and a BERT without dropout for the stages; longer pairs, and a deep and a shallow BERT, for the counts."""
    folder = tmp_path_factory.mktemp("cuda")
    write_pairs(folder / "data" / "train.tsv", 72, seed=1)
    write_pairs(folder / "data" / "dev.tsv", 40, seed=2)
    write_tiny_bert(folder / "bert", seed=3)
    config = folder / "bert" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **NO_DROPOUT}))
    count.write_data(folder / "long", 96)
    count.write_bert(folder / "deep")
    count.write_bert(folder / "shallow", layers=4)
    return folder


@pytest.fixture(scope="session")
def begin(guard, made, tmp_path_factory) -> Callable[..., Scenario]:
    """A function that starts a scenario, emulated unless told otherwise; what it gives waits for the end."""

    def started(name: str, *arguments: Any, emulated: bool = True, ranks: bool = False) -> Scenario:
        folder = tmp_path_factory.mktemp(name)
        out, log = folder / "out.json", folder / "log"
        work = (scenarios.run, name, str(guard) if emulated else "", str(out))
        given = [folder if argument is ... else argument for argument in arguments]
        processes = start_ranks(*work, *given, log=log) if ranks else [start(*work, *given, log=log)]

        def wait() -> dict[str, Any]:
            logged = [ended(process, log) for process in processes][-1]
            return {**json.loads(out.read_text()), "log": logged, "folder": folder}

        return wait

    return started


PADDINGS, FLAGS = ("batch", "packed"), ("--bf16", "--fp16", "--gradient_checkpointing")


@pytest.fixture(scope="session")
def begun(begin, made) -> dict[str, Scenario]:
    """The long scenarios, begun together: the stages on the CPU and emulated, and updates of deep networks."""
    data = made / "data", made / "bert"
    runs = {"cpu": begin("stages", ..., *data, "packed", [], emulated=False)}
    runs |= {role: begin("updates", role, made / "long", made / "deep", ...) for role in ("student", "teacher")}
    runs |= {padding: begin("stages", ..., *data, padding, []) for padding in PADDINGS}
    return runs | {flag: begin("stages", ..., *data, "packed", [flag]) for flag in FLAGS}


@pytest.fixture(scope="session")
def on_cpu(begun) -> dict[str, Any]:
    return begun["cpu"]()


def test_the_scenarios_begin(begun):
    """The first test of a run in one process (conftest.py): they take a minute, beside the other tests."""
    assert set(begun) == {"cpu", "student", "teacher", *PADDINGS, *FLAGS}


def assert_same(found: dict[str, Any], expected: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], err_msg=name, **CLOSE)


@pytest.mark.parametrize("padding", PADDINGS)
def test_stages_give_what_the_cpu_gives(padding, begun, on_cpu):
    """Stages 2 to 5, the student's training continued: metrics of all epochs, logits, weights, and the example."""
    run = begun[padding]()
    found, expected = run["value"], on_cpu["value"]
    assert run["log"].count("device cuda:0 (an emulated GPU)") == 4
    assert run["counts"]["launch"] > 1_000
    assert_same(found, expected, ("teacher", "logits", "student", "weights"))
    assert np.ptp(found["student"]) > 0.1, "nothing was learned that could differ"
    assert found["rng states set"] == 1
    printed = [re.findall(r"-?\d\.\d+(?:e[-+]\d+)?", each["example"]) for each in (found, expected)]
    assert len(printed[0]) > 100
    np.testing.assert_allclose(*(np.array(numbers, float) for numbers in printed), rtol=0, atol=1e-4)


@pytest.mark.parametrize("flag", FLAGS)
def test_stages_in_16_bits_and_with_checkpointing(flag, begun, on_cpu):
    """No device is mixed, and the losses are near those of float32: float16 leaves out the first updates."""
    run = begun[flag]()
    near = {"--gradient_checkpointing": 1e-5, "--bf16": 0.02, "--fp16": 0.2}[flag]
    np.testing.assert_allclose(run["value"]["losses"], on_cpu["value"]["losses"], rtol=0, atol=near)


def test_students_use_gives_what_the_cpu_gives(begin, on_cpu):
    """Embeddings, scores, labels, probabilities, and an index: built, appended to, opened, searched, scored."""
    student = next((on_cpu["folder"] / "checkpoints").glob("*/best*"))
    waits = [begin("use", student, ..., emulated=emulated) for emulated in (True, False)]
    run, cpu = (wait() for wait in waits)
    found, expected = run["value"], cpu["value"]
    assert found.pop("device") == "cuda:0"
    assert expected.pop("device") == "cpu"
    for name, value in expected.items():
        if name in ("labels", "half dtype") or name.startswith("rows"):
            assert found[name] == value, name
        elif name == "half":  # float16 on CUDA, bfloat16 on the CPU
            np.testing.assert_allclose(found[name], expected["encode"], rtol=0, atol=0.01 * np.abs(value).max())
        else:
            np.testing.assert_allclose(found[name], value, err_msg=name, rtol=1e-4, atol=1e-5)
    assert sorted(found["rows float32"][1]) == list(range(20)), "not all candidates were found"


@pytest.fixture(scope="session")
def updates(begun) -> dict[str, list[dict[str, Any]]]:
    return begun["student"]()["value"] | begun["teacher"]()["value"]


@pytest.mark.parametrize("case", count.CASES, ids=" ".join)
def test_an_update_seldom_waits_for_the_device(case, updates):
    """At BERT-large's depth, whatever the layers: at most 3 reads by the host, and 10 copies to the device."""
    counted = updates[" ".join(case)]
    assert len(counted) == 1
    assert all(update["counts"]["launch"] > 24 * 20 for update in counted)
    assert not scenarios.over_budget(counted)


@pytest.mark.parametrize(("fault", "kinds"), [("none", set()), ("item", {"read"}), ("copy", {"h2d"})])
def test_what_is_done_for_each_parameter_is_seen(fault, kinds, begin, made):
    """An item() or a copy for each parameter in the optimizer breaks its budget, and no other one."""
    lines = begin("planted", fault, made / "long", made / "shallow", ...)()["value"]
    assert {line.split()[2].rstrip(",") for line in lines} == kinds, lines


@pytest.mark.parametrize("fault", ["targets", "head"])
def test_what_stays_on_the_cpu_is_refused(fault, begin, made):
    lines = begin("planted", fault, made / "long", made / "shallow", ...)()["value"]
    assert len(lines) == 1
    assert "Expected all tensors to be on the same device" in lines[0]


def test_two_processes_agree(begin, made, on_cpu):
    """Two processes with a device each, gloo in place of nccl: what one gives, and no CPU tensor goes to nccl."""
    run = begin("together", ..., made / "data", made / "bert", ranks=True)()
    found = run["value"]
    assert found["backends"] == ["nccl"] * 4
    assert run["counts"]["collective"] > 50
    assert_same(found, on_cpu["value"], ("teacher", "logits", "student", "weights"))


# The stand-ins of attention kernels


@pytest.mark.parametrize(("kernel", "most"), [("flash", 0.02), ("efficient", 1e-5)])
def test_rows_end_to_end_attend_as_rows_alone(kernel, most, begin):
    """Forward and backward on the device against plain attention by torch's own derivatives, float64, on the CPU."""
    assert begin("kernels")()["value"][kernel] < most


def heads(count: int = 4, length: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, length, 8, generator=generator) for _ in range(count)]


def test_padded_rows_attend_as_torchs_own():
    q, k, v, gradient = heads()
    bias = torch.zeros(3, 1, 6, 6).masked_fill(torch.tensor([3, 6, 4])[:, None, None, None] <= torch.arange(6), -1e9)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = functional.scaled_dot_product_attention(*inputs, attn_mask=bias, scale=0.3)
    expected.backward(gradient)
    name = "_scaled_dot_product_efficient_attention"
    forward, backward = (attention.KERNELS[name + way][1] for way in ("", "_backward"))
    with torch.no_grad():
        context, sums, seed, offset = forward(q, k, v, bias, True, scale=0.3)
        wanted = (True, True, True, False)
        found = backward(gradient, q, k, v, bias, context, sums, seed, offset, 0.0, wanted, scale=0.3)
    for one, other in zip((context, *found), (expected, *(x.grad for x in inputs)), strict=False):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_dropout_is_the_same_forward_and_backward():
    """The gradient is that of the same forward pass, drawn again; half of the weights are dropped."""
    q, k, v, gradient = heads()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    draw = lambda: torch.Generator().manual_seed(7)  # noqa: E731
    attention.forward(*inputs, None, 0.5, draw(), None, False).backward(gradient)
    found = attention.backward(gradient, q, k, v, None, 0.5, draw(), None, False)
    for one, x in zip(found, inputs, strict=False):
        torch.testing.assert_close(one, x.grad, rtol=0, atol=1e-5)
    zeros, ones = torch.zeros(1, 400, 8), torch.ones(1, 400, 8)
    kept = attention.forward(zeros, zeros, ones, None, 0.5, draw(), None, False)
    assert 0 < kept.std() < 0.1
    assert abs(kept.mean() - 1) < 0.02


def test_what_a_kernel_leaves_out_is_nan_and_what_it_does_not_take_is_refused():
    flash = attention.KERNELS["_flash_attention_forward"][1]
    q, ends = torch.ones(9, 2, 8, dtype=torch.bfloat16), torch.tensor([0, 3, 7], dtype=torch.int32)
    context = flash(q, q, q, ends, ends, 4, 4, 0.0, False, False)[0]
    assert context[:7].isfinite().all()
    assert context[7:].isnan().all()
    for states, offsets, longest in ((q.float(), ends, 4), (q, ends.long(), 4), (q, ends, 3), (q[..., :4], ends, 4)):
        with pytest.raises(AssertionError):
            flash(states, states, states, offsets, offsets, longest, longest, 0.0, False, False)
