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
        self.theta = state.lse.new_tensor(config.thetas(q.shape[2]))[:, None]

    def kept(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates): see `Finder`."""
        return self.margins(group, entry) >= -self.theta

    def passed(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates): there is no second test."""
        return self.kept(group, entry)

    def margins(self, group: Group, entry: int) -> Tensor:
        """(Hq, candidates): largest pooled score above the pooled anchor, over the group's blocks."""
        means, anchors = self.pooled(group, entry)
        keys = self.k[entry, slice(*group.candidates)]
        return mean_margins(means, anchors, keys)

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


def mean_margins(means: Tensor, anchors: Tensor, keys: Tensor) -> Tensor:
    """(Hq, C): max over blocks of score - anchor, for scaled mean queries (Hq, U, D), anchors (Hq, U) and keys (C, Hkv, D)."""
    kv_heads, blocks = keys.shape[1], means.shape[1]
    rows = means.to(keys.dtype).reshape(kv_heads, -1, means.shape[2])
    scores = torch.bmm(rows, keys.permute(1, 2, 0)).to(anchors.dtype)
    scores = scores.view(means.shape[0], blocks, -1).sub_(anchors.unsqueeze(2))
    return scores.amax(1)
