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
from sparse_attn.identify.products import grouped, test_dtype
from sparse_attn.stripes import within

SQUARE = 128
"""Rows at a time of the row maximum: they read a triangle's keys and mask only the last square."""


class MeanFinder:
    """`identify="pooled"` and `"lse"`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        geometry: Geometry,
        config: AnchorConfig,
        scale: float,
        keep: Tensor | None,
    ) -> None:
        self.q, self.k, self.lse, self.geometry = q, k, lse, geometry
        self.config, self.scale, self.keep = config, scale, keep
        self.theta = lse.new_tensor(config.thetas(q.shape[2]))[:, None]

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
        q = self.q[entry, rows].transpose(0, 1).to(self.lse.dtype)
        if self.config.identify == "pooled":
            anchor = row_maximum(self.q[entry, rows], self.k[entry], group, self.scale, self.config.scores, self.keep)
        else:
            anchor = self.lse[entry, :, rows]
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


def row_maximum(q: Tensor, k: Tensor, group: Group, scale: float, scores: str, keep: Tensor | None) -> Tensor:
    """(Hq, rows): the largest scaled score of each row over its anchor region.

    Args:
        q: (rows, Hq, D), the group's. k: (Sk, Hkv, D), all rows.
    """
    dtype = test_dtype(q, scores)
    heads, rows = k.shape[1], group.count
    queries = grouped(q * scale, heads).to(dtype)
    each = queries.shape[1] // rows
    parts = [k[a:b] for a, b in group.prefix] + ([] if keep is None else [k[within(keep, group.candidates)]])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    best = torch.full((heads, each, rows), -torch.inf, dtype=wide, device=q.device)
    for part in parts:
        if part.shape[0]:
            found = torch.bmm(queries, part.permute(1, 2, 0).to(dtype)).amax(2)
            best = torch.maximum(best, found.view(heads, each, rows).to(wide))
    own = k[group.diagonal : group.diagonal + rows].permute(1, 2, 0).to(dtype)
    queries = queries.view(heads, each, rows, -1)
    for first in range(0, rows, SQUARE):
        stop = min(first + SQUARE, rows)
        found = torch.matmul(queries[:, :, first:stop], own[:, None, :, :stop])
        later = torch.ones(stop - first, stop - first, dtype=torch.bool, device=q.device).triu(1)
        found[..., first:stop].masked_fill_(later, -torch.inf)
        best[:, :, first:stop] = torch.maximum(best[:, :, first:stop], found.amax(3).to(wide))
    return best.flatten(0, 1)
