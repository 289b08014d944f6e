"""A run of query positions against many runs of key positions, without looking at each of them.

Where both the first and the last positions of the key runs ascend, those that a band forbids, cuts and allows whole lie side
by side, and are found by bisection. Only the runs that the band cuts are looked at one by one:

    key runs       . . . . # # # # # # / / / . . .        . forbidden   / cut   # allowed whole: one tile
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from tokenring.segments import Segment, Tile, band_tile


@dataclass(frozen=True, slots=True)
class Ascending:
    """Runs whose first positions ascend and whose last positions ascend; `rows[i]` is the first row of run i."""

    runs: tuple[Segment, ...]
    firsts: tuple[int, ...]
    lasts: tuple[int, ...]
    row: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.row[-1]


def ascending(runs: Sequence[Segment]) -> list[Ascending]:
    """Runs, none empty, cut into the fewest lists that ascend; their order is kept."""
    lists: list[list[Segment]] = []
    for run in runs:
        if lists and run.start >= lists[-1][-1].start and run.last >= lists[-1][-1].last:
            lists[-1].append(run)
        else:
            lists.append([run])
    return [
        Ascending(
            tuple(some),
            tuple(r.start for r in some),
            tuple(r.last for r in some),
            tuple(accumulate((r.count for r in some), initial=0)),
        )
        for some in lists
    ]


def run_tiles(q: Segment, k: Ascending, lower: int | None, upper: int | None) -> list[Tile]:
    """The tiles of one query run under lower <= key position - query position <= upper."""
    count = len(k.runs)
    first = 0 if lower is None else bisect_left(k.lasts, q.start + lower)
    stop = count if upper is None else bisect_right(k.firsts, q.last + upper)
    whole = max(first, 0 if lower is None else bisect_left(k.firsts, q.last + lower))
    whole_stop = min(stop, count if upper is None else bisect_right(k.lasts, q.start + upper))
    if whole >= whole_stop:
        whole = whole_stop = first
    tiles = [Tile(0, q.count, k.row[whole], k.row[whole_stop])] if whole < whole_stop else []
    for index in (*range(first, whole), *range(whole_stop, stop)):
        tiles += [t.shift(0, k.row[index]) for t in _cut_tiles(q, k.runs[index], lower, upper)]
    return tiles


def _cut_tiles(q: Segment, k: Segment, lower: int | None, upper: int | None) -> list[Tile]:
    """Runs of different strides have no band: the one with fewer rows falls apart into single rows, which take any stride."""
    if q.count == 1 or k.count == 1 or q.stride == k.stride:
        stride = k.stride if q.count == 1 else q.stride
        tile = band_tile(replace(q, stride=stride), replace(k, stride=stride), lower, upper)
        return [tile] if tile else []
    tiles: list[Tile] = []
    for row in range(min(q.count, k.count)):
        if q.count <= k.count:
            tiles += [t.shift(row, 0) for t in _cut_tiles(q.cut(row, row + 1), k, lower, upper)]
        else:
            tiles += [t.shift(0, row) for t in _cut_tiles(q, k.cut(row, row + 1), lower, upper)]
    return tiles
