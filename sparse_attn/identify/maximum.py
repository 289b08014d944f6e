"""The largest score of each row over its anchor region: the anchor of the paper, which flash operators do not return."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_attn.folding import alike, fold, prefixes
from sparse_attn.geometry import Geometry
from sparse_attn.identify.products import test_dtype
from sparse_attn.kernels.state import AnchorState
from sparse_attn.stripes import within
from tokenring.merge import accumulator_dtype

SQUARE = 128
"""Rows at a time: they read a triangle's keys and mask only the last square."""
PRODUCTS = 1 << 20
"""Products of one matrix product: they stay in a cache until their maximum is taken."""


def row_tops(
    state: AnchorState, q: Tensor, k: Tensor, geometry: Geometry, scale: float, keep: Tensor | None, scores: str
) -> Tensor:
    """(B, Hq, Sq): the largest score of each row over its anchor region, found by a pass of its own where phase 1 kept it."""
    return row_maxima(q, k, geometry, scale, keep, scores) if state.top is None else state.top


def row_maxima(q: Tensor, k: Tensor, geometry: Geometry, scale: float, keep: Tensor | None, scores: str) -> Tensor:
    """(B, Hq, Sq): max over the anchor region of scale * q_i . k_j, in the accumulator's dtype."""
    dtype = test_dtype(q, scores)
    k = k.to(dtype)
    best = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulator_dtype(q.dtype))
    per_row = q.shape[0] * q.shape[2] * (geometry.rows + geometry.initial + geometry.window)
    for groups in alike(geometry, max(1, PRODUCTS // max(1, per_row))):
        rows = slice(groups[0].rows[0], groups[-1].rows[1])
        own = fold(k[:, groups[0].diagonal : groups[-1].diagonal + groups[-1].count], len(groups))
        queries = fold((q[:, rows] * scale).to(dtype), len(groups))
        found = _causal(queries, own).to(best.dtype)
        if groups[0].prefix:
            found = torch.maximum(found, _products(queries, prefixes(k, groups)).amax(-1).to(best.dtype))
        for place, group in enumerate(groups):
            kept = k[:, :0] if keep is None else k.index_select(1, within(keep, group.candidates))
            if kept.shape[1]:
                here = slice(place, None, len(groups))
                found[here] = torch.maximum(found[here], _products(queries[here], kept).amax(-1).to(best.dtype))
        found = found.flatten(1, 2).unflatten(0, (-1, len(groups)))
        best[:, :, rows] = found.transpose(1, 2).flatten(2)
    return best


def _products(q: Tensor, k: Tensor) -> Tensor:
    """(B, Hkv, Hq / Hkv, rows, keys), for queries (B, rows, Hq, D) and keys (B, keys, Hkv, D)."""
    heads, rows = k.shape[2], q.shape[1]
    stacked = q.transpose(1, 2).reshape(q.shape[0] * heads, -1, q.shape[3])
    across = k.permute(0, 2, 3, 1).reshape(k.shape[0] * heads, k.shape[3], -1)
    return torch.bmm(stacked, across).view(q.shape[0], heads, -1, rows, k.shape[1])


def _causal(q: Tensor, k: Tensor) -> Tensor:
    """(B, Hkv, Hq / Hkv, rows): the maximum over keys up to each row's own."""
    parts, rows = [], q.shape[1]
    for first in range(0, rows, SQUARE):
        stop = min(first + SQUARE, rows)
        scores = _products(q[:, first:stop], k[:, :stop])
        later = torch.ones(stop - first, stop - first, dtype=torch.bool, device=q.device).triu(1)
        scores[..., first:].masked_fill_(later, -torch.inf)
        parts.append(scores.amax(-1))
    return torch.cat(parts, -1)
