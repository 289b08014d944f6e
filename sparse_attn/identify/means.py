"""Mean queries against a mean anchor: the paper's test, and the same with log-sum-exp as anchor.

qbar_u = mean of q over block u,   xbar_u = mean over block u of the anchor region's row maximum ("pooled") or lse ("lse")
keep column j  <=>  qbar_u . k_j * scale + theta >= xbar_u  for some block u of the group          (arXiv 2505.23520, 3.3)
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sparse_attn.config import AnchorConfig
from sparse_attn.geometry import Geometry, Group
from sparse_attn.identify.ahead import Ahead, group_maxima, groups_at_once, reaching
from sparse_attn.identify.maximum import row_tops
from sparse_attn.kernels.state import AnchorState


class MeanFinder:
    """`identify="pooled"` and `"lse"`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        state: AnchorState,
        geometry: Geometry,
        config: AnchorConfig,
        scale: float,
        keep: Tensor | None,
    ) -> None:
        self.q, self.k, self.geometry, self.scale = q, k, geometry, scale
        self.anchor = (
            state.lse if config.identify == "lse" else row_tops(state, q, k, geometry, scale, keep, config.scores)
        )
        self.theta = state.lse.new_tensor(config.thetas(q.shape[2]))[:, None, None]
        self.ahead: Ahead[Tensor] = Ahead(geometry)

    def kept(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates): see `Finder`."""
        each, blocks = self.q.shape[2] // self.k.shape[2], -(-group.count // self.geometry.block)
        at_once = groups_at_once(each * blocks, self.q.shape[2], self.k.shape[1])
        return self.ahead.of(group, entry, at_once, lambda groups: self._kept(groups, entry))

    def passed(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates): there is no second test."""
        return self.kept(group, entry)

    def _kept(self, groups: list[Group], entry: int) -> list[Tensor]:
        means, anchors, keys, counts = self._asked(groups, entry)
        found = reaching(means, anchors - self.theta, keys, counts)
        return [found[:, n, :count] for n, count in enumerate(counts)]

    def margins(self, group: Group, entry: int) -> Tensor:
        """(Hq, candidates): largest pooled score above the pooled anchor, over the group's blocks."""
        return group_maxima(*self._asked([group], entry))[:, 0]

    def _asked(self, groups: list[Group], entry: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Mean queries and anchors of some groups, all candidates of the last, and how many of these are each group's."""
        means, anchors = self._pooled_together(groups, entry)
        keys = self.k[entry, groups[0].candidates[0] : groups[-1].candidates[1]]
        return means.to(keys.dtype), anchors, keys, [group.candidate_keys for group in groups]

    def _pooled_together(self, groups: list[Group], entry: int) -> tuple[Tensor, Tensor]:
        """Scaled mean queries (Hq, groups, blocks, D) and anchors (Hq, groups, blocks)."""
        block, first = self.geometry.block, groups[0]
        if len(groups) == 1 or first.count % block:
            means, anchors = zip(*(self.pooled(group, entry) for group in groups))
            return torch.stack(means, 1), torch.stack(anchors, 1)
        # Whole groups that follow one another: their blocks are cut in one go.
        rows, shape = slice(first.rows[0], groups[-1].rows[1]), (len(groups), -1, block)
        means = self.q[entry, rows].to(self.anchor.dtype).unflatten(0, shape).mean(2) * self.scale
        return means.permute(2, 0, 1, 3), self.anchor[entry, :, rows].unflatten(1, shape).mean(3)

    def pooled(self, group: Group, entry: int) -> tuple[Tensor, Tensor]:
        """Scaled mean queries (Hq, blocks, D) and anchors (Hq, blocks)."""
        rows = slice(*group.rows)
        q = self.q[entry, rows].transpose(0, 1).to(self.anchor.dtype)
        anchor = self.anchor[entry, :, rows]
        lead = (group.diagonal - self.geometry.documents[group.document][1][0]) % self.geometry.block
        cuts = [0, *range(self.geometry.block - lead, group.count, self.geometry.block), group.count]
        sizes = [b - a for a, b in pairwise(cuts)]
        if len(set(sizes)) == 1:
            return q.unflatten(1, (len(sizes), -1)).mean(2) * self.scale, anchor.unflatten(1, (len(sizes), -1)).mean(2)
        means = torch.stack([part.mean(1) for part in q.split(sizes, 1)], 1)
        return means * self.scale, torch.stack([part.mean(1) for part in anchor.split(sizes, 1)], 1)
