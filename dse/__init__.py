"""Distilled Sentence Embedding (Barkan et al., AAAI 2020): a BERT cross-encoder taught to a Siamese student."""

__version__ = "0.1.0"
