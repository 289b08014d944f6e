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

    def inside(self, start: int, stop: int) -> list[tuple[Ascending, int]]:
        """The runs cut to positions start..stop-1: lists of neighbouring rows, each with the row that its first one is."""
        if not self.runs or (start <= self.firsts[0] and stop > self.lasts[-1]):
            return [(self, 0)]
        found: list[tuple[list[Segment], int]] = []
        end = -1
        for index in range(bisect_left(self.lasts, start), bisect_left(self.firsts, stop)):
            first, last = self.runs[index].inside(start, stop)
            if first == last:
                continue
            row, part = self.row[index] + first, self.runs[index].cut(first, last)
            # Runs of a stride above 1 may lie among each other: cut to one range they need not ascend any more.
            if row != end or part.start < found[-1][0][-1].start or part.last < found[-1][0][-1].last:
                found.append(([], row))
            found[-1][0].append(part)
            end = self.row[index] + last
        return [(_ascending(runs), row) for runs, row in found]


def ascending(runs: Sequence[Segment]) -> list[Ascending]:
    """Runs, none empty, cut into the fewest lists that ascend; their order is kept."""
    lists: list[list[Segment]] = []
    for run in runs:
        if lists and run.start >= lists[-1][-1].start and run.last >= lists[-1][-1].last:
            lists[-1].append(run)
        else:
            lists.append([run])
    return [_ascending(some) for some in lists]


def _ascending(runs: Sequence[Segment]) -> Ascending:
    rows = tuple(accumulate((r.count for r in runs), initial=0))
    return Ascending(tuple(runs), tuple(r.start for r in runs), tuple(r.last for r in runs), rows)


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
