"""The made-up data."""

import random

import numpy as np

from dse.experiments import synthetic


def test_made_up_pairs_are_what_their_labels_say():
    """The second way: look every word up and compare concepts."""
    concept_of = {
        word: (s, c) for s, slot in enumerate(synthetic.SLOTS) for c, concept in enumerate(slot) for word in concept
    }
    assert len(concept_of) == sum(len(concept) for slot in synthetic.SLOTS for concept in slot), (
        "a word in two concepts"
    )
    rng, seen = random.Random(0), set()
    for _ in range(200):
        label, *sentences = synthetic.make_pair(rng)
        first, second = ({concept_of[word] for word in text.split() if word in concept_of} for text in sentences)
        assert len(first) == len(second) == 5
        assert len(first - second) == (0 if label else 2)
        seen.add(label)
    assert seen == {0, 1}


def test_negatives_by_hand():
    """Texts are numbers on a circle: half of the negatives are the nearest, and none is a match."""
    pairs = [(f"q{i}", str(i)) for i in range(0, 360, 30)] + [("q0", "30")]

    def units(texts: list[str]) -> np.ndarray:
        angles = np.radians([float(text.removeprefix("q")) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    rows = synthetic.with_negatives(pairs, 3, units, seed=5)
    assert rows == synthetic.with_negatives(pairs, 3, units, seed=5)
    assert rows != synthetic.with_negatives(pairs, 3, units, seed=6)
    assert [row[:2] for row in rows if row[2]] == sorted(pairs, key=lambda pair: int(pair[0][1:]))
    of_first = {first: [row[1] for row in rows if row[0] == first and not row[2]] for first, _ in pairs}
    assert [len(set(seconds)) for seconds in of_first.values()] == [6, *[3] * 11]
    assert set(of_first["q0"][:3]) <= {"330", "60", "300", "90"}
    assert set(of_first["q180"][:2]) == {"150", "210"}
    assert not {"0", "30"} & set(of_first["q0"])
    assert all(first[1:] not in seconds for first, seconds in of_first.items())
    known = [("q180", "150"), ("210", "q180")]  # in either order
    of_more = synthetic.with_negatives(pairs, 3, units, 5, known)
    assert not {"150", "210"} & {second for first, second, label in of_more if first == "q180"}
    assert [row[2] for row in synthetic.with_negatives([("q", "a")], 2, lambda texts: np.ones((1, 2)), 0)] == [1]
