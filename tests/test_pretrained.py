"""Hub names, without a hub: a stand-in for huggingface_hub's snapshot_download copies from a local folder."""

import fnmatch
import json
from pathlib import Path

import huggingface_hub
import pytest

from dse.data.tokenizers import load_tokenizer, tokenizer_from_files, tokenizer_key, tokenizer_to_files
from dse.networks.pretrained import find_bert, last_part
from dse.system.errors import InputError


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
