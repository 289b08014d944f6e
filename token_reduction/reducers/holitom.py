"""HoliTom's outer stage: cut a video so that as many still cells as possible fall away, then merge in space.

    still(c, segment)   cosine of cell c with itself one frame on is above tau throughout the segment
    cuts                maximise sum over segments of (length - 1) x still cells            (dynamic programme)
    a still cell's tokens become one, at the segment's first frame; of what is left, half by [CLS] attention,
    half as density-peak clusters

Source: HoliTom, "Holistic Token Merging for Fast Video Large Language Models" (NeurIPS 2025), sections 3.2 and 3.3. Its stage
in the model is a layer policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.budget import apportion
from token_reduction.exact import top
from token_reduction.selectors.cluster import density_peaks, join_nearest, scaled_rows
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class HoliTom(UnitReducer):
    """Keep exactly k rows of each video.

    Args:
        tau: cosine above which a cell stands still. longest: most frames of a segment.
        merged: share of a frame's rows that are clusters. neighbours: nearest rows that make a density.

    Where fewer tokens than k are left after the still ones joined, the still ones that moved most stay apart. Scores: [CLS]
    attention. Variants: one algorithm; best, paper and released are the same.
    """

    tau: float = 0.65
    longest: int = 32
    merged: float = 0.5
    neighbours: int = 7
    name: ClassVar[str] = "holitom"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn"})
    cost: ClassVar[str] = "O(n (D + s) + T N^2 D), s frames of the longest segment"
    source: ClassVar[str] = "HoliTom, outer-model merging"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest < 1 or not 0 <= self.merged <= 1:
            raise ValueError(f"holitom needs longest >= 1 and merged in 0..1, got {self.longest!r}, {self.merged!r}")

    def select_one(self, batch: Batch, count: int) -> Selection:
        t, h, w = batch.grid
        n, attention = h * w, batch.attention()[0]
        group = self.still(batch.units()[0].view(t, n, -1), count)
        anchors = group.unique()
        frames = anchors // n
        sizes = torch.bincount(frames, minlength=t).tolist()
        shares, first = apportion(count, [float(s) for s in sizes], sizes), 0
        final = torch.full((t * n,), -1, device=group.device)
        for size, share in zip(sizes, shares):
            tokens = anchors[first : first + size]
            first += size
            if share:
                chosen, place = self.frame(batch.x[0, tokens], attention[tokens], share)
                final[tokens] = torch.where(place >= 0, tokens[chosen][place.clamp_min(0)], -1)
        kept = final[final >= 0].unique()
        member = final[group]
        row = torch.where(member >= 0, torch.searchsorted(kept, member.clamp_min(0)), -1)
        return Selection.groups(kept, row, attention)

    def still(self, q: Tensor, count: int) -> Tensor:
        """(T N,) the anchor of each token after still cells joined in time; `count` anchors at least."""
        t, n, _ = q.shape
        alike = torch.cat([(q[1:] * q[:-1]).sum(-1), q.new_zeros(1, n)])[: t - 1]
        anchor = torch.arange(t * n, device=q.device).view(t, n).clone()
        for first, last in self.cuts(alike > self.tau, t):
            quiet = (alike[first : last - 1] > self.tau).all(0) if last - first > 1 else alike.new_zeros(n).bool()
            anchor[first:last, quiet] = anchor[first, quiet]
        joined = (anchor != torch.arange(t * n, device=q.device).view(t, n)).nonzero()
        missing = count - (t * n - len(joined))
        if missing > 0:
            moved = 1 - alike[joined[:, 0] - 1, joined[:, 1]]
            apart = joined[top(moved, missing)]
            anchor[apart[:, 0], apart[:, 1]] = apart[:, 0] * n + apart[:, 1]
        return anchor.flatten()

    def cuts(self, quiet: Tensor, frames: int) -> list[tuple[int, int]]:
        """Segments (first, last) with the most saved tokens; quiet: (T - 1, N) bool. Ties go to the longer last segment."""
        best, back = [0] * (frames + 1), [0] * (frames + 1)
        for last in range(1, frames + 1):
            options, together = [], None
            for length in range(1, min(self.longest, last) + 1):
                first = last - length
                if length > 1:
                    together = quiet[first] if together is None else together & quiet[first]
                saved = 0 if together is None else int(together.sum()) * (length - 1)
                options.append((best[first] + saved, length))
            best[last], length = max(options)
            back[last] = last - length
        edges = [frames]
        while edges[-1]:
            edges.append(back[edges[-1]])
        edges.reverse()
        return list(pairwise(edges))

    def frame(self, x: Tensor, attention: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Of a frame's tokens: which stay (count,), ascending, and each token's place among them."""
        first = top(attention, count - min(count - 1, round(self.merged * count)))
        others = torch.ones(len(x), dtype=torch.bool, device=x.device)
        others[first] = False
        others = others.nonzero()[:, 0]
        place = torch.full((len(x),), -1, device=x.device)
        if len(first) == count:
            kept = first.sort().values
            place[kept] = torch.arange(count, device=x.device)
            return kept, place
        rows = scaled_rows(x[others])
        centres = top(density_peaks(rows, self.neighbours), count - len(first)).sort().values
        kept = torch.cat([first, others[centres]]).sort().values
        place[first] = torch.searchsorted(kept, first)
        place[others] = torch.searchsorted(kept, others[centres])[join_nearest(rows, centres)]
        return kept, place
