"""The student's network: names of its weights, freezing, checkpointing, padding."""

import torch
from helpers import config_of

from dse.networks.student import empty_network, new_network


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
