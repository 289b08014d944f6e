"""Mesh: a x b tiles, the family between TokenRing (a = N) and the ring (b = N) (Mesh-Attention).

    mesh:2x3      KV group 0   KV group 1        rank r = a y + x is in query group y (its a neighbours) and in
    queries 0         0            1             key group x (every a-th rank); it computes the queries of its
    queries 1         2            3             query group on the keys of its key group
    queries 2         4            5

On step t a rank hands its queries to the t-th next of its query group and its keys and values to the t-th next of its key
group, and computes every pair that is new. Partials of others' rows are summed here, then go straight home, once.
Sent per rank, full mask: forward (a-1)(Q + O + L) + (b-1) KV, backward (a-1)(2Q + 2L + dQ) + (b-1)(KV + dKV); a = sqrt(N/g) is best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokenring.plans.problem import Problem
from tokenring.plans.step import Compute, Slot, Step, Sum, Transfer
from tokenring.schedules.paths import attend, block, wanted_by


@dataclass(frozen=True)
class Mesh:
    """The builder of mesh:AxB."""

    a: int
    b: int

    def __call__(self, problem: Problem, rank: int) -> tuple[Step, ...]:
        """One rank's steps: max(a, b) of them, and one to merge the last returns."""
        return tuple(_Grid(self.a, self.b, problem, rank).steps())


@dataclass(frozen=True)
class _Axis:
    """One kind of rows and the ranks that exchange them: rank `members[at]` is this one."""

    what: str
    kind: str
    result: str
    members: range
    at: int

    def next(self, distance: int) -> int:
        return self.members[(self.at + distance) % len(self.members)]


class _Grid:
    def __init__(self, a: int, b: int, problem: Problem, rank: int) -> None:
        self.problem, self.rank, self.a, self.b = problem, rank, a, b
        x, y = rank % a, rank // a
        self.q = _Axis("q", problem.queries, problem.query_result, range(y * a, y * a + a), x)
        self.kv = _Axis("kv", "kv", "dkv", range(x, a * b, a), y)

    def steps(self) -> Iterator[Step]:
        last, home = max(self.a, self.b) - 1, ()
        for t in range(last + 1):
            sends, receives, slots = [], [], []
            for axis in (self.q, self.kv):
                if t + 1 < len(axis.members):
                    self._exchange(axis, t + 1, sends, receives, slots)
            computes = [c for d, e in self._new_pairs(t) if (c := self._compute(d, e))]
            sums, back, coming, landing = [], [], [], []
            for axis, other in ((self.q, self.a), (self.kv, self.b)):
                across = self.b if axis is self.q else self.a
                for d in range(1, other):
                    if t == max(d, across - 1) and (axis is self.q or self.problem.backward):
                        self._return(axis, d, sums, back, coming, landing)
            yield Step(
                (tuple(sends), tuple(back)),
                (tuple(receives), tuple(coming)),
                (*slots, *landing),
                computes=tuple(computes),
                sums=tuple(sums),
                merges=(*self._own(computes), *home),
            )
            home = tuple(slot.name for slot in landing)
        yield Step(merges=home)

    def _new_pairs(self, t: int) -> list[tuple[int, int]]:
        return [(d, e) for d in range(min(t + 1, self.a)) for e in range(min(t + 1, self.b)) if max(d, e) == t]

    def _across(self, axis: _Axis, rank: int) -> range:
        """The ranks whose other kind of rows meet those of `axis` on a rank."""
        return range(rank % self.a, self.a * self.b, self.a) if axis is self.q else self._row(rank)

    def _row(self, rank: int) -> range:
        return range(rank // self.a * self.a, rank // self.a * self.a + self.a)

    def _slot(self, axis: _Axis, distance: int, rank: int, owner: int) -> Slot:
        """What `rank` holds of `owner`, which is `distance` before it."""
        if distance == 0:
            return self.problem.own(axis.what, rank)
        rows = wanted_by(self.problem, axis.what, owner, self._across(axis, rank))
        return block(axis.kind, f"{axis.what}{distance}", owner, rows)

    def _exchange(self, axis: _Axis, distance: int, sends: list, receives: list, slots: list) -> None:
        to, source = axis.next(distance), axis.next(-distance)
        leaving = self._slot(axis, distance, to, self.rank)
        arriving = self._slot(axis, distance, self.rank, source)
        if leaving.rows:
            sends.append(Transfer(self.rank, to, axis.kind, leaving.pieces, axis.what, leaving.name))
        if arriving.rows:
            receives.append(Transfer(source, self.rank, axis.kind, arriving.pieces, axis.what, arriving.name))
            slots.append(arriving)

    def _compute(self, d: int, e: int) -> Compute | None:
        q = self._slot(self.q, d, self.rank, self.q.next(-d))
        kv = self._slot(self.kv, e, self.rank, self.kv.next(-e))
        return attend(self.problem, q, kv, f"{d}.{e}")

    def _own(self, computes: list[Compute]) -> list[str]:
        own = [result for compute in computes for result in compute.results]
        return [result.name for result in own if all(p.owner == self.rank for p in result.pieces)]

    def _return(self, axis: _Axis, d: int, sums: list, sends: list, receives: list, slots: list) -> None:
        """The partials of the rows that came over distance d leave as one sum; that of this rank's own comes back."""
        owner, helper = axis.next(-d), axis.next(d)
        name, home = f"sum:{axis.result}{d}", f"home:{axis.result}{d}"
        here, there = self._across(axis, self.rank), self._across(axis, helper)
        leaving = block(axis.result, name, owner, wanted_by(self.problem, axis.what, owner, here))
        coming = block(axis.result, home, self.rank, wanted_by(self.problem, axis.what, self.rank, there))
        if leaving.rows:
            sums.append(Sum(leaving, self._partials(axis, d)))
            sends.append(Transfer(self.rank, owner, axis.result, leaving.pieces, name, home))
        if coming.rows:
            receives.append(Transfer(helper, self.rank, axis.result, coming.pieces, name, home))
            slots.append(coming)

    def _partials(self, axis: _Axis, d: int) -> tuple[str, ...]:
        pairs = [(d, e) for e in range(self.b)] if axis is self.q else [(e, d) for e in range(self.a)]
        made = [c for pair in pairs if (c := self._compute(*pair))]
        return tuple(result.name for c in made for result in c.results if result.what == axis.result)
