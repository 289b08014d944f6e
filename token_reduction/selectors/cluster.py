"""Clusters: k-medoids in O(M^2) memory, spectral clustering, density peaks.

Distances come from rows rounded so that they are exact (`scaled_rows`), hence ties go to the lowest index everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from token_reduction.exact import top

_MAGIC = 6.0 * 2.0**25


def scaled_rows(x: Tensor) -> Tensor:
    """Rows (..., n, D) float64 over the longest row's length, rounded to multiples of 2^-25: dot products are exact."""
    return (x.double() / longest(x)).add_(_MAGIC).sub_(_MAGIC)


def longest(x: Tensor) -> Tensor:
    """(..., 1, 1) length of the longest row of (..., n, D), 1 where all are zero."""
    length = x.double().norm(dim=-1).amax(-1)[..., None, None]
    return torch.where(length > 0, length, 1.0)


def squared_distances(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """(..., n, m) float64 squared Euclidean distances of exact rows."""
    others = rows if others is None else others
    own, their = (rows * rows).sum(-1), (others * others).sum(-1)
    return (own[..., None] + their[..., None, :] - 2 * rows @ others.mT).clamp_(min=0)


def k_medoids(distance: Tensor, count: int, first: int, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Medoids (count,) ascending and the place of each row's medoid (M,).

    KKZ start: `first`, then farthest-point; then assign, and take in each cluster the row with the least summed distance to
    its like, until nothing changes. The sums of a cluster are a scatter over the (M, M) matrix, not K copies of it.
    """
    medoids = _kkz(distance, count, first)
    for _ in range(iterations):
        group = distance[:, medoids].argmin(1)
        group[medoids] = torch.arange(count, device=group.device)
        spread = distance.new_zeros((count, distance.shape[0])).index_add_(0, group, distance)
        within = spread[group, torch.arange(group.numel(), device=group.device)]
        least = within.new_full((count,), torch.inf).scatter_reduce_(0, group, within, "amin")
        fits = (within == least[group]).nonzero()[:, 0]
        fresh = torch.full((count,), distance.shape[0], device=group.device)
        fresh = fresh.scatter_reduce_(0, group[fits], fits, "amin")
        if bool((fresh == medoids).all()):
            break
        medoids = fresh
    order = medoids.argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(count, device=order.device)
    return medoids[order], place[group]


def _kkz(distance: Tensor, count: int, first: int) -> Tensor:
    chosen, nearest = [first], distance[first].clone()
    for _ in range(count - 1):
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return torch.tensor(chosen, device=distance.device)


def spectral_rows(distance: Tensor, count: int, sigma: float) -> Tensor:
    """(M, count) unit rows of the last left singular vectors of the normalised Laplacian of a heat kernel.

    A = exp(-d^2 / 2 sigma^2),  L = I - D^-1/2 A D^-1/2;  the sign of a vector makes its largest entry positive.
    """
    affinity = torch.exp(distance / (-2 * sigma**2))
    scale = affinity.sum(1).rsqrt()
    laplacian = torch.eye(len(scale), dtype=distance.dtype, device=distance.device)
    laplacian = laplacian - scale[:, None] * affinity * scale
    vectors = torch.linalg.eigh(laplacian).eigenvectors[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)


def density_peaks(rows: Tensor, neighbours: int, unit: Tensor | float = 1.0) -> Tensor:
    """DPC-KNN scores (..., n): density x distance to the nearest denser row (the farthest row for the densest).

    density = exp(-mean squared distance to the `neighbours` nearest rows), squared distances times `unit` (..., 1, 1).
    Ties of density go to the lower index. Source: Du, Ding, Jia, "Study on density peaks clustering based on k-nearest
    neighbors and principal component analysis", 2016.
    """
    squared, n = squared_distances(rows) * unit, rows.shape[-2]
    near = squared.topk(min(neighbours, n), largest=False).values
    density = torch.exp(-near.mean(-1))
    order = top(density, n)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(n, device=rows.device).expand_as(order))
    denser = rank[..., None, :] < rank[..., None]
    distance = squared.sqrt_()
    delta = distance.masked_fill(~denser, torch.inf).amin(-1)
    return density * torch.where(torch.isinf(delta), distance.amax(-1), delta)


def join_nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """(..., n) place in `centres` (..., m), row numbers, of the nearest centre; a centre falls in itself."""
    chosen = rows.gather(-2, centres[..., None].expand(*centres.shape, rows.shape[-1]))
    group = squared_distances(rows, chosen).argmin(-1)
    return group.scatter(-1, centres, torch.arange(centres.shape[-1], device=group.device).expand_as(centres))
