"""Random: a uniformly drawn subset. The baseline that any method has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from token_reduction.reducer import Reducer
from token_reduction.reduction import Reduction
from token_reduction.tokens import TokenShard
from tokenring.transport import Transport


@dataclass(frozen=True, kw_only=True)
class Random(Reducer):
    """Keep max(1, round(r n)) or min(k, n) tokens of each item, every subset equally likely.

    Args:
        seed: of the generator that is made for a call that brings none. The same seed gives the same choice again, so for
            the windows of one video bring one generator, or build with another seed for each.

    Items draw one after the other from one generator. Each rank draws the whole item's choice and takes its own rows out of
    it, so nothing is sent and no partition changes the result.
    Variants: one algorithm; best, paper and released are the same. Scores: none.
    """

    seed: int = 0
    name: ClassVar[str] = "random"
    cost: ClassVar[str] = "O(n)"
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
        source = torch.Generator().manual_seed(self.seed) if generator is None else generator
        offsets, lengths = shard.cu_seqlens.tolist(), shard.cu_seqlens.diff().tolist()
        kept = []
        for first, length, count in zip(offsets, lengths, counts):
            drawn = torch.randperm(length, generator=source, device=source.device)[:count]
            kept.append(first + drawn.sort().values)
        return Reduction.keep(shard, kept)
