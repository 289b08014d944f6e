"""What is to be covered, and by whom: rows x candidates, made by columns when asked for.

Entries are whole multiples of 2^-bits, so that their sums are exact in any order and ties go to the lowest index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

HELD_BYTES = 2**28
GONE = torch.iinfo(torch.int64).min
"""The gain of a candidate that is chosen."""
_SUM = 2.0**40
_BLOCK = 64

Kernel = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Cover:
    """C of B sets: rows to be covered x candidates. The last `count` rows are the candidates themselves, C_ij = K_ij with K
    symmetric, or share K_ij / (count sum_j K_ij) where `share` is given; further rows may stand above them.

    Attributes:
        kernel: js (m,), columns (a slice) -> K (B, m, columns) float64, at most 1 in size; where `share` is given its values are
            above 0 and fit float32.
        bonus: (B, count) float64: worth of each candidate by itself.
        start: what an uncovered row is worth, at most every entry.
        above: (B, rows, count) float64 of further rows, or None.
        bits: entries are multiples of 2^-bits: 29 fit int32 for entries up to 1; more for small ones. Those of a share are
            products taken in float32.
    """

    kernel: Kernel
    bonus: Tensor
    start: float
    above: Tensor | None = None
    share: float | None = None
    bits: int = 29

    @property
    def count(self) -> int:
        return self.bonus.shape[-1]

    def fits(self, held_bytes: int | None = None) -> bool:
        """Whether C may be held."""
        return fits(self.count, held_bytes)

    def whole(self, values: Tensor) -> Tensor:
        """Multiples of 2^-bits, int64."""
        return (values * 2.0**self.bits).round_().to(torch.int64)

    @cached_property
    def factor(self) -> Tensor:
        """(B, count) float32 that row i of K is multiplied with to give C's whole multiples, where `share` is given."""
        parts = torch.arange(self.count, device=self.bonus.device).split(_BLOCK)
        return self.factors(torch.cat([fixed(self.kernel(js, slice(0, self.count))).sum(-1) for js in parts], 1))

    def factors(self, sums: Tensor) -> Tensor:
        """The same, from the sums of K's rows in fixed point."""
        return (self.share * 2.0**self.bits / (self.count * (sums.double() / _SUM))).float()

    def take(self, js: Tensor) -> Tensor:
        """(m, rows) int64 entries of some columns of the only set."""
        part = self.kernel(js, slice(0, self.count))[0]
        own = self.whole(part) if self.share is None else scaled(part.float(), self.factor).long()
        return own if self.above is None else torch.cat([self.whole(self.above[0].mT[js]), own], 1)

    def result(self, chosen: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates and gains (B, count), gains in the caller's unit."""
        return chosen, gains.double() / 2.0**self.bits


def fits(count: int, held_bytes: int | None = None) -> bool:
    """Whether a set of `count` candidates may have all its entries held."""
    return 4 * count**2 <= (HELD_BYTES if held_bytes is None else held_bytes)


def fixed(values: Tensor) -> Tensor:
    """Values in 0..1 as int64 in fixed point: their sums are the same in any order, on any device."""
    return (values * _SUM).round_().to(torch.int64)


def scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """Entries of C, int32, from entries of K float32: one product, rounded as IEEE 754 says, wherever it is taken."""
    return (rows * factor).round_().to(torch.int32)


def cosines(q: Tensor, low: float = -1.0) -> Kernel:
    """Cosines of exact unit rows (B, n, D); low 0 rescales them to 0..1.

    A row's cosine with itself is 1 outright: two tokens that are each other's nearest tie as candidates, and the rounding of
    unit rows must not decide between them.
    """
    scale, shift = (1.0, 0.0) if low < 0 else (0.5, 0.5)
    alone = q.any(-1).to(q.dtype)

    def kernel(js: Tensor, columns: slice) -> Tensor:
        entries = q[:, js] @ q[:, columns].mT
        inside = ((js >= columns.start) & (js < columns.stop)).nonzero()[:, 0]
        entries[:, inside, js[inside] - columns.start] = alone[:, js[inside]]
        return entries.mul_(scale).add_(shift)

    return kernel
