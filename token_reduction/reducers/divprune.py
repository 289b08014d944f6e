"""DivPrune: the subset whose closest pair is as far apart as greedy choice can make it (max-min diversity).

    d(i, j) = 1 - cosine(x_i, x_j)
    first:  arg-max_i  min_{j != i} d(i, j)          the token farthest from its nearest neighbour
    next:   arg-max_i  min_{j kept} d(i, j)          until k are kept; ties go to the lowest index

Source: DivPrune, "Diversity-based Visual Token Pruning for Large Multimodal Models" (CVPR 2025), method section.

The greedy loop needs one comparison of every token with every kept one: k n D products. It is run here in rounds. Distances
to the kept set only ever shrink, so an old value is an upper bound. A round brings all tokens up to date (one matrix product
with the tokens kept last round), puts the farthest of all ranks in a small pool, and then chooses inside the pool as long as
its best beats the farthest token outside. Same choice as token by token; the pool's rows are the only features that travel,
and two small collectives serve many choices. All distances are exact (`rows.UnitRows`), hence the same on any partition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.isolation import most_isolated
from token_reduction.reducer import Reducer, refuse_unfinite
from token_reduction.reduction import Reduction
from token_reduction.rows import UnitRows, item_mean, pack, unpack
from token_reduction.tokens import TokenShard
from tokenring.transport import Transport

_SMALLEST_POOL, _LARGEST_POOL = 32, 512
_FARTHEST = 2.0  # 1 - cosine is at most 2: the score of a token that has no other token to be compared with


@dataclass(frozen=True, kw_only=True)
class DivPrune(Reducer):
    """Keep the max(1, round(r n)) or min(k, n) tokens that greedy max-min selection finds in each item.

    Args:
        center: take the item's mean off every token before the cosine. Features that share a large mean have all cosines
            near 1; the published method does not centre.
        variant: "best" and "paper" choose among tokens that are not kept yet. "released" does as the released code, which
            does not exclude them: once every token left equals a kept one, the lowest index is taken again and again, and
            `index` holds it several times.

    Scores: for a kept token its distance when it was chosen (the first: to its nearest other token), for the others the
    distance to the nearest kept token in the end. 0 to 2; float32.

    Time O(k n D) and, for the first token, O(n^2 D) at worst, far less where tokens have near neighbours; memory O(n).
    An all-zero token is at 1/2 from every other and at 0 from its like.

    >>> from token_reduction import Budget, VisualTokens
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.2]])
    >>> tokens = VisualTokens(x, [0, 4], [(1, 2, 2)], torch.arange(4)[None])
    >>> DivPrune().reduce(tokens, Budget.count(3)).index
    tensor([0, 2, 3])
    """

    center: bool = False
    name: ClassVar[str] = "divprune"
    cost: ClassVar[str] = "O(k n D) time, O(n) memory beyond the tokens"
    source: ClassVar[str] = "DivPrune (CVPR 2025)"
    form: ClassVar[str] = "authors'"

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return float(item[0] * item[1] * item[2]) * count * width

    def problem(self, shard: TokenShard, counts: Sequence[int]) -> str | None:
        return super().problem(shard, counts) or refuse_unfinite(self, shard)

    def reduce_shard(
        self,
        shard: TokenShard,
        counts: Sequence[int],
        transport: Transport,
        generator: torch.Generator | None,
    ) -> Reduction:
        scores = torch.zeros(shard.x.shape[0], device=shard.x.device)
        kept, bounds, lengths = [], shard.bounds, shard.cu_seqlens.diff().tolist()
        for item, count in enumerate(counts):
            part = slice(bounds[item], bounds[item + 1])
            if count == 0:
                kept.append(shard.global_index[:0])
                continue
            mean = item_mean(shard.x[part], lengths[item], transport) if self.center else None
            rows, index = UnitRows(shard.x[part], mean), shard.global_index[part]
            _, height, width = shard.grid[item]
            greedy = _Greedy(rows, index, again=self.variant == "released", frame=height * width)
            kept.append(greedy.run(count, transport).sort().values)
            scores[part] = greedy.scores.float()
        return Reduction.keep(shard, kept, scores)


class _Greedy:
    """The greedy loop over the rows one rank holds of one item."""

    def __init__(self, rows: UnitRows, index: Tensor, again: bool, frame: int) -> None:
        self.rows, self.index, self.again, self.frame = rows, index, again, frame
        self.distance = rows.half.new_full((rows.count,), math.inf)  # to the nearest kept token
        self.picked_at = torch.zeros_like(self.distance)
        self.taken = torch.zeros(rows.count, dtype=torch.bool, device=index.device)

    @property
    def scores(self) -> Tensor:
        return torch.where(self.taken, self.picked_at, self.distance)

    def run(self, count: int, transport: Transport) -> Tensor:
        """Global indices (count,) in the order of choice, the same on every rank."""
        first = most_isolated(self.rows, self.index, transport, strides=(1, self.frame))
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
