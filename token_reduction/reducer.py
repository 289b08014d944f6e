"""The protocol of a reduction method: say what you need, say how many tokens stay, then reduce.

A method writes its algorithm once, over the rows one rank holds and a transport; a single rank is the world of one. So the
result cannot depend on how the rows are spread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from token_reduction.budget import Budget
from token_reduction.reduction import Reduction
from token_reduction.tokens import TokenShard, VisualTokens, check_grid, whole
from tokenring.transport import Transport, connect

VARIANTS = ("best", "paper", "released")


@dataclass(frozen=True, kw_only=True)
class Reducer(ABC):
    """Base of every method. `variant` says which account of the method to follow; a method says what that changes."""

    variant: str = "best"

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Names of the channels that tokens must carry."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r} of {self.name}; variants are {', '.join(VARIANTS)}")

    def count(self, grid: Any, budget: Budget | None) -> list[int]:
        """How many rows stay of each item: exact, from the grid alone, before any data is seen.

        Args:
            grid: (T, h, w) for each item.
            budget: of one item. A count above an item's length keeps the whole item; an item without rows keeps none.
        """
        if not isinstance(budget, Budget):
            raise ValueError(f"{self.name} needs a Budget, got {budget!r}; give Budget.ratio(0.1) or Budget.count(64)")
        return [self.item_count(item, budget) for item in check_grid(grid)]

    def item_count(self, item: tuple[int, int, int], budget: Budget) -> int:
        """`count` of one item; a method with a rule of its own overrides this."""
        t, h, w = item
        return budget.tokens(t * h * w)

    def reduce(
        self, tokens: VisualTokens, budget: Budget | None, generator: torch.Generator | None = None
    ) -> Reduction:
        """Reduce each item of a packed batch to exactly `count` rows.

        Args:
            tokens: the batch.
            budget: of one item.
            generator: source of chance for methods that draw (`random`); the others never touch it.
        """
        shard, counts = whole(tokens), self.count(tokens.grid, budget)
        problem = self.problem(shard, counts)
        if problem:
            raise ValueError(problem)
        return self.reduce_shard(shard, counts, connect(None), generator)

    def problem(self, shard: TokenShard, counts: Sequence[int]) -> str | None:
        """Why these rows cannot be reduced, in one line, or None. Looks at this rank only and sends nothing."""
        missing = sorted(self.needs - set(shard.channels))
        if missing:
            return (
                f"{self.name} needs the channels {', '.join(sorted(self.needs))}; the tokens lack {', '.join(missing)}"
            )
        return None

    @abstractmethod
    def reduce_shard(
        self,
        shard: TokenShard,
        counts: Sequence[int],
        transport: Transport,
        generator: torch.Generator | None,
    ) -> Reduction:
        """This rank's part of the reduction; called on every rank alike, with the same counts."""


def refuse_unfinite(method: Reducer, shard: TokenShard) -> str | None:
    """For methods that compare features: a NaN would make every comparison false and the choice meaningless."""
    if not bool(torch.isfinite(shard.x).all()):
        return f"{method.name} compares features and x holds NaN or infinity; look at the encoder or the dtype"
    return None
