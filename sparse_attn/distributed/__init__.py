"""AnchorAttention over a sequence that is spread over ranks: only the key rows that some group wants travel.

The owner of a key decides alone whether a column is wanted, from what the queries' ranks tell of them; then the wanted rows
travel, once for all groups of a rank and all query heads of a key head. Every rank ends with its rows of the one-device result.
"""

from sparse_attn.distributed.api import attend
from sparse_attn.distributed.layouts import group_layout
from sparse_attn.distributed.stats import RankStats

__all__ = ["RankStats", "attend", "group_layout"]
