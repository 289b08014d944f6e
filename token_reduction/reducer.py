"""The protocol of a reduction method: say what you need, say how many tokens stay, then reduce.

A method writes its algorithm once, over the rows one rank holds and a transport; a single rank is the world of one. So the
result cannot depend on how the rows are spread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from token_reduction.budget import Budget
from token_reduction.exact import finite
from token_reduction.options import Limits, check_options
from token_reduction.reduction import Reduction
from token_reduction.tokens import TokenShard, VisualTokens, check_grid, whole
from tokenring.transport import Transport, connect

VARIANTS = ("best", "paper", "released")
MAX_WORK = 2e13
"""Multiply-adds of one item above which a method whose work grows faster than its tokens refuses: minutes on a small CPU."""
CORE_RATE = 1e10
"""Multiply-adds a second of one core in float64, as a rule of thumb for what a refusal estimates."""


@dataclass(frozen=True, kw_only=True)
class Reducer(ABC):
    """Base of every method. `variant` says which account of the method to follow; a method says what that changes."""

    variant: str = "best"

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Names of the channels that tokens must carry."""
    wants: ClassVar[frozenset[str]] = frozenset()
    """Names of the channels that are used where tokens carry them."""
    cost: ClassVar[str]
    """Work and memory in n tokens, k kept, width D, T frames of N."""
    source: ClassVar[str]
    """Where the method was published."""
    form: ClassVar[str]
    """"authors'": the published algorithm, or "ours": the publication leaves the algorithm open and this is our form."""

    flat: ClassVar[bool] = False
    """Whether the method looks at rows alone: frames and places mean nothing to it."""

    text_space: ClassVar[str] = "x"
    """The plane whose space `text` must share."""

    merges: ClassVar[bool] = False
    """Whether rows may be made of several tokens."""

    limits: ClassVar[Limits] = {}
    """Of each option that has limits."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"unknown variant {self.variant!r} of {self.name}; variants are {', '.join(VARIANTS)}")
        check_options(self, self.name, self.limits, self.idle)

    @property
    def idle(self) -> Mapping[str, str]:
        """Options that do nothing beside the others that were given, and in words beside which; to give one is refused."""
        return {}

    @property
    def adaptive(self) -> bool:
        """Whether the data may keep fewer rows than `count` says, which is then an upper bound."""
        return False

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
            generator: source of chance for methods that draw; the others never touch it.
        """
        if not isinstance(tokens, VisualTokens):
            raise ValueError(
                f"{self.name} reduces VisualTokens, got {type(tokens).__name__}; wrap features and grid in them"
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator is a torch.Generator, got {generator!r}; torch.Generator().manual_seed(0)")
        shard, counts = whole(tokens), self.count(tokens.grid, budget)
        problem = self.problem(shard, counts)
        if problem:
            raise ValueError(problem)
        return self.reduce_shard(shard, counts, connect(None), generator)

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        """Multiply-adds that grow faster than the item's tokens; 0 for methods whose work is linear."""
        return 0.0

    def problem(self, shard: TokenShard, counts: Sequence[int]) -> str | None:
        """Why these rows cannot be reduced, in one line, or None. Looks at this rank only and sends nothing."""
        missing = sorted(self.needs - set(shard.channels))
        if missing:
            return (
                f"{self.name} needs the channels {', '.join(sorted(self.needs))}; the tokens lack {', '.join(missing)}"
            )
        return refuse_work(self, shard, counts)

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
    if not finite(shard.x):
        return f"{method.name} compares features and x holds NaN or infinity; look at the encoder or the dtype"
    return None


def refuse_work(method: Reducer, shard: TokenShard, counts: Sequence[int]) -> str | None:
    """For methods whose work outgrows the tokens: an hour of video at once would run for days."""
    for item, (grid, count) in enumerate(zip(shard.grid, counts)):
        work = method.work(grid, count, shard.x.shape[1])
        if work > MAX_WORK:
            t, h, w = grid
            frames = max(1, min(t, 8192 // (h * w)))
            also = f", or two_level(method, {frames})" if method.flat else ""
            return (
                f"{method.name} of item {item} with {t * h * w} tokens to {count} needs about {work:.1e} multiply-adds (some "
                f"{work / CORE_RATE / 3600:.1f} hours of one core), which grow faster than the tokens; at most {MAX_WORK:.0e} are "
                f"done at once; cut the video: "
                f"reduce_stream(method, windows of {frames} frames, budget), or --window {frames}{also}"
            )
    return None
