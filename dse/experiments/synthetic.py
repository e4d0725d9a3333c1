"""Made-up data: negatives for pairs that all match; sentence pairs and a tiny untrained BERT, without any download.

Quickstart and the tests run on the sentences.

A sentence says who did what to what, where and when; each concept has several words, and a sentence has one of four
forms. A pair is positive if both sentences say the same, with words and form drawn anew, and negative if two of the
five concepts differ.
"""

import random
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import numpy as np

from dse.data.features import JointFeatures, Ragged, SeparateFeatures
from dse.system.files import write_text

_DRAWS = 8  # random texts that are looked at for each that is wanted
WHO = ("doctor physician medic", "teacher instructor tutor", "farmer grower planter", "thief burglar robber",
       "writer author novelist", "soldier fighter trooper")  # fmt: skip
DID = ("bought purchased acquired", "sold traded auctioned", "broke damaged smashed", "found discovered located",
       "painted coloured decorated", "hid concealed buried")  # fmt: skip
WHAT = ("car vehicle automobile", "house home cottage", "picture image photo", "boat ship vessel",
        "ring jewel bracelet", "lamp lantern torch")  # fmt: skip
WHERE = ("town city village", "forest wood jungle", "harbour port dock", "school college academy",
         "market shop store", "mountain hill peak")  # fmt: skip
WHEN = ("yesterday lately recently", "tomorrow soon shortly", "always constantly forever", "never hardly rarely",
        "monday tuesday friday", "january june july")  # fmt: skip
SLOTS = tuple(tuple(concept.split() for concept in slot) for slot in (WHO, DID, WHAT, WHERE, WHEN))
FORMS = (
    "the {who} {did} a {what} in the {where} {when} .",
    "{when} , the {who} {did} a {what} in the {where} .",
    "in the {where} a {what} was {did} by the {who} {when} .",
    "{when} a {what} was {did} in the {where} by the {who} .",
)


def _sentence(concepts: list[int], rng: random.Random) -> str:
    words = [rng.choice(slot[concept]) for slot, concept in zip(SLOTS, concepts, strict=True)]
    return rng.choice(FORMS).format(**dict(zip(("who", "did", "what", "where", "when"), words, strict=True)))


def make_pair(rng: random.Random) -> tuple[int, str, str]:
    """Label, 1 or 0 with equal chance, and two sentences."""
    label, concepts = rng.randrange(2), [rng.randrange(len(slot)) for slot in SLOTS]
    others = list(concepts)
    if not label:
        for place in rng.sample(range(len(SLOTS)), 2):
            others[place] = rng.choice([c for c in range(len(SLOTS[place])) if c != concepts[place]])
    return label, _sentence(concepts, rng), _sentence(others, rng)


def write_pairs(path: Path, rows: int, seed: int) -> None:
    """Write pairs in MRPC's layout: Quality, #1 ID, #2 ID, #1 String, #2 String."""
    rng = random.Random(seed)
    pairs = (make_pair(rng) for _ in range(rows))
    lines = (f"{label}\t{2 * i}\t{2 * i + 1}\t{first}\t{second}\n" for i, (label, first, second) in enumerate(pairs))
    write_text(path, "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "".join(lines))


def vocabulary() -> list[str]:
    """BERT's special tokens, then every word of the sentences."""
    words = {word for form in FORMS for word in form.split() if "{" not in word}
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words.union(*chain.from_iterable(SLOTS)))]


def write_tiny_bert(folder: Path, seed: int, hidden_size: int = 64, layers: int = 2, positions: int = 64) -> None:
    """Write a tiny uncased BERT with that vocabulary, as a folder that `from_pretrained` loads."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    place = {word: i for i, word in enumerate(vocabulary())}
    config = BertConfig(
        vocab_size=len(place), hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * hidden_size, max_position_embeddings=positions, initializer_range=0.1,
        hidden_dropout_prob=0.05, attention_probs_dropout_prob=0.05,
    )  # fmt: skip
    torch.manual_seed(seed)
    bert = BertModel(config)
    # As pre-training would have it: words of a concept are close, and the first layer looks at tokens like its own.
    with torch.no_grad():
        vectors = bert.embeddings.word_embeddings.weight.normal_(std=0.3)
        for concept in chain.from_iterable(SLOTS):
            vectors[[place[word] for word in concept]] += torch.randn(hidden_size)
        bert.embeddings.token_type_embeddings.weight.normal_(std=0.5)
        for name in ("query", "key"):
            bert.get_parameter(f"encoder.layer.0.attention.self.{name}.weight").copy_(1.5 * torch.eye(hidden_size))
    bert.save_pretrained(folder)
    BertTokenizer(vocab=place, do_lower_case=True).save_pretrained(folder)


def random_features(pairs: int, vocabulary: int = 30522) -> tuple[SeparateFeatures, JointFeatures]:
    """Pairs of random texts of MRPC's lengths, for a student and a teacher: 27 tokens each, between 10 and 50."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(27, 8, 2 * pairs).round(), 10, 50).astype(np.int64)
    both = lengths[:pairs] + lengths[pairs:] - 1  # one [CLS] for two
    texts, rows = (
        Ragged(rng.integers(5, vocabulary, some.sum()).astype(np.int32), np.append(0, np.cumsum(some)))
        for some in (lengths, both)
    )
    first, second = np.arange(2 * pairs, dtype=np.int32).reshape(2, pairs)
    labels, first_lengths = np.arange(pairs) % 2, lengths[:pairs].astype(np.int32)
    return SeparateFeatures(texts, first, second, labels, 0), JointFeatures(rows, first_lengths, labels, 0)


def with_negatives(
    pairs: list[tuple[str, str]], count: int, units: Callable[[list[str]], np.ndarray], seed: int,
    known: Iterable[tuple[str, str]] = (),
) -> list[tuple[str, str, int]]:  # fmt: skip
    """The pairs, which all match, with label 1; for each, `count` second texts of others, with label 0, follow.

    Half of these, rounded up, are the nearest by `units`, which gives (texts, size) vectors of length 1; the others
    are random. None equals the first text, or makes a pair that is among the pairs, or more `known` ones, in either
    order. Few pairs may give fewer.
    """
    rng, seconds_of = np.random.default_rng(seed), dict[str, list[str]]()
    for first, second in dict.fromkeys(pairs):
        seconds_of.setdefault(first, []).append(second)
    partners = dict[str, set[str]]()
    for one, other in chain(pairs, known):
        partners.setdefault(one, {one}).add(other)
        partners.setdefault(other, {other}).add(one)
    firsts, seconds = list(seconds_of), list(dict.fromkeys(second for _, second in pairs))
    of_firsts, of_seconds = units(firsts), units(seconds)
    rows = []
    for first, vector in zip(firsts, of_firsts, strict=True):
        own = seconds_of[first]
        wanted, taken = count * len(own), partners[first].copy()
        chosen = list[str]()
        for order, most in (
            (np.argsort(-(of_seconds @ vector), kind="stable"), (wanted + 1) // 2),
            (rng.integers(len(seconds), size=_DRAWS * wanted), wanted),
        ):
            for i in order:
                if len(chosen) == most:
                    break
                if seconds[i] not in taken:
                    chosen.append(seconds[i])
                    taken.add(seconds[i])
        rows += [*((first, second, 1) for second in own), *((first, second, 0) for second in chosen)]
    return rows
