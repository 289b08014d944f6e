"""Mean queries against a mean anchor: the paper's test, and the same with log-sum-exp as anchor.

qbar_u = mean of q over block u,   xbar_u = mean over block u of the anchor region's row maximum ("pooled") or lse ("lse")
keep column j  <=>  qbar_u . k_j * scale + theta >= xbar_u  for some block u of the group          (arXiv 2505.23520, 3.3)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise, takewhile

import torch
from torch import Tensor

from sparse_attn.config import AnchorConfig
from sparse_attn.geometry import Geometry, Group
from sparse_attn.identify.maximum import row_tops
from sparse_attn.kernels.state import AnchorState

ROWS_AT_ONCE = 128
"""Mean queries of one key head that share a pass over its keys: fewer multiply slowly and wait for memory."""
KEYS_AT_ONCE = 1024
"""Keys of one product: its scores stay in a cache until their maximum is taken."""
MARGINS_AT_ONCE = 1 << 24
"""Numbers that may wait for their group."""


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
        self.number = {group: number for number, group in enumerate(geometry.groups)}
        self.anchor = (
            state.lse if config.identify == "lse" else row_tops(state, q, k, geometry, scale, keep, config.scores)
        )
        self.theta = state.lse.new_tensor(config.thetas(q.shape[2]))[:, None]
        self.ahead: dict[tuple[Group, int], Tensor] = {}

    def kept(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates): see `Finder`."""
        return self.margins(group, entry) >= -self.theta

    def passed(self, group: Group, entry: int) -> Tensor:
        """bool (Hq, candidates): there is no second test."""
        return self.kept(group, entry)

    def margins(self, group: Group, entry: int) -> Tensor:
        """(Hq, candidates): largest pooled score above the pooled anchor, over the group's blocks.

        A few groups that come next are found along with it, and kept until they are asked for.
        """
        if (group, entry) not in self.ahead:
            groups = self._next(group)
            means, anchors = (torch.stack(x, 1) for x in zip(*(self.pooled(g, entry) for g in groups)))
            keys = self.k[entry, group.candidates[0] : groups[-1].candidates[1]]
            found = mean_margins(means, anchors, keys, [g.candidate_keys for g in groups])
            self.ahead = {(g, entry): found[:, n, : g.candidate_keys] for n, g in enumerate(groups)}
        return self.ahead.pop((group, entry))

    def _next(self, group: Group) -> list[Group]:
        """The group and those like it that follow."""
        each, blocks = self.q.shape[2] // self.k.shape[2], -(-group.count // self.geometry.block)
        first = self.number.get(group, len(self.number))
        at_once = min(ROWS_AT_ONCE // (each * blocks), MARGINS_AT_ONCE // (self.q.shape[2] * self.k.shape[1]))
        following = self.geometry.groups[first + 1 : first + max(1, at_once)]
        kind = group.document, group.count, group.candidates[0]
        return [group, *takewhile(lambda g: (g.document, g.count, g.candidates[0]) == kind, following)]

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


def mean_margins(means: Tensor, anchors: Tensor, keys: Tensor, counts: Sequence[int]) -> Tensor:
    """(Hq, G, C): max over a group's blocks of score - anchor, for the first keys of each group.

    Args:
        means: scaled mean queries (Hq, G, U, D). anchors: (Hq, G, U). keys: (C, Hkv, D).
        counts: ascending; how many keys each group asks about. What lies beyond holds anything.
    """
    kv_heads, (groups, blocks) = keys.shape[1], means.shape[1:3]
    rows, anchors = (x.unflatten(0, (kv_heads, -1)) for x in (means.to(keys.dtype), anchors.unsqueeze(3)))
    found = anchors.new_empty(*rows.shape[:3], keys.shape[0])
    threads = torch.get_num_threads()
    for head in range(0, kv_heads, threads):
        heads = slice(head, head + threads)
        for first in range(0, keys.shape[0], KEYS_AT_ONCE):
            some, left = slice(first, first + KEYS_AT_ONCE), bisect_right(counts, first)
            stacked = rows[heads, :, left:].flatten(1, 3)
            scores = torch.bmm(stacked, keys[some, heads].permute(1, 2, 0)).to(anchors.dtype)
            scores = scores.unflatten(1, (-1, groups - left, blocks)).sub_(anchors[heads, :, left:])
            torch.amax(scores, 3, out=found[heads, :, left:, some])
    return found.flatten(0, 1)
