"""Row arithmetic whose bits do not depend on how many rows are handled together, nor where, nor by which library.

Ordinary dot products round differently with the shape of the product, the number of threads and the BLAS, so a greedy choice
between two nearly equal tokens could fall differently on four ranks than on one. Two devices take the rounding away:

* `pair_sum` adds the columns of a row in a fixed tree of elementwise additions, which IEEE 754 defines to the last bit.
* `UnitRows` rounds each unit row to multiples of 2^-25. Products of two entries are then multiples of 2^-50, and every
  partial sum of a dot product is at most |a||b| = 1 (Cauchy-Schwarz), so float64 holds every partial sum *exactly*: any
  order of summation, any blocking, fused or not, gives the same number. Halved squares are multiples of 2^-51 and distances
  at most 2, so the sums that make a distance are exact too. A cosine is off by 1e-8 typically, like one taken in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tokenring.transport import Transport

_STEPS = 2.0**25
_MAGIC = 6.0 * _STEPS  # adding and subtracting it rounds a double of size <= 1 to a multiple of 2^-25


def pair_sum(values: Tensor) -> Tensor:
    """Sum over dim 1 of (n, d) by halving: columns 0..d/2 plus columns d/2..d, again and again.

    >>> pair_sum(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    tensor([ 6., 15.])
    """
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        folded = values[:, :half] + values[:, half : 2 * half]
        values = torch.cat([folded, values[:, 2 * half :]], 1) if values.shape[1] % 2 else folded
    return values[:, 0]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of `a` with the same row of `b`, (n, d) float64 -> (n,); 0 where a row is zero, 1 for equal rows."""
    square = pair_sum(a * a) * pair_sum(b * b)
    return torch.where(square > 0, pair_sum(a * b) / square.clamp_min(torch.finfo(a.dtype).tiny).sqrt(), 0.0)


def item_mean(x: Tensor, total: int, transport: Transport) -> Tensor:
    """Mean (D,) float64 over the `total` rows that all ranks hold together, the same bits for every partition.

    Summed in 64-bit fixed point, where addition is exact and order does not matter.
    """
    largest = x.abs().amax().double().reshape(1) if x.numel() else x.new_zeros(1, dtype=torch.float64)
    peak = max(float(part) for part in transport.all_gather(largest))
    if peak == 0.0:
        return x.new_zeros(x.shape[1], dtype=torch.float64)
    scale = math.ldexp(1.0, min(900, min(52, 61 - total.bit_length()) - math.frexp(peak)[1]))
    fixed = x.new_zeros((1, x.shape[1]), dtype=torch.int64)
    for first, last in blocks(x.shape[0], x.shape[1], x.device):
        fixed += (x[first:last].double() * scale).round().to(torch.int64).sum(0)
    whole = torch.stack(transport.all_gather(fixed)).sum(0)[0]
    return whole.double() / scale / total


def block_rows(width: int, device: torch.device) -> int:
    """How many rows of `width` entries fit a cache (CPU) or fill a device."""
    return max(1, (2**17 if device.type == "cpu" else 2**24) // width)


def blocks(rows: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Half-open row ranges that fit a cache (CPU) or fill a device; their size changes no result."""
    step = block_rows(width, device)
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def at_once(rows: int, width: int, device: torch.device) -> int:
    """How many units of `rows` rows, with a matrix of all pairs each, are handled at once: those that stay near the caches (CPU),
    or that memory allows where kernels want to be large."""
    entries = 2**20 if device.type == "cpu" else 2**24
    return max(1, entries // (rows * (rows + width)))


_HELD_BYTES = 2**29


class UnitRows:
    """Unit rows of `x` (n, D): held in float64 while they take 512 MiB at most (no pass then makes them again), and beyond
    that made block by block when asked for, so that only O(n) is held besides `x` itself.

    The distance of two rows is d(i, j) = half[i] + half[j] - q_i . q_j = |q_i - q_j|^2 / 2, which is 1 - cosine, exact up to
    the rounding of q, and exactly 0 for equal rows. An all-zero row stays zero: 1/2 from every other row, 0 from its like.

    Args:
        x: (n, D) finite rows.
        mean: (D,) float64 taken off every row first, or None.
    """

    def __init__(self, x: Tensor, mean: Tensor | None = None) -> None:
        self._x, self._mean = x, mean
        self.count, self.width = x.shape
        self._inverse = x.new_zeros((self.count, 1), dtype=torch.float64)
        self.half = x.new_zeros(self.count, dtype=torch.float64)
        """(n,) float64: |q|^2 / 2."""
        self._held: Tensor | None = None
        held = x.new_empty(x.shape, dtype=torch.float64) if 8 * x.numel() <= _HELD_BYTES else None
        for first, last in blocks(self.count, self.width, x.device):
            rows = self._raw(slice(first, last))
            norm = pair_sum(rows * rows).sqrt_()
            self._inverse[first:last, 0] = torch.where(norm > 0, 1.0 / norm, 0.0)
            rows = self.take(slice(first, last))
            self.half[first:last] = 0.5 * (rows * rows).sum(1)
            if held is not None:
                held[first:last] = rows
        self._held = held

    def _raw(self, which: slice | Tensor) -> Tensor:
        rows = self._x[which].double()
        return rows if self._mean is None else rows - self._mean

    def take(self, which: slice | Tensor) -> Tensor:
        """(m, D) float64 unit rows, rounded to multiples of 2^-25."""
        if self._held is not None:
            return self._held[which]
        return (self._raw(which) * self._inverse[which]).add_(_MAGIC).sub_(_MAGIC)

    def distances(self, which: Tensor | None, others: Tensor, half: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """d(i, j) for rows i of `which` (all where None) and rows j of `others` (m, D), block by block of i.

        Yields the range of i and its distances (rows, m); each number is exact and so the same in every blocking.
        """
        count, turned = self.count if which is None else which.numel(), others.T.contiguous()
        for first, last in blocks(count, self.width, self._x.device):
            part = slice(first, last)
            rows = part if which is None else which[part]
            yield part, torch.addmm(half, self.take(rows), turned, alpha=-1).add_(self.half[rows, None])


def pack(head: Tensor, unit: Tensor) -> Tensor:
    """Numbers (m, c) float64 and unit rows (m, D) as one int32 tensor (m, 2 c + D) for the wire; loses nothing."""
    numbers = head.reshape(-1).view(torch.int32).reshape(head.shape[0], 2 * head.shape[1])
    return torch.cat([numbers, (unit * _STEPS).to(torch.int32)], 1)


def unpack(packed: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Head (m, columns) and unit rows (m, D), both float64, as they were packed."""
    head = packed[:, : 2 * columns].reshape(-1).view(torch.float64).reshape(packed.shape[0], columns)
    return head, packed[:, 2 * columns :].double() / _STEPS
