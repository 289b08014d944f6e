"""FastVID: cut a video where it changes, keep what the encoder attends to, merge the rest around density peaks.

    segments   cut before frames whose pooled cosine to the frame before is among the c - 1 lowest, or below tau
    salient    (1 - d) of a segment's rows: each frame's most attended tokens
    merged     d of them: density-peak centres of every p-th frame; a token of the segment joins its nearest centre
               row = alpha centre + (1 - alpha) mean of those that joined

Source: FastVID, "Dynamic Density Pruning for Fast Video Large Language Models" (NeurIPS 2025), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.budget import apportion
from token_reduction.exact import fixed_mean, rest, spread, top, unit_rows
from token_reduction.selectors.cluster import density_peaks, join_nearest, scaled_rows
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class FastVID(UnitReducer):
    """Keep exactly k rows of each video.

    Args:
        segments, tau: c and tau of the cuts. merged: d. stride: p. alpha: weight of a centre in its own row.
        neighbours: nearest rows that make a density.

    Scores: [CLS] attention. Variants: one algorithm; best, paper and released are the same.
    """

    segments: int = 8
    tau: float = 0.9
    merged: float = 0.4
    stride: int = 4
    alpha: float = 0.6
    neighbours: int = 4
    name: ClassVar[str] = "fastvid"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn"})
    cost: ClassVar[str] = "O(n M (M/p + k_s)), M tokens and k_s rows of a segment"
    source: ClassVar[str] = "FastVID"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return float(item[0] * item[1] * item[2]) ** 2 * width / self.stride

    def select_one(self, batch: Batch, count: int) -> Selection:
        t, h, w = batch.grid
        attention = batch.attention()[0].view(t, h * w)
        cuts = self.cuts(batch.x[0].view(t, h * w, -1))
        lengths = [last - first for first, last in cuts]
        shares = apportion(count, lengths, [n * h * w for n in lengths])
        kept, rows, sources, weights, before = [], [], [], [], 0
        for (first, last), share in zip(cuts, shares):
            if share == 0:
                continue
            part = self.segment(batch.x[0, first * h * w : last * h * w], attention[first:last], share)
            kept.append(first * h * w + part.kept)
            rows.append(before + part.row)
            sources.append(first * h * w + part.source)
            weights.append(part.weight)
            before += share
        joined = (torch.cat(value) for value in (kept, rows, sources, weights))
        return Selection.merge(*joined, scores=attention.flatten())

    def cuts(self, x: Tensor) -> list[tuple[int, int]]:
        """Segments (first, last) of frames x (T, N, D)."""
        pooled = unit_rows(torch.stack([fixed_mean(frame) for frame in x]))
        alike = (pooled[1:] * pooled[:-1]).sum(-1)
        low = top(-alike, self.segments - 1)
        starts = {int(i) + 1 for i in low} | {int(i) + 1 for i in (alike < self.tau).nonzero()[:, 0]}
        edges = [0, *sorted(starts), len(x)]
        return list(pairwise(edges))

    def segment(self, x: Tensor, attention: Tensor, count: int) -> Selection:
        """`count` rows of one segment: x (M, D), attention (frames, N)."""
        frames, cells = attention.shape
        anchors = torch.arange(len(x), device=x.device).view(frames, cells)[:: self.stride].flatten()
        merged = min(round(self.merged * count), len(anchors))
        salient = [f * cells + top(attention[f], n) for f, n in enumerate(spread(count - merged, frames))]
        salient = torch.cat(salient).sort().values
        anchors = anchors[~torch.isin(anchors, salient)]
        others = rest(len(x), salient)
        merged, rows = min(merged, len(anchors)), scaled_rows(x)
        spare = count - len(salient) - merged
        if spare:
            more = others[~torch.isin(others, anchors)]
            salient = torch.cat([salient, more[top(attention.flatten()[more], spare)]]).sort().values
            others = rest(len(x), salient)
        if merged == 0:
            index = torch.arange(count, device=x.device)
            return Selection(salient, index, salient, torch.ones_like(salient, dtype=torch.float64))
        centres = anchors[top(density_peaks(rows[anchors], self.neighbours), merged)].sort().values
        kept = torch.cat([salient, centres]).sort().values
        group = join_nearest(rows[others], torch.searchsorted(others, centres))
        row = torch.cat([torch.searchsorted(kept, salient), torch.searchsorted(kept, centres)[group]])
        source = torch.cat([salient, others])
        return Selection.merge(kept, row, source, self.weights(kept, row, source))

    def weights(self, kept: Tensor, row: Tensor, source: Tensor) -> Tensor:
        """alpha for a centre, (1 - alpha) / m for each of the m that joined it, 1 for a row of one token."""
        joined = torch.bincount(row, minlength=len(kept))[row] - 1
        own = kept[row] == source
        share = torch.where(own, self.alpha, (1 - self.alpha) / joined.clamp_min(1).double())
        return torch.where(joined == 0, 1.0, share)
