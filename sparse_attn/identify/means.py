"""Mean queries against a mean anchor: the paper's test, and the same with log-sum-exp as anchor.

qbar_u = mean of q over block u,   xbar_u = mean over block u of the anchor region's row maximum ("pooled") or lse ("lse")
keep column j  <=>  qbar_u . k_j * scale + theta >= xbar_u  for some block u of the group          (arXiv 2505.23520, 3.3)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparse_attn.config import AnchorConfig
from sparse_attn.geometry import Geometry, Group
from sparse_attn.identify.ahead import Ahead, group_maxima, groups_at_once, reaching
from sparse_attn.identify.maximum import row_tops
from sparse_attn.identify.products import beside, finite_thetas, test_dtype, with_ones
from sparse_attn.kernels.state import AnchorState


class MeanTest:
    """Keys ready for mean queries, and the test: anchors ride along as further dims where keys are copied to 16 bits anyway."""

    def __init__(self, k: Tensor, config: AnchorConfig, q_heads: int, like: Tensor) -> None:
        """k: (B, Sk, Hkv, D). like: any tensor of the anchors' dtype and device."""
        self.dtype = test_dtype(k, config.scores)
        self.joined = self.dtype != k.dtype
        self.keys = with_ones(k, self.dtype).transpose(1, 2) if self.joined else k
        self.theta = finite_thetas(like, config.thetas(q_heads), self.dtype)[:, None, None]

    def kept(self, means: Tensor, anchors: Tensor, keys: Tensor, counts: Sequence[int]) -> Tensor:
        """bool (Hq, G, C): scaled mean queries (Hq, G, U, D) and anchors (Hq, G, U) of groups that ask about `counts` of the
        keys (C, Hkv, d), some of `self.keys`."""
        least = anchors - self.theta
        if self.joined:
            return reaching(beside(means, least, self.dtype), None, keys, counts)
        return reaching(means.to(keys.dtype), least, keys, counts)


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
        self.test = MeanTest(k, config, q.shape[2], state.lse)
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
        counts = [group.candidate_keys for group in groups]
        keys = self.test.keys[entry, groups[0].candidates[0] : groups[-1].candidates[1]]
        found = self.test.kept(*self._pooled_together(groups, entry), keys, counts)
        return [found[:, n, :count] for n, count in enumerate(counts)]

    def margins(self, group: Group, entry: int) -> Tensor:
        """(Hq, candidates): largest pooled score above the pooled anchor, over the group's blocks."""
        means, anchors = self._pooled_together([group], entry)
        keys = self.k[entry, slice(*group.candidates)]
        return group_maxima(means.to(keys.dtype), anchors, keys, [group.candidate_keys])[:, 0]

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
