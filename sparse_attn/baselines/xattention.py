"""XAttention (Xu et al., arXiv 2503.16428, section 3): blocks scored by the sums of their strided antidiagonals.

rows i, s+i, ... of Q meet rows s-1-i of K: one product of (N/s, s D) matrices sums every s-th antidiagonal entry of a block;
softmax over the row, sums over blocks, and the fewest blocks of each row that hold a share `threshold`
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_attn.baselines.blocks import (
    at_least,
    causal_blocks,
    each_head,
    plan_of_blocks,
    share_between,
    smallest_cover,
    whole_sequence,
)
from sparse_attn.stripes import StripePlan


def xattention(q: Tensor, k: Tensor, *, stride: int = 8, threshold: float = 0.9, block: int = 128) -> StripePlan:
    """Blocks up to a share `threshold` of the estimated mass of each row of blocks.

    >>> q, k = torch.randn(1, 300, 2, 8), torch.randn(1, 300, 1, 8)
    >>> xattention(q, k, threshold=0.5, block=32).density < 1
    True
    """
    whole_sequence(q, k, block)
    share_between("threshold", threshold)
    at_least(1, stride=stride)
    if block % stride:
        raise ValueError(f"stride is {stride} and block {block}; a block must be a multiple of the stride")
    chosen = []
    for queries, keys in each_head(q, k):
        weights = _block_weights(queries, keys, stride, block)
        causal = causal_blocks(len(weights), weights.device)
        kept = smallest_cover(weights, threshold) & causal
        kept[:, 0] = True
        chosen.append(kept)
    return plan_of_blocks(q, k, block, chosen, f"stride {stride}, threshold {threshold}")


def _block_weights(queries: Tensor, keys: Tensor, stride: int, block: int) -> Tensor:
    """(blocks, blocks): the estimated mass of each block of each row of blocks."""
    missing = -len(keys) % block
    rows = pad(queries, (0, 0, 0, missing)).unflatten(0, (-1, stride)).flip(1).flatten(1)
    columns = pad(keys, (0, 0, 0, missing)).unflatten(0, (-1, stride)).flatten(1)
    each, made = block // stride, []
    for first in range(0, len(rows), each):
        stop = first + each
        scores = rows[first:stop] @ columns[:stop].T / stride
        later = torch.ones(each, each, dtype=torch.bool, device=rows.device).triu(1)
        scores[:, first:].masked_fill_(later, -torch.inf)
        weights = scores.softmax(-1).unflatten(1, (-1, each)).sum((0, 2))
        made.append(pad(weights, (0, len(rows) // each - len(weights))))
    return torch.stack(made)
