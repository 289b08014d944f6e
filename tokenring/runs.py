"""A run of query positions against many runs of key positions, without looking at each of them.

Where both the first and the last positions of the key runs ascend, those that a band forbids, cuts and allows whole lie side
by side, and are found by bisection. Only the runs that the band cuts are looked at one by one:

    key runs       . . . . # # # # # # / / / . . .        . forbidden   / cut   # allowed whole: one tile
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from tokenring.segments import Range, Segment, Tile, band_tile, row_band, trimmed


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


def cell_tiles(q: Segment, q_row: int, rows: Range, groups: list[tuple[Ascending, int]], cell: Tile) -> Iterator[Tile]:
    """The tiles of some rows of a query run, which starts at row `q_row`, under one cell of a mask.

    groups: the key runs, each with the row that it starts at.
    """
    for group, k_row in groups:
        inside = range(bisect_left(group.lasts, cell.k_start), bisect_left(group.firsts, cell.k_stop))
        if len(inside) == 1 and group.runs[inside[0]].stride == q.stride:
            k, k_start = group.runs[inside[0]], k_row + group.row[inside[0]]
            keys = k.inside(cell.k_start, cell.k_stop)
            low, high = row_band(q, k, cell.lower, cell.upper)
            tile = trimmed(
                q_row + rows[0],
                q_row + rows[1],
                k_start + keys[0],
                k_start + keys[1],
                None if low is None else low + k_start - q_row,
                None if high is None else high + k_start - q_row,
                cell.batch,
            )
            if tile is not None:
                yield tile
        elif inside:
            part = q.cut(*rows)
            for some, row in group.inside(cell.k_start, cell.k_stop):
                for tile in run_tiles(part, some, cell.lower, cell.upper):
                    yield tile.shift(q_row + rows[0], k_row + row).of(cell.batch)


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
        tile = band_tile(Segment(q.start, q.count, stride), Segment(k.start, k.count, stride), lower, upper)
        return [tile] if tile else []
    tiles: list[Tile] = []
    for row in range(min(q.count, k.count)):
        if q.count <= k.count:
            tiles += [t.shift(row, 0) for t in _cut_tiles(q.cut(row, row + 1), k, lower, upper)]
        else:
            tiles += [t.shift(0, row) for t in _cut_tiles(q, k.cut(row, row + 1), lower, upper)]
    return tiles
