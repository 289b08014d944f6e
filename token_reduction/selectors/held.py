"""Greedy coverage where all entries fit in memory: a choice changes the gains by the few rows that it covers better.

    gain_j -= sum_{changed i} max(C_ij - old_i, 0) - max(C_ij - best_i, 0).   Near n^2 log k entries in all.

The matrix is held in the form that is symmetric, so that the column of a choice lies together, and all that is made on the way
stays in a cache (CPU): memory that is asked for anew costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from token_reduction.rows import block_rows
from token_reduction.selectors.cover import GONE, Cover, fixed, scaled


def held(cover: Cover, count: int) -> tuple[Tensor, Tensor]:
    """Candidates (B, count) in the order of choice and their gains, whole numbers."""
    parts = [] if cover.above is None else [_Plain(cover.whole(cover.above))]
    parts.append((_Symmetric if cover.share is None else _Shares)(cover))
    first, gain = round(cover.start * 2.0**cover.bits), cover.whole(cover.bonus)
    for part in parts:
        gain += part.total() - first * part.matrix.shape[1]
    best = [torch.full_like(part.matrix[..., 0], first, dtype=part.kind) for part in parts]
    chosen, gains = [], []
    sets = torch.arange(len(gain), device=gain.device)
    for _ in range(count):
        pick = gain.argmax(1)
        chosen.append(pick)
        gains.append(gain[sets, pick])
        for part, covered in zip(parts, best):
            column = part.column(sets, pick)
            _lower(gain, part, covered, column, (column > covered).nonzero())
            torch.maximum(covered, column, out=covered)
        gain[sets, pick] = GONE
    return torch.stack(chosen, 1), torch.stack(gains, 1)


def _lower(gain: Tensor, part: _Plain, covered: Tensor, column: Tensor, changed: Tensor) -> None:
    """Take off the gains (B, n) what the rows `changed` (m, 2: set, row) no longer give."""
    for some in changed.split(block_rows(gain.shape[1], gain.device)):
        of, row = some.unbind(1)
        entries, old, new = part.rows(of, row), covered[of, row, None], column[of, row, None]
        # max(C - old, 0) - max(C - new, 0) is C - old held between 0 and new - old.
        entries.sub_(old).clamp_(min=0)
        entries = torch.minimum(entries, new - old)
        if len(gain) == 1:
            gain[0] -= entries.sum(0)
        else:
            gain.index_add_(0, of, entries.long(), alpha=-1)


class _Plain:
    """Rows of C as they are, (B, rows, count) whole numbers, and what they give at first."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.kind = matrix, matrix.dtype

    def total(self) -> Tensor:
        """(B, count) int64: sums of the columns."""
        return self.matrix.sum(1)

    def column(self, sets: Tensor, pick: Tensor) -> Tensor:
        """(B, rows): of each set the entries of one candidate."""
        return self.matrix[sets, :, pick]

    def rows(self, of: Tensor, row: Tensor) -> Tensor:
        """(m, count): entries of some rows."""
        return _rows(self.matrix, of, row)


class _Symmetric(_Plain):
    """K itself where C is K: a column is a row, which lies together in memory."""

    def __init__(self, cover: Cover) -> None:
        super().__init__(_empty(cover, torch.int32))
        self.sums = torch.zeros_like(cover.bonus, dtype=torch.int64)
        for rows, columns, part in _tiles(cover):
            whole = cover.whole(part)
            _mirror(self.matrix, rows, columns, whole.to(torch.int32))
            _add(self.sums, rows, columns, whole)

    def total(self) -> Tensor:
        return self.sums

    def column(self, sets: Tensor, pick: Tensor) -> Tensor:
        return self.matrix[sets, pick]


class _Shares(_Plain):
    """K in float32 where C has its rows to scale: symmetric still, and entries of C are made where they are looked at."""

    def __init__(self, cover: Cover) -> None:
        super().__init__(_empty(cover, torch.float32))
        sums = torch.zeros_like(cover.bonus, dtype=torch.int64)
        for rows, columns, part in _tiles(cover):
            _mirror(self.matrix, rows, columns, part.float())
            _add(sums, rows, columns, fixed(part))
        self.factor, self.kind = cover.factors(sums), torch.int32

    def total(self) -> Tensor:
        step = block_rows(self.factor.numel(), self.factor.device)
        parts = zip(self.matrix.split(step, 1), self.factor.split(step, 1))
        return sum(scaled(rows, factor[..., None]).sum(1) for rows, factor in parts)

    def column(self, sets: Tensor, pick: Tensor) -> Tensor:
        return scaled(self.matrix[sets, pick], self.factor)

    def rows(self, of: Tensor, row: Tensor) -> Tensor:
        return scaled(_rows(self.matrix, of, row), self.factor[of, row, None])


def _rows(matrix: Tensor, of: Tensor, row: Tensor) -> Tensor:
    """matrix[of, row], which copies rows whole."""
    return matrix.flatten(0, 1).index_select(0, of * matrix.shape[1] + row)


def _empty(cover: Cover, dtype: torch.dtype) -> Tensor:
    return torch.empty((len(cover.bonus), cover.count, cover.count), dtype=dtype, device=cover.bonus.device)


def _tiles(cover: Cover) -> Iterator[tuple[slice, slice, Tensor]]:
    """The upper half of K, which is all of it since it is exact and symmetric, in squares that stay in a cache (CPU) or fill a
    device."""
    device = cover.bonus.device
    side = 256 if device.type == "cpu" else 2048
    for first in range(0, cover.count, side):
        rows = slice(first, min(first + side, cover.count))
        js = torch.arange(rows.start, rows.stop, device=device)
        for begin in range(first, cover.count, side):
            columns = slice(begin, min(begin + side, cover.count))
            yield rows, columns, cover.kernel(js, columns)


def _mirror(matrix: Tensor, rows: slice, columns: slice, part: Tensor) -> None:
    """A tile and its mirror image."""
    matrix[:, rows, columns] = part
    if rows != columns:
        matrix[:, columns, rows] = part.mT


def _add(sums: Tensor, rows: slice, columns: slice, part: Tensor) -> None:
    """Sums over the columns of a symmetric matrix, from a tile that stands for its mirror image too."""
    sums[:, columns] += part.sum(1)
    if rows != columns:
        sums[:, rows] += part.sum(2)
