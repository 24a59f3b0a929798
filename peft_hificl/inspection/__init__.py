"""See what virtual pairs do: how much attention they take, what they write, and what the loss is without them.

The tensors need nothing more.  `Records.table` needs pandas, `plots` and the command line need matplotlib: the extra
``inspection``.
"""

from .effects import Effects, pair_effects
from .kinds import token_kinds
from .recording import Column, Record, Records, Weights, record

__all__ = ["Column", "Effects", "Record", "Records", "Weights", "pair_effects", "record", "token_kinds"]
