"""FlexPrefill (Lai et al., arXiv 2502.20766, algorithms 1 to 4): each head picks vertical-slash or query-aware blocks.

d = sqrt(Jensen-Shannon divergence of the last block's true block distribution from the pooled one)
d < tau: blocks of the pooled map up to cumulative mass gamma;  else: columns and diagonals up to gamma each
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.baselines.blocks import (
    at_least,
    block_means,
    causal_blocks,
    each_head,
    plan_of_lists,
    share_between,
    smallest_cover,
    whole_sequence,
)
from sparse_attn.baselines.vertical_slash import last_rows, lines
from sparse_attn.stripes import StripePlan


def flexprefill(
    q: Tensor, k: Tensor, *, gamma: float = 0.95, tau: float = 0.1, min_budget: int = 1024, block: int = 128
) -> StripePlan:
    """Per head the pattern that fits and as much of it as holds a share gamma of the mass, at least `min_budget` keys a row.

    >>> q, k = torch.randn(1, 300, 2, 8), torch.randn(1, 300, 1, 8)
    >>> flexprefill(q, k, gamma=0.5, min_budget=32, block=32).density < 1
    True
    """
    whole_sequence(q, k, block)
    share_between("gamma", gamma)
    share_between("tau", tau)
    at_least(0, min_budget=min_budget)
    lists, aware = [], 0
    for queries, keys in each_head(q, k):
        means = block_means(queries, block) @ block_means(keys, block).T
        columns, distances = last_rows(queries, keys, block)
        if _distance(means[-1].softmax(-1), columns, block) < tau:
            aware += 1
            lists.append(_blocks(means, gamma, min_budget, block, len(keys)))
        else:
            lists.append(_lines(columns, distances, gamma, min_budget, block))
    return plan_of_lists(q, k, block, lists, f"gamma {gamma}; query-aware in {aware} of {len(lists)} heads")


def _distance(pooled: Tensor, columns: Tensor, block: int) -> float:
    """Square root of the Jensen-Shannon divergence of two distributions over key blocks."""
    missing = -len(columns) % block
    true = torch.cat([columns, columns.new_zeros(missing)]).view(-1, block).sum(1)
    true = true / true.sum()
    middle = ((true + pooled) / 2).clamp_min(1e-30)
    halves = [(p * (p.clamp_min(1e-30) / middle).log()).sum() / 2 for p in (true, pooled)]
    return float((halves[0] + halves[1]).clamp_min(0).sqrt())


def _blocks(means: Tensor, gamma: float, min_budget: int, block: int, length: int) -> list[Tensor]:
    """Columns of each query block: blocks of the whole map in order of pooled weight until they hold a share gamma of it."""
    count = len(means)
    causal = causal_blocks(count, means.device)
    weights = means.masked_fill(~causal, -torch.inf).softmax(-1)
    chosen = smallest_cover(weights.flatten()[None], gamma)[0].view(count, count)
    least = torch.zeros_like(chosen)
    top = weights.topk(min(-(-min_budget // block), count), dim=-1).indices
    chosen = (chosen | least.scatter_(-1, top, True)) & causal
    chosen[:, 0] = True
    inside = torch.arange(block, device=means.device)
    return [(chosen[row, :row].nonzero() * block + inside).flatten() for row in range(count)]


def _lines(columns: Tensor, distances: Tensor, gamma: float, min_budget: int, block: int) -> list[Tensor]:
    picked = []
    for weights in (columns, distances):
        count = int(smallest_cover(weights[None], gamma).sum())
        picked.append(weights.topk(min(max(count, min_budget), len(weights))).indices)
    return lines(*picked, len(columns), block)
