"""Tokenizers: casing, special and added tokens, saving and loading."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CLS, RULES, SEP, WORDS, change_folder, with_tokens
from transformers import AutoTokenizer

from dse.data.features import _word_pieces, cached_features, tokenize_texts
from dse.data.processors import Examples
from dse.data.tasks import get_task
from dse.data.tokenizers import load_tokenizer, tokenizer_from_files, tokenizer_key, tokenizer_to_files
from dse.models import DSESiameseClassifier
from dse.networks.config import DSEConfig
from dse.networks.pretrained import bert_config, find_bert
from dse.networks.student import new_network

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
    return change_folder(copied(bert, "added"), with_tokens("<ent>", "newword", "Foo-Bar"))


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


@pytest.mark.parametrize("lower", [True, False])
def test_a_tokenizer_survives_saving_with_the_same_key(bert, tmp_path, lower):
    tokenizer = load_tokenizer(bert, lower, "--bert_model")
    again = tokenizer_from_files(tokenizer_to_files(tokenizer))
    tokenizer.backend_tokenizer.enable_truncation(5)  # what a call leaves behind is not the tokenizer's content
    assert tokenizer_key(again) == tokenizer_key(tokenizer)
    assert again.backend_tokenizer.normalizer.lowercase is lower
    assert tokenizer_key(load_tokenizer(bert, not lower, "--bert_model")) != tokenizer_key(tokenizer)


def test_an_old_folder_with_vocab_txt_alone(bert, tmp_path):
    """As BERT was published: vocab.txt and a config without model_type; the same ids."""
    vocabulary = load_tokenizer(bert, True, "--bert_model").get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    config = json.loads((bert / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    tokenizer = load_tokenizer(find_bert(str(tmp_path), "--bert_model"), True, "--bert_model")
    assert tokenizer.get_vocab() == vocabulary


def test_casing_reaches_the_normalizer(bert):
    for lower, expected in ((True, "car"), (False, "[UNK]")):
        tokenizer = load_tokenizer(bert, lower, "--bert_model")
        texts, _ = tokenize_texts(["CAR"], tokenizer, 8)
        assert texts.ids.tolist() == [CLS, tokenizer.get_vocab()[expected], SEP]


def test_an_unlike_casing_is_a_warning(bert, caplog):
    with caplog.at_level(logging.WARNING):
        load_tokenizer(bert, True, "--bert_model")
        assert caplog.text == ""
        load_tokenizer(bert, False, "--bert_model")
    assert "was saved as uncased (--do_lower_case), but this run uses it as cased (no --do_lower_case)" in caplog.text


def test_special_tokens_count_only_where_they_stand_alone(tokenizer):
    texts, _ = tokenize_texts(["car [SEP] a", "car[SEP]a", "[MASK]"], tokenizer, 20)
    vocabulary = tokenizer.get_vocab()
    car, a, unknown, mask = (vocabulary[word] for word in ("car", "a", "[UNK]", "[MASK]"))
    rows = [list(row) for row in np.split(texts.ids, texts.offsets[1:-1])]
    assert rows == [[CLS, car, SEP, a, SEP], [CLS, car, *[unknown] * 3, a, SEP], [CLS, mask, SEP]]  # [ sep ]


def test_a_special_token_with_a_space_on_one_side_only_is_plain_text(tokenizer):
    car, a, unknown = (tokenizer.get_vocab()[word] for word in ("car", "a", "[UNK]"))
    texts, _ = tokenize_texts(["car [SEP]a", "car[SEP] a"], tokenizer, 20)
    assert texts.ids.reshape(2, -1).tolist() == [[CLS, car, *[unknown] * 3, a, SEP]] * 2
