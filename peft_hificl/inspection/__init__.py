"""See what virtual pairs do: how much attention they take, what they write, and what the loss is without them.

The tensors need nothing more.  `Records.table` needs pandas; the module `plots` and the command line need matplotlib.
Both come with the extra ``inspection``.
"""

from .effects import Effects, head_effects, pair_effects
from .kinds import token_kinds
from .reading import Reading, read_pairs
from .recording import Column, Record, Records, Weights, record
from .similarity import Duplicate, Similarity, duplicate_pairs, pair_similarity

__all__ = [
    "Column",
    "Duplicate",
    "Effects",
    "Reading",
    "Record",
    "Records",
    "Similarity",
    "Weights",
    "duplicate_pairs",
    "head_effects",
    "pair_effects",
    "pair_similarity",
    "read_pairs",
    "record",
    "token_kinds",
]
