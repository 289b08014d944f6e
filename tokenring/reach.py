"""Which positions some neighbouring ranks want of the others, cell by cell of a mask, without cutting a single tile.

In a cell with one bound only the outermost position matters: k <= q + upper holds for some q of the ranks if it does for their
last. With both bounds a run of queries wants the run of keys that its own bounds span, as long as its stride leaves no hole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate

import torch

from tokenring.mask import END
from tokenring.problem import Problem
from tokenring.segments import Range, Segment, Tile, union


class Reach:
    """For the rows of one kind ("q" or "kv"): what the other kind's rows of some ranks want of them."""

    def __init__(self, problem: Problem, what: str) -> None:
        layout = problem.layout("kv" if what == "q" else "q")
        self.world = problem.world
        self.cells = [_turned(cell) if what == "q" else cell for cell in problem.mask.cells]
        """Rows of the cells: the others' positions; keys: those of `what`."""
        self.sets_exact = all(None in (cell.lower, cell.upper) for cell in self.cells)
        """Whether `over` may ask for several ranks at once."""
        self.exact = _widest_step(layout.runs) <= _narrowest(self.cells)
        """Whether `over` answers at all."""
        self.cells.sort(key=lambda cell: cell.q_start)
        self.starts = [cell.q_start for cell in self.cells]
        self.stops = list(accumulate((cell.q_stop for cell in self.cells), max))
        self.runs: list[dict[int, list[Segment]]] = [{} for _ in self.cells]
        firsts, lasts = ([[end] * self.world for _ in self.cells] for end in (END, -1))
        for rank in range(self.world if self.exact else 0):
            for run in layout.segments(rank):
                self._place(run, rank, firsts, lasts)
        shape = (len(self.cells), self.world)
        self.firsts, self.lasts = (torch.tensor(table, dtype=torch.int64).view(shape) for table in (firsts, lasts))

    def _place(self, run: Segment, rank: int, firsts: list[list[int]], lasts: list[list[int]]) -> None:
        for index in range(bisect_right(self.stops, run.start), bisect_right(self.starts, run.last)):
            cell = self.cells[index]
            first, last = run.inside(cell.q_start, cell.q_stop)
            if first < last:
                part = run.cut(first, last)
                self.runs[index].setdefault(rank, []).append(part)
                firsts[index][rank] = min(firsts[index][rank], part.start)
                lasts[index][rank] = max(lasts[index][rank], part.last)

    def over(self, first: int, count: int) -> tuple[Range, ...]:
        """The positions that any of `count` ranks from `first` on wants, round the ring."""
        stop, over = first + count, max(0, first + count - self.world)
        parts = [slice(first, stop)] + ([slice(0, over)] if over else [])
        firsts = torch.cat([self.firsts[:, part] for part in parts], dim=1).amin(dim=1).tolist()
        lasts = torch.cat([self.lasts[:, part] for part in parts], dim=1).amax(dim=1).tolist()
        found: list[Range] = []
        for index, (cell, start, last) in enumerate(zip(self.cells, firsts, lasts)):
            if last < 0:
                continue
            if None in (cell.lower, cell.upper):
                found.append(_wanted(cell, start, last))
            else:
                found += [_wanted(cell, run.start, run.last) for run in self.runs[index][first]]
        return union(found)


@lru_cache(maxsize=64)
def reach(problem: Problem, what: str) -> Reach:
    """The table of a problem."""
    return Reach(problem, what)


@lru_cache(maxsize=65536)
def wanted_positions(problem: Problem, what: str, first: int, count: int) -> tuple[Range, ...]:
    """`Reach.over`, remembered."""
    return reach(problem, what).over(first, count)


def rows_at(runs: tuple[Segment, ...], positions: tuple[Range, ...]) -> tuple[Range, ...]:
    """The rows of some runs, in order, that lie at some sorted disjoint positions."""
    found, row = [], 0
    starts, stops = [a for a, _ in positions], [b for _, b in positions]
    for run in runs:
        for start, stop in positions[bisect_right(stops, run.start) : bisect_right(starts, run.last)]:
            first, last = run.inside(start, stop)
            found.append((row + first, row + last))
        row += run.count
    return union(found)


def _turned(cell: Tile) -> Tile:
    """The cell with queries and keys in each other's place."""
    lower, upper = (None if x is None else -x for x in (cell.upper, cell.lower))
    return Tile(cell.k_start, cell.k_stop, cell.q_start, cell.q_stop, lower, upper, cell.batch)


def _widest_step(runs: Iterable[Iterable[Segment]]) -> int:
    return max((run.stride for rank in runs for run in rank if run.count > 1), default=0)


def _narrowest(cells: Iterable[Tile]) -> int:
    """How many keys in a row a query of the narrowest two-sided cell wants."""
    return min((c.upper - c.lower + 1 for c in cells if None not in (c.lower, c.upper)), default=END)


def _wanted(cell: Tile, first: int, last: int) -> Range:
    start = cell.k_start if cell.lower is None else max(cell.k_start, first + cell.lower)
    stop = cell.k_stop if cell.upper is None else min(cell.k_stop, last + cell.upper + 1)
    return start, max(start, stop)
