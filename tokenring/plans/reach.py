"""Which positions each rank wants of the others, cell by cell of a mask, without cutting a single tile.

In a cell with one bound only the outermost position of a run matters: k <= q + upper holds for some q of a run if it does for
its last. With both bounds a run of queries wants the run of keys that its own bounds span, as long as its stride leaves no
hole. What many ranks want together is the union, a sorted list of ranges: few, because neighbours' ranges meet.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

from tokenring.layout import Layout
from tokenring.mask import END, Mask
from tokenring.plans.problem import Problem
from tokenring.segments import Range, Segment, Tile, row_band, union

Span = tuple[int, int, int, int]
"""A run of rows as (first row, its position, the last row's position, stride)."""


class Positions:
    """A set of positions: sorted disjoint ranges that do not touch."""

    __slots__ = ("starts", "stops")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        joined = union(ranges)
        self.starts, self.stops = [a for a, _ in joined], [b for _, b in joined]

    def ranges(self) -> Iterable[Range]:
        """In ascending order."""
        return zip(self.starts, self.stops)

    def add(self, others: Positions) -> None:
        """Take the positions of another set in."""
        starts, stops = self.starts, self.stops
        for start, stop in others.ranges():
            first, last = bisect_left(stops, start), bisect_right(starts, stop)
            if first == last:
                starts.insert(first, start)
                stops.insert(first, stop)
            elif last - first > 1 or start < starts[first] or stop > stops[first]:
                starts[first:last] = [min(start, starts[first])]
                stops[first:last] = [max(stop, stops[last - 1])]

    def rows(self, spans: Sequence[Span]) -> tuple[Range, ...]:
        """The rows of some runs that lie here, as sorted disjoint ranges that do not touch."""
        found: list[Range] = []
        starts, stops = self.starts, self.stops
        for row, start, last, stride in spans:
            for index in range(bisect_right(stops, start), bisect_right(starts, last)):
                first = row if starts[index] <= start else row - (start - starts[index]) // stride
                end = row + (min(last, stops[index] - 1) - start) // stride + 1
                if first >= end:
                    continue
                if found and found[-1][1] == first:
                    first = found.pop()[0]
                found.append((first, end))
        return tuple(found)

    def split(self, spans: Sequence[Span]) -> tuple[list[Span], list[Span]]:
        """The parts of some runs that lie here, and those that do not; rows are counted from nothing in particular."""
        inside: list[Span] = []
        outside: list[Span] = []
        starts, stops = self.starts, self.stops
        for _, start, last, stride in spans:
            at = start
            for index in range(bisect_right(stops, start), bisect_right(starts, last)):
                first = at if starts[index] <= at else at - (at - starts[index]) // stride * stride
                end = at + (min(last, stops[index] - 1) - at) // stride * stride
                if first > end:
                    continue
                if at < first:
                    outside.append((0, at, first - stride, stride))
                inside.append((0, first, end, stride))
                at = end + stride
            if at <= last:
                outside.append((0, at, last, stride))
        return inside, outside


class Reach:
    """For the rows of one kind ("q" or "kv"): which positions of theirs each rank wants for its rows of the other kind."""

    def __init__(self, problem: Problem, what: str) -> None:
        self.layout = problem.layout("kv" if what == "q" else "q")
        self.cells, self.starts, self.stops, narrowest = _cells(problem.mask, what == "q")
        self.exact = _widest_step(self.layout) <= narrowest
        """Whether ranges say it all: no query's keys lie apart from the next one's in its run."""
        self.known: dict[Range, Positions] = {}

    def by(self, first: int, stop: int) -> Positions:
        """What any of the ranks first..stop-1 wants. Not to be changed."""
        found = self.known.get((first, stop))
        if found is None:
            middle = (first + stop) // 2
            parts = (self.by(first, middle).ranges(), self.by(middle, stop).ranges()) if stop - first > 1 else ()
            found = Positions(r for part in parts for r in part) if parts else Positions(self._of(first))
            self.known[(first, stop)] = found
        return found

    def between(self, rank: int, runs: Sequence[Segment]) -> tuple[Range, ...] | None:
        """The rows of some runs that a rank wants, run by run: exact with holes too. None where strides differ."""
        found: list[Range] = []
        for cell, mine in self._cut(rank):
            row = 0
            for run in runs:
                first, last = run.inside(cell.k_start, cell.k_stop)
                if first < last:
                    rows = _banded(mine, run.cut(first, last), cell)
                    if rows is None:
                        return None
                    found.append((row + first + rows[0], row + first + rows[1]))
                row += run.count
        return union(found)

    def _of(self, rank: int) -> Iterable[Range]:
        return (_wanted(cell, run.start, run.last) for cell, run in self._cut(rank))

    def _cut(self, rank: int) -> Iterator[tuple[Tile, Segment]]:
        """A rank's rows of the other kind, cut to the cells that hold them."""
        for run in self.layout.segments(rank):
            for index in range(bisect_right(self.stops, run.start), bisect_right(self.starts, run.last)):
                cell = self.cells[index]
                first, last = run.inside(cell.q_start, cell.q_stop)
                if first < last:
                    yield cell, run.cut(first, last)


@lru_cache(maxsize=64)
def reach(problem: Problem, what: str) -> Reach:
    """The table of a problem."""
    return Reach(problem, what)


@lru_cache(maxsize=8192)
def spans(layout: Layout, rank: int) -> tuple[Span, ...]:
    """The runs of a rank's rows."""
    rows = accumulate((run.count for run in layout.runs[rank]), initial=0)
    return tuple((row, run.start, run.last, run.stride) for row, run in zip(rows, layout.runs[rank]))


@lru_cache(maxsize=4096)
def positions_wanted(problem: Problem, what: str, ranks: range) -> Positions:
    """What any of some ranks wants, where that is exact. Not to be changed."""
    table = reach(problem, what)
    if ranks.step == 1 and 0 <= ranks.start < ranks.stop <= problem.world:
        return table.by(ranks.start, ranks.stop)
    return Positions(r for rank in ranks for r in table.by(rank % problem.world, rank % problem.world + 1).ranges())


@lru_cache(maxsize=64)
def _cells(mask: Mask, turned: bool) -> tuple[list[Tile], list[int], list[int], int]:
    """Cells by first query, with queries and keys swapped if turned: they, where they start, how far those up to each reach,
    and how many keys in a row a query of the narrowest two-sided one wants."""
    cells = sorted(map(_turned, mask.cells) if turned else mask.cells, key=lambda cell: cell.q_start)
    stops = list(accumulate((cell.q_stop for cell in cells), max))
    narrowest = min((c.upper - c.lower + 1 for c in cells if None not in (c.lower, c.upper)), default=END)
    return cells, [cell.q_start for cell in cells], stops, narrowest


def _turned(cell: Tile) -> Tile:
    """The cell with queries and keys in each other's place."""
    lower, upper = None if cell.upper is None else -cell.upper, None if cell.lower is None else -cell.lower
    return Tile(cell.k_start, cell.k_stop, cell.q_start, cell.q_stop, lower, upper, cell.batch)


@lru_cache(maxsize=256)
def _widest_step(layout: Layout) -> int:
    return max((run.stride for rank in layout.runs for run in rank if run.count > 1), default=0)


def _wanted(cell: Tile, first: int, last: int) -> Range:
    start = cell.k_start if cell.lower is None else max(cell.k_start, first + cell.lower)
    stop = cell.k_stop if cell.upper is None else min(cell.k_stop, last + cell.upper + 1)
    return start, max(start, stop)


def _banded(q: Segment, k: Segment, cell: Tile) -> Range | None:
    """The rows of one run that some row of another wants under the band of a cell; None where their strides differ."""
    if q.stride != k.stride:
        if q.count > 1 and k.count > 1:
            return None
        stride = k.stride if q.count == 1 else q.stride
        q, k = Segment(q.start, q.count, stride), Segment(k.start, k.count, stride)
    low, high = row_band(q, k, cell.lower, cell.upper)
    if low is not None and high is not None and low > high:
        return 0, 0
    start = 0 if low is None else max(0, low)
    return start, max(start, k.count if high is None else min(k.count, q.count + high))
