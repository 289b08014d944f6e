"""What travels how far: the rows that a mask makes each rank want, along a way round the ring.

A block that leaves its owner visits the other ranks one hop at a time. On hop t it carries only the rows that some rank from
there on still wants, so rows die on the way as soon as the mask lets them: over a causal zigzag a block that first visits the
ranks *before* its owner drops half its rows when it wraps, 3/4 of the full volume on average. What rides home with a block
(partial gradients) holds the rows that some rank so far has wanted.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate

from tokenring.problem import Problem
from tokenring.reach import reach, rows_at, wanted_positions
from tokenring.segments import Range, rows_in, union
from tokenring.step import Compute, Piece, Slot, cut, pieces

SAMPLED_OWNERS = 16

Rows = tuple[Range, ...]


@lru_cache(maxsize=65536)
def wanted(problem: Problem, what: str, owner: int, rank: int, half: int | None = None) -> Rows:
    """Rows of `owner`'s queries that have a key on `rank` (what="q"), or of its keys that a query of `rank` wants ("kv").

    half: only those among the first (0) or second (1) half of the owner's rows.
    """
    if half is not None:
        return _among(wanted(problem, what, owner, rank), _half(problem, what, owner, half))
    if reach(problem, what).exact:
        return _reachable(problem, what, owner, rank, 1)
    if what == "q":
        tiles = problem.tiles(problem.own("q", owner).pieces, problem.own("kv", rank).pieces)
        return union((t.q_start, t.q_stop) for t in tiles)
    tiles = problem.tiles(problem.own("q", rank).pieces, problem.own("kv", owner).pieces)
    return union((t.k_start, t.k_stop) for t in tiles)


@lru_cache(maxsize=65536)
def wanted_by(problem: Problem, what: str, owner: int, ranks: range) -> Rows:
    """Rows of `owner` that any of some ranks wants."""
    if _sets_exact(problem, what) and ranks.step == 1:
        return _reachable(problem, what, owner, ranks.start % problem.world, len(ranks)) if ranks else ()
    return union(r for rank in ranks for r in wanted(problem, what, owner, rank % problem.world))


def carried(problem: Problem, what: str, owner: int, way: int, hop: int, half: int | None = None) -> Rows:
    """The rows of `owner`'s block that reach the rank `hop` hops away: those that it or a later rank wants."""
    world = problem.world
    if half is not None:
        return _among(carried(problem, what, owner, way, hop), _half(problem, what, owner, half))
    if _sets_exact(problem, what):
        first = owner + hop if way > 0 else owner + 1
        return _reachable(problem, what, owner, first % world, world - hop)
    return _still_wanted(problem, what, owner, way)[hop]


def reached(problem: Problem, what: str, owner: int, way: int, hop: int) -> Rows:
    """The rows of `owner`'s block that it or some rank up to `hop` hops away wants."""
    if _sets_exact(problem, what):
        first = owner if way > 0 else owner - hop
        return _reachable(problem, what, owner, first % problem.world, hop + 1)
    return _wanted_so_far(problem, what, owner, way)[hop]


@lru_cache(maxsize=8192)
def _still_wanted(problem: Problem, what: str, owner: int, way: int) -> tuple[Rows, ...]:
    world = problem.world
    hops = [wanted(problem, what, owner, (owner + way * hop) % world) for hop in range(world - 1, 0, -1)]
    unions = list(accumulate(hops, _joined, initial=()))[1:]
    return (unions[-1] if unions else (), *reversed(unions))


@lru_cache(maxsize=8192)
def _wanted_so_far(problem: Problem, what: str, owner: int, way: int) -> tuple[Rows, ...]:
    world = problem.world
    hops = [wanted(problem, what, owner, (owner + way * hop) % world) for hop in range(world)]
    return tuple(accumulate(hops, _joined))


def _joined(a: Rows, b: Rows) -> Rows:
    return union((*a, *b))


def _sets_exact(problem: Problem, what: str) -> bool:
    table = reach(problem, what)
    return table.exact and table.sets_exact


def _reachable(problem: Problem, what: str, owner: int, first: int, count: int) -> Rows:
    """`wanted` by any of `count` ranks from `first` on."""
    return rows_at(problem.layout(what).segments(owner), wanted_positions(problem, what, first, count))


def _half(problem: Problem, what: str, owner: int, half: int) -> Range:
    rows = problem.own(what, owner).rows
    return (0, rows // 2) if half == 0 else (rows // 2, rows)


def _among(rows: Rows, only: Range) -> Rows:
    return tuple((max(a, only[0]), min(b, only[1])) for a, b in rows if a < only[1] and b > only[0])


@lru_cache(maxsize=1024)
def direction(problem: Problem, what: str) -> int:
    """+1 or -1: the way round on which less travels (over at most 16 owners, evenly spread); +1 where it is equal."""
    world = problem.world
    owners = range(0, world, -(-world // SAMPLED_OWNERS))

    def volume(way: int) -> int:
        return sum(rows_in(carried(problem, what, owner, way, hop)) for owner in owners for hop in range(1, world))

    return 1 if volume(1) <= volume(-1) else -1


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
