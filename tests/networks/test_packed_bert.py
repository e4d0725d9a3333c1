"""Packed encoding against the padded one, which transformers computes: values, gradients, dropout."""

from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from helpers import LENGTHS, ragged_rows, random_bert, random_student, separate_rows
from transformers import BertConfig, BertForSequenceClassification

from dse.data.features import JointFeatures
from dse.networks import encoder, inference, packed_bert
from dse.networks.batches import Batches, pack
from dse.networks.config import PADDINGS
from dse.networks.inference import embed_texts
from dse.networks.packed_bert import keep_factors
from dse.networks.poolers import POOLERS
from dse.networks.teacher import Teacher


def teacher_of(**changes) -> Teacher:
    torch.manual_seed(2)
    return Teacher(BertForSequenceClassification(BertConfig(**random_bert(**changes))))


def joint(lengths: list[int] = LENGTHS) -> JointFeatures:
    firsts = np.array([length // 2 for length in lengths], dtype=np.int32)
    return JointFeatures(ragged_rows(lengths), firsts, np.zeros(len(lengths), np.int64), pad_id=0)


def assert_same(features, model: torch.nn.Module) -> None:
    """The same outputs and gradients for every padding, of a scalar in which each output counts differently.

    In double precision, where nothing hides behind rounding.
    """
    model.double()
    rows = np.array([5, 1, 1, 8, 0, 10, 3, 2, 9])
    results = {}
    for padding in ("batch", "max", "packed", "few shapes"):
        model.zero_grad()
        if padding == "few shapes":
            outputs = model(packed=Batches(features, "packed", 16).of_few_shapes(rows))
        else:
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
    model = random_student(pooler)
    assert_same(separate_rows(), model)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 1}, {"hidden_act": "relu"}], ids=str)
def test_teacher(changes):
    model = teacher_of(num_labels=3, **changes).eval()
    assert_same(joint(), model)


@pytest.mark.parametrize("padding", PADDINGS)
def test_teacher_against_transformers_own_logits(padding):
    torch.manual_seed(2)
    own = BertForSequenceClassification(BertConfig(**random_bert(num_labels=3))).eval().double()
    padded = own(**Batches(joint(), "batch").of_pairs(np.arange(11))).logits
    logits = Teacher(own)(**Batches(joint(), padding, 16).of_pairs(np.arange(11)))
    assert padded.abs().max() > 0.1
    torch.testing.assert_close(logits, padded, rtol=1e-9, atol=1e-9)


def test_rows_of_one_length_need_no_padding():
    model = random_student()
    features = separate_rows([6] * 11)
    assert all(group.full for group in pack(features.texts, np.arange(11)).groups)
    assert_same(features, model)


def test_idle_tokens_reach_nothing():
    """The pairs of assert_same have 16 x 12 + 2 x 3 = 198 tokens, which become 200; the joint ones 99, and 100."""
    lengths, rows = [12] * 10 + [3], np.array([5, 1, 1, 8, 0, 10, 3, 2, 9])
    for features, tokens in ((separate_rows(lengths), 200), (joint(lengths), 100)):
        assert len(Batches(features, "packed").of_pairs(rows)["packed"].ids) == tokens
    for pooler in ("concat_top_mean", "cls"):
        student = random_student(pooler)
        assert_same(separate_rows(lengths), student)
    teacher = teacher_of()
    assert_same(joint(lengths), teacher)


def test_frozen_encoder_and_gradient_checkpointing():
    model = random_student()
    model.encoder.activation_checkpointing_enable()
    model.train()
    assert_same(separate_rows(), model)
    model.encoder.requires_grad_(False)
    assert_same(separate_rows(), model)


def test_checkpointing_repeats_the_dropout():
    gradients = []
    for enable in (False, True):
        model = random_student(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).train()
        if enable:
            model.encoder.activation_checkpointing_enable()
        torch.manual_seed(3)
        model(**Batches(separate_rows(), "packed").of_pairs(np.arange(11))).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


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
    model = random_student(pooler, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.25).train()
    model.encoder.set_attn_implementation("eager")  # sdpa has its own dropout

    def multiply(inputs, p=0.5, training=True, inplace=False):
        return inputs * (1 + p) if training else inputs

    monkeypatch.setattr(torch.nn.functional, "dropout", multiply)
    monkeypatch.setattr(
        packed_bert,
        "keep_factors",
        lambda shapes, rate, device, dtype: [torch.full(shape, 1 + rate) for shape in shapes],
    )
    assert_same(separate_rows(), model)


def test_a_rate_that_was_set_is_the_rate_everywhere():
    """Without dropout training gives evaluation's numbers, packed and padded; with it, neither does."""
    model = random_student(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    for padding in ("packed", "batch"):
        inputs = Batches(separate_rows(), padding).of_pairs(np.arange(11))
        for rate, same in ((0.0, True), (0.5, False)):
            model.set_dropout(rate)
            outputs = model.train().embed(**inputs)
            # by rounding: without gradients transformers takes another kernel
            assert torch.allclose(outputs, model.eval().embed(**inputs), atol=1e-5) == same


def test_dropout_follows_the_mode():
    model = random_student(hidden_dropout_prob=0.5).train()
    inputs = Batches(separate_rows(), "packed").of_pairs(np.arange(11))
    assert not torch.equal(model.embed(**inputs), model.embed(**inputs))
    model.eval()
    assert torch.equal(model.embed(**inputs), model.embed(**inputs))


def test_bf16_follows_float32():
    for model, features in ((random_student(), separate_rows()), (teacher_of(), joint())):
        inputs = Batches(features, "packed").of_pairs(np.arange(11))
        exact = model(**inputs)
        encode = model if isinstance(model, Teacher) else model.embed  # without a head
        with torch.autocast("cpu", dtype=torch.bfloat16):
            of_autocast = encode(**inputs)
        model.precision = "bf16"
        assert torch.equal(encode(**inputs), of_autocast)
        rough = model(**inputs)
        rough.sum().backward()
        assert 0 < (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("pooler", "count"), [("mean_top_mean", 12), ("cls", 11)])
def test_many_texts_in_bf16_take_weights_laid_out_once(monkeypatch, pooler, count):
    """Four products of each of 3 layers, but for the last layer's queries, which `cls` takes for one token alone."""
    model, laid_out, real = random_student(pooler).eval(), [], packed_bert.laid_out
    model.precision = "bf16"
    monkeypatch.setattr(packed_bert, "laid_out", lambda weight: laid_out.append(weight) or real(weight))
    batches = Batches(separate_rows(), "packed")
    embed = partial(embed_texts, model, batches, 10**6, torch.device("cpu"), "encode")
    expected = embed()
    monkeypatch.setattr(encoder, "_MANY", 1)
    inputs = batches.of_pairs(np.arange(3))
    model.train().embed(**inputs)
    with torch.no_grad():
        model.eval().embed(**inputs)  # its weights may change before the next call
    model.dse_model.bert.kept = {}  # another thread encodes meanwhile
    model.embed(**inputs).sum().backward()
    model.dse_model.bert.kept = None
    assert laid_out == []
    monkeypatch.setitem(inference.TOKENS_PER_STEP, "cpu", 16)
    np.testing.assert_allclose(embed(), expected, rtol=0.02, atol=0.02)
    assert len(laid_out) == count


def test_converted_weights_are_the_modules_own_and_their_gradients_come_back():
    """In float64, which rounds nothing; the first layer's queries, keys and values are together."""
    bert = random_student().encoder
    weights = packed_bert.converted_weights(bert, torch.float64)
    own = bert.encoder.layer[0].attention.self
    together = [own.query, own.key, own.value]
    assert torch.equal(weights[own.query][0], torch.cat([module.weight for module in together]).double())
    assert torch.equal(weights[own.query][1], torch.cat([module.bias for module in together]).double())
    factors = {module: torch.randn_like(weight) for module, (weight, _) in weights.items()}
    sum((weight * factors[module]).sum() for module, (weight, _) in weights.items()).backward()
    for module, expected in zip(together, factors[own.query].chunk(3), strict=True):
        assert torch.equal(module.weight.grad, expected.float())
        assert module.weight.grad.dtype == torch.float32
    norm = bert.encoder.layer[1].output.LayerNorm
    assert torch.equal(norm.weight.grad, factors[norm].float())
    assert all(module.bias.grad.abs().max() == 0 for module in together)
    linear_and_norms = [module for module in bert.encoder.modules() if hasattr(module, "weight")]
    assert len(weights) == len(linear_and_norms) - 2 * len(bert.encoder.layer)


@pytest.mark.parametrize("last_alone", [False, True])
def test_no_two_dropouts_share_their_factors(last_alone):
    """One of the embeddings, then in each of 3 layers one of each group's weights, of the context, of the output."""
    bert = random_student(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).train().encoder
    batch = pack(ragged_rows(LENGTHS), np.arange(11))
    embeddings, keeps = packed_bert._draw(bert, batch, torch.zeros(len(batch.ids), 16), last_alone)
    factors = [embeddings, *(each for keep in keeps for each in (*keep.weights, keep.context, keep.output))]
    assert len(factors) == 1 + 3 * (2 + 2)
    assert not any(torch.equal(one, other) for one, other in combinations(factors, 2))


def test_checkpointing_computes_each_layer_again_in_training(monkeypatch):
    model, calls = random_student(), []
    bert, compute = model.encoder, packed_bert._attend
    monkeypatch.setattr(packed_bert, "_attend", lambda *inputs: calls.append(1) or compute(*inputs))
    batches, counts = Batches(separate_rows(), "packed"), []
    for enable, train in ((False, True), (True, True), (True, False)):
        if enable:
            bert.activation_checkpointing_enable()
        calls.clear()
        model.train(train)(**batches.of_pairs(np.arange(11))).sum().backward()
        counts.append(len(calls))
    assert counts == [3, 6, 3]
