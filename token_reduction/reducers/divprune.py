"""DivPrune: the subset whose closest pair is as far apart as greedy choice can make it (max-min diversity).

    d(i, j) = 1 - cosine(x_i, x_j)
    first:  arg-max_i  min_{j != i} d(i, j)          the token farthest from its nearest neighbour
    next:   arg-max_i  min_{j kept} d(i, j)          until k are kept; ties go to the lowest index

Source: DivPrune, "Diversity-based Visual Token Pruning for Large Multimodal Models" (CVPR 2025), method section.

The loop is `selectors.farthest`: rounds of matrix products, exact, the same on any partition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.exact import unit_rows
from token_reduction.reducer import Reducer, refuse_unfinite
from token_reduction.reduction import Reduction
from token_reduction.rows import UnitRows, at_once, item_mean
from token_reduction.selectors.farthest import SMALL, Farthest, farthest_batch
from token_reduction.tokens import TokenShard
from tokenring.transport import Transport


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

    Many small items of one size are chosen in at once. Time O(k n D) and, for the first token, O(n^2 D) at worst, far less where
    tokens have near neighbours; memory O(n).
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
    flat: ClassVar[bool] = True

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
        bounds, lengths = shard.bounds, shard.cu_seqlens.diff().tolist()
        kept = self.together(shard, counts, lengths, scores) if transport.world == 1 else {}
        for item, count in enumerate(counts):
            part = slice(bounds[item], bounds[item + 1])
            if item in kept:
                continue
            if count == 0:
                kept[item] = shard.global_index[:0]
                continue
            mean = item_mean(shard.x[part], lengths[item], transport) if self.center else None
            rows, index = UnitRows(shard.x[part], mean), shard.global_index[part]
            _, height, width = shard.grid[item]
            greedy = Farthest(rows, index, again=self.variant == "released", frame=height * width)
            kept[item] = greedy.run(count, transport).sort().values
            scores[part] = greedy.scores.float()
        return Reduction.keep(shard, [kept[item] for item in range(len(counts))], scores)

    def together(
        self, shard: TokenShard, counts: Sequence[int], lengths: Sequence[int], scores: Tensor
    ) -> dict[int, Tensor]:
        """Small items of equal length and count, many at a time: item -> kept rows; fills in their scores."""
        kept: dict[int, Tensor] = {}
        alike: dict[tuple[int, int], list[int]] = {}
        for item, (length, count) in enumerate(zip(lengths, counts)):
            if count and length <= SMALL and self.variant != "released":
                alike.setdefault((length, count), []).append(item)
        for (length, count), items in alike.items():
            step = at_once(length, shard.x.shape[1], shard.x.device)
            for group in (items[i : i + step] for i in range(0, len(items), step)):
                starts = shard.cu_seqlens[group].to(shard.x.device)
                rows = starts[:, None] + torch.arange(length, device=shard.x.device)
                order, worth = farthest_batch(unit_rows(shard.x[rows], self.center), count)
                scores[rows] = worth.float()
                kept |= zip(group, starts[:, None] + order.sort().values)
        return kept
