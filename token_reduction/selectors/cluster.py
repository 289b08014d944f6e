"""Clusters: k-medoids in O(M^2) memory, spectral clustering, density peaks.

Distances come from rows rounded so that they are exact (`scaled_rows`), hence ties go to the lowest index everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from token_reduction.exact import best_of_each, top

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
    return (own[..., None] + their[..., None, :] - rows @ (2 * others).mT).clamp_(min=0)


def k_medoids(distance: Tensor, count: int, first: Tensor, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Medoids (S, count) ascending of S sets and the place of each row's medoid (S, M). distance: (S, M, M); first: (S,).

    KKZ start: `first`, then farthest-point; then assign, and take in each cluster the row with the least summed distance to
    its like, until nothing changes. The sums of a cluster are a scatter over the (M, M) matrix, not K copies of it, and exact.
    """
    sets, rows = distance.shape[:2]
    # Whole multiples of the largest distance over 2^32: sums of up to 2^21 of them are exact in any order.
    unit = distance.amax((1, 2), keepdim=True).clamp_min(1e-300) / 2.0**32
    distance = (distance / unit).round()
    every, own = torch.arange(sets, device=distance.device)[:, None], torch.arange(rows, device=distance.device)
    medoids = _kkz(distance, count, first)
    for _ in range(iterations):
        group = distance.gather(2, medoids[:, None].expand(-1, rows, -1)).argmin(2)
        group[every, medoids] = torch.arange(count, device=group.device).expand_as(medoids)
        spread = distance.new_zeros((sets, count, rows))
        spread.scatter_add_(1, group[..., None].expand_as(distance), distance)
        within = spread.gather(1, group[:, None])[:, 0]
        least = within.new_full((sets, count), torch.inf).scatter_reduce_(1, group, within, "amin")
        candidate = torch.where(within == least.gather(1, group), own, rows)
        fresh = torch.full_like(medoids, rows).scatter_reduce_(1, group, candidate, "amin")
        if bool((fresh == medoids).all()):
            break
        medoids = fresh
    order = medoids.argsort(1)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand_as(order))
    return medoids.gather(1, order), place.gather(1, group)


def _kkz(distance: Tensor, count: int, first: Tensor) -> Tensor:
    every = torch.arange(len(distance), device=distance.device)
    chosen, nearest = [first], distance[every, first].clone()
    for _ in range(count - 1):
        nearest[every, chosen[-1]] = -1.0
        chosen.append(nearest.argmax(1))
        nearest = torch.minimum(nearest, distance[every, chosen[-1]])
    return torch.stack(chosen, 1)


def heat(squared: Tensor, sigma: float) -> Tensor:
    """Affinity exp(-d^2 / 2 sigma^2) of squared distances (..., M, M)."""
    return torch.exp(squared / (-2 * sigma**2))


def neighbour_graph(squared: Tensor, neighbours: int) -> Tensor:
    """Affinity (..., M, M): 1 where one of two rows is among the other's nearest, itself aside and ties to the lowest index."""
    rows = squared.shape[-1]
    alone = torch.eye(rows, dtype=torch.bool, device=squared.device)
    near = best_of_each(-squared.masked_fill(alone, torch.inf), torch.full((rows,), min(neighbours, rows - 1)))
    return (near | near.mT).to(squared.dtype)


def spectral_rows(affinity: Tensor, count: int) -> Tensor:
    """(..., M, count) unit rows of the last left singular vectors of the normalised Laplacian of an affinity A (..., M, M).

    L = I - D^-1/2 A D^-1/2;  the sign of a vector makes its largest entry positive.
    """
    scale = affinity.sum(-1).clamp_min(1e-300).rsqrt()
    laplacian = torch.eye(affinity.shape[-1], dtype=affinity.dtype, device=affinity.device)
    laplacian = laplacian - scale[..., None] * affinity * scale[..., None, :]
    vectors = torch.linalg.eigh(laplacian).eigenvectors[..., :count]
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    vectors = vectors * largest.sign()
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)


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
