"""Bipartite soft matching: rows split in two by turns, each of one side joins its most alike on the other.

    A = rows 0, 2, 4, ...    B = rows 1, 3, 5, ...    the r closest pairs (a, best b of a) become one row at b

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from token_reduction.exact import top, unit_rows


def merge_rounds(
    metric: Tensor, count: int, per_round: int | None = None, *, sized: bool, best_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Match and merge rows (B, n, D) until `count` are left.

    Args:
        per_round: most rows that one round takes away; None and at most: half of the rows.
        sized: means weigh rows by the tokens in them; otherwise every merged row counts as one.
        best_first: rows that stay in A come in order of falling similarity, then B (AIM's code); otherwise in raster order.

    Returns:
        anchor (B, count): token at which each row sits; group (B, n): the row of each token; weight (B, n) of each token.
    """
    batch, n, _ = metric.shape
    metric = metric.double()
    anchor = torch.arange(n, device=metric.device).expand(batch, n)
    group, weight = anchor.clone(), metric.new_ones(batch, n)
    size = metric.new_ones(batch, n)
    while (m := anchor.shape[1]) > count:
        r = min(m - count, m // 2, per_round or m)
        place, sums = _match(metric, r, size if sized else torch.ones_like(size), best_first)
        rows = torch.arange(batch, device=metric.device)[:, None]
        share = (size if sized else torch.ones_like(size)) / sums.gather(1, place)
        metric = metric.new_zeros(batch, m - r, metric.shape[2]).index_put_(
            (rows, place), metric * share[..., None], accumulate=True
        )
        # A merged row sits at its member of B: those come last in the scatter because A's stayers have rows of their own.
        odd = torch.arange(m, device=metric.device) % 2 == 1
        fresh = anchor.new_full((batch, m - r), -1)
        fresh = fresh.scatter_reduce(1, place, torch.where(odd, anchor + n, anchor), "amax") % n
        weight = weight * share.gather(1, group)
        group = place.gather(1, group)
        size = size.new_zeros(batch, m - r).scatter_add_(1, place, size)
        anchor = fresh
    return anchor, group, weight


def _match(metric: Tensor, r: int, size: Tensor, best_first: bool) -> tuple[Tensor, Tensor]:
    """Place (B, m) of each row among the m - r rows after one round, and the summed sizes (B, m - r)."""
    batch, m, _ = metric.shape
    q = unit_rows(metric)
    score, partner = (q[:, ::2] @ q[:, 1::2].mT).max(-1)
    order = top(score, score.shape[1])
    gone, stay = order[:, :r], order[:, r:]
    target = 2 * partner.gather(1, gone) + 1
    leaves = torch.zeros(batch, m, dtype=torch.bool, device=metric.device).scatter_(1, 2 * gone, True)
    if best_first:
        listed = torch.cat([2 * stay, torch.arange(1, m, 2, device=metric.device).expand(batch, -1)], 1)
        place = torch.zeros(batch, m, dtype=torch.int64, device=metric.device)
        place.scatter_(1, listed, torch.arange(m - r, device=metric.device).expand(batch, -1).contiguous())
    else:
        place = (~leaves).long().cumsum(1) - 1
    place = place.scatter(1, 2 * gone, place.gather(1, target))
    return place, size.new_zeros(batch, m - r).scatter_add_(1, place, size)
