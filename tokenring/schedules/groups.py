"""The groups of a U x R grid: which rows a group holds in a round, what it computes, and whose rows the results are.

Every rank of a group holds the same rows, in its own heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from tokenring.plans.problem import Problem
from tokenring.plans.step import Compute, Piece, Slot, Transfer, pieces
from tokenring.schedules.heads import blocks
from tokenring.schedules.paths import all_carried, among, attend, carried, in_order, united, wanted_by
from tokenring.segments import Range

Shares = dict[int, tuple[Piece, ...]]
"""Pieces by owner."""

Result = tuple[str, str, Range | None, Shares]
"""A result's name, kind, heads and rows."""


@dataclass(frozen=True)
class Grid:
    """R groups of U ranks; rows are spread over a group by heads, and pass from group to group."""

    u: int
    r: int


def group_ranks(grid: Grid, group: int) -> range:
    """The ranks of a group, counted round."""
    group %= grid.r
    return range(group * grid.u, (group + 1) * grid.u)


@lru_cache(maxsize=4096)
def group_queries(grid: Grid, problem: Problem, group: int) -> Slot:
    """The queries of a group that have a key."""
    everyone = range(problem.world)
    rows = [p for o in group_ranks(grid, group) for p in pieces(o, wanted_by(problem, "q", o, everyone))]
    return Slot("q:all", problem.queries, in_order(problem, "q", tuple(rows)))


@lru_cache(maxsize=4096)
def group_keys(grid: Grid, problem: Problem, group: int, t: int) -> Slot:
    """The keys and values that a group holds in round t: of the group t before it, those that it or a later one wants."""
    rows = [p for o in group_ranks(grid, group - t) for p in pieces(o, carried(problem, "kv", o, 1, t, size=grid.u))]
    return Slot(f"kv:{t}", "kv", in_order(problem, "kv", tuple(rows)))


@lru_cache(maxsize=4096)
def group_compute(grid: Grid, problem: Problem, group: int, t: int) -> Compute | None:
    """Round t of every rank of a group, all heads."""
    return attend(problem, group_queries(grid, problem, group), group_keys(grid, problem, group, t), t)


@lru_cache(maxsize=4096)
def group_total(grid: Grid, problem: Problem, group: int, t: int) -> Slot | None:
    """The group's query results after round t, all heads: a compute's where it is the first, else a sum."""
    if t < 0:
        return None
    before, compute = group_total(grid, problem, group, t - 1), group_compute(grid, problem, group, t)
    if compute is None or before is None:
        return before if compute is None else compute.results[0]
    return Slot(f"total{t}", before.what, united(problem, (before, compute.results[0])))


def shares_of(slot: Slot) -> Shares:
    """A slot's pieces by owner, in the order of the owners."""
    shares: dict[int, list[Piece]] = {}
    for piece in slot.pieces:
        shares.setdefault(piece.owner, []).append(piece)
    return {owner: tuple(shares[owner]) for owner in sorted(shares)}


def finished(grid: Grid, problem: Problem, rank: int, t: int) -> Iterator[Result]:
    """The results of a rank that are complete after round t."""
    group = rank // grid.u
    keys = _key_shares(grid, problem, group, t) if problem.backward else {}
    total = group_total(grid, problem, group, t) if t == grid.r - 1 else None
    for index, heads in enumerate(blocks(problem, grid.u, rank)):
        if keys:
            yield f"dkv{t}.{index}", "dkv", problem.key_heads(heads), keys
        if total:
            yield f"{total.name}.{index}", total.what, heads, _total_shares(grid, problem, group)


def transfers(rank: int, made: Result, owners: Iterable[int] | None = None) -> list[Transfer]:
    """A result's rows to their owners, or to some."""
    name, what, heads, shares = made
    owners = shares if owners is None else [o for o in owners if o in shares]
    return [Transfer(rank, o, what, shares[o], name, f"{name}:from{rank}", heads) for o in owners]


def arrivals(grid: Grid, problem: Problem, rank: int, t: int) -> Iterator[Transfer]:
    """Results of this rank's own rows: of its group, and of the group that its keys and values have come to."""
    group, there = rank // grid.u, (rank // grid.u + t) % grid.r
    helpers = {
        *(group_ranks(grid, there) if problem.backward else ()),
        *(group_ranks(grid, group) if t == grid.r - 1 else ()),
    }
    partial = {rank: _partial_rows(grid, problem, rank, t)} if problem.backward and there != group else {}
    for p in sorted(helpers - {rank}):
        if p // grid.u == group:
            made = finished(grid, problem, p, t)
        else:
            parts = enumerate(blocks(problem, grid.u, p)) if partial[rank] else ()
            made = ((f"dkv{t}.{i}", "dkv", problem.key_heads(heads), partial) for i, heads in parts)
        yield from (x for one in made for x in transfers(p, one, (rank,)))


def _partial_rows(grid: Grid, problem: Problem, rank: int, t: int) -> tuple[Piece, ...]:
    """The rows of a rank's keys that the group t after its own makes partials of, in the order that they have there."""
    rows = wanted_by(problem, "kv", rank, group_ranks(grid, rank // grid.u + t))
    held = in_order(problem, "kv", pieces(rank, all_carried(problem, "kv", rank, 1, grid.u)[t]))
    return tuple(part for piece in held for part in pieces(rank, among(rows, (piece.start, piece.stop))))


@lru_cache(maxsize=4096)
def _key_shares(grid: Grid, problem: Problem, group: int, t: int) -> Shares:
    """The partial gradients of keys that every rank of a group makes in round t."""
    compute = group_compute(grid, problem, group, t)
    return shares_of(compute.results[1]) if compute else {}


@lru_cache(maxsize=4096)
def _total_shares(grid: Grid, problem: Problem, group: int) -> Shares:
    total = group_total(grid, problem, group, grid.r - 1)
    return shares_of(total) if total else {}
