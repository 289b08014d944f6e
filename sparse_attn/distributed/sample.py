"""Whether stripes pay, from a sample: the decision of one device, made of what the owners of the sampled columns know together.

The sample is that of `sparse_attn.run`: a run of candidates of the group that has most of them, in the first batch entry.
Their owners have judged them like all others by then; they count, and the ranks add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_attn import cost
from sparse_attn.config import AnchorConfig
from sparse_attn.distributed.cut import Cut, rows_of
from sparse_attn.distributed.exchange import Wire
from sparse_attn.distributed.lists import BITS
from tokenring.segments import Range


class Sample:
    """The sampled columns of one call."""

    def __init__(self, cut: Cut, config: AnchorConfig, shape: tuple[int, int, int], dim: int) -> None:
        """shape: batch, query heads, key heads. dim: mean of the two head dims."""
        self.cut, self.config, self.dim = cut, config, dim
        self.batch, self.q_heads, self.kv_heads = shape
        groups = cut.geometry.groups
        self.number = max(range(len(groups)), key=lambda n: groups[n].candidate_keys, default=-1)
        self.asked = config.dense == "auto" and self.number >= 0 and groups[self.number].candidate_keys > 0

    @property
    def span(self) -> Range:
        """The sampled run of positions."""
        return cost.sampled(self.cut.geometry, self.cut.geometry.groups[self.number])

    def count(self, rank: int, lines: Sequence[Tensor]) -> int:
        """How many pairs of a query head and a sampled column the lines of a rank's own rows name.

        lines: for each rank the lines of the rows of `rank` that it wants.
        """
        holder = self.cut.holders[self.number][0]
        line, place = lines[holder], self.cut.groups[holder].index(self.number)
        each, length = self.q_heads // self.kv_heads, max(1, self.cut.kv_layout.length(rank))
        heads, rows = line[:, 0].long() // length, line[:, 0].long() % length
        here = torch.isin(rows, rows_of(self.cut.owned(rank, self.span), line.device)) & (heads < self.kv_heads)
        bits = (divmod(place * each + head, BITS) for head in range(each))
        return sum(int(((line[here, 1 + word] >> shift) & 1).sum()) for word, shift in bits)

    def prefers_dense(self, wire: Wire, passed: Sequence[Tensor], kept: Sequence[Tensor]) -> tuple[bool, str]:
        """Whether plain attention is to run, and in words why. Collective if `asked`.

        passed, kept: for each rank the lines of this rank's rows, before and after the last test.
        """
        rank = wire.runtime.rank
        table = wire.agreed([self.count(rank, kept), self.count(rank, passed)], kept[rank].device)
        columns = self.q_heads * (self.span[1] - self.span[0])
        shares = [sum(counts) / columns for counts in zip(*table)]
        lists, g = (1.0 if self.config.share == "query" else self.kv_heads / self.q_heads), self.cut.geometry
        sparse = cost.sparse_cost(g, self.config, self.batch * self.q_heads, self.dim, *shares, lists)
        share = sparse / max(1, g.causal_pairs)
        said = f"modelled from a sample: {share:.2f} of dense at {shares[0]:.0%} of the candidates"
        return share >= cost.WORTH, said
