"""CenterCLIP: cluster the tokens of each run of frames, keep the clusters' centres.

    T frames -> segments of `frames`; in each, K medoids of its tokens, or of their spectral rows:
    A_ij = exp(-d_ij^2 / 2 sigma^2), or 1 for near neighbours;  rows = the last K eigenvectors of I - D^-1/2 A D^-1/2

Source: CenterCLIP, "Token Clustering for Efficient Text-Video Retrieval" (SIGIR 2022), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from token_reduction.batch import Batch, Selection
from token_reduction.exact import spread
from token_reduction.options import COUNT, POSITIVE, Limits
from token_reduction.rows import at_once
from token_reduction.selectors.cluster import (
    heat,
    k_medoids,
    longest,
    neighbour_graph,
    scaled_rows,
    spectral_rows,
    squared_distances,
)
from token_reduction.unit_reducer import UnitReducer


@dataclass(frozen=True, kw_only=True)
class CenterCLIP(UnitReducer):
    """Keep k medoids (or cluster means, placed at the medoid) of each item, spread evenly over its segments.

    Args:
        frames: length of a segment; the last may be shorter.
        algorithm: "k-medoids" with KKZ start (largest norm, then farthest point), or "spectral": the same on spectral rows.
        distance: "euclidean" or "cosine". aggregate: "medoid" or "mean".
        graph: of "spectral": "heat", or "knn": each token linked with its nearest, `neighbours` of them, 5 for each frame of a
            segment where None.
        sigma: width of the heat kernel.
        variant: "best" and "paper" measure sigma in lengths of the longest token, so that the kernel means the same for all
            features; "released" in the features' own unit, as the released code. It differs for "heat" alone.

    Memory O(M^2) for M tokens of a segment; the published form holds K copies of that. Scores: none.
    """

    frames: int = 2
    algorithm: str = "k-medoids"
    distance: str = "euclidean"
    aggregate: str = "medoid"
    graph: str = "heat"
    neighbours: int | None = None
    sigma: float = 2.0
    limits: ClassVar[Limits] = {
        "frames": COUNT,
        "algorithm": ("k-medoids", "spectral"),
        "distance": ("euclidean", "cosine"),
        "aggregate": ("medoid", "mean"),
        "graph": ("heat", "knn"),
        "neighbours": COUNT,
        "sigma": POSITIVE,
    }
    name: ClassVar[str] = "centerclip"
    cost: ClassVar[str] = "O(n M (D + i)), M tokens of a segment, i iterations (spectral: O(n M^2))"
    source: ClassVar[str] = "CenterCLIP (k-medoids and spectral)"
    merges: ClassVar[bool] = True
    form: ClassVar[str] = "authors'"

    @property
    def idle(self) -> dict[str, str]:
        if self.algorithm == "k-medoids":
            return dict.fromkeys(("graph", "neighbours", "sigma"), "algorithm='k-medoids'")
        return {"neighbours": "graph='heat'"} if self.graph == "heat" else {"sigma": "graph='knn'"}

    def select(self, batch: Batch, count: int) -> Sequence[Selection]:
        (b, n, _), (t, h, w) = batch.x.shape, batch.grid
        cuts = [(f * h * w, min(f + self.frames, t) * h * w) for f in range(0, t, self.frames)]
        kept = [[None] * len(cuts) for _ in range(b)]
        group = torch.full((b, n), -1, device=batch.x.device)
        before, runs = 0, {}
        for run, ((first, last), share) in enumerate(zip(cuts, _shares(count, cuts))):
            if share:
                runs.setdefault((last - first, share), []).append((run, first, before))
            before += share
        for (length, share), alike in runs.items():
            rows = torch.stack([batch.x[:, first : first + length] for _, first, _ in alike], 1).flatten(0, 1)
            parts = [self.cluster(part, share) for part in rows.split(at_once(length, rows.shape[2], rows.device))]
            medoids, place = (torch.cat(part).unflatten(0, (b, -1)) for part in zip(*parts))
            for number, (run, first, offset) in enumerate(alike):
                group[:, first : first + length] = offset + place[:, number]
                for unit in range(b):
                    kept[unit][run] = first + medoids[unit, number]
        found = [torch.cat([part for part in own if part is not None]) for own in kept]
        if self.aggregate == "mean":
            return [Selection.groups(*answer) for answer in zip(found, group)]
        return [Selection(own) for own in found]

    def cluster(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Medoids (S, count) of S segments x (S, M, D), and the place of each row's medoid (S, M)."""
        rows = scaled_rows(x if self.distance == "euclidean" else torch.nn.functional.normalize(x.double(), dim=-1))
        first = x.double().square().sum(-1).argmax(-1)
        apart = squared_distances(rows)
        if self.algorithm == "spectral":
            apart = squared_distances(scaled_rows(spectral_rows(self.affinity(apart, x), count)))
            first = apart.sum(-1).argmin(-1)
        return k_medoids(apart.sqrt(), count, first)

    def affinity(self, apart: Tensor, x: Tensor) -> Tensor:
        """(S, M, M) from squared distances of scaled rows."""
        if self.graph == "knn":
            return neighbour_graph(apart, self.neighbours or 5 * self.frames)
        own_unit = self.variant == "released" and self.distance == "euclidean"
        return heat(apart * longest(x) ** 2 if own_unit else apart, self.sigma)


def _shares(count: int, cuts: list[tuple[int, int]]) -> list[int]:
    """Evenly over segments, never more than a segment has: a short last segment passes on what it cannot hold."""
    shares = spread(count, len(cuts))
    over = max(0, shares[-1] - (cuts[-1][1] - cuts[-1][0]))
    if not over:
        return shares
    return [a + b for a, b in zip(shares[:-1], spread(over, len(cuts) - 1))] + [shares[-1] - over]
