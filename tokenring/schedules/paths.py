"""What travels how far: the rows that a mask makes each rank want, along a way round the ring.

A block that leaves its owner visits the other ranks one hop at a time. On hop t it carries only the rows that some rank from
there on still wants, so rows die on the way as soon as the mask lets them: over a causal zigzag a block that first visits the
ranks *before* its owner drops half its rows when it wraps, 3/4 of the full volume on average. What rides home with a block
(partial gradients) holds the rows that some rank so far has wanted.

    rank r, way +1      from r+1 on: {r+1}  {r+1, r+2}  {r+1, r+2, r+3} ...     grows by one rank for each owner further on

So one walk round the ring from a rank answers for the blocks of all owners. Nodes of `size` ranks walk like ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate

from tokenring.plans.problem import Problem
from tokenring.plans.reach import Positions, positions_wanted, reach, spans
from tokenring.plans.step import Compute, Piece, Slot, cut, pieces
from tokenring.segments import Range, union

Rows = tuple[Range, ...]


@lru_cache(maxsize=65536)
def wanted(problem: Problem, what: str, owner: int, rank: int, half: int | None = None) -> Rows:
    """Rows of `owner`'s queries that have a key on `rank` (what="q"), or of its keys that a query of `rank` wants ("kv").

    half: only those among the first (0) or second (1) half of the owner's rows.
    """
    if half is not None:
        return among(wanted(problem, what, owner, rank), _half(problem, what, owner, half))
    table = reach(problem.places, what)
    if table.exact:
        return table.by(rank, rank + 1).rows(spans(problem.layout(what), owner))
    if (rows := table.between(rank, problem.layout(what).segments(owner))) is not None:
        return rows
    if what == "q":
        tiles = problem.tiles(problem.own("q", owner).pieces, problem.own("kv", rank).pieces)
        return union((t.q_start, t.q_stop) for t in tiles)
    tiles = problem.tiles(problem.own("q", rank).pieces, problem.own("kv", owner).pieces)
    return union((t.k_start, t.k_stop) for t in tiles)


@lru_cache(maxsize=65536)
def wanted_by(problem: Problem, what: str, owner: int, ranks: range) -> Rows:
    """Rows of `owner` that any of some ranks wants."""
    if reach(problem.places, what).exact:
        return positions_wanted(problem.places, what, ranks).rows(spans(problem.layout(what), owner))
    return union(r for rank in ranks for r in wanted(problem, what, owner, rank % problem.world))


def carried(
    problem: Problem, what: str, owner: int, way: int, hop: int, half: int | None = None, size: int = 1
) -> Rows:
    """The rows of `owner`'s block that reach the node `hop` hops away: those that it or a later one wants.

    size: ranks of a node; 1 where every rank is one.
    """
    if half is not None:
        return among(carried(problem, what, owner, way, hop), _half(problem, what, owner, half))
    nodes = problem.world // size
    if reach(problem.places, what).exact:
        first = (owner // size + way * hop) % nodes
        return _walk(problem.places, what, way, first, size, False)[nodes - hop][owner % size]
    return all_carried(problem, what, owner, way, size)[hop]


def all_carried(problem: Problem, what: str, owner: int, way: int, size: int = 1) -> tuple[Rows, ...]:
    """`carried` of one owner for every hop."""
    return _still_wanted(problem.places, what, owner, way, size)


def reached(problem: Problem, what: str, owner: int, way: int, hop: int) -> Rows:
    """The rows of `owner`'s block that it or some rank up to `hop` hops away wants."""
    if reach(problem.places, what).exact:
        return _walk(problem.places, what, -way, (owner + way * hop) % problem.world, 1, True)[hop][0]
    return _wanted_so_far(problem.places, what, owner, way)[hop]


@lru_cache(maxsize=128)
def _walk(
    problem: Problem, what: str, way: int, first: int, size: int, with_owner: bool
) -> tuple[tuple[Rows, ...], ...]:
    """[n][i]: the rows of rank i of the n-th node from `first` on that one of the n nodes before it wants, or it itself."""
    nodes, layout, table = problem.world // size, problem.layout(what), reach(problem, what)
    found: list[tuple[Rows, ...]] = []
    so_far = Positions()
    for n in range(nodes if with_owner else nodes + 1):
        start = (first + way * n) % nodes * size
        if with_owner:
            so_far.add(table.by(start, start + size))
        found.append(tuple(so_far.rows(spans(layout, owner)) for owner in range(start, start + size)))
        if not with_owner:
            so_far.add(table.by(start, start + size))
    return tuple(found)


@lru_cache(maxsize=8192)
def _still_wanted(problem: Problem, what: str, owner: int, way: int, size: int) -> tuple[Rows, ...]:
    nodes, node = problem.world // size, owner // size
    hops = [_wanted_in(problem, what, owner, (node + way * hop) % nodes, size) for hop in range(nodes - 1, -1, -1)]
    return tuple(reversed(list(accumulate(hops, _joined))))


@lru_cache(maxsize=8192)
def _wanted_so_far(problem: Problem, what: str, owner: int, way: int) -> tuple[Rows, ...]:
    world = problem.world
    hops = [wanted(problem, what, owner, (owner + way * hop) % world) for hop in range(world)]
    return tuple(accumulate(hops, _joined))


def _wanted_in(problem: Problem, what: str, owner: int, node: int, size: int) -> Rows:
    return wanted_by(problem, what, owner, range(node * size, (node + 1) * size))


def _joined(a: Rows, b: Rows) -> Rows:
    return union((*a, *b))


def _half(problem: Problem, what: str, owner: int, half: int) -> Range:
    rows = problem.own(what, owner).rows
    return (0, rows // 2) if half == 0 else (rows // 2, rows)


def among(rows: Rows, only: Range) -> Rows:
    """Those of some rows that lie in a range."""
    return tuple((max(a, only[0]), min(b, only[1])) for a, b in rows if a < only[1] and b > only[0])


def attend(problem: Problem, q: Slot, kv: Slot, step: int | str, heads: Range | None = None) -> Compute | None:
    """The compute of one slot against another, its partials named by kind and step; None where the mask leaves no pair."""
    tiles = problem.tiles(q.pieces, kv.pieces)
    if not tiles:
        return None
    queries = cut(q, union((t.q_start, t.q_stop) for t in tiles))
    results = [Slot(f"{problem.query_result}{step}", problem.query_result, queries, heads)]
    if problem.backward:
        keys = cut(kv, union((t.k_start, t.k_stop) for t in tiles))
        results.append(Slot(f"dkv{step}", "dkv", keys, problem.key_heads(heads)))
    return Compute(q.name, kv.name, tuple(results), tiles, heads)


def united(problem: Problem, slots: Iterable[Slot]) -> tuple[Piece, ...]:
    """The rows of all the slots, each once, in the order of their positions."""
    rows: dict[int, list[Range]] = {}
    what = ""
    for slot in slots:
        what = slot.what
        for piece in slot.pieces:
            rows.setdefault(piece.owner, []).append((piece.start, piece.stop))
    blocks = tuple(piece for owner, ranges in rows.items() for piece in pieces(owner, union(ranges)))
    return in_order(problem, what, blocks)


def block(what: str, name: str, owner: int, rows: Rows) -> Slot:
    """A slot of some rows of one owner."""
    return Slot(name, what, pieces(owner, rows))


def in_order(problem: Problem, what: str, blocks: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Pieces cut at their runs and sorted by position, so that what several ranks send ends as few tiles."""
    layout, found = problem.layout(what), []
    for piece in blocks:
        for row, run in layout.cut(piece.owner, piece.start, piece.stop):
            found.append((run.start, Piece(piece.owner, row, row + run.count)))
    return tuple(piece for _, piece in sorted(found, key=lambda item: item[0]))
