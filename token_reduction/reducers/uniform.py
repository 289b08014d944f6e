"""Uniform: evenly spread rows in raster order. A hard baseline: on natural video it covers nearly as well as the best.

kept_i = floor((2 i + 1) n / (2 k)),   i = 0 .. k-1        the middles of k equal stretches
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.exact import evenly
from token_reduction.reducer import Reducer
from token_reduction.reduction import Reduction
from token_reduction.tokens import TokenShard
from tokenring.transport import Transport


@dataclass(frozen=True, kw_only=True)
class Uniform(Reducer):
    """Keep max(1, round(r n)) or min(k, n) evenly spread tokens of each item; looks at no feature.

    Variants: one algorithm; best, paper and released are the same. Scores: none.
    """

    name: ClassVar[str] = "uniform"
    cost: ClassVar[str] = "O(k)"
    source: ClassVar[str] = "baseline"
    form: ClassVar[str] = "authors'"
    flat: ClassVar[bool] = True

    def reduce_shard(
        self,
        shard: TokenShard,
        counts: Sequence[int],
        transport: Transport,
        generator: torch.Generator | None,
    ) -> Reduction:
        offsets, lengths = shard.cu_seqlens.tolist(), shard.cu_seqlens.diff().tolist()
        kept = [first + evenly(length, count) for first, length, count in zip(offsets, lengths, counts)]
        return Reduction.keep(shard, kept)
