"""Identity: every token stays. The baseline that shows what a reduction costs in quality, and the way to switch it off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch

from token_reduction.budget import Budget
from token_reduction.reducer import Reducer
from token_reduction.reduction import Reduction
from token_reduction.tokens import TokenShard, check_grid
from tokenring.transport import Transport


@dataclass(frozen=True, kw_only=True)
class Identity(Reducer):
    """Keep everything. Takes no budget (None), or one that drops nothing; any other is refused rather than ignored.

    Variants: one algorithm; best, paper and released are the same. Scores: none.

    >>> Identity().count([(2, 4, 4)], None)
    [32]
    """

    name: ClassVar[str] = "identity"
    cost: ClassVar[str] = "O(1)"
    source: ClassVar[str] = "baseline"
    form: ClassVar[str] = "authors'"

    def count(self, grid: Any, budget: Budget | None) -> list[int]:
        items = check_grid(grid)
        lengths = [t * h * w for t, h, w in items]
        wanted = lengths if budget is None else super().count(items, budget)
        if wanted != lengths:
            raise ValueError(
                f"identity keeps every token, so it takes no budget, got {budget!r}; leave it out or choose another method"
            )
        return lengths

    def reduce_shard(
        self,
        shard: TokenShard,
        counts: Sequence[int],
        transport: Transport,
        generator: torch.Generator | None,
    ) -> Reduction:
        bounds = shard.bounds
        kept = [shard.global_index[first:last] for first, last in pairwise(bounds)]
        return Reduction.keep(shard, kept)
