"""Greedy diversity in O(n D) memory: max-sum from a pivot, and the most probable set of a DPP (max-min: `farthest`).

    max-sum   next = arg-min_v sum_{c kept} cos(v, c)
    DPP       next = arg-max_v det L[kept + v] / det L[kept]      L_ij = r_i r_j cos(i, j)

The DPP's ratio is the squared residual d_v of v after projection on the kept, updated by one row of a Cholesky factor each step
(Chen, Zhang, Zhou, "Fast greedy MAP inference for determinantal point process", NeurIPS 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_RANK = 1e-10
_AHEAD = 32


def max_sum(q: Tensor, count: int, pivot: int) -> Tensor:
    """Order of choice (count,) over exact unit rows q (n, D), from `pivot`; ties go to the lowest index."""
    total = q.new_zeros(q.shape[0])
    order = [pivot]
    for _ in range(count - 1):
        total += q @ q[order[-1]]
        total[order[-1]] = math.inf
        order.append(int(total.argmin()))
    return torch.tensor(order, device=q.device)


def dpp(q: Tensor, count: int, quality: Tensor, block: int | None = None) -> Tensor:
    """Order of choice (count,) of greedy MAP over L = diag(r) q q^T diag(r); ties go to the lowest index.

    A kernel of rank D has no more than D rows of positive determinant; after that, or after `block` choices, a new set is
    begun among the rows that are left. So at most min(D, block) rows of the factor are held: O(n min(D, block)) memory.
    """
    # Rounded unit rows are 1 long up to 1e-8, which must not break ties between tokens that are equally good alone.
    alone = q.any(1).to(q) * quality**2
    return dpp_of(_Columns(q, quality), alone, count, block or q.shape[1])


class _Columns:
    """Columns of the kernel, made for the best candidates at once: one matrix product instead of many passes over q."""

    def __init__(self, q: Tensor, quality: Tensor) -> None:
        self.q, self.quality = q, quality
        self.made: dict[int, Tensor] = {}

    def __call__(self, i: int, left: Tensor) -> Tensor:
        if i not in self.made:
            best = left.topk(min(_AHEAD, len(left))).indices.tolist()
            js = torch.tensor([i, *(j for j in best if j != i)], device=self.q.device)
            self.made = dict(zip(js.tolist(), self.q[js] @ self.q.mT))
        return self.made[i] * self.quality * self.quality[i]


def dpp_of(column: Callable[[int, Tensor], Tensor], diagonal: Tensor, count: int, block: int) -> Tensor:
    """`dpp` of any kernel, given by `column(i, left)` (n,), `left` (n,) what every candidate is worth now, and its diagonal."""
    order: list[int] = []
    taken = torch.zeros_like(diagonal, dtype=torch.bool)
    while len(order) < count:
        fresh = _dpp_block(column, diagonal, taken, min(block, count - len(order)))
        order += fresh
    return torch.tensor(order, device=diagonal.device)


def _dpp_block(column: Callable[[int, Tensor], Tensor], diagonal: Tensor, taken: Tensor, count: int) -> list[int]:
    left = torch.where(taken, -math.inf, diagonal)
    floor = _RANK * float(diagonal.max())
    factor = diagonal.new_empty((count, diagonal.numel()))
    order: list[int] = []
    while len(order) < count:
        best = int(left.argmax())
        if order and float(left[best]) <= floor:
            break
        step = len(order)
        # A sum over dim 0 adds every column in the same order, so equal rows keep equal residuals; a matrix product may not.
        # In blocks that stay in a cache: memory is what bounds it.
        weight = factor[:step, best, None]
        width = max(64, 2**17 // max(1, step) // 64 * 64)
        known = torch.cat([(part * weight).sum(0) for part in factor[:step].split(width, 1)])
        factor[step] = (column(best, left) - known) / max(float(left[best]), floor, 1e-300) ** 0.5
        left = left - factor[step] ** 2
        left[best] = -math.inf
        taken[best] = True
        order.append(best)
    return order
