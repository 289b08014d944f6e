"""Greedy facility location: the rows that cover all others best, exact but lazy, or by drawn candidates.

    F(Y) = sum_i max(0, max_{y in Y} C_iy) + sum_{y in Y} b_y
    gain(j | Y) = sum_i max(C_ij - best_i, 0) + b_j,   best_i = max(start, max_{y in Y} C_iy)

F is submodular: a gain never grows while Y does, so an old gain is an upper bound (Minoux, "Accelerated greedy algorithms",
1978). Only the candidates whose old gain could still win are looked at again, a block at a time. `stochastic` looks at a drawn
sample of (n/k) ln(1/eps) candidates a step instead (Mirzasoleiman et al., "Lazier than lazy greedy", AAAI 2015).

Entries of C are multiples of 2^-23 in float32 and gains are summed in float64, which is then exact in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MATRIX_BYTES = 2**28
_GRAIN = 2.0**23
_BLOCK = 64


@dataclass(frozen=True)
class Columns:
    """C by columns: `of(js)` gives (len(js), rows) float32, kept whole while it is small enough."""

    make: Callable[[Tensor], Tensor]
    count: int
    rows: int
    matrix: Tensor | None

    @classmethod
    def build(cls, make: Callable[[Tensor], Tensor], count: int, rows: int, device: torch.device) -> Columns:
        """make(js): (m, rows) float64 entries, at most 128 in size."""
        if 4 * count * rows > MATRIX_BYTES:
            return cls(make, count, rows, None)
        parts = torch.arange(count, device=device).split(512)
        return cls(make, count, rows, torch.cat([_grained(make(part)) for part in parts]))

    def of(self, js: Tensor) -> Tensor:
        return _grained(self.make(js)) if self.matrix is None else self.matrix[js]


def cosines(q: Tensor, low: float = -1.0) -> Callable[[Tensor], Tensor]:
    """Columns of cosines of exact unit rows (n, D); low 0 rescales them to 0..1."""
    scale, shift = (1.0, 0.0) if low < 0 else (0.5, 0.5)
    return lambda js: (q[js] @ q.mT) * scale + shift


def greedy(columns: Columns, count: int, bonus: Tensor, start: float, generator: torch.Generator | None = None,
           accuracy: float = 0.1) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Indices (count,) in the order of choice and their gains; ties go to the lowest index.

    Args:
        bonus: (n,) float64 worth of each candidate by itself.
        start: what an uncovered row is worth.
        generator: given, candidates are drawn: the expected value is at least (1 - 1/e - accuracy) of the best.
    """
    if generator is not None:
        return _stochastic(columns, count, bonus, start, generator, accuracy)
    best = torch.full((columns.rows,), start, dtype=torch.float32, device=bonus.device)
    bound = _all_gains(columns, best, bonus)
    fresh = torch.zeros(columns.count, dtype=torch.int64, device=bonus.device)
    chosen, gains = [], []
    for step in range(count):
        pick = _settle(columns, best, bonus, bound, fresh, step)
        chosen.append(pick)
        gains.append(float(bound[pick]))
        best = torch.maximum(best, columns.of(torch.tensor([pick], device=best.device))[0])
        bound[pick] = -math.inf
    return torch.tensor(chosen, device=bonus.device), torch.tensor(gains, dtype=torch.float64, device=bonus.device)


def _settle(columns: Columns, best: Tensor, bonus: Tensor, bound: Tensor, fresh: Tensor, step: int) -> int:
    """The candidate with the largest gain now: look again at the highest bounds until a fresh one is on top."""
    size = 4
    while True:
        top = int(bound.argmax())
        if fresh[top] == step:
            return top
        stale = torch.where(fresh == step, -math.inf, bound)
        block = stale.topk(min(size, columns.count)).indices
        block = block[stale[block] > -math.inf]
        bound[block] = _gains(columns.of(block), best) + bonus[block]
        fresh[block] = step
        size = min(2 * size, _BLOCK)


def _stochastic(columns: Columns, count: int, bonus: Tensor, start: float, generator: torch.Generator,
                accuracy: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    size = math.ceil(columns.count / count * math.log(1 / accuracy))
    best = torch.full((columns.rows,), start, dtype=torch.float32, device=bonus.device)
    free = torch.arange(columns.count)
    chosen, gains = [], []
    for _ in range(count):
        drawn = torch.randperm(free.numel(), generator=generator)[:size].sort().values
        js = free[drawn].to(best.device)
        entries = columns.of(js)
        gain = _gains(entries, best) + bonus[js]
        at = int(gain.argmax())
        chosen.append(int(js[at]))
        gains.append(float(gain[at]))
        best = torch.maximum(best, entries[at])
        free = free[free != chosen[-1]]
    return torch.tensor(chosen, device=bonus.device), torch.tensor(gains, dtype=torch.float64, device=bonus.device)


def _all_gains(columns: Columns, best: Tensor, bonus: Tensor) -> Tensor:
    parts = torch.arange(columns.count, device=best.device).split(_BLOCK)
    return torch.cat([_gains(columns.of(part), best) for part in parts]) + bonus


def _gains(entries: Tensor, best: Tensor) -> Tensor:
    return (entries - best).clamp_(min=0).sum(1, dtype=torch.float64)


def _grained(values: Tensor) -> Tensor:
    return (values * _GRAIN).round_().div_(_GRAIN).float()
