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
from dataclasses import replace

from tokenring.plans.problem import QUERY_KINDS, Problem
from tokenring.plans.step import Compute, Slot, Step, Sum, Transfer
from tokenring.schedules.groups import (
    Grid,
    arrivals,
    finished,
    group_compute,
    group_keys,
    group_queries,
    group_ranks,
    group_total,
    shares_of,
    transfers,
)
from tokenring.schedules.heads import blocks, head_range, heads_of


class Usp(Grid):
    """The builder of usp:UxR, and of ulysses (R = 1)."""

    def __call__(self, problem: Problem, rank: int) -> tuple[Step, ...]:
        """One rank's steps: the keys' exchange, R of compute, and one to merge what came home."""
        first, *rounds = _rounds(self, problem, rank)
        keys = _spread(problem, rank, "kv", group_keys(self, problem, rank // self.u, 0), self)
        queries = _spread(problem, rank, "q", group_queries(self, problem, rank // self.u), self)
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
    sends, receives, shares = [], [], shares_of(whole)
    own_heads, leaving = heads_of(problem, what, head_range(problem, grid.u, rank)), shares.get(rank, ())
    for peer in group_ranks(grid, rank // grid.u):
        coming = shares.get(peer, ())
        heads = heads_of(problem, what, head_range(problem, grid.u, peer))
        if leaving and heads[0] < heads[1]:
            sends.append(Transfer(rank, peer, whole.what, leaving, what, whole.name, heads))
        if coming and own_heads[0] < own_heads[1]:
            receives.append(Transfer(peer, rank, whole.what, coming, what, whole.name, own_heads))
    slots = (replace(whole, heads=own_heads),) if whole.rows and own_heads[0] < own_heads[1] else ()
    copies = tuple(t for t in sends if t.destination == rank)
    sends = tuple(t for t in sends if t.destination != rank)
    return Step((sends,), (tuple(t for t in receives if t.source != rank),), slots, copies)


def _rounds(grid: Usp, problem: Problem, rank: int) -> Iterator[Step]:
    own, home = [], []
    for t in range(grid.r):
        computes = [c for i in range(len(blocks(problem, grid.u, rank))) if (c := _compute(grid, problem, rank, t, i))]
        leaving = [x for made in finished(grid, problem, rank, t) for x in transfers(rank, made)]
        arriving = list(arrivals(grid, problem, rank, t))
        landing = [_landing(x) for x in arriving]
        ahead, behind, slots = _pass_on(grid, problem, rank, t)
        yield Step(
            (ahead, tuple(x for x in leaving if x.destination != rank)),
            (behind, tuple(arriving)),
            (*slots, *landing, *(s for s, _ in own)),
            tuple(copy for _, copy in own),
            tuple(computes),
            _sums(grid, problem, rank, t),
            tuple(home),
        )
        own = [(_landing(x), x) for x in leaving if x.destination == rank]
        home = [s.name for s, _ in own] + [s.name for s in landing]
    yield Step(slots=tuple(s for s, _ in own), copies=tuple(copy for _, copy in own), merges=tuple(home))


def _pass_on(grid: Usp, problem: Problem, rank: int, t: int) -> tuple[tuple, tuple, tuple[Slot, ...]]:
    """The keys and values of the group before, own heads: what leaves, what comes, its slot."""
    heads = heads_of(problem, "kv", head_range(problem, grid.u, rank))
    if t == grid.r - 1 or heads[0] == heads[1]:
        return (), (), ()
    ahead, behind = (rank + grid.u) % problem.world, (rank - grid.u) % problem.world
    group = rank // grid.u
    leaving, coming = group_keys(grid, problem, group + 1, t + 1), group_keys(grid, problem, group, t + 1)
    here = group_keys(grid, problem, group, t).name
    sends = (Transfer(rank, ahead, "kv", leaving.pieces, here, leaving.name, heads),) if leaving.rows else ()
    receives = (Transfer(behind, rank, "kv", coming.pieces, here, coming.name, heads),) if coming.rows else ()
    return sends, receives, (replace(coming, heads=heads),) if coming.rows else ()


def _landing(x: Transfer) -> Slot:
    return Slot(x.destination_slot, x.what, x.pieces, x.heads)


def _sums(grid: Usp, problem: Problem, rank: int, t: int) -> tuple[Sum, ...]:
    group = rank // grid.u
    before, after = group_total(grid, problem, group, t - 1), group_total(grid, problem, group, t)
    if before is None or after is None or before.name == after.name:
        return ()
    made = group_compute(grid, problem, group, t).results[0].name
    return tuple(
        Sum(Slot(f"{after.name}.{i}", after.what, after.pieces, heads), (f"{before.name}.{i}", f"{made}.{i}"))
        for i, heads in enumerate(blocks(problem, grid.u, rank))
    )


def _compute(grid: Usp, problem: Problem, rank: int, t: int, index: int) -> Compute | None:
    whole = group_compute(grid, problem, rank // grid.u, t)
    if whole is None:
        return None
    heads = blocks(problem, grid.u, rank)[index]
    results = tuple(
        Slot(f"{s.name}.{index}", s.what, s.pieces, heads if s.what in QUERY_KINDS else problem.key_heads(heads))
        for s in whole.results
    )
    return replace(whole, results=results, heads=heads)
