"""The made-up data."""

import random

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
