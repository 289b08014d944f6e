"""Uniform: evenly spread rows in raster order. A hard baseline: on natural video it covers nearly as well as the best.

kept_i = floor((2 i + 1) n / (2 k)),   i = 0 .. k-1        the middles of k equal stretches
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.reducer import Reducer
from token_reduction.reduction import Reduction
from token_reduction.tokens import TokenShard
from tokenring.transport import Transport


def evenly(length: int, count: int) -> Tensor:
    """Middles of `count` equal stretches of 0..length-1, int64, in integers throughout.

    >>> evenly(10, 3)
    tensor([1, 5, 8])
    """
    return (2 * torch.arange(count) + 1) * length // (2 * count)


@dataclass(frozen=True, kw_only=True)
class Uniform(Reducer):
    """Keep max(1, round(r n)) or min(k, n) evenly spread tokens of each item; looks at no feature.

    Variants: one algorithm; best, paper and released are the same. Scores: none.
    """

    name: ClassVar[str] = "uniform"

    def reduce_shard(
        self,
        shard: TokenShard,
        counts: Sequence[int],
        transport: Transport,
        generator: torch.Generator | None,
    ) -> Reduction:
        offsets, lengths = shard.cu_seqlens.tolist(), shard.cu_seqlens.diff().tolist()
        kept = [
            first + evenly(length, count) if count else torch.zeros(0, dtype=torch.int64)
            for first, length, count in zip(offsets, lengths, counts)
        ]
        return Reduction.keep(shard, kept)
