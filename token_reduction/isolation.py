"""The most isolated row of a set that is spread over ranks: arg-max over rows of the distance to the nearest other row.

Comparing all pairs costs n^2 D. Most rows are ruled out long before: the distance to *any* other row bounds the nearest
distance from above, and one row whose nearest distance is known exactly bounds the answer from below. So each round

    1. takes some rows as probes and lowers the bounds of the rows still in the race,
    2. takes the few rows with the highest bounds and measures them against everything,
    3. drops every row whose bound cannot beat the best measured one (ties: the lowest global index wins).

The distances are exact (`rows.UnitRows`), so neither the probes nor the partition change the answer, only the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from token_reduction.rows import UnitRows, blocks, pack, unpack
from tokenring.transport import Transport

_CANDIDATES = 16
_FIRST_PROBES = 128
_MOST_PROBES = 1024


@dataclass(frozen=True)
class Found:
    """The row that was found: its global index, its distance to the nearest other row, and the row (D,) with its half."""

    index: int
    distance: float
    row: Tensor
    half: Tensor


def most_isolated(rows: UnitRows, index: Tensor, transport: Transport, strides: Sequence[int] = ()) -> Found:
    """The row, on whatever rank, whose nearest other row is farthest; called on every rank alike.

    Args:
        rows: this rank's rows; index: (n,) their global indices, ascending.
        transport: of the ranks that hold the set. At least one rank holds a row.
        strides: how far apart near neighbours are likely to lie (one frame of a video). Saves time, changes nothing else.
    """
    race = _Race(rows, index)
    for stride in strides:
        race.guess(stride)
    best: Found | None = None
    probes = max(1, _FIRST_PROBES // transport.world)
    while True:
        own = race.offer(best, max(1, _CANDIDATES // transport.world), probes)
        everyone = torch.cat(unpack(torch.cat(transport.all_gather(own)), 3), 1)
        candidates = everyone[everyone[:, 0] == 1]
        if candidates.shape[0] == 0:
            assert best is not None
            return best
        race.lower_bounds(everyone[everyone[:, 0] == 0])
        best = _better(best, candidates, race.measure(candidates, transport))
        probes = min(2 * probes, max(1, _MOST_PROBES // transport.world))


def _better(best: Found | None, candidates: Tensor, distance: Tensor) -> Found:
    """The best of what was known and the measured candidates, by (distance, lowest index)."""
    order = torch.argsort(candidates[:, 1])
    top = order[torch.argmax(distance[order])]
    found = Found(int(candidates[top, 1]), float(distance[top]), candidates[top, 3:], candidates[top, 2])
    return found if best is None or (found.distance, -found.index) > (best.distance, -best.index) else best


class _Race:
    """This rank's rows that may still be the answer, with the smallest distance to another row seen so far."""

    def __init__(self, rows: UnitRows, index: Tensor) -> None:
        self.rows, self.index = rows, index
        self.alive = torch.arange(rows.count, device=index.device)
        self.bound = rows.half.new_full((rows.count,), math.inf)
        # Any order of probes gives the same answer; a scattered one lowers most bounds early.
        shuffle = torch.Generator().manual_seed(0)
        self.unprobed = torch.randperm(rows.count, generator=shuffle).to(index.device)

    def guess(self, stride: int) -> None:
        """Compare each row with the one `stride` local rows on."""
        for first, last in blocks(max(0, self.rows.count - stride), self.rows.width, self.index.device):
            here, there = slice(first, last), slice(first + stride, last + stride)
            dot = (self.rows.take(here) * self.rows.take(there)).sum(1)
            distance = self.rows.half[here] - dot + self.rows.half[there]
            for side in (here, there):
                self.bound[side] = torch.minimum(self.bound[side], distance)

    def offer(self, best: Found | None, candidates: int, probes: int) -> Tensor:
        """Rows to be sent, packed: [1, index, half, row...] of candidates, [0, ...] of probes."""
        if best is not None:
            bound, index = self.bound[self.alive], self.index[self.alive]
            self.alive = self.alive[(bound > best.distance) | ((bound == best.distance) & (index < best.index))]
        order = torch.argsort(self.bound[self.alive], descending=True, stable=True)
        top, self.alive = self.alive[order[:candidates]], self.alive[order[candidates:].sort().values]
        picked, self.unprobed = self.unprobed[:probes], self.unprobed[probes:]
        which = torch.cat([top, picked])
        kind = torch.cat([torch.ones_like(top), torch.zeros_like(picked)])
        head = torch.stack([kind.double(), self.index[which].double(), self.rows.half[which]], 1)
        return pack(head, self.rows.take(which))

    def lower_bounds(self, probes: Tensor) -> None:
        """Compare the rows still in the race with the probes."""
        if probes.shape[0] == 0:
            return
        for part, distance in self.rows.distances(self.alive, probes[:, 3:], probes[:, 2]):
            which = self.alive[part]
            distance.masked_fill_(self.index[which, None] == probes[None, :, 1], math.inf)
            self.bound[which] = torch.minimum(self.bound[which], distance.amin(1))

    def measure(self, candidates: Tensor, transport: Transport) -> Tensor:
        """(m,) exact distance of each candidate to its nearest other row on any rank."""
        nearest = candidates.new_full((candidates.shape[0],), math.inf)
        for part, distance in self.rows.distances(None, candidates[:, 3:], candidates[:, 2]):
            distance.masked_fill_(self.index[part, None] == candidates[None, :, 1], math.inf)
            nearest = torch.minimum(nearest, distance.amin(0))
        return torch.cat(transport.all_gather(nearest[None])).amin(0)
