"""Cosines, means and orders whose bits depend on the rows alone: not on batch, blocking, partition or library.

Unit rows are rounded to multiples of 2^-25 as in `rows`, so that float64 sums of their products are exact in any order.
Equal tokens then have equal cosines to the last bit, and ties really go to the lowest index.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAGIC = 6.0 * 2.0**25


def fixed_mean(x: Tensor) -> Tensor:
    """Mean over dim -2 of (..., n, D), float64, in 64-bit fixed point, where addition is exact."""
    n = x.shape[-2]
    peak = float(x.abs().amax()) if x.numel() else 0.0
    if peak == 0.0:
        return x.new_zeros((*x.shape[:-2], x.shape[-1]), dtype=torch.float64)
    scale = math.ldexp(1.0, min(900, min(52, 61 - n.bit_length()) - math.frexp(peak)[1]))
    return (x.double() * scale).round().to(torch.int64).sum(-2).double() / scale / n


def unit_rows(x: Tensor, center: bool = False) -> Tensor:
    """Unit rows (..., n, D) float64 rounded to multiples of 2^-25; zero rows stay zero. center: the mean comes off first."""
    wide = x.double()
    if center:
        means = [fixed_mean(part) for part in x.reshape(-1, *x.shape[-2:])]
        wide = wide - torch.stack(means).reshape(*x.shape[:-2], 1, x.shape[-1])
    norm = _row_sum(wide * wide).sqrt_()
    inverse = torch.where(norm > 0, 1.0 / norm, 0.0)
    return wide.mul(inverse[..., None]).add_(_MAGIC).sub_(_MAGIC)


def _row_sum(values: Tensor) -> Tensor:
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        values = torch.cat([folded, values[..., 2 * half :]], -1) if values.shape[-1] % 2 else folded
    return values[..., 0]


def top(scores: Tensor, count: int) -> Tensor:
    """Indices (..., count) of the largest scores of dim -1, best first; ties go to the lowest index.

    >>> top(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3)
    tensor([1, 2, 3])
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]


def evenly(length: int, count: int) -> Tensor:
    """Middles of `count` equal stretches of 0..length-1, int64, in integers throughout.

    >>> evenly(10, 3)
    tensor([1, 5, 8])
    """
    return (2 * torch.arange(count) + 1) * length // (2 * count) if count else torch.zeros(0, dtype=torch.int64)


def spread(count: int, parts: int) -> list[int]:
    """`count` over `parts` as evenly as it goes, the larger shares evenly spread.

    >>> spread(10, 4), spread(2, 4)
    ([2, 3, 2, 3], [0, 1, 0, 1])
    """
    return [(i + 1) * count // parts - i * count // parts for i in range(parts)]


def rest(length: int, taken: Tensor) -> Tensor:
    """The numbers 0..length-1 that are not among the distinct ones of `taken` (..., m), ascending, (..., length - m)."""
    free = torch.ones((*taken.shape[:-1], length), dtype=torch.bool, device=taken.device)
    numbers = torch.arange(length, device=taken.device).expand_as(free)
    return numbers[free.scatter(-1, taken, False)].view(*taken.shape[:-1], length - taken.shape[-1])


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, m, D) of x (B, n, D) at index (B, m)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def nearest(rows: Tensor, targets: Tensor) -> Tensor:
    """(n,) for each row the target with the largest dot product, the lowest on ties. Both exact unit rows, (n, D), (m, D)."""
    return (rows @ targets.mT).argmax(-1)


def knee(values: Tensor) -> int:
    """Where a falling curve bends most: the place farthest below the chord from its first to its last value, plus 1.

    >>> knee(torch.tensor([10.0, 9.0, 2.0, 1.5, 1.0]))
    3
    """
    n = values.numel()
    if n < 3:
        return n
    line = values[0] + (values[-1] - values[0]) * torch.arange(n, device=values.device) / (n - 1)
    return int((line - values).argmax()) + 1
