"""EVS, efficient video sampling: keep the tokens that changed most since the previous frame.

    s(t, c) = 1 - cosine(x[t, c], x[t-1, c]),    s(0, c) = 255       for cell c of frame t
    keep the largest s, ties to the lowest index

Source: the method of that name in vLLM (pull request 22980). A scene's first frame comes whole, later frames pay only for
what moved; a still frame may keep nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.budget import Budget
from token_reduction.exchange import fetch_rows
from token_reduction.reducer import Reducer, refuse_unfinite
from token_reduction.reduction import Reduction
from token_reduction.rows import blocks, cosine, item_mean
from token_reduction.tokens import TokenShard
from tokenring.transport import Transport

_FORCED = 255.0


@dataclass(frozen=True, kw_only=True)
class EVS(Reducer):
    """Keep the tokens that differ most from the same cell one frame earlier; frame 0 always comes first.

    A ratio r (the share *kept*, so vLLM's pruning rate q is 1 - r) keeps max(h w, int(T h w r)): never less than one frame.
    A count k keeps min(k, T h w) exactly; below h w these are the first k cells of frame 0, so give one frame or more.

    Args:
        center: take the item's mean off every token before the cosine.

    Variants: one algorithm; best, paper and released are the same.
    Scores: s of every token, float32. Cost O(n D). On several ranks only previous-frame rows that live elsewhere and one
    number per token travel.

    >>> EVS().count([(8, 4, 4)], Budget.ratio(0.25)), EVS().count([(2, 4, 4)], Budget.ratio(0.25))
    ([32], [16])
    """

    center: bool = False
    name: ClassVar[str] = "evs"
    cost: ClassVar[str] = "O(n D)"
    source: ClassVar[str] = "EVS, efficient video sampling (vLLM)"
    form: ClassVar[str] = "authors'"

    def item_count(self, item: tuple[int, int, int], budget: Budget) -> int:
        t, h, w = item
        if budget.kind == "count" or t == 0:
            return budget.tokens(t * h * w)
        return max(h * w, int(t * h * w * budget.value))

    def problem(self, shard: TokenShard, counts: Sequence[int]) -> str | None:
        return super().problem(shard, counts) or refuse_unfinite(self, shard)

    def reduce_shard(
        self,
        shard: TokenShard,
        counts: Sequence[int],
        transport: Transport,
        generator: torch.Generator | None,
    ) -> Reduction:
        local = self.change(shard, transport)
        everywhere = local.new_empty(shard.total)
        packed = torch.stack([shard.global_index.double(), local], 1)
        for part in transport.all_gather(packed):
            everywhere[part[:, 0].long()] = part[:, 1]
        starts = shard.cu_seqlens.to(local.device)
        item = torch.repeat_interleave(starts.diff())
        order = torch.sort(everywhere, descending=True, stable=True).indices
        order = order[torch.sort(item[order], stable=True).indices]  # item by item, the best of each first
        rank = torch.arange(shard.total, device=local.device) - starts[item]
        kept = order[rank < torch.tensor(counts, device=local.device)[item]].sort().values
        return Reduction.keep(shard, kept.split(list(counts)), local.float())

    def change(self, shard: TokenShard, transport: Transport) -> Tensor:
        """s of this rank's rows, (n,) float64, in bits that do not depend on the partition."""
        item, previous = _previous(shard)
        rows = (previous >= 0).nonzero()[:, 0]
        local = shard.find(previous[rows])
        missing = previous[rows[local < 0]]
        fetched = fetch_rows(shard, missing, transport)
        means = self.means(shard, transport)
        score = torch.full((shard.x.shape[0],), _FORCED, dtype=torch.float64, device=shard.x.device)
        for first, last in blocks(rows.numel(), shard.x.shape[1], shard.x.device):
            here, at = rows[first:last], local[first:last]
            before = shard.x[at.clamp_min(0)]
            before[at < 0] = fetched[torch.searchsorted(missing, previous[here[at < 0]])]
            mean = means[item[here]]
            score[here] = 1.0 - cosine(shard.x[here].double() - mean, before.double() - mean)
        return score

    def means(self, shard: TokenShard, transport: Transport) -> Tensor:
        """(items, D) float64: what is taken off the rows of each item; (items, 1) zeros where nothing is centred."""
        lengths, bounds = shard.cu_seqlens.diff().tolist(), shard.bounds
        if not self.center:
            return shard.x.new_zeros((len(lengths), 1), dtype=torch.float64)
        parts = [shard.x[first:last] for first, last in pairwise(bounds)]
        return torch.stack([item_mean(x, max(n, 1), transport) for x, n in zip(parts, lengths)])


def _previous(shard: TokenShard) -> tuple[Tensor, Tensor]:
    """Of each local row, (n,) int64: its item, and the global row of its cell one frame earlier (-1 in frame 0)."""
    device = shard.x.device
    starts = shard.cu_seqlens.to(device)
    item = torch.searchsorted(starts, shard.global_index, right=True) - 1
    frame = torch.tensor([h * w for _, h, w in shard.grid], device=device)[item]
    first = shard.global_index - starts[item] < frame
    return item, torch.where(first, -1, shard.global_index - frame)
