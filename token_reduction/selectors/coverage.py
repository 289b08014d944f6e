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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HELD_BYTES = 2**28
_BLOCK = 64
_GONE = torch.iinfo(torch.int64).min

Made = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cover:
    """C (rows x candidates).

    Attributes:
        columns: js (m,) -> C[:, js] transposed, (m, rows) float64, at most 1 in size.
        rows, count: rows to be covered, candidates.
        bonus: (count,) float64: worth of each candidate by itself.
        start: what an uncovered row is worth, at most every entry.
        bits, dtype: entries are multiples of 2^-bits; int32 holds 29 bits, int64 40 and more.
    """

    columns: Made
    rows: int
    count: int
    bonus: Tensor
    start: float
    bits: int = 29
    dtype: torch.dtype = torch.int32

    def whole(self, values: Tensor) -> Tensor:
        """Multiples of 2^-bits, int64."""
        return (values * 2.0**self.bits).round_().to(torch.int64)

    def take(self, js: Tensor) -> Tensor:
        """(m, rows) entries of some columns."""
        return (self.columns(js) * 2.0**self.bits).round_().to(self.dtype)

    def held(self) -> Tensor:
        """(rows, count), all of C."""
        matrix = torch.empty((self.rows, self.count), dtype=self.dtype, device=self.bonus.device)
        for js in torch.arange(self.count, device=matrix.device).split(512):
            matrix[:, js[0] : js[-1] + 1] = self.take(js).mT
        return matrix

    def uncovered(self) -> Tensor:
        """(rows,) best_i before any choice."""
        first = round(self.start * 2.0**self.bits)
        return torch.full((self.rows,), first, dtype=self.dtype, device=self.bonus.device)

    def result(self, chosen: list[int], gains: list[int]) -> tuple[Tensor, Tensor]:
        """Candidates and gains as tensors, gains in the caller's unit."""
        device = self.bonus.device
        worth = torch.tensor(gains, dtype=torch.float64, device=device) / 2.0**self.bits
        return torch.tensor(chosen, device=device), worth


def cosines(q: Tensor, low: float = -1.0) -> Made:
    """Columns of cosines of exact unit rows (n, D); low 0 rescales them to 0..1.

    A row's cosine with itself is 1 outright: two tokens that are each other's nearest tie as candidates, and the rounding of
    unit rows must not decide between them.
    """
    scale, shift = (1.0, 0.0) if low < 0 else (0.5, 0.5)
    alone = q.any(1).to(q.dtype)

    def columns(js: Tensor) -> Tensor:
        entries = q[js] @ q.mT
        entries[torch.arange(len(js), device=js.device), js] = alone[js]
        return entries * scale + shift

    return columns


def greedy(cover: Cover, count: int, held_bytes: int = HELD_BYTES) -> tuple[Tensor, Tensor]:
    """Candidates (count,) in the order of choice and their gains."""
    fits = cover.dtype.itemsize * cover.rows * cover.count <= held_bytes
    return cover.result(*(_held if fits else _lazy)(cover, count))


def _held(cover: Cover, count: int) -> tuple[list[int], list[int]]:
    matrix, best = cover.held(), cover.uncovered()
    gain = cover.whole(cover.bonus)
    for part in matrix.split(_BLOCK):
        gain += (part - best[0]).sum(0)
    chosen: list[int] = []
    gains: list[int] = []
    for _ in range(count):
        pick = int(gain.argmax())
        chosen.append(pick)
        gains.append(int(gain[pick]))
        column = matrix[:, pick]
        changed = (column > best).nonzero()[:, 0]
        for rows in changed.split(_BLOCK):
            entries, old, new = matrix[rows], best[rows, None], column[rows, None]
            # max(C - old, 0) - max(C - new, 0) is C - old held between 0 and new - old.
            gain -= entries.sub_(old).clamp_(min=0).minimum(new - old).sum(0)
        best[changed] = column[changed]
        gain[pick] = _GONE
    return chosen, gains


def _lazy(cover: Cover, count: int) -> tuple[list[int], list[int]]:
    best, device = cover.uncovered(), cover.bonus.device
    parts = torch.arange(cover.count, device=device).split(_BLOCK)
    bonus = cover.whole(cover.bonus)
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
    return chosen, gains


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
    """As `greedy`, among (n/k) ln(1/accuracy) drawn candidates a step."""
    size = math.ceil(cover.count / count * math.log(1 / accuracy))
    best, bonus, device = cover.uncovered(), cover.whole(cover.bonus), cover.bonus.device
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
    return cover.result(chosen, gains)


def _gains(entries: Tensor, best: Tensor) -> Tensor:
    return (entries - best).clamp_(min=0).sum(1)
