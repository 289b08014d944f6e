"""Farthest-point selection over rows that are spread over ranks: arg-max of the distance to the nearest kept row, k times.

The greedy loop needs one comparison of every row with every kept one: k n D products. It is run here in rounds. Distances to
the kept set only ever shrink, so an old value is an upper bound. A round brings all rows up to date (one matrix product with
the rows kept last round), puts the farthest of all ranks in a small pool, and then chooses inside the pool as long as its
best beats the farthest row outside. Same choice as row by row; the pool's rows are the only features that travel, and two
small collectives serve many choices. All distances are exact (`rows.UnitRows`), hence the same on any partition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from token_reduction.isolation import Found, most_isolated
from token_reduction.rows import UnitRows, pack, unpack
from tokenring.transport import SingleRank, Transport

SMALL = 1024
"""Rows of a set whose distances may all be held."""

_SMALLEST_POOL, _LARGEST_POOL = 32, 512
_FARTHEST = 2.0  # 1 - cosine is at most 2: the score of a row that has no other row to be compared with


def farthest_from(rows: UnitRows, count: int, pivot: int) -> Tensor:
    """Order of choice (count,) over one rank's rows, from a given first row; ties go to the lowest index."""
    index = torch.arange(rows.count, device=rows.half.device)
    first = Found(pivot, _FARTHEST, rows.take(index[pivot : pivot + 1])[0], rows.half[pivot])
    return Farthest(rows, index).run(count, SingleRank(), first)


def farthest_batch(q: Tensor, count: int, pivot: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same choice in many small items of one size at once: exact unit rows (B, n, D), all distances held (B, n, n).

    pivot: (B,) first rows; None: the most isolated. Returns the order of choice (B, count) and the scores (B, n), as `Farthest`
    gives them item by item.
    """
    half = 0.5 * (q * q).sum(-1)
    apart = torch.baddbmm(half[:, None] + half[..., None], q, q.mT, alpha=-1)
    lonely = apart.masked_fill(torch.eye(q.shape[1], dtype=torch.bool, device=q.device), math.inf).amin(-1)
    distance, order = torch.full_like(half, math.inf), half.new_empty((len(q), count), dtype=torch.int64)
    taken, scores = torch.zeros_like(half, dtype=torch.bool), torch.zeros_like(half)
    for step in range(count):
        left = distance.masked_fill(taken, -math.inf) if step else lonely.clamp(max=_FARTHEST)
        pick = left.argmax(-1, keepdim=True) if step or pivot is None else pivot[:, None]
        value = left.gather(1, pick)
        order[:, step] = pick[:, 0]
        scores.scatter_(1, pick, value)
        taken.scatter_(1, pick, True)
        distance = torch.minimum(distance, apart.gather(1, pick[..., None].expand(-1, 1, q.shape[1]))[:, 0])
    return order, torch.where(taken, scores, distance)


class Farthest:
    """The greedy loop over the rows one rank holds of one item.

    Args:
        rows, index: this rank's unit rows and their global indices, ascending.
        again: whether kept rows may be taken again. frame: rows of a frame: how far apart near neighbours are likely to lie.
    """

    def __init__(self, rows: UnitRows, index: Tensor, again: bool = False, frame: int = 1) -> None:
        self.rows, self.index, self.again, self.frame = rows, index, again, frame
        self.distance = rows.half.new_full((rows.count,), math.inf)  # to the nearest kept token
        self.picked_at = torch.zeros_like(self.distance)
        self.taken = torch.zeros(rows.count, dtype=torch.bool, device=index.device)

    @property
    def scores(self) -> Tensor:
        return torch.where(self.taken, self.picked_at, self.distance)

    def run(self, count: int, transport: Transport, first: Found | None = None) -> Tensor:
        """Global indices (count,) in the order of choice, the same on every rank; begins with `first`, or the most isolated."""
        first = first or most_isolated(self.rows, self.index, transport, strides=(1, self.frame))
        chosen = [torch.tensor([first.index], device=self.index.device)]
        self.keep(chosen[0], [min(first.distance, _FARTHEST)], first.row[None], first.half[None])
        left, pool_size = count - 1, _SMALLEST_POOL
        while left > 0:
            pool = self.pool(pool_size, transport)
            picks, distance = pool.choose(left, self.again)
            chosen.append(pool.index[picks])
            self.keep(chosen[-1], distance, pool.q[picks], pool.half[picks])
            left -= len(picks)
            pool_size = min(_LARGEST_POOL, max(_SMALLEST_POOL, 4 * len(picks)))
        return torch.cat(chosen)

    def keep(self, chosen: Tensor, distance: list[float], q: Tensor, half: Tensor) -> None:
        """Mark chosen tokens where they live (the first choice counts), and bring every row up to date with them."""
        for step, row in (self.index[None, :] == chosen[:, None]).nonzero().tolist():
            if not self.taken[row]:
                self.taken[row], self.picked_at[row] = True, distance[step]
        for part, fresh in self.rows.distances(None, q, half):
            self.distance[part] = torch.minimum(self.distance[part], fresh.amin(1))

    def pool(self, size: int, transport: Transport) -> _Pool:
        """The `size` farthest rows of all ranks, and how far the farthest that stayed out is, on every rank alike."""
        distance = self.distance if self.again else self.distance.masked_fill(self.taken, -math.inf)
        order = torch.sort(distance, descending=True, stable=True).indices[: size + 1]
        offer = torch.stack([distance[order], -self.index[order].double()], 1)
        ranking = sorted(torch.cat(transport.all_gather(offer)).tolist(), reverse=True)
        bar = tuple(ranking[size]) if len(ranking) > size else (-math.inf, -math.inf)
        above = (offer[:, 0] > bar[0]) | ((offer[:, 0] == bar[0]) & (offer[:, 1] > bar[1]))
        mine = order[above]
        head = torch.stack([self.index[mine].double(), self.rows.half[mine], distance[mine]], 1)
        return _Pool(*unpack(torch.cat(transport.all_gather(pack(head, self.rows.take(mine)))), 3), bar)


class _Pool:
    """A few tokens with everything the greedy loop needs to know about them.

    Args:
        head: (m, 3) global index, half and distance of each; q: (m, D) their unit rows.
        bar: (distance, -index) of the farthest token outside; a choice must beat it.
    """

    def __init__(self, head: Tensor, q: Tensor, bar: tuple[float, ...]) -> None:
        order = head[:, 0].argsort()  # by index, so that arg-max finds the lowest on ties
        self.index, self.half, self.distance = head[order, 0].long(), head[order, 1], head[order, 2]
        self.q, self.bar = q[order], bar

    def choose(self, limit: int, again: bool) -> tuple[list[int], list[float]]:
        """Up to `limit` greedy choices with their distances, as long as no token outside can be farther; at least one."""
        pairs = torch.addmm(self.half, self.q, self.q.T, alpha=-1).add_(self.half[:, None])
        indices, distance = self.index.tolist(), self.distance
        order: list[int] = []
        values: list[float] = []
        while len(order) < limit:
            best = int(distance.argmax())
            value = float(distance[best])
            if value == -math.inf or (value, -indices[best]) <= self.bar:
                break
            order.append(best)
            values.append(value)
            distance = torch.minimum(distance, pairs[best])
            if not again:
                distance[best] = -math.inf
        assert order, "the farthest token of all is always inside the pool"
        return order, values
