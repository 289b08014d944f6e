"""What travels how far: the rows that a mask makes each rank want, along a way round the ring.

A block that leaves its owner visits the other ranks one hop at a time. On hop t it carries only the rows that some rank from
there on still wants, so rows die on the way as soon as the mask lets them: over a causal zigzag a block that first visits the
ranks *before* its owner drops half its rows when it wraps, 3/4 of the full volume on average.
"""

from __future__ import annotations

from functools import lru_cache

from tokenring.plan import Compute, Piece, Problem, Slot, pieces
from tokenring.segments import Range, rows_in, union

SAMPLED_OWNERS = 16


@lru_cache(maxsize=65536)
def wanted(problem: Problem, what: str, owner: int, rank: int, half: int | None = None) -> tuple[Range, ...]:
    """Rows of `owner`'s queries that have a key on `rank` (what="q"), or of its keys that a query of `rank` wants ("kv").

    half: only those among the first (0) or second (1) half of the owner's rows.
    """
    if half is not None:
        middle = problem.own(what, owner).rows // 2
        first, last = ((0, middle), (middle, problem.own(what, owner).rows))[half]
        return tuple(
            (max(a, first), min(b, last)) for a, b in wanted(problem, what, owner, rank) if a < last and b > first
        )
    if what == "q":
        tiles = problem.tiles(problem.own("q", owner).pieces, problem.own("kv", rank).pieces)
        return union((t.q_start, t.q_stop) for t in tiles)
    tiles = problem.tiles(problem.own("q", rank).pieces, problem.own("kv", owner).pieces)
    return union((t.k_start, t.k_stop) for t in tiles)


@lru_cache(maxsize=8192)
def carried(
    problem: Problem, what: str, owner: int, direction: int, half: int | None = None
) -> tuple[tuple[Range, ...], ...]:
    """Entry t: the rows of `owner`'s block that reach the rank t hops away (entry 0: those that leave)."""
    world = problem.world
    still: tuple[Range, ...] = ()
    hops: list[tuple[Range, ...]] = []
    for hop in range(world - 1, 0, -1):
        still = union((*still, *wanted(problem, what, owner, (owner + direction * hop) % world, half)))
        hops.append(still)
    return (still, *reversed(hops))


@lru_cache(maxsize=1024)
def direction(problem: Problem, what: str) -> int:
    """+1 or -1: the way round on which less travels (over at most 16 owners, evenly spread); +1 where it is equal."""
    world = problem.world
    owners = range(0, world, -(-world // SAMPLED_OWNERS))

    def volume(way: int) -> int:
        return sum(rows_in(rows) for owner in owners for rows in carried(problem, what, owner, way)[1:])

    return 1 if volume(1) <= volume(-1) else -1


def attend(problem: Problem, q: Slot, kv: Slot, step: int | str) -> Compute | None:
    """The compute of one slot against another, its partials named by kind and step; None where the mask leaves no pair."""
    tiles = problem.tiles(q.pieces, kv.pieces)
    if not tiles:
        return None
    queries = cut(q, union((t.q_start, t.q_stop) for t in tiles))
    results = [Slot(f"{problem.query_result}{step}", problem.query_result, queries)]
    if problem.backward:
        results.append(Slot(f"dkv{step}", "dkv", cut(kv, union((t.k_start, t.k_stop) for t in tiles))))
    return Compute(q.name, kv.name, tuple(results), tiles)


def cut(slot: Slot, rows: tuple[Range, ...]) -> tuple[Piece, ...]:
    """The pieces of some rows of a slot."""
    result: list[Piece] = []
    for start, stop in rows:
        row = 0
        for piece in slot.pieces:
            first, last = max(start, row), min(stop, row + piece.rows)
            if first < last:
                result.append(Piece(piece.owner, piece.start + first - row, piece.start + last - row))
            row += piece.rows
    return tuple(result)


def block(what: str, name: str, owner: int, rows: tuple[Range, ...]) -> Slot:
    """A slot of some rows of one owner."""
    return Slot(name, what, pieces(owner, rows))
