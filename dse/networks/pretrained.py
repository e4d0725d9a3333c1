"""Where a pre-trained or fine-tuned BERT comes from: a local folder or the hub; its configuration and tokenizer.

The module loads no torch at import, so that a wrong folder, casing or length is refused at once.
"""

import logging
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from dse.data.tokenizers import check_tokenizer_class, load_tokenizer
from dse.networks.config import MOST_DROPOUT, check_fits_bert
from dse.system.errors import InputError, one_line
from dse.system.files import read_json, sha256_file

logger = logging.getLogger(__name__)

TRAINING_FORMAT = "dse teacher 1"
TRAINING = "training.json"  # beside a teacher: how it was trained, and its files' hashes
STATE = "training_state"  # folder in a teacher's: the states of a training that is under way

# What transformers' BERT ignores, or computes otherwise than packed batches do: the value that config.json may have.
_PLAIN = {
    "position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "pruned_heads": {},
    "chunk_size_feed_forward": 0, "return_dict": True, "quantization_config": {}, "auto_map": {},
}  # fmt: skip
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
          "max_position_embeddings", "type_vocab_size")  # fmt: skip
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")

_DESCRIPTION = ["config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                "added_tokens.json", "adapter_config.json"]  # fmt: skip
# Weights that may be left over: heads, and what older versions of transformers stored.
_HEADS = re.compile(r"(bert\.)?(pooler\.|embeddings\.position_ids$)|cls\.|classifier\.|qa_outputs\.")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class OpenedBert(NamedTuple):
    """The folder of a BERT that passed all checks, its configuration and its tokenizer; its weights are not loaded."""

    folder: Path
    config: dict[str, Any]
    tokenizer: Any


def open_bert(
    name: str, flag: str, do_lower_case: bool, max_seq_length: int, top_layers: int = 1, **where: Any
) -> OpenedBert:
    """Find a BERT, as `find_bert` does, and load its tokenizer, before torch is loaded.

    Raises InputError, naming the flag, if `find_bert`, `check_fits_bert` or `load_tokenizer` refuse it.
    """
    folder = find_bert(name, flag, **where)
    config = bert_config(folder, flag)
    check_fits_bert(config, max_seq_length, top_layers)
    return OpenedBert(folder, config, load_tokenizer(folder, do_lower_case, flag))


def find_bert(name: str, flag: str, cache_dir: str = "", hub: bool = True) -> Path:
    """The local folder of a BERT: the one named or, with `hub`, one downloaded from the hub (to cache_dir, if given).

    Raises InputError, naming the flag, for anything but a BERT, and for missing or corrupt files.
    """
    folder = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"{flag}: {name} is a file; expected the folder of a BERT, with config.json and weights")
        if looks_local or not hub:
            raise InputError(f"{flag}: there is no folder {name}; expected one with config.json, weights, vocabulary")
        folder = _download(name, flag, cache_dir)
    bert_config(folder, flag)
    weights = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not weights:
        raise InputError(f"{flag}: {folder} has no weights; expected {_WEIGHTS[0]} or {_WEIGHTS[2]} in it")
    if weights[0].suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            safe_open(weights[0], framework="numpy")  # reads the header and compares the size
        except (SafetensorError, OSError) as error:
            what = "is truncated or not a safetensors file"
            raise InputError(f"{flag}: {weights[0]} {what} ({error}); fetch it again") from error
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{flag}: {folder} has adapters (adapter_config.json): merge them into the weights")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise InputError(f"{flag}: {folder} has no vocabulary; expected tokenizer.json or vocab.txt in it")
    check_hashes(folder, flag)
    return folder


def read_training(folder: Path) -> dict[str, Any] | None:
    """training.json of a teacher that finetune_bert.py made; None if there is none, or it is another program's."""
    if not (folder / TRAINING).is_file():
        return None
    training = read_json(folder / TRAINING, "the teacher's training")
    if training.get("format") != TRAINING_FORMAT:
        return None
    kinds = {"task_name": str, "task": dict, "run": dict, "data": dict, "history": list, "sha256": dict}
    if any(not isinstance(training.get(key), kind) for key, kind in kinds.items()):
        raise InputError(f"{folder / TRAINING} is corrupt: make the teacher again, or remove this file")
    return training


def files_of_teacher(folder: Path) -> set[str]:
    """The files of the teacher that is in a folder, as its training.json lists them."""
    return set((read_training(folder) or {}).get("sha256", ()))


def check_hashes(folder: Path, flag: str) -> None:
    """Raise InputError if a teacher's files do not have the hashes in its training.json."""
    advice = f"make the teacher again, or remove {TRAINING} if you changed the file yourself"
    for name, expected in (read_training(folder) or {}).get("sha256", {}).items():
        path = folder / name
        wrong = "missing" if not path.is_file() else "corrupt or changed" if sha256_file(path) != expected else ""
        if wrong:
            raise InputError(f"{flag}: {path} is {wrong}: its SHA-256 in {TRAINING} is {expected}; {advice}")


def _download(name: str, flag: str, cache_dir: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # The small files first: a wrong name or model is refused before a gigabyte is fetched.
        folder = Path(snapshot_download(name, cache_dir=cache_dir or None, allow_patterns=_DESCRIPTION))
        bert_config(folder, flag)
        check_tokenizer_class(folder, flag)
        for pattern in ("model*.safetensors*", "pytorch_model*.bin*"):
            if not any((folder / weights).exists() for weights in _WEIGHTS):
                snapshot_download(name, cache_dir=cache_dir or None, allow_patterns=pattern)
    except (OSError, ValueError) as error:
        what = f"is not a local folder, and the hub did not provide it ({one_line(error)})"
        raise InputError(f"{flag}: {name} {what}: check the name or the network") from error
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that a BERT folder's weights are loaded from, with the index of shards if there is one.

    Raises InputError for an index that is corrupt, or names shards that are not there.
    """
    first = next(folder / name for name in _WEIGHTS if (folder / name).is_file())
    if first.suffix != ".json":
        return [first]
    shards = read_json(first, "the index of the weights").get("weight_map")
    names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
    lost = [name for name in names if "\0" in name or not (folder / name).is_file()]
    if lost or not names:
        which = ", ".join(lost[:3]) or "that it should name"
        raise InputError(f"{first}: the shards {which} are missing; fetch them again")
    return [first, *(folder / name for name in names)]


def bert_hashes(folder: Path) -> dict[str, str]:
    """SHA-256, by name, of a BERT's weights and config.json, which a training starts from; not of its tokenizer."""
    return {path.name: sha256_file(path) for path in (*weight_files(folder), folder / "config.json")}


def bert_config(folder: Path, flag: str) -> dict[str, Any]:
    """The config.json of a folder.

    Raises InputError if there is none, it is not a plain BERT's, or it has a value that no BERT can have.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag}: {folder} is not a model folder: no config.json in it")
    config = read_json(folder / "config.json", "the model's configuration")
    # Folders of 2019 have no model_type.
    if config.get("model_type", "bert") != "bert" or "hidden_size" not in config:
        kind = config.get("model_type", "model of unknown kind")
        raise InputError(f"{flag}: {folder} holds a {kind}; expected a BERT")

    def check(key: str, right: bool, expected: str) -> None:
        if not right:
            raise InputError(f"{flag}: {folder / 'config.json'}: {key} is {config[key]!r}; expected {expected}")

    for key, value in config.items():
        number = type(value) in (int, float)  # and not bool, which is a kind of int
        if key in _PLAIN:
            plain = f"{_PLAIN[key]!r}, as in a plain BERT: other values are not supported"
            check(key, value in (None, _PLAIN[key]), plain)
        elif key in _SIZES:
            check(key, type(value) is int and value > 0, "a whole number above 0")
        elif key in _DROPOUTS and (key, value) != ("classifier_dropout", None):
            check(key, number and 0 <= value <= MOST_DROPOUT, "a rate from 0 to below 1")
        elif key in ("layer_norm_eps", "initializer_range"):
            check(key, number and 0 < value < math.inf, "a number above 0")
    heads = config.get("num_attention_heads", 12)
    check("hidden_size", config["hidden_size"] % heads == 0, f"a multiple of num_attention_heads, {heads}")
    labels = config.get("id2label") or {}
    check("id2label", isinstance(labels, dict) and all(map(str.isdecimal, labels)), "names of labels by number")
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":  # the list loads torch
        from transformers.activations import ACT2FN

        known = isinstance(activation, str) and activation in ACT2FN
        check("hidden_act", known, f"an activation that transformers knows: {', '.join(ACT2FN)}")
    return config


def last_part(name: str) -> str:
    """The last part of a hub name or path, for file names: `a/bert-base/` gives `bert-base`."""
    return Path(name).name or Path(name).resolve().name


def load_bert(bert_class: Any, folder: Path, **options: Any) -> tuple[Any, set[str]]:
    """A BERT in float32, and the names of weights that its folder lacks. Raises InputError if the encoder lacks any.

    Warns if the tanh pooler is among them, and of weights that have no place in the BERT, except for the heads that
    other trainings leave on one.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # its load report and bars; what matters is said here
    transformers_logging.disable_progress_bar()
    try:
        model, info = bert_class.from_pretrained(
            folder, dtype="float32", output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # a corrupt file raises whatever its reader trips over
        raise InputError(f"{folder}: its weights cannot be loaded ({one_line(error)})") from error
    new = set(info["missing_keys"]) | {entry[0] for entry in info["mismatched_keys"]}
    encoder = sorted(name for name in new if "pooler." not in name and not name.startswith("classifier."))
    if encoder:
        what = f"{len(encoder)} weights are missing or of another shape, e.g. {encoder[0]}"
        raise InputError(f"{folder}: not a complete BERT: {what}")
    if any("pooler." in name for name in new):
        logger.warning("%s has no tanh pooler, which is used here: training starts from a random one", folder)
    unused = sorted(name for name in info["unexpected_keys"] if not _HEADS.match(name))
    if unused:
        what = "weights have no place in the BERT that its config.json describes and are not used, e.g."
        logger.warning("%s: %d %s %s", folder, len(unused), what, unused[0])
    return model, new
