"""Cosines, means and orders whose bits depend on the rows alone: not on batch, blocking, partition or library.

Unit rows are rounded to multiples of 2^-25 as in `rows`, so that float64 sums of their products are exact in any order.
Equal tokens then have equal cosines to the last bit, and ties really go to the lowest index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from token_reduction.rows import blocks

_MAGIC = 6.0 * 2.0**25


def fixed_mean(x: Tensor) -> Tensor:
    """Mean over dim -2 of (..., n, D), float64, in 64-bit fixed point, where addition is exact: (..., D).

    The point is set by the largest entry of each (n, D), so what lies beside it in a batch changes nothing.
    """
    n = x.shape[-2]
    if not x.numel():
        return x.new_zeros((*x.shape[:-2], x.shape[-1]), dtype=torch.float64)
    largest = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))
    exponent = torch.frexp(largest.double()).exponent
    scale = _power(torch.clamp(min(52, 61 - n.bit_length()) - exponent.long(), max=900))
    cuts = blocks(n, x.numel() // n, x.device)
    total = sum((x[..., i:j, :].double() * scale).round_().to(torch.int64).sum(-2) for i, j in cuts)
    return total.double() / scale[..., 0] / n


def _power(exponent: Tensor) -> Tensor:
    """2^exponent float64 by its bits: `exp2` and `pow` may be off by one."""
    return ((exponent + 1023) << 52).view(torch.float64)


def unit_rows(x: Tensor, center: bool = False) -> Tensor:
    """Unit rows (..., n, D) float64 rounded to multiples of 2^-25; zero rows stay zero. center: the mean comes off first."""
    wide = x.double() - fixed_mean(x)[..., None, :] if center else x
    unit = torch.empty(x.shape, dtype=torch.float64, device=x.device)
    rows, done = wide.reshape(-1, x.shape[-1]), unit.view(-1, x.shape[-1])
    for first, last in blocks(len(rows), x.shape[-1], x.device):
        part = rows[first:last].double()
        norm = _row_sum(part * part).sqrt_()
        inverse = torch.where(norm > 0, 1.0 / norm, 0.0)
        done[first:last] = part.mul(inverse[:, None]).add_(_MAGIC).sub_(_MAGIC)
    return unit


def _row_sum(values: Tensor) -> Tensor:
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        folded = values[..., :half] + values[..., half : 2 * half]
        values = torch.cat([folded, values[..., 2 * half :]], -1) if values.shape[-1] % 2 else folded
    return values[..., 0]


def finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite: the extremes tell, in one pass where `isfinite` takes several.

    >>> finite(torch.ones(2)), finite(torch.tensor([1.0, float("nan")])), finite(torch.tensor([-float("inf"), 1.0]))
    (True, False, False)
    """
    return not x.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def top(scores: Tensor, count: int) -> Tensor:
    """Indices (..., count) of the largest scores of dim -1, best first; ties go to the lowest index.

    >>> top(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3)
    tensor([1, 2, 3])
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]


def best_of_each(scores: Tensor, shares: Tensor | list[int]) -> Tensor:
    """(..., F, N) bool: in each line the `shares` (..., F) largest scores, ties to the lowest index.

    >>> best_of_each(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 0.0]]), [2, 1]).int().tolist()
    [[0, 1, 1], [1, 0, 0]]
    """
    shares = torch.as_tensor(shares, device=scores.device)
    first = torch.arange(scores.shape[-1], device=scores.device) < shares[..., None]
    order = top(scores, scores.shape[-1])
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, first.expand_as(order))


def marked(mask: Tensor) -> list[Tensor]:
    """Of each line of (B, n) bool the places that are true, ascending.

    >>> [line.tolist() for line in marked(torch.tensor([[True, False, True], [False, True, False]]))]
    [[0, 2], [1]]
    """
    return list(mask.nonzero()[:, 1].split(mask.sum(1).tolist()))


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


def knee(values: Tensor) -> Tensor:
    """Where a falling curve (..., n) bends most: the place farthest below the chord from its first to its last value, plus 1.

    >>> knee(torch.tensor([10.0, 9.0, 2.0, 1.5, 1.0]))
    tensor(3)
    """
    n = values.shape[-1]
    if n < 3:
        return torch.full(values.shape[:-1], n, device=values.device)
    first, last = values[..., :1], values[..., -1:]
    line = first + (last - first) * torch.arange(n, device=values.device) / (n - 1)
    return (line - values).argmax(-1) + 1
