"""Packed encoding against the padded one, which transformers computes: values, gradients, dropout, every pooler."""

from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from dse.data.features import JointFeatures, Ragged, SeparateFeatures
from dse.networks import inference, packed_bert
from dse.networks.batches import Batches, pack
from dse.networks.config import PADDINGS, DSEConfig
from dse.networks.inference import by_length, embed_texts, infer, infer_pairs
from dse.networks.packed_bert import keep_factors
from dse.networks.poolers import POOLERS
from dse.networks.student import SiameseNetwork, empty_network
from dse.networks.teacher import Teacher

LENGTHS = [3, 12, 7, 7, 2, 9, 4, 5, 12, 3, 6]  # in two groups, both with padding


def bert_of(**changes) -> dict:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = {"vocab_size": 50, "max_position_embeddings": 16, "initializer_range": 0.3}
    return BertConfig(**{**config, **sizes, **none, **changes}).to_dict()


def student_of(pooler: str = "concat_top_mean", layers: int = 2, **changes) -> SiameseNetwork:
    torch.manual_seed(1)
    flags = {"pooler_type": pooler, "pooler_num_top_hidden_layers": layers, "fc_dims": (5, 1)}
    model = empty_network(DSEConfig(bert=bert_of(**changes), **flags))
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def teacher_of(**changes) -> Teacher:
    torch.manual_seed(2)
    return Teacher(BertForSequenceClassification(BertConfig(**bert_of(**changes))))


def ragged(lengths: list[int]) -> Ragged:
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Ragged(rng.integers(1, 50, offsets[-1]).astype(np.int32), offsets)


def separate(lengths: list[int] = LENGTHS) -> SeparateFeatures:
    texts = np.arange(len(lengths), dtype=np.int32)
    return SeparateFeatures(ragged(lengths), texts, texts[::-1].copy(), np.zeros(len(lengths), np.int64), pad_id=0)


def joint(lengths: list[int] = LENGTHS) -> JointFeatures:
    firsts = np.array([length // 2 for length in lengths], dtype=np.int32)
    return JointFeatures(ragged(lengths), firsts, np.zeros(len(lengths), np.int64), pad_id=0)


def assert_same(features, model: torch.nn.Module) -> None:
    """The same outputs and gradients for every padding, of a scalar in which each output counts differently.

    In double precision, where nothing hides behind rounding.
    """
    model.double()
    rows = np.array([5, 1, 1, 8, 0, 10, 3, 2, 9])
    results = {}
    for padding in ("batch", "max", "packed"):
        model.zero_grad()
        outputs = model(**Batches(features, padding, 16).of_pairs(rows))
        (outputs * torch.arange(outputs.numel()).view_as(outputs)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results[padding] = outputs.detach(), gradients
    outputs, gradients = results.pop("batch")
    assert outputs.abs().max() > 0.1
    for padding, (others, other_gradients) in results.items():
        torch.testing.assert_close(others, outputs, rtol=1e-9, atol=1e-9, msg=padding)
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("pooler", POOLERS)
def test_student_with_every_pooler(pooler):
    model = student_of(pooler)
    assert_same(separate(), model)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 1}, {"hidden_act": "relu"}], ids=str)
def test_teacher(changes):
    model = teacher_of(num_labels=3, **changes).eval()
    assert_same(joint(), model)


@pytest.mark.parametrize("padding", PADDINGS)
def test_teacher_against_transformers_own_logits(padding):
    torch.manual_seed(2)
    own = BertForSequenceClassification(BertConfig(**bert_of(num_labels=3))).eval().double()
    padded = own(**Batches(joint(), "batch").of_pairs(np.arange(11))).logits
    logits = Teacher(own)(**Batches(joint(), padding, 16).of_pairs(np.arange(11)))
    assert padded.abs().max() > 0.1
    torch.testing.assert_close(logits, padded, rtol=1e-9, atol=1e-9)


def test_rows_of_one_length_need_no_padding():
    model = student_of()
    features = separate([6] * 11)
    assert all(group.bias is None for group in pack(features.texts, np.arange(11)).groups)
    assert_same(features, model)


def test_idle_tokens_reach_nothing():
    """The pairs of assert_same have 16 x 12 + 2 x 3 = 198 tokens, which become 200; the joint ones 99, and 100."""
    lengths, rows = [12] * 10 + [3], np.array([5, 1, 1, 8, 0, 10, 3, 2, 9])
    for features, tokens in ((separate(lengths), 200), (joint(lengths), 100)):
        assert len(Batches(features, "packed").of_pairs(rows)["packed"].ids) == tokens
    for pooler in ("concat_top_mean", "cls"):
        student = student_of(pooler)
        assert_same(separate(lengths), student)
    teacher = teacher_of()
    assert_same(joint(lengths), teacher)


def test_frozen_encoder_and_gradient_checkpointing():
    model = student_of()
    model.encoder.activation_checkpointing_enable()
    model.train()
    assert_same(separate(), model)
    model.encoder.requires_grad_(False)
    assert_same(separate(), model)


def test_checkpointing_repeats_the_dropout():
    gradients = []
    for enable in (False, True):
        model = student_of(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).train()
        if enable:
            model.encoder.activation_checkpointing_enable()
        torch.manual_seed(3)
        model(**Batches(separate(), "packed").of_pairs(np.arange(11))).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_batch_by_hand():
    tokens = Ragged(np.array([1, 2, 3, 4, 5, 6], dtype=np.int32), np.array([0, 2, 5, 6]))
    batch = pack(tokens, np.array([0, 1]), first_lengths=np.array([1, 2]))
    assert batch.ids.tolist() == [3, 4, 5, 1, 2]  # the longer row first
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.types.tolist() == [0, 0, 1, 0, 1]
    assert batch.starts.tolist() == [0, 3]
    assert batch.order.tolist() == [1, 0]
    (group,) = batch.groups
    assert group.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert group.back.tolist() == [0, 1, 2, 3, 4]
    assert group.place.tolist()[:5] == [0, 1, 2, 3, 4]


def test_dropout_keeps_the_expectation_and_follows_the_seed():
    shapes = [(400, 500), (3,), (0, 2), (100, 7)]
    for rate in (0.1, 0.25):
        torch.manual_seed(7)
        factors = keep_factors(shapes, rate, torch.device("cpu"), torch.float32)
        assert [tuple(factor.shape) for factor in factors] == shapes
        scale = 65536 / (65536 - round(65536 * rate))
        assert set(factors[0].unique().tolist()) == {0.0, torch.tensor(scale).item()}
        assert (factors[0] == 0).float().mean() == pytest.approx(rate, abs=4 * (rate / 200_000) ** 0.5)
        assert factors[0].mean() == pytest.approx(1, abs=0.005)
        torch.manual_seed(7)
        assert torch.equal(keep_factors(shapes, rate, torch.device("cpu"), torch.float32)[0], factors[0])
        assert not torch.equal(factors[0][:200], factors[0][200:])


@pytest.mark.parametrize("pooler", ["concat_top_mean", "cls"])
def test_dropout_comes_where_the_padded_model_has_it(pooler, monkeypatch):
    """Every dropout of either path multiplies by 1 + its rate instead."""
    model = student_of(pooler, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.25).train()
    model.encoder.set_attn_implementation("eager")  # sdpa has its own dropout

    def multiply(inputs, p=0.5, training=True, inplace=False):
        return inputs * (1 + p) if training else inputs

    monkeypatch.setattr(torch.nn.functional, "dropout", multiply)
    monkeypatch.setattr(
        packed_bert,
        "keep_factors",
        lambda shapes, rate, device, dtype: [torch.full(shape, 1 + rate) for shape in shapes],
    )
    assert_same(separate(), model)


def test_a_rate_that_was_set_is_the_rate_everywhere():
    """Without dropout training gives evaluation's numbers, packed and padded; with it, neither does."""
    model = student_of(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    for padding in ("packed", "batch"):
        inputs = Batches(separate(), padding).of_pairs(np.arange(11))
        for rate, same in ((0.0, True), (0.5, False)):
            model.set_dropout(rate)
            outputs = model.train().embed(**inputs)
            # by rounding: without gradients transformers takes another kernel
            assert torch.allclose(outputs, model.eval().embed(**inputs), atol=1e-5) == same


def test_dropout_follows_the_mode():
    model = student_of(hidden_dropout_prob=0.5).train()
    inputs = Batches(separate(), "packed").of_pairs(np.arange(11))
    assert not torch.equal(model.embed(**inputs), model.embed(**inputs))
    model.eval()
    assert torch.equal(model.embed(**inputs), model.embed(**inputs))


def test_bf16_follows_float32():
    for model, features in ((student_of(), separate()), (teacher_of(), joint())):
        inputs = Batches(features, "packed").of_pairs(np.arange(11))
        exact = model(**inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(**inputs)
        rough.sum().backward()
        assert 0 < (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_each_text_is_embedded_once_and_pairs_keep_their_order():
    model, batches = student_of(), Batches(separate())
    expected = infer(model, batches, 3, torch.device("cpu"), "pairs")
    seen = []
    model.dse_model.bert.register_forward_pre_hook(
        lambda module, args, inputs: seen.extend(inputs["packed"].starts.tolist()), with_kwargs=True
    )
    batches.padding = "packed"
    outputs = infer_pairs(model, batches, 3, torch.device("cpu"), "texts")
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    assert len(seen) == len(LENGTHS)
    embeddings = embed_texts(model, batches, 3, torch.device("cpu"), "texts")
    with torch.inference_mode():
        alone = model.embed(**batches.of_texts(np.array([4])))
    np.testing.assert_allclose(embeddings[4], alone[0], atol=1e-5)


def test_no_step_has_more_than_its_tokens():
    costs = np.random.default_rng(0).integers(2, 60, 500)
    batches = by_length(costs, 100)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    assert all(len(rows) * costs[rows].max() <= 100 for rows in batches)
    assert by_length(np.array([500]), 100)[0].tolist() == [0]


@pytest.mark.parametrize("last_alone", [False, True])
def test_no_two_dropouts_share_their_factors(last_alone):
    """One of the embeddings, then in each of 3 layers one of each group's weights, of the context, of the output."""
    bert = student_of(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train().encoder
    batch = pack(ragged(LENGTHS), np.arange(11))
    embeddings, keeps = packed_bert._draw(bert, batch, torch.zeros(len(batch.ids), 16), last_alone)
    factors = [embeddings, *(each for keep in keeps for each in (*keep.weights, keep.context, keep.output))]
    assert len(factors) == 1 + 3 * (2 + 2)
    assert not any(torch.equal(one, other) for one, other in combinations(factors, 2))


def test_a_batch_moves_to_a_device_whole():
    moved = pack(ragged(LENGTHS), np.arange(11), np.ones(11, np.int64)).to(torch.device("meta"))
    tensors = [x for record in (moved, *moved.groups) for x in vars(record).values() if isinstance(x, torch.Tensor)]
    assert [x.device.type for x in tensors] == ["meta"] * (5 + 2 * 4)


def test_checkpointing_computes_each_layer_again_in_training(monkeypatch):
    model, calls = student_of(), []
    bert, compute = model.encoder, packed_bert._attend
    monkeypatch.setattr(packed_bert, "_attend", lambda *inputs: calls.append(1) or compute(*inputs))
    batches, counts = Batches(separate(), "packed"), []
    for enable, train in ((False, True), (True, True), (True, False)):
        if enable:
            bert.activation_checkpointing_enable()
        calls.clear()
        model.train(train)(**batches.of_pairs(np.arange(11))).sum().backward()
        counts.append(len(calls))
    assert counts == [3, 6, 3]


def test_pairs_are_scored_in_parts_as_at_once(monkeypatch):
    model, batches = student_of(), Batches(separate())
    expected = infer_pairs(model, batches, 3, torch.device("cpu"), "texts")
    monkeypatch.setattr(inference, "_PAIRS_PER_STEP", 4)
    outputs = infer_pairs(model, batches, 3, torch.device("cpu"), "texts")
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    assert np.ptp(expected) > 0.1


def test_the_places_of_a_step():
    """By length 12 12 9 7 7 6 5 4 3 3 2; three pairs of 16 + 16 are 96 places, 8 x 12; three texts of 16 are 4 x 12."""
    model, batches, seen = student_of(), Batches(separate(), "packed", 16), []
    model.dse_model.bert.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(len(inputs["packed"].starts)), with_kwargs=True
    )
    infer_pairs(model, batches, 3, torch.device("cpu"), "texts")
    assert seen == [8, 3]
    seen.clear()
    embed_texts(model, batches, 3, torch.device("cpu"), "texts")
    assert seen == [4, 6, 1]  # 48 places: 4 x 12, then 6 x 7, then the rest


def test_no_step_has_more_places_than_gain_anything():
    """Of 1,000 texts of 16 places a step might hold 600 texts of 12; 4,096 places, whatever the flag, are 341 x 12."""
    model, batches, seen = student_of(), Batches(separate([12] * 600), "packed", 16), []
    model.dse_model.bert.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(len(inputs["packed"].starts)), with_kwargs=True
    )
    embed_texts(model, batches, 1000, torch.device("cpu"), "texts")
    assert seen == [341, 259]
