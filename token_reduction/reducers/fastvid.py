"""FastVID: cut a video where it changes, keep what the encoder attends to, merge the rest around density peaks.

    segments   cut before frames whose pooled cosine to the frame before is among the c - 1 lowest, or below tau
    salient    (1 - d) of a segment's rows: each frame's most attended tokens
    merged     d of them: density-peak centres of every p-th frame; a token of the segment joins its nearest centre
               row = alpha centre + (1 - alpha) mean of those that joined

Source: FastVID, "Dynamic Density Pruning for Fast Video Large Language Models" (NeurIPS 2025), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.budget import apportion
from token_reduction.exact import best_of_each, fixed_mean, rows_at, spread, top, unit_rows
from token_reduction.options import COSINE, COUNT, SHARE, Limits
from token_reduction.rows import at_once
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
    limits: ClassVar[Limits] = {
        "segments": COUNT,
        "tau": COSINE,
        "merged": SHARE,
        "stride": COUNT,
        "alpha": SHARE,
        "neighbours": COUNT,
    }
    name: ClassVar[str] = "fastvid"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn"})
    cost: ClassVar[str] = "O(n M (M/p + k_s)), M tokens and k_s rows of a segment"
    source: ClassVar[str] = "FastVID"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"

    def work(self, item: tuple[int, int, int], count: int, width: int) -> float:
        return float(item[0] * item[1] * item[2]) ** 2 * width / self.stride

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        t, h, w = batch.grid
        n, attention = h * w, batch.attention()
        found: list[list[tuple[Tensor, ...]]] = [[] for _ in batch.x]
        alike: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for unit, cuts in enumerate(self.cuts(batch.x.unflatten(1, (t, n)))):
            lengths, before = [last - first for first, last in cuts], 0
            for (first, last), share in zip(cuts, apportion(count, lengths, [frames * n for frames in lengths])):
                if share:
                    alike.setdefault((last - first, share), []).append((unit, first * n, before))
                before += share
        for (frames, share), runs in alike.items():
            size = at_once(frames * n, batch.x.shape[2], batch.x.device)
            for part in (runs[i : i + size] for i in range(0, len(runs), size)):
                x, looks = (_runs(plane, part, frames * n) for plane in (batch.x, attention))
                for (unit, first, before), (kept, row, source, weight) in zip(
                    part, zip(*self.segments_of(x, looks.unflatten(1, (frames, n)), share))
                ):
                    found[unit].append((first + kept, before + row, first + source, weight))
        return [self.joined(parts, score) for parts, score in zip(found, attention)]

    @staticmethod
    def joined(parts: list[tuple[Tensor, ...]], score: Tensor) -> Selection:
        """A unit's answer from its segments' kept tokens, rows, sources and weights."""
        parts = sorted(parts, key=lambda part: int(part[0][0]))
        return Selection.merge(*(torch.cat(values) for values in zip(*parts)), scores=score)

    def cuts(self, x: Tensor) -> list[list[tuple[int, int]]]:
        """Segments (first, last) of each unit's frames x (B, T, N, D)."""
        pooled = unit_rows(fixed_mean(x))
        alike = (pooled[:, 1:] * pooled[:, :-1]).sum(-1)
        begins = (alike < self.tau).scatter(1, top(-alike, self.segments - 1), True)
        edges = [[0, *(f + 1 for f, cut in enumerate(unit) if cut), x.shape[1]] for unit in begins.tolist()]
        return [list(pairwise(unit)) for unit in edges]

    def segments_of(self, x: Tensor, attention: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`count` rows of each of S segments, x (S, M, D), attention (S, frames, N): kept (S, count), and row, source, weight of
        W's entries (S, m)."""
        frames, cells = attention.shape[1:]
        merged = min(round(self.merged * count), len(range(0, frames, self.stride)) * cells)
        taken = best_of_each(attention, spread(count - merged, frames))
        free = ~taken
        free[:, torch.arange(frames, device=x.device) % self.stride > 0] = False
        anchors = _places(free)
        merged = min(merged, anchors.shape[1])
        spare = count - int(taken[0].sum()) - merged
        if spare:
            more = attention.masked_fill(taken | free, -torch.inf).flatten(1)
            taken = taken.flatten(1).scatter(1, top(more, spare), True)
        salient, others = _places(taken), _places(~taken)
        if merged == 0:
            row = torch.arange(count, device=x.device).expand_as(salient)
            return salient, row, salient, torch.ones_like(salient, dtype=torch.float64)
        rows = scaled_rows(x)
        peaks = top(density_peaks(rows_at(rows, anchors), self.neighbours), merged)
        centres = anchors.gather(1, peaks).sort(1).values
        kept = torch.cat([salient, centres], 1).sort(1).values
        group = join_nearest(rows_at(rows, others), torch.searchsorted(others, centres))
        row = torch.cat([torch.searchsorted(kept, salient), torch.searchsorted(kept, centres).gather(1, group)], 1)
        source = torch.cat([salient, others], 1)
        return kept, row, source, self.weights(kept, row, source)

    def weights(self, kept: Tensor, row: Tensor, source: Tensor) -> Tensor:
        """alpha for a centre, (1 - alpha) / m for each of the m that joined it, 1 for a row of one token."""
        joined = torch.zeros_like(kept).scatter_add_(1, row, torch.ones_like(row)).gather(1, row) - 1
        own = kept.gather(1, row) == source
        share = torch.where(own, self.alpha, (1 - self.alpha) / joined.clamp_min(1).double())
        return torch.where(joined == 0, 1.0, share)


def _runs(plane: Tensor, runs: Sequence[tuple[int, int, int]], length: int) -> Tensor:
    """(S, length, ...) rows of each run (unit, first, ...) of a plane (B, n, ...); one run alone is not copied."""
    rows = [plane[unit, first : first + length] for unit, first, _ in runs]
    return torch.stack(rows) if len(rows) > 1 else rows[0][None]


def _places(mask: Tensor) -> Tensor:
    """(S, m) places that are true in masks (S, ...) with as many each."""
    return mask.flatten(1).nonzero()[:, 1].view(len(mask), -1)
