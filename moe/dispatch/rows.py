"""Rows added and rows scaled: the local work of a dispatcher.

    add_up            out[r] = sum of w[e] y[place[e]] over the entries e of row r
    scale_with_dots   y[i] *= w[i], and the dots <y[i], z[i]> before it, in one pass over blocks that stay in the cache

Sums are taken in float32 (float64 for float64) in the order of the entries, so a result repeats bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 20


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of rows are taken in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_up(y: Tensor, place: Tensor, counts: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weighted sums of rows.

    Args:
        y: (M, H).
        place: (n,) rows of y, row after row of the result.
        counts: (R,) how many entries each row of the result has; 0 gives zeros.
        weights: (n,) or None for ones.
        dtype: of the result.

    >>> y = torch.tensor([[1.0], [2.0], [4.0]])
    >>> add_up(y, torch.tensor([2, 0]), torch.tensor([2, 0]), torch.tensor([1.0, 3.0]), y.dtype).tolist()
    [[7.0], [0.0]]
    """
    if by_bags(y, weights, dtype):
        return _by_bags(y, place, counts, weights)
    return _by_slots(y, place, counts, weights).to(dtype)


def by_bags(y: Tensor, weights: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether `add_up` sums in one call that needs no memory but its result."""
    plain = y.device.type == "cpu" and y.dtype == dtype == sum_dtype(y.dtype)
    return plain and (weights is None or weights.dtype == y.dtype)


def _by_bags(y: Tensor, place: Tensor, counts: Tensor, weights: Tensor | None) -> Tensor:
    if not place.numel():
        return y.new_zeros(counts.shape[0], y.shape[1])
    starts = counts.cumsum(0) - counts
    return torch.ops.aten._embedding_bag_forward_only(y, place, starts, False, 0, False, weights)[0]


def _by_slots(y: Tensor, place: Tensor, counts: Tensor, weights: Tensor | None) -> Tensor:
    """First entries of all rows, then second ones: no row twice in one call, so that no order is left open."""
    total = torch.zeros(counts.shape[0], y.shape[1], dtype=sum_dtype(y.dtype), device=y.device)
    starts = counts.cumsum(0) - counts
    for slot in range(int(counts.max()) if counts.numel() else 0):
        rows = (counts > slot).nonzero().squeeze(1)
        entries = starts[rows] + slot
        values = y.index_select(0, place[entries]).to(total.dtype)
        if weights is not None:
            values *= weights[entries].to(total.dtype).unsqueeze(1)
        total.index_add_(0, rows, values)
    return total


def scale_with_dots(y: Tensor, weights: Tensor, other: Tensor, *, want_dots: bool) -> Tensor | None:
    """y *= weights row by row, in place; returns the dots of y's and other's rows from before, in the weights' dtype.

    >>> y = torch.ones(2, 3)
    >>> scale_with_dots(y, torch.tensor([2.0, 0.0]), torch.ones(2, 3), want_dots=True), y[0].tolist()
    (tensor([3., 3.]), [2.0, 2.0, 2.0])
    """
    dots = torch.empty_like(weights) if want_dots else None
    wide = torch.promote_types(sum_dtype(y.dtype), weights.dtype)
    step = max(1, BLOCK_BYTES // max(1, y.shape[1] * y.element_size())) if y.device.type == "cpu" else len(y)
    for start in range(0, y.shape[0], max(step, 1)):
        block = slice(start, start + step)
        rows = y[block].to(wide)
        if dots is not None:
            dots[block] = torch.einsum("mh,mh->m", rows, other[block].to(wide)).to(dots.dtype)
        torch.mul(rows, weights[block].to(wide).unsqueeze(1), out=rows)
        if rows.data_ptr() != y[block].data_ptr():
            y[block] = rows
    return dots
