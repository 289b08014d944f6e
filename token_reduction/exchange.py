"""Fetching rows that live on other ranks."""

from __future__ import annotations

from torch import Tensor

from token_reduction.tokens import TokenShard
from tokenring.transport import Transport


def fetch_rows(shard: TokenShard, wanted: Tensor, transport: Transport) -> Tensor:
    """Features (m, D) of the global rows `wanted` (m,) int64, wherever they live. Collective; only these rows travel.

    Every wanted row is held by exactly one rank, which `reduce_distributed` has checked.
    """
    answers, numbers = [], []
    for asked in transport.all_gather(wanted):
        at = shard.find(asked)
        here = at >= 0
        numbers.append(here.nonzero()[:, 0])
        answers.append(shard.x[at[here]])
    result = shard.x.new_empty((wanted.numel(), shard.x.shape[1]))
    for places, rows in zip(transport.all_to_all(numbers), transport.all_to_all(answers)):
        result[places] = rows
    return result
