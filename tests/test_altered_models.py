"""Models that were changed in memory: every way to a score takes the change in."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import HEADS, ODD_TEXTS

from dse.data.features import joint_features
from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier
from dse.networks.batches import Batches
from dse.networks.teacher import load_teacher
from dse.system.errors import InputError

# Students that were changed in memory


class Lora(torch.nn.Module):
    """A linear layer with a low-rank addition; as PEFT's, it shows the original's weights as its own."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, (outputs, inputs) = base, base.weight.shape
        self.down, self.up = torch.nn.Linear(inputs, 2, bias=False), torch.nn.Linear(2, outputs, bias=False)
        torch.nn.init.normal_(self.up.weight)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    out_features = property(lambda self: self.base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def layer_of(model) -> torch.nn.Module:
    return model.encoder.encoder.layer[1]


def lora_in_the_encoder(model):
    layer_of(model).attention.self.query = Lora(layer_of(model).attention.self.query)
    layer_of(model).output.dense = Lora(layer_of(model).output.dense)


def lora_in_the_head(model):
    model.siamese_head.fc_layers[0] = Lora(model.siamese_head.fc_layers[0])


def hook_on_a_linear_layer(model):
    layer_of(model).intermediate.dense.register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_on_what_holds_it(model):
    layer_of(model).attention.register_forward_hook(lambda module, inputs, output: (2 * output[0], output[1]))


def hook_before_the_head(model):
    model.siamese_head.fc_layers[-1].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def own_forward(model):
    dense, linear = layer_of(model).output.dense, torch.nn.functional.linear
    dense.forward = lambda x: linear(x, 2 * dense.weight, dense.bias)


def without_bias(model):
    layer_of(model).attention.self.value.bias = None


def steps_in_place_of_a_layer(model):
    output = layer_of(model).attention.output
    output.dense = torch.nn.Sequential(output.dense, torch.nn.ReLU())


IN_MEMORY = {
    # what is changed, and by how much of the largest number the ways of computing may differ
    torch.nn.Module.half: 4e-3,
    torch.nn.Module.bfloat16: 4e-2,
    torch.nn.Module.double: 2e-6,
    lora_in_the_encoder: 1e-5,
    lora_in_the_head: 1e-5,
    hook_on_a_linear_layer: 1e-5,
    hook_on_what_holds_it: 1e-5,
    hook_before_the_head: 1e-5,
    own_forward: 1e-5,
    without_bias: 1e-5,
    steps_in_place_of_a_layer: 1e-5,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("altered", "tolerance"), IN_MEMORY.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_all_ways_to_a_score_agree(altered, tolerance, head, student):
    """Against the modules themselves, called with one text at a time and no padding."""
    model = student(**HEADS[head])
    texts = ["the doctor bought a car", "lamp", "the thief hid a lamp in the forest yesterday", "a car"]
    pairs = [(texts[0], text) for text in texts]
    torch.manual_seed(0)
    for name, weight in model.network.named_parameters():  # biases are all 0
        if name.endswith("bias") and "LayerNorm" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    before = model.score(pairs)
    altered(model.network)
    with torch.inference_mode():
        ids = [model.tokenizer(text, return_tensors="pt") for text in texts]
        embeddings = torch.cat([model.network.embed(one["input_ids"], one["attention_mask"]) for one in ids])
        scores = model.network.siamese_head(embeddings[:1].expand_as(embeddings), embeddings)[:, 0].float().numpy()
    embeddings, index = embeddings.float().numpy(), CandidateIndex.build(model, texts)
    found = {hit.row: hit.score for hit in index.search(texts[0])}
    assert model.encode(texts).dtype == np.float32 and model.encode(texts, half=True).dtype == np.float16
    np.testing.assert_allclose(model.encode(texts), embeddings, rtol=0, atol=tolerance * np.abs(embeddings).max())
    for computed in (model.score(pairs), index.score(texts[0]), [found[row] for row in range(4)]):  # u . v is larger
        np.testing.assert_allclose(computed, scores, rtol=0, atol=4 * tolerance * np.abs(scores).max())
    if altered.__module__ == __name__:
        assert np.abs(scores - before).max() > 1e-3 * np.abs(before).max(), "the change shows"
    rough = 3e-2 * np.abs(embeddings).max()
    np.testing.assert_allclose(model.encode(texts, half=True).astype(np.float32), embeddings, rtol=0, atol=rough)


def test_a_wrapped_head_drops_nothing_out(student):
    model, texts = student(), ["lamp", "a car", "the thief hid a lamp in the forest yesterday"]
    lora_in_the_head(model.network)
    model.network.siamese_head.fc_layers[0].down = torch.nn.Sequential(
        torch.nn.Dropout(0.5), model.network.siamese_head.fc_layers[0].down
    )
    index = CandidateIndex.build(model, texts)
    expected = model.score([("a car", text) for text in texts])
    model.network.train()
    for computed in (index.score("a car"), index.score("a car", rows=[0, 1, 2])):
        np.testing.assert_allclose(computed, expected, rtol=1e-5)
    for hits in (index.search("a car"), model.rank("a car", texts)):
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(expected)[::-1], rtol=1e-5)
    assert all(part.training for part in model.network.modules())


def test_a_teacher_with_a_wrapped_layer(bert):
    teacher = load_teacher(bert, get_task("mrpc"), fine_tuned=False).eval()
    tokenizer = load_tokenizer(bert, True, "x")
    pairs = joint_features(get_task("mrpc"), Examples(ODD_TEXTS, ODD_TEXTS[::-1]), tokenizer, 24)
    padded, packed = (Batches(pairs, padding).of_pairs(np.arange(len(ODD_TEXTS))) for padding in ("batch", "packed"))
    before = teacher(**padded)
    torch.manual_seed(0)
    dense = teacher.bert.encoder.layer[0].attention.output
    dense.dense = Lora(dense.dense)
    expected = teacher(**padded)
    torch.testing.assert_close(teacher(**packed), expected)
    assert (expected - before).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore")  # torch would have another library do it
def test_a_quantized_student_scores_and_is_not_indexed(student):
    model = student()
    network = torch.ao.quantization.quantize_dynamic(model.network, {torch.nn.Linear}, dtype=torch.qint8)
    quantized = replace(model, network=network)
    texts = ["the doctor bought a car", "lamp", "the thief hid a lamp in the forest yesterday"]
    pairs = [(texts[0], text) for text in texts]
    with torch.inference_mode():
        ids = [model.tokenizer(text, return_tensors="pt") for text in texts]
        embeddings = torch.cat([network.embed(one["input_ids"], one["attention_mask"]) for one in ids]).numpy()
    np.testing.assert_allclose(quantized.encode(texts), embeddings, atol=2e-2 * np.abs(embeddings).max())
    np.testing.assert_allclose(quantized.score(pairs), model.score(pairs), atol=2e-2)
    half = quantized.encode(texts, half=True)
    np.testing.assert_allclose(half, embeddings, atol=2e-2 * np.abs(embeddings).max())
    assert half.dtype == np.float16
    with pytest.raises(InputError, match="not a plain tensor; a quantized student cannot be saved or indexed"):
        CandidateIndex.build(quantized, texts)


def test_a_hooked_students_index_is_not_a_plain_ones(student, tmp_path, caplog):
    hooked = student()
    hooked.network.siamese_head.fc_layers[0].register_forward_hook(lambda module, inputs, output: output * 2)
    CandidateIndex.build(hooked, ["a car", "the town"], tmp_path / "index")
    assert "has hooks or wrapped layers: an index cannot check whether they stay the same" in caplog.text
    with pytest.raises(InputError, match="made by another model"):
        CandidateIndex.open(tmp_path / "index", student())
    assert len(CandidateIndex.open(tmp_path / "index", hooked)) == 2


def test_a_folder_is_not_replaced_by_one_that_does_not_load(student, tmp_path):
    """Weight norm stores a layer's weight under two other names."""
    model = student()
    model.save_pretrained(tmp_path / "student")
    torch.nn.utils.parametrizations.weight_norm(model.network.siamese_head.fc_layers[0])
    with pytest.raises(InputError, match="not written, as the student has wrapped layers: merge them first"):
        model.save_pretrained(tmp_path / "student")
    np.testing.assert_array_equal(
        DSESiameseClassifier.from_pretrained(tmp_path / "student").encode("a car"), student().encode("a car")
    )


def test_a_plain_student_stays_packed_after_it_was_padded(student, monkeypatch):
    """transformers leaves hooks behind when it gives hidden states."""
    model = student()
    ids = model.tokenizer("the doctor", return_tensors="pt")
    model.network.embed(ids["input_ids"], ids["attention_mask"])
    monkeypatch.setattr("dse.networks.encoder.padded_inputs", None)
    assert model.encode(["the doctor"]).shape == (1, 64)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_encodes_what_its_parent_does(student):
    """As servers do that load a model and then fork workers; more than one thread was at work before."""
    model, threads = student(), torch.get_num_threads()
    texts = [f"the {who} bought a car" * repeated for who in ("doctor", "thief") for repeated in (1, 4)]
    try:
        torch.set_num_threads(2)
        expected = model.encode(texts)
        child = os.fork()
        if child == 0:
            same = False
            try:
                same = np.allclose(model.encode(texts), expected, atol=1e-6) and torch.get_num_threads() == 1
            finally:
                os._exit(0 if same else 3)
        deadline, state = time.monotonic() + 60, (0, 0)
        while state == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.02)
            state = os.waitpid(child, os.WNOHANG)
        if state == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs in encode")
        assert os.waitstatus_to_exitcode(state[1]) == 0
        assert torch.get_num_threads() == 2, "the parent's stay"
    finally:
        torch.set_num_threads(threads)
