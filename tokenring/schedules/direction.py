"""Which way round the ring less travels.

A row travels as far as the last rank that wants it, so what a block costs on a way is a sum over its rows of that many hops.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from tokenring.plans.problem import Problem
from tokenring.plans.reach import Reach, Span, reach, spans
from tokenring.schedules.paths import carried
from tokenring.segments import Range, rows_in

SAMPLED_OWNERS = 16


def direction(problem: Problem, what: str, size: int = 1) -> int:
    """+1 or -1: the way round on which less travels (over at most 16 owners, evenly spread); +1 where it is equal."""
    return _direction(problem.places, what, size)


@lru_cache(maxsize=1024)
def _direction(problem: Problem, what: str, size: int) -> int:
    owners = range(0, problem.world, -(-problem.world // SAMPLED_OWNERS))

    def volume(way: int) -> int:
        return sum(_volume(problem, what, owner, way, size) for owner in owners)

    return 1 if volume(1) <= volume(-1) else -1


def _volume(problem: Problem, what: str, owner: int, way: int, size: int) -> int:
    """Rows times hops of one block: each row counts the hops to the last node that wants it."""
    nodes, table = problem.world // size, reach(problem, what)
    if not table.exact:
        return sum(rows_in(carried(problem, what, owner, way, hop, None, size)) for hop in range(1, nodes))
    return _Farthest(table, owner // size, way, size, nodes).volume(spans(problem.layout(what), owner))


class _Farthest:
    """Finds the last node on a way that wants each row, by halving: nodes of which none wants a row are passed over at once."""

    def __init__(self, table: Reach, node: int, way: int, size: int, nodes: int) -> None:
        self.table, self.node, self.way, self.size, self.nodes = table, node, way, size, nodes
        self.total = 0

    def volume(self, rows: Iterable[Span]) -> int:
        left = list(rows)
        # Farthest first: down from the node before the owner, then down to the node after it; mirrored the other way.
        for part in ((0, self.node), (self.node + 1, self.nodes))[:: self.way]:
            left = self._visit(0, self.nodes, part, left)
        return self.total

    def _visit(self, first: int, stop: int, part: Range, rows: list[Span]) -> list[Span]:
        """Count the rows that a node of first..stop-1 among `part` wants; the others are given back."""
        if not rows or stop <= part[0] or first >= part[1]:
            return rows
        inside, outside = self.table.by(first * self.size, stop * self.size).split(rows)
        if stop - first == 1:
            hops = (first - self.node) * self.way % self.nodes
            self.total += hops * sum((last - start) // stride + 1 for _, start, last, stride in inside)
            return outside
        middle = (first + stop) // 2
        for half in ((middle, stop), (first, middle))[:: self.way]:
            inside = self._visit(*half, part, inside)
        return outside + inside
