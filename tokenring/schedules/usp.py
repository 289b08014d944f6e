"""Ulysses by heads inside a group, a ring of keys and values between groups (DeepSpeed Ulysses; USP, arXiv 2405.07719).

    usp:2x2, 4 heads    rank 0        rank 1        rank 2        rank 3
    held                rows 0        rows 1        rows 2        rows 3        all heads
    after the exchange  rows 01 h01   rows 01 h23   rows 23 h01   rows 23 h23
    ring                keys of 01 h01 pass between ranks 0 and 2, those of h23 between ranks 1 and 3

The first exchanges turn "my rows, all heads" into "the rows of my group, my heads"; the rows lie in global order, so that a
zigzag is one causal tile again. Keys go first, because the ring waits for them; queries follow while the ring moves.
Results go straight home. `ulysses` is usp:Nx1. Query heads may be fewer than the ranks or not divide by them: ranges are
uneven then, or empty, and key heads go to all that need them. A range that is no whole number of key groups is computed as
up to three.
Sent per rank, full mask, U dividing Hkv: forward (U-1)/U (2Q + L + KV) + (R-1) KV; backward
(U-1)/U (3Q + 2L + 2 KV) + 2 (R-1) KV.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from tokenring.problem import QUERY_KINDS, Problem
from tokenring.schedules.heads import blocks, head_range, heads_of
from tokenring.schedules.paths import attend, carried, in_order, united, wanted_by
from tokenring.step import Compute, Slot, Step, Sum, Transfer, pieces


@dataclass(frozen=True)
class Usp:
    """The builder of usp:UxR, and of ulysses (R = 1)."""

    u: int
    r: int

    def __call__(self, problem: Problem, rank: int) -> tuple[Step, ...]:
        """One rank's steps: the keys' exchange, R of compute, and one to merge what came home."""
        first, *rounds = _rounds(self, problem, rank)
        keys = _spread(problem, rank, "kv", _keys(self, problem, rank // self.u, 0), self)
        queries = _spread(problem, rank, "q", _queries(self, problem, rank // self.u), self)
        first = replace(
            first,
            sends=(*first.sends[:2], queries.sends[0]),
            receives=(*first.receives[:2], queries.receives[0]),
            slots=first.slots + queries.slots,
            copies=first.copies + queries.copies,
        )
        return (keys, first, *rounds)


def _spread(problem: Problem, rank: int, what: str, whole: Slot, grid: Usp) -> Step:
    """Rows of the group and own heads take the place of own rows and all heads."""
    sends, receives, group = [], [], rank // grid.u
    own_heads = heads_of(problem, what, head_range(problem, grid.u, rank))
    for peer in _ranks(grid, group):
        leaving = tuple(p for p in whole.pieces if p.owner == rank)
        heads = heads_of(problem, what, head_range(problem, grid.u, peer))
        if leaving and heads[0] < heads[1]:
            sends.append(Transfer(rank, peer, whole.what, leaving, what, whole.name, heads))
        coming = tuple(p for p in whole.pieces if p.owner == peer)
        if coming and own_heads[0] < own_heads[1]:
            receives.append(Transfer(peer, rank, whole.what, coming, what, whole.name, own_heads))
    slots = (replace(whole, heads=own_heads),) if whole.rows and own_heads[0] < own_heads[1] else ()
    copies = tuple(t for t in sends if t.destination == rank)
    sends = tuple(t for t in sends if t.destination != rank)
    return Step((sends,), (tuple(t for t in receives if t.source != rank),), slots, copies)


def _rounds(grid: Usp, problem: Problem, rank: int) -> Iterator[Step]:
    group, own, home = rank // grid.u, [], []
    for t in range(grid.r):
        computes = [c for i in range(len(blocks(problem, grid.u, rank))) if (c := _compute(grid, problem, rank, t, i))]
        leaving = _leaving(grid, problem, rank, t)
        back = [x for slot in leaving for x in _transfers(rank, slot) if x.destination != rank]
        helpers = sorted({*_ranks(grid, group + t), *(_ranks(grid, group) if t == grid.r - 1 else ())})
        arriving = [
            (x, slot)
            for p in helpers
            if p != rank
            for slot in _leaving(grid, problem, p, t)
            for x in _transfers(p, slot)
            if x.destination == rank
        ]
        landing = [Slot(x.destination_slot, x.what, x.pieces, x.heads) for x, _ in arriving]
        ahead, behind, slots = _pass_on(grid, problem, rank, t)
        yield Step(
            (ahead, tuple(back)),
            (behind, tuple(x for x, _ in arriving)),
            (*slots, *landing, *(s for s, _ in own)),
            tuple(copy for _, copy in own),
            tuple(computes),
            _sums(grid, problem, rank, t),
            tuple(home),
        )
        own = [
            (Slot(x.destination_slot, x.what, x.pieces, x.heads), x)
            for slot in leaving
            for x in _transfers(rank, slot)
            if x.destination == rank
        ]
        home = [s.name for s, _ in own] + [s.name for s in landing]
    yield Step(slots=tuple(s for s, _ in own), copies=tuple(copy for _, copy in own), merges=tuple(home))


def _pass_on(grid: Usp, problem: Problem, rank: int, t: int) -> tuple[tuple, tuple, tuple[Slot, ...]]:
    """The keys and values of the group before, own heads: what leaves, what comes, its slot."""
    heads = heads_of(problem, "kv", head_range(problem, grid.u, rank))
    if t == grid.r - 1 or heads[0] == heads[1]:
        return (), (), ()
    ahead, behind = (rank + grid.u) % problem.world, (rank - grid.u) % problem.world
    group = rank // grid.u
    leaving, coming = _keys(grid, problem, group + 1, t + 1), _keys(grid, problem, group, t + 1)
    here = _keys(grid, problem, group, t).name
    sends = (Transfer(rank, ahead, "kv", leaving.pieces, here, leaving.name, heads),) if leaving.rows else ()
    receives = (Transfer(behind, rank, "kv", coming.pieces, here, coming.name, heads),) if coming.rows else ()
    return sends, receives, (replace(coming, heads=heads),) if coming.rows else ()


def _transfers(rank: int, slot: Slot) -> list[Transfer]:
    """A result's rows to their owners."""
    owners = sorted({p.owner for p in slot.pieces})
    rows = {owner: tuple(p for p in slot.pieces if p.owner == owner) for owner in owners}
    return [Transfer(rank, o, slot.what, rows[o], slot.name, f"{slot.name}:from{rank}", slot.heads) for o in owners]


def _leaving(grid: Usp, problem: Problem, rank: int, t: int) -> list[Slot]:
    """The results of a rank that are complete after round t."""
    slots: list[Slot] = []
    for index, heads in enumerate(blocks(problem, grid.u, rank)):
        compute = _compute(grid, problem, rank, t, index)
        if compute and problem.backward:
            slots.append(compute.results[1])
        if t == grid.r - 1 and (total := _total(grid, problem, rank // grid.u, t)):
            slots.append(Slot(f"{total.name}.{index}", total.what, total.pieces, heads))
    return slots


def _sums(grid: Usp, problem: Problem, rank: int, t: int) -> tuple[Sum, ...]:
    group = rank // grid.u
    before, after = _total(grid, problem, group, t - 1), _total(grid, problem, group, t)
    if before is None or after is None or before.name == after.name:
        return ()
    made = _group_compute(grid, problem, group, t).results[0].name
    return tuple(
        Sum(Slot(f"{after.name}.{i}", after.what, after.pieces, heads), (f"{before.name}.{i}", f"{made}.{i}"))
        for i, heads in enumerate(blocks(problem, grid.u, rank))
    )


@lru_cache(maxsize=4096)
def _total(grid: Usp, problem: Problem, group: int, t: int) -> Slot | None:
    """The group's query results after round t, all heads: a compute's where it is the first, else a sum."""
    if t < 0:
        return None
    before, compute = _total(grid, problem, group, t - 1), _group_compute(grid, problem, group, t)
    if compute is None or before is None:
        return before if compute is None else compute.results[0]
    return Slot(f"total{t}", before.what, united(problem, (before, compute.results[0])))


def _compute(grid: Usp, problem: Problem, rank: int, t: int, index: int) -> Compute | None:
    whole = _group_compute(grid, problem, rank // grid.u, t)
    if whole is None:
        return None
    heads = blocks(problem, grid.u, rank)[index]
    results = tuple(
        Slot(f"{s.name}.{index}", s.what, s.pieces, heads if s.what in QUERY_KINDS else problem.key_heads(heads))
        for s in whole.results
    )
    return replace(whole, results=results, heads=heads)


@lru_cache(maxsize=4096)
def _group_compute(grid: Usp, problem: Problem, group: int, t: int) -> Compute | None:
    """Round t of every rank of a group, all heads."""
    return attend(problem, _queries(grid, problem, group), _keys(grid, problem, group, t), t)


@lru_cache(maxsize=4096)
def _queries(grid: Usp, problem: Problem, group: int) -> Slot:
    """The queries of a group that have a key."""
    everyone = range(problem.world)
    rows = [p for o in _ranks(grid, group) for p in pieces(o, wanted_by(problem, "q", o, everyone))]
    return Slot("q:all", problem.queries, in_order(problem, "q", tuple(rows)))


@lru_cache(maxsize=4096)
def _keys(grid: Usp, problem: Problem, group: int, t: int) -> Slot:
    """The keys and values that a group holds in round t: of the group t before it, those that it or a later one wants."""
    rows = [p for o in _ranks(grid, group - t) for p in pieces(o, carried(problem, "kv", o, 1, t, size=grid.u))]
    return Slot(f"kv:{t}", "kv", in_order(problem, "kv", tuple(rows)))


def _ranks(grid: Usp, group: int) -> range:
    group %= grid.r
    return range(group * grid.u, (group + 1) * grid.u)
