"""CenterCLIP: cluster the tokens of each run of frames, keep the clusters' centres.

    T frames -> segments of `frames`; in each, K medoids of its tokens (or spectral rows, then medoids)

Source: CenterCLIP, "Token Clustering for Efficient Text-Video Retrieval" (SIGIR 2022), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import spread
from token_reduction.selectors.cluster import k_medoids, scaled_rows, spectral_rows, squared_distances
from token_reduction.unit_reducer import UnitReducer

_CHOICES = {
    "algorithm": ("k-medoids", "spectral"),
    "distance": ("euclidean", "cosine"),
    "aggregate": ("medoid", "mean"),
}


@dataclass(frozen=True, kw_only=True)
class CenterCLIP(UnitReducer):
    """Keep k medoids (or cluster means, placed at the medoid) of each item, spread evenly over its segments.

    Args:
        frames: length of a segment; the last may be shorter.
        algorithm: "k-medoids" with KKZ start (largest norm, then farthest point), or "spectral": the same on spectral rows.
        distance: "euclidean" or "cosine". aggregate: "medoid" or "mean". sigma: width of the spectral heat kernel, in units of
            the typical distance 1 of rows scaled by the longest.

    Memory O(M^2) for M tokens of a segment; the published form holds K copies of that. Scores: none. Variants: one algorithm.
    """

    frames: int = 2
    algorithm: str = "k-medoids"
    distance: str = "euclidean"
    aggregate: str = "medoid"
    sigma: float = 2.0
    name: ClassVar[str] = "centerclip"
    cost: ClassVar[str] = "O(n M (D + i)), M tokens of a segment, i iterations (spectral: O(n M^2))"
    source: ClassVar[str] = "CenterCLIP (k-medoids and spectral)"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"centerclip has {field} {' or '.join(allowed)}, got {getattr(self, field)!r}")
        if self.frames < 1 or self.sigma <= 0:
            raise ValueError(f"centerclip needs frames >= 1 and sigma > 0, got {self.frames!r}, {self.sigma!r}")

    def select_one(self, batch: Batch, count: int) -> Selection:
        t, h, w = batch.grid
        cuts = [(f * h * w, min(f + self.frames, t) * h * w) for f in range(0, t, self.frames)]
        kept, group, before = [], [], 0
        for (first, last), share in zip(cuts, _shares(count, cuts)):
            if share == 0:
                group.append(torch.full((last - first,), -1, device=batch.x.device))
                continue
            medoids, place = self.cluster(batch.x[0, first:last], share)
            kept.append(first + medoids)
            group.append(before + place)
            before += share
        if self.aggregate == "mean":
            return Selection.groups(torch.cat(kept), torch.cat(group))
        return Selection(torch.cat(kept))

    def cluster(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Medoids (count,) of rows x (M, D), and the place of each row's medoid."""
        rows = scaled_rows(x if self.distance == "euclidean" else torch.nn.functional.normalize(x.double(), dim=1))
        first = int(x.double().square().sum(1).argmax())
        apart = squared_distances(rows)
        if self.algorithm == "spectral":
            apart = squared_distances(scaled_rows(spectral_rows(apart, count, self.sigma)))
            first = int(apart.sum(1).argmin())
        return k_medoids(apart.sqrt(), count, first)


def _shares(count: int, cuts: list[tuple[int, int]]) -> list[int]:
    """Evenly over segments, never more than a segment has: a short last segment passes on what it cannot hold."""
    shares = spread(count, len(cuts))
    over = max(0, shares[-1] - (cuts[-1][1] - cuts[-1][0]))
    if not over:
        return shares
    return [a + b for a, b in zip(shares[:-1], spread(over, len(cuts) - 1))] + [shares[-1] - over]
