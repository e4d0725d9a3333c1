"""Where a pre-trained or fine-tuned BERT comes from: a local folder or the hub; its configuration and tokenizer.

Nothing here loads torch, so that a wrong folder, casing or length is refused at once. Weights are loaded
by models.py from the folder that `find_bert` returns.
"""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from dse.files import InputError, one_line, read_json, sha256_file, sha256_json

logger = logging.getLogger(__name__)

TRAINING_FORMAT = "dse teacher 1"
TRAINING = "training.json"  # beside a teacher: how it was trained, and its files' hashes

_DESCRIPTION = ["config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def find_bert(name: str, flag: str, cache_dir: str = "", hub: bool = True) -> Path:
    """The local folder of a BERT, with its weights.

    Args:
        name: a folder as `save_pretrained` writes it, or a hub name, which is downloaded to the hub's cache.
        flag: the flag that gave the name, for error messages.
        cache_dir: where downloads are kept; empty: the hub library's own place.
        hub: whether hub names are allowed.

    Raises InputError when it is neither, or no BERT, or its weights are missing or spoiled.
    """
    folder = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"{flag}: {name} is a file; expected the folder of a BERT, with config.json and weights")
        if looks_local or not hub:
            raise InputError(
                f"{flag}: there is no folder {name}; expected a folder with config.json, weights and vocabulary"
            )
        folder = _download(name, flag, cache_dir)
    _check_folder(folder, flag)
    check_hashes(folder, flag)
    return folder


def read_training(folder: Path) -> dict[str, Any] | None:
    """training.json of a teacher that finetune_bert.py made; None where there is none, or another program's."""
    if not (folder / TRAINING).is_file():
        return None
    training = read_json(folder / TRAINING, "the teacher's training")
    if training.get("format") != TRAINING_FORMAT:
        return None
    kinds = {"task_name": str, "task": dict, "run": dict, "data": dict, "history": list, "sha256": dict}
    if any(not isinstance(training.get(key), kind) for key, kind in kinds.items()):
        raise InputError(f"{folder / TRAINING} is spoiled: make the teacher again, or remove this file")
    return training


def check_hashes(folder: Path, flag: str) -> None:
    """Raise InputError where a teacher's files are not those that its training.json names."""
    for name, expected in (read_training(folder) or {"sha256": {}})["sha256"].items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != expected:
            raise InputError(
                f"{flag}: {path} is {'spoiled' if path.is_file() else 'missing'}: its SHA-256 in {TRAINING} is "
                f"{expected}; make the teacher again, or remove {TRAINING} if you changed the file yourself"
            )


def _download(name: str, flag: str, cache_dir: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # The small files first: a wrong name or model is refused before a gigabyte is fetched.
        folder = Path(snapshot_download(name, cache_dir=cache_dir or None, allow_patterns=_DESCRIPTION))
        bert_config(folder, flag)
        for pattern in ("model*.safetensors*", "pytorch_model*.bin*"):
            if not any((folder / weights).exists() for weights in _WEIGHTS):
                snapshot_download(name, cache_dir=cache_dir or None, allow_patterns=pattern)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{flag}: {name} is no local folder, and the hub did not give it ({one_line(error)}): "
            "check the name or the network"
        ) from error
    return folder


def _check_folder(folder: Path, flag: str) -> None:
    bert_config(folder, flag)
    weights = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not weights:
        raise InputError(f"{flag}: {folder} has no weights; expected {_WEIGHTS[0]} or {_WEIGHTS[2]} in it")
    if weights[0].suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            safe_open(weights[0], framework="numpy")  # reads the header and compares the size
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{flag}: {weights[0]} is truncated or no safetensors file ({error}); fetch it again"
            ) from error
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise InputError(f"{flag}: {folder} has no vocabulary; expected tokenizer.json or vocab.txt in it")


def weight_files(folder: Path) -> list[Path]:
    """The files that a BERT folder's weights are loaded from, with the index of shards if there is one."""
    first = next(folder / name for name in _WEIGHTS if (folder / name).is_file())
    if first.suffix != ".json":
        return [first]
    shards = read_json(first, "the index of the weights").get("weight_map", {})
    return [first, *(folder / name for name in sorted(set(shards.values())))]


def bert_config(folder: Path, flag: str) -> dict[str, Any]:
    """The config.json of a BERT folder. Raises InputError when it is another model's, or none."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{flag}: {folder} is no model folder: no config.json in it")
    config = read_json(folder / "config.json", "the model's configuration")
    # Folders of 2019 have no model_type.
    if config.get("model_type", "bert") != "bert" or "hidden_size" not in config:
        raise InputError(
            f"{flag}: {folder} holds a {config.get('model_type', 'model of unknown kind')}; expected a BERT"
        )
    return config


def last_part(name: str) -> str:
    """The last part of a hub name or path, for file names: `a/bert-base/` gives `bert-base`."""
    return Path(name).name or Path(name).resolve().name


def load_tokenizer(folder: Path, do_lower_case: bool, flag: str) -> Any:
    """BERT's WordPiece tokenizer with the casing that --do_lower_case decides.

    Raises InputError when the folder's tokenizer is another one, which the flag would not reach. Warns when
    the model was saved with the other casing.
    """
    from transformers import BertTokenizer

    saved = saved_casing(folder, flag)
    try:
        tokenizer = BertTokenizer.from_pretrained(folder, do_lower_case=do_lower_case)
    except Exception as error:  # a spoiled vocabulary raises whatever its reader trips over
        raise InputError(f"{flag}: the tokenizer of {folder} cannot be loaded ({one_line(error)})") from error
    normalizer = tokenizer.backend_tokenizer.normalizer
    if getattr(normalizer, "lowercase", None) is not do_lower_case:
        raise InputError(
            f"{flag}: the tokenizer of {folder} does not honour {_casing_flag(do_lower_case)}: "
            f"its normalizer is {normalizer}"
        )
    tokens = [tokenizer.cls_token, tokenizer.sep_token, tokenizer.pad_token, tokenizer.unk_token]
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    vocab_size = bert_config(folder, flag).get("vocab_size", 30522)
    if any(token not in vocabulary for token in tokens) or max(tokenizer.get_vocab().values()) >= vocab_size:
        raise InputError(
            f"{flag}: the vocabulary of {folder} does not fit its model: {len(vocabulary)} entries for {vocab_size} "
            f"embeddings, {', '.join(tokens)} expected among them"
        )
    if saved is not None and saved != do_lower_case:
        logger.warning(
            "%s was saved with %s, and this run uses %s", folder, _casing_flag(saved), _casing_flag(do_lower_case)
        )
    return tokenizer


def _casing_flag(do_lower_case: bool) -> str:
    return "--do_lower_case (uncased)" if do_lower_case else "no --do_lower_case (cased)"


def saved_casing(folder: Path, flag: str) -> bool | None:
    """The casing that the folder's files tell, if they do. Raises InputError for a tokenizer that is not BERT's."""
    casing = None
    if (folder / "tokenizer.json").is_file():
        whole = read_json(folder / "tokenizer.json", "the tokenizer")
        model, normalizer = whole.get("model") or {}, whole.get("normalizer") or {}
        # transformers would take the vocabulary and silently put BERT's own rules around it.
        if model.get("type", "WordPiece") != "WordPiece" or normalizer.get("type") != "BertNormalizer":
            raise InputError(
                f"{flag}: {folder} has a {model.get('type')} tokenizer with normalizer {normalizer.get('type')}, which "
                "does not honour --do_lower_case; expected BERT's (WordPiece, BertNormalizer)"
            )
        casing = normalizer.get("lowercase")
    if (folder / "tokenizer_config.json").is_file():
        casing = read_json(folder / "tokenizer_config.json", "the tokenizer's configuration").get(
            "do_lower_case", casing
        )
    return casing


def tokenizer_key(tokenizer: Any) -> str:
    """SHA-256 of all that decides the token ids: vocabulary, normalizer, splitting, special tokens."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None  # ours, not the tokenizer's
    return sha256_json(content)


def tokenizer_to_files(tokenizer: Any) -> dict[str, str]:
    """The tokenizer as the texts of its files, for a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


def tokenizer_from_files(files: dict[str, str]) -> Any:
    """The tokenizer that `tokenizer_to_files` took apart."""
    from transformers import BertTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        return BertTokenizer.from_pretrained(folder)


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer that a student's folder holds. Raises InputError where it cannot be loaded."""
    from transformers import BertTokenizer

    try:
        return BertTokenizer.from_pretrained(folder)
    except Exception as error:  # a spoiled one raises whatever its reader trips over
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({one_line(error)})") from error
