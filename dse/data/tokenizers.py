"""BERT's WordPiece tokenizer: loaded with the requested casing, refused if its files say otherwise."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from dse.system.errors import InputError, one_line
from dse.system.files import read_json, sha256_json

logger = logging.getLogger(__name__)

# Classes whose ids are those of BERT's WordPiece, and classes that leave all rules to tokenizer.json.
_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
_FROM_FILE = ("PreTrainedTokenizer", "TokenizersBackend")
_CASING = ("cased (no --do_lower_case)", "uncased (--do_lower_case)")
# Rules of tokenizer_config.json that the library no longer reads: the values that mean BERT's.
_SPLITTING = {
    "word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece", "do_word_tokenize": True,
    "do_subword_tokenize": True, "do_basic_tokenize": True, "clean_text": True, "wordpieces_prefix": "##",
    "never_split": ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"], "auto_map": {},
}  # fmt: skip


def load_tokenizer(folder: Path, do_lower_case: bool, flag: str) -> Any:
    """BERT's WordPiece tokenizer with the casing that --do_lower_case decides.

    Raises InputError if the folder holds another tokenizer. Warns if the model was saved with the other casing.
    """
    saved = saved_casing(folder, flag)
    check_tokenizer_class(folder, flag)
    tokenizer = tokenizer_in(folder, f"{flag}: ", do_lower_case=do_lower_case)
    normalizer = tokenizer.backend_tokenizer.normalizer
    if getattr(normalizer, "lowercase", None) is not do_lower_case:
        unmet = f"cannot be loaded as {_CASING[do_lower_case]}: its normalizer is {normalizer}"
        raise InputError(f"{flag}: the tokenizer of {folder} {unmet}")
    _check_rules(folder, tokenizer, do_lower_case, flag)
    tokens = [tokenizer.cls_token, tokenizer.sep_token, tokenizer.pad_token, tokenizer.unk_token]
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    size = read_json(folder / "config.json", "the model's configuration").get("vocab_size", 30522)
    if any(token not in vocabulary for token in tokens) or max(tokenizer.get_vocab().values()) >= size:
        found = f"{len(vocabulary)} entries for {size} embeddings; {', '.join(map(str, tokens))} must be among them"
        raise InputError(f"{flag}: the vocabulary of {folder} does not fit its model: {found}")
    if saved is not None and saved != do_lower_case:
        was, now = _CASING[bool(saved)], _CASING[do_lower_case]
        logger.warning("%s was saved as %s, but this run uses it as %s", folder, was, now)
    return tokenizer


def check_tokenizer_class(folder: Path, flag: str) -> None:
    """Raise InputError if the folder's configurations name another tokenizer, or rules that are not BERT's.

    transformers would combine the vocabulary with BERT's rules, with a warning at most.
    """
    known = _CLASSES + _FROM_FILE * (folder / "tokenizer.json").is_file()
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        config = _json_in(path)
        named = config.get("tokenizer_class")
        if named is not None and str(named).removesuffix("Fast") not in known:
            raise InputError(f"{flag}: {path} names the tokenizer {named}; expected BERT's: {', '.join(known)}")
    for key, expected in _SPLITTING.items():
        value = config.get(key)
        some = isinstance(expected, list) and isinstance(value, list) and set(map(str, value)) <= set(expected)
        if value not in (None, expected, {}) and not some:
            differs = f"{key} is {value!r}, but {expected!r} in BERT's WordPiece"
            raise InputError(f"{flag}: {path}: {differs}; use a model whose tokenizer is BERT's")


def _check_rules(folder: Path, tokenizer: Any, do_lower_case: bool, flag: str) -> None:
    """Raise InputError if the files have other rules, or other ids of added tokens, than what was loaded from them.

    transformers takes the vocabulary from tokenizer.json, but rules from tokenizer_config.json or its own.
    """

    def rules_of(content: dict[str, Any]) -> dict[str, Any]:
        rules = {**(content.get("model") or {}), **(content.get("normalizer") or {}), "lowercase": do_lower_case}
        if rules.get("strip_accents") is None:  # BERT's: as the casing
            rules["strip_accents"] = do_lower_case
        ids = {f"id of {token['content']!r}": token["id"] for token in content.get("added_tokens") or []}
        return {**rules, **ids, "type": None, "vocab": None, "pre_tokenizer": content.get("pre_tokenizer")}

    used = rules_of(json.loads(tokenizer.backend_tokenizer.to_str()))
    if (folder / "tokenizer.json").is_file():
        said = rules_of(_json_in(folder / "tokenizer.json"))
    else:  # vocab.txt, and what was added to it
        said = {f"id of {token!r}": place for token, place in _json_in(folder / "added_tokens.json").items()}
    for key, value in said.items():
        if used.get(key) != value:
            differs = f"{key} is {value!r} there, but {used.get(key)!r} as loaded"
            mend = "make tokenizer_config.json say the same if it can, or use another model"
            raise InputError(f"{flag}: the tokenizer of {folder} would not follow its files: {differs}; {mend}")


def _json_in(path: Path) -> dict[str, Any]:
    """The JSON object of one of a model's files; an empty one where there is no such file."""
    return read_json(path, "a file of the model") if path.is_file() else {}


def saved_casing(folder: Path, flag: str) -> bool | None:
    """The casing that the folder's files state, or None. Raises InputError for a tokenizer that is not BERT's."""
    whole = _json_in(folder / "tokenizer.json")
    model, normalizer = whole.get("model") or {}, whole.get("normalizer") or {}
    # transformers would take the vocabulary and silently put BERT's own rules around it.
    types = model.get("type", "WordPiece"), normalizer.get("type")
    if (folder / "tokenizer.json").is_file() and types != ("WordPiece", "BertNormalizer"):
        found = f"a {model.get('type')} tokenizer with normalizer {types[1]}, which does not honour --do_lower_case"
        raise InputError(f"{flag}: {folder} has {found}; expected BERT's (WordPiece, BertNormalizer)")
    return _json_in(folder / "tokenizer_config.json").get("do_lower_case", normalizer.get("lowercase"))


def tokenizer_key(tokenizer: Any) -> str:
    """SHA-256 of all that determines the token ids: vocabulary, normalizer, splitting, special tokens."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None  # ours, not the tokenizer's
    return sha256_json(content)


def tokenizer_to_files(tokenizer: Any) -> dict[str, str]:
    """The contents of the tokenizer's files by name, for a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


def tokenizer_from_files(files: dict[str, str]) -> Any:
    """The tokenizer whose files `tokenizer_to_files` gave. Raises InputError if it cannot be loaded."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
        return tokenizer_in(Path(folder), "a checkpoint's tokenizer: ")


def tokenizer_in(folder: Path, where: str = "", **options: Any) -> Any:
    """A folder's BertTokenizer. Raises InputError, which begins with `where`, if it cannot be loaded."""
    from transformers import BertTokenizer

    try:
        return BertTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # a corrupt one raises whatever its reader trips over
        raise InputError(f"{where}{folder}: its tokenizer cannot be loaded ({one_line(error)})") from error
