"""Distilled Sentence Embedding (Barkan et al., AAAI 2020): a BERT cross-encoder taught to a Siamese student.

from dse import CandidateIndex, DSESiameseClassifier
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dse.index import CandidateIndex as CandidateIndex
    from dse.models import DSESiameseClassifier as DSESiameseClassifier

__version__ = "0.1.0"
_IN = {"CandidateIndex": "dse.index", "DSESiameseClassifier": "dse.models"}


def __getattr__(name: str) -> Any:  # so that `import dse` alone does not load torch
    if name not in _IN:
        raise AttributeError(f"module 'dse' has no attribute {name!r}")
    return getattr(import_module(_IN[name]), name)
