"""The first and last position that any of some neighbouring ranks holds, in constant time: a sparse table over a layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from tokenring.layout import Layout

FAR = 1 << 62


class Extremes:
    """Levels of minima and maxima: entry r of level j is over ranks r..r + 2^j - 1."""

    def __init__(self, layout: Layout) -> None:
        shards = [[s for s in layout.segments(rank) if s.count] for rank in range(layout.world)]
        self.world = layout.world
        self.firsts = _levels([min((s.start for s in shard), default=FAR) for shard in shards], min)
        self.lasts = _levels([max((s.last for s in shard), default=-FAR) for shard in shards], max)

    def over(self, first: int, count: int) -> tuple[int, int] | None:
        """(first, last) position over `count` ranks from `first` on, round the ring; None where they hold nothing."""
        parts = [(first, min(count, self.world - first)), (0, count - (self.world - first))]
        found = [(_query(self.firsts, a, n, min), _query(self.lasts, a, n, max)) for a, n in parts if n > 0]
        start, last = min((a for a, _ in found), default=FAR), max((b for _, b in found), default=-FAR)
        return None if start > last else (start, last)


@lru_cache(maxsize=256)
def extremes(layout: Layout) -> Extremes:
    """The table of a layout."""
    return Extremes(layout)


def _levels(values: list[int], pick: Callable[[int, int], int]) -> list[list[int]]:
    levels = [values]
    while 2 * (width := 1 << (len(levels) - 1)) <= len(values):
        levels.append([pick(a, b) for a, b in zip(levels[-1], levels[-1][width:])])
    return levels


def _query(levels: list[list[int]], first: int, count: int, pick: Callable[[int, int], int]) -> int:
    level = count.bit_length() - 1
    return pick(levels[level][first], levels[level][first + count - (1 << level)])
