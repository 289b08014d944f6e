"""Backward of attention under a fixed plan: the plan's choice of columns is a constant.

    p = exp(scale q k^T - lse),  dv = p^T do,  ds = p * (do v^T - delta),  dq = scale ds k,  dk = scale ds^T q

lse and delta = rowsum(do * out) are those of the whole row, so the shares of anchor region and stripes add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.autograd import Gradients
from sparse_attn.kernels.blocks import Blocks
from sparse_attn.kernels.torch_kernel import heads_of
from sparse_attn.stripes import StripePlan
from tokenring.merge import accumulator_dtype

Queries = tuple[Tensor, Tensor, Tensor, Tensor]
"""q, do, lse, delta."""


def gradients(
    blocks: Blocks, plan: StripePlan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor
) -> Gradients:
    """dq, dk, dv of the shapes of q, k, v, summed in float32 (float64 for float64)."""
    totals = zeros(q, k, v)
    add_gradients(blocks, plan, whole_rows(q, out, lse, do), k, v, totals)
    dq, dk, dv = (total.to(x.dtype) for total, x in zip(totals, (q, k, v)))
    return dq, dk, dv


def whole_rows(q: Tensor, out: Tensor, lse: Tensor, do: Tensor) -> Queries:
    """q, do, lse, and delta (B, Hq, Sq) = rowsum(do * out): what every share of the gradients needs of the queries."""
    wide = accumulator_dtype(q.dtype)
    return q, do.contiguous(), lse, (do.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)


def zeros(*tensors: Tensor) -> Gradients:
    """Sums to add to, in the accumulator's dtype."""
    dq, dk, dv = (torch.zeros_like(x, dtype=accumulator_dtype(x.dtype)) for x in tensors)
    return dq, dk, dv


def add_gradients(
    blocks: Blocks, plan: StripePlan, queries: Queries, k: Tensor, v: Tensor, totals: Gradients, anchors: bool = True
) -> None:
    """The shares of a plan's pairs join the totals of q, k and v. anchors: those of the anchor regions too."""
    if plan.path == "dense":
        _documents(blocks, plan, queries, k, v, totals)
        return
    for number, group in enumerate(plan.geometry.groups):
        if anchors:
            _anchor(blocks, plan, number, queries, k, v, totals)
        for place, columns in enumerate(plan.lists(number)):
            if len(columns):
                _stripe(blocks, plan, group.rows, place, columns, queries, k, v, totals)


def _documents(blocks: Blocks, plan: StripePlan, queries: Queries, k: Tensor, v: Tensor, totals: Gradients) -> None:
    for (qa, qb), (ka, kb) in plan.geometry.documents:
        before = kb - ka - (qb - qa)
        _rectangle(blocks, queries, k, v, totals, (qa, qb), slice(ka, ka + before))
        _rectangle(blocks, queries, k, v, totals, (qa, qb), slice(ka + before, kb), causal=True)


def _anchor(
    blocks: Blocks, plan: StripePlan, number: int, queries: Queries, k: Tensor, v: Tensor, totals: Gradients
) -> None:
    group = plan.geometry.groups[number]
    own = slice(group.diagonal, group.diagonal + group.count)
    _rectangle(blocks, queries, k, v, totals, group.rows, own, causal=True)
    for a, b in group.prefix:
        _rectangle(blocks, queries, k, v, totals, group.rows, slice(a, b))
    kept = plan.kept(group)
    if len(kept):
        _rectangle(blocks, queries, k, v, totals, group.rows, kept)


def _rectangle(
    blocks: Blocks,
    queries: Queries,
    k: Tensor,
    v: Tensor,
    totals: Gradients,
    rows: tuple[int, int],
    keys: slice | Tensor,
    causal: bool = False,
) -> None:
    """All heads of some rows against some keys, a slice or distinct rows of k."""
    here = slice(*rows)
    q, do, lse, delta = queries
    mine = q[:, here], do[:, here], lse[:, :, here], delta[:, :, here]
    dq, dk, dv = blocks.gradients(mine, k[:, keys], v[:, keys], causal=causal)
    totals[0][:, here] += dq
    totals[1][:, keys] += dk
    totals[2][:, keys] += dv


def _stripe(
    blocks: Blocks,
    plan: StripePlan,
    rows: tuple[int, int],
    place: int,
    columns: Tensor,
    queries: Queries,
    k: Tensor,
    v: Tensor,
    totals: Gradients,
) -> None:
    """The query heads of one list against its columns."""
    entry, heads, key_head = heads_of(plan, place)
    here, only, key = slice(*rows), slice(entry, entry + 1), slice(key_head, key_head + 1)
    q, do, lse, delta = queries
    mine = q[only, here, heads], do[only, here, heads], lse[only, heads, here], delta[only, heads, here]
    keys, values = (x[only, :, key].index_select(1, columns) for x in (k, v))
    dq, dk, dv = blocks.gradients(mine, keys, values)
    totals[0][entry, here, heads] += dq[0].to(totals[0].dtype)
    totals[1][entry, :, key_head].index_add_(0, columns, dk[0, :, 0].to(totals[1].dtype))
    totals[2][entry, :, key_head].index_add_(0, columns, dv[0, :, 0].to(totals[2].dtype))
