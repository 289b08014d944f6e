"""The tiles of all ranks hold every allowed (query, key) pair exactly once in every head, and no other.

inside     each tile holds only pairs that the mask allows its slots' rows
once       no two tiles share a pair: compared on two axes that name a row alike whoever holds it (see `tokenring.checking.sweep`)
all        in every head they hold as many pairs as the mask has over the sequence, counted cell by cell

An axis counts rows by owner, or by position (those of one stride and remainder together): a block that travels alone is one
stretch of the first, a workspace in global order one of the second. The one with fewer stretches is taken.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tokenring.checking.slots import PlanError
from tokenring.checking.sweep import first_overlap
from tokenring.plans.plan import Plan
from tokenring.plans.problem import Problem
from tokenring.plans.step import Compute, Piece, Slot, Step
from tokenring.segments import Range, Tile, join

Stretch = tuple[int, int, int, tuple[int, int]]
"""(first row in the slot, past the last, coordinate of the first, the plane's key on this axis)."""


@dataclass
class _Work:
    """The same tiles of the same rows, in the heads of one rank or of several."""

    rank: int
    compute: Compute
    q: Slot
    kv: Slot
    heads: list[Range] = field(default_factory=list)


def check_covered(plan: Plan, steps: list[tuple[Step, ...]]) -> int:
    """The number of allowed pairs of one head, or PlanError. Where batch entries have masks of their own, over all of them."""
    problem, entries = plan.problem, plan.shape.batch
    for layout in (problem.q_layout, problem.kv_layout):
        if not layout.complete:
            raise PlanError(
                f"the layout {layout.name} holds some position twice or not at all; no plan over it can be proven"
            )
    works = _works(plan, steps)
    for work in works:
        _inside(problem, work, entries)
    batched = any(t.batch for t in (*problem.mask.cells, *(t for work in works for t in work.compute.tiles)))
    wanted = _allowed(problem, entries if batched else 1)
    for head, total in _once(plan, works, batched):
        if total != wanted:
            raise PlanError(_missing(plan, works, head, batched, wanted - total))
    return _allowed(problem, 1 if problem.mask.limits.batch is None else entries)


def _works(plan: Plan, steps: list[tuple[Step, ...]]) -> list[_Work]:
    """Ranks that share the rows and tiles of a compute, in heads of their own, are one piece of work."""
    found: dict[tuple[int, int, int], _Work] = {}
    for rank, mine in enumerate(steps):
        slots = {what: plan.problem.own(what, rank) for what in ("q", "kv")}
        slots |= {slot.name: slot for step in mine for slot in step.slots}
        for compute in (c for step in mine for c in step.computes):
            q, kv = slots[compute.q], slots[compute.kv]
            # By identity: what a schedule shares between ranks is one object, and comparing it would cost as much as itself.
            work = found.setdefault((id(q.pieces), id(kv.pieces), id(compute.tiles)), _Work(rank, compute, q, kv))
            work.heads.append(compute.heads or (0, plan.problem.q_heads))
    return list(found.values())


def _inside(problem: Problem, work: _Work, entries: int) -> None:
    tiles, allowed = work.compute.tiles, problem.tiles(work.q.pieces, work.kv.pieces)
    for tile in tiles:
        if tile.batch and not 0 <= tile.batch[0] < tile.batch[1] <= entries:
            raise PlanError(f"{tile} is of batch entries {tile.batch}; there are {entries}")
    if tiles == allowed:
        return
    if any(tile.batch for tile in (*tiles, *allowed)):
        tiles, allowed = (tuple(t.of(t.batch or (0, entries)) for t in some) for some in (tiles, allowed))
    allowed = sorted(allowed, key=lambda tile: tile.q_start)
    starts = [tile.q_start for tile in allowed]
    reach = list(itertools.accumulate((tile.q_stop for tile in allowed), max))
    for tile in tiles:
        near = allowed[bisect_right(reach, tile.q_start) : bisect_left(starts, tile.q_stop)]
        inside = sum(part.pairs() for a in near if (part := tile.common(a)))
        if inside != tile.pairs():
            raise PlanError(
                f"rank {work.rank}, {work.compute.q} and {work.compute.kv}: {tile} holds {tile.pairs() - inside} pairs that "
                "the mask forbids"
            )


def _allowed(problem: Problem, entries: int) -> int:
    """Pairs of the mask over the sequence, in all batch entries."""
    q, k = problem.q_layout, problem.kv_layout
    whole = Tile(q.offset, q.offset + q.total, k.offset, k.offset + k.total)
    cells = (part for cell in problem.mask.cells if (part := whole.common(cell)))
    return sum(cell.pairs() * (1 if cell.batch else entries) for cell in cells)


def _once(plan: Plan, works: list[_Work], batched: bool) -> Iterator[tuple[int, int]]:
    """For each run of heads with the same tiles its first head and how many pairs it has; no pair twice."""
    (q_axis, q_stretches), (k_axis, k_stretches) = (_axis(plan.problem, what, works) for what in ("q", "kv"))
    edges = sorted({0, plan.problem.q_heads, *(edge for work in works for heads in work.heads for edge in heads)})
    planes: list[defaultdict[object, list[Tile]]] = [defaultdict(list) for _ in edges[1:]]
    totals = [0] * len(planes)
    entries = plan.shape.batch
    for work in works:
        parts = list(_parts(work, q_stretches[id(work.q.pieces)], k_stretches[id(work.kv.pieces)]))
        pairs = sum(t.pairs() * (entries if batched and not t.batch else 1) for _, t in parts)
        for first, last in work.heads:
            for index in range(bisect_left(edges, first), bisect_left(edges, last)):
                totals[index] += pairs
                for key, tile in parts:
                    planes[index][key].append(tile)
    for plane in planes:
        for (q_key, k_key), tiles in plane.items():
            for some in _by_entries(tiles, entries):
                if both := first_overlap(some):
                    shared = both[0].common(both[1])
                    where = f"queries of rank {q_axis.owner(q_key, shared.q_start)} and keys of rank "
                    where += str(k_axis.owner(k_key, shared.k_start))
                    raise PlanError(f"{where}: {shared.pairs()} pairs are computed twice")
    yield from zip(edges, totals)


def _by_entries(tiles: list[Tile], entries: int) -> Iterator[list[Tile]]:
    """The tiles of each run of batch entries that have the same."""
    edges = sorted({0, entries, *(edge for tile in tiles for edge in tile.batch or ())})
    for first, last in itertools.pairwise(edges):
        yield [t for t in tiles if t.batch is None or (t.batch[0] <= first and last <= t.batch[1])]


def _parts(work: _Work, q: list[Stretch], k: list[Stretch]) -> Iterator[tuple[tuple, Tile]]:
    """A work's tiles on the axes, cut where the rows of one of the slots jump, each with the key of its plane."""
    q_stops, k_stops = ([stop for _, stop, *_ in side] for side in (q, k))
    for tile in work.compute.tiles:
        for q_row, q_stop, q_at, q_key in q[bisect_right(q_stops, tile.q_start) :]:
            first, last = max(q_row, tile.q_start), min(q_stop, tile.q_stop)
            if first >= last:
                break
            low = tile.k_start if tile.lower is None else max(tile.k_start, first + tile.lower)
            high = tile.k_stop if tile.upper is None else min(tile.k_stop, last + tile.upper)
            for k_row, k_stop, k_at, k_key in k[bisect_right(k_stops, low) :]:
                if k_row >= high:
                    break
                part = tile.common(Tile(q_row, q_stop, k_row, k_stop))
                if part is not None:
                    yield (q_key, k_key), part.shift(q_at - q_row, k_at - k_row)


class _ByOwner:
    """Rows one after another, rank by rank."""

    def __init__(self, problem: Problem, what: str) -> None:
        layout = problem.layout(what)
        self.base = list(itertools.accumulate((layout.length(r) for r in range(layout.world)), initial=0))

    def stretches(self, slot: Slot) -> list[Stretch]:
        return _in_order((p.rows, self.base[p.owner] + p.start, (1, 0)) for p in slot.pieces)

    def owner(self, key: tuple[int, int], at: int) -> int:
        return bisect_right(self.base, at) - 1


class _ByPosition:
    """Positions of one stride and remainder, counted in strides."""

    def __init__(self, problem: Problem, what: str) -> None:
        self.problem, self.what = problem, what

    def stretches(self, slot: Slot) -> list[Stretch]:
        runs = join(self.problem.segments(self.what, slot.pieces))
        return _in_order((r.count, r.start // r.stride, (r.stride, r.start % r.stride)) for r in runs)

    def owner(self, key: tuple[int, int], at: int) -> int:
        stride, rest = key
        layout, position = self.problem.layout(self.what), at * stride + rest
        return next(
            r for r in range(layout.world) for run in layout.segments(r) if run.inside(position, position + 1) != (0, 0)
        )


def _in_order(runs: Iterable[tuple[int, int, tuple[int, int]]]) -> list[Stretch]:
    found: list[Stretch] = []
    row = 0
    for rows, at, key in runs:
        if rows:
            found.append((row, row + rows, at, key))
            row += rows
    return found


def _axis(problem: Problem, what: str, works: list[_Work]) -> tuple[_ByOwner | _ByPosition, dict[int, list[Stretch]]]:
    """The axis on which the slots of a kind are fewer stretches, and these by the identity of the slot's pieces."""
    slots = {id(slot.pieces): slot for work in works for slot in ((work.q if what == "q" else work.kv),)}
    axes = (_ByOwner(problem, what), _ByPosition(problem, what))
    found = [{key: axis.stretches(slot) for key, slot in slots.items()} for axis in axes]
    return min(zip(axes, found), key=lambda both: sum(map(len, both[1].values())))


def _missing(plan: Plan, works: list[_Work], head: int, batched: bool, count: int) -> str:
    """Says between which ranks pairs of a head are missing."""
    found: defaultdict[tuple[int, int], int] = defaultdict(int)
    entries = plan.shape.batch if batched else 1

    def weighed(tile: Tile) -> int:
        return tile.pairs() * (1 if tile.batch else entries)

    for work in works:
        times = sum(first <= head < last for first, last in work.heads)
        sides = (_pieces_with_rows(slot) for slot in (work.q, work.kv))
        for (q_row, q), (k_row, k) in itertools.product(*sides):
            rectangle = Tile(q_row, q_row + q.rows, k_row, k_row + k.rows)
            parts = (part for tile in work.compute.tiles if (part := tile.common(rectangle)))
            found[(q.owner, k.owner)] += times * sum(map(weighed, parts))
    own = plan.problem.own
    for a, b in itertools.product(range(plan.world), repeat=2):
        wanted = sum(map(weighed, plan.problem.tiles(own("q", a).pieces, own("kv", b).pieces)))
        if wanted != found[(a, b)]:
            return (
                f"queries of rank {a} and keys of rank {b}: {wanted - found[(a, b)]} of {wanted} allowed pairs are never "
                f"computed in head {head}"
            )
    return f"{count} allowed pairs are never computed in head {head}"


def _pieces_with_rows(slot: Slot) -> list[tuple[int, Piece]]:
    rows = itertools.accumulate((piece.rows for piece in slot.pieces), initial=0)
    return list(zip(rows, slot.pieces))
