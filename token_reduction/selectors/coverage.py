"""Greedy facility location: the candidates that cover all rows best.

    F(Y) = sum_i max(start, max_{y in Y} C_iy) + sum_{y in Y} b_y
    gain(j | Y) = sum_i max(C_ij - best_i, 0) + b_j,   best_i = max(start, max_{y in Y} C_iy)

Three ways to the same greedy choice, or near it:

    held      C fits in memory. A choice raises best_i for few rows i; only these change the gains:
              gain_j -= sum_{changed i} max(C_ij - old_i, 0) - max(C_ij - best_i, 0).   Near n^2 log k entries in all.
    lazy      C is made by columns when asked for. F is submodular, an old gain bounds a new one (Minoux, "Accelerated greedy
              algorithms", 1978): only candidates whose old gain could still win are looked at again, a block at a time.
    drawn     a sample of (n/k) ln(1/eps) candidates a step instead of all (Mirzasoleiman et al., "Lazier than lazy greedy",
              AAAI 2015): the expected F is at least (1 - 1/e - eps) of the best.

Entries are rounded to whole multiples of 2^-bits and added as integers: exact in any order, ties go to the lowest index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

HELD_BYTES = 2**28
_BLOCK = 64
_SUM = 2.0**40
_GONE = torch.iinfo(torch.int64).min

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
        bits: entries are multiples of 2^-bits: 29 fit int32 for entries up to 1; more for small ones.
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

    def blocks(self) -> Iterator[Tensor]:
        """Candidates, some at a time."""
        return iter(torch.arange(self.count, device=self.bonus.device).split(512))

    @cached_property
    def factor(self) -> Tensor:
        """(B, count) float64 that row i of K is multiplied with."""
        if self.share is None:
            return torch.ones_like(self.bonus)
        return self.factors(torch.cat([_sums(self.kernel(js, slice(0, self.count))) for js in self.blocks()], 1))

    def factors(self, sums: Tensor) -> Tensor:
        """The same, from the sums of K's rows."""
        return self.share / (self.count * sums)

    def take(self, js: Tensor) -> Tensor:
        """(m, rows) int64 entries of some columns of the only set."""
        own = (self.kernel(js, slice(0, self.count)) * self.factor[:, None])[0]
        return self.whole(own if self.above is None else torch.cat([self.above[0].mT[js], own], 1))

    def held(self) -> list[Tensor]:
        """All of C, (B, rows, count): the rows above as int64, the others as int32."""
        shape = (len(self.bonus), self.count, self.count)
        matrix = torch.empty(shape, dtype=torch.int32, device=self.bonus.device)
        if self.share is None:
            self._mirror(matrix, lambda part: self.whole(part).to(torch.int32))
        else:
            # K first, in the place that its integers take: its rows' sums must be known before they are made.
            plain = matrix.view(torch.float32)
            self._mirror(plain, lambda part: part.float())
            factor = self.factors(torch.cat([_sums(plain[:, js].double()) for js in self.blocks()], 1))
            for js in self.blocks():
                matrix[:, js] = self.whole(plain[:, js].double() * factor[:, js, None]).to(torch.int32)
        return [matrix] if self.above is None else [self.whole(self.above), matrix]

    def _mirror(self, matrix: Tensor, made: Callable[[Tensor], Tensor]) -> None:
        """Fill in symmetric matrices: half of the products are enough, since all are exact."""
        for js in self.blocks():
            first, last = int(js[0]), int(js[-1]) + 1
            part = made(self.kernel(js, slice(first, self.count)))
            matrix[:, first:last, first:] = part
            matrix[:, last:, first:last] = part[:, :, last - first :].mT

    def result(self, chosen: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates and gains (B, count), gains in the caller's unit."""
        return chosen, gains.double() / 2.0**self.bits


def fits(count: int, held_bytes: int | None = None) -> bool:
    """Whether a set of `count` candidates may have all its entries held."""
    return 4 * count**2 <= (HELD_BYTES if held_bytes is None else held_bytes)


def _sums(rows: Tensor) -> Tensor:
    """(..., m, n) in 0..1 -> (..., m) sums in fixed point: the same in any order, on any device."""
    return (rows * _SUM).round_().to(torch.int64).sum(-1).double() / _SUM


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


def greedy(cover: Cover, count: int, held_bytes: int | None = None) -> tuple[Tensor, Tensor]:
    """Candidates (B, count) in the order of choice and their gains. What does not fit in memory is chosen by one set alone."""
    if cover.fits(held_bytes):
        return cover.result(*_held(cover, count))
    assert len(cover.bonus) == 1
    return cover.result(*_lazy(cover, count))


def _held(cover: Cover, count: int) -> tuple[Tensor, Tensor]:
    parts = cover.held()
    first, gain = round(cover.start * 2.0**cover.bits), cover.whole(cover.bonus)
    for matrix in parts:
        for rows in matrix.split(_BLOCK, 1):
            gain += (rows - first).sum(1)
    best = [torch.full_like(matrix[..., 0], first) for matrix in parts]
    chosen, gains = [], []
    every = torch.arange(len(gain), device=gain.device)
    for _ in range(count):
        pick = gain.argmax(1)
        chosen.append(pick)
        gains.append(gain[every, pick])
        for matrix, covered in zip(parts, best):
            column = matrix[every, :, pick]
            _lower(gain, matrix, covered, column, (column > covered).nonzero())
            torch.maximum(covered, column, out=covered)
        gain[every, pick] = _GONE
    return torch.stack(chosen, 1), torch.stack(gains, 1)


def _lower(gain: Tensor, matrix: Tensor, covered: Tensor, column: Tensor, changed: Tensor) -> None:
    """Take off the gains (B, n) what the rows `changed` (m, 2: set, row) no longer give."""
    for part in changed.split(_BLOCK):
        of, row = part.unbind(1)
        entries, old, new = matrix[of, row], covered[of, row, None], column[of, row, None]
        # max(C - old, 0) - max(C - new, 0) is C - old held between 0 and new - old.
        entries.sub_(old).clamp_(min=0)
        entries = torch.minimum(entries, new - old)
        if len(gain) == 1:
            gain[0] -= entries.sum(0)
        else:
            gain.index_add_(0, of, entries.long(), alpha=-1)


def _lazy(cover: Cover, count: int) -> tuple[Tensor, Tensor]:
    best, device = _uncovered(cover), cover.bonus.device
    parts = torch.arange(cover.count, device=device).split(_BLOCK)
    bonus = cover.whole(cover.bonus[0])
    bound = torch.cat([_gains(cover.take(js), best) for js in parts]) + bonus
    fresh = torch.zeros(cover.count, dtype=torch.int64, device=device)
    chosen: list[int] = []
    gains: list[int] = []
    for step in range(count):
        pick = _settle(cover, best, bonus, bound, fresh, step)
        chosen.append(pick)
        gains.append(int(bound[pick]))
        best = torch.maximum(best, cover.take(torch.tensor([pick], device=device))[0])
        bound[pick] = _GONE
    return torch.tensor([chosen], device=device), torch.tensor([gains], device=device)


def _uncovered(cover: Cover) -> Tensor:
    """(rows,) best_i of the only set before any choice."""
    rows = cover.count + (0 if cover.above is None else cover.above.shape[1])
    return torch.full((rows,), round(cover.start * 2.0**cover.bits), device=cover.bonus.device)


def _settle(cover: Cover, best: Tensor, bonus: Tensor, bound: Tensor, fresh: Tensor, step: int) -> int:
    """The candidate with the largest gain now: look again at the highest bounds until a fresh one is on top."""
    size = 4
    while True:
        top = int(bound.argmax())
        if fresh[top] == step:
            return top
        stale = torch.where(fresh == step, _GONE, bound)
        block = stale.topk(min(size, cover.count)).indices
        block = block[stale[block] > _GONE]
        bound[block] = _gains(cover.take(block), best) + bonus[block]
        fresh[block] = step
        size = min(2 * size, _BLOCK)


def drawn(cover: Cover, count: int, generator: torch.Generator, accuracy: float) -> tuple[Tensor, Tensor]:
    """As `greedy` of one set, among (n/k) ln(1/accuracy) drawn candidates a step."""
    size = math.ceil(cover.count / count * math.log(1 / accuracy))
    best, bonus, device = _uncovered(cover), cover.whole(cover.bonus[0]), cover.bonus.device
    free = torch.arange(cover.count)
    chosen: list[int] = []
    gains: list[int] = []
    for _ in range(count):
        sample = torch.randperm(free.numel(), generator=generator)[:size].sort().values
        js = free[sample].to(device)
        gain = torch.cat([_gains(cover.take(part), best) for part in js.split(_BLOCK)]) + bonus[js]
        at = int(gain.argmax())
        chosen.append(int(js[at]))
        gains.append(int(gain[at]))
        best = torch.maximum(best, cover.take(js[at : at + 1])[0])
        free = free[free != chosen[-1]]
    return cover.result(torch.tensor([chosen], device=device), torch.tensor([gains], device=device))


def _gains(entries: Tensor, best: Tensor) -> Tensor:
    return (entries - best).clamp_(min=0).sum(1)
