"""Does a GPU compute what the CPU computes, and all that training promises? gpu_measures.py says how fast.

Each section is a function of a report, a device and sizes; one that fails does not keep the others from running.
"""

import contextlib
import gc
import io
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import finetune_bert
from dse.data.features import Ragged, in_batches, separate_features
from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.experiments import gpu_measures
from dse.experiments.gpu_measures import LONGEST, Sizes, student_of, teacher_of, trainer_of
from dse.experiments.gpu_report import Report
from dse.experiments.presets import as_words
from dse.experiments.synthetic import make_pair, random_features, write_pairs, write_tiny_bert
from dse.index import CandidateIndex
from dse.networks.batches import Batches, pack
from dse.networks.config import DSEConfig
from dse.networks.inference import embed_texts, infer, infer_pairs
from dse.networks.packed_bert import attend_padded, keep_factors
from dse.networks.pretrained import bert_config
from dse.networks.student import SiameseNetwork, new_network
from dse.system import parallel
from dse.system.files import load_tensors, save_tensors
from dse.training import trainer as training
from dse.training.epoch_plan import EpochPlan
from dse.training.kinds import KINDS
from dse.training.optimization import make_optimizer
from dse.training.run import Run
from dse.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
_OUT_OF_MEMORY = 256 * 2**20  # bytes that a run gets which is to fail for lack of memory
_NCCL = "import torch; from dse.experiments import gpu_check; gpu_check.one_rank(torch.device({device!r}), {sizes!r})"


def distance(found: Any, expected: Any) -> float:
    """The norm of the difference of two arrays, over that of the expected one."""
    difference = np.asarray(found, dtype=np.float64) - np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def weights_of(model: Any) -> np.ndarray:
    """All weights end to end."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).cpu().numpy()


def outputs_of(model: Any, features: Any, padding: str = "packed") -> np.ndarray:
    """A student's embeddings of all texts, or a teacher's logits of all pairs, where the model is."""
    infer_all: Callable[..., np.ndarray] = embed_texts if isinstance(model, SiameseNetwork) else infer
    return infer_all(model, Batches(features, padding, LONGEST), 32, model.device, "check", show=False)


def agreement(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Embeddings and logits in float32 against the CPU's."""
    for size, bert, pairs in (("small", sizes.small, 64), ("large", sizes.large, sizes.few)):
        separate, joint = random_features(pairs)
        for name, features in (("concat_top_mean", separate), ("cls", separate), ("teacher", joint)):
            model: Any = teacher_of(bert, device) if name == "teacher" else student_of(bert, device, pooler_type=name)
            model.precision = "fp32"
            expected = outputs_of(model.cpu(), features)
            model.to(device)
            for padding in ("packed", "batch"):
                found = outputs_of(model, features, padding)
                report.add(f"{name}, {size} BERT, fp32, {padding}", distance(found, expected), limit=1e-5)


def precision(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Embeddings of the other precisions against the CPU's in float32."""
    separate, _ = random_features(sizes.few)
    model = student_of(sizes.large, device)
    model.precision = "fp32"
    expected = outputs_of(model.cpu(), separate)
    model.to(device)
    for name, limit in (("tf32", 1e-3), ("fp16", 2e-3), ("bf16", 1e-2)):
        model.precision = name
        for padding in ("packed", "batch"):
            found = outputs_of(model, separate, padding)
            report.add(f"embeddings, large BERT, {name}, {padding}", distance(found, expected), limit=limit)


class _InFileOrder(EpochPlan):
    """A plan without shuffling, as the golden trainings had it."""

    def groups(self, epoch: int) -> list[list[np.ndarray]]:
        return in_batches(in_batches(np.arange(len(self.batches)), self.batch_size), self.accumulation_steps)


class _Watched(Trainer):
    """A trainer that keeps its losses."""

    def update(self, passes: Any, losses: Tensor, outputs: Tensor) -> None:
        self.__dict__.setdefault("losses", []).append(losses.detach().cpu().numpy())
        super().update(passes, losses, outputs)


def golden(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Trainings of the authors' implementation, made again: losses, outputs and weights."""
    if not GOLDEN.is_dir():
        report.add("trainings", "not run: there is no tests/golden")
        return
    lines = (GOLDEN / "pairs.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
    first, second, *_ = map(list, zip(*(line.split("\t") for line in lines), strict=True))
    arrays = {name: np.load(GOLDEN / f"{name}.npz") for name in ("features", "teacher", "training")}
    for name, case in json.loads((GOLDEN / "training_cases.json").read_text()).items():
        labels = list(arrays["features"][f"labels_{case['kind']}"])
        logits = arrays["teacher"][f"{case['kind']}_logits"]
        wanted = {
            key.removeprefix(f"{name}__"): x for key, x in arrays["training"].items() if key.startswith(f"{name}__")
        }
        for padding in ("packed", "batch"):
            with report.caught(f"{name}, {padding}"):
                found = _golden_training(case, Examples(first, second, labels), logits, wanted, padding, device)
                report.add(f"{name}, {padding}: losses, relative", found[0], limit=1e-4)
                report.add(f"{name}, {padding}: outputs and weights, absolute", found[1], limit=1e-4)


def _golden_training(
    case: dict[str, Any], pairs: Examples, logits: np.ndarray, wanted: dict[str, np.ndarray], padding: str,
    device: torch.device,
) -> tuple[float, float]:  # fmt: skip
    """How far the losses are from those wanted, relative, and outputs and weights, absolute."""
    bert, kind = GOLDEN / "tiny-bert", KINDS[case["kind"]]
    task = get_task({"binary": "mrpc", "multiclass": "mnli", "regression": "sts-b"}[case["kind"]])
    names = ("siamese_head_type", "pooler_type", "pooler_num_top_hidden_layers")
    chosen = {name: case[name] for name in names} | {"fc_dims": tuple(case["fc_dims"])}
    model = new_network(bert, DSEConfig(bert_config(bert, "golden"), **chosen))
    begun = {key.removeprefix("init__"): torch.from_numpy(x) for key, x in wanted.items() if key.startswith("init__")}
    model.load_state_dict(begun, strict=False)
    model.to(device).precision = "fp32"
    features = separate_features(task, pairs, load_tokenizer(bert, True, "golden"), case["max_seq_length"])
    batches, targets = (
        Batches(features, padding, case["max_seq_length"]),
        kind.targets(torch.from_numpy(logits).to(device)),
    )

    def loss(outputs: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        return kind.student_loss(outputs, labels, targets[rows], case["distillation_coeff"])

    plan = _InFileOrder(batches, case["batch_size"], case["gradient_accumulation_steps"], 0)
    optimizer = make_optimizer(model, case["lr"], case["t_total"], case["warmup_proportion"])
    trainer = _Watched(model, plan, loss, lambda outputs, labels: {}, optimizer)
    run = Run()
    run.resume(trainer)
    run.fit(case["epochs"])
    losses = np.concatenate(vars(trainer)["losses"]) / case["gradient_accumulation_steps"]
    expected = wanted["loss_divided_by_accumulation"]
    apart = [infer_pairs(model, batches, 36, device, "after", show=False) - wanted["final_outputs"]]
    weights = {f"final__{name}": weight.cpu().numpy() for name, weight in model.state_dict().items()}
    apart += [weights[key] - value for key, value in wanted.items() if key.startswith("final__")]
    return float(np.max(np.abs(losses / expected - 1))), max(float(np.abs(x).max()) for x in apart)


def dropout(report: Report, device: torch.device, sizes: Sizes) -> None:
    """The rates at which dropout's factors drop, in standard deviations, and gradients with the factors of the CPU."""
    for rate in (0.1, 0.5):
        (factors,) = keep_factors([(sizes.draws,)], rate, device, torch.float32)
        _rate(report, "factors", factors, rate)
        report.add(f"factors, rate {rate}: mean, off 1 by", abs(float(factors.double().mean()) - 1), limit=0.01)
    # With queries of 0 and the identity as values, output i has j's share, 1/64 / (1 - rate), or 0 where it is dropped.
    width, heads, rate = 64, 4, 0.1
    rows = max(1, sizes.draws // (width * width * heads))
    tokens = Ragged(np.zeros(rows * width, np.int32), np.arange(rows + 1) * width)
    (group,) = pack(tokens, np.arange(rows), grouped=False, few_shapes=True).to(device).groups
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        values = torch.eye(width, device=device, dtype=dtype).repeat(rows, heads)
        values = torch.cat([values, values.new_zeros(len(group.back) - len(values), heads * width)])  # and idle tokens
        projected = torch.cat([torch.zeros_like(values)] * 2 + [values], dim=1).requires_grad_()
        output, other = (attend_padded(projected, group, heads, rate)[: rows * width] for _ in range(2))
        shares = output.detach()
        name = f"attention, {str(dtype).removeprefix('torch.')}"
        _rate(report, name, shares, rate)
        report.add(f"{name}: mean share, off by", abs(float(shares.double().mean()) * width - 1), limit=0.01)
        same = float(((shares == 0) == (other == 0)).double().mean())
        report.add(f"{name}: two calls agree, off independence by", abs(same - 0.82), limit=0.01)
        # The gradient of the values is shares^T g, with the shares of the forward pass.
        g = torch.randn_like(shares)
        output.backward(g)
        apart = [x.double().view(rows, width, heads, width).transpose(1, 2) for x in (shares, g)]
        expected = (apart[0].transpose(2, 3) @ apart[1]).transpose(1, 2).reshape(len(g), -1)
        found: Any = projected.grad
        of_values = found[: rows * width, -heads * width :].double().cpu()
        report.add(f"{name}: gradient with the same mask", distance(of_values, expected.cpu()), limit)


def _rate(report: Report, name: str, drawn: Tensor, rate: float) -> None:
    zeros = float((drawn == 0).double().mean())
    deviation = (rate * (1 - rate) / drawn.numel()) ** 0.5
    report.add(f"{name}, rate {rate}: deviations", abs(zeros - rate) / deviation, limit=4, zeros=zeros)


def _trained(device: torch.device, sizes: Sizes, stop: int = 0, state: Any = None) -> tuple[Any, float]:
    """A small student after an epoch of 6 updates, or after `stop` updates, and how far the training took it."""
    torch.manual_seed(1 if state is None else 2)
    trainer = trainer_of(student_of(sizes.small, device), random_features(192)[0], rate=1e-3)
    if state is not None:
        trainer.model.load_state_dict(state["model"])
        trainer.load_state_dict(state["trainer"])
    before = weights_of(trainer.model)

    def after_update() -> None:
        if trainer.optimizer.updates == stop:
            raise StopIteration

    with contextlib.suppress(StopIteration):
        trainer.train_epoch("check", after_update)
    return trainer, distance(before, weights_of(trainer.model))


def resume(report: Report, device: torch.device, sizes: Sizes) -> None:
    """With dropout: two trainings with one seed, and one that is stopped in the middle and resumed from its file."""
    whole, moved = _trained(device, sizes)
    expected = weights_of(whole.model)
    again = weights_of(_trained(device, sizes)[0].model)
    stopped, _ = _trained(device, sizes, stop=3)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "state.pt")
        save_tensors(path, {"model": stopped.model.state_dict(), "trainer": stopped.state_dict()})
        state = load_tensors(path, "the state is corrupt")
    resumed, _ = _trained(device, sizes, state=state)
    report.add("updates of the resumed one, of 6", resumed.optimizer.updates, held=resumed.optimizer.updates == 6)
    for name, found in (("two trainings with one seed", again), ("stopped and resumed", weights_of(resumed.model))):
        report.add(name, distance(found, expected), limit=1e-6, equal=str((found == expected).all()), trained=moved)


def graphs(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Passes that are captured and replayed against the same passes run, with dropout; and in other shapes, without."""
    separate, joint = random_features(32 * sizes.updates)
    still = {**sizes.small, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for role, make, features in (("student", student_of, separate), ("teacher", teacher_of, joint)):
        for name in ("fp32", "bf16", "fp16"):
            with report.caught(f"{role}, {name}"):
                ran, _, _ = _updated(sizes, make, sizes.small, features, name, device, most=0)
                found, begun, count = _updated(sizes, make, sizes.small, features, name, device)
                more: Any = {"graphs": count, "training_moved": distance(begun, ran)}
                report.add(f"{role}, {name}: replayed against run", distance(found, ran), limit=1e-7, **more)
        with report.caught(f"{role}, shapes"):
            ran, _, _ = _updated(sizes, make, still, features, "fp32", device, graphs=False)
            found, _, count = _updated(sizes, make, still, features, "fp32", device)
            report.add(f"{role}, fp32: against passes of their own shapes", distance(found, ran), limit=1e-6)
            report.add(f"{role}: graphs", count, held=count > 0 or device.type != "cuda")


def _updated(
    sizes: Sizes, make: Any, bert: dict[str, Any], features: Any, precision: str, device: torch.device, most: int = 16,
    graphs: bool = True,
) -> tuple[np.ndarray, np.ndarray, int]:  # fmt: skip
    """Weights after so many updates and before, and how many passes were captured, which is at most `most`."""
    torch.manual_seed(1)
    model = make(bert, device)
    begun = weights_of(model)
    trainer = trainer_of(model, features, precision, graphs=graphs, rate=2e-5)
    with patch.object(training, "_MOST_GRAPHS", most):
        for group in trainer.plan.groups(0)[: sizes.updates]:
            trainer.train_group(group)
    return weights_of(model), begun, _captured(trainer)


def _captured(trainer: Any) -> int:
    return len(getattr(getattr(trainer, "captured", None), "graphs", ()))


def nccl(report: Report, device: torch.device, sizes: Sizes) -> None:
    """A process group of one rank, in a process of its own, with the project's own functions."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    command = [sys.executable, "-c", _NCCL.format(device=str(device), sizes=sizes.small)]
    variables = {**os.environ, **place, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=150)
    if run.returncode:
        raise RuntimeError(f"exit code {run.returncode}: {(run.stderr.strip().splitlines() or ['no output'])[-1]}")
    found = json.loads(run.stdout.splitlines()[-1])
    report.add("all_reduce of 3", found["reduced"], held=found["reduced"] == 3, backend=found["backend"])
    report.add(f"updates of {found['wrapped']} against those without", found["apart"], limit=1e-6)


def one_rank(device: torch.device, bert: dict[str, Any]) -> None:
    """What the process of `nccl` does: prints what it found as JSON."""
    parallel.launched = lambda: True  # of one process it says no, since that needs no group
    still = {**bert, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

    def updated() -> tuple[np.ndarray, Any]:
        torch.manual_seed(1)
        trainer = trainer_of(student_of(still, device), random_features(64)[0], graphs=False, rate=1e-3)
        for group in trainer.plan.groups(0)[:2]:
            trainer.train_group(group)
        return weights_of(trainer.model), trainer.together

    alone, _ = updated()
    with parallel.process_group():
        parallel.join(device)
        together, wrapped = updated()
        three = torch.full((1,), 3.0, device=device)
        torch.distributed.all_reduce(three)
        found = {"reduced": float(three), "backend": torch.distributed.get_backend(), "wrapped": type(wrapped).__name__}
    print(json.dumps({**found, "apart": distance(together, alone)}))


def index(report: Report, device: torch.device, sizes: Sizes) -> None:
    """An index's scores and hits against the CPU's: built there, opened from the CPU's, and streamed."""
    rng = random.Random(0)
    sentences = list(dict.fromkeys(make_pair(rng)[1] for _ in range(sizes.sentences)))
    queries, hits = [make_pair(rng)[2] for _ in range(5)], dict[str, Any]()
    with tempfile.TemporaryDirectory() as place:
        for dtype, head in (("float32", "concat"), ("float16", "concat"), ("float32", "residual")):
            model, folder = gpu_measures.text_student(torch.device("cpu"), 128, head), Path(place, dtype + head)
            stored = CandidateIndex.build(model, sentences, folder, dtype, show_progress=False)
            expected, near = stored.score(queries), 200 if head == "residual" else None  # a shortlist
            hits["expected"] = stored.search(queries, 10, shortlist=near)
            model.to(device)
            built = CandidateIndex.build(model, sentences, None, dtype, show_progress=False)
            # Of embeddings that differ by rounding, some differ by a step of float16.
            for name, limit in (("built", 1e-5 if dtype == "float32" else 1e-3), ("opened", 1e-5), ("streamed", 1e-5)):
                with gpu_measures.holding(0.0 if name == "streamed" else 0.6):
                    one = built if name == "built" else CandidateIndex.open(folder, model)
                    found, hits["found"] = one.score(queries), one.search(queries, 10, shortlist=near)
                report.add(f"{name}, {head}, {dtype}: scores", distance(found, expected), limit=limit)
                of_found, of_expected = (
                    np.take_along_axis(expected, np.array([[hit.row for hit in each] for each in some]), 1)
                    for some in (hits["found"], hits["expected"])
                )
                # Candidates that are closer than the rounding of both may change places.
                wrong = np.count_nonzero(np.abs(of_found - of_expected) > 2 * limit * np.abs(expected).max())
                report.add(f"{name}, {head}, {dtype}: other hits, of {of_found.size}", wrong, limit=0)


@contextlib.contextmanager
def limited_memory(device: torch.device) -> Iterator[None]:
    """torch gets only so much more of the GPU's memory in the block."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + _OUT_OF_MEMORY) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def memory(report: Report, device: torch.device, sizes: Sizes) -> None:
    """A stage that lacks memory ends with one line, and the process can go on."""
    model, features = student_of(sizes.small, device), random_features(64)[0]
    before = outputs_of(model, features)
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()) as told:
        folder = Path(place)
        write_tiny_bert(folder / "bert", seed=0, hidden_size=256)
        for seed, split in enumerate(("train", "dev")):
            write_pairs(folder / f"{split}.tsv", sizes.rows, seed)
        flags = {"task_name": "mrpc", "data_dir": folder, "bert_model": folder / "bert", "output_dir": folder / "out",
                 "max_seq_length": 48, "num_train_epochs": 1, "log_dir": folder / "logs"}  # fmt: skip
        run = partial(_exit_code, [*as_words(flags), "--do_train", "--do_lower_case", "--overwrite_output_dir"])
        with limited_memory(device):
            code = run("--train_batch_size", str(sizes.rows))
        gc.collect()
        lines = [line for line in told.getvalue().splitlines() if "error:" in line or "Traceback" in line]
        again = run("--train_batch_size", "64")
    words = " / ".join(lines)[:400] or "no error"
    report.add("one line tells it", words, held=len(lines) == 1 and "out of memory" in words)
    report.add("exit code 1", code, held=code == 1)
    report.add("exit code of the same stage afterwards", again, limit=0)
    report.add("embeddings before and after", distance(outputs_of(model, features), before), limit=1e-6)


def _exit_code(argv: list[str], *more: str) -> int:
    try:
        finetune_bert.main([*argv, *more])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


SECTIONS = {
    **{section.__name__: section for section in (agreement, precision, golden, dropout, resume, graphs, nccl, index)},
    **{section.__name__: section for section in gpu_measures.MEASURES},
    "memory": memory,  # last, since it may leave a GPU that does nothing more
}
