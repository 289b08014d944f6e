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

import torch
from torch import Tensor

from token_reduction.selectors.cover import GONE, Cover
from token_reduction.selectors.held import held

_BLOCK = 64


def greedy(cover: Cover, count: int, held_bytes: int | None = None) -> tuple[Tensor, Tensor]:
    """Candidates (B, count) in the order of choice and their gains. What does not fit in memory is chosen by one set alone."""
    if cover.fits(held_bytes):
        return cover.result(*held(cover, count))
    assert len(cover.bonus) == 1
    return cover.result(*_lazy(cover, count))


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
        bound[pick] = GONE
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
        stale = torch.where(fresh == step, GONE, bound)
        block = stale.topk(min(size, cover.count)).indices
        block = block[stale[block] > GONE]
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
