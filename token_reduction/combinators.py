"""Methods made of methods: segment by segment, one after another, and the two-level form of a global method.

    Segments(m, 16)       every run of 16 frames is an item of its own; Segments(m, 1): every frame
    Then(a, b, widen)     a keeps `widen` times the budget, b chooses among these
    two_level(m, 16)      Then(Segments(m, 16), m): local choice, then the same choice among what is left

A combination is a method like any other: exact counts, ragged batches, any world. Segments are cut by frame numbers and not by
ranks, so the two-level form keeps the same tokens on every world; segments that lie whole on a rank are chosen there, and only
their offers travel for the second choice. It is not the global method's choice: what a segment did not offer cannot come back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from token_reduction.borrow import Borrow
from token_reduction.budget import Budget, apportion
from token_reduction.options import COUNT, Limits
from token_reduction.reducer import Reducer
from token_reduction.reduction import Reduction
from token_reduction.tokens import TokenShard, take_channels, text_of
from token_reduction.unit_reducer import UnitReducer, refuse_channels
from tokenring.transport import Transport


@dataclass(frozen=True, kw_only=True)
class Segments(Reducer):
    """A method on every run of `frames` frames by itself; the last run of an item may be shorter.

    The item's count is shared over its runs in proportion to their length, by largest remainder.

    Args:
        method: any that keeps every count it is asked for (`pool` and `downsample` do not).
        frames: of a run.

    >>> from token_reduction import Budget, VisualTokens, build
    >>> tokens = VisualTokens(torch.ones(20, 2), [0, 20], [(5, 2, 2)], torch.arange(20)[None])
    >>> Segments(method=build("uniform"), frames=2).reduce(tokens, Budget.count(5)).index
    tensor([ 2,  6, 10, 14, 18])
    """

    method: Reducer
    frames: int = 16
    cost: ClassVar[str] = "that of the method on a run, times the runs"
    source: ClassVar[str] = "combination"
    form: ClassVar[str] = "ours"

    limits: ClassVar[Limits] = {"frames": COUNT}

    def __post_init__(self) -> None:
        _refuse_other(method=self.method)
        super().__post_init__()

    @property
    def name(self) -> str:
        return f"{self.method.name}/{self.frames}"

    @property
    def needs(self) -> frozenset[str]:
        return self.method.needs

    @property
    def wants(self) -> frozenset[str]:
        return self.method.wants

    @property
    def text_space(self) -> str:
        return self.method.text_space

    @property
    def merges(self) -> bool:
        return self.method.merges

    @property
    def adaptive(self) -> bool:
        return self.method.adaptive

    def grids(self, item: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        """The runs of an item."""
        t, h, w = item
        return [(min(self.frames, t - first), h, w) for first in range(0, t, self.frames)] or [item]

    def shares(self, item: tuple[int, int, int], count: int) -> list[int]:
        """Tokens of each run."""
        grids = self.grids(item)
        lengths = [math.prod(grid) for grid in grids]
        shares = apportion(count, lengths, lengths)
        for grid, share in zip(grids, shares):
            if share and self.method.count([grid], Budget.count(share))[0] != share:
                raise ValueError(
                    f"{self.method.name} does not keep {share} tokens of a run {grid}; it cannot go by segments"
                )
        return shares

    def item_count(self, item: tuple[int, int, int], budget: Budget) -> int:
        return sum(self.shares(item, super().item_count(item, budget)))

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return sum(self.method.work(g, n, width) for g, n in zip(self.grids(item), self.shares(item, count)))

    def problem(self, shard: TokenShard, counts: Sequence[int]) -> str | None:
        return super().problem(shard, counts) or self.method.problem(*self.cut(shard, counts))

    def cut(self, shard: TokenShard, counts: Sequence[int]) -> tuple[TokenShard, list[int]]:
        """The same rows with runs as items, and the runs' counts."""
        grids = [self.grids(item) for item in shard.grid]
        flat = tuple(grid for part in grids for grid in part)
        offsets = torch.tensor([0, *(math.prod(grid) for grid in flat)]).cumsum(0)
        channels = dict(shard.channels)
        if "text" in channels:
            channels["text"] = [text_of(shard.channels, item) for item, part in enumerate(grids) for _ in part]
        shares = [share for item, count in zip(shard.grid, counts) for share in self.shares(item, count)]
        return TokenShard(shard.x, shard.global_index, offsets, flat, shard.positions, channels), shares

    def reduce_shard(
        self,
        shard: TokenShard,
        counts: Sequence[int],
        transport: Transport,
        generator: torch.Generator | None,
    ) -> Reduction:
        runs, shares = self.cut(shard, counts)
        result = self.method.reduce_shard(runs, shares, transport, generator)
        edges = torch.tensor([0, *(len(self.grids(item)) for item in shard.grid)]).cumsum(0)
        return replace(result, cu_seqlens=result.cu_seqlens[edges])


@dataclass(frozen=True, kw_only=True)
class Then(Reducer):
    """One method after another: W = W_second W_first.

    Args:
        first: keeps min(n, ceil(widen k)) rows of each item. On several ranks it has to prune; merging firsts run on one rank.
        second: keeps k of these; sees them as one line of rows without frames, so it must be a method that looks at no grid.
        widen: 1 and above.

    Scores: those of `first`.
    """

    first: Reducer
    second: Reducer
    widen: float = 2.0
    cost: ClassVar[str] = "that of the first on n tokens to widen k, and of the second on widen k to k"
    source: ClassVar[str] = "combination"
    form: ClassVar[str] = "ours"

    limits: ClassVar[Limits] = {"widen": COUNT}

    def __post_init__(self) -> None:
        _refuse_other(first=self.first, second=self.second)
        super().__post_init__()
        if not self.second.flat:
            raise ValueError(f"{self.second.name} looks at frames or places, which rows that were chosen before have lost; "
                             "give a second method that looks at rows alone")  # fmt: skip
        if self.first.adaptive:
            raise ValueError(f"the first method must keep exact counts, got {self.first!r}")

    @property
    def name(self) -> str:
        return f"{self.first.name}>{self.second.name}"

    @property
    def needs(self) -> frozenset[str]:
        return self.first.needs | self.second.needs

    @property
    def wants(self) -> frozenset[str]:
        return self.first.wants | self.second.wants

    @property
    def text_space(self) -> str:
        return "x" if "x" in (self.first.text_space, self.second.text_space) else self.second.text_space

    @property
    def merges(self) -> bool:
        return self.first.merges or self.second.merges

    @property
    def adaptive(self) -> bool:
        return self.second.adaptive

    def wide(self, item: tuple[int, int, int], count: int) -> int:
        """Rows that the first keeps."""
        wide = min(math.prod(item), math.ceil(self.widen * count))
        return self.first.count([item], Budget.count(wide))[0] if wide else 0

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        wide = self.wide(item, count)
        return self.first.work(item, wide, width) + self.second.work((1, 1, wide), count, width)

    def problem(self, shard: TokenShard, counts: Sequence[int]) -> str | None:
        wide = [self.wide(item, count) for item, count in zip(shard.grid, counts)]
        problem = super().problem(shard, counts) or self.first.problem(shard, wide)
        if problem is None and isinstance(self.second, UnitReducer):
            problem = refuse_channels(self.second, shard)
        if problem is None and self.first.merges and shard.x.shape[0] != shard.total:
            return f"{self.name}: {self.first.name} merges, which comes first on one rank only; let a method that prunes come first"
        return problem

    def reduce_shard(
        self,
        shard: TokenShard,
        counts: Sequence[int],
        transport: Transport,
        generator: torch.Generator | None,
    ) -> Reduction:
        wide = [self.wide(item, count) for item, count in zip(shard.grid, counts)]
        one = self.first.reduce_shard(shard, wide, transport, generator)
        kept = torch.cat(transport.all_gather(one.global_index)).sort().values
        middle = TokenShard(
            one.apply(shard.x),
            torch.searchsorted(kept, one.global_index),
            torch.tensor([0, *wide]).cumsum(0),
            tuple((1, 1, rows) if rows else (0, 1, 1) for rows in wide),
            one.apply_positions(shard.positions),
            _applied(one, shard.channels),
        )
        two = self.second.reduce_shard(middle, counts, transport, generator)
        return one.then(two) if self.first.merges else _behind(one, two)


def two_level(method: Reducer, frames: int = 16, widen: float = 2.0) -> Then:
    """The two-level form of a global method: every run of `frames` frames offers `widen` times its share by the method, and the
    method chooses among all offers.

    >>> from token_reduction import Budget, VisualTokens, build
    >>> x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    >>> tokens = VisualTokens(x, [0, 64], [(4, 4, 4)], torch.arange(64)[None])
    >>> two_level(build("divprune"), frames=2).reduce(tokens, Budget.count(5)).index.numel()
    5
    """
    return Then(first=Segments(method=method, frames=frames), second=method, widen=widen)


def _refuse_other(**given: Any) -> None:
    for name, method in given.items():
        if not isinstance(method, Reducer):
            raise ValueError(f"{name} is {method!r}; give a method, such as build('divprune')")


def _applied(one: Reduction, channels: Any) -> dict[str, Any]:
    planes = {name: value for name, value in channels.items() if name != "text"}
    made = {
        name: one.apply(value) if isinstance(value, Tensor) else [one.apply(part) for part in value]
        for name, value in planes.items()
    } if one.borrow is not None or not one.one_hot else take_channels(planes, one.index)  # fmt: skip
    return made | ({"text": channels["text"]} if "text" in channels else {})


def _behind(one: Reduction, two: Reduction) -> Reduction:
    """W_two W_one where W_one is one-hot: the second's rows and sources, in the numbers of what the first was given."""
    borrow = two.borrow
    if borrow is not None:
        borrow = Borrow(borrow.transport, [one.index[sent] for sent in borrow.sends], borrow.places, borrow.count)
    own = two.source < two.sources
    source = torch.where(own, one.index[two.source.clamp(max=max(0, two.sources - 1))] if two.sources else two.source,
                         two.source - two.sources + one.sources)  # fmt: skip
    return replace(
        two,
        index=one.index[two.index],
        source=source,
        sources=one.sources,
        scores=one.scores,
        global_index=one.global_index[two.index],
        borrow=borrow,
    )
