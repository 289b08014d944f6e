"""Density peaks: SeTok's semantic tokens, and VMTC's primary tokens with the rest in clusters.

    density_i = exp(-mean squared distance to the nearest rows),  delta_i = distance to the nearest denser row
    centres: the largest density x delta;   every other token joins its nearest centre

Sources: SeTok, "Towards Semantic Equivalence of Tokenization in Multimodal LLM", section 3; VMTC, visual token compression by
merging non-primary tokens (its cluster algorithm is not public: ours is the same density peaks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import rest, rows_at, top
from token_reduction.options import COUNT, SHARE, Limits
from token_reduction.selectors.cluster import density_peaks, join_nearest, longest, scaled_rows
from token_reduction.unit_reducer import UnitReducer

_FALLBACK = 64


@dataclass(frozen=True, kw_only=True)
class SeTok(UnitReducer):
    """Keep k clusters of each frame, each the mean of its tokens at its centre.

    Args:
        neighbours: nearest rows that make a density.
        threshold: score above which "paper" and "released" take a centre.
        variant: "best" takes the k best centres. "paper" and "released" take the centres whose score is above `threshold`, with
            distances over sqrt(D), or the best 64 where none is; k at most (`count` is an upper bound). The released code
            breaks ties with noise; here the lowest index wins. The trained attention inside and between clusters is not part
            of this.

    Scores: density x delta.
    """

    neighbours: int = 5
    threshold: float = 0.5
    limits: ClassVar[Limits] = {"neighbours": COUNT}
    name: ClassVar[str] = "setok"
    cost: ClassVar[str] = "O(T N^2 D)"
    source: ClassVar[str] = "SeTok, density-peak clusters"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"
    scope: ClassVar[str] = "frame"

    @property
    def idle(self) -> dict[str, str]:
        return {"threshold": "variant='best'"} if self.variant == "best" else {}

    @property
    def adaptive(self) -> bool:
        return self.variant != "best"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        rows = scaled_rows(batch.x)
        if self.adaptive:
            score = density_peaks(rows, self.neighbours, longest(batch.x) ** 2 / rows.shape[-1])
            found = (score > self.threshold).sum(-1).tolist()
            counts = [min(count, number or _FALLBACK) for number in found]
            return [self.clusters(*unit) for unit in zip(rows, score, counts)]
        score = density_peaks(rows, self.neighbours)
        centres = top(score, count).sort().values
        return [Selection.groups(*unit) for unit in zip(centres, join_nearest(rows, centres), score)]

    @staticmethod
    def clusters(rows: Tensor, score: Tensor, count: int) -> Selection:
        """One unit's `count` clusters."""
        centres = top(score, count).sort().values
        return Selection.groups(centres, join_nearest(rows, centres), score)


@dataclass(frozen=True, kw_only=True)
class Vmtc(UnitReducer):
    """Keep k rows of each frame: primary tokens by [CLS] attention, the others merged in density-peak clusters.

    Args:
        primary: share of the k rows that stay as they are.
        neighbours: nearest rows that make a density.

    Scores: [CLS] attention. Variants: one algorithm; best, paper and released are the same.
    """

    primary: float = 0.5
    neighbours: int = 5
    limits: ClassVar[Limits] = {"primary": SHARE, "neighbours": COUNT}
    name: ClassVar[str] = "vmtc"
    needs: ClassVar[frozenset[str]] = frozenset({"cls_attn"})
    cost: ClassVar[str] = "O(T N^2 D)"
    source: ClassVar[str] = "VMTC, visual token compression of non-primary tokens"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "ours"
    scope: ClassVar[str] = "frame"

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        attention, n = batch.attention(), batch.x.shape[1]
        first = top(attention, min(count - 1, round(self.primary * count)))
        others = rest(n, first)
        rows = scaled_rows(rows_at(batch.x, others))
        centres = top(density_peaks(rows, self.neighbours), count - first.shape[1]).sort().values
        merged = others.gather(1, centres)
        kept = torch.cat([first, merged], 1).sort().values
        group = torch.full_like(attention, -1, dtype=torch.int64)
        group.scatter_(1, first, torch.searchsorted(kept, first.contiguous()))
        group.scatter_(1, others, torch.searchsorted(kept, merged).gather(1, join_nearest(rows, centres)))
        return [Selection.groups(*unit) for unit in zip(kept, group, attention)]
