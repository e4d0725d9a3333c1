"""From texts to token ids, in two forms, and the cache of both.

Joint, for the teacher: `[CLS] a [SEP] b [SEP]` with token types 0 and 1. Separate, for the student:
`[CLS] x [SEP]` for each distinct text once. Ids lie end to end in one int32 array with offsets, unpadded.

    max_seq_length 8, a of 4 pieces, b of 3: the budget is 8 - 3 = 5. The longer text loses its last piece,
    on a tie the second one does: 4+3 -> 3+3 -> 3+2.
"""

import json
import logging
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from dse.data.cache import check_cache_path, read_cache, write_cache
from dse.data.processors import Examples
from dse.data.tasks import REGRESSION, Task, task_to_dict
from dse.data.tokenizers import tokenizer_key
from dse.system import parallel

logger = logging.getLogger(__name__)

_TOKENIZE_AT_ONCE = 4096
_CHARACTERS_AT_ONCE = 1 << 22
_ROWS_AT_ONCE = 65536
_MOST_UNKNOWN = 0.05  # of the pieces
_ENOUGH = 50  # of them, for the share to tell something of the tokenizer
_MISFIT = "%s: %.0f %% of the pieces are [UNK], all alike to the model: its tokenizer does not fit these texts"
_warned: weakref.WeakSet[Any] = weakref.WeakSet()  # tokenizers


@dataclass
class Ragged:
    """Rows of different lengths, end to end: row i is ids[offsets[i] : offsets[i + 1]]."""

    ids: np.ndarray  # int32, (total,)
    offsets: np.ndarray  # int64, (rows + 1,)
    cut: int | None = None  # how many of the rows were cut at max_seq_length; None: not known, as of older caches

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row, int64."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Ragged":
        """The given rows, int, in that order."""
        lengths = self.lengths[rows]
        taken = Ragged(np.empty(lengths.sum(), dtype=np.int32), _offsets(lengths))
        _copy(self, rows, lengths, taken, taken.offsets[:-1])
        return taken

    def arrays(self) -> dict[str, np.ndarray]:
        """What a cache stores."""
        return {"ids": self.ids, "offsets": self.offsets} | ({} if self.cut is None else {"cut": np.array([self.cut])})


class Features:
    """Token ids of a split's pairs, labels and the id of [PAD], in two forms."""

    ROWS: ClassVar[str]  # what the rows are
    PARTS: ClassVar[tuple[str, ...]]  # what a cache stores: the rows, and attributes with an entry per pair

    def __len__(self) -> int:
        return len(getattr(self, self.PARTS[-1]))

    def arrays(self) -> dict[str, np.ndarray]:
        """What a cache stores."""
        rows, *others = self.PARTS
        return getattr(self, rows).arrays() | {name: getattr(self, name) for name in others}


@dataclass
class JointFeatures(Features):
    """Both texts of each pair in one row, for a cross-encoder."""

    ROWS, PARTS = "rows", ("tokens", "first_lengths")
    tokens: Ragged
    first_lengths: np.ndarray  # int32, (n,): tokens of type 0, i.e. `[CLS] a [SEP]`
    labels: np.ndarray | None  # (n,), int64 or, for regression, float32
    pad_id: int

    @property
    def costs(self) -> np.ndarray:
        """Tokens per pair, int64, by which batches of similar length are made."""
        return self.tokens.lengths

    def rows_of(self, pairs: np.ndarray) -> tuple[Ragged, np.ndarray, np.ndarray]:
        """Where the token ids of the given pairs are: the rows of `tokens`, and how many of each are of type 0."""
        return self.tokens, pairs, self.first_lengths[pairs]


@dataclass
class SeparateFeatures(Features):
    """Each distinct text once, and which texts make up each pair, for the student."""

    ROWS, PARTS = "distinct texts", ("texts", "first", "second")
    texts: Ragged
    first: np.ndarray  # int32, (n,): the row of each pair's first text
    second: np.ndarray  # int32, (n,)
    labels: np.ndarray | None
    pad_id: int

    @property
    def costs(self) -> np.ndarray:
        """Tokens of the longer text of each pair, int64."""
        lengths = self.texts.lengths
        return np.maximum(lengths[self.first], lengths[self.second])

    def rows_of(self, pairs: np.ndarray) -> tuple[Ragged, np.ndarray]:
        """Where the token ids of the given pairs are: the rows of `texts`, the first texts of all, then the second."""
        return self.texts, np.concatenate([self.first[pairs], self.second[pairs]])

    def block(self, pairs: slice | np.ndarray) -> "SeparateFeatures":
        """The given pairs and their texts alone."""
        both = np.stack([self.first[pairs], self.second[pairs]])
        texts, places = np.unique(both, return_inverse=True)
        first, second = places.reshape(both.shape).astype(np.int32)
        labels = None if self.labels is None else self.labels[pairs]
        return SeparateFeatures(self.texts.take(texts), first, second, labels, self.pad_id)


def joint_features(task: Task, examples: Examples, tokenizer: Any, max_seq_length: int) -> JointFeatures:
    """Tokenize pairs (or single sentences) together, cut to max_seq_length.

    A second text without pieces gives `[CLS] a [SEP]`; if it is not empty, `a` is still cut to the budget of a pair.
    """
    count = len(examples)
    seconds = [""] * count if examples.second is None else examples.second
    pieces, places = _distinct_pieces(chain(examples.first, seconds), 2 * count, tokenizer)
    first, second = places[:count], places[count:]
    a, b, is_pair = pieces.lengths[first], pieces.lengths[second], np.fromiter(map(bool, seconds), bool, count)
    keep_a, keep_b = kept_lengths(a, b, is_pair, max_seq_length)
    tokens = _framed(pieces, first, keep_a, second, keep_b, tokenizer)
    tokens.cut = int((a + b > keep_a + keep_b).sum())
    parts = [tokens, (keep_a + 2).astype(np.int32)]
    return _finished(JointFeatures, parts, task, examples, tokenizer, max_seq_length)


def separate_features(task: Task, examples: Examples, tokenizer: Any, max_seq_length: int) -> SeparateFeatures:
    """Tokenize each distinct text alone: its pieces cut to max_seq_length - 2 between `[CLS]` and `[SEP]`."""
    texts, places = _encode(list(chain(*examples.sides)), tokenizer, max_seq_length)
    parts = [texts, places[: len(examples)], places[len(examples) :]]
    return _finished(SeparateFeatures, parts, task, examples, tokenizer, max_seq_length)


def tokenize_texts(texts: Sequence[str], tokenizer: Any, max_seq_length: int) -> tuple[Ragged, np.ndarray]:
    """`[CLS] x [SEP]` of each distinct text, and for each of `texts` its row among them, int32.

    Warns if the tokenizer does not fit the texts, once per tokenizer.
    """
    tokens, places = _encode(texts, tokenizer, max_seq_length)
    enough = len(tokens.ids) >= _ENOUGH and tokenizer not in _warned
    if enough and (share := _unknown_share(tokens, tokenizer)) > _MOST_UNKNOWN:
        _warned.add(tokenizer)
        logger.warning(_MISFIT, "texts", 100 * share)
    return tokens, places


def _encode(texts: Sequence[str], tokenizer: Any, max_seq_length: int) -> tuple[Ragged, np.ndarray]:
    pieces, places = _distinct_pieces(texts, len(texts), tokenizer)
    rows, keep = np.arange(len(pieces.lengths)), np.minimum(pieces.lengths, max_seq_length - 2)
    tokens = _framed(pieces, rows, keep, rows, np.zeros_like(keep), tokenizer)
    tokens.cut = int((pieces.lengths > keep).sum())
    return tokens, places


def _framed(
    pieces: Ragged, first: np.ndarray, keep_a: np.ndarray, second: np.ndarray, keep_b: np.ndarray, tokenizer: Any
) -> Ragged:
    """`[CLS] a [SEP] b [SEP]`: so many pieces of rows of `pieces`; no second [SEP] where there are none of b."""
    offsets = _offsets(keep_a + 2 + keep_b + (keep_b > 0))
    tokens = Ragged(np.empty(offsets[-1], dtype=np.int32), offsets)
    for start in range(0, len(first), _ROWS_AT_ONCE):  # the places of all rows' tokens would need much memory
        some = slice(start, start + _ROWS_AT_ONCE)
        starts, ends_a = offsets[:-1][some], offsets[:-1][some] + 1 + keep_a[some]
        tokens.ids[starts] = tokenizer.cls_token_id
        _copy(pieces, first[some], keep_a[some], tokens, starts + 1)
        tokens.ids[ends_a] = tokenizer.sep_token_id
        _copy(pieces, second[some], keep_b[some], tokens, ends_a + 1)
        tokens.ids[offsets[1:][some] - 1] = tokenizer.sep_token_id
    return tokens


def _finished(form: Any, parts: list[Any], task: Task, examples: Examples, tokenizer: Any, max_seq_length: int) -> Any:
    """Features with their labels; logs what of a split's files was cut and is unknown, and warns above 5 % unknown."""
    dtype = np.float32 if task.kind == REGRESSION else np.int64
    labels = None if examples.labels is None else np.array(examples.labels, dtype=dtype)
    tokens, cut = parts[0], parts[0].cut
    if cut is None:  # rows of that length may have been, and joint ones lack a [SEP] at times
        cut = f"at most {np.count_nonzero(tokens.lengths >= max_seq_length - 1)}"
    if examples.files:
        name, share = ", ".join(entry["file"] for entry in examples.files), _unknown_share(tokens, tokenizer)
        logger.info("%s: %s of %d %s are cut at --max_seq_length %d; %.1f %% of the pieces are [UNK]",
                    name, cut, len(tokens.lengths), form.ROWS, max_seq_length, 100 * share)  # fmt: skip
        if share > _MOST_UNKNOWN:
            logger.warning(_MISFIT, name, 100 * share)
    return form(*parts, labels, tokenizer.pad_token_id)


def _unknown_share(tokens: Ragged, tokenizer: Any) -> float:
    """How many of the pieces, [CLS] and [SEP] aside, are [UNK]."""
    unknown, *around = (np.count_nonzero(tokens.ids == getattr(tokenizer, f"{name}_token_id"))
                        for name in ("unk", "cls", "sep"))  # fmt: skip
    return unknown / max(1, len(tokens.ids) - sum(around))


def kept_lengths(
    a: np.ndarray, b: np.ndarray, is_pair: np.ndarray, max_seq_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """How many pieces are kept of each row's texts, which have a and b pieces and must fit in max_seq_length - 3.

    The result is that of dropping the last piece of the longer text (on a tie, of the second) until they fit. A row
    that is not a pair keeps max_seq_length - 2 pieces of its first text, and nothing else.

    >>> kept_lengths(np.array([200]), np.array([200]), np.array([True]), 128)
    (array([63]), array([62]))
    """
    budget = max_seq_length - 3
    cut_b = np.minimum(b, np.maximum(budget // 2, budget - a))
    over = a + b > budget
    keep_a, keep_b = np.where(over, budget - cut_b, a), np.where(over, cut_b, b)
    return np.where(is_pair, keep_a, np.minimum(a, max_seq_length - 2)), np.where(is_pair, keep_b, 0)


def _distinct_pieces(texts: Iterable[str], count: int, tokenizer: Any) -> tuple[Ragged, np.ndarray]:
    """Token ids of each distinct text, uncut and without special tokens, and each text's place among them."""
    seen: dict[str, int] = {}
    places = np.fromiter((seen.setdefault(text, len(seen)) for text in texts), dtype=np.int32, count=count)
    distinct = iter(seen)
    ids, lengths = [np.empty(0, dtype=np.int32)], []
    with tqdm(total=len(seen), desc="tokenize", unit="text", disable=None, leave=False) as bar:
        for some in batches_of(distinct, _TOKENIZE_AT_ONCE, _CHARACTERS_AT_ONCE):
            rows = _word_pieces(some, tokenizer)
            lengths += [len(row) for row in rows]
            ids.append(np.fromiter(chain.from_iterable(rows), dtype=np.int32))
            bar.update(len(some))
    del seen, distinct
    return Ragged(np.concatenate(ids), _offsets(np.array(lengths, dtype=np.int64))), places


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def _copy(source: Ragged, rows: np.ndarray, lengths: np.ndarray, target: Ragged, starts: np.ndarray) -> None:
    """Copy the first `lengths` ids of rows of `source` to the places from `starts` on."""
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    target.ids[np.repeat(starts, lengths) + within] = source.ids[np.repeat(source.offsets[rows], lengths) + within]


def _word_pieces(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of texts. BERT's special tokens count as such only where they stand alone between spaces.

    So it is in the original; the library alone would find them inside words. It finds tokens that a user added.
    """
    own = _own_specials(tokenizer)
    backend = tokenizer.backend_tokenizer
    if _other_specials(tokenizer):
        backend = _with_own_alone(backend.to_str(), own)
    backend.no_padding()  # tokenizer.json may carry both
    backend.no_truncation()
    backend.encode_special_tokens = True  # as the plain text that they are
    alone = re.compile(rf"(?<!\S)({'|'.join(map(re.escape, own))})(?!\S)")
    # [text, special, text, special, ..., text] per text, nearly always just [text]
    parts = [alone.split(text) for text in texts]
    plain = [part for row in parts for part in row[::2]]
    ids = iter([encoded.ids for encoded in backend.encode_batch_fast(plain, add_special_tokens=False)])
    rows = []
    for row in parts:
        pieces = next(ids)
        for special in row[1::2]:
            pieces = [*pieces, tokenizer.convert_tokens_to_ids(special), *next(ids)]
        rows.append(pieces)
    return rows


def _own_specials(tokenizer: Any) -> tuple[str, ...]:
    """BERT's five special tokens, whatever the tokenizer names them."""
    named = (tokenizer.unk_token, tokenizer.sep_token, tokenizer.pad_token, tokenizer.cls_token, tokenizer.mask_token)
    return tuple(token for token in named if token is not None)


def _other_specials(tokenizer: Any) -> list[str]:
    """Special tokens that were added to BERT's five."""
    added, own = tokenizer.backend_tokenizer.get_added_tokens_decoder().values(), _own_specials(tokenizer)
    return sorted(token.content for token in added if token.special and token.content not in own)


@lru_cache(maxsize=4)
def _with_own_alone(content: str, own: tuple[str, ...]) -> Tokenizer:
    """The tokenizer whose `to_str` is given, with `own` as its only special tokens; others are added ones as before."""
    changed = json.loads(content)
    for token in changed["added_tokens"]:
        token["special"] = token["content"] in own
    return Tokenizer.from_str(json.dumps(changed))


def cached_features(
    form: str, task: Task, examples: Examples, tokenizer: Any, max_seq_length: int, path: str | Path, chosen: bool
) -> Any:
    """JointFeatures (`form` "joint") or SeparateFeatures from the cache at `path`, remade if its inputs changed.

    If the user has `chosen` the path: raises InputError for another kind of file there, RunError if writing fails.
    """
    path = Path(path)
    joint = form == "joint"
    features_class, make = (JointFeatures, joint_features) if joint else (SeparateFeatures, separate_features)
    made_from = {
        "form": form,
        "task": task_to_dict(task),
        "data": examples.files,
        "tokenizer": tokenizer_key(tokenizer),
        "do_lower_case": tokenizer.backend_tokenizer.normalizer.lowercase,
        "max_seq_length": max_seq_length,
    }
    if others := _other_specials(tokenizer):  # caches before these were found have no such entry
        made_from["found"] = others
    if chosen:
        check_cache_path(path, form)
    with parallel.first_goes_first():
        arrays = read_cache(path, made_from) if path.exists() else None
        if arrays is not None:
            logger.info("%s features of %d rows from the cache %s", form, len(examples), path)
            rows = Ragged(arrays["ids"], arrays["offsets"], int(arrays["cut"][0]) if "cut" in arrays else None)
            parts = [rows, *(arrays[name] for name in features_class.PARTS[1:])]
            return _finished(features_class, parts, task, examples, tokenizer, max_seq_length)
        features = make(task, examples, tokenizer, max_seq_length)
        if parallel.is_first():
            write_cache(path, features.arrays(), made_from, chosen)
        return features


def batches_of(texts: Iterable[str], count: int, characters: int) -> Iterator[list[str]]:
    """Cut an iterable of any length into lists of up to `count` texts, which end early at that many characters."""
    batch, size = list[str](), 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == count or size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def in_batches(order: Any, size: int) -> list[Any]:
    """Cut a sequence (an array of rows, a list of batches) into pieces of `size`; the last one may be shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]
