"""FlashPrefill's threshold (arXiv 2603.06199): mean-pooled search, and blocks within a share of the row's best. No sort.

keep block j of row of blocks i  <=>  w_ij >= alpha * max_j w_ij,   w = softmax of the mean query against mean keys
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.baselines.blocks import (
    at_least,
    block_means,
    causal_blocks,
    each_head,
    plan_of_blocks,
    share_between,
    whole_sequence,
)
from sparse_attn.stripes import StripePlan


def flashprefill(
    q: Tensor, k: Tensor, *, alpha: float = 0.7, sink: int = 2, window: int = 4, last: int = 2, block: int = 128
) -> StripePlan:
    """Blocks at or above alpha times the best, with `sink` first blocks, `window` latest, and the `last` rows of blocks whole.

    >>> q, k = torch.randn(1, 300, 2, 8), torch.randn(1, 300, 1, 8)
    >>> flashprefill(q, k, alpha=0.99, sink=1, window=1, last=1, block=16).density < 1
    True
    """
    whole_sequence(q, k, block)
    share_between("alpha", alpha)
    at_least(0, sink=sink, window=window, last=last)
    chosen = []
    for queries, keys in each_head(q, k):
        scores = block_means(queries, block) @ block_means(keys, block).T
        causal = causal_blocks(len(scores), scores.device)
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        kept = weights >= alpha * weights.amax(-1, keepdim=True)
        kept[:, :sink] = True
        kept |= torch.ones_like(kept).triu(1 - window)
        kept[len(kept) - last :] = True
        chosen.append(kept & causal)
    return plan_of_blocks(q, k, block, chosen, f"alpha {alpha}")
