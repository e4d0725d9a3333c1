"""What tests/test_cuda.py runs in processes of their own, since emulation changes torch for good."""

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import count
import emulation
import torch

import dse_train_runner
import finetune_bert
import load_dse_checkpoint_example
import run_distillation_logits_creator
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier
from dse.networks.student import SiameseNetwork
from dse.storage.checkpoint import Checkpoint
from dse.system import parallel
from dse.training import kinds
from dse.training.optimization import BertAdam

TEXTS = ["the doctor sold a car .", "a physician traded a vehicle in the town soon .", "soon", "the thief hid a lamp"]
PAIRS = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3]), (TEXTS[1], TEXTS[1])]
CANDIDATES = [f"{text} {other}" for text in TEXTS for other in TEXTS]
MOST_READS, MOST_COPIES = 3, 10  # of an update


def run(name: str, guard: str, out: str, *arguments: Any) -> None:
    """Run a function of this module, on emulated CUDA if there is a guard; write what it gives and all counts."""
    torch.set_num_threads(1)
    if guard:
        emulation.install(Path(guard))
    value = globals()[name](*arguments)
    Path(out).write_text(json.dumps({"value": value, **emulation.found()}))


def stages(folder: Path, data: Path, bert: Path, padding: str, flags: list[str]) -> dict[str, Any]:
    """Stages 2 to 5 on the device that there is, the student's training continued after 2 of 3 epochs."""
    common = ["--task_name", "mrpc", "--do_lower_case", "--max_seq_length", 48, "--data_dir", data]
    trains = ["--bert_model", bert, "--padding", padding, *flags]

    def start(script: Any, *argv: Any) -> None:
        script.main([str(flag) for flag in (*common, *argv)])

    start(
        finetune_bert, *trains, "--output_dir", folder / "teacher", "--do_train", "--do_eval", "--train_batch_size", 16,
        "--gradient_accumulation_steps", 2, "--learning_rate", 6e-4, "--num_train_epochs", 2, "--save_every", 3,
    )  # fmt: skip
    start(
        run_distillation_logits_creator, "--bert_checkpoint_dir", folder / "teacher", "--output_dir", folder,
        "--train_features_path", folder / "features", "--padding", padding,
    )  # fmt: skip
    logits, runs = folder / "teacher_logits.pt", folder / "checkpoints"
    student = [*trains, "--distillation_logits_path", logits, "--lr", 1e-3, "--fc_dims", 16, 1, "--save_every", 2,
               "--pooler_num_top_hidden_layers", 2, "--store_checkpoints", "--checkpoint_dir", runs]  # fmt: skip
    start(dse_train_runner, *student, "--epochs", 2)
    start(dse_train_runner, *student, "--epochs", 3, "--trainer_checkpoint", newest(runs))
    checkpoint = Checkpoint.read(newest(runs))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        start_example = ["--task_name", "mrpc", "--trainer_checkpoint", str(newest(runs))]
        load_dse_checkpoint_example.main(start_example)
    training = json.loads((folder / "teacher" / "training.json").read_text())
    losses = [record["train"]["loss"] for record in (*training["history"], *checkpoint.trainer["history"])]
    return {
        "losses": losses, "teacher": measured(training["history"]), "student": measured(checkpoint.trainer["history"]),
        "logits": torch.load(logits, weights_only=True).tolist(), "weights": flat(checkpoint.model),
        "example": printed.getvalue(), "rng states set": len(emulation.rng_states),
    }  # fmt: skip


def newest(folder: Path) -> Path:
    """The last checkpoint that was written."""
    return max(folder.glob("*/*.pt"), key=lambda path: path.stat().st_mtime_ns)


def measured(history: list[dict[str, Any]]) -> list[float]:
    """All metrics of training and validation, by epoch."""
    metrics = [record[part] for record in history for part in ("train", "validation")]
    return [value for some in metrics for _, value in sorted(some.items())]


def flat(state: dict[str, torch.Tensor]) -> list[float]:
    """All weights, by name."""
    return torch.cat([tensor.flatten() for _, tensor in sorted(state.items())]).tolist()


def use(student: Path, folder: Path) -> dict[str, Any]:
    """What a student's folder is used for, on the device that there is."""
    model = DSESiameseClassifier.from_pretrained(student)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tensor = model.encode(TEXTS, convert_to="tensor", normalize=True)
    half = model.encode(TEXTS, half=True)
    found: dict[str, Any] = {
        "device": str(tensor.device), "encode": model.encode(TEXTS).tolist(), "normalized": tensor.tolist(),
        "half": half.astype("f4").tolist(), "half dtype": str(half.dtype), "score": model.score(PAIRS).tolist(),
        "labels": model.predict(PAIRS), "probabilities": model.predict(PAIRS, probabilities="all").tolist(),
    }  # fmt: skip
    for dtype in ("float32", "float16"):
        index = CandidateIndex.build(model, CANDIDATES, folder / dtype, dtype=dtype)
        index.append(TEXTS)
        index = CandidateIndex.open(folder / dtype, model)
        hits = [index.search(TEXTS[0], 3), *index.search(TEXTS[1:], 30), index.search(TEXTS[0], 3, shortlist=4)]
        with patch.multiple("dse.index", _FIRST=1, _LONGEST=20):  # lists of 10 and 20, and then all
            hits += index.search(TEXTS, 3, shortlist="auto")
        in_two = {"_LEFT": 24, "_WORTH_TWO": {"cpu": 0, "cuda": 0}, "has_bfloat16": lambda device: True}
        with patch.multiple("dse.index", **in_two, _best_in_one_pass=None):  # which must not be needed
            hits += index.search(TEXTS, 3)
        found[f"rows {dtype}"] = [[hit.row for hit in some] for some in hits]
        found[f"hits {dtype}"] = [hit.score for some in hits for hit in some]
        found[f"scores {dtype}"] = index.score(TEXTS).tolist()
    return found


def updates(role: str, data: Path, bert: Path, folder: Path) -> dict[str, Any]:
    """The counts of a role's updates by precision and padding."""
    cases = [case for case in count.CASES if case[0] == role]
    return {" ".join(case): count.updates_of(*case, data, bert, folder / "-".join(case)) for case in cases}


def over_budget(updates: list[dict[str, Any]]) -> list[str]:
    """Where an update reads from the device, or copies to it, more often than it may."""
    lines = []
    for update in updates:
        for kind, most in (("read", MOST_READS), ("h2d", MOST_COPIES)):
            if (times := update["counts"].get(kind, 0)) > most:
                places = [f"{times} at {place}" for what, place, times in update["where"] if what == kind]
                lines.append(f"{times} of {kind}, at most {most}: {'; '.join(places)}")
    return lines


def planted(fault: str, data: Path, bert: Path, folder: Path) -> list[str]:
    """How a fault shows: the error, or the budgets that it breaks in a training of the student."""
    step, to, distance = BertAdam.step, SiameseNetwork.to, kinds.distillation_loss

    def per_parameter(work: Any) -> Any:
        def faulty_step(self: BertAdam, *args: Any, **kwargs: Any) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    work(parameter)
            step(self, *args, **kwargs)

        return faulty_step

    def head_left(self: SiameseNetwork, device: torch.device) -> SiameseNetwork:
        to(self, device)
        self.siamese_head.cpu()
        return self

    if fault == "item":
        BertAdam.step = per_parameter(lambda parameter: parameter.grad.norm().item())
    elif fault == "copy":
        BertAdam.step = per_parameter(lambda parameter: torch.tensor(1.0, device=parameter.device))
    elif fault == "targets":
        kinds.distillation_loss = lambda outputs, targets: distance(outputs, targets.cpu())
    elif fault == "head":
        SiameseNetwork.to = head_left
    try:
        return over_budget(count.updates_of("student", "fp32", "packed", data, bert, folder))
    except RuntimeError as error:
        return [str(error)]


def together(folder: Path, data: Path, bert: Path) -> dict[str, Any]:
    """Stages 2 to 4 by as many processes as there are, nccl being gloo."""
    os.environ["LOCAL_RANK"] = "0"  # the first, and only, device of its machine
    distributed = torch.distributed
    init, backends = distributed.init_process_group, []

    def faked(backend: str, *, device_id: Any = None, **options: Any) -> None:
        backends.append(backend)
        init("gloo", **options)

    distributed.init_process_group = faked
    found = stages(folder, data, bert, "batch", [])
    return {**found, "backends": backends, "processes": parallel.size()}


def kernels() -> dict[str, float]:
    """How far variable-length attention on the device is from plain attention on the CPU, forward and backward."""
    torch.manual_seed(0)
    offsets, width, heads = torch.tensor([0, 5, 6, 14]), 8, 2
    parts = [torch.randn(14, heads, width, dtype=torch.float64) for _ in range(4)]
    q, k, v, gradient = (part.bfloat16().double() for part in parts)
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    rows = [
        torch.nn.functional.softmax(a.transpose(0, 1) @ b.permute(1, 2, 0) * 0.3, dim=-1) @ c.transpose(0, 1)
        for a, b, c in zip(*(x.split(offsets.diff().tolist()) for x in plain), strict=True)
    ]
    expected = torch.cat([row.transpose(0, 1) for row in rows])
    expected.backward(gradient)
    cut = offsets.int().to(emulation.CUDA)
    distances = {}
    for name, dtype in (("flash", torch.bfloat16), ("efficient", torch.float32)):
        inputs = [x.to(dtype).to(emulation.CUDA).requires_grad_() for x in (q, k, v)]
        aten, how = torch.ops.aten, {"scale": 0.3}
        if name == "flash":
            context = aten._flash_attention_forward(*inputs, cut, cut, 8, 8, 0.0, False, False, **how)[0]
        else:
            rows_of_one = [x[None] for x in inputs]
            context = aten._efficient_attention_forward(*rows_of_one, None, cut, cut, 8, 8, 0.0, 0, True, **how)[0][0]
        context.backward(gradient.to(dtype).to(emulation.CUDA))
        both = zip([context, *(x.grad for x in inputs)], [expected, *(x.grad for x in plain)], strict=True)
        distances[name] = max(float((a.detach().cpu().double() - b).abs().max()) for a, b in both)
    return distances
