"""Poolers, head, encoder: values by hand, and what each option leaves alone."""

import pytest
import torch

from dse.data.tasks import get_task
from dse.networks.config import HEAD_TYPES, DSEConfig
from dse.networks.heads import HEADS, SiameseHead
from dse.networks.poolers import POOLERS
from dse.networks.pretrained import bert_config, find_bert
from dse.networks.student import empty_network, new_network
from dse.networks.teacher import load_teacher
from dse.system.errors import InputError

# One sentence of [CLS], two tokens, [SEP] and padding, one hidden unit; two layers.
LOW = torch.tensor([[[8.0], [1.0], [-3.0], [2.0], [99.0]]])
HIGH = torch.tensor([[[4.0], [3.0], [5.0], [-2.0], [99.0]]])
MASK = torch.tensor([[1, 1, 1, 1, 0]])
ROOT3 = 3**0.5

BY_HAND = {
    "concat_top_mean": [0.0, 2.0],  # (1 - 3 + 2) / 3, (3 + 5 - 2) / 3
    "concat_top_sqrt_mean": [0.0, 6 / ROOT3],
    "concat_top_max": [2.0, 5.0],
    "mean_top_mean": [1.0],
    "mean_top_sqrt_mean": [3 / ROOT3],  # of the layers' mean: 2, 1, 0
    "mean_top_max": [2.0],
    "concat_top_mean_with_cls": [2.0, 2.5],
    "concat_top_sqrt_mean_with_cls": [4.0, 5.0],
    "concat_top_max_with_cls": [8.0, 5.0],
    "mean_top_mean_with_cls": [2.25],
    "mean_top_sqrt_mean_with_cls": [4.5],
    "mean_top_max_with_cls": [6.0],
}


def test_by_hand_covers_every_pooler():
    assert {*BY_HAND, "cls"} == set(POOLERS)


@pytest.mark.parametrize("name", BY_HAND)
def test_poolers(name):
    assert POOLERS[name].pool([LOW, HIGH], MASK).tolist() == [pytest.approx(BY_HAND[name])]


def head(config: DSEConfig, *weights: list) -> SiameseHead:
    head = HEADS[config.siamese_head_type](config)
    with torch.no_grad():
        for layer, weight in zip(head.fc_layers, weights, strict=True):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.fill_(0.5)
    return head


def test_each_head_that_flags_name_has_a_class():
    assert set(HEADS) == set(HEAD_TYPES)


def test_concat_head_by_hand():
    """u = 2, v = 3: blocks 2, 3, 6, 1; first layer 2+3+6+1 + .5 and -12.5 + 1, ReLU, then 12.5 * 2 + .5."""
    config = DSEConfig(bert={"hidden_size": 1}, pooler_num_top_hidden_layers=1, fc_dims=(2, 1))
    layers = head(config, [[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]], [[2.0, 7.0]])
    assert layers(torch.tensor([[2.0]]), torch.tensor([[3.0]])).tolist() == [[25.5]]
    assert layers(torch.tensor([[2.0]]), torch.tensor([[-3.0]])).tolist() == [[7 * 2.5 + 0.5]]  # 2, -3, -6, 5


def test_dot_head_by_hand():
    config = DSEConfig(bert={"hidden_size": 2}, pooler_num_top_hidden_layers=1, siamese_head_type="dot", fc_dims=(1,))
    assert head(config, [[2.0]])(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])).tolist() == [[22.5]]


def config_of(bert, **changes) -> DSEConfig:
    values = {"pooler_num_top_hidden_layers": 2, "fc_dims": (8, 1), **changes}
    return DSEConfig(bert=bert_config(bert, "--bert_model"), **values)


def test_state_dict_names(bert):
    names = set(new_network(bert, config_of(bert, additional_embedding_layer_size=5)).state_dict())
    assert "dse_model.bert.bert.embeddings.word_embeddings.weight" in names
    assert "dse_model.bert.bert.encoder.layer.1.attention.self.query.weight" in names
    assert {name for name in names if ".bert.bert." not in name} == {
        *(f"dse_model.bert.classifier.{part}" for part in ("weight", "bias")),
        *(f"siamese_head.fc_layers.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")),
    }
    assert not any("pooler" in name for name in names)
    pooled = set(new_network(bert, config_of(bert, pooler_type="cls")).state_dict())
    assert "dse_model.bert.bert.pooler.dense.weight" in pooled


def batch(model) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, model.config.bert["vocab_size"], (6, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_freezing_leaves_head_and_additional_layer(bert):
    for pooler in ("concat_top_mean", "cls"):
        model = new_network(
            bert, config_of(bert, pooler_type=pooler, freeze_bert=True, additional_embedding_layer_size=5)
        )
        model(**batch(model)).sum().backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert trained == {name for name in model.state_dict() if ".bert.bert." not in name}
        assert model.train().encoder.embeddings.dropout.training  # dropout stays on


def test_gradient_checkpointing_changes_no_gradient(bert):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = new_network(bert, config_of(bert)).train()
        if checkpointing:
            model.encoder.activation_checkpointing_enable()
        torch.manual_seed(0)
        model(**batch(model)).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


def test_padding_changes_no_embedding(bert):
    model = new_network(bert, config_of(bert)).eval()
    inputs = batch(model)
    alone = model.embed(inputs["input_ids"][2:3, :5], inputs["attention_mask"][2:3, :5])
    together = model.embed(**inputs)[2:3]
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_a_student_is_rebuilt_from_its_configuration(bert):
    model = new_network(bert, config_of(bert)).eval()
    copy = empty_network(model.config)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.eval()(**batch(model)), model(**batch(model)))


def test_the_teachers_classifier_starts_from_the_configs_range(bert):
    torch.manual_seed(0)
    teacher = load_teacher(bert, get_task("mnli"), fine_tuned=False)
    weight = teacher.classifier.weight
    assert weight.shape == (3, 32)
    assert weight.std().item() == pytest.approx(teacher.bert.config.initializer_range, rel=0.2)  # 0.1
    assert not teacher.classifier.bias.any()
    assert teacher.bert.config.id2label == {0: "contradiction", 1: "entailment", 2: "neutral"}


def test_weights_load_as_float32_whatever_they_were_saved_as(bert, tmp_path):
    new_network(bert, config_of(bert)).encoder.half().save_pretrained(tmp_path)
    model = new_network(tmp_path, config_of(bert))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_bert_without_some_weights_is_refused(bert, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(bert / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    find_bert(str(tmp_path), "--bert_model")  # the folder looks whole
    words = r"not a whole BERT: 1 weights missing.*encoder\.layer\.1\.output\.dense\.weight"
    with pytest.raises(InputError, match=words):
        new_network(tmp_path, config_of(bert))
