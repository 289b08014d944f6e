"""Vertical-slash of MInference 1.0 (Jiang et al., arXiv 2407.02490, section 3.2): columns and diagonals by the last queries.

A = softmax of the last 64 queries over all keys;  verticals: the largest column sums;  slashes: the largest diagonal sums
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.baselines.blocks import at_least, each_head, plan_of_lists, whole_sequence
from sparse_attn.stripes import StripePlan

FIRST, NEAR = 30, 100
"""Columns, and distances from the diagonal, that the method always keeps."""


def vertical_slash(
    q: Tensor, k: Tensor, *, vertical: int = 1000, slash: int = 6096, last: int = 64, block: int = 64
) -> StripePlan:
    """Top `vertical` columns and top `slash` diagonals of each head; a diagonal is as wide as a block of queries.

    >>> q, k = torch.randn(1, 300, 2, 8), torch.randn(1, 300, 1, 8)
    >>> vertical_slash(q, k, vertical=20, slash=40, block=32).path
    'sparse'
    """
    whole_sequence(q, k, block)
    at_least(1, vertical=vertical, slash=slash, last=last)
    lists = []
    for queries, keys in each_head(q, k):
        columns, distances = last_rows(queries, keys, last)
        columns[:FIRST], distances[:NEAR] = torch.inf, torch.inf
        kept = columns.topk(min(vertical, len(columns))).indices, distances.topk(min(slash, len(distances))).indices
        lists.append(lines(*kept, len(keys), block))
    return plan_of_lists(q, k, block, lists, f"{vertical} columns, {slash} diagonals")


def last_rows(queries: Tensor, keys: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """Attention of the last queries: its column sums (S), and its sums at each distance query - key (S)."""
    length, rows = len(keys), min(last, len(keys))
    scores = queries[-rows:] @ keys.T
    distance = torch.arange(length - rows, length, device=keys.device)[:, None] - torch.arange(
        length, device=keys.device
    )
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    sums = weights.new_zeros(length).index_add_(0, distance.clamp(min=0).flatten(), weights.flatten())
    return weights.sum(0), sums


def lines(columns: Tensor, distances: Tensor, length: int, block: int) -> list[Tensor]:
    """For each block of queries the ascending keys before it on some columns and some diagonals."""
    wanted, marks = (torch.zeros(n, dtype=torch.int64, device=columns.device) for n in (length, length + block + 1))
    wanted[columns], marks[distances + 1] = 1, 1
    # The diagonal at distance d crosses the keys d - block + 1 to d before a block, whichever block it is.
    below = marks.cumsum(0)
    crossed = (below[block + 1 :] > below[1 : length + 1]).flip(0)
    wanted = wanted > 0
    return [(wanted[:start] | crossed[length - start :]).nonzero()[:, 0] for start in range(0, length, block)]
