"""Blocks of a sequence dealt to ranks so that attention costs each the same, whatever the mask.

The work of a block is the number of (query, key) pairs that the mask allows its queries. Heaviest first, each block goes to the
rank with the least work that has room for one more (longest processing time first; every rank holds equally many blocks within
one, so memory is even as well); then pairs of blocks change places as long as that evens the heaviest and the lightest rank.
"""

from __future__ import annotations

import heapq
from itertools import pairwise

from tokenring.mask import Mask
from tokenring.segments import Segment, Tile

ROUNDS = 64


def balanced_blocks(mask: Mask, length: int, world: int, block: int) -> list[list[Segment]]:
    """Each rank's runs of positions, ascending."""
    starts = [*range(0, length, block), length]
    runs = [Segment(a, b - a) for a, b in pairwise(starts)]
    work = [_pairs(mask, run, length) for run in runs]
    shares = _dealt(work, world)
    _even_out(work, shares)
    return [[runs[i] for i in sorted(share)] for share in shares]


def _pairs(mask: Mask, run: Segment, length: int) -> int:
    """How many keys the mask allows the queries of a run, in all; a mask's cells are disjoint."""
    rows = Tile(run.start, run.start + run.count, 0, length)
    return sum(part.pairs() for cell in mask.over(run.start, run.last) if (part := rows.common(cell)))


def _dealt(work: list[int], world: int) -> list[list[int]]:
    shares: list[list[int]] = [[] for _ in range(world)]
    full, extras = divmod(len(work), world)
    heap = [(0, rank) for rank in range(world)]
    for index in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        load, rank = heapq.heappop(heap)
        while len(shares[rank]) == full and not extras:
            load, rank = heapq.heappop(heap)
        extras -= len(shares[rank]) == full
        shares[rank].append(index)
        if len(shares[rank]) <= full:
            heapq.heappush(heap, (load + work[index], rank))
    return shares


def _even_out(work: list[int], shares: list[list[int]]) -> None:
    """Swap the pair of blocks that brings the heaviest rank and the lightest closest, while that helps."""
    loads = [sum(work[i] for i in share) for share in shares]
    for _ in range(ROUNDS):
        high, low = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[high] - loads[low]
        mine, theirs = sorted(shares[high], key=work.__getitem__), sorted(shares[low], key=work.__getitem__)
        best, swap, at = gap, None, 0
        for a in mine:
            while at < len(theirs) and work[a] - work[theirs[at]] > gap / 2:
                at += 1
            for b in theirs[max(0, at - 1) : at + 1]:
                left = abs(gap - 2 * (work[a] - work[b]))
                if left < best:
                    best, swap = left, (a, b)
        if swap is None:
            return
        a, b = swap
        shares[high][shares[high].index(a)], shares[low][shares[low].index(b)] = b, a
        loads[high] -= work[a] - work[b]
        loads[low] += work[a] - work[b]
