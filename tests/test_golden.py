"""Equality with numbers computed once by the authors' implementation (tests/golden, see its README)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from dse.data.features import in_batches, joint_features, separate_features
from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.networks.batches import Batches, pad
from dse.networks.config import PADDINGS, DSEConfig
from dse.networks.inference import infer, infer_pairs
from dse.networks.poolers import POOLERS
from dse.networks.pretrained import bert_config
from dse.networks.student import SiameseNetwork, new_network
from dse.networks.teacher import Teacher
from dse.training.epoch_plan import EpochPlan
from dse.training.kinds import KINDS
from dse.training.optimization import make_optimizer
from dse.training.run import Run
from dse.training.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden"


TINY = GOLDEN / "tiny-bert"


CASES = json.loads((GOLDEN / "training_cases.json").read_text())


TASKS = {"binary": get_task("mrpc"), "multiclass": get_task("mnli"), "regression": get_task("sts-b")}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY, True, "--bert_model")


@pytest.fixture(scope="module")
def pairs() -> Examples:
    rows = [line.split("\t") for line in (GOLDEN / "pairs.tsv").read_text(encoding="utf-8").split("\n")[1:-1]]
    first, second, *_ = zip(*rows, strict=True)
    return Examples(list(first), list(second))


def arrays(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / name, allow_pickle=False))


def labelled(pairs: Examples, kind: str) -> Examples:
    return Examples(pairs.first, pairs.second, list(arrays("features.npz")[f"labels_{kind}"]))


def assert_padded(expected: dict[str, np.ndarray], got: dict[str, torch.Tensor]) -> None:
    """Equal where ours has columns, and nothing but padding beyond them."""
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        width = tensor.shape[1]
        np.testing.assert_array_equal(tensor.numpy(), expected[name][:, :width], err_msg=name)
        assert not expected[name][:, width:].any()
    assert got["attention_mask"].sum(dim=1).max() == got["attention_mask"].shape[1], "padded beyond the longest"


@pytest.mark.parametrize("length", [17, 24, 48])
def test_joint_ids_equal_the_originals(length, pairs, tokenizer):
    golden = arrays("features.npz")
    features = joint_features(TASKS["binary"], pairs, tokenizer, length)
    names = ("input_ids", "token_type_ids", "attention_mask")
    inputs = Batches(features).of_pairs(np.arange(len(pairs)))
    assert_padded({name: golden[f"cross_{length}_{name}"] for name in names}, inputs)


@pytest.mark.parametrize("length", [17, 24, 48])
@pytest.mark.parametrize("side", ["first", "second"])
def test_separate_ids_equal_the_originals(length, side, pairs, tokenizer):
    golden = arrays("features.npz")
    features = separate_features(TASKS["binary"], pairs, tokenizer, length)
    ids, mask = pad(features.texts, getattr(features, side), features.pad_id)
    names = ("input_ids", "attention_mask")
    assert_padded(
        {name: golden[f"separate_{length}_{side}_{name}"] for name in names}, {"input_ids": ids, "attention_mask": mask}
    )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", TASKS)
def test_teacher_logits(kind, padding, pairs, tokenizer):
    golden = arrays("teacher.npz")
    weight, bias = (torch.from_numpy(golden[f"{kind}_classifier_{name}"]) for name in ("weight", "bias"))
    teacher = Teacher(BertForSequenceClassification.from_pretrained(TINY, num_labels=len(bias))).eval()
    teacher.classifier.load_state_dict({"weight": weight, "bias": bias})
    batches = Batches(joint_features(TASKS[kind], pairs, tokenizer, 24), padding, 24)
    with torch.inference_mode():
        logits = teacher(**batches.of_pairs(np.arange(len(pairs))))
    np.testing.assert_allclose(logits.numpy(), golden[f"{kind}_logits"], atol=1e-5, rtol=0)


def student(config_flags: dict, seed: int = 0) -> SiameseNetwork:
    torch.manual_seed(seed)
    return new_network(TINY, DSEConfig(bert=bert_config(TINY, "--bert_model"), **config_flags))


def assert_first_embeddings(expected: np.ndarray, model: SiameseNetwork, pairs: Examples, tokenizer) -> None:
    features = separate_features(TASKS["binary"], pairs, tokenizer, 24)
    for padding in PADDINGS:
        with torch.inference_mode():
            embeddings = model.eval().embed(**Batches(features, padding, 24).of_texts(features.first)).numpy()
        np.testing.assert_allclose(embeddings, expected, atol=1e-5, rtol=0, err_msg=padding)


@pytest.mark.parametrize(
    ("pooler", "layers"), [("cls", 1)] + [(name, k) for name in POOLERS if name != "cls" for k in (1, 4)]
)
def test_embeddings(pooler, layers, pairs, tokenizer):
    model = student({"pooler_type": pooler, "pooler_num_top_hidden_layers": layers})
    expected = arrays("embeddings.npz")[f"{pooler}_{layers}"]
    assert_first_embeddings(expected, model, pairs, tokenizer)


def test_embeddings_with_additional_layer(pairs, tokenizer):
    golden = arrays("embeddings.npz")
    model = student({"additional_embedding_layer_size": 8})
    weight, bias = (torch.from_numpy(golden[f"additional8_{name}"]) for name in ("weight", "bias"))
    model.dse_model.bert.classifier.load_state_dict({"weight": weight, "bias": bias})
    assert_first_embeddings(golden["additional8_embedding"], model, pairs, tokenizer)


class InFileOrder(EpochPlan):
    """The project's plan with its batches unshuffled, as the golden trainings had them."""

    def groups(self, epoch):
        batches = in_batches(np.arange(len(self.batches)), self.batch_size)
        return in_batches(batches, self.accumulation_steps)


def golden_trainer(case: dict, batches: Batches, model: SiameseNetwork, losses: list) -> Trainer:
    """A trainer of a golden case; `losses` receives each batch's loss divided by the accumulation."""
    kind = case["kind"]
    logits = torch.from_numpy(arrays("teacher.npz")[f"{kind}_logits"])
    targets = KINDS[kind].targets(logits)

    def loss(outputs, labels, rows):
        value = KINDS[kind].student_loss(outputs, labels, targets[rows], case["distillation_coeff"])
        losses.append(value.item() / case["gradient_accumulation_steps"])
        return value

    return Trainer(
        model,
        InFileOrder(batches, case["batch_size"], case["gradient_accumulation_steps"], seed=0),
        loss=loss,
        measure=lambda outputs, labels: {},
        optimizer=make_optimizer(model, case["lr"], case["t_total"], case["warmup_proportion"]),
    )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", CASES)
def test_training(name, padding, pairs, tokenizer):
    case = CASES[name]
    golden = {
        key.removeprefix(f"{name}__"): value
        for key, value in arrays("training.npz").items()
        if key.startswith(f"{name}__")
    }
    model = student(
        {
            "siamese_head_type": case["siamese_head_type"],
            "fc_dims": tuple(case["fc_dims"]),
            "pooler_type": case["pooler_type"],
            "pooler_num_top_hidden_layers": case["pooler_num_top_hidden_layers"],
        }
    )
    started = {key.removeprefix("init__"): torch.from_numpy(golden[key]) for key in golden if key.startswith("init__")}
    assert model.load_state_dict(started, strict=False).unexpected_keys == []
    assert set(started) == {key for key in model.state_dict() if key.startswith("siamese_head.")}
    features = separate_features(TASKS[case["kind"]], labelled(pairs, case["kind"]), tokenizer, case["max_seq_length"])
    batches = Batches(features, padding, case["max_seq_length"])

    losses: list[float] = []
    trainer = golden_trainer(case, batches, model, losses)
    outputs = infer(model, batches, 7, trainer.device, "before")
    np.testing.assert_allclose(outputs, golden["initial_outputs"], atol=2e-5, rtol=0)

    rates = [trainer.optimizer.next_rate]  # by the number of updates made
    trainer.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: rates.append(optimizer.next_rate))
    run = Run()
    run.resume(trainer)
    run.fit(case["epochs"])
    np.testing.assert_allclose(losses, golden["loss_divided_by_accumulation"], rtol=1e-4)
    after_batch = [rates[(i + 1) // case["gradient_accumulation_steps"]] for i in range(len(losses))]
    np.testing.assert_allclose(after_batch, golden["lr_after_batch"], atol=1e-9, rtol=0)

    outputs = infer_pairs(model, batches, 36, trainer.device, "after")
    np.testing.assert_allclose(outputs, golden["final_outputs"], atol=1e-4, rtol=0)
    finals = [key for key in golden if key.startswith("final__")]
    assert len(finals) == 4
    for key in finals:
        weight = model.state_dict()[key.removeprefix("final__")].numpy()
        np.testing.assert_allclose(weight, golden[key], atol=1e-4, rtol=0, err_msg=key)
